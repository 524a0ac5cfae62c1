"""Sinks of a run's metrics: metrics.jsonl, TensorBoard, Weights & Biases and the terminal."""

from __future__ import annotations

import importlib.util
import json
import math
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from cwcl_jax.config import ConfigError, ExperimentConfig, to_plain
from cwcl_jax.files import side_output, write_text
from cwcl_jax.paths import is_url, to_path
from cwcl_jax.training.growing import Growing

_SECONDS_BETWEEN_COPIES = 60.0


@runtime_checkable
class Writer(Protocol):
    """A sink of scalars."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def save(self) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """One JSON object a line in `metrics.jsonl`; plots are made from this record.

    On an object store `save` must be called before a checkpoint: a run that continues from there
    drops and rewrites only younger records.
    """

    def __init__(self, path: Path):
        self._file = Growing(path)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Appends a record.

        Raises:
          OSError: it could not be written completely. The error names the file.
        """
        # JSON has no NaN; every reader understands null.
        finite = {k: v if math.isfinite(v) else None for k, v in values.items()}
        self._file.append((json.dumps({"step": step, **finite}) + "\n").encode())

    def save(self) -> None:
        """Writes the records that the object store does not have yet."""
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class SideWriter:
    """A sink that a run does not need: its first error becomes a warning and disables it."""

    def __init__(self, name: str, make: Callable[[], Writer]):
        """Creates the sink.

        Args:
          name: name of the sink in a warning.
          make: returns the sink; its errors count like those of `write`.
        """
        self._name = name
        self._writer: Writer | None = None
        with self._guarded():
            self._writer = make()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the values, as long as the sink works."""
        if self._writer is not None:
            with self._guarded():
                self._writer.write(step, values)

    def save(self) -> None:
        """Stores what was written, so that it survives a killed process."""
        if self._writer is not None:
            with self._guarded():
                self._writer.save()

    def close(self) -> None:
        """Closes the sink."""
        if self._writer is not None:
            with self._guarded():
                self._writer.close()

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        done = False
        with side_output(f"{self._name} (the run continues without it)"):
            yield
            done = True
        if not done:
            self._writer = None


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Returns the records of a metrics file, in order.

    A line that a kill truncated, or that is damaged, is skipped.
    """
    if not path.exists():
        return []
    records = []
    for line in path.read_bytes().splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # not JSON, or not UTF-8
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


def truncate_json_lines(path: Path, after_step: int, *, evaluate: bool = False) -> None:
    """Drops the records after `after_step`, because a resumed run writes them again.

    Args:
      evaluate: also drops the evaluation of `after_step`.
    """
    if not path.exists():
        return
    records = [record for record in read_json_lines(path) if record["step"] <= after_step]
    if evaluate:
        records = [
            record
            for record in records
            if record["step"] < after_step or not any(n.startswith("evaluation/") for n in record)
        ]
    # Atomic: on a full disk the old records must stay.
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))


class TensorBoard:
    """TensorBoard event files; records of earlier starts after `start_step` are hidden.

    For an object store the file grows in a temporary folder and is copied from time to time.
    """

    def __init__(self, directory: Path, start_step: int):
        # Not SummaryWriter: it writes from a thread, and waits forever once that thread has failed.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import SessionLog  # pyright: ignore

        self._remote = directory if is_url(directory) else None
        if self._remote is not None:
            directory = Path(tempfile.mkdtemp(prefix="cwcl_jax-"))
        self._local, self._copied = directory, time.monotonic()
        directory.mkdir(parents=True, exist_ok=True)
        # Files are named by the second of their start: without the step, a second file within that
        # second would replace the first.
        self._writer = EventsWriter(str(directory / "events"), f".{start_step:012d}")
        # TensorBoard also hides the step at which a session starts.
        self._event(start_step + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the values of a step to the file."""
        from tensorboardX.summary import scalar

        for name, value in values.items():
            self._event(step, summary=scalar(name, value))
        self._writer.flush()
        if time.monotonic() - self._copied > _SECONDS_BETWEEN_COPIES:
            self.save()

    def save(self) -> None:
        """Copies the file to the object store, if it belongs there."""
        if self._remote is not None:
            for file in self._local.iterdir():
                to_path(self._remote / file.name).upload(file)  # pyright: ignore
            self._copied = time.monotonic()

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()
        self.save()
        if self._remote is not None:
            shutil.rmtree(self._local)

    def _event(self, step: int, **content: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event  # pyright: ignore

        self._writer.write_event(Event(wall_time=time.time(), step=step, **content))


class WeightsAndBiases:
    """A Weights & Biases run; the folder stores its id, so that later starts continue it."""

    def __init__(self, project: str, workdir: Path, config: ExperimentConfig):
        import wandb  # pyright: ignore[reportMissingImports]

        self._run = wandb.init(
            project=project,
            id=_wandb_id(workdir),
            name=workdir.name,
            resume="allow",
            dir=None if is_url(workdir) else str(workdir),
            config=to_plain(config),
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def save(self) -> None: ...

    def close(self) -> None:
        self._run.finish()


def _wandb_id(workdir: Path) -> str:
    """Returns the run's id: random, because names such as seed0 recur in other experiments."""
    path = workdir / "wandb_id"
    if not path.exists():
        write_text(path, secrets.token_hex(8) + "\n")
    return path.read_text(encoding="utf-8").strip()


def check_writers(config: ExperimentConfig) -> None:
    """Raises ConfigError if the library of a sink is missing."""
    if config.logging.wandb_project and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            "config.logging.wandb_project is set but wandb is not installed; "
            "pip install 'cwcl_jax[wandb]' or unset it"
        )


def make_writers(
    workdir: Path, config: ExperimentConfig, start_step: int, *, evaluate: bool = False
) -> list[Writer]:
    """Returns the sinks that the config asks for; a resumed run continues their files.

    Args:
      evaluate: whether step `start_step` is evaluated again.
    """
    path = workdir / "metrics.jsonl"
    truncate_json_lines(path, start_step, evaluate=evaluate)
    writers: list[Writer] = [JsonLines(path)]
    if config.logging.tensorboard:
        folder = workdir / "tensorboard"
        writers.append(SideWriter("TensorBoard's file", lambda: TensorBoard(folder, start_step)))
    if project := config.logging.wandb_project:
        make = partial(WeightsAndBiases, project, workdir, config)
        writers.append(SideWriter("the Weights & Biases run", make))
    return writers


class Progress:
    """A line for the user: rewritten in place on a terminal, otherwise printed now and then."""

    def __init__(self, total_steps: int, *, stream: Any = None, seconds_between_lines: float = 5.0):
        self._total = total_steps
        self._stream = stream or sys.stderr
        self._in_place = self._stream.isatty()
        self._pause = seconds_between_lines
        self._last = -math.inf
        self._width = 0

    def show(self, step: int, values: Mapping[str, float], *, eta_seconds: float) -> None:
        now = time.monotonic()
        if not self._in_place and now - self._last < self._pause and step < self._total:
            return
        self._last = now
        line = progress_line(step, self._total, values, eta_seconds)
        if self._in_place:
            self._stream.write("\r" + line.ljust(self._width))
            self._width = len(line)
        else:
            self._stream.write(line + "\n")
        self._stream.flush()

    def note(self, line: str) -> None:
        """Prints a line that is not rewritten."""
        self.end()
        self._stream.write(line + "\n")
        self._stream.flush()

    def end(self) -> None:
        """Ends a line that is rewritten in place, so that later output starts on its own line."""
        if self._in_place and self._width:
            self._stream.write("\n")
            self._stream.flush()
        self._width = 0


def progress_line(
    step: int, total_steps: int, values: Mapping[str, float], eta_seconds: float
) -> str:
    """Returns the line: step, losses, targets, health, speed, devices, wait, counts, ETA."""
    parts = [f"step {step:>{len(str(total_steps))}}/{total_steps}"]
    for name, label, form in _SHOWN:
        if name in values:
            parts.append(f"{label} {values[name]:{form}}")
        elif name.endswith("/"):  # one number per tower
            found = {k.removeprefix(name): v for k, v in values.items() if k.startswith(name)}
            told = " ".join(f"{tower} {value:{form}}" for tower, value in found.items())
            parts += [f"{label} {told}"] if told else []
    parts.append(f"eta {duration(eta_seconds)}")
    return "  ".join(parts)


_SHOWN = (
    ("loss", "loss", ".3f"),
    ("loss_u_to_v", "u>v", ".3f"),
    ("loss_v_to_u", "v>u", ".3f"),
    ("excess", "excess", ".3f"),
    ("effective_positives", "eff.pos", ".1f"),
    ("accuracy_u_to_v", "acc", ".2f"),
    ("validation/loss", "held-out", ".3f"),
    ("inverse_temperature", "1/tau", ".3g"),
    ("gradient_norm/", "grad", ".2g"),
    ("effective_rank/", "rank", ".3g"),
    ("examples_per_second", "pairs/s", ".0f"),
    ("seconds_per_step", "s/step", ".3g"),
    ("mfu", "MFU", ".1%"),
    ("memory_gb", "GB", ".1f"),
    ("data_wait", "wait", ".0%"),
    ("skipped", "skipped", ".0f"),
    ("tokens_cut", "tokens cut", ".0f"),
)


def validation_line(step: int, values: Mapping[str, float]) -> str:
    """Returns a line with held-out loss, accuracy and R@1, of the model and of its averages."""
    told = []
    for prefix, name in (("validation", "held-out"), ("validation_ema", "of the averages")):
        parts = [
            f"{label} {' / '.join(f'{values[key]:{form}}' for key in keys)}"
            for label, form, names in _VALIDATED
            if (keys := [key for n in names if (key := f"{prefix}/{n}") in values])
        ]
        told += [f"{name}: {', '.join(parts)}"] if parts else []
    return f"validation after step {step}, {'; '.join(told)}"


_VALIDATED = (
    ("loss", ".4f", ("loss",)),
    ("accuracy", ".3f", ("accuracy_u_to_v", "accuracy_v_to_u")),
    ("R@1", ".3f", ("recall_at_1_u_to_v", "recall_at_1_v_to_u")),
)


def duration(seconds: float) -> str:
    """Returns `1:02:03` or `2:03`."""
    if not math.isfinite(seconds):
        return "?"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
