"""Kept recordings: spoken once, continued when interrupted, refused for another source."""

import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from cwcl_jax.data.skipping import BadExample
from cwcl_jax.data.sources import open_source
from cwcl_jax.data.sources import recorded as module
from cwcl_jax.data.sources.base import Source
from cwcl_jax.progress import listening
from cwcl_jax.synthetic.espeak import VOICE_SETS

pytest.importorskip("espeakng_loader")
pytest.importorskip("soxr")


class Tones(Source):
    """Tones of known lengths in place of speech; every fifth one cannot be spoken."""

    def __init__(self, count=10):
        self.count = count

    def __len__(self):
        return self.count

    def read(self, index, fields):
        example = {"id": str(index), "text": f"tone {index}"}
        if "audio" in fields:
            if index % 5 == 4:
                raise BadExample("text empty")
            example["audio"] = (np.full(1600 * (index + 1), 1000, np.int16), 16_000)
        return example

    def fingerprint(self):
        return f"tones {self.count}"


class Slow(Tones):
    """One that is never done; tells in a file which process speaks."""

    def __init__(self, file):
        super().__init__(1)
        self.file = file

    def read(self, index, fields):
        Path(self.file).write_text(f"{os.getpid()} {os.getppid()}")
        time.sleep(300)


@pytest.fixture
def here(monkeypatch):
    """Speaks in this process, four examples a file."""
    monkeypatch.setattr(module, "_SHARD", 4)
    calls = []

    def speak_here(source, folder, shards, count):
        calls.append(list(shards))
        for shard in shards:
            module.speak_shard(source, folder, shard)

    monkeypatch.setattr(module, "_record_in_processes", speak_here)
    return calls


def test_recordings_and_durations_come_back(here, tmp_path):
    source = module.Recorded(Tones(), tmp_path / "kept")
    assert here == []  # opening costs nothing
    assert source.read(1, ("text",)) == {"id": "1", "text": "tone 1"}
    assert here == []
    expected = [0.1 * (i + 1) if i % 5 != 4 else 0.0 for i in range(10)]
    np.testing.assert_allclose(source.durations, expected, atol=0.051)
    samples, rate = source[6]["audio"]
    assert (len(samples), rate) == (11_200, 16_000)
    with pytest.raises(BadExample, match="audio empty"):
        source[4]
    again = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(again[6]["audio"][0], samples)
    assert here == [[0, 1, 2]]


def test_an_interrupted_folder_is_continued(here, tmp_path):
    module.Recorded(Tones(), tmp_path)[0]
    (tmp_path / "parts" / "00001.jsonl").unlink()
    source = module.Recorded(Tones(), tmp_path)
    assert len(source[5]["audio"][0]) == 9600
    assert here == [[0, 1, 2], [1]]


def test_the_manifest_reads_the_same_and_is_written_last(here, tmp_path):
    source = module.Recorded(Tones(), tmp_path)
    source[0]
    (tmp_path / "manifest.jsonl").unlink()  # a stop came before it
    module.record(Tones(), tmp_path)
    table = open_source(f"jsonl:{tmp_path}/manifest.jsonl")
    assert len(table) == 8
    pairs = [(i, j) for i, j in enumerate(k for k in range(10) if k % 5 != 4)]
    for row, index in pairs:
        assert table.read(row, ("text",))["text"] == f"tone {index}"
        assert table.durations[row] == source.durations[index]
        sound = (tmp_path / "audio" / f"{index:08d}.wav").read_bytes()
        assert table.read(row, ("audio",))["audio"] == sound
        np.testing.assert_array_equal(np.frombuffer(sound[44:], "<i2"), source[index]["audio"][0])


def test_recordings_of_another_source_are_refused(here, tmp_path):
    module.Recorded(Tones(), tmp_path)[0]
    message = r"another source.*wanted 11 examples.*name another folder in keep="
    with pytest.raises(ValueError, match=message):
        module.Recorded(Tones(11), tmp_path)[0]


def test_silence_around_the_speech_is_cut():
    speech = np.concatenate([np.zeros(4000), np.full(100, 900), np.zeros(8000)]).astype(np.int16)
    assert len(module.without_silence(speech)) == 800 + 100 + 799
    assert len(module.without_silence(np.zeros(100, np.int16))) == 0


def test_processes_speak_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_SHARD", 256)
    line = "spoken:commands:test?task=keywords&n=6&voices=test&keep=auto"
    source = open_source(line, cache_dir=str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == []
    assert source.durations.shape == (6,)
    assert np.all((source.durations > 0.1) & (source.durations < 2))
    (folder,) = (tmp_path / "recordings").iterdir()
    assert folder.name == f"{source.fingerprint()}-{module._VERSION}"


def test_a_terminals_ctrl_c_is_left_to_who_started_the_processes(tmp_path, monkeypatch):
    watch, groups = module._watch, []

    def watched(workers, *rest):
        groups.extend(os.getpgid(worker.pid) for worker in workers)
        watch(workers, *rest)

    monkeypatch.setattr(module, "_watch", watched)
    module.record(open_source("spoken:commands:test?task=keywords&n=2&voices=test"), tmp_path)
    assert groups
    assert os.getpgrp() not in groups


def waited(done, seconds=60):
    """Whether something becomes true in time."""
    end = time.monotonic() + seconds
    while not done() and time.monotonic() < end:
        time.sleep(0.05)
    return done()


def test_no_process_speaks_on_for_a_run_that_was_killed(tmp_path):
    file = tmp_path / "pids"
    script = (
        "from pathlib import Path; from tests.data.test_recorded import Slow, module; "
        f"module.record(Slow({str(file)!r}), Path({str(tmp_path / 'kept')!r}), processes=1)"
    )
    parent = subprocess.Popen([sys.executable, "-c", script])
    assert waited(lambda: file.exists() and len(file.read_text().split()) == 2)
    pids = [int(pid) for pid in file.read_text().split()]
    parent.send_signal(signal.SIGKILL)
    parent.wait()

    def gone():
        states = [Path(f"/proc/{pid}/stat") for pid in pids]
        return all(not s.exists() or s.read_text().rpartition(") ")[2][0] == "Z" for s in states)

    assert waited(gone), pids


def test_parts_that_are_spoken_are_progress(tmp_path):
    """Hours of speaking are no standstill of the run that asked for it."""
    beats = []
    with listening(lambda: beats.append(1)):
        module.record(Tones(6), tmp_path, processes=1)
    assert beats


def test_bytes_depend_neither_on_the_number_of_processes_nor_on_interruptions(tmp_path):
    # Of the training voices, the breathy ones have noise in them.
    source = open_source("spoken:commands:train?n=300&voices=train")
    for folder, processes in (("one", 1), ("two", 2)):
        module.record(source, tmp_path / folder, processes=processes)
    (tmp_path / "one" / "parts" / "00001.jsonl").unlink()
    module.record(source, tmp_path / "one")
    files = {path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.*")}
    assert len(files) == 300 + 2 + 2  # recordings, parts, description and manifest
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_failing_process_tells_why(tmp_path):
    line = f"spoken:commands:test?task=keywords&n=2&voices=martian+m1&keep={tmp_path}/kept"
    # A setting that cannot work, and no accident.
    with pytest.raises(ValueError, match=r"synthesis failed.*no voice 'martian"):
        open_source(line)[0]


def test_test_voices_share_neither_accent_nor_variant_with_training_voices():
    parts = {
        name: [set(part) for part in zip(*(voice.split("+") for voice in voices), strict=True)]
        for name, voices in VOICE_SETS.items()
    }
    for train, test in zip(parts["train"], parts["test"], strict=True):
        assert not train & test
