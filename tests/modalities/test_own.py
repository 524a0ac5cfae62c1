"""A modality, an encoder and a source of one's own: built, trained, resumed, exported, refused."""

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

from cwcl_jax.api import load_model
from cwcl_jax.config import ConfigError, defaults, from_config_dict, from_json, to_json
from cwcl_jax.data.pipeline import train_batches
from cwcl_jax.exit_codes import DONE
from cwcl_jax.export import export
from cwcl_jax.models.leaves import split
from cwcl_jax.models.tower import TowerConfig
from cwcl_jax.training.embedding import preprocessing
from cwcl_jax.training.encode import load_encoder
from cwcl_jax.training.metrics import read_json_lines
from cwcl_jax.training.run import train
from tests.training.toy import TEXT

ROOT = Path(__file__).parents[2]
OWN = """
import dataclasses
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from cwcl_jax.data.skipping import BadExample
from cwcl_jax.data.sources import Source
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


def losses(workdir):
    return [r["loss"] for r in read_json_lines(workdir / "metrics.jsonl") if "loss" in r]


def test_it_trains_resumes_and_is_encoded_with_its_running_statistics(own, tmp_path):
    long = config(total_steps=40, **{"optimizer.learning_rate": 1e-2, "towers.wave.dtype": ""})
    assert train(long, tmp_path / "run") == DONE
    whole = losses(tmp_path / "run")
    assert whole[-1] < whole[0] - 0.3
    short = config(total_steps=4)
    assert train(short, tmp_path / "short") == DONE
    assert train(config(total_steps=2), tmp_path / "parts") == DONE
    resumed = config(total_steps=4, **{"checkpoint.accept_changes": True})
    assert train(resumed, tmp_path / "parts") == DONE
    # A constant learning rate would be needed for equal losses after step 2; the statistics of
    # BatchNorm continue from those of step 2, not from their initial values.
    encoder, _ = load_encoder(tmp_path / "run")
    mean = "towers/wave/encoder/module/norm/mean"
    assert np.abs(np.asarray(encoder._params[mean])).max() > 0.01
    signal = np.sin(np.outer(1 + np.arange(3), np.arange(8.0))).astype(np.float32)
    alone = encoder.encode("wave", {"signal": signal[:1]})
    np.testing.assert_allclose(encoder.encode("wave", {"signal": signal})[:1], alone, atol=1e-5)


def test_a_run_cut_in_two_gives_the_losses_of_one(own, tmp_path, monkeypatch):
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
        ({"towers.wave.encoder": "own_waves:NUMBER"}, "no class of flax.nnx or flax.linen"),
        ({"towers.wave.encoder": "own_waves:Flat"}, r"shape \(b, f\).*b=2 it gives \(2,\)"),
        ({"towers.wave.encoder": "own_waves:Remembering"}, "module/seen is a Cache"),
        ({"towers.wave.encoder": "own_waves:Plain"}, r"'window' .*nnx\.data"),
        ({"towers.wave.overrides": {"widht": 3}}, "no argument 'widht'; did you mean 'width'"),
        ({"towers.wave.preset": "tiny"}, "your own and has no preset"),
        ({"towers.wave.scan_layers": True}, "scan_layers and remat are for the built-in"),
        ({"towers.wave.modality": ""}, "does not say what it reads"),
        ({"towers.wave.modality": "own_waves:Encoder"}, "no subclass of .*Modality"),
        ({"towers.wave.modality": "sound"}, "unknown modality 'sound'"),
        ({"data.wave.samples": 7}, r"fails on inputs .*float32\[2, 7\]"),
        ({"data.train": "own_waves:Wave:x"}, "has no 'Wave'"),
        ({"data.train": "own_waves:Waves:x?m=3"}, "has no option 'm'"),
    ],
)
def test_what_cannot_work_is_one_error_before_the_first_step(own, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        train(config(**changes), tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_an_encoder_in_linen_trains(own, tmp_path):
    made = config(
        total_steps=10,
        **{"towers.wave.encoder": "own_waves:InLinen", "optimizer.learning_rate": 1e-2},
    )
    assert train(made, tmp_path / "run") == DONE
    found = losses(tmp_path / "run")
    assert found[-1] < found[0]


def test_an_export_is_loaded_only_where_its_code_is_allowed(own, tmp_path):
    made = config()
    assert train(made, tmp_path / "run") == DONE
    with pytest.raises(PermissionError, match="own_waves:Encoder, own_waves:WaveInputs"):
        load_model(tmp_path / "run")
    model = load_model(tmp_path / "run", allow_code=True)
    export(model, tmp_path / "out", "safetensors")
    with pytest.raises(PermissionError, match="allow_code=True"):
        load_model(tmp_path / "out")
    again = load_model(tmp_path / "out", allow_code=True)
    waves = [np.sin(np.arange(8.0) * k).astype(np.float32) for k in (1, 2, 3)]
    rows = again.encode_items("wave", waves)
    np.testing.assert_allclose(rows, model.encode_items("wave", waves), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    encoder, _ = load_encoder(tmp_path / "run")
    np.testing.assert_allclose(encoder.encode("wave", {"signal": np.stack(waves)}), rows, atol=1e-5)


def test_changed_code_is_told_before_a_run_goes_on(own, tmp_path):
    assert train(config(total_steps=2), tmp_path / "run") == DONE
    (own / "own_waves.py").write_text(OWN.replace("momentum=0.5", "momentum=0.6"))
    sys.modules.pop("own_waves")
    import linecache

    linecache.clearcache()
    (tmp_path / "run" / "evaluated.json").unlink()  # the complete run is to be evaluated again
    with pytest.raises(ConfigError, match="the code of the wave tower changed"):
        train(config(total_steps=2, name="other"), tmp_path / "run")


def test_two_towers_of_one_modality_have_inputs_of_their_own(tmp_path):
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
    assert train(pairs, tmp_path / "run") == DONE


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


@pytest.mark.multiprocess
def test_the_example_runs_as_its_text_says(tmp_path):
    """As a user would: the file in a folder of its own; only the text tower is a small one here."""
    shutil.copy(ROOT / "configs" / "eeg.py", tmp_path)
    small = [
        "--config.towers.text.encoder=text", "--config.towers.text.preset=tiny",
        "--config.towers.text.weights=", "--config.towers.text.pooling=", "--config.embed_dim=128",
        "--config.data.text.tokenizer=", "--config.data.max_cut_share=1.0",
        "--config.total_steps=30",
    ]  # fmt: skip
    python = [sys.executable]
    load = (
        "import numpy, cwcl_jax; model = cwcl_jax.load_model('model', allow_code=True);"
        "rows = model.encode_items('eeg', list(numpy.load('test.npz')['eeg'][:3]));"
        "print(rows.shape, model.encode_text('deep sleep').shape)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for command in (
        ["eeg.py"],
        ["-m", "cwcl_jax.train", "--config=eeg.py", "--workdir=run", *small],
        ["-m", "cwcl_jax.export", "--source=run", "--output=model"],
        ["-c", load],
    ):
        done = subprocess.run(
            ["timeout", "-s", "KILL", "300", *python, *command],
            cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(3, 128) (1, 128)"
