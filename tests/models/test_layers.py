"""Gradients of bfloat16 layers are sums in float32: compared with float32 at real numbers of rows.

A cotangent of bfloat16 numbers is the same in both types, so that what is only summed must agree
to rounding. Widths are small, the rows are not.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cwcl_jax.models.encoders import build_encoder, encoder_config
from cwcl_jax.models.leaves import abstract_split
from cwcl_jax.models.speech_frames import FrameConv
from cwcl_jax.models.transformer import Execution, layer_norm, linear
from tests.models.builders import filled

ROWS, LENGTH, WIDTH = 4096, 32, 8


def halves(*shape, seed=0):
    """Numbers that bfloat16 holds, with a mean: sums of them grow."""
    values = 0.3 + np.random.default_rng(seed).standard_normal(shape, np.float32)
    return values.astype(jnp.bfloat16)


def relative(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def gradients(build, call, cotangent):
    """Gradients of all leaves for a cotangent of what `call` gives, in float32 and bfloat16."""

    def gradient(dtype):
        definition, shapes = abstract_split(lambda: build(Execution(dtype=dtype)))

        def total(leaves):
            result = call(definition.merge(leaves))
            return jnp.vdot(result.astype(jnp.float32), jnp.asarray(cotangent, jnp.float32))

        return jax.grad(total)(filled(shapes))

    return gradient("float32"), gradient("bfloat16")


LAYERS = {
    "linear": lambda x: linear(WIDTH, WIDTH, x, nnx.Rngs(0)),
    "norm": lambda x: layer_norm(WIDTH, 1e-6, x, nnx.Rngs(0)),
    "convolution": lambda x: FrameConv(WIDTH, WIDTH, 3, x, rngs=nnx.Rngs(0)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name):
    x, g = jnp.asarray(halves(ROWS, LENGTH, WIDTH)), halves(ROWS, LENGTH, WIDTH, seed=1)
    frames = jnp.ones((ROWS, LENGTH), bool)

    def call(module):
        return module(x, frames)[0] if name == "convolution" else module(x)

    wide, narrow = gradients(LAYERS[name], call, g)
    for path in wide:
        assert narrow[path].dtype == jnp.float32
        assert relative(narrow[path], wide[path]) < 1e-5, path


ENCODERS = {
    "text": ({"max_tokens": LENGTH}, "(token|position)_embedding/embedding"),
    "bert": ({"max_tokens": LENGTH}, "(token|position|type)_embedding/embedding"),
    "roberta": ({"max_tokens": LENGTH}, "(token|position|type)_embedding/embedding"),
    "bart": ({"max_tokens": LENGTH}, "(token|position)_embedding/embedding"),
    "vit": ({"image_size": 16, "patch_size": 8}, "position_embedding|class_token|patch_embed/bias"),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_what_embeds_a_sequence(name):
    """Tables of tokens, positions and types, class token: of 4,096 sequences."""
    overrides, paths = ENCODERS[name]
    sizes = {"width": WIDTH, "depth": 1, "heads": 1, "mlp_width": WIDTH}
    sizes |= {} if name == "vit" else {"vocab_size": 200}
    settings = encoder_config(name, "tiny", sizes | overrides, "")
    rng = np.random.default_rng(0)
    # As words are: a few are in every sentence.
    tokens = jnp.asarray(np.minimum(rng.zipf(1.3, (ROWS, LENGTH)), 199).astype(np.int32))
    mask = jnp.arange(LENGTH)[None] < rng.integers(4, LENGTH + 1, ROWS)[:, None]
    pixels = jnp.asarray(rng.integers(0, 256, (ROWS, 16, 16, 3), np.uint8))

    def call(encoder):
        return encoder.embed(pixels) if name == "vit" else encoder.embed(tokens, mask)

    wide, narrow = gradients(
        lambda execution: build_encoder(name, settings, execution, {}, rngs=nnx.Rngs(0)),
        call,
        halves(ROWS, 5 if name == "vit" else LENGTH, WIDTH),
    )
    compared = [path for path in wide if re.fullmatch(paths, path)]
    assert len(compared) == paths.count("|") + 1
    for path in compared:
        assert relative(narrow[path], wide[path]) < 1e-5, path
