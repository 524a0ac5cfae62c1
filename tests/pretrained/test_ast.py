"""The Audio Spectrogram Transformer and its filter banks compute what transformers' do."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile

from cwcl_jax.modalities import SpeechInputs
from cwcl_jax.models.tower import TowerConfig
from cwcl_jax.pretrained import WeightsMismatch, complete
from tests.models.builders import one_tower
from tests.pretrained.against_torch import (
    close,
    imported,
    jitted,
    saved,
    torch,
    transformers,
    unit,
)

# Two shapes whose patches overlap in other ways, and leave a border that nothing reads.
SHAPES = [
    {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20,
     "num_mel_bins": 20, "max_length": 37, "patch_size": 8, "frequency_stride": 5,
     "time_stride": 6},
    {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 28,
     "num_mel_bins": 13, "max_length": 21, "patch_size": 4, "frequency_stride": 4,
     "time_stride": 3, "qkv_bias": False, "hidden_act": "gelu_new"},
]  # fmt: skip
RANGE = {"mean": -3.5, "std": 2.5}


def pair(folder, shape, classifier=False, **options):
    """A random model and its feature extractor, saved together."""
    torch.manual_seed(0)
    kind = transformers.ASTForAudioClassification if classifier else transformers.ASTModel
    model = saved(kind(transformers.ASTConfig(**shape)), folder)
    extractor = transformers.ASTFeatureExtractor(
        num_mel_bins=shape["num_mel_bins"], max_length=shape["max_length"], **(RANGE | options)
    )
    extractor.save_pretrained(folder)
    return model, extractor


def waves(lengths, size):
    rng = np.random.default_rng(0)
    rows = [(3000 * rng.normal(size=n) + 500).astype(np.int16) for n in lengths]
    padded = np.stack([np.pad(row, (0, size - len(row))) for row in rows])
    inputs = {"waveform": jnp.asarray(padded), "length": jnp.asarray(lengths, jnp.int32)}
    return [row.astype(np.float32) / 32768 for row in rows], inputs


@pytest.mark.parametrize("shape", SHAPES)
def test_recordings_equal_pytorch_with_the_zeros_behind_them(tmp_path, shape):
    model, extractor = pair(tmp_path, shape)
    tower, result = imported("ast", tmp_path, shape["hidden_size"])
    assert result.ignored == ()
    longest = tower.encoder.config.samples
    recordings, inputs = waves((longest, 2 * longest // 3, 560), longest)
    made = extractor(recordings, sampling_rate=16000, return_tensors="pt")
    with torch.no_grad():
        out = model(**made, output_hidden_states=True)

    def run(inputs):
        frames = tower.encoder.frames(inputs)
        features = tower.features(inputs)
        return {
            "frames": frames, "embedded": tower.encoder.embed(frames), "features": features,
            "tokens": tower.encoder.tokens(frames), "embeds": tower.project(features),
        }  # fmt: skip

    ours = jitted(run, inputs)
    close("ast banks", ours["frames"], made["input_values"])
    close("ast", ours["embedded"], out.hidden_states[0])
    close("ast", ours["tokens"], out.last_hidden_state)
    close("ast", ours["features"], out.pooler_output)
    close("ast", ours["embeds"], unit(out.pooler_output))
    mean, _ = imported("ast", tmp_path, shape["hidden_size"], pooling="mean")
    close("ast mean", mean.features(inputs), out.last_hidden_state[:, 2:].mean(1))


# Of its own filters, the lowest of which lie between two frequencies.
@pytest.mark.filterwarnings("ignore:At least one mel filter has all zero values")
def test_a_file_of_speech_gives_the_librarys_filter_banks_at_the_published_size(tmp_path):
    """A chirp in noise, written as FLAC."""
    time = np.arange(29_000) / 16_000
    sound = 0.3 * np.sin(2 * np.pi * (100 + 1500 * time) * time) * np.hanning(len(time))
    sound += 0.03 * np.random.default_rng(0).normal(size=len(time))
    file = tmp_path / "chirp.flac"
    soundfile.write(file, sound, 16_000)
    speech = SpeechInputs()
    inputs = speech.prepare(speech.opened(file))
    tower = TowerConfig("ast", "AST-B/10", {"depth": 1, "width": 8, "heads": 1, "mlp_width": 8})
    definition, leaves = one_tower(tower)
    encoder = definition.merge(leaves).encoder
    ours = jitted(encoder.frames, {name: jnp.asarray(x)[None] for name, x in inputs.items()})[0]
    read, rate = soundfile.read(file, dtype="float32")
    theirs = transformers.ASTFeatureExtractor()(read, sampling_rate=rate, return_tensors="np")
    assert ours.shape == (1024, 128)
    # A logarithm shows the rounding of a band that is far quieter than its frame: theirs is summed
    # in float64, and AST's own features, torchaudio's, in float32 as here.
    ours, theirs = (powers(x) for x in (ours, theirs["input_values"][0]))
    loudest = theirs.max(axis=1, keepdims=True)
    np.testing.assert_array_less(np.abs(ours - theirs), 1e-5 * theirs + 1e-6 * loudest)


def powers(x):
    """What filter banks in AudioSet's range are the logarithms of."""
    return np.exp(x.astype(np.float64) * 2 * 4.5689974 - 4.2677393)


def test_published_names_and_a_classifier_are_read(tmp_path):
    pair(tmp_path, SHAPES[0], classifier=True)
    _, result = imported("ast", tmp_path, 24)
    assert result.ignored == (
        "classifier/dense/bias", "classifier/dense/kernel", "classifier/layernorm/bias",
        "classifier/layernorm/scale",
    )  # fmt: skip


def test_the_folders_range_and_sizes_are_taken_and_compared(tmp_path):
    pair(tmp_path, SHAPES[0])
    config = complete(TowerConfig("ast", weights=str(tmp_path))).encoder_settings()
    assert (config.feature_mean, config.feature_std, config.max_frames) == (-3.5, 2.5, 37)
    with pytest.raises(WeightsMismatch, match=r"frequency_stride=5"):
        imported("ast", tmp_path, 24, overrides={"frequency_stride": 4})
    file = tmp_path / "preprocessor_config.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"do_normalize": False}))
    config = complete(TowerConfig("ast", weights=str(tmp_path))).encoder_settings()
    assert (config.feature_mean, config.feature_std) == (0.0, 0.5)
    file.write_text(json.dumps(content | {"sampling_rate": 8000}))
    with pytest.raises(ValueError, match="sampling_rate is 8000"):
        complete(TowerConfig("ast", weights=str(tmp_path)))


def test_more_seconds_than_it_hears_are_refused():
    settings = TowerConfig("ast", "AST-B-speech-commands").encoder_settings()
    with pytest.raises(
        ValueError, match=r"the tower has positions for 1\.295 s: lower it, or raise max_frame"
    ):
        SpeechInputs().check(settings, options="x", overrides="y", imported=False)
    SpeechInputs(max_seconds=1.295).check(settings, options="x", overrides="y", imported=False)


def test_training_leaves_out_patches_and_evaluation_none():
    sizes = {"depth": 1, "width": 8, "heads": 1, "mlp_width": 8, "mel_bins": 13, "max_frames": 21}
    sizes |= {"patch_size": 4, "frequency_stride": 4, "time_stride": 3}
    definition, leaves = one_tower(TowerConfig("ast", "", sizes | {"patch_dropout": 0.5}))
    encoder = definition.merge(leaves).encoder
    frames = jnp.zeros((2, 21, 13))
    for key, tokens in ((None, 2 + 18), (jax.random.key(0), 2 + 9)):
        assert jax.eval_shape(encoder.embed, frames, key).shape == (2, tokens, 8)
