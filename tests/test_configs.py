"""Every config and variant: its resolved text is checked in, it builds, and it takes a step.

A changed default shows in the diff of tests/configs/. To accept the change, write them again:

    CWCL_WRITE_CONFIGS=1 pytest tests/test_configs.py -k text
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from cwcl_jax.config import ConfigError, ExperimentConfig, to_json
from cwcl_jax.data.sources import open_source
from cwcl_jax.losses.options import resolve
from cwcl_jax.plan import without_files
from cwcl_jax.planning.inputs import abstract_batch
from cwcl_jax.reproduction.runs import load_experiment
from cwcl_jax.training import sharding
from cwcl_jax.training.options import MeshConfig
from cwcl_jax.training.state import initialise, make_blueprint
from cwcl_jax.training.step import TrainStep

TEXTS = Path(__file__).parent / "configs"
LIT, SPEECH, FEATURES = "configs/lit_cwcl.py", "configs/speech_cwcl.py", "configs/features_cwcl.py"
VARIANTS = [
    (LIT, ""),
    (LIT, "loss=contrastive"),
    (LIT, "paper"),
    (LIT, "paper,text=bert"),
    ("configs/scenes_pretrain.py", ""),
    (SPEECH, ""),
    (SPEECH, "loss=contrastive"),
    (SPEECH, "weights=relu2"),
    (SPEECH, "lock=speech,init=runs/first"),
    (SPEECH, "lock=both,init=runs/first"),
    (SPEECH, "lock=none"),
    (SPEECH, "batch=64"),
    (SPEECH, "head,init=runs/first"),
    (SPEECH, "paper"),
    (SPEECH, "paper,text=bart"),
    (FEATURES, ""),
    (FEATURES, "loss=cellclip"),
    (FEATURES, "both,weights=relu"),
]
# Whose step differs in more than numbers; the others are the same program.
STEPS = [v for v in VARIANTS if v[1] not in ("loss=contrastive", "batch=64", "weights=relu2")]

SMALL = {"width": 32, "depth": 1, "heads": 2, "mlp_width": 32}
OVERRIDES = {
    "vit": {"image_size": 32, "patch_size": 16, **SMALL},
    "text": {"vocab_size": 64, "max_tokens": 16, **SMALL},
    "bert": {"vocab_size": 64, "max_tokens": 16, **SMALL},
    "roberta": {"vocab_size": 64, "max_tokens": 16, **SMALL},
    "bart": {"vocab_size": 64, "max_tokens": 16, **SMALL},
    "whisper": {"max_positions": 50, **SMALL},
    "conv_speech": {"mel_bins": 16, "stem": (16, 16), "width": 16, "dilations": (1,), "heads": 2},
}


def slug(file: str, argument: str) -> str:
    name = f"{Path(file).stem}-{argument}" if argument else Path(file).stem
    return re.sub(r"[^\w.\-]+", "-", name)


IDS = [slug(*variant) for variant in VARIANTS]


@pytest.mark.parametrize(("file", "argument"), VARIANTS, ids=IDS)
def test_resolved_text_is_the_one_checked_in(file, argument):
    made = to_json(load_experiment(file, argument))
    path = TEXTS / f"{slug(file, argument)}.json"
    if os.environ.get("CWCL_WRITE_CONFIGS"):
        path.write_text(made, encoding="utf-8")
    known = path.read_text(encoding="utf-8") if path.exists() else ""
    changed = difflib.unified_diff(known.splitlines(), made.splitlines(), lineterm="", n=1)
    assert made == known, "\n".join(changed) + f"\n{__doc__}"


def test_no_text_without_its_variant():
    assert {path.stem for path in TEXTS.glob("*.json")} == set(IDS)


@pytest.mark.parametrize(("file", "argument"), VARIANTS, ids=IDS)
def test_builds_abstractly_without_any_file(file, argument):
    config = without_files(load_experiment(file, argument))
    mesh = sharding.make_mesh(MeshConfig(), jax.devices())
    blueprint = make_blueprint(config, mesh)
    assert blueprint.trained


def shrunk(config: ExperimentConfig) -> ExperimentConfig:
    """The same experiment with towers, batch and inputs of toy size."""
    towers, widths = {}, {}
    for modality, tower in config.towers.items():
        overrides = OVERRIDES.get(tower.encoder, dict(tower.overrides))
        small = dataclasses.replace(tower, preset="", weights="", overrides=overrides)
        towers[modality], widths[modality] = small, overrides["width"]
    bare = [modality for modality, tower in towers.items() if tower.head == "none"]
    data = dataclasses.replace(
        config.data,
        image=dataclasses.replace(config.data.image, size=32),
        text=dataclasses.replace(config.data.text, max_tokens=16),
        speech=dataclasses.replace(config.data.speech, max_seconds=1.0, buckets=()),
    )
    return dataclasses.replace(
        config,
        towers=towers,
        data=data,
        embed_dim=widths[bare[0]] if bare else 16,
        global_batch_size=8,
        accumulation_steps=min(config.accumulation_steps, 2),
        total_steps=2,
    )


@pytest.mark.parametrize(("file", "argument"), STEPS, ids=[slug(*v) for v in STEPS])
def test_takes_a_step_at_toy_size(file, argument):
    config = shrunk(load_experiment(file, argument))
    blueprint = make_blueprint(config, sharding.make_mesh(MeshConfig(), jax.devices()[:1]))
    state, locked, _ = initialise(blueprint)
    before = jax.device_get(state.params)
    batch = sharding.put_batch(blueprint.mesh, made_batch(blueprint))
    state, metrics = TrainStep(blueprint)(state, locked, batch)
    assert np.isfinite(float(metrics["loss"]))
    assert any(not np.array_equal(before[p], state.params[p]) for p in before)


def made_batch(blueprint) -> dict:
    rng = np.random.default_rng(0)

    def values(name, leaf):
        if name == "mask":
            return np.ones(leaf.shape, bool)
        if name == "length":
            return np.full(leaf.shape, 16_000, np.int32)
        if name == "embeds":
            return rng.normal(size=leaf.shape).astype(np.float32)
        return rng.integers(0, 60, leaf.shape).astype(leaf.dtype)

    return {
        modality: {name: values(name, leaf) for name, leaf in inputs.items()}
        for modality, inputs in abstract_batch(blueprint).items()
    }


def test_features_of_your_own_give_the_widths(tmp_path):
    path = tmp_path / "mine.npz"
    np.savez(path, profile=np.zeros((5, 12), np.float32), compound=np.zeros((5, 7), np.float16))
    config = load_experiment(FEATURES, f"data={path},u=profile,v=compound")
    assert config.towers["profile"].overrides == {"width": 12}
    assert config.towers["compound"].overrides == {"width": 7}
    assert config.embed_dim == 12
    assert config.modalities == ("profile", "compound")
    assert len(open_source(config.data.train)) == 5


def test_features_that_are_missing_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"no \.npz file"):
        load_experiment(FEATURES, f"data={tmp_path}/none.npz")
    np.savez(tmp_path / "a.npz", first=np.zeros((2, 3)))
    with pytest.raises(ConfigError, match="no array 'u', only first"):
        load_experiment(FEATURES, f"data={tmp_path}/a.npz")


@pytest.mark.parametrize("shape", [(), (5,)])
def test_features_without_a_width_are_an_error(tmp_path, shape):
    path = tmp_path / "flat.npz"
    np.savez(path, u=np.zeros(shape), v=np.zeros((5, 7)))
    with pytest.raises(ConfigError, match=r"'u' has shape \(.*\), not \(examples, width\)"):
        load_experiment(FEATURES, f"data={path}")


@pytest.mark.parametrize(
    ("file", "argument", "message"),
    [
        (LIT, "paper,text=brt", "use one of scratch, bert"),
        (LIT, "text=bert", "goes with the paper's recipe: paper,text"),
        ("configs/scenes_pretrain.py", "loss=cwcl", "takes no argument"),
        (FEATURES, "u=profile,v=compound", "u and v name arrays of data=FILE"),
        (FEATURES, "test=held_out.npz", "name data"),
    ],
)
def test_arguments_that_would_do_nothing_are_errors(file, argument, message):
    with pytest.raises(ConfigError, match=message):
        load_experiment(file, argument)


def test_batches_of_the_papers_speech_recipe_see_its_twenty_epochs():
    """Table 7: so many examples, and so many of warm-up; the learning rate in proportion."""
    for batch, rate in ((0, 3e-5), (20, 3e-5), (40, 6e-5), (80, 12e-5)):
        config = load_experiment(SPEECH, f"paper,batch={batch}")
        size = config.global_batch_size
        assert size == (batch or 20)
        assert config.total_steps * size == pytest.approx(20 * 1_013_630, abs=size)
        assert config.optimizer.warmup_steps * size == 12_500 * 20
        assert config.optimizer.learning_rate == pytest.approx(rate)


def test_made_features_are_repeatable_and_u_knows_the_classes():
    short, long = open_source("made:train?n=50"), open_source("made:train?n=400")
    for name in ("u", "v"):
        np.testing.assert_array_equal(short[7]["embeds"][name], long[7]["embeds"][name])
    labels = np.asarray([long[i]["label"] for i in range(400)])
    u = np.stack([long[i]["embeds"]["u"] for i in range(400)])
    u /= np.linalg.norm(u, axis=1, keepdims=True)
    cosines, same = u @ u.T, labels[:, None] == labels
    off = ~np.eye(400, dtype=bool)
    assert cosines[same & off].mean() > cosines[~same].mean() + 0.3
    assert long.fingerprint() != short.fingerprint()


def test_made_features_refuse_what_they_do_not_have():
    with pytest.raises(ValueError, match="splits train and test"):
        open_source("made:validation")


def test_default_loss_of_every_config_is_the_papers():
    for file in (LIT, SPEECH, FEATURES):
        loss = load_experiment(file).loss
        frame = resolve(loss)
        assert (loss.name, frame.weights.text) == ("cwcl", "affine")
        assert frame.direction_weights == (1.0, 1.0)
