"""Every config and variant: its resolved fields are checked in, it builds, and it takes a step.

Two configs are checked in whole, of the others what differs from one of these. A changed default
shows in the diff of tests/configs/. To accept the change, write them again:

    CWCL_WRITE_CONFIGS=1 pytest tests/test_configs.py -k checked_in
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import operator
import os
import re
from pathlib import Path
from typing import Any

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

RESOLVED = Path(__file__).parent / "configs" / "resolved.json"
LIT, SPEECH, FEATURES = "configs/lit_cwcl.py", "configs/speech_cwcl.py", "configs/features_cwcl.py"
VARIANTS = [
    (LIT, ""),
    (LIT, "loss=contrastive"),
    (LIT, "projection=trained"),
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
    (SPEECH, "head,init=runs/first,projection=trained"),
    (SPEECH, "paper"),
    (SPEECH, "paper,text=bart"),
    (FEATURES, ""),
    (FEATURES, "loss=cellclip"),
    (FEATURES, "projection=trained,weights=relu2"),
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


def difference(base: Any, other: Any, path: str = "") -> dict[str, Any]:
    """Path -> value of what `other` has that `base` has not; null where it lacks something."""
    if not (isinstance(base, dict) and isinstance(other, dict)):
        return {} if base == other else {path: other}
    found: dict[str, Any] = {}
    for name in base.keys() | other.keys():
        found |= difference(base.get(name), other.get(name), f"{path}.{name}" if path else name)
    return found


def test_resolved_fields_are_those_checked_in():
    made = {slug(*variant): json.loads(to_json(load_experiment(*variant))) for variant in VARIANTS}
    told: dict[str, Any] = {}
    for name, fields in made.items():
        nearest = {other: difference(made[other], fields) for other in told}
        base = min(nearest, key=lambda other: len(nearest[other]), default="")
        whole = name in (slug(LIT, ""), slug(SPEECH, ""))
        told[name] = fields if whole else {"differs from": base} | nearest[base]
    text = json.dumps(told, indent=1, sort_keys=True) + "\n"
    if os.environ.get("CWCL_WRITE_CONFIGS"):
        RESOLVED.write_text(text, encoding="utf-8")
    known = RESOLVED.read_text(encoding="utf-8")
    changed = difflib.unified_diff(known.splitlines(), text.splitlines(), lineterm="", n=1)
    assert text == known, "\n".join(changed) + f"\n{__doc__}"


@pytest.mark.parametrize(("file", "argument"), STEPS, ids=[slug(*v) for v in STEPS])
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
    small = {
        "image": {"size": 32},
        "text": {"max_tokens": 16},
        "speech": {"max_seconds": 1.0, "buckets": ()},
        "features": {"shape": ()},
    }
    inputs = {
        name: dataclasses.replace(modality, **small.get(modality.name, {})).fitted(
            {"width": widths.get(name)}
        )
        for name, modality in config.data.inputs.items()
    }
    data = dataclasses.replace(config.data, inputs=inputs)
    return dataclasses.replace(
        config,
        towers=towers,
        data=data,
        embed_dim=widths[bare[0]] if bare else 16,
        global_batch_size=8,
        accumulation_steps=min(config.accumulation_steps, 2),
        total_steps=2,
    )


# Slow: their towers and losses are those of others, locked in another way.
ALIKE = [
    (LIT, "projection=trained"),
    (LIT, "paper"),
    (SPEECH, "lock=speech,init=runs/first"),
    (SPEECH, "lock=both,init=runs/first"),
    (SPEECH, "head,init=runs/first"),
    (FEATURES, "projection=trained,weights=relu2"),
]


@pytest.mark.parametrize(
    ("file", "argument"),
    [pytest.param(*v, marks=pytest.mark.slow if v in ALIKE else ()) for v in STEPS],
    ids=[slug(*v) for v in STEPS],
)
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
        if name == "features":
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
    assert config.tower_names == ("profile", "compound")
    assert len(open_source(config.data.train)) == 5


def test_features_that_are_missing_are_named(tmp_path):
    with pytest.raises(ConfigError, match="there is no such file"):
        load_experiment(FEATURES, f"data={tmp_path}/none.npz")
    np.save(tmp_path / "one.npy", np.zeros((2, 3)))
    with pytest.raises(ConfigError, match=r"is no \.npz file.*arrays:"):
        load_experiment(FEATURES, f"data={tmp_path}/one.npy")
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
        (LIT, "text=bert", "needs the paper's recipe: paper,text"),
        (LIT, "test_items=0", "at least one item"),
        (LIT, "paper,test_items=5000", "is for the drawn scenes"),
        ("configs/scenes_pretrain.py", "loss=cwcl", "takes no argument"),
        (FEATURES, "u=profile,v=compound", "u, v and test=FILE need data=FILE"),
        (FEATURES, "test=held_out.npz", "need data=FILE"),
        *((file, "loss=relu2", "other option: weights=relu2") for file in (LIT, SPEECH, FEATURES)),
        *((file, "loss=uniform", "weights=uniform") for file in (LIT, SPEECH, FEATURES)),
        *((file, "weights=sigmoid", "option: loss=sigmoid") for file in (LIT, SPEECH, FEATURES)),
        *((file, "weights=cubic", "no loss is called") for file in (LIT, SPEECH, FEATURES)),
        (LIT, "loss=contrastive,weights=relu2", "loss=contrastive has no weights or its own"),
        *((file, "projection=yes", "use one of trained, none") for file in (LIT, SPEECH, FEATURES)),
    ],
)
def test_arguments_that_would_do_nothing_are_errors(file, argument, message):
    with pytest.raises(ConfigError, match=message):
        load_experiment(file, argument)


@pytest.mark.parametrize("file", [LIT, SPEECH, FEATURES])
def test_weights_mean_the_same_in_every_config(file):
    for short in ("relu2", "relu4", "exp0.2", "uniform", "uniform0.53", "calibrated_relu0.3"):
        loss = load_experiment(file, f"weights={short}").loss
        assert (loss.name, loss.weight_function) == ("cwcl", short)
    assert load_experiment(file, "loss=contrastive").loss.name == "contrastive"


@pytest.mark.parametrize(
    ("file", "argument", "head", "tune"),
    [
        (LIT, "", "none", "none"),
        (LIT, "projection=trained", "linear", "head"),
        (LIT, "paper", "linear", "head"),
        (LIT, "paper,projection=none", "none", "none"),
        (SPEECH, "", "none", "none"),
        (SPEECH, "projection=trained", "linear", "head"),
        (SPEECH, "lock=both", "linear", "head"),
        (SPEECH, "lock=none,projection=trained", "linear", "all"),
        (SPEECH, "lock=speech", "none", "all"),
        (SPEECH, "head,init=x,projection=trained", "linear", "head"),
        (SPEECH, "paper", "linear", "head"),
        (SPEECH, "paper,lock=none", "linear", "all"),
        (SPEECH, "paper,projection=none", "none", "none"),
        (FEATURES, "", "none", "none"),
        (FEATURES, "projection=trained", "linear", "head"),
    ],
)
def test_the_projection_of_the_side_that_gives_the_weights(file, argument, head, tune):
    config = load_experiment(file, argument)
    tower = config.towers[config.loss.weights_from]
    assert (tower.head, tower.tune) == (head, tune)


def test_runs_are_named_after_their_config_and_argument():
    """By default into the folder of this name: what tells two commands apart stands in it."""
    names = [load_experiment(*variant).name for variant in VARIANTS]
    assert len(set(names)) == len(VARIANTS)
    assert load_experiment(SPEECH, "lock=both").name == "speech_cwcl-lock-both"
    # Neither the order of the entries nor a default that is written out makes another name.
    assert (
        load_experiment(SPEECH, "batch=64,weights=exp0.1").name
        == "speech_cwcl-weights-exp0.1-batch-64"
    )
    assert load_experiment(SPEECH, "weights=exp0.1,loss=cwcl,batch=64").name.endswith("-batch-64")
    assert load_experiment(SPEECH, "init=/a/b c").name == "speech_cwcl-init-a-b-c"


def test_another_batch_keeps_the_examples_of_training_and_warmup():
    base, small = load_experiment(SPEECH), load_experiment(SPEECH, "batch=32")
    for value in ("total_steps", "optimizer.warmup_steps"):
        before, after = (operator.attrgetter(value)(config) for config in (base, small))
        assert after == 4 * before
    assert small.optimizer.learning_rate == pytest.approx(base.optimizer.learning_rate / 4)


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
        np.testing.assert_array_equal(short[7]["features"][name], long[7]["features"][name])
    labels = np.asarray([long[i]["label"] for i in range(400)])
    u = np.stack([long[i]["features"]["u"] for i in range(400)])
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
