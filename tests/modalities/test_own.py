"""A modality, an encoder and a source of one's own: built, trained, resumed, exported, refused."""

import importlib
import json
import linecache
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cwcl_jax import export as export_command
from cwcl_jax import train as train_command
from cwcl_jax.api import load_model
from cwcl_jax.config import ConfigError, defaults, from_config_dict, from_json, to_json
from cwcl_jax.data.pipeline import train_batches
from cwcl_jax.data.skipping import BadExample, TooManyBadExamples
from cwcl_jax.exit_codes import DONE
from cwcl_jax.export import export
from cwcl_jax.modalities import WrongInputs, modality_class
from cwcl_jax.models.leaves import split
from cwcl_jax.models.own_encoder import OwnEncoder, settings_of
from cwcl_jax.models.tower import TowerConfig
from cwcl_jax.models.transformer import Execution
from cwcl_jax.planning.estimate import step_work
from cwcl_jax.planning.inputs import abstract_batch
from cwcl_jax.training import sharding
from cwcl_jax.training.embedding import preprocessing
from cwcl_jax.training.encode import load_encoder
from cwcl_jax.training.metrics import read_json_lines
from cwcl_jax.training.options import MeshConfig
from cwcl_jax.training.run import train
from cwcl_jax.training.state import import_towers, make_blueprint
from cwcl_jax.training.workdir import load_config
from cwcl_jax.weights.writers import write_safetensors
from tests.training.toy import TEXT

ROOT = Path(__file__).parents[2]
OWN = """
import dataclasses
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from cwcl_jax.data.skipping import BadExample
from cwcl_jax.data.sources import Source
from cwcl_jax.evaluation.results import TaskResult
from cwcl_jax.evaluation.tasks.base import Task
from cwcl_jax.modalities import ArraySpec, Modality

class Waves(Source):
    def __init__(self, path, *, n=64):
        self.n = n
    def __len__(self):
        return self.n
    def read(self, index, fields):
        wave = np.sin(np.arange(8.0) * (1 + index % 4)).astype(np.float32)
        return {"id": str(index), "wave": wave, "text": f"{'abcd'[index % 4]} wave"}
    def fingerprint(self):
        return f"waves {self.n}"

@dataclasses.dataclass(frozen=True)
class WaveInputs(Modality):
    field: str = "wave"
    samples: int = 8
    gain: float = 1.0
    training_only = ("gain",)
    def arrays(self):
        return {"signal": ArraySpec((self.samples,), "float32")}
    def prepare(self, value, draws=None):
        if not np.isfinite(value).all():
            raise BadExample("wave not finite")
        loud = 1.0 if draws is None else draws.uniform(1.0, self.gain)
        return {"signal": np.float32(loud) * value[: self.samples]}

@dataclasses.dataclass(frozen=True)
class Longer(WaveInputs):
    def arrays(self):
        return {"signal": ArraySpec((9,), "float32")}

@dataclasses.dataclass(frozen=True)
class Whole(WaveInputs):
    def prepare(self, value, draws=None):
        return {"signal": np.arange(self.samples)}

@dataclasses.dataclass(frozen=True)
class Failing(WaveInputs):
    def prepare(self, value, draws=None):
        return {"signal": value[:, 0]}

@dataclasses.dataclass(frozen=True)
class Holed(WaveInputs):
    def prepare(self, value, draws=None):
        return {"signal": np.where(value > 2, value, np.nan)}

class Encoder(nnx.Module):
    def __init__(self, width: int = 16, drop: float = 0.0, *, rngs):
        self.dense = nnx.Linear(8, width, rngs=rngs)
        self.norm = nnx.BatchNorm(width, momentum=0.5, rngs=rngs)
        self.drop = nnx.Dropout(drop, rngs=rngs)
        self.window = nnx.data(jnp.hanning(8))
    def __call__(self, inputs):
        return self.drop(self.norm(self.dense(inputs["signal"] * self.window[None])))

class InLinen(linen.Module):
    width: int = 16
    @linen.compact
    def __call__(self, inputs):
        return linen.Dense(self.width)(inputs["signal"])

class Noisy(linen.Module):
    @linen.compact
    def __call__(self, inputs, train: bool = False):
        x = linen.Dense(4)(inputs["signal"])
        x = linen.BatchNorm(use_running_average=not train, momentum=0.5)(x)
        return linen.Dropout(0.5)(x, deterministic=not train)

class Undecided(linen.Module):
    @linen.compact
    def __call__(self, inputs):
        return linen.BatchNorm()(inputs["signal"])

class Told(nnx.Module):
    def __init__(self, *, rngs):
        self.dense = nnx.Linear(8, 4, rngs=rngs)
    def __call__(self, inputs, *, deterministic: bool):
        return self.dense(inputs["signal"]) * (1.0 if deterministic else 2.0)

class Flat(nnx.Module):
    def __init__(self, *, rngs):
        pass
    def __call__(self, inputs):
        return inputs["signal"].sum(axis=1)

class Plain(nnx.Module):
    def __init__(self, *, rngs):
        self.window = jnp.hanning(8)
    def __call__(self, inputs):
        return inputs["signal"] * self.window[None]

class Remembering(nnx.Module):
    def __init__(self, *, rngs):
        self.seen = nnx.Cache(jnp.zeros(3))
    def __call__(self, inputs):
        return inputs["signal"]

NUMBER = 3

def a_list(path):
    return [path]

def dot_loss(u, v, logit_scale):
    return -jnp.exp(logit_scale) * (u * v).sum(axis=1).mean()

@dataclasses.dataclass(frozen=True)
class Count(Task):
    def run(self, name, runner):
        items = runner.items(self.open(runner), self.tower)
        return TaskResult(name, self, metrics={"count": float(len(items))})

def odd_loss(u, w):
    return u.sum()

def rows_loss(u, v):
    return (u * v).sum(axis=1)

def negative(cosine):
    return cosine

def summed(cosine):
    return cosine.sum()
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module of the user's in a folder that Python finds."""
    (tmp_path / "own_waves.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("own_waves", None)


def config(**changes):
    made = defaults(name="waves", total_steps=4, global_batch_size=16, embed_dim=16)
    made.data.train = "own_waves:Waves:anywhere?n=64"
    made.data.wave = {"gain": 1.0}
    made.data.text.max_tokens = 16
    made.data.max_cut_share = 1.0  # words of no scene, under the small tokenizer
    made.towers.text = defaults(TowerConfig, encoder="text", overrides=TEXT, tune="none")
    made.towers.wave = defaults(
        TowerConfig, encoder="own_waves:Encoder", modality="own_waves:WaveInputs"
    )
    made.loss.weights_from = "text"
    made.logging.every_steps = 1
    made.logging.tensorboard = False
    made.checkpoint.every_steps = 2
    with made.unlocked():
        for path, value in changes.items():
            made.update_from_flattened_dict({path: value})
    return from_config_dict(made)


def tiny(modality):
    """A modality of the module, without its encoder."""
    return modality_class(f"own_waves:{modality}")()


@pytest.mark.parametrize(
    ("modality", "message"),
    [
        ("Longer", r"Longer gives .*float32\[8\].*Longer.arrays\(\) declares .*float32\[9\]"),
        ("Whole", r"int64\[8\].* declares .*float32\[8\]"),
        ("Failing", r"Failing.prepare fails on an array float32\[8\]: IndexError"),
    ],
)
def test_a_modality_that_gives_other_arrays_than_it_says_is_refused(own, modality, message):
    made = config(**{"towers.wave.modality": f"own_waves:{modality}"})
    batches = train_batches(made.data, ("wave", "text"), seed=0, global_batch_size=16)
    with pytest.raises(WrongInputs, match=f"config.data.wave: .*{message}"):
        next(batches)
    batches.close()
    wave = np.ones(8, np.float32)
    with pytest.raises(ValueError, match=f"item 0: .*{message}"):
        tiny(modality).batch([wave])


def test_inputs_that_are_not_finite_make_an_example_unusable(own):
    made = config(**{"towers.wave.modality": "own_waves:Holed"})
    batches = train_batches(made.data, ("wave", "text"), seed=0, global_batch_size=16)
    with pytest.raises(TooManyBadExamples, match="signal not finite"):
        next(batches)
    batches.close()
    with pytest.raises(BadExample, match="item 3: NaN"):
        tiny("Holed").batch([np.full(8, 3.0, np.float32)] * 3 + [np.ones(8, np.float32)])


def test_numbers_of_another_width_come_in_the_dtype_that_is_said(own):
    rows = tiny("WaveInputs").batch([np.ones(8)])
    assert rows["signal"].dtype == np.float32


def losses(workdir):
    return [r["loss"] for r in read_json_lines(workdir / "metrics.jsonl") if "loss" in r]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of the module's encoder, long enough to learn; its code is that of every `own`."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "own_waves.py").write_text(OWN)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        long = config(total_steps=40, **{"optimizer.learning_rate": 1e-2, "towers.wave.dtype": ""})
        assert train(long, folder / "run") == DONE
        sys.modules.pop("own_waves")
    linecache.clearcache()
    return folder / "run"


def test_it_trains_and_is_encoded_with_its_running_statistics(trained, own):
    whole = losses(trained)
    assert whole[-1] < whole[0] - 0.3
    encoder, _ = load_encoder(trained)
    mean = "towers/wave/encoder/module/norm/mean"
    assert np.abs(np.asarray(encoder._params[mean])).max() > 0.01
    signal = np.sin(np.outer(1 + np.arange(3), np.arange(8.0))).astype(np.float32)
    alone = encoder.encode("wave", {"signal": signal[:1]})
    np.testing.assert_allclose(encoder.encode("wave", {"signal": signal})[:1], alone, atol=1e-5)


@pytest.mark.slow
def test_a_run_cut_in_two_gives_the_losses_of_one(own, tmp_path, monkeypatch):
    """Slow: two runs; test_run.py resumes one bit for bit."""
    made = config(**{"towers.wave.overrides": {"drop": 0.2}})
    assert train(made, tmp_path / "whole") == DONE

    from cwcl_jax.training import run as run_module

    class StopAfterTwo(run_module.StopSignal):
        calls = 0

        def requested(self):
            StopAfterTwo.calls += 1
            return StopAfterTwo.calls >= 2

    monkeypatch.setattr(run_module, "StopSignal", StopAfterTwo)
    assert train(made, tmp_path / "parts") != DONE
    monkeypatch.undo()
    sys.path.insert(0, str(own))
    assert train(made, tmp_path / "parts") == DONE
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_settings_survive_json_and_options_are_strict(own):
    made = config(**{"data.wave.gain": 2.0})
    assert from_json(to_json(made)) == made
    assert made.data.inputs["wave"].gain == 2.0
    with pytest.raises(ConfigError, match=r"config\.data\.wave has no field 'gian'.*'gain'"):
        config(**{"data.wave.gian": 2.0})
    with pytest.raises(ConfigError, match=r"config\.data has no field 'waves'.*'wave'"):
        config(**{"data.waves": {"gain": 1.0}})
    # What only training does has no influence on stored features.
    assert preprocessing(made, "wave", "features") == preprocessing(config(), "wave", "features")
    assert preprocessing(made, "wave", "features") != preprocessing(
        config(**{"data.wave.samples": 7}), "wave", "features"
    )


def test_random_draws_follow_the_seed_and_differ_between_examples(own):
    made = config(**{"data.wave.gain": 3.0})

    def first(seed):
        batches = train_batches(made.data, ("wave", "text"), seed=seed, global_batch_size=16)
        batch = next(batches)
        batches.close()
        return batch

    one, again, other = first(0), first(0), first(1)
    np.testing.assert_array_equal(one["wave"]["signal"], again["wave"]["signal"])
    assert not np.array_equal(one["wave"]["signal"], other["wave"]["signal"])
    assert one["text"]["tokens"].shape == (16, 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"towers.wave.encoder": "nowhere:Encoder"}, "no module 'nowhere'.*PYTHONPATH"),
        ({"towers.wave.encoder": "own_waves:Encoders"}, "has no 'Encoders'"),
        ({"towers.wave.encoder": "own_waves:NUMBER"}, "not a class of flax.nnx or flax.linen"),
        ({"towers.wave.encoder": "own_waves:Flat"}, r"shape \(b, f\).*b=2 it returns \(2,\)"),
        ({"towers.wave.encoder": "own_waves:Remembering"}, "module/seen is a Cache"),
        ({"towers.wave.encoder": "own_waves:Plain"}, r"'window' .*nnx\.data"),
        ({"towers.wave.encoder": "own_waves:Undecided"}, "built: .*an argument train or determ"),
        ({"towers.wave.overrides": {"widht": 3}}, "no argument 'widht'; did you mean 'width'"),
        ({"towers.wave.preset": "tiny"}, "your own and has no preset"),
        ({"towers.wave.scan_layers": True}, "scan_layers and remat are for the built-in"),
        ({"towers.wave.modality": ""}, "does not say what it reads"),
        ({"towers.wave.modality": "own_waves:Encoder"}, "not a subclass of .*Modality"),
        ({"towers.wave.modality": "sound"}, "unknown modality 'sound'"),
        ({"loss.name": "own_waves:odd_loss"}, "config.loss: .*takes an argument 'w'"),
        ({"loss.name": "own_waves:nothing"}, "config.loss: .* has no 'nothing'"),
        ({"loss.name": "own_waves:NUMBER"}, "config.loss: .* is a int, not a function"),
        ({"loss.name": "own_waves:rows_loss"}, r"must return a scalar, got shape \(4,\)"),
        ({"loss.weight_function": "own_waves:negative"}, "cosine of -1.0 is -1; .* at least 0"),
        ({"loss.weight_function": "own_waves:summed"}, "must work elementwise"),
        ({"data.wave.samples": 7}, r"fails on inputs .*float32\[2, 7\]"),
        ({"data.train": "own_waves:Wave:x"}, "has no 'Wave'"),
        ({"data.train": "own_waves:Waves"}, "has no path: write own_waves:Waves:PATH"),
        ({"data.train": "own_waves:Encoder:x"}, "source 'own_waves:Encoder' fails on 'x': Type"),
        ({"data.train": "own_waves:a_list:x"}, "returns a list, which is not a subclass"),
        ({"data.train": "own_waves:Waves:x?m=3"}, "has no option 'm'"),
    ],
)
def test_what_cannot_work_is_one_error_before_the_first_step(own, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        train(config(**changes), tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_an_encoder_with_running_statistics_is_planned(own):
    blueprint = make_blueprint(config(), sharding.make_mesh(MeshConfig(), jax.devices()[:1]))
    work = step_work(blueprint, abstract_batch(blueprint))
    dense = 2 * 16 * 8 * 16  # products of the encoder's layer alone: batch x in x out
    assert sum(work.flops.values()) > 3 * dense


def test_an_encoder_in_linen_trains(own, tmp_path):
    made = config(
        total_steps=10,
        **{"towers.wave.encoder": "own_waves:InLinen", "optimizer.learning_rate": 1e-2},
    )
    assert train(made, tmp_path / "run") == DONE
    found = losses(tmp_path / "run")
    assert found[-1] < found[0]


def built(name):
    """An encoder of the module as the tower holds it, its definition and leaves."""
    arrays = {"signal": ((8,), "float32")}
    settings = settings_of(name, "", {}, "")
    encoder = OwnEncoder(name, settings, Execution(jnp.float32), arrays, rngs=nnx.Rngs(0))
    return split(encoder)


def test_an_encoder_in_linen_is_told_that_it_trains(own):
    definition, leaves = built("own_waves:Noisy")
    signal = {"signal": jnp.arange(24.0).reshape(3, 8)}
    training = definition.merge(leaves, jax.random.key(0))
    dropped = training(signal, jax.random.key(0))
    assert float((dropped == 0).mean()) > 0.2
    x = signal["signal"] @ leaves["module/Dense_0/kernel"]
    statistics = definition.statistics_of(training)
    (mean,) = [value for path, value in statistics.items() if path.endswith("mean")]
    np.testing.assert_allclose(mean, 0.5 * x.mean(axis=0), rtol=1e-5)
    resting = definition.merge(leaves)
    np.testing.assert_allclose(resting(signal), x / np.sqrt(1 + 1e-5), rtol=1e-5)
    assert set(definition.statistics_of(resting)) == set(statistics)


def test_an_encoder_whose_call_asks_is_told_whether_it_trains(own):
    definition, leaves = built("own_waves:Told")
    encoder, signal = definition.merge(leaves), {"signal": jnp.ones((1, 8))}
    np.testing.assert_allclose(encoder(signal, jax.random.key(0)), 2 * encoder(signal), rtol=1e-6)


@pytest.mark.parametrize("prefix", ["towers/wave/", ""])
def test_an_encoder_of_ones_own_starts_from_a_file(own, tmp_path, prefix):
    """From an export, or from a file that has the paths of the module's leaves alone."""
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    first = make_blueprint(config(), mesh)
    below = "towers/wave/encoder/module/"
    paths = [path for path in first.abstract if path.startswith(below)]
    new = {path: np.full(first.abstract[path].shape, n, np.float32) for n, path in enumerate(paths)}
    cut = "" if prefix else below
    file = tmp_path / "own.safetensors"
    write_safetensors(file, {path.removeprefix(cut): value for path, value in new.items()})
    made = config(**{"towers.wave.weights": str(file)})
    leaves, sources = import_towers(make_blueprint(made, mesh))
    assert {path.removeprefix(below) for path in leaves} >= {"norm/mean", "window", "dense/kernel"}
    for path, value in new.items():
        np.testing.assert_array_equal(leaves[path], value)
    assert sources["wave"].sha256
    narrow = {"towers.wave.weights": str(file), "towers.wave.overrides.width": 8}
    with pytest.raises(ConfigError, match=r"towers\.wave\.weights=.*shape"):
        import_towers(make_blueprint(config(**narrow), mesh))


def test_last_k_of_an_encoder_of_ones_own_says_what_to_do(own):
    with pytest.raises(ConfigError, match=r"'last:1' counts blocks.* by a regex"):
        make_blueprint(
            config(**{"towers.wave.tune": "last:1"}),
            sharding.make_mesh(MeshConfig(), jax.devices()[:1]),
        )


def test_an_export_is_loaded_only_where_its_code_is_allowed(trained, own, tmp_path):
    with pytest.raises(PermissionError, match="own_waves:Encoder, own_waves:WaveInputs"):
        load_model(trained)
    model = load_model(trained, allow_code=True)
    export(model, tmp_path / "out", "safetensors")
    with pytest.raises(PermissionError, match="allow_code=True"):
        load_model(tmp_path / "out")
    again = load_model(tmp_path / "out", allow_code=True)
    waves = [np.sin(np.arange(8.0) * k).astype(np.float32) for k in (1, 2, 3)]
    rows = again.encode_items("wave", waves)
    for wrong in (np.ones((2, 9)), np.ones(8), np.ones((2, 8, 1))):
        with pytest.raises(ValueError, match=r"signal of shape \(b, 8\), one row per item: not"):
            again.encode("wave", {"signal": wrong})
    with pytest.raises(ValueError, match=r"features of shape \(b, 16\)"):
        again.encode("wave", {"features": np.ones((2, 15))})
    np.testing.assert_allclose(rows, model.encode_items("wave", waves), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    encoder, _ = load_encoder(trained)
    np.testing.assert_allclose(encoder.encode("wave", {"signal": np.stack(waves)}), rows, atol=1e-5)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (
            {"source": "arrays:test.npz"},
            "tasks.t.source='arrays:test.npz' provides features for .*'w",
        ),
        ({"text_tower": "wave"}, "tasks.t.text_tower='wave' cannot read sentences .*WaveInputs"),
    ],
)
def test_a_task_that_feeds_a_tower_with_something_else_is_refused(own, monkeypatch, task, message):
    monkeypatch.chdir(own)
    np.savez("test.npz", wave=np.ones((4, 8), np.float32), label=list("abcd"))
    fields = {"source": "arrays:test.npz?raw=wave", "tower": "wave", "templates": "name"} | task
    made = config(**{"evaluation.tasks": {"t": fields}})
    with pytest.raises(ConfigError, match=message):
        train(made, own / "run")
    assert not (own / "run" / "metrics.jsonl").exists()


def rewrite(folder, old, new):
    """Changes the module on disk, and lets it be imported anew."""
    text = (folder / "own_waves.py").read_text()
    assert old in text
    (folder / "own_waves.py").write_text(text.replace(old, new))
    sys.modules.pop("own_waves")
    linecache.clearcache()
    importlib.invalidate_caches()


def test_changed_code_is_told_before_a_run_goes_on(own, tmp_path, capsys):
    task = {"kind": "own_waves:Count", "source": "own_waves:Waves:x", "tower": "wave"}
    loss = {"loss.name": "own_waves:dot_loss", "evaluation.tasks": {"t": task}}
    made = config(total_steps=2, **loss)
    assert train(made, tmp_path / "run") == DONE
    export(load_model(tmp_path / "run", allow_code=True), tmp_path / "out", "safetensors")
    rewrite(own, "class Encoder", "# the same numbers\nclass Encoder")
    assert train(made, tmp_path / "run") == DONE  # complete, and nothing to do
    # A task of another code: the complete run is evaluated again.
    rewrite(own, "float(len(items))", "2.0 * len(items)")
    capsys.readouterr()
    assert train(config(total_steps=2, **loss), tmp_path / "run") == DONE
    assert "128" in capsys.readouterr().out
    rewrite(own, "(u * v).sum(axis=1).mean()", "(u * v).sum()")
    with pytest.raises(ConfigError, match="the code of own_waves:dot_loss changed"):
        train(config(total_steps=2, **loss), tmp_path / "run")
    load_encoder(tmp_path / "run")  # the loss has no part in it
    rewrite(own, "momentum=0.5", "momentum=0.6")
    with pytest.raises(ConfigError, match=r"code of own_waves:Encoder changed.*remove .*code.json"):
        load_encoder(tmp_path / "run")
    with pytest.raises(ValueError, match="own_waves:Encoder changed since the model was exported"):
        load_model(tmp_path / "out", allow_code=True)


def test_a_run_on_data_of_ones_own_is_loaded_without_its_code(own, tmp_path, monkeypatch):
    (tmp_path / "own_data.py").write_text(OWN)
    made = config(
        total_steps=1,
        **{
            "data.train": "own_data:Waves:x", "data.wave": {"field": "text", "max_tokens": 16},
            "towers.wave": defaults(TowerConfig, encoder="text", overrides=TEXT).to_dict(),
        },
    )  # fmt: skip
    assert train(made, tmp_path / "run") == DONE
    sys.modules.pop("own_data")
    model = load_model(tmp_path / "run")
    with pytest.warns(UserWarning, match="outside the words of the package's tokenizer"):
        assert model.encode_items("wave", ["a wave"]).shape == (1, 16)
    assert "own_data" not in sys.modules


def test_code_that_is_missing_is_no_fault_of_the_version(own, tmp_path, monkeypatch):
    task = {"kind": "own_waves:Count", "source": "own_waves:Waves:x", "tower": "wave"}
    (tmp_path / "config.json").write_text(to_json(config(**{"evaluation.tasks": {"t": task}})))
    description = {"format": 2, "towers": {"wave": {"encoder": "own_waves:Encoder"}}}
    description["towers"]["wave"]["modality"] = "own_waves:WaveInputs"
    (tmp_path / "cwcl_jax.json").write_text(json.dumps(description))
    sys.modules.pop("own_waves", None)
    monkeypatch.undo()
    (tmp_path / "own_waves.py").unlink()
    # Commands that other tests called in this process left their configs' folders there.
    elsewhere = [path for path in sys.path if not Path(path, "own_waves.py").exists()]
    monkeypatch.setattr(sys, "path", elsewhere)
    for call in (load_config, lambda folder: load_model(folder, allow_code=True)):
        with pytest.raises(
            ValueError, match=r"json names code that cannot be imported: .*no module"
        ):
            call(tmp_path)


def test_two_towers_of_one_modality_have_inputs_of_their_own():
    """`test_a_run_on_data_of_ones_own_is_loaded_without_its_code` trains two such towers."""
    made = defaults(name="pairs", total_steps=2, global_batch_size=8, embed_dim=16)
    made.data.train = "scenes:train?n=40&captions=3"
    made.data.max_cut_share = 1.0
    made.data.query = {"max_tokens": 12}
    made.data.document = {"max_tokens": 16}
    for name in ("query", "document"):
        made.towers[name] = defaults(TowerConfig, encoder="text", overrides=TEXT)
    made.loss.weights_from = "document"
    made.logging.tensorboard = False
    pairs = from_config_dict(made)
    batches = train_batches(pairs.data, pairs.tower_names, seed=0, global_batch_size=8)
    batch = next(batches)
    batches.close()
    assert batch["query"]["tokens"].shape == (8, 12)
    assert batch["document"]["tokens"].shape == (8, 16)
    # Each view of an example has draws of its own: other captions for some of them.
    assert not np.array_equal(batch["query"]["tokens"], batch["document"]["tokens"][:, :12])


def test_what_a_module_holds_is_told_apart_by_type():
    class Module(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.BatchNorm(4, rngs=rngs)
            self.drop = nnx.Dropout(0.5, rngs=rngs)
            self.fixed = jnp.arange(4.0)

    definition, leaves = split(Module(nnx.Rngs(0)))
    assert definition.statistics == {"norm/mean", "norm/var"}
    assert definition.constants == {"fixed"}
    assert set(leaves) == {"norm/mean", "norm/var", "norm/scale", "norm/bias", "fixed"}

    def dropped(key):
        module = definition.merge(leaves, key)
        module.train()
        return module.drop(jnp.ones(64))

    keys = jax.random.split(jax.random.key(0))
    assert jnp.array_equal(dropped(keys[0]), dropped(keys[0]))
    assert not jnp.array_equal(dropped(keys[0]), dropped(keys[1]))


def test_the_example_runs_as_its_text_says(tmp_path, monkeypatch):
    """As a user would: the file in a folder of its own; only the text tower is a small one here."""
    shutil.copy(ROOT / "configs" / "eeg.py", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # as `python -m` does
    small = [
        "--config.towers.text.encoder=text", "--config.towers.text.preset=tiny",
        "--config.towers.text.weights=", "--config.towers.text.pooling=", "--config.embed_dim=128",
        "--config.data.text.tokenizer=", "--config.data.max_cut_share=1.0",
        "--config.total_steps=2", "--config.evaluation.tasks.states.bootstrap=0",
    ]  # fmt: skip
    subprocess.run(
        [sys.executable, "eeg.py"], env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True
    )
    try:
        assert train_command.main(["--config=eeg.py", "--workdir=run", *small]) == DONE
        assert export_command.main(["--source=run", "--output=model"]) == DONE
        sys.modules.pop("eeg")
        again = load_model("model", allow_code=True)
        with np.load("test.npz") as data:
            rows = again.encode_items("eeg", list(data["eeg"][:3]))
        # A text of the words of the small tokenizer.
        assert (rows.shape, again.encode_text("a red star").shape) == ((3, 128), (1, 128))
    finally:
        sys.modules.pop("eeg", None)
