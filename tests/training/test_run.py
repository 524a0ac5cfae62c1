"""A whole run: exact resume, refusal of changed runs, stops that lose nothing, clear failures."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cwcl_jax.cli import DONE, PREEMPTED
from cwcl_jax.config import ConfigError, to_json
from cwcl_jax.training import loop as loop_module
from cwcl_jax.training import run as run_module
from cwcl_jax.training import sharding
from cwcl_jax.training.checkpoint import Checkpoints
from cwcl_jax.training.encode import load_encoder
from cwcl_jax.training.loop import NonFiniteLossError
from cwcl_jax.training.metrics import read_json_lines
from cwcl_jax.training.options import MeshConfig
from cwcl_jax.training.run import train
from cwcl_jax.training.state import make_blueprint
from cwcl_jax.training.step import GradientFunction
from cwcl_jax.training.workdir import check_same_data, load_config, only_user
from tests.training.toy import toy_config


def losses(workdir):
    records = read_json_lines(workdir / "metrics.jsonl")
    return {r["step"]: r["loss"] for r in records if "loss" in r}


def validated(workdir):
    records = read_json_lines(workdir / "metrics.jsonl")
    return {r["step"]: r for r in records if "validation/loss" in r}


def best_of(workdir, config):
    with Checkpoints(workdir / "checkpoints", config.checkpoint, read_only=True) as checkpoints:
        best = checkpoints.best()
        assert best["step"] in checkpoints.steps
        return best


# All that a run remembers besides its leaves: its best step, values since, averages.
WATCHED = {
    "data.train": "scenes:train?n=200",
    "data.validation_share": 0.1,
    "data.validation_every_steps": 3,
    "data.validation_batches": 1,
    "checkpoint.best": "validation/loss:min",
    "checkpoint.keep": 1,
    "checkpoint.patience": 10,
    "optimizer.ema_decay": 0.9,
}


def saved_params(workdir, config, weights="trained"):
    blueprint = make_blueprint(config, sharding.make_mesh(MeshConfig()))
    with Checkpoints(workdir / "checkpoints", config.checkpoint, read_only=True) as checkpoints:
        return jax.device_get(
            checkpoints.restore_model(config.total_steps, blueprint.abstract_state(), weights)
        )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An undisturbed run of four steps."""
    workdir = tmp_path_factory.mktemp("finished")
    assert train(toy_config(), workdir) == DONE
    return workdir


def test_run_leaves_what_a_person_needs(finished):
    for name in (
        "config.json",
        "environment.json",
        "towers.json",
        "data.json",
        "results.txt",
        "results.json",
        "results.md",
        "losses.png",
    ):
        assert (finished / name).stat().st_size > 0, name
    assert sorted(losses(finished)) == [1, 2, 3, 4]
    table = (finished / "results.txt").read_text()
    assert "shape" in table
    assert "chance" in table.lower()


def test_complete_run_says_so_and_does_nothing(finished, capsys):
    before = (finished / "metrics.jsonl").stat().st_mtime_ns
    assert train(toy_config(), finished) == DONE
    output = capsys.readouterr().out
    assert "is complete (4 steps)" in output
    assert "shape" in output
    assert (finished / "metrics.jsonl").stat().st_mtime_ns == before


def test_a_run_that_saved_nothing_is_told_apart(finished, tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    shutil.copy(finished / "config.json", workdir)
    with pytest.raises(ConfigError, match="of which no step was saved; delete it, give"):
        train(toy_config(**{"optimizer.learning_rate": 0.5}), workdir)


def test_results_of_an_earlier_step_are_made_again(finished, tmp_path, monkeypatch, capsys):
    workdir = shutil.copytree(finished, tmp_path / "longer")
    longer = toy_config(**{"total_steps": 6, "checkpoint.accept_changes": True})

    class StopAtTheEnd(run_module.StopSignal):
        calls = 0  # before the first step, after it, in the evaluation after the last one

        def requested(self):
            self.calls += 1
            return self.calls == 3

    monkeypatch.setattr(run_module, "StopSignal", StopAtTheEnd)
    assert train(longer, workdir) == PREEMPTED
    monkeypatch.undo()
    told = "with other settings (config.total_steps: 4 then, 6 now)"
    assert told in capsys.readouterr().out
    # Accepted once: it would switch off the checks of every later command that reads the folder.
    assert not load_config(workdir).checkpoint.accept_changes
    for expected in ("results, metrics and plots are in", "is complete (6 steps)"):
        assert train(longer, workdir) == DONE
        assert expected in capsys.readouterr().out
    assert json.loads((workdir / "results.json").read_text())[0]["pretrained"] == "step 6"


def test_results_of_other_evaluation_settings_are_made_again(finished, tmp_path, capsys):
    workdir = shutil.copytree(finished, tmp_path / "other")
    source = "scenes:test?task=colour&n=40"
    config = toy_config(**{"evaluation.tasks.shape.source": source})
    for expected in ("results, metrics and plots are in", "is complete (4 steps)"):
        assert train(config, workdir) == DONE
        assert expected in capsys.readouterr().out
    assert json.loads((workdir / "results.json").read_text())[0]["dataset"] == source
    assert evaluated_steps(workdir) == [4]


def evaluated_steps(workdir):
    records = read_json_lines(workdir / "metrics.jsonl")
    return [r["step"] for r in records if any(name.startswith("evaluation/") for name in r)]


@pytest.mark.parametrize("lost", ["evaluated.json", "results.txt"])
def test_an_evaluation_that_was_cut_short_is_made_again_once(finished, tmp_path, lost):
    """A run that dies after its evaluation's record leaves no mark that all is written."""
    workdir = shutil.copytree(finished, tmp_path / "cut")
    for path in [workdir / lost, *(workdir / "items").iterdir(), workdir / "results.json"]:
        path.unlink()
    assert train(toy_config(), workdir) == DONE
    assert evaluated_steps(workdir) == [4]
    for name in ("results.json", "results.txt", "evaluated.json", "items/shape.npz"):
        assert (workdir / name).read_bytes() == (finished / name).read_bytes()


def test_a_second_run_in_the_same_workdir_is_refused(tmp_path):
    with only_user(tmp_path):
        message = rf"another run is using .* \(process {os.getpid()} on .*another --workdir"
        with pytest.raises(ConfigError, match=message):
            train(toy_config(), tmp_path)
    assert not (tmp_path / "config.json").exists()
    with only_user(tmp_path):
        pass


def test_milestones_are_saved_and_a_warm_up_that_does_not_end_is_said(tmp_path, capsys):
    changes = {"checkpoint.every_steps": 2, "checkpoint.keep": 1, "checkpoint.keep_every": 3}
    config = toy_config(**changes, **{"optimizer.warmup_steps": 2000, "evaluation.tasks": {}})
    assert train(config, tmp_path) == DONE
    assert "the warm-up of 2000 steps does not end in 4 steps" in capsys.readouterr().out
    with Checkpoints(tmp_path / "checkpoints", config.checkpoint, read_only=True) as checkpoints:
        assert checkpoints.steps == [3, 4]


def test_other_settings_in_the_same_workdir_are_refused(finished):
    with pytest.raises(ConfigError, match=r"config\.optimizer\.learning_rate.*another --workdir"):
        train(toy_config(**{"optimizer.learning_rate": 0.5}), finished)


def test_the_final_evaluation_stands_among_the_metrics(finished):
    record = read_json_lines(finished / "metrics.jsonl")[-1]
    assert record["step"] == 4
    results = json.loads((finished / "results.json").read_text())
    of_results = {value for task in results for value in task["metrics"].values()}
    of_metrics = {value for name, value in record.items() if name.startswith("evaluation/")}
    assert of_metrics
    assert of_metrics & of_results


def test_settings_that_do_not_change_numbers_may_differ(finished):
    changes = {
        "mesh.fsdp": 2,
        "data.threads": 1,
        "checkpoint.keep": 1,
        "towers.text.remat": "full",
        "towers.text.attention": "xla",
    }
    assert train(toy_config(**changes), finished) == DONE


def test_other_data_is_refused(finished, tmp_path):
    config = toy_config()
    (tmp_path / "config.json").write_text(to_json(config))
    data = json.loads((finished / "data.json").read_text())
    first = next(iter(data))
    (tmp_path / "data.json").write_text(json.dumps(data | {first: "something else"}))
    check_same_data(tmp_path, data, config)  # no step was saved
    (tmp_path / "checkpoints" / "2").mkdir(parents=True)
    with pytest.raises(ConfigError, match=rf"training data changed.*data\.{first}"):
        train(config, tmp_path)


def test_interrupted_run_resumes_bit_for_bit(finished, tmp_path, monkeypatch):
    class StopAfterThree(run_module.StopSignal):
        calls = 0  # the first comes before the first step

        def requested(self):
            self.calls += 1
            return self.calls == 4

    monkeypatch.setattr(run_module, "StopSignal", StopAfterThree)
    assert train(toy_config(), tmp_path) == PREEMPTED
    assert sorted(losses(tmp_path)) == [1, 2, 3]
    monkeypatch.undo()
    assert train(toy_config(), tmp_path) == DONE
    assert losses(tmp_path) == losses(finished)
    expected = saved_params(finished, toy_config())
    for path, value in saved_params(tmp_path, toy_config()).items():
        np.testing.assert_array_equal(value, expected[path], err_msg=path)


_CHILD = """
import os, signal, sys
from pathlib import Path
from cwcl_jax.config import from_json
from cwcl_jax.training import loop, run
workdir, kill_after = Path(sys.argv[1]), int(sys.argv[2])
class Kill(run.StopSignal):
    calls = 0  # the first comes before the first step
    def requested(self):
        self.calls += 1
        if kill_after and self.calls == kill_after + 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().requested()
run.StopSignal = Kill
sys.exit(run.train(from_json((workdir.parent / "experiment.json").read_text()), workdir))
"""


@pytest.mark.slow
@pytest.mark.multiprocess
def test_killed_run_resumes_bit_for_bit(tmp_path):
    """Slow: three whole runs; the suite resumes an interrupted one (above)."""
    config = toy_config(**{"total_steps": 20, "checkpoint.every_steps": 5}, **WATCHED)
    (tmp_path / "experiment.json").write_text(to_json(config))
    command = ["timeout", "-s", "KILL", "600", sys.executable, "-c", _CHILD]

    def start(workdir, kill_after):
        return subprocess.run(
            [*command, str(workdir), str(kill_after)], capture_output=True, text=True, check=False
        )

    killed = start(tmp_path / "killed", 13)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    resumed = start(tmp_path / "killed", 0)
    assert resumed.returncode == DONE, resumed.stderr
    # The last save may still have been under way when the process died.
    assert re.search(r"resuming after step (6|8|9|10|12)\b", resumed.stdout)
    assert train(config, tmp_path / "whole") == DONE
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert len(validated(tmp_path / "whole")) == 7
    assert validated(tmp_path / "killed") == validated(tmp_path / "whole")
    assert best_of(tmp_path / "killed", config) == best_of(tmp_path / "whole", config)
    for weights in ("trained", "ema"):
        expected = saved_params(tmp_path / "whole", config, weights)
        for path, value in saved_params(tmp_path / "killed", config, weights).items():
            np.testing.assert_array_equal(value, expected[path], err_msg=path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_both_signals_are_requests_to_stop(number):
    with run_module.StopSignal() as stop:
        assert not stop.requested()
        signal.raise_signal(number)
        assert stop.requested()


@pytest.mark.multiprocess
def test_signal_saves_and_exits_with_75(tmp_path):
    config = toy_config(**{"total_steps": 100_000, "checkpoint.every_steps": 0})
    (tmp_path / "experiment.json").write_text(to_json(config))
    workdir = tmp_path / "run"
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD, str(workdir), "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        wait_for(lambda: len(read_json_lines(workdir / "metrics.jsonl")) >= 3)
        child.send_signal(signal.SIGTERM)
        output, _ = child.communicate(timeout=300)
    finally:
        child.kill()
        child.wait()
    assert child.returncode == PREEMPTED, output
    with Checkpoints(workdir / "checkpoints", config.checkpoint, read_only=True) as checkpoints:
        assert checkpoints.latest_step == max(losses(workdir))


def wait_for(condition, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)


def test_a_run_that_no_longer_improves_ends_as_a_complete_one(tmp_path, capsys):
    """With a learning rate of 0 no value is better than the first."""
    changes = {"total_steps": 40, "optimizer.learning_rate": 0.0, "checkpoint.patience": 2}
    changes |= {"evaluation.tasks": {}}
    config = toy_config(**WATCHED | changes)
    for told in (
        "ended early at step 9 of 40: 2 values of validation/loss",
        "is complete (9 steps",
    ):
        assert train(config, tmp_path) == DONE
        assert told in capsys.readouterr().out
    best = best_of(tmp_path, config)
    assert (best["step"], best["seen"], best["waited"]) == (3, 9, 2)
    assert load_encoder(tmp_path, "best")[0].step == 3
    assert sorted(losses(tmp_path)) == list(range(1, 10))


def test_averages_begin_in_the_middle_of_a_run_only_on_demand(finished, tmp_path, capsys):
    workdir = shutil.copytree(finished, tmp_path / "averaged")
    changes = {"total_steps": 5, "optimizer.ema_decay": 0.5}
    with pytest.raises(ConfigError, match=r"config\.optimizer\.ema_decay: 0\.0 then, 0\.5 now"):
        train(toy_config(**changes), workdir)
    config = toy_config(**changes, **{"checkpoint.accept_changes": True})
    assert train(config, workdir) == DONE
    assert "has no averages up to step 4: they start from its leaves" in capsys.readouterr().out
    then = saved_params(workdir, toy_config())
    now, averages = saved_params(workdir, config), saved_params(workdir, config, "ema")
    for path, average in averages.items():
        expected = 0.5 * then[path] + 0.5 * now[path]
        np.testing.assert_allclose(average, expected, rtol=1e-6, atol=1e-7, err_msg=path)


def test_non_finite_loss_stops_with_step_checkpoint_and_batch(tmp_path, monkeypatch):
    original = loop_module.Loop._read_metrics

    def poisoned(self):
        for pending in self._unread:
            if pending.step == 3:
                pending.metrics["loss"] = np.float32("nan")
        return original(self)

    monkeypatch.setattr(loop_module.Loop, "_read_metrics", poisoned)
    with pytest.raises(NonFiniteLossError, match=r"nan at step 3; last good checkpoint: step 2"):
        train(toy_config(), tmp_path)
    record = json.loads((tmp_path / "non_finite_step_3.json").read_text())
    assert len(record["example_index"]) == 16
    assert record["last_good_checkpoint"] == 2
    monkeypatch.undo()
    assert train(toy_config(), tmp_path) == DONE


@pytest.mark.parametrize("step", [2, 4])
def test_a_bad_gradient_is_found_before_it_is_saved(tmp_path, monkeypatch, step):
    """Steps 2 and 4 are saved, and 4 is the last: no later loss could tell."""
    original = GradientFunction.__call__

    def overflowing(self, params, locked, batch, number, *rest):
        gradients, metrics, statistics = original(self, params, locked, batch, number, *rest)
        bad = number == step - 1  # counted from 0
        bad_gradients = {k: jnp.where(bad, jnp.inf, v) for k, v in gradients.items()}
        return bad_gradients, metrics, statistics

    monkeypatch.setattr(GradientFunction, "__call__", overflowing)
    good = "none" if step == 2 else "step 2"
    message = rf"gradient's norm is inf at step {step}; last good checkpoint: {good}"
    config = toy_config()
    with pytest.raises(NonFiniteLossError, match=message):
        train(config, tmp_path)
    # `test_non_finite_loss_stops_with_step_checkpoint_and_batch` goes on from there.
    with Checkpoints(tmp_path / "checkpoints", config.checkpoint, read_only=True) as checkpoints:
        assert checkpoints.steps == ([] if step == 2 else [2])
    record = json.loads((tmp_path / f"non_finite_step_{step}.json").read_text())
    batches = run_module.train_batches(
        toy_config().data, ("image", "text"), seed=0, global_batch_size=16
    )
    for _ in range(step):
        guilty = next(batches)["index"].tolist()
    batches.close()
    assert record["example_index"] == guilty


def test_diverging_run_is_stopped(tmp_path):
    config = toy_config(**{"optimizer.learning_rate": 1e30, "optimizer.clip_norm": 0.0})
    with pytest.raises(NonFiniteLossError, match="learning_rate"):
        train(config, tmp_path)


def test_missing_training_data_names_path_and_option(tmp_path):
    config = toy_config(**{"data.train": "tars:/nowhere/{00000..00001}.tar"})
    with pytest.raises(ConfigError, match=r"config\.data\.train.*/nowhere/.*--config\.data\.train"):
        train(config, tmp_path)


def test_missing_weights_name_path_and_option(tmp_path):
    config = toy_config(**{"towers.image.weights": "/nowhere/L_16.npz"})
    with pytest.raises(
        ConfigError, match=r"config\.towers\.image\.weights.*/nowhere/L_16\.npz.*--config\.towers"
    ):
        train(config, tmp_path)


def test_missing_evaluation_data_is_found_before_training(tmp_path):
    config = toy_config(**{"evaluation.tasks.shape.source": "tars:/nowhere/0.tar"})
    with pytest.raises(ConfigError, match=r"config\.evaluation\.tasks\.shape: source="):
        train(config, tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_batch_that_does_not_fit_the_devices_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"global_batch_size=18 is not divisible by 4 devices"):
        train(toy_config(global_batch_size=18), tmp_path)


def test_nothing_to_train_is_an_error(tmp_path):
    config = toy_config(**{"towers.text.tune": "none"})
    with pytest.raises(ConfigError, match=r"no leaf of either tower trains"):
        train(config, tmp_path)


def test_encoder_gives_the_same_rows_for_any_batch_size(finished):
    encoder, config = load_encoder(finished)
    assert encoder.step == config.total_steps
    pixels = np.random.default_rng(0).integers(0, 256, (7, 32, 32, 3), dtype=np.uint8)
    together = encoder.encode("image", {"pixels": pixels})
    assert together.shape == (7, 32)
    assert together.dtype == np.float32
    alone = np.concatenate(
        [encoder.encode("image", {"pixels": pixels[i : i + 1]}) for i in range(7)]
    )
    np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1.0, rtol=1e-6)


def test_folder_that_is_no_run_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="not the folder of a run"):
        load_encoder(tmp_path)


@pytest.mark.parametrize("text", ['{"total_step": 3}', "{"])
def test_settings_of_another_version_are_named_with_their_file(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    for use in (lambda: train(toy_config(), tmp_path), lambda: load_encoder(tmp_path)):
        with pytest.raises(ConfigError, match=r"config\.json does not fit this version"):
            use()


def test_changed_tower_file_is_refused(finished, tmp_path):
    config = toy_config()
    (tmp_path / "config.json").write_text(to_json(config))
    towers = json.loads((finished / "towers.json").read_text())
    towers["image"]["sha256"] = "0" * 64
    (tmp_path / "towers.json").write_text(json.dumps(towers))
    with pytest.raises(ConfigError, match="image tower's weights changed"):
        train(config, tmp_path)


def test_a_damaged_record_is_named(finished, tmp_path):
    workdir = shutil.copytree(finished, tmp_path / "damaged")
    (workdir / "towers.json").write_text("")
    config = toy_config(**{"evaluation.every_steps": 2})  # its results must be made again
    with pytest.raises(ConfigError, match=r"towers\.json is damaged .*remove it"):
        train(config, workdir)
    (workdir / "towers.json").unlink()
    assert train(config, workdir) == DONE


def test_a_request_to_stop_is_obeyed_while_features_are_made(tmp_path, monkeypatch, capsys):
    changes = {"data.keep_locked_features": True, "data.cache_dir": str(tmp_path / "cache")}
    config = toy_config(**{"data.train": "scenes:train?n=800"}, **changes)
    calls = []

    def noticed(self):
        calls.append(self)
        return len(calls) == 3  # of four batches

    monkeypatch.setattr(run_module.StopSignal, "noticed", noticed)
    assert train(config, tmp_path / "run") == PREEMPTED
    assert len(calls) == 3
    assert "stopped while features" in capsys.readouterr().out
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    monkeypatch.undo()
    assert train(config, tmp_path / "run") == DONE


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh.fsdp": 3}, r"config\.mesh\.fsdp=3 does not divide the number of devices, 4"),
        ({"data.image.size": 48}, r"config\.data\.image\.size=48, but the tower reads 32 x 32"),
        ({"data.text.max_tokens": 17}, r"max_tokens=17 exceeds the 16 positions"),
        ({"towers.text.overrides.vocab_size": 100}, r"tokens, the text tower's table 100"),
        (
            {"data.text.tokenizer": "/nowhere/tokenizer"},
            r"config\.data\.text: .*tokenizer='/nowhere",
        ),
        ({"towers.text.preset": "tny"}, r"unknown preset .*'tny'"),
        ({"loss.name": "supervised"}, r"'supervised'.* needs labels"),
        ({"optimizer.decay": "kernels"}, r"config\.optimizer\.decay='kernels' matches no"),
    ],
)
def test_inputs_that_do_not_fit_a_tower_are_errors_before_training(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        train(toy_config(**changes), tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()
