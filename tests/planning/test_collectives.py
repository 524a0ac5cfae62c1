"""What is read from compiled programs is what their collectives send."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from cwcl_jax.planning.collectives import (
    Collective,
    Traffic,
    collectives,
    traffic,
)

N, D = 8, 16  # rows of the whole array; 4 devices
BYTES = N * D * 4
ROWS = P("data")


def compiled(function, out_spec=ROWS, shape=(4,), names=("data",)):
    mesh = jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(names))
    mapped = jax.shard_map(
        function, mesh=mesh, in_specs=P(names), out_specs=out_spec, check_vma=False
    )
    x = jax.ShapeDtypeStruct((N, D), jnp.float32)
    return jax.jit(mapped).lower(x).compile().as_text()


def test_gather_counts_the_gathered_array():
    found = traffic(compiled(lambda x: lax.all_gather(x, "data", tiled=True), P()))
    assert found == {"all-gather": Traffic(1, BYTES, BYTES * 3 / 4)}


def test_scatter_counts_the_array_before_it():
    def gather_and_scatter(x):
        everything = jnp.sin(lax.all_gather(x, "data", tiled=True))
        return lax.psum_scatter(everything, "data", tiled=True)

    found = traffic(compiled(gather_and_scatter))
    assert found["reduce-scatter"] == found["all-gather"] == Traffic(1, BYTES, BYTES * 3 / 4)


def test_reduction_is_sent_twice():
    found = traffic(compiled(lambda x: lax.psum(x, "data"), P()))
    assert found == {"all-reduce": Traffic(1, BYTES // 4, 2 * BYTES // 4 * 3 / 4)}


def test_loop_counts_every_turn():
    def ring(x):
        def hop(carry, _):
            return lax.ppermute(carry, "data", [(i, (i + 1) % 4) for i in range(4)]) * 2, None

        return lax.scan(hop, x, None, length=5)[0]

    assert traffic(compiled(ring)) == {
        "collective-permute": Traffic(5, 5 * BYTES // 4, 5 * BYTES // 4)
    }


@pytest.mark.parametrize(("axis", "size"), [("data", 2), ("fsdp", 2), (("data", "fsdp"), 4)])
def test_groups_of_part_of_the_mesh(axis, size):
    text = compiled(partial(lax.psum, axis_name=axis), P(), (2, 2), ("data", "fsdp"))
    (found,) = collectives(text)
    assert found.group_size == size
    assert found.sent_bytes == 2 * (size - 1) / size * BYTES / 4


def test_only_the_dearest_branch_counts():
    def choose(x):
        return lax.cond(
            jnp.sum(lax.axis_index("data")) >= 0,
            lambda y: lax.psum(y, "data"),
            lambda y: lax.psum(lax.psum(y, "data") * y, "data"),
            x,
        )

    assert traffic(compiled(choose, P()))["all-reduce"].count <= 2


def test_nothing_is_sent_by_one_device():
    assert traffic(jax.jit(jnp.sum).lower(jnp.ones(4)).compile().as_text()) == {}


# As GPU and TPU compilers write them: asynchronous pairs, wrapped computations, tuples, groups by
# rule, axes with device numbers.
ACCELERATOR = """HloModule jit_f, is_scheduled=true, num_partitions=8

%wrapped (p: bf16[16,4]) -> bf16[2,4] {
  %p = bf16[16,4]{1,0} parameter(0)
  ROOT %rs = bf16[2,4]{1,0} reduce-scatter(%p), replica_groups=[1,8]<=[8], to_apply=%add
}

ENTRY %main (a: bf16[2,4]) -> bf16[2,4] {
  %a = bf16[2,4]{1,0:T(8,128)(2,1)} parameter(0)
  %g = (bf16[2,4]{1,0}, bf16[8,4]{1,0}) all-gather-start(%a), replica_groups=[2,4]<=[4,2]T(1,0), \
metadata={op_name="jit(f)/all_gather"}
  %h = bf16[8,4]{1,0} all-gather-done(%g)
  %r = (f32[3]{0}, /*index=1*/f32[]) all-reduce-start(%x, %y), replica_groups={}, to_apply=%add
  %s = (f32[3]{0}, f32[]) all-reduce-done(%r)
  %c = (s8[10]{0}, s8[10]{0}, u32[], u32[]) collective-permute-start(%z), \
source_target_pairs={{0,1},{1,0}}
  %d = s8[10]{0} collective-permute-done(%c)
  %w = ((bf16[16,4]), bf16[2,4], u32[]) async-start(%h), calls=%wrapped
  %v = bf16[2,4]{1,0} async-done(%w), calls=%wrapped
  %e = ((f32[16,4]{1,0}), f32[2,4]{1,0}) reduce-scatter-start(%b), replica_groups={}, to_apply=%add
  %f = f32[2,4]{1,0} reduce-scatter-done(%e)
  %m = pred[6]{0} all-to-all(%q), \
replica_groups=mesh['x'=4,'y'=2], device_ids=([4,2]T(1,0)) {'x':(2)2,'y'}
  ROOT %o = bf16[2,4]{1,0} copy(%v)
}
"""


def test_asynchronous_forms_of_accelerators():
    assert collectives(ACCELERATOR) == [
        Collective("all-gather", 1, 8 * 4 * 2, 4, "jit(f)/all_gather"),
        Collective("all-reduce", 1, 16, 8, ""),
        Collective("collective-permute", 1, 10, 2, ""),
        Collective("reduce-scatter", 1, 16 * 4 * 2, 8, ""),
        Collective("reduce-scatter", 1, 16 * 4 * 4, 8, ""),
        Collective("all-to-all", 1, 6, 4, ""),
    ]
    sent = sum(kind.sent_bytes for kind in traffic(ACCELERATOR).values())
    assert sent == 48 + 28 + 10 + 112 + 224 + 4.5


def test_other_text_is_refused():
    with pytest.raises(ValueError, match="not the text of a compiled HLO module"):
        traffic("module @jit_f { func.func public @main() }")
    with pytest.raises(ValueError, match="cannot read the groups"):
        traffic(ACCELERATOR.replace("replica_groups=[1,8]<=[8]", "replica_groups=?"))
