import json

import numpy as np
import pytest

from cwcl_jax.data.skipping import BadExample
from cwcl_jax.data.sources import open_source

AUDIO = b"sound"


def _touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(AUDIO + path.name.encode())


def test_common_voice_columns_are_read_by_name_and_quotes_are_text(tmp_path):
    header = "client_id\tpath\tsentence\tup_votes\taccents\tvariant\n"
    rows = 'c1\ta.mp3\t"Open quote only\t2\t\t\nc2\tb.mp3\tPlain, sentence.\t3\tUS\t\n'
    (tmp_path / "train.tsv").write_text(header + rows)
    (tmp_path / "dev.tsv").write_text("sentence\tpath\nSwapped\tc.mp3\n")
    for name in "abc":
        _touch(tmp_path / "clips" / f"{name}.mp3")
    train = open_source(f"common_voice:{tmp_path}")
    assert [train[i]["text"] for i in range(2)] == ['"Open quote only', "Plain, sentence."]
    assert train[1]["audio"] == AUDIO + b"b.mp3"
    assert train[0]["id"] == "a.mp3"
    dev = open_source(f"common_voice:{tmp_path}?split=dev")
    assert dev[0]["text"] == "Swapped"
    with pytest.raises(FileNotFoundError, match="'validated'"):
        open_source(f"common_voice:{tmp_path}?split=validated")


def _slurp(tmp_path):
    def row(number, scenario, action, intent, files):
        return {
            "slurp_id": number,
            "sentence": f"sentence {number}",
            "scenario": scenario,
            "action": action,
            "intent": intent,
            "recordings": [{"file": name, "status": "correct"} for name in files],
        }

    test = [
        row(1, "alarm", "set", "alarm_set", ["audio-1.flac", "audio-2-headset.flac"]),
        row(2, "email", "query", "datetime_query", ["audio--3.flac"]),
        row(3, "email", "query", "email_query", []),
    ]
    devel = [row(4, "weather", "query", "weather_query", ["audio-4.flac"])]
    for split, rows in (("test", test), ("devel", devel)):
        text = "".join(json.dumps(r) + "\n" for r in rows)
        (tmp_path / f"{split}.jsonl").write_text(text)
    for name in ("slurp_real/audio-1.flac", "slurp_real/audio-2-headset.flac"):
        _touch(tmp_path / "audio" / name)
    _touch(tmp_path / "audio" / "slurp_synth" / "audio--3.flac")


def test_slurp_classes_are_scenario_and_action_of_all_splits(tmp_path):
    _slurp(tmp_path)
    test = open_source(f"slurp:{tmp_path}?split=test&unit=sentences")
    devel = open_source(f"slurp:{tmp_path}?split=devel&unit=sentences")
    assert test.class_names == devel.class_names == ["alarm_set", "email_query", "weather_query"]
    labels = [test.read(i, ("label",))["label"] for i in range(3)]
    # The noisy intent of the second sentence would have been another class.
    assert labels == [0, 1, 1]


def test_slurp_gives_every_recording_from_either_folder(tmp_path):
    _slurp(tmp_path)
    source = open_source(f"slurp:{tmp_path}?split=test")
    assert len(source) == 3
    assert [source[i]["audio"] for i in range(3)] == [
        AUDIO + name for name in (b"audio-1.flac", b"audio-2-headset.flac", b"audio--3.flac")
    ]
    assert [source[i]["text"] for i in range(3)] == ["sentence 1", "sentence 1", "sentence 2"]
    devel = open_source(f"slurp:{tmp_path}?split=devel")
    with pytest.raises(BadExample, match="slurp_synth"):
        devel[0]
    assert devel.read(0, ("text",))["text"] == "sentence 4"


def _stop(tmp_path, folder):
    base = tmp_path / "stop"
    (base / "manifests").mkdir(parents=True)
    names = [
        "file_id",
        "domain",
        "gender",
        "native",
        "utterance",
        "seqlogical",
        "normalized_utterance",
        "normalized_seqlogical",
        "decoupled_normalized_seqlogical",
    ]
    for split in ("train", "eval", "test"):
        rows = [names]
        for domain, intent in (("alarm", "CREATE_ALARM"), ("weather", "GET_WEATHER")):
            parse = f"[IN:{intent} [SL:TIME noon ] ]"
            file = f"{domain}_{split}_0/00000001.wav"
            rows.append([file, domain, "f", "yes", "Noon!", parse, "noon", parse, parse])
            _touch(base / file.replace(f"_{split}_0", folder.format(split)))
        text = "\n".join("\t".join(row) for row in rows) + "\n"
        (base / "manifests" / f"{split}.tsv").write_text(text)


@pytest.mark.parametrize("folder", ["_{}_0", "_{}"])
@pytest.mark.parametrize("inside", ["", "/stop"])
def test_stop_in_both_releases(tmp_path, folder, inside):
    _stop(tmp_path, folder)
    source = open_source(f"stop:{tmp_path}{inside}?split=eval")
    assert source.class_names == ["create_alarm", "get_weather"]
    examples = [source[i] for i in range(2)]
    assert [e["label"] for e in examples] == [0, 1]
    assert all(e["text"] == "noon" for e in examples)
    # Equal file names in two domains are two examples.
    assert len({e["id"] for e in examples}) == 2


def test_stop_without_audio_says_where_it_looked(tmp_path):
    _stop(tmp_path, "elsewhere{}")
    source = open_source(f"stop:{tmp_path}?split=test")
    with pytest.raises(BadExample, match=r"alarm_test_0/00000001\.wav.*alarm_test/00000001\.wav"):
        source[0]


def _commands(tmp_path):
    for word in ("yes", "no", "marvin"):
        for speaker in ("aa", "bb", "cc"):
            _touch(tmp_path / word / f"{speaker}_nohash_0.wav")
    _touch(tmp_path / "_background_noise_" / "noise.wav")
    (tmp_path / "validation_list.txt").write_text("yes/bb_nohash_0.wav\nno/bb_nohash_0.wav\n")
    (tmp_path / "testing_list.txt").write_text("yes/cc_nohash_0.wav\nmarvin/cc_nohash_0.wav\n")


def test_speech_commands_splits_follow_the_lists(tmp_path):
    _commands(tmp_path)
    test = open_source(f"speech_commands:{tmp_path}")
    assert test.class_names == ["marvin", "no", "yes"]
    assert [(test[i]["text"], test[i]["label"]) for i in range(2)] == [("marvin", 0), ("yes", 2)]
    assert len(open_source(f"speech_commands:{tmp_path}?split=validation")) == 2
    train = open_source(f"speech_commands:{tmp_path}?split=train")
    assert [train[i]["id"] for i in range(len(train))] == [
        "marvin/aa_nohash_0.wav",
        "marvin/bb_nohash_0.wav",
        "no/aa_nohash_0.wav",
        "no/cc_nohash_0.wav",
        "yes/aa_nohash_0.wav",
    ]


def test_ten_speech_commands_leave_the_other_words_out(tmp_path):
    _commands(tmp_path)
    ten = open_source(f"speech_commands:{tmp_path}?classes=10&split=train")
    assert ten.class_names == ["yes", "no"]
    assert len(ten) == 3
    with pytest.raises(ValueError, match="35 or 10"):
        open_source(f"speech_commands:{tmp_path}?classes=12")
    with pytest.raises(ValueError, match="split='dev'"):
        open_source(f"speech_commands:{tmp_path}?split=dev")


@pytest.mark.parametrize("inside", ["", "recordings/"])
def test_spoken_digits_are_named_by_their_files(tmp_path, inside):
    for name in ("7_ann_0.wav", "0_bob_12.wav", "notes.txt"):
        _touch(tmp_path / f"{inside}{name}")
    source = open_source(f"fsdd:{tmp_path}")
    assert [(source[i]["text"], source[i]["label"]) for i in range(2)] == [
        ("zero", 0),
        ("seven", 7),
    ]
    assert len(source.class_names) == 10
    assert source[1]["audio"] == AUDIO + b"7_ann_0.wav"


def test_speech_manifests_in_jsonl(tmp_path):
    _touch(tmp_path / "wavs" / "1.wav")
    row = {"audio_filepath": "wavs/1.wav", "text": "hello", "duration": 1.0}
    (tmp_path / "m.jsonl").write_text(json.dumps(row) + "\n")
    example = open_source(f"jsonl:{tmp_path}/m.jsonl")[0]
    assert example == {"id": "wavs/1.wav", "audio": AUDIO + b"1.wav", "text": "hello"}


def test_lists_of_clip_durations_are_read_where_a_release_has_them(tmp_path):
    (tmp_path / "train.tsv").write_text("path\tsentence\na.mp3\tone\nb.mp3\ttwo\nc.mp3\tthree\n")
    assert open_source(f"common_voice:{tmp_path}").durations is None
    (tmp_path / "clip_durations.tsv").write_text("clip\tduration[ms]\nb.mp3\t1500\na.mp3\t500\n")
    assert list(open_source(f"common_voice:{tmp_path}").durations) == [0.5, 1.5, np.inf]


def test_lists_without_their_columns_are_an_error_that_names_them(tmp_path):
    (tmp_path / "train.tsv").write_text("path\ttext\na.mp3\tone\n")
    with pytest.raises(ValueError, match=r"train\.tsv: the header has no sentence \(it has path"):
        open_source(f"common_voice:{tmp_path}")
    (tmp_path / "test.jsonl").write_text('{"slurp_id": 1, "sentence": "a"}\n')
    with pytest.raises(ValueError, match="a sentence has no scenario, action"):
        open_source(f"slurp:{tmp_path}")
    (tmp_path / "manifests").mkdir()
    (tmp_path / "manifests" / "test.tsv").write_text("id\tutterance\n1\tcall\n")
    with pytest.raises(ValueError, match="has no file_id"):
        open_source(f"stop:{tmp_path}?split=test")


def test_a_broken_line_of_slurp_is_left_out(tmp_path):
    _slurp(tmp_path)
    file = tmp_path / "test.jsonl"
    file.write_text("{broken\n" + file.read_text())
    assert len(open_source(f"slurp:{tmp_path}?split=test&unit=sentences")) == 3


def test_manifests_of_parts_of_recordings_are_refused(tmp_path):
    """As NeMo writes them: read from the beginning, they would pair a text with another sound."""
    file = tmp_path / "m.jsonl"
    rows = [{"audio_filepath": "1.wav", "text": "a", "offset": start} for start in (0.0, 2.5)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"row 2 begins at offset=2\.5 .*save the parts"):
        open_source(f"jsonl:{file}")
    file.write_text(json.dumps(rows[0]) + "\n")
    assert len(open_source(f"jsonl:{file}")) == 1
    # Of pictures an offset says nothing.
    file.write_text('{"image": "1.jpg", "text": "a", "offset": 3}\n')
    assert len(open_source(f"jsonl:{file}")) == 1


def test_durations_of_other_clips_are_none(tmp_path):
    (tmp_path / "train.tsv").write_text("path\tsentence\na.mp3\tone\n")
    (tmp_path / "clip_durations.tsv").write_text("clip\tduration[ms]\nother.mp3\t1500\n")
    assert open_source(f"common_voice:{tmp_path}").durations is None


def test_lists_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "train.tsv").write_text("\ufeffpath\tsentence\na.mp3\tone\n", encoding="utf-8")
    source = open_source(f"common_voice:{tmp_path}")
    assert source.read(0, ("text",)) == {"id": "a.mp3", "text": "one"}


def test_recordings_of_slurp_may_stand_by_name(tmp_path):
    """As in the release's own metadata."""
    row = {
        "slurp_id": 1, "sentence": "turn on", "scenario": "iot", "action": "on",
        "recordings": {"a.flac": {"usrid": "x"}, "b.flac": {"usrid": "y"}},
    }  # fmt: skip
    folder = tmp_path / "dataset" / "slurp"
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text(json.dumps(row) + "\n")
    source = open_source(f"slurp:{tmp_path}?split=train")
    assert source.columns["audio"][1] == "b.flac"
