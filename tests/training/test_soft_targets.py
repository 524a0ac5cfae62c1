"""Losses whose similarities come from the data: sets of labels, and a guide that no tower reads."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from cwcl_jax.cli import DONE, PREEMPTED
from cwcl_jax.config import ConfigError, defaults, from_config_dict
from cwcl_jax.data.pipeline import train_batches
from cwcl_jax.data.sources import open_source
from cwcl_jax.models.tower import TowerConfig
from cwcl_jax.training import run as run_module
from cwcl_jax.training import sharding
from cwcl_jax.training.checks import check_inputs
from cwcl_jax.training.features import check_label_sets
from cwcl_jax.training.metrics import read_json_lines
from cwcl_jax.training.run import train
from cwcl_jax.training.state import initialise, make_blueprint
from cwcl_jax.training.step import GradientFunction
from tests.losses import oracle
from tests.losses.test_fused import CASES, CELL

COUNT, WIDTH = 16, 6


@pytest.fixture(scope="module")
def line(tmp_path_factory):
    """A table that pandas wrote, with a list column, and a .npy of profiles beside it."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    genes = [[f"g{k}" for k in sorted(set(rng.integers(0, 4, 2)))] for _ in range(COUNT)]
    frame = pd.DataFrame(
        {
            "compound": [f"c{k}" for k in rng.integers(0, 6, COUNT)],
            "genes": [[] if n == 3 else found for n, found in enumerate(genes)],
            "u": list(rng.normal(size=(COUNT, WIDTH)).astype(np.float32)),
            "v": list(rng.normal(size=(COUNT, 5)).astype(np.float32)),
        }
    )
    frame.to_parquet(folder / "pairs.parquet")
    np.save(folder / "profile.npy", rng.normal(size=(COUNT, 3, 4)) + 0.3)
    np.save(folder / "guide.npy", rng.normal(size=(COUNT, 4)) + 0.3)
    return (
        f"parquet:{folder}/pairs.parquet?features=u,v&labels=compound,genes"
        f"&features_from=profile:{folder}/profile.npy,guide:{folder}/guide.npy"
    )


def config_of(line, **changes):
    config = defaults(name="soft", total_steps=4, global_batch_size=COUNT, embed_dim=WIDTH)
    config.data.train = line
    config.data.max_labels = 3
    config.towers.u = defaults(
        TowerConfig, encoder="precomputed", overrides={"width": WIDTH}, tune="none", head="none"
    )
    config.towers.v = defaults(TowerConfig, encoder="precomputed", overrides={"width": 5})
    config.loss.weights_from = "u"
    config.logging.every_steps = 1
    config.logging.tensorboard = False
    config.checkpoint.every_steps = 2
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    return from_config_dict(config)


def first_batch(config):
    batches = train_batches(config.data, ("u", "v"), seed=0, global_batch_size=COUNT)
    batch = next(batches)
    batches.close()
    return batch


FRAMES = {
    "label sets": ({"loss.name": "morphoclip", "data.labels": "sets"}, CASES["morphoclip"][1]),
    "profiles": ({"loss.name": "cellclip", "data.guide": "profile"}, CELL),
    "distances of a guide": (
        {"loss.name": "s2l", "loss.weight_function": "distance6_0.1", "data.guide": "guide"},
        CASES["s2l"][1],
    ),
    "masked by a guide": (
        {"loss.name": "gist", "loss.duplicates": "absolute0.6", "data.guide": "guide"},
        {"mask": ("absolute", 0.6)},
    ),
    "guide and label sets": (
        {"loss.duplicates": "masked", "data.guide": "guide", "data.labels": "sets"},
        {"weights": ("affine",), "mask": "labels"},
    ),
}


@pytest.mark.parametrize("name", FRAMES)
def test_the_loss_of_a_step_is_that_of_what_the_files_hold(line, name):
    """Against the dense oracle on one device, and in two chunks on a ring of four."""
    changes, case = FRAMES[name]
    for placement, devices in (({}, 1), ({"accumulation_steps": 2, "loss.form": "ring"}, 4)):
        config = config_of(line, **changes, **placement)
        mesh = sharding.make_mesh(config.mesh, jax.devices()[:devices])
        blueprint = make_blueprint(config, mesh)
        check_inputs(blueprint.config)
        state, locked, _ = initialise(blueprint)
        batch = first_batch(config)
        index = batch.pop("index")
        placed = sharding.put_batch(mesh, batch)
        gradients, metrics, _ = jax.jit(GradientFunction(blueprint))(
            state.params, locked, placed, jnp.zeros((), jnp.int32)
        )
        if devices == 1:
            model = blueprint.model_def.merge({**state.params, **locked})
            u, v = (np.asarray(model.towers[t](placed[t]), np.float64) for t in "uv")
            expected, exact = expected_of(case, config, line, index, u, v)
            whole = gradients
            found = float(gradients["logit_scale"])
            assert found == pytest.approx(float(exact[2]), rel=1e-4, abs=1e-5)
        assert float(metrics["loss"]) == pytest.approx(expected, rel=1e-5)
        for path, leaf in gradients.items():
            np.testing.assert_allclose(leaf, whole[path], rtol=2e-4, atol=1e-6, err_msg=path)


def expected_of(case, config, line, index, u, v):
    """Loss and gradients of the oracle, from the files as pandas and numpy read them."""
    path = line.removeprefix("parquet:").partition("?")[0]
    frame = pd.read_parquet(path)
    kinds = sorted({label for row in frame["genes"] for label in row} | set(frame["compound"]))
    labels = np.full((COUNT, 3), -1)
    for place, row in enumerate(index):
        found = [frame["compound"][row], *frame["genes"][row]]
        labels[place, : len(found)] = [kinds.index(label) for label in found]
    p = u
    if config.data.guide:
        p = np.load(path.replace("pairs.parquet", f"{config.data.guide}.npy"))[index]
        if p.ndim == 3:
            p = p / np.linalg.norm(p, axis=-1, keepdims=True) / np.sqrt(p.shape[1])
            p = p.reshape(COUNT, -1)
        elif "raw" not in case:
            p = oracle.unit_rows(p)
    scale = config.temperature.initial
    return oracle.solve(case, u, v, p, v, labels, scale, config.temperature.bias)


def test_a_run_goes_on_where_it_stopped(line, tmp_path, monkeypatch, capsys):
    config = config_of(line, **FRAMES["guide and label sets"][0])

    class StopAfterTwo(run_module.StopSignal):
        calls = 0

        def requested(self):
            self.calls += 1
            return self.calls == 3

    def losses(folder):
        return [x["loss"] for x in read_json_lines(folder / "metrics.jsonl") if "loss" in x]

    assert train(config, tmp_path / "whole") == DONE
    assert "labels per example in a sample of 16" in capsys.readouterr().out
    monkeypatch.setattr(run_module, "StopSignal", StopAfterTwo)
    assert train(config, tmp_path / "parts") == PREEMPTED
    monkeypatch.undo()
    assert train(config, tmp_path / "parts") == DONE
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    with pytest.raises(ConfigError, match=r"data\.guide"):
        train(config_of(line, **FRAMES["label sets"][0]), tmp_path / "whole")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss.name": "morphoclip"}, "needs labels: set --config.data.labels=class"),
        ({"data.labels": "sets"}, "labels='sets' has no effect.*name=supervised"),
        ({"loss.name": "contrastive", "data.guide": "guide"}, "guide='guide' has no effect.*=cwcl"),
        (
            {"loss.name": "softclip", "data.guide": "guide"},
            "cannot be combined with .*weighted='own'",
        ),
    ],
)
def test_what_the_loss_does_not_read_or_lacks_is_refused(line, changes, message):
    with pytest.raises(ConfigError, match=message):
        check_inputs(config_of(line, **changes))


@pytest.mark.parametrize(
    ("remove", "changes", "message"),
    [
        ("&labels=compound,genes", FRAMES["label sets"][0], "no example of a sample .* has labels"),
        ("guide:", FRAMES["distances of a guide"][0], "has no features 'guide', which data.guide"),
    ],
)
def test_what_the_data_lacks_is_refused_before_the_first_step(
    line, tmp_path, remove, changes, message
):
    with pytest.raises(ConfigError, match=message):
        train(config_of(line.replace(remove, "other:" * (":" in remove)), **changes), tmp_path)


def test_labels_that_nothing_reads_are_told(line, capsys):
    check_label_sets(config_of(line), open_source(line))
    assert "the labels= of config.data.train are not read" in capsys.readouterr().out


def test_too_many_labels_are_told_before_the_first_step(line, tmp_path, capsys):
    """Few of them as a warning, more than may be skipped as an error, with what would help."""
    changes = FRAMES["label sets"][0] | {"data.max_labels": 1}
    source = open_source(line)
    told = (
        r"examples in a sample of config\.data\.train have more labels .*max_labels=1, up to (\d)"
    )
    with pytest.raises(ConfigError, match=told) as refused:
        check_label_sets(config_of(line, **changes), source)
    most = int(re.search(told, str(refused.value))[1])
    check_label_sets(config_of(line, **changes | {"data.max_skipped_share": 0.99}), source)
    assert re.search(told, capsys.readouterr().out)
    check_label_sets(config_of(line, **changes | {"data.max_labels": most}), source)
    assert "max_labels" not in capsys.readouterr().out


def test_a_validation_line_without_labels_is_refused_before_the_first_step(line, tmp_path):
    plain = line.replace("&labels=compound,genes", "")
    changes = FRAMES["label sets"][0] | {"data.validation": plain}
    with pytest.raises(ConfigError, match=r"data\.validation=.*has labels: name their columns"):
        train(config_of(line, **changes), tmp_path)
