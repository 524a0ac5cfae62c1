"""Users' layouts from end to end: CLIP_benchmark folders, class folders, COCO captions."""

import io
import json
import tarfile

import numpy as np
import pytest
import soundfile
from PIL import Image

from cwcl_jax.data.sources.coco import open_coco
from cwcl_jax.evaluation.runner import run_task
from cwcl_jax.evaluation.tasks.retrieval import Retrieval
from cwcl_jax.evaluation.tasks.spoken import Intent, Keywords
from cwcl_jax.evaluation.tasks.zero_shot import ZeroShot
from tests.evaluation.analytic import DATA, Analytic

SHAPES = ["circle", "square", "star"]
AXES = dict(zip(SHAPES, np.eye(3), strict=True))
TABLE = np.zeros((256, 3))
TABLE[:4] = np.eye(3)[[0, 1, 2, 0]]


def picture(grey):
    file = io.BytesIO()
    Image.new("RGB", (20, 20), (grey, grey, grey)).save(file, "png")
    return file.getvalue()


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def run(task):
    return run_task("t", task, encode=Analytic(TABLE, AXES), data=DATA, batch_size=4)


@pytest.fixture
def clip_benchmark(tmp_path):
    """Two shards; captions are there as well as classes."""
    folder = tmp_path / "test"
    folder.mkdir()
    (folder / "nshards.txt").write_text("2")
    captions = ["a circle\ncircle circle", "a square", "a star", "circle square"]
    for shard in range(2):
        members = []
        for i in (2 * shard, 2 * shard + 1):
            members.append((f"s{i:07d}.png", picture(i)))
            members.append((f"s{i:07d}.cls", str(i % 3).encode()))
            members.append((f"s{i:07d}.txt", captions[i].encode()))
        write_tar(folder / f"{shard}.tar", members)
    (tmp_path / "classnames.txt").write_text("\n".join(SHAPES))
    (tmp_path / "zeroshot_classification_templates.txt").write_text("a {c}\nthe {c}.\n")
    return tmp_path


def test_clip_benchmark_classification_with_its_own_templates(clip_benchmark):
    templates = str(clip_benchmark / "zeroshot_classification_templates.txt")
    result = run(ZeroShot(source=f"clip_benchmark:{clip_benchmark}", templates=templates))
    assert result.metrics["top1"] == 1.0
    assert result.extras["class_names"] == SHAPES
    assert result.extras["prompt_sets"][""] == (templates, 6)


def test_clip_benchmark_retrieval_with_one_caption_a_line(clip_benchmark):
    result = run(Retrieval(source=f"clip_benchmark:{clip_benchmark}"))
    # "circle square" is as close to pictures 0 and 1 as to its own, which has a higher index.
    assert result.items["text_to_image_rank"].tolist() == [1, 1, 1, 1, 3]
    assert result.items["owner"].tolist() == [0, 0, 1, 2, 3]


def test_class_folders_with_a_mapping_to_words(tmp_path):
    for grey, folder in enumerate(["n01", "n02", "n03"]):
        (tmp_path / "val" / folder).mkdir(parents=True)
        (tmp_path / "val" / folder / "a.png").write_bytes(picture(grey))
    (tmp_path / "names.tsv").write_text("n03\tstar\nn01\tcircle\nn99\tmoon\n")
    task = ZeroShot(
        source=f"folder:{tmp_path / 'val'}",
        class_names=str(tmp_path / "names.tsv"),
        unmapped_classes="drop",
    )
    result = run(task)
    assert result.extras["class_names"] == ["circle", "star"]
    assert result.metrics["top1"] == 1.0
    assert result.chance["top1"] == 0.5
    assert "1 of 3 items" in result.warnings[0]


@pytest.fixture
def coco(tmp_path):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "val2017").mkdir()
    images, annotations = [], []
    for i, shape in enumerate(SHAPES):
        (tmp_path / "val2017" / f"{i}.png").write_bytes(picture(i))
        images.append({"id": 100 + i, "file_name": f"{i}.png"})
        annotations += [{"image_id": 100 + i, "caption": f" a {shape}\n"} for _ in range(6)]
    images.append({"id": 200, "file_name": "absent.png"})
    annotations[3]["caption"] = "a star"  # of picture 100, which is a circle
    path = tmp_path / "annotations" / "captions_val2017.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations[::-1]}))
    return path


def test_coco_captions_give_five_captions_a_picture(coco):
    result = run(Retrieval(source=f"coco:{coco}", recall_k=(1, 5)))
    assert np.bincount(result.items["owner"]).tolist() == [5, 5, 5]
    # The circle's wrong caption "a star" ties with the star's own ones and has a lower index.
    assert result.items["image_to_text_rank"].tolist() == [1, 1, 2]
    assert result.metrics["text_to_image_R@1"] == pytest.approx(14 / 15)


def test_coco_reader_says_what_is_missing(coco, tmp_path):
    assert len(open_coco(str(coco), captions=0).read(0, ("text",))["text"]) == 6
    with pytest.raises(FileNotFoundError, match="images="):
        open_coco(str(coco), images=str(tmp_path / "nowhere"))
    other = tmp_path / "instances.json"
    other.write_text(json.dumps({"images": [], "annotations": [{"image_id": 1}]}))
    with pytest.raises(ValueError, match="captions_"):
        open_coco(str(other), images=str(tmp_path))
    other.write_text("[]")
    with pytest.raises(ValueError, match="not a COCO captions file"):
        open_coco(str(other))


WORDS = {**AXES, "red": np.array([1.0, 0, 0]), "blue": np.array([0, 1.0, 0])}
SOUNDS = np.zeros((256, 3))
SOUNDS[100:103] = np.eye(3)  # recordings of level 100 sound like circles, and so on


def record(path, level):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.full(800, level, np.int16), 16_000)


def run_speech(task):
    return run_task("t", task, encode=Analytic(SOUNDS, WORDS), data=DATA, batch_size=4)


def test_slurp_intents_from_its_own_files(tmp_path):
    rows = {
        "devel": [("a circle", "shape", "round", []), ("a blue square", "shape", "edged", [])],
        "test": [
            ("red circle", "shape", "round", ["a.flac", "b.flac"]),
            ("blue", "shape", "edged", ["c.flac"]),
        ],
    }
    for split, sentences in rows.items():
        lines = [
            {
                "slurp_id": number,
                "sentence": sentence,
                "scenario": scenario,
                "action": action,
                "intent": "noise",
                "recordings": [{"file": name} for name in files],
            }
            for number, (sentence, scenario, action, files) in enumerate(sentences)
        ]
        path = tmp_path / "dataset" / "slurp" / f"{split}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(map(json.dumps, lines)))
    for name, level in (("a", 100), ("b", 101), ("c", 101)):
        record(tmp_path / "audio" / "slurp_real" / f"{name}.flac", level)
    result = run_speech(
        Intent(
            source=f"slurp:{tmp_path}?split=test",
            template_source=f"slurp:{tmp_path}?split=devel&unit=sentences",
        )
    )
    assert result.extras["class_names"] == ["shape_edged", "shape_round"]
    assert result.metrics["top1"] == pytest.approx(2 / 3)  # b is heard as a square
    assert result.metrics["text_top1"] == 1.0
    assert result.items["groups"].tolist() == [1, 1, 0]


def test_stop_intents_from_its_own_files(tmp_path):
    header = "file_id\tutterance\tnormalized_utterance\tdecoupled_normalized_seqlogical"
    for split, level in (("train", 100), ("test", 100)):
        rows = [header]
        for number, (text, intent) in enumerate(
            [("red circle", "GET_CIRCLE"), ("blue", "GET_SQUARE")]
        ):
            name = f"{split}/alarm_{split}/{number}.wav"
            record(tmp_path / name, level + number)
            rows.append(f"{name}\t{text}\t{text}\t[IN:{intent} ]")
        (tmp_path / "manifests").mkdir(exist_ok=True)
        (tmp_path / "manifests" / f"{split}.tsv").write_text("\n".join(rows) + "\n")
    result = run_speech(
        Intent(
            source=f"stop:{tmp_path}?split=test",
            template_source=f"stop:{tmp_path}?split=train",
        )
    )
    assert result.metrics["top1"] == result.metrics["text_top1"] == 1.0
    # "it is about get circle": the general templates read the identifier as words.
    assert result.metrics["top1_general"] == 1.0


def test_speech_commands_keywords_from_its_own_files(tmp_path):
    for place, word in enumerate(SHAPES):
        for number in range(2):
            record(tmp_path / word / f"{number}_nohash_0.wav", 100 + place)
    record(tmp_path / "_background_noise_" / "hum.wav", 5)
    (tmp_path / "testing_list.txt").write_text(
        "".join(f"{word}/1_nohash_0.wav\n" for word in SHAPES)
    )
    (tmp_path / "validation_list.txt").write_text("")
    result = run_speech(Keywords(source=f"speech_commands:{tmp_path}?split=test"))
    assert result.extras["class_names"] == SHAPES
    assert len(result.items["ids"]) == 3
    assert result.metrics["top1"] == result.metrics["top1_general"] == 1.0
