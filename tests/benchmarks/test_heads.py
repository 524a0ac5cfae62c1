"""Losses compared on heads: the same batches for all, near duplicates together, paired tables."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cwcl_jax.benchmarks import head_figure, heads
from cwcl_jax.benchmarks.head_figure import curves, plot_lengths
from cwcl_jax.benchmarks.head_runs import (
    Features,
    Head,
    HeadRuns,
    batches,
    check_batch,
    make_chunk,
    nearest_rows,
)
from cwcl_jax.benchmarks.heads import compare, headline, read_records, wanted_heads
from cwcl_jax.cli import BAD_CONFIG
from cwcl_jax.config import ConfigError, with_tasks
from cwcl_jax.training import sharding
from cwcl_jax.training.options import MeshConfig
from cwcl_jax.training.state import initialise, make_blueprint
from cwcl_jax.training.step import TrainStep
from tests.test_speech_experiment import config, toy
from tests.training.toy import toy_config


def grouped_features():
    """Twenty directions, each with eleven near copies."""
    rng = np.random.default_rng(0)
    centres = np.repeat(rng.normal(size=(20, 16)), 12, axis=0)
    u = (centres + 0.01 * rng.normal(size=centres.shape)).astype(np.float32)
    return Features(u, u)


def variant(settings, loss, seed, batch, **more):
    """The config of one head, of as many examples as the config's."""
    (head,) = wanted_heads(settings, [loss], batches=[batch], **more)
    return head.variant(settings, seed)


def test_nearest_rows_are_the_other_members_of_a_group():
    nearest = nearest_rows(grouped_features().u, 10)
    own = np.arange(240)[:, None]
    assert np.all(nearest // 12 == own // 12)
    assert not np.any(nearest == own)


def test_batches_follow_the_seed_alone_and_hold_groups_of_near_duplicates():
    features = grouped_features()
    settings = variant(config("head,init=x"), "affine", 0, 32)
    made = list(batches(features, settings, group=4))
    again = list(batches(features, variant(settings, "relu2", 0, 32), group=4))
    np.testing.assert_array_equal(made[0], again[0])
    assert made[0].shape == (50, 32)
    groups = made[0].reshape(50, 8, 4) // 12
    assert np.all(groups == groups[:, :, :1])
    plain = next(batches(features, settings, group=1))
    assert all(len(set(rows)) == 32 for rows in plain[:7])
    other = next(batches(features, variant(settings, "affine", 1, 32), group=1))
    assert not np.array_equal(plain, other)


def test_a_variant_keeps_the_number_of_samples_and_the_rate_per_sample():
    base = config("head,init=x")
    small = variant(base, "exp0.2", 3, base.global_batch_size // 4)
    assert small.total_steps == 4 * base.total_steps
    assert small.optimizer.learning_rate == pytest.approx(base.optimizer.learning_rate / 4)
    assert small.optimizer.warmup_steps == 4 * base.optimizer.warmup_steps
    assert small.loss.weight_function == "exp0.2"
    assert small.seed == 3
    assert all(task.bootstrap == 0 for task in small.evaluation.tasks.values())


def test_a_length_of_its_own_keeps_the_share_of_the_warmup():
    base = config("head,init=x")
    short = variant(base, "affine", 0, 20, steps=[base.total_steps // 10])
    assert (short.global_batch_size, short.total_steps) == (20, base.total_steps // 10)
    assert short.optimizer.warmup_steps == base.optimizer.warmup_steps // 10


def test_tasks_are_chosen_by_name():
    base = config("head,init=x")
    assert list(with_tasks(base, "alignment").evaluation.tasks) == ["alignment"]
    assert with_tasks(base, "") == base
    with pytest.raises(ConfigError, match="--tasks=intents: unknown task 'intents'; the tasks are"):
        with_tasks(base, "intents")


def test_the_projection_is_that_of_the_side_that_gives_the_weights():
    made = {
        projection: variant(config("head,init=x"), "affine", 0, 20, projections=[projection])
        for projection in ("trained", "mlp", "none")
    }
    assert made["none"] == variant(config("head,init=x"), "affine", 0, 20)
    found = made["trained"].towers
    assert (found["text"].head, found["text"].tune) == ("linear", "head")
    assert found["speech"] == made["none"].towers["speech"]
    assert (made["mlp"].towers["text"].head, made["mlp"].towers["text"].tune) == ("mlp", "head")
    assert found == config("head,init=x,projection=trained").towers


def test_the_table_pairs_seeds_and_gives_intervals():
    def record(loss, seed, value, **more):
        head = {"loss": loss, "projection": "none", "batch": 8, "group": 1, "steps": 5} | more
        metrics = {"a/top1": value, "train/loss": 1.0}
        return {"head": head, "seed": seed, "metrics": metrics}

    records = [record("contrastive", s, 0.2 + 0.1 * s) for s in range(3)]
    records += [record("affine", s, 0.22 + 0.1 * s) for s in range(3)]
    assert headline(records) == ["a/top1"]
    shown = compare(records, ["a/top1"]).text()
    # The gain is the same for every seed: it has no interval although the values spread.
    assert "32.0 (+2.0 in every seed)" in shown
    records[-1]["metrics"]["a/top1"] += 0.01
    assert "32.3 (+2.3 ± 1.4)" in compare(records, ["a/top1"]).text()
    assert "30.0 (-2.3 ± 1.4)" in compare(records, ["a/top1"], "affine").text()
    # Another length is another row: nothing there is compared with the first one's.
    records += [record("affine", s, 0.5, steps=50) for s in range(3)]
    rows = compare(records, ["a/top1"]).rows
    assert rows[0][:5] == ("a/top1", "none", "8", "5", "3")
    assert rows[1][3:] == ("50", "0/3", "", "50.0")


def records_of(*, batch=20, losses=("contrastive", "affine"), steps=(1000, 250)):
    """Records of two seeds, whose accuracy tells steps and seed."""
    return [
        {
            "head": {"loss": loss, "projection": side, "batch": batch, "group": 1, "steps": length},
            "seed": seed,
            "metrics": {"intent/top1": length / 10_000 + seed / 100},
        }
        for seed in range(2)
        for loss in losses
        for side in ("none", "trained")
        for length in steps
    ]


def test_the_figures_lines_are_values_over_seeds_by_increasing_length(tmp_path):
    found = curves(records_of(), "trained", "intent/top1")
    assert list(found) == ["contrastive", "affine"]
    assert list(found["affine"]) == [250, 1000]
    np.testing.assert_allclose(found["affine"][250].values, (2.5, 3.5))
    path = tmp_path / "figures" / "heads.png"
    plot_lengths(records_of(), ["intent/top1"], path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_the_figures_legend_names_losses_that_one_projection_lacks(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(head_figure, "save_figure", lambda figure, path: drawn.append(figure))
    absent = {"loss": "affine", "projection": "trained"}
    records = [record for record in records_of() if not absent.items() <= record["head"].items()]
    plot_lengths(records, ["intent/top1"], tmp_path / "heads.png")
    (legend,) = drawn[0].legends
    assert {text.get_text() for text in legend.get_texts()} == {"contrastive", "affine"}


@pytest.mark.parametrize(
    ("records", "metric", "message"),
    [
        (records_of(), "intent/top3", "no head has the metric 'intent/top3'"),
        ([*records_of(), *records_of(batch=64)], "intent/top1", "one batch and one group"),
    ],
)
def test_a_figure_that_would_mix_heads_is_refused(tmp_path, records, metric, message):
    with pytest.raises(ValueError, match=message):
        plot_lengths(records, [metric], tmp_path / "heads.png")
    assert not list(tmp_path.iterdir())


def test_heads_of_another_config_are_not_put_into_one_table(tmp_path):
    file = tmp_path / "heads.json"
    assert read_records(file, "abc") == []
    file.write_text('[{"loss": "affine", "settings": "abc"}]')
    assert len(read_records(file, "abc")) == 1
    with pytest.raises(ConfigError, match="another config: name another --output"):
        read_records(file, "xyz")


def test_a_file_that_cannot_be_written_or_continued_is_told_before_any_head(tmp_path):
    assert read_records(tmp_path / "new" / "heads.json", "abc") == []
    assert (tmp_path / "new").is_dir()
    (tmp_path / "cut.json").write_text('[{"loss": "aff')
    for file in (tmp_path / "cut.json", tmp_path / "cut.json" / "heads.json", tmp_path):
        with pytest.raises(ConfigError, match=r"--output=.* cannot be continued"):
            read_records(file, "abc")


def test_results_on_a_store_are_refused_in_one_line(capsys):
    assert heads.main(["--output=s3://bucket/heads.json"]) == BAD_CONFIG
    assert capsys.readouterr().err == (
        "error: --output: 's3://bucket/heads.json' is on an object store; name a file of this "
        "machine; see --help\n"
    )


def test_heads_train_and_are_evaluated_on_kept_features(tmp_path):
    pytest.importorskip("espeakng_loader")
    pytest.importorskip("soxr")
    settings = toy(
        tmp_path, "head,init=x", **{"towers.speech.weights": "", "optimizer.learning_rate": 1e-2}
    )
    runs = HeadRuns(with_tasks(settings, "keywords,alignment"))
    affine = Head("affine", "none", 8, 1, 6)
    first = runs.run(affine, 0)
    assert first["keywords/top1"] >= 0
    assert first["train/effective_positives"] > 1
    assert first["alignment/structure_kept_by_projection"] == pytest.approx(1)
    other = runs.run(replace(affine, loss="sigmoid"), 0)  # its model has a leaf more
    assert other["train/loss"] != first["train/loss"]
    bent = runs.run(replace(affine, projection="trained"), 0)
    assert 0 < bent["alignment/structure_kept_by_projection"] < 0.999
    assert 0 < bent["alignment/neighbours_kept_by_projection"] < 1
    assert runs.run(affine, 0) == first


@pytest.mark.parametrize("group", [16, 32])
def test_large_groups_fill_the_batch(group):
    rng = np.random.default_rng(0)
    u = rng.normal(size=(200, 16)).astype(np.float32)
    settings = variant(config("head,init=x"), "affine", 0, 128)
    rows = next(batches(Features(u, u), settings, group=group))
    assert rows.shape == (50, 128)
    groups = rows.reshape(50, 128 // group, group)
    assert all(len(set(members)) == group for members in groups[0])


@pytest.mark.parametrize(
    ("count", "size", "group", "message"),
    [
        (500, 128, 3, "--group=3 does not divide the batch of 128"),
        (500, 1024, 1, "needs 1024 rows, the training data has 500"),
        (8, 8, 4, "needs 11 rows, the training data has 8"),
    ],
)
def test_a_batch_that_the_rows_cannot_fill_is_an_error(count, size, group, message):
    with pytest.raises(ConfigError, match=message):
        check_batch(count, size, group)


@pytest.mark.parametrize(
    ("short", "batch", "message"),
    [
        ("calibrated1", 8, "--losses=calibrated1: no loss is called .* must lie between"),
        ("exp0", 8, "--losses=exp0: no loss is called .* must be positive"),
        ("foo", 8, "--losses=foo: no loss is called"),
        ("affine", 0, "--batches=0: at least 1"),
    ],
)
def test_a_loss_or_batch_that_cannot_be_is_an_error(short, batch, message):
    with pytest.raises(ConfigError, match=message):
        variant(config("head,init=x"), short, 0, batch)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": [0]}, "--steps=0: at least 1"),
        ({"projections": ["linear"]}, "--projections='linear' is not known; use one of trained"),
    ],
)
def test_a_length_or_projection_that_cannot_be_is_an_error(options, message):
    with pytest.raises(ConfigError, match=message):
        variant(config("head,init=x"), "affine", 0, 8, **options)


def test_heads_take_the_steps_of_the_train_step():
    """With a fixed temperature too."""
    rng = np.random.default_rng(0)
    made = toy_config(**{"towers.text.tune": "head", "temperature.trained": False})
    blueprint = make_blueprint(made, sharding.make_mesh(MeshConfig(), jax.devices()[:1]))
    state, locked, _ = initialise(blueprint)
    u, v = (rng.normal(size=(40, 32)).astype(np.float32) for _ in "uv")
    rows = np.stack([rng.permutation(40)[:16] for _ in range(3)])
    found, _ = make_chunk(blueprint)(state, locked, *map(jnp.asarray, (u, v, rows)))
    step = TrainStep(blueprint)
    for chosen in rows:
        batch = {"image": {"features": u[chosen]}, "text": {"features": v[chosen]}}
        state, _ = step(state, locked, sharding.put_batch(blueprint.mesh, batch))
    assert int(found.step) == 3
    for path, value in state.params.items():
        np.testing.assert_allclose(found.params[path], value, rtol=1e-5, atol=1e-7)
