"""The evaluate command: options, tasks, files, and the same numbers on one and four devices."""

import dataclasses
import json
from functools import partial

import jax
import numpy as np
import pytest

from cwcl_jax.config import ConfigError
from cwcl_jax.evaluate import Options, evaluate, main
from cwcl_jax.evaluation.runner import run_tasks
from cwcl_jax.training import sharding
from cwcl_jax.training.encode import EncodeFunctions, Encoder
from cwcl_jax.training.state import initialise, make_blueprint
from tests.training.toy import toy_config


def encoder_on(devices, config):
    mesh = sharding.make_mesh(config.mesh, devices)
    blueprint = make_blueprint(config, mesh, check_batch=False)
    state, locked, _ = initialise(blueprint)
    return Encoder(EncodeFunctions(blueprint), state.params, locked, 7)


@pytest.fixture(scope="module")
def config():
    return toy_config(
        **{
            "evaluation.tasks.pairs": {
                "kind": "retrieval",
                "source": "scenes:test?task=retrieval&n=37",
                "bootstrap": 0,
            }
        }
    )


@pytest.fixture(scope="module")
def encoder(config):
    return encoder_on(jax.devices(), config)


@pytest.fixture
def loaded(monkeypatch, encoder, config):
    """`load_encoder` gives the toy model for any workdir."""
    monkeypatch.setattr(
        "cwcl_jax.training.encode.load_encoder",
        lambda workdir, step=None, weights="trained": (encoder, config),
    )
    monkeypatch.setattr("cwcl_jax.training.encode.tower_sources", lambda workdir: {})


def test_one_and_four_devices_give_the_same_numbers(config, encoder):
    """Sizes that neither the batch nor the devices divide: 37 pictures, batches of 10."""
    evaluation = dataclasses.replace(config.evaluation, batch_size=10)
    one = encoder_on(jax.devices()[:1], config)
    outcomes = [
        run_tasks(evaluation, encode=chosen.encode, data=config.data) for chosen in (one, encoder)
    ]
    assert encoder.mesh.size == 4
    for first, second in zip(*outcomes, strict=True):
        assert first.metrics == second.metrics
        for name, values in first.items.items():
            np.testing.assert_array_equal(values, second.items[name])


def test_all_tasks_of_a_run_are_evaluated_and_written(loaded, tmp_path, capsys):
    assert evaluate(Options(workdir=str(tmp_path / "toy"))) == 0
    shown = capsys.readouterr().out
    assert "Zero-shot classification" in shown
    assert "chance" in shown
    records = json.loads((tmp_path / "toy" / "evaluation" / "results.json").read_text())
    assert {(r["model"], r["pretrained"], r["name"]) for r in records} == {
        ("toy", "step 7", "shape"),
        ("toy", "step 7", "pairs"),
    }


def test_tasks_are_chosen_by_name_or_given_in_a_file(loaded, tmp_path, capsys):
    evaluate(Options(workdir="x", tasks="pairs", output=str(tmp_path / "a")))
    assert "Zero-shot" not in capsys.readouterr().out
    tasks = {"mine": {"source": "scenes:test?task=colour&n=9", "templates": "general"}}
    (tmp_path / "tasks.json").write_text(json.dumps(tasks))
    output = str(tmp_path / "b")
    evaluate(Options(workdir="x", tasks=str(tmp_path / "tasks.json"), output=output))
    shown = capsys.readouterr().out
    assert "general (480)" in shown
    assert "are replaced" not in shown
    evaluate(Options(workdir="x", tasks="pairs", output=output))
    assert "are replaced, also those of mine; --output=DIR" in capsys.readouterr().out


def test_a_comparison_with_nothing_ends_before_the_evaluation(loaded, tmp_path):
    with pytest.raises(ConfigError, match=r"--compare=.*absent holds no evaluation"):
        evaluate(Options(workdir=str(tmp_path / "b"), compare=str(tmp_path / "absent")))
    assert not (tmp_path / "b").exists()


def test_second_run_is_compared_with_the_first(loaded, tmp_path, capsys):
    evaluate(Options(workdir=str(tmp_path / "a")))
    evaluate(Options(workdir=str(tmp_path / "b"), compare=str(tmp_path / "a")))
    assert "b against a, on the same items" in capsys.readouterr().out
    assert "no difference shown" in (tmp_path / "b" / "evaluation" / "results.md").read_text()


def test_imported_model_is_evaluated_without_a_run(config, tmp_path, capsys):
    evaluate(Options(config=config, tasks="shape", output=str(tmp_path)))
    assert "shape" in capsys.readouterr().out
    assert json.loads((tmp_path / "results.json").read_text())[0]["pretrained"] == "imported"


def test_picture_is_classified_from_typed_classes(loaded, tmp_path, capsys):
    from PIL import Image

    Image.new("RGB", (64, 48), (200, 10, 10)).save(tmp_path / "a.png")
    evaluate(Options(workdir="x", image=str(tmp_path / "a.png"), classes="red circle,blue star"))
    lines = capsys.readouterr().out.splitlines()
    assert {line.split(maxsplit=2)[2] for line in lines[4:6]} == {"red circle", "blue star"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either --workdir=RUN or --config=FILE"),
        ({"workdir": "x", "audio": "a.wav"}, "need --classes"),
        ({"workdir": "x", "classes": "a,b"}, "belongs to --audio"),
        ({"workdir": "x", "audio": "a.wav", "image": "a.png", "classes": "a"}, "not both"),
        ({"workdir": "x", "tasks": "shap"}, "unknown task 'shap'"),
        ({"workdir": "x", "tasks": "absent.json"}, "no such file"),
        ({"workdir": "x", "image": "absent.png", "classes": "a"}, "there is no such file"),
        ({"workdir": "x", "image": __file__, "classes": "names.txt"}, "one class and not a file"),
        (
            {"workdir": "x", "image": "a", "classes": "a,b", "tasks": "shape"},
            "--tasks has no effect",
        ),
        (
            {"workdir": "x", "image": "a", "classes": "a,b", "compare": "y"},
            "--compare has no effect",
        ),
        ({"workdir": "x", "templates": "general"}, "--templates belongs to --audio or --image"),
        ({"workdir": "x", "audio": "a.wav", "classes": "a"}, "no such file|no 'speech' tower"),
    ],
)
def test_mistakes_are_one_clear_line(loaded, options, message):
    with pytest.raises(ConfigError, match=message):
        evaluate(Options(**options))


def test_wrong_field_in_a_task_file_names_the_nearest(loaded, tmp_path):
    (tmp_path / "tasks.json").write_text(json.dumps({"a": {"sorce": "scenes:test"}}))
    with pytest.raises(ConfigError, match="did you mean 'source'"):
        evaluate(Options(workdir="x", tasks=str(tmp_path / "tasks.json")))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "retrieval", "modality": "speech"}, r"tasks\.a: the model has no 'speech' tower"),
        ({"templates": "templats.txt"}, r"tasks\.a: templates='templats\.txt' is neither"),
    ],
)
def test_tasks_that_cannot_run_end_before_the_evaluation(
    loaded, tmp_path, monkeypatch, fields, message
):
    def never(*args, **options):
        raise AssertionError("a task ran")

    monkeypatch.setattr("cwcl_jax.evaluation.runner.run_tasks", never)
    tasks = {"a": {"source": "scenes:test?task=shape&n=9", **fields}}
    (tmp_path / "tasks.json").write_text(json.dumps(tasks))
    with pytest.raises(ConfigError, match=message):
        evaluate(Options(workdir="x", tasks=str(tmp_path / "tasks.json")))


def test_broken_task_file_is_named(loaded, tmp_path):
    (tmp_path / "tasks.json").write_text('{"a": ')
    with pytest.raises(ConfigError, match=r"tasks\.json is not JSON"):
        evaluate(Options(workdir="x", tasks=str(tmp_path / "tasks.json")))


def test_absent_step_is_one_clear_line(monkeypatch, tmp_path):
    def load(workdir, step=None, weights="trained"):
        raise FileNotFoundError(f"{workdir} holds no checkpoint of step {step}")

    monkeypatch.setattr("cwcl_jax.training.encode.load_encoder", load)
    with pytest.raises(ConfigError, match="no checkpoint of step 999"):
        evaluate(Options(workdir=str(tmp_path), step=999))


def test_unusable_data_is_one_clear_line(loaded, tmp_path):
    for number in range(20):
        path = tmp_path / "pictures" / ("ab"[number % 2]) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"no picture")
    tasks = {"mine": {"source": f"folder:{tmp_path / 'pictures'}"}}
    (tmp_path / "tasks.json").write_text(json.dumps(tasks))
    with pytest.raises(ConfigError, match="task 'mine': 11 of the 11 examples read"):
        evaluate(Options(workdir="x", tasks=str(tmp_path / "tasks.json")))


def test_runs_without_a_common_task_end_before_the_evaluation(loaded, tmp_path):
    evaluate(Options(workdir=str(tmp_path / "a"), tasks="shape"))
    with pytest.raises(ConfigError, match="the runs share no task"):
        evaluate(Options(workdir=str(tmp_path / "b"), tasks="pairs", compare=str(tmp_path / "a")))
    assert not (tmp_path / "b").exists()


def test_a_comparison_that_fails_costs_no_results(loaded, tmp_path, monkeypatch, capsys):
    def fail(*args, **options):
        raise ValueError("no comparison")

    evaluate(Options(workdir=str(tmp_path / "a"), tasks="shape"))
    monkeypatch.setattr("cwcl_jax.evaluation.compare.compare_with", fail)
    options = Options(workdir=str(tmp_path / "b"), tasks="shape", compare=str(tmp_path / "a"))
    with pytest.raises(ConfigError, match="no comparison"):
        evaluate(options)
    assert capsys.readouterr().out.count("Zero-shot classification") == 2
    assert json.loads((tmp_path / "b" / "evaluation" / "results.json").read_text())


def test_a_run_is_compared_with_its_own_earlier_results(loaded, tmp_path, capsys):
    """The new results are written into the folder that the old ones stood in."""
    evaluate(Options(workdir=str(tmp_path / "a"), tasks="shape"))
    path = tmp_path / "a" / "evaluation" / "items" / "shape.npz"
    with np.load(path) as file:
        arrays = dict(file)
    np.savez(path, **arrays | {"rank": np.full_like(arrays["rank"], 9)})
    evaluate(Options(workdir=str(tmp_path / "a"), tasks="shape", compare=str(tmp_path / "a")))
    row = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("shape/top1 "))
    assert row.split()[1] == "0.00"
    assert row.split()[2] != "0.00"


def test_a_shifted_task_runs_without_its_in_distribution_one(config, tmp_path, capsys):
    shape = dataclasses.replace(config.evaluation.tasks["shape"], in_distribution="absent")
    evaluation = dataclasses.replace(config.evaluation, tasks={"shape": shape})
    evaluate(
        Options(config=dataclasses.replace(config, evaluation=evaluation), output=str(tmp_path))
    )
    assert "its in-distribution task 'absent' did not run" in capsys.readouterr().out
    assert (tmp_path / "results.json").exists()


def test_classes_of_a_picture_may_stand_in_a_file(loaded, tmp_path, capsys):
    from PIL import Image

    Image.new("RGB", (64, 48), (200, 10, 10)).save(tmp_path / "a.png")
    (tmp_path / "names.txt").write_text("red circle\nblue star\n")
    names = str(tmp_path / "names.txt")
    evaluate(Options(workdir="x", image=str(tmp_path / "a.png"), classes=names))
    lines = capsys.readouterr().out.splitlines()
    assert {line.split(maxsplit=2)[2] for line in lines[4:6]} == {"red circle", "blue star"}


def test_features_come_from_before_the_head(config, encoder):
    inputs = {"pixels": np.zeros((3, 32, 32, 3), np.uint8)}
    features = partial(encoder.encode, output="features")("image", inputs)
    assert features.shape == (3, 32)


def test_command_without_a_run_ends_with_one_line_and_code_2(capsys):
    assert main(["--workdir=absent-run"]) == 2
    assert capsys.readouterr().err.startswith("error: absent-run is not the folder")
