"""Log-mel features and speech encoders: equal to Whisper's, blind to padding, safe on silence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cwcl_jax.models.augment import SpeechAugment, augment_waveform, mask_spectrum
from cwcl_jax.models.log_mel import MelSpec, log_mel, mel_filters
from cwcl_jax.models.tower import TowerConfig
from tests.models.builders import one_tower

CONV = {"mel_bins": 16, "stem": [12, 16], "width": 16, "dilations": [1, 2], "heads": 4}
WHISPER = {
    "mel_bins": 16,
    "width": 16,
    "depth": 2,
    "heads": 2,
    "mlp_width": 32,
    "max_positions": 60,
}


def tower(encoder, **overrides):
    sizes = {"conv_speech": CONV, "whisper": WHISPER}[encoder]
    return one_tower(TowerConfig(encoder, overrides=sizes | overrides))


def waves(lengths, size, seed=0):
    samples = np.random.default_rng(seed).integers(-6000, 6000, (len(lengths), size))
    return {
        "waveform": jnp.asarray(samples, jnp.int16),
        "length": jnp.asarray(lengths, jnp.int32),
    }


def test_mel_filters_are_those_of_transformers():
    audio_utils = pytest.importorskip("transformers.audio_utils")
    for bins, low, high in ((80, 0.0, 8000.0), (128, 0.0, 8000.0), (64, 60.0, 4000.0)):
        expected = audio_utils.mel_filter_bank(201, bins, low, high, 16000, "slaney", "slaney")
        np.testing.assert_allclose(mel_filters(MelSpec(bins, low, high)), expected, atol=1e-12)


def test_log_mel_equals_whispers_feature_extractor():
    transformers = pytest.importorskip("transformers")
    extractor = transformers.WhisperFeatureExtractor()
    clip = np.random.default_rng(0).normal(size=30000).astype(np.float32) * 0.1
    expected = extractor(clip, sampling_rate=16000, return_tensors="np").input_features[0].T
    frames = jnp.ones((1, 188), bool)
    got = (log_mel(jnp.asarray(clip)[None], frames, MelSpec())[0] + 4) / 4
    # The reference sums its spectra in float64 and casts; ours is float32 throughout.
    np.testing.assert_allclose(got, expected[:188], atol=1e-4)


@pytest.mark.parametrize("encoder", ["conv_speech", "whisper"])
def test_an_utterance_does_not_depend_on_its_padding(encoder):
    definition, leaves = tower(encoder)
    embed = jax.jit(lambda leaves, inputs: definition.merge(leaves)(inputs))
    lengths = [5000, 7777, 8000, 163]
    short = waves(lengths, 8000)
    noise = waves(lengths, 12345, seed=5)["waveform"]
    long = {"waveform": noise.at[:, :8000].set(short["waveform"]), "length": short["length"]}
    real = np.arange(12345)[None, :] < np.asarray(lengths)[:, None]
    clean = {"waveform": jnp.where(real, long["waveform"], 0), "length": short["length"]}
    expected = embed(leaves, short)
    np.testing.assert_allclose(embed(leaves, long), expected, atol=1e-5)
    np.testing.assert_array_equal(embed(leaves, long), embed(leaves, clean))
    assert np.abs(np.asarray(expected[0] - expected[1])).max() > 1e-3


@pytest.mark.parametrize("encoder", ["conv_speech", "whisper"])
def test_empty_and_silent_utterances_have_finite_moderate_gradients(encoder):
    definition, leaves = tower(encoder)
    inputs = waves([0, 16000, 8000], 16000)
    inputs["waveform"] = inputs["waveform"].at[1].set(0)

    @jax.jit
    def gradients(leaves):
        return jax.grad(lambda x: definition.merge(x)(inputs)[:, 0].sum())(leaves)

    norms = {path: float(jnp.linalg.norm(g)) for path, g in gradients(leaves).items()}
    # A norm of an all-zero frame that let gradients through would give 1/sqrt(epsilon) per norm.
    assert all(np.isfinite(norm) and norm < 100 for norm in norms.values()), norms


def test_padded_samples_have_exactly_no_gradient():
    definition, leaves = tower("conv_speech")
    model = definition.merge(leaves)
    wave = waves([3000], 9000)["waveform"].astype(jnp.float32) / 32768

    @jax.jit
    def gradient(wave):
        length = jnp.array([3000], jnp.int32)
        return jax.grad(lambda w: model({"waveform": w, "length": length})[0, 0])(wave)

    values = np.asarray(gradient(wave))
    assert not np.any(values[:, 3000:])
    assert np.any(values[:, :3000])


def test_too_long_audio_is_an_error_with_seconds():
    definition, leaves = tower("whisper")
    with pytest.raises(ValueError, match=r"2.0 s.*takes 19200 \(1.2 s\).*max_seconds"):
        definition.merge(leaves)(waves([32000], 32000))


def test_options_that_the_convolutional_encoder_does_not_have_are_refused():
    with pytest.raises(ValueError, match="scan_layers=False"):
        one_tower(TowerConfig("conv_speech", "tiny", remat="full"))
    with pytest.raises(ValueError, match=r"'mean' or 'mean\+attention', not 'cls'"):
        one_tower(TowerConfig("conv_speech", "tiny", pooling="cls"))


def test_augmentation_needs_a_key_and_keeps_padding_silent():
    options = SpeechAugment(gain_db=6.0, noise_db=20.0, speed=0.1, time_masks=2, frequency_masks=1)
    inputs = waves([4000, 8000], 8000)
    samples = jnp.where(jnp.arange(8000)[None] < inputs["length"][:, None], inputs["waveform"], 0)
    samples = samples / 32768.0
    same, length = augment_waveform(samples, inputs["length"], options, None)
    assert same is samples
    assert length is inputs["length"]
    changed, length = augment_waveform(samples, inputs["length"], options, jax.random.key(0))
    assert np.all(np.abs(np.asarray(length) / np.array([4000, 8000]) - 1) < 0.12)
    after_end = np.arange(8000)[None] >= np.asarray(length)[:, None]
    assert not np.any(np.asarray(changed)[after_end])
    features = jax.random.normal(jax.random.key(1), (2, 50, 16))
    frames = jnp.arange(50)[None] < jnp.array([25, 50])[:, None]
    masked = mask_spectrum(features, frames, options, jax.random.key(2))
    blank = np.asarray(masked != features)
    assert 0 < blank.mean() < 0.8
    np.testing.assert_array_equal(mask_spectrum(features, frames, options, None), features)


def plain_and_augmented(model, inputs):
    """Embeds as in evaluation and as in training, of one program."""
    both = jax.jit(lambda i, k: (model(i), model(i, rngs=nnx.Rngs(dropout=k))))
    return both(inputs, jax.random.key(0))


def test_augmented_training_differs_from_evaluation():
    definition, leaves = tower("conv_speech", time_masks=2, noise_db=10.0)
    model, inputs = definition.merge(leaves), waves([8000], 8000)
    plain, noisy = plain_and_augmented(model, inputs)
    assert np.abs(np.asarray(plain - noisy)).max() > 1e-3


@pytest.mark.parametrize("option", [{"time_masks": 2}, {"noise_db": 10.0}, {"speed": 0.3}])
def test_whisper_is_augmented_whether_or_not_it_hears_silence(option):
    for whole in (True, False):
        definition, leaves = tower("whisper", attend_padding=whole, **option)
        model, inputs = definition.merge(leaves), waves([8000], 8000)
        plain, noisy = plain_and_augmented(model, inputs)
        assert np.abs(np.asarray(plain - noisy)).max() > 1e-3


@pytest.mark.parametrize("encoder", ["conv_speech", "whisper"])
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"speed": 1.1}, "speed=1.1 must be a share"),
        ({"speed": -0.1}, "speed=-0.1"),
        ({"time_mask_share": 10.0}, "time_mask_share=10.0 must be between 0 and 1"),
        ({"time_masks": -1}, "time_masks=-1 must not be negative"),
    ],
)
def test_strengths_that_mean_something_else_are_refused(encoder, option, message):
    with pytest.raises(ValueError, match=message):
        tower(encoder, **option)
