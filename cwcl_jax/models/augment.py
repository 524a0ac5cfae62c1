"""Augmentation of speech inside the step; it is active only with a key, that is, in training.

SpecAugment: Park et al. 2019, arXiv 1904.08779 (masks only). Everything is off by default.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from cwcl_jax.models.log_mel import valid


@dataclasses.dataclass(frozen=True)
class SpeechAugment:
    """Strengths of the augmentations; the speech encoders' settings inherit these fields."""

    gain_db: float = 0.0
    """Largest change of loudness in decibels, up or down."""
    noise_db: float = 0.0
    """Decibels (or up to 20 more) of white noise below the signal's power; 0 is no noise."""
    speed: float = 0.0
    """Largest relative change of speed, 0.1 for 90 to 110 %; the pitch changes too."""
    time_masks: int = 0
    time_mask_share: float = 0.1
    """Largest share of the utterance that a time mask covers."""
    frequency_masks: int = 0
    frequency_mask_bins: int = 10

    def __post_init__(self) -> None:
        if not 0 <= self.speed < 1:
            raise ValueError(
                f"speed={self.speed} must be a share from 0 to below 1: 0.1 is for 90 to 110 %"
            )
        if not 0 <= self.time_mask_share <= 1:
            raise ValueError(f"time_mask_share={self.time_mask_share} must be between 0 and 1")
        for name in ("gain_db", "time_masks", "frequency_masks", "frequency_mask_bins"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")


def augment_waveform(
    samples: Float[Array, "b n"],
    length: Int[Array, " b"],
    options: SpeechAugment,
    key: jax.Array | None,
) -> tuple[Float[Array, "b n"], Int[Array, " b"]]:
    """Returns samples and lengths with changed speed, noise and gain.

    Samples after the end stay zero; an utterance that becomes longer than the buffer is truncated.
    """
    if key is None or not (options.speed or options.noise_db or options.gain_db):
        return samples, length
    speed_key, level_key, noise_key, gain_key = jax.random.split(key, 4)
    batch = samples.shape[0]
    if options.speed:
        factor = 1 + options.speed * jax.random.uniform(speed_key, (batch,), minval=-1.0)
        samples, length = _change_speed(samples, length, factor)
    real = valid(length, samples.shape[1])
    if options.noise_db:
        count = jnp.maximum(length, 1).astype(jnp.float32)[:, None]
        power = jnp.sum(samples**2, axis=1, keepdims=True) / count
        level = options.noise_db + 20.0 * jax.random.uniform(level_key, (batch, 1))
        noise = jax.random.normal(noise_key, samples.shape) * jnp.sqrt(power)
        samples = samples + noise * 10.0 ** (-level / 20.0)
    if options.gain_db:
        gain = options.gain_db * jax.random.uniform(gain_key, (batch, 1), minval=-1.0)
        samples = samples * 10.0 ** (gain / 20.0)
    return jnp.where(real, samples, 0.0), length


def _change_speed(
    samples: Float[Array, "b n"], length: Int[Array, " b"], factor: Float[Array, " b"]
) -> tuple[Float[Array, "b n"], Int[Array, " b"]]:
    """Returns each row at another speed, linearly interpolated, and the new lengths."""
    size = samples.shape[1]
    places = jnp.arange(size, dtype=jnp.float32)[None, :] * factor[:, None]
    left = jnp.clip(jnp.floor(places).astype(jnp.int32), 0, size - 2)
    share = jnp.clip(places - left, 0.0, 1.0)
    rows = jnp.take_along_axis(samples, left, axis=1) * (1 - share)
    rows = rows + jnp.take_along_axis(samples, left + 1, axis=1) * share
    length = jnp.minimum(jnp.floor(length / factor).astype(length.dtype), size)
    return jnp.where(valid(length, size), rows, 0.0), length


def mask_spectrum(
    features: Float[Array, "b t f"],
    frames: Bool[Array, "b t"],
    options: SpeechAugment,
    key: jax.Array | None,
) -> Float[Array, "b t f"]:
    """Returns features whose random time and frequency bands are set to the utterance's mean."""
    if key is None or not (options.time_masks or options.frequency_masks):
        return features
    batch, t, f = features.shape
    real = frames[:, :, None]
    total = jnp.sum(jnp.where(real, features, 0.0), axis=(1, 2), keepdims=True)
    count = jnp.maximum(jnp.sum(frames, axis=1)[:, None, None] * f, 1)
    mean = jnp.broadcast_to(total / count, features.shape)
    length = jnp.sum(frames, axis=1).astype(jnp.float32)
    widest = (length * options.time_mask_share, jnp.full((batch,), options.frequency_mask_bins))
    extent = (length, jnp.full((batch,), float(f)))
    for number in range(options.time_masks + options.frequency_masks):
        axis = int(number >= options.time_masks)
        keys = jax.random.split(jax.random.fold_in(key, number))
        width = jax.random.uniform(keys[0], (batch,)) * widest[axis]
        start = jax.random.uniform(keys[1], (batch,)) * (extent[axis] - width)
        place = jnp.arange((t, f)[axis])[None, :]
        inside = (place >= start[:, None]) & (place < (start + width)[:, None])
        inside = inside[:, :, None] if axis == 0 else inside[:, None, :]
        features = jnp.where(inside, mean, features)
    return features
