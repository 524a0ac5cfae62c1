"""Embeddings of a source: written once, trained from, refused when stale, continued if cut off."""

import json
import runpy

import numpy as np
import pytest

from cwcl_jax.cli import DONE, PREEMPTED
from cwcl_jax.config import ConfigError, from_config_dict
from cwcl_jax.data.embeddings import EmbeddingStore
from cwcl_jax.data.skipping import TooManyBadExamples
from cwcl_jax.data.sources import open_source
from cwcl_jax.embed import embed, main
from cwcl_jax.modalities.image import eval_pixels
from cwcl_jax.training import encode, stopping
from cwcl_jax.training.embedding import preprocessing, weights_name
from cwcl_jax.training.encode import imported_encoder
from cwcl_jax.training.metrics import read_json_lines
from cwcl_jax.training.run import train
from cwcl_jax.training.state import TowerSource
from tests.training.toy import toy_config

SOURCE = "scenes:train?n=100"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("embeds") / "image"
    code = embed(
        toy_config(), workdir="", output=str(path), line=SOURCE, dtype="float32", batch_size=32,
        shard_size=40,
    )  # fmt: skip
    assert code == DONE
    return path


def test_vectors_are_the_features_of_the_tower(folder):
    config = toy_config()
    encoder, _ = imported_encoder(config)
    store = EmbeddingStore(folder)
    source = open_source(SOURCE)
    assert len(store) == 100
    for index in (0, 39, 40, 99):
        name, vector = store[index]
        assert name == source[index]["id"]
        pixels = eval_pixels(source[index]["image"], config.data.inputs["image"])[None]
        expected = encoder.encode("image", {"pixels": pixels}, output="features")[0]
        np.testing.assert_allclose(vector, expected, atol=1e-5)


def test_training_from_embeddings_gives_the_losses_of_training_from_pictures(folder, tmp_path):
    def losses(name, line):
        train(toy_config(**{"data.train": line, "evaluation.tasks": {}}), tmp_path / name)
        records = read_json_lines(tmp_path / name / "metrics.jsonl")
        return [record["loss"] for record in records if "loss" in record]

    np.testing.assert_allclose(
        losses("cached", f"{SOURCE}&features_from={folder}"), losses("pictures", SOURCE), rtol=1e-5
    )


@pytest.mark.parametrize(
    "changes",
    [{"seed": 1}, {"towers.image.overrides.depth": 2}, {"data.image.eval_resize": 40}],
    ids=["weights", "architecture", "preprocessing"],
)
def test_stale_embeddings_are_refused(folder, tmp_path, changes):
    config = toy_config(**{"data.train": f"{SOURCE}&features_from={folder}", **changes})
    with pytest.raises(ConfigError, match="stale"):
        train(config, tmp_path)


def test_what_only_training_does_to_inputs_makes_no_vectors_stale():
    varied = toy_config(**{"data.image.flip": True, "data.image.crop_min_area": 0.9})
    made = preprocessing(toy_config(), "image", "features")
    assert preprocessing(varied, "image", "features") == made
    assert made["inputs"]["size"] == varied.data.inputs["image"].size


def test_embeddings_of_another_source_are_refused(folder, tmp_path):
    config = toy_config(**{"data.train": f"scenes:train?n=100&seed=5&features_from={folder}"})
    with pytest.raises(ConfigError, match="stale"):
        train(config, tmp_path)


def test_embeddings_of_a_tower_that_trains_are_refused(folder, tmp_path):
    config = toy_config(
        **{"data.train": f"{SOURCE}&features_from={folder}", "towers.image.tune": "all"}
    )
    with pytest.raises(ConfigError, match=r"the image tower trains.*tune"):
        train(config, tmp_path)


@pytest.mark.slow
def test_embeds_of_another_head_are_not_mixed_in(tmp_path):
    head = {"towers.image.tune": "head", "towers.image.head": "linear", "evaluation.tasks": {}}

    def embed_run(name):
        config = toy_config()  # what --workdir has instead
        return embed(
            config, workdir=str(tmp_path / name), output=str(tmp_path / "out"), tower="image",
            line=SOURCE, what="embeds", batch_size=32,
        )  # fmt: skip

    for name, rate in (("one", 1e-3), ("two", 1e-1)):
        config = toy_config(**{"total_steps": 1, "optimizer.learning_rate": rate, **head})
        train(config, tmp_path / name)
    assert embed_run("one") == embed_run("one") == DONE
    with pytest.raises(ConfigError, match="stale: weights "):
        embed_run("two")


def test_embeds_are_named_by_head_and_step_and_features_by_the_encoder_alone():
    blueprint = imported_encoder(toy_config(**{"towers.image.head": "linear"}))[0].blueprint
    file = TowerSource("vit.npz", "12" * 32)

    def name(step, output, source=file):
        return weights_name(blueprint, {"image": source}, "image", step, output)

    assert name(1, "features") == name(2, "features") == file.sha256
    names = {name(1, "embeds"), name(2, "embeds"), name(1, "embeds", TowerSource("", "34" * 32))}
    averages = weights_name(blueprint, {"image": file}, "image", 1, "embeds", leaves="ema")
    assert len(names | {averages}) == 4


def test_another_step_and_averages_are_those_of_a_run(tmp_path, monkeypatch):
    loaded = []

    def load(workdir, step=None, **options):
        loaded.append((workdir.name, step, options["weights"]))
        raise ConfigError("loaded")

    monkeypatch.setattr(encode, "load_encoder", load)
    options = {"output": str(tmp_path / "out"), "step": "best", "weights": "ema", "line": SOURCE}
    with pytest.raises(ConfigError, match="loaded"):
        embed(toy_config(), workdir=str(tmp_path / "run"), **options)
    assert loaded == [("run", "best", "ema")]
    with pytest.raises(ConfigError, match="--step and --weights belong to --workdir"):
        embed(toy_config(), workdir="", **options)
    parsed = main.parse(["--workdir=run", "--output=out", "--step=best", "--weights=ema"])
    assert (parsed.step, parsed.weights) == ("best", "ema")


def test_interrupted_command_continues(tmp_path, monkeypatch):
    def run():
        return embed(
            toy_config(), workdir="", output=str(tmp_path), line=SOURCE, batch_size=32,
            shard_size=40,
        )  # fmt: skip

    answers = iter([False, False, True])  # one batch into the second file
    monkeypatch.setattr(stopping.IndependentStop, "requested", lambda self: next(answers))
    assert run() == PREEMPTED
    (first,) = tmp_path.glob("*.array_record")
    written = first.stat().st_mtime_ns
    monkeypatch.undo()
    assert run() == DONE
    assert first.stat().st_mtime_ns == written
    assert len(EmbeddingStore(tmp_path)) == 100


def test_several_captions_and_many_unusable_examples_are_told(tmp_path, capsys):
    rows = [{"title": ["a star", "a red star"] if n < 3 else ""} for n in range(5)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(share, **options):
        config = toy_config(**{"data.max_skipped_share": share})
        return embed(
            config, workdir="", output=str(tmp_path / f"{share}"), tower="text",
            line=f"jsonl:{tmp_path}/t.jsonl", batch_size=5, **options,
        )  # fmt: skip

    with pytest.raises(TooManyBadExamples, match=r"2 of 5 examples are unusable \(text empty: 2\)"):
        run(0.2)
    assert run(0.5) == DONE
    said = capsys.readouterr().out
    assert "5 examples, each with a vector for each caption of 32 float16" in said
    assert "with several variants" not in said
    assert EmbeddingStore(tmp_path / "0.5").variants(1)[1].shape == (2, 32)
    assert "2 of the examples embedded now are unusable (text empty) and have no vector" in said
    with pytest.raises(TooManyBadExamples):
        run(0.9, errors="raise")
    assert run(0.1, errors="skip", what="embeds") == DONE
    said = capsys.readouterr().out
    assert "3 of the examples embedded now are with several variants (captions), of which" in said


def test_unknown_tower_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"--tower=sound: the towers are"):
        embed(toy_config(), workdir="", output=str(tmp_path), tower="sound")


def test_towers_that_read_features_are_trained_with_kept_ones_and_embedded(tmp_path):
    line = "made:train?n=32"
    made = runpy.run_path("configs/features_cwcl.py")["get_config"]("")
    made.update_from_flattened_dict(
        {
            "data.train": line, "data.keep_locked_features": True, "total_steps": 1,
            "data.cache_dir": str(tmp_path), "global_batch_size": 16, "logging.tensorboard": False,
        }
    )  # fmt: skip
    made.evaluation.tasks = {}
    config = from_config_dict(made)
    assert train(config, tmp_path / "run") == DONE
    vector = open_source(line).read(3, ("features",))["features"]["u"]
    expected = {"features": vector, "embeds": vector / np.linalg.norm(vector)}  # u has no head
    for what, values in expected.items():
        arguments = {"workdir": str(tmp_path / "run"), "output": str(tmp_path / what)}
        assert embed(config, **arguments, tower="u", what=what, dtype="float32") == DONE
        np.testing.assert_allclose(EmbeddingStore(tmp_path / what)[3][1], values, atol=1e-6)
