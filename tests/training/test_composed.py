"""Batches composed on purpose, as a person meets them: tables, errors, and a run."""

import json

import numpy as np
import pandas as pd
import pytest

from cwcl_jax.config import ConfigError
from cwcl_jax.data.composers import ComposerError, compose
from cwcl_jax.data.pipeline import TrainBatches
from cwcl_jax.data.sources import open_source
from cwcl_jax.exit_codes import DONE
from cwcl_jax.training.own_code import code_of
from cwcl_jax.training.run import train
from cwcl_jax.training.validation import split_source, validation_batches
from tests.training.toy import toy_config


@pytest.fixture
def table():
    speakers = np.random.default_rng(0).permutation([f"s{i % 9}" for i in range(60)])
    return pd.DataFrame(
        {
            "image": [f"{i}.jpg" for i in range(60)],
            "text": [f"caption, {i // 2}" for i in range(60)],
            "speaker": speakers,
            "kind": np.arange(60) % 7,
        }
    )


def written(table, folder, kind):
    path = folder / f"table.{kind}"
    if kind == "parquet":
        table.to_parquet(path)
    elif kind == "jsonl":
        table.to_json(path, orient="records", lines=True)
    else:
        table.to_csv(path, index=False, sep="\t" if kind == "tsv" else ",")
    return f"{kind}:{path}"


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_columns_of_tables_that_pandas_wrote_make_groups(table, tmp_path, kind):
    line = written(table, tmp_path, kind)
    line += "?image=image" if kind != "parquet" else "?text=text"
    source = open_source(line)
    for column in ("speaker", "kind"):
        made = compose(f"groups:{column}?k=2", source, 6, seed=0)
        for step in range(made.steps):
            values = table[column].iloc[made.batch(1, step)]
            assert values.value_counts().tolist() == [2, 2, 2]
    with pytest.raises(ComposerError, match="no column 'specker'"):
        compose("groups:specker", source, 6, seed=0)
    # Paraphrases: two rows have equal captions.
    made = compose("groups:text", source, 10, seed=0)
    assert made.steps == 6
    for step in range(made.steps):
        assert table["text"].iloc[made.batch(0, step)].is_unique


@pytest.mark.parametrize(("kind", "column"), [("csv", "kind"), ("parquet", "speaker")])
def test_a_table_with_gaps_is_refused_before_the_start(table, tmp_path, kind, column):
    table[column] = table[column].astype(object)
    table.loc[[17, 20], column] = None  # pandas writes the other numbers of a CSV as 3.0
    line = written(table, tmp_path, kind)
    config = toy_config(
        **{
            "data.train": line,
            "data.batches": f"groups:{column}",
            "data.max_cut_share": 1.0,
            "data.max_skipped_share": 1.0,  # the pictures are not there
            "evaluation.tasks": {},
        }
    )
    message = (
        rf"^config\.data\.batches='groups:{column}': 2 of 60 examples have no value in the column "
        rf"'{column}', the first is example 17 \(.*\), row 18"
    )
    with pytest.raises(ConfigError, match=message):
        train(config, tmp_path / "run")


def test_buckets_and_batches_exclude_each_other():
    from cwcl_jax.data.options import DataConfig
    from cwcl_jax.modalities import SpeechInputs

    inputs = {"speech": SpeechInputs(max_seconds=3.0, buckets=(1.0, 2.0))}
    config = DataConfig(train="commands:train?n=40", batches="groups:text", inputs=inputs)
    with pytest.raises(ValueError, match="cannot be combined"):
        TrainBatches(config, ("speech",), seed=0, global_batch_size=4)


def test_validation_is_drawn_at_random_unless_asked(tmp_path):
    np.save(tmp_path / "groups.npy", np.arange(80) // 4)
    changes = {
        "data.train": f"scenes:train?n=80&columns_from=shelf:{tmp_path}/groups.npy",
        "data.batches": "groups:shelf",
        "data.validation_share": 0.4,
    }
    composed = {}
    for asked in (False, True):
        config = toy_config(**changes, **{"data.validation_composed": asked})
        _, held = split_source(config, open_source(config.data.train))
        batches = validation_batches(config, held)
        composed[asked] = "groups by 'shelf'" in batches.told
    assert composed == {False: False, True: True}


def halves(source, *, batch_size, seed, epoch):
    """A composer of a user's own."""
    order = np.random.default_rng((seed, epoch)).permutation(len(source))
    return order[: len(order) // batch_size * batch_size].reshape(-1, batch_size)


def test_the_code_of_a_composer_of_ones_own_is_recorded():
    config = toy_config(**{"data.batches": f"{__name__}:halves?x=1"})
    assert list(code_of(config, ["data"])["data"]) == [f"{__name__}:halves"]
    assert code_of(toy_config(**{"data.batches": "groups:x"}), ["data"]) == {"data": {}}


def test_a_run_takes_neighbours_of_the_features_that_it_made_itself(tmp_path, capsys):
    """With `keep_locked_features`, accumulation, and examples left out at an epoch's end."""
    config = toy_config(
        **{
            "total_steps": 3,
            "accumulation_steps": 2,
            "data.train": "scenes:train?n=40",
            "data.batches": "near:image?size=4",
            "data.keep_locked_features": True,
            "data.cache_dir": str(tmp_path / "cache"),
            "evaluation.tasks": {},
        }
    )
    assert train(config, tmp_path / "run") == DONE
    told = capsys.readouterr().out
    assert "global batch 16 by near:image?size=4 in 2 chunks" in told
    assert (
        "batches: near neighbours by 'image', 2 cells of 4 in a batch of 16; an epoch is 2 batches "
        "and leaves out 20% of 40 examples: 8 at the end of an epoch"
    ) in told
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [r["left_out"] for r in records if "loss" in r] == [pytest.approx(0.2)] * 3
    data = json.loads((tmp_path / "run/data.json").read_text())
    assert data["batches"][0] == "near:image?size=4"
