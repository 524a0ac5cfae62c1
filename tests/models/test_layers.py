"""Layers are flax's and PyTorch's; their gradients in bfloat16 are sums in float32.

Gradients are compared with float32 at real numbers of rows.

A cotangent of bfloat16 numbers is the same in both types, so that what is only summed must agree
to rounding. Widths are small, the rows are not.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
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


def test_norm_is_pytorchs_whatever_the_mean():
    """Values and gradients, on rows of mean 30, where a one-pass variance errs by 4e-4."""
    x, g = 30 + halves(64, 3, WIDTH).astype(np.float32), halves(64, 3, WIDTH, seed=1)
    scale, bias = (halves(WIDTH, seed=seed).astype(np.float32) for seed in (2, 3))
    norm = layer_norm(WIDTH, 1e-6, Execution(), nnx.Rngs(0))
    definition, leaves = nnx.split(norm)
    leaves["scale"].set_value(jnp.asarray(scale))
    leaves["bias"].set_value(jnp.asarray(bias))
    ours, back = jax.vjp(lambda leaves, x: nnx.merge(definition, leaves)(x), leaves, x)
    to_leaves, to_x = back(jnp.asarray(g, jnp.float32))
    wide = [torch.tensor(np.asarray(a, np.float64), requires_grad=True) for a in (x, scale, bias)]
    theirs = torch.nn.functional.layer_norm(wide[0], (WIDTH,), wide[1], wide[2], eps=1e-6)
    theirs.backward(torch.tensor(np.asarray(g, np.float64)))
    assert relative(ours, theirs.detach()) < 1e-5
    found = (to_x, to_leaves["scale"].get_value(), to_leaves["bias"].get_value())
    for one, other in zip(found, wide, strict=True):
        assert relative(one, other.grad) < 2e-5


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
