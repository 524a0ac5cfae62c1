"""Schedules, masks and factors, and agreement with an independent AdamW."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from cwcl_jax.training.optimizer import (
    decay_mask,
    layer_decay_factors,
    learning_rate_factors,
    make_optimizer,
    make_schedule,
)
from cwcl_jax.training.options import OptimizerConfig

PATHS = [
    "towers/text/encoder/token_embedding/embedding",
    "towers/text/encoder/position_embedding/embedding",
    "towers/image/encoder/position_embedding",
    "towers/image/encoder/class_token",
    "towers/text/encoder/blocks/0/mlp/kernel",
    "towers/text/encoder/blocks/0/mlp/bias",
    "towers/text/encoder/blocks/1/mlp/kernel",
    "towers/text/encoder/norm/scale",
    "towers/text/head/kernel",
    "logit_scale",
]


@pytest.mark.parametrize("schedule", ["cosine", "constant", "rsqrt"])
def test_warmup_rises_to_the_peak_and_never_wastes_a_step(schedule):
    config = OptimizerConfig(learning_rate=2.0, schedule=schedule, warmup_steps=10)
    values = np.array([make_schedule(config, 100)(step) for step in range(101)])
    assert values[0] > 0
    np.testing.assert_allclose(np.diff(values[:10]), 0.2, rtol=1e-5)
    np.testing.assert_allclose(values[10], 2.0, rtol=1e-6)
    assert values.max() <= 2.0 + 1e-6


def test_schedules_after_the_warmup():
    def at(step, **options):
        return float(make_schedule(OptimizerConfig(learning_rate=1.0, **options), 100)(step))

    assert at(50, schedule="cosine") == pytest.approx(0.5, abs=1e-6)
    assert at(100, schedule="cosine", final_fraction=0.1) == pytest.approx(0.1, abs=1e-6)
    assert at(99, schedule="constant") == 1.0
    assert at(300, schedule="rsqrt", rsqrt_timescale=100) == pytest.approx(0.5, abs=1e-6)


def test_decay_reaches_kernels_and_embeddings_of_all_towers_only():
    mask = decay_mask(OptimizerConfig(), PATHS)
    assert sorted(path for path in PATHS if not mask[path]) == [
        "logit_scale",
        "towers/image/encoder/class_token",
        "towers/text/encoder/blocks/0/mlp/bias",
        "towers/text/encoder/norm/scale",
    ]


def test_decay_expression_that_matches_nothing_is_an_error():
    with pytest.raises(ValueError, match="matches no trained leaf"):
        decay_mask(OptimizerConfig(decay="kernels"), PATHS)


def test_first_multiplier_wins_and_each_must_match():
    config = OptimizerConfig(multipliers=(r"logit_scale=10", r".*/kernel=0.5", r".*=2"))
    factors = learning_rate_factors(config, PATHS)
    assert factors["logit_scale"] == 10
    assert factors["towers/text/head/kernel"] == 0.5
    assert factors["towers/text/encoder/norm/scale"] == 2
    with pytest.raises(ValueError, match="matches no trained leaf"):
        learning_rate_factors(OptimizerConfig(multipliers=("logit=10",)), PATHS)
    with pytest.raises(ValueError, match="not 'regex=factor'"):
        learning_rate_factors(OptimizerConfig(multipliers=("logit_scale",)), PATHS)


def test_layer_decay_shrinks_towards_the_input():
    factors = layer_decay_factors(0.5, PATHS)
    assert factors["towers/text/head/kernel"] == 1.0
    assert factors["towers/text/encoder/norm/scale"] == 1.0
    assert factors["towers/text/encoder/blocks/1/mlp/kernel"] == 0.5
    assert factors["towers/text/encoder/blocks/0/mlp/kernel"] == 0.25
    assert factors["towers/text/encoder/token_embedding/embedding"] == 0.125
    assert factors["logit_scale"] == 1.0


def test_layer_decay_reaches_what_comes_before_the_blocks_whatever_its_name():
    paths = [
        "towers/image/encoder/blocks/0/mlp/up/kernel",
        "towers/image/encoder/class_token",
        "towers/image/encoder/patch_embed/kernel",
        "towers/image/encoder/norm/bias",
    ]
    assert list(layer_decay_factors(0.5, paths).values()) == [0.5, 0.25, 0.25, 1.0]


def test_layer_decay_of_stacked_layers_is_an_error():
    with pytest.raises(ValueError, match="scan_layers=False"):
        layer_decay_factors(0.5, ["towers/text/encoder/blocks/mlp/up/kernel"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": "*kernel"}, r"config\.optimizer\.decay='\*kernel' is not a regular expression"),
        ({"multipliers": ("(.*=1",)}, r"multipliers entry '\(\.\*=1' is not a regular expression"),
        ({"multipliers": (".*=abc",)}, r"entry '\.\*=abc' is not 'regex=factor'"),
        ({"multipliers": (".*=-1",)}, r"entry '\.\*=-1' is not 'regex=factor'"),
        ({"multipliers": (".*=nan",)}, r"entry '\.\*=nan' is not 'regex=factor'"),
    ],
)
def test_expressions_and_factors_that_are_none_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        make_optimizer(OptimizerConfig(**options), 10, PATHS)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_factors_scale_updates_and_leave_the_state_as_it_is(name):
    rng = np.random.default_rng(0)
    # Two dimensions everywhere: Muon wants matrices.
    params = {path: jnp.asarray(rng.normal(size=(4, 4)), jnp.float32) for path in PATHS}
    made = {}
    for decay in (1.0, 0.5):
        options = OptimizerConfig(name=name, layer_decay=decay, weight_decay=0.1)
        optimizer = make_optimizer(options, 10, PATHS)
        made[decay] = optimizer.update(params, optimizer.init(params), params)
    # So that a run may be resumed with other factors.
    assert jax.tree.structure(made[1.0][1]) == jax.tree.structure(made[0.5][1])
    factors = layer_decay_factors(0.5, PATHS)
    for path in PATHS:
        np.testing.assert_allclose(made[0.5][0][path], factors[path] * made[1.0][0][path])


@pytest.mark.parametrize("clip_norm", [0.0, 0.5])
def test_updates_equal_those_of_torch_adamw(clip_norm):
    config = OptimizerConfig(
        learning_rate=0.1, schedule="constant", weight_decay=0.3, clip_norm=clip_norm
    )
    rng = np.random.default_rng(0)
    params = {"a/kernel": rng.normal(size=(3, 2)), "a/bias": rng.normal(size=2)}
    params = {k: v.astype(np.float32) for k, v in params.items()}
    ours = {k: jnp.asarray(v) for k, v in params.items()}
    theirs = {k: torch.nn.Parameter(torch.tensor(v)) for k, v in params.items()}
    optimizer = make_optimizer(config, 10, params)
    reference = torch.optim.AdamW(
        [
            {"params": [theirs["a/kernel"]], "weight_decay": 0.3},
            {"params": [theirs["a/bias"]], "weight_decay": 0.0},
        ],
        lr=0.1,
        eps=1e-8,
    )
    state = optimizer.init(ours)
    for _ in range(5):
        gradients = {k: rng.normal(size=v.shape).astype(np.float32) for k, v in params.items()}
        updates, state = optimizer.update(gradients, state, ours)
        ours = {k: ours[k] + updates[k] for k in ours}
        for name, parameter in theirs.items():
            parameter.grad = torch.tensor(gradients[name])
        if clip_norm:
            torch.nn.utils.clip_grad_norm_(theirs.values(), clip_norm)
        reference.step()
    for name in params:
        # 1e-5: five steps, and torch adds 1e-6 to the norm that it clips by.
        np.testing.assert_allclose(ours[name], theirs[name].detach().numpy(), rtol=1e-5, atol=1e-5)


def test_muon_makes_hidden_updates_orthogonal_and_leaves_the_rest_to_adam():
    rng = np.random.default_rng(0)
    shapes = {
        "towers/text/encoder/blocks/0/mlp/kernel": (24, 16),
        "towers/text/encoder/blocks/0/conv/kernel": (3, 8, 16),
        "towers/text/encoder/token_embedding/embedding": (24, 16),
        "towers/text/head/kernel": (24, 16),
        "logit_scale": (),
    }
    params = {p: jnp.asarray(rng.normal(size=s), jnp.float32) for p, s in shapes.items()}
    gradients = {p: jnp.asarray(rng.normal(size=s), jnp.float32) for p, s in shapes.items()}
    options = {"weight_decay": 0.0, "clip_norm": 0.0, "schedule": "constant", "learning_rate": 0.1}
    made = {}
    for name in ("muon", "adamw"):
        optimizer = make_optimizer(OptimizerConfig(name=name, **options), 10, shapes)
        made[name], _ = optimizer.update(gradients, optimizer.init(params), params)
    for path in shapes:
        if "blocks" not in path:
            np.testing.assert_array_equal(made["muon"][path], made["adamw"][path])
            continue
        matrix = np.asarray(made["muon"][path]).reshape(24, 16)
        # Five Newton-Schulz steps bring singular values near 1, by design not exactly to it.
        values = np.linalg.svd(matrix, compute_uv=False) / (0.1 * 0.2 * 24**0.5)
        assert values.min() > 0.6
        assert values.max() < 1.3
        gradient = np.asarray(gradients[path]).reshape(24, 16)
        left, _, right = np.linalg.svd(gradient, full_matrices=False)
        polar = left @ right
        cosine = -(polar * matrix).sum() / np.linalg.norm(matrix) / np.linalg.norm(polar)
        assert cosine > 0.97


def test_muon_treats_stacked_layers_as_it_treats_single_ones():
    rng = np.random.default_rng(1)
    kernels = rng.normal(size=(3, 8, 6)).astype(np.float32)
    single = {f"text/blocks/{k}/mlp/kernel": jnp.asarray(kernels[k]) for k in range(3)}
    stacked = {"text/blocks/mlp/kernel": jnp.asarray(kernels)}
    options = OptimizerConfig(name="muon", weight_decay=0.01, clip_norm=0.0)
    updates = []
    for params in (single, stacked):
        optimizer = make_optimizer(options, 10, params)
        update, _ = optimizer.update(params, optimizer.init(params), params)
        updates.append(update)
    expected = np.stack([updates[0][f"text/blocks/{k}/mlp/kernel"] for k in range(3)])
    np.testing.assert_allclose(updates[1]["text/blocks/mlp/kernel"], expected, rtol=1e-5, atol=1e-7)


def test_unknown_optimizer_is_an_error():
    with pytest.raises(ValueError, match="'adamw', 'muon'"):
        OptimizerConfig(name="adam")
