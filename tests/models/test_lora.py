"""LoRA's leaves: the sum by its equation for every shape of kernel, and what cannot be meant."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cwcl_jax.models.locking import decide
from cwcl_jax.models.lora import Adapter, dense_kernels, effective, find_adapters
from cwcl_jax.models.transformer import Execution, linear
from cwcl_jax.planning.work import count_work
from tests.models.builders import abstract_two, filled
from tests.models.test_towers import images, run, towers


def adapted(text):
    configs = towers(text=text)
    definition, shapes = abstract_two(configs)
    trained = {path for path, is_trained in decide(shapes, configs).items() if is_trained}
    adapters = find_adapters(shapes, trained, configs)
    return dataclasses.replace(definition, adapters=adapters), shapes


@pytest.mark.parametrize(
    ("path", "shape", "layers"),
    [
        ("towers/a/head/kernel", (5, 4), 0),
        ("a/conv/kernel", (2, 3, 5), 0),
        ("b/kernel", (3, 5, 4), 3),
    ],
)
def test_an_adapted_kernel_is_the_sum_that_the_equation_says(path, shape, layers):
    adapter = Adapter(path, shape, rank=2, scale=1.5, layers=layers)
    rng = np.random.default_rng(0)
    leaves = {path: rng.normal(size=shape).astype(np.float32), "other": np.ones(3)}
    a, b = adapter.paths
    leaves |= {p: rng.normal(size=x.shape).astype(np.float32) for p, x in adapter.shapes().items()}
    result = effective({p: jnp.asarray(x) for p, x in leaves.items()}, [adapter])
    assert result.keys() == {path, "other"}
    expected = np.array(leaves[path], np.float64)
    for layer in range(layers) or [...]:
        whole = expected[layer]
        matrix = whole.reshape(-1, shape[-1])
        matrix += 1.5 * leaves[a][layer].astype(np.float64) @ leaves[b][layer]
    np.testing.assert_allclose(result[path], expected, atol=1e-6)


def test_a_tower_starts_as_it_was_and_moves_with_b():
    definition, shapes = adapted({"tune": "none"})
    image = {"image": {"tune": "lora:3", "lora_alpha": 6.0, "lora_kernels": ".*/query/kernel"}}
    configs = towers(**image)
    adapters = find_adapters(shapes, (), configs)
    assert [adapter.scale for adapter in adapters] == [2.0, 2.0]
    leaves = filled(shapes)
    added = {p: x for y in adapters for p, x in y.initial(jax.random.key(0)).items()}
    first, second = (added[adapter.paths[0]] for adapter in adapters)
    assert np.std(first) == pytest.approx(16**-0.5, rel=0.3)
    assert not np.array_equal(first, second)

    def features(definition, leaves):
        return run(lambda x: definition.merge(leaves).towers["image"].features(x), images())

    plain = features(definition, leaves)
    with_lora = dataclasses.replace(definition, adapters=adapters)
    assert with_lora.paths == (*definition.paths, *added)
    np.testing.assert_array_equal(features(with_lora, leaves | added), plain)
    moved = added | {adapters[1].paths[1]: jnp.ones((3, 16))}
    assert np.abs(features(with_lora, leaves | moved) - plain).max() > 1e-3


@pytest.mark.parametrize("scan", [False, True])
def test_additions_beside_the_kernels_give_what_the_sums_give(scan):
    image = {"tune": "lora:3", "lora_alpha": 6.0, "scan_layers": scan}
    configs = towers(image=image)
    definition, shapes = abstract_two(configs)
    dense = dense_kernels(definition.merge(filled(shapes)))
    summed, beside = (find_adapters(shapes, (), configs, x) for x in ((), dense))
    kinds = {adapter.kernel.split("/")[3]: adapter.beside for adapter in beside}
    assert kinds == {"patch_embed": False, "blocks": True}
    added = filled({p: x for y in summed for p, x in y.shapes().items()})
    leaves = filled(shapes) | added

    def features(adapters):
        one = dataclasses.replace(definition, adapters=adapters)
        return one.merge(leaves).towers["image"].features(images())

    one, two = jax.tree.map(np.asarray, jax.jit(lambda: (features(summed), features(beside)))())
    np.testing.assert_allclose(two, one, atol=1e-6 * np.abs(one).max())


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_gradient_of_a_whole_kernel_is_not_formed(dtype):
    rows, inputs, outputs, rank = 64, 32, 48, 2
    layer = linear(inputs, outputs, Execution(dtype), nnx.Rngs(0), bias=False)
    layer.adapt(jnp.ones((inputs, rank)), jnp.ones((rank, outputs)), 0.5)
    graphdef, state = nnx.split(layer)

    def gradients(x, a, b):
        def total(x, a, b):
            state["lora_a"], state["lora_b"] = nnx.Param(a), nnx.Param(b)
            return jnp.sum(nnx.merge(graphdef, state)(x).astype(jnp.float32))

        return jax.grad(total, (0, 1, 2))(x, a, b)

    shapes = ((rows, inputs), (inputs, rank), (rank, outputs))
    work = count_work(gradients, *(jax.ShapeDtypeStruct(x, jnp.float32) for x in shapes), devices=1)
    # x W and the gradient of x through W; x A B and, for each of its products, two gradients.
    low = 2 * rows * rank * (inputs + outputs)
    assert work.total_flops <= 2 * (2 * rows * inputs * outputs) + 3 * low


def test_kernels_that_train_get_no_addition():
    definition, _ = adapted({"tune": "last:1+lora:2"})
    layers = {adapter.kernel.split("/")[4] for adapter in definition.adapters}
    assert layers == {"0"}
    assert len(definition.adapters) == 6


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ({"tune": "lora:2", "lora_kernels": ".*/q/kernel"}, r"no kernel; there are .*blocks/N/att"),
        ({"tune": "lora:2", "lora_kernels": "encoder/norm/.*"}, "matches no kernel"),
        ({"tune": "lora:2", "lora_kernels": "["}, "not a regular expression"),
        ({"tune": "lora:0"}, "from 1 to 16"),
        ({"tune": "lora:17"}, "from 1 to 16, the smaller side of towers/text/encoder/blocks/0"),
        ({"tune": "lora:x"}, "from 1 to 16"),
        ({"tune": "lora:"}, "R of lora:R is missing"),
        ({"tune": "lora:2", "lora_alpha": -1.0}, "lora_alpha=-1.0"),
        ({"tune": "all+lora:2"}, "trains as a whole"),
        ({"tune": "head", "lora_alpha": 4.0}, "lora_alpha=4.0 has no effect with tune='head'"),
    ],
)
def test_what_cannot_be_meant_is_refused(text, message):
    with pytest.raises(ValueError, match=f"towers.text: .*{message}"):
        adapted(text)
