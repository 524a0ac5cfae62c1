"""Towers, their split into leaves, and the decisions about what is trained."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cwcl_jax.models.leaves import split
from cwcl_jax.models.locking import decide
from cwcl_jax.models.pooling import pool
from cwcl_jax.models.tower import TowerConfig
from cwcl_jax.models.two_towers import build_two_towers
from tests.models.builders import abstract_two, arrays_of, two_towers

TINY_TEXT = {
    "vocab_size": 50,
    "max_tokens": 9,
    "width": 16,
    "depth": 2,
    "heads": 2,
    "mlp_width": 32,
}
TINY_IMAGE = {"image_size": 16, "width": 16, "depth": 2, "heads": 2, "mlp_width": 32}


def towers(**changes):
    image = {"overrides": TINY_IMAGE, "preset": "tiny", "tune": "none"} | changes.get("image", {})
    text = {"overrides": TINY_TEXT} | changes.get("text", {})
    return {"image": TowerConfig("vit", **image), "text": TowerConfig("text", **text)}


def build(configs, **changes):
    definition, leaves = two_towers(configs, **changes)
    return definition.merge(leaves)


def paths_of(configs):
    return abstract_two(configs)[0].paths


def run(function, *args):
    return np.asarray(jax.jit(function)(*args))


def images(count=2, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 16, 16, 3), np.uint8)
    return {"pixels": jnp.asarray(pixels)}


def texts(lengths, size=9, seed=1):
    tokens = np.random.default_rng(seed).integers(0, 50, (len(lengths), size), np.int32)
    mask = np.arange(size)[None, :] < np.asarray(lengths)[:, None]
    return {"tokens": jnp.asarray(tokens), "mask": jnp.asarray(mask)}


def test_embeds_have_unit_length_in_float32_whatever_the_compute_dtype():
    model = build(towers(), dtype="bfloat16")
    for modality, inputs in (("image", images()), ("text", texts([3, 9]))):
        embeds = run(model.towers[modality], inputs)
        assert embeds.dtype == jnp.float32
        np.testing.assert_allclose(np.linalg.norm(embeds, axis=1), 1.0, atol=1e-6)


def test_two_builds_are_equal_and_their_leaves_strongly_typed():
    abstract, shapes = abstract_two(towers())
    options = {"embed_dim": 8, "inverse_temperature": 10.0, "logit_bias": None, "dtype": "float32"}
    again, _ = abstract_two(towers())
    assert again == abstract
    assert hash(again) == hash(abstract)
    arrays = {name: arrays_of(config) for name, config in towers().items()}

    def initialised():
        return split(build_two_towers(towers(), arrays, **options, rngs=nnx.Rngs(0)))[1]

    leaves = jax.jit(initialised)()
    assert not any(leaf.weak_type for leaf in leaves.values())
    assert leaves["logit_scale"] == np.log(np.float32(10.0))
    assert all(isinstance(shape, jax.ShapeDtypeStruct) for shape in shapes.values())
    assert {p: (x.shape, x.dtype) for p, x in shapes.items()} == {
        p: (x.shape, x.dtype) for p, x in leaves.items()
    }
    assert "towers/image/encoder/blocks/0/attention/query/kernel" in leaves


def test_leaves_must_fit_the_definition():
    definition, leaves = two_towers(towers())
    again, same = split(definition.merge(leaves))
    assert again == definition
    assert all(same[path] is leaf for path, leaf in leaves.items())
    with pytest.raises(ValueError, match=r"missing.*logit_scale.*unexpected.*bogus"):
        definition.merge({k: v for k, v in leaves.items() if k != "logit_scale"} | {"bogus": 0})


def test_layers_keep_numerical_order_beyond_ten():
    overrides = TINY_TEXT | {"depth": 12}
    paths = paths_of(towers(text={"overrides": overrides}))
    order = [path.split("/")[4] for path in paths if "text/encoder/blocks" in path]
    assert list(dict.fromkeys(order)) == [str(i) for i in range(12)]


@pytest.mark.parametrize("pooling", ["mean", "last", "cls"])
def test_padding_cannot_influence_a_text_embedding(pooling):
    tower = build(towers(text={"pooling": pooling})).towers["text"]
    short, long = texts([4], size=4), texts([4], size=9)
    long["tokens"] = long["tokens"].at[:, :4].set(short["tokens"])
    np.testing.assert_allclose(run(tower, short), run(tower, long), atol=1e-6)
    embedded = jax.jit(tower.encoder.embed)(long["tokens"], long["mask"])

    def first_feature(x):
        hidden = tower.encoder.contextualise(x, long["mask"])
        return pool(hidden, long["mask"], pooling)[:, 0].sum()

    gradient = jax.jit(jax.grad(first_feature))(embedded)
    assert not np.any(np.asarray(gradient[:, 4:]))
    assert np.any(np.asarray(gradient[:, :4]))


@pytest.mark.parametrize(
    ("end_token", "places"), [(9, [2, 4, 1]), (-1, [2, 3, 0]), (30, [4, 4, 1])]
)
def test_end_pooling_reads_the_first_end_token_or_else_the_last_real_token(end_token, places):
    overrides = TINY_TEXT | {"causal": True, "pooling": "end", "end_token": end_token}
    tower = build(towers(text={"overrides": overrides})).towers["text"]
    tokens = jnp.array([[1, 4, 9, 9, 9], [1, 4, 5, 7, 2], [3, 2, 9, 9, 9]])
    inputs = {"tokens": tokens, "mask": jnp.arange(5)[None, :] < jnp.array([5, 5, 2])[:, None]}
    sequence = run(tower.encoder.tokens, inputs)
    expected = sequence[np.arange(3), places]
    np.testing.assert_allclose(run(tower.features, inputs), expected, atol=1e-6)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_fully_masked_rows_have_finite_gradients(pooling):
    definition, leaves = two_towers(towers(text={"pooling": pooling}))

    def total(leaves):
        return definition.merge(leaves).towers["text"](texts([0, 5])).sum()

    gradients = jax.jit(jax.grad(total))(leaves)
    assert all(bool(jnp.isfinite(g).all()) for g in gradients.values())


def test_dropout_is_active_only_with_rngs():
    tower = build(towers(text={"overrides": TINY_TEXT | {"dropout": 0.5}})).towers["text"]
    inputs = texts([5, 9])
    still = run(tower, inputs)
    noisy = jax.jit(lambda key: tower(inputs, rngs=nnx.Rngs(dropout=key)))
    first, again, other = (noisy(jax.random.key(seed)) for seed in (1, 1, 2))
    assert np.abs(np.asarray(first - still)).max() > 1e-3
    np.testing.assert_array_equal(first, again)
    assert np.abs(np.asarray(first - other)).max() > 1e-3


@pytest.mark.parametrize("remat", ["none", "dots", "dots_no_batch"])
def test_scanned_layers_and_remat_change_neither_values_nor_gradients(remat):
    plain, plain_leaves = two_towers(towers())
    settings = {"scan_layers": True, "remat": remat}
    scanned, shapes = abstract_two(towers(text=settings))
    leaves = {}
    for path in shapes:
        head, blocks, tail = path.partition("text/encoder/blocks/")
        stack = [plain_leaves.get(f"{head}{blocks}{i}/{tail}") for i in range(2)]
        leaves[path] = jnp.stack(stack) if blocks else plain_leaves[path]
        assert leaves[path].shape == shapes[path].shape
    inputs = texts([2, 9])

    def total(definition):
        return lambda leaves: definition.merge(leaves).towers["text"](inputs)[:, 0].sum()

    value, gradients = jax.jit(jax.value_and_grad(total(scanned)))(leaves)
    expected, expected_gradients = jax.jit(jax.value_and_grad(total(plain)))(plain_leaves)
    np.testing.assert_allclose(value, expected, atol=1e-6)
    name = "towers/text/encoder/blocks/{}mlp/up/kernel"
    np.testing.assert_allclose(
        gradients[name.format("")][1], expected_gradients[name.format("1/")], atol=1e-5
    )


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_of_unrolled_blocks_with_dropout_changes_no_gradient(remat):
    plain, leaves = two_towers(towers())
    again, _ = abstract_two(towers(text={"remat": remat}))
    inputs = texts([2, 9])

    def total(definition):
        def value(leaves):
            rngs = nnx.Rngs(dropout=3)
            return definition.merge(leaves).towers["text"](inputs, rngs=rngs)[:, 0].sum()

        return value

    expected = jax.jit(jax.value_and_grad(total(plain)))(leaves)
    found = jax.jit(jax.value_and_grad(total(again)))(leaves)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)


def test_unknown_names_are_errors_that_name_the_nearest():
    with pytest.raises(ValueError, match=r"tower 'image': unknown preset.*did you mean 'ViT-L/16'"):
        build(towers(image={"preset": "ViT-L16"}))
    with pytest.raises(ValueError, match=r"unknown override.*'dept'.*did you mean 'depth'"):
        build(towers(text={"overrides": {"dept": 3}}))
    with pytest.raises(ValueError, match=r"head='none' leaves features of width 16.*embed_dim=16"):
        build(towers(image={"head": "none"}))
    with pytest.raises(ValueError, match="unknown remat policy 'all'"):
        build(towers(image={"remat": "all"}))


def test_wrong_input_sizes_are_errors_that_name_the_remedy():
    model = build(towers())
    with pytest.raises(ValueError, match=r"pixels are 32x32.*image_size=32"):
        model.towers["image"]({"pixels": jnp.zeros((1, 32, 32, 3), jnp.uint8)})
    with pytest.raises(ValueError, match=r"10 tokens.*9 positions"):
        model.towers["text"](texts([3], size=10))


@pytest.mark.parametrize(
    ("tune", "trained"),
    [
        # A block has 16 leaves, then two embeddings, the final norm (2) and the head.
        ("all", 2 * 16 + 2 + 2 + 1),
        ("none", 0),
        ("head", 1),
        ("last:0", 2 + 1),
        ("last:1", 16 + 2 + 1),
        ("encoder/blocks/1/.*, head/.*", 16 + 1),
    ],
)
def test_every_leaf_has_one_decision(tune, trained):
    configs = towers(text={"tune": tune}, image={"tune": "none"})
    paths = paths_of(configs)
    decisions = decide(paths, configs)
    assert set(decisions) == set(paths)
    assert decisions["logit_scale"]
    assert sum(d for p, d in decisions.items() if p.startswith("towers/image")) == 0
    assert sum(d for p, d in decisions.items() if p.startswith("towers/text")) == trained


@pytest.mark.parametrize(("tune", "trained"), [("all", False), (".*", True)])
def test_whispers_positions_are_fixed_unless_a_regex_names_them(tune, trained):
    configs = {"speech": TowerConfig("whisper", preset="tiny", tune=tune)}
    names = ["encoder/position_embedding", "encoder/conv1/kernel", "head/projection/kernel"]
    decisions = decide([f"towers/speech/{name}" for name in names], configs)
    assert list(decisions.values()) == [trained, True, True]


def test_locking_errors_name_tower_and_remedy():
    configs = towers(text={"tune": "last:9"})
    paths = paths_of(configs)
    with pytest.raises(ValueError, match=r"towers.text.tune: K of last:K.*0 to 2.*'9'"):
        decide(paths, configs)
    with pytest.raises(ValueError, match="matches no leaf"):
        decide(paths, towers(text={"tune": "encoder/blocks/7/.*"}))
    with pytest.raises(ValueError, match=r"towers.text.tune: '\['.* is not a regular expression"):
        decide(paths, towers(text={"tune": "["}))
    with pytest.raises(ValueError, match="leaf 'towers/speech/x' belongs to no tower"):
        decide(["towers/speech/x"], configs)
    scanned = towers(text={"tune": "last:1", "scan_layers": True})
    paths = paths_of(scanned)
    with pytest.raises(ValueError, match="scan_layers=False"):
        decide(paths, scanned)


def test_precomputed_tower_normalises_what_it_is_given():
    configs = {
        "image": TowerConfig("precomputed", overrides={"width": 5}, head="none"),
        "text": TowerConfig("text", overrides=TINY_TEXT),
    }
    model = build(configs, embed_dim=5)
    embeds = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    expected = embeds / np.linalg.norm(embeds, axis=1, keepdims=True)
    np.testing.assert_allclose(
        run(model.towers["image"], {"features": jnp.asarray(embeds)}), expected, atol=1e-6
    )
    with pytest.raises(ValueError, match="width 4, the tower expects 5"):
        model.towers["image"]({"features": jnp.zeros((3, 4))})


def test_fused_attention_is_asked_for_only_where_it_can_exist():
    from cwcl_jax.models import attention

    q = jnp.zeros((2, 6, 2, 16), jnp.bfloat16)
    assert attention._cudnn_refuses(q.shape[1:], q.dtype, True, False)  # there is no GPU here
    mask = jnp.array([[True] * 4 + [False] * 2, [False] * 6])
    got = attention.attend(q, q, q, mask, causal=False, implementation="auto")
    assert bool(jnp.isfinite(got).all())
    with pytest.raises(ValueError, match="unknown attention 'flash'"):
        build(towers(text={"attention": "flash"}))


def test_a_refused_kernel_is_said_and_a_mistake_is_not_hidden(monkeypatch, caplog):
    from cwcl_jax.models import attention

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    attention._cudnn_refuses.cache_clear()
    with caplog.at_level("WARNING", logger="absl"):
        assert attention.choice((6, 2, 16), jnp.bfloat16, True, False) == "xla"
        assert attention.choice((6, 2, 16), jnp.bfloat16, True, False) == "xla"
    assert caplog.text.count("cannot run here") == 1
    assert attention.choice((6, 2, 16), jnp.float32, True, False) == "xla"

    def broken(*_):
        raise TypeError("a mistake")

    monkeypatch.setattr(attention, "_attention", broken)
    attention._cudnn_refuses.cache_clear()
    with pytest.raises(TypeError, match="a mistake"):
        attention.choice((6, 2, 16), jnp.bfloat16, True, False)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_a_blind_token_changes_neither_attention_nor_its_gradient(causal, masked):
    from cwcl_jax.models import attention

    rng = np.random.default_rng(0)
    q, k, v, weight = (jnp.asarray(rng.normal(size=(3, 7, 2, 8)), jnp.float32) for _ in range(4))
    mask = jnp.asarray(np.arange(7) < np.array([7, 4, 1])[:, None]) if masked else None

    def plain(*arrays):
        return attention.attend(*arrays, mask, causal=causal, implementation="xla")

    def padded(*arrays):
        blind = jnp.ones((1, 7), bool) if mask is None else mask
        return attention._with_a_blind_token(*arrays, blind, causal, "xla")

    np.testing.assert_allclose(padded(q, k, v), plain(q, k, v), atol=1e-6)
    got, expected = (
        jax.grad(lambda *x, f=f: jnp.sum(f(*x) * weight), argnums=(0, 1, 2))(q, k, v)
        for f in (padded, plain)
    )
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
