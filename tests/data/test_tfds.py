import io
import json
import shutil
from importlib.util import find_spec

import numpy as np
import pytest
from PIL import Image

from cwcl_jax.data.sources import open_source
from cwcl_jax.modalities import ImageInputs
from cwcl_jax.modalities.image import eval_pixels
from tests.data.making import encoded, jpeg, pixels, tone

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A data set as a user prepares it: array_record, encoded pictures, labels, captions, sound."""
    tfds = pytest.importorskip("tensorflow_datasets")
    folder = tmp_path_factory.mktemp("tfds")
    palette = encoded(Image.fromarray(pixels(1)).quantize(32))

    class Small(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        # There is no file beside this class with checksums of downloads.
        code_path = None

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(None, None, 3)),
                "title": tfds.features.Text(),
                "label": tfds.features.ClassLabel(names=["ant", "bee"]),
                "captions": tfds.features.Sequence({"text": tfds.features.Text()}),
                "sound": tfds.features.Tensor(shape=(None,), dtype=np.int16, encoding="bytes"),
                "floats": tfds.features.Tensor(shape=(None,), dtype=np.float32),
                "stereo": tfds.features.Tensor(shape=(None, 2), dtype=np.int64),
            }
            return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            del dl_manager
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for number in range(4):
                yield (
                    number,
                    {
                        "image": io.BytesIO(palette if number == 0 else jpeg(number)),
                        "title": f"title {number}",
                        "label": number % 2,
                        "captions": [{"text": f"one {number}"}, {"text": f"two {number}"}],
                        "sound": tone(0.05),
                        "floats": tone(0.05) / np.float32(32768),
                        "stereo": np.stack([tone(0.05)] * 2, axis=1).astype(np.int64),
                    },
                )

    builder = Small(data_dir=folder, file_format="array_record")
    builder.download_and_prepare()
    return builder.data_path


def test_a_prepared_folder_is_a_source(prepared):
    source = open_source(f"tfds:{prepared}?split=train")
    assert len(source) == 4
    assert source.class_names == ["ant", "bee"]
    examples = [source[i] for i in range(4)]
    by_title = {example["text"]: example for example in examples}
    assert set(by_title) == {f"title {n}" for n in range(4)}
    assert by_title["title 3"]["label"] == 1
    assert by_title["title 2"]["image"] == jpeg(2)


def test_palette_pictures_pass_as_bytes_and_come_out_right(prepared):
    source = open_source(f"tfds:{prepared}")
    (example,) = [e for e in map(source.__getitem__, range(4)) if e["text"] == "title 0"]
    inputs = ImageInputs(size=24)
    expected = Image.fromarray(pixels(1)).quantize(32).convert("RGB")
    np.testing.assert_array_equal(
        eval_pixels(example["image"], inputs), eval_pixels(expected, inputs)
    )


def test_nested_captions_and_sound_can_be_named(prepared):
    source = open_source(f"tfds:{prepared}?text=captions/text&audio=sound&rate=16000")
    example = source[0]
    assert [text.split()[0] for text in example["text"]] == ["one", "two"]
    samples, rate = example["audio"]
    assert rate == 16_000
    np.testing.assert_array_equal(samples, tone(0.05))


def test_fields_without_a_feature_are_told(prepared):
    assert set(open_source(f"tfds:{prepared}").lacks) == {"audio"}
    assert not open_source(f"tfds:{prepared}?audio=sound").lacks


@pytest.mark.parametrize("feature", ["floats", "stereo"])
def test_sound_of_any_type_comes_as_int16_of_one_channel(prepared, feature):
    samples, _ = open_source(f"tfds:{prepared}?audio={feature}")[0]["audio"]
    assert samples.dtype == np.int16
    np.testing.assert_array_equal(samples, tone(0.05))


@pytest.mark.parametrize(("asked", "expected"), [("", 16_000), ("&rate=44100", 44_100)])
def test_features_without_a_rate_have_the_asked_one(prepared, asked, expected):
    assert open_source(f"tfds:{prepared}?audio=sound{asked}")[0]["audio"][1] == expected


@pytest.mark.parametrize(("asked", "expected"), [("", 8_000), ("&rate=44100", 44_100)])
def test_the_rate_is_the_features_own(prepared, asked, expected, monkeypatch):
    tfds = pytest.importorskip("tensorflow_datasets")
    # Audio itself cannot be made without tensorflow.
    monkeypatch.setattr(tfds.features.Tensor, "sample_rate", 8_000, raising=False)
    assert open_source(f"tfds:{prepared}?audio=sound{asked}")[0]["audio"][1] == expected


@pytest.mark.skipif(find_spec("tensorflow") is not None, reason="tensorflow is installed")
def test_audio_features_say_that_they_need_tensorflow(prepared, tmp_path):
    folder = tmp_path / "1.0.0"
    shutil.copytree(prepared, folder)
    described = json.loads((folder / "features.json").read_text())
    described["featuresDict"]["features"]["sound"] = {
        "pythonClassName": "tensorflow_datasets.core.features.audio_feature.Audio",
        "audio": {"shape": {"dimensions": ["-1"]}, "dtype": "int64", "encoding": "none"},
    }
    (folder / "features.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match=r"needs the package 'tensorflow'.*Tensor\(shape"):
        open_source(f"tfds:{folder}?audio=sound")


def test_wrong_features_and_names_are_refused(prepared, tmp_path):
    with pytest.raises(ValueError, match="captions"):
        open_source(f"tfds:{prepared}?text=caption")
    with pytest.raises(FileNotFoundError, match="prepared"):
        open_source(f"tfds:no_such_set?data_dir={tmp_path}")


def test_a_prepared_set_can_be_named(prepared):
    folder = prepared.parent.parent
    source = open_source(f"tfds:small?data_dir={folder}")
    assert len(source) == 4
    assert source[0]["text"].startswith("title")


def test_a_known_set_that_is_not_prepared_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="array_record"):
        open_source(f"tfds:mnist?data_dir={tmp_path}")
