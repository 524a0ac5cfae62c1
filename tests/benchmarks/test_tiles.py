"""Bytes of a program with loops, read from its text."""

from cwcl_jax.benchmarks.tiles import traffic_of

# 1,024 floats are 4,096 bytes. The loop runs five times: a kernel writes an array and its scratch
# space, one fusion reads it whole, one a quarter of it, one updates a quarter in place.
PROGRAM = """HloModule m, num_partitions=1

%whole (p0: f32[1024]) -> f32[] {
  %p0 = f32[1024]{0} parameter(0)
  %c = f32[] constant(0)
  ROOT %r = f32[] reduce(%p0, %c), dimensions={0}, to_apply=%add
}

%part (p0.1: f32[1024], p1.1: s32[]) -> f32[256] {
  %p0.1 = f32[1024]{0} parameter(0)
  %p1.1 = s32[] parameter(1)
  %b = f32[1024]{0} bitcast(%p0.1)
  ROOT %s = f32[256]{0} dynamic-slice(%b, %p1.1), dynamic_slice_sizes={256}
}

%update (p0.2: f32[1024], p1.2: f32[256], p2.2: s32[]) -> f32[1024] {
  %p0.2 = f32[1024]{0} parameter(0)
  %p1.2 = f32[256]{0} parameter(1)
  %p2.2 = s32[] parameter(2)
  ROOT %u = f32[1024]{0} dynamic-update-slice(%p0.2, %p1.2, %p2.2)
}

%body (t: (s32[], f32[1024])) -> (s32[], f32[1024]) {
  %t = (s32[], f32[1024]{0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %k = (f32[1024]{0}, s8[9999]{0}) custom-call(%i), custom_call_target="gemm"
  %x = f32[1024]{0} get-tuple-element(%k), index=0
  %f1 = f32[] fusion(%x), kind=kInput, calls=%whole
  %f2 = f32[256]{0} fusion(%x, %i), kind=kLoop, calls=%part
  %f3 = f32[1024]{0} fusion(%x, %f2, %i), kind=kLoop, calls=%update
  ROOT %out = (s32[], f32[1024]{0}) tuple(%i, %f3)
}

ENTRY %main (a: (s32[], f32[1024])) -> (s32[], f32[1024]) {
  %a = (s32[], f32[1024]{0}) parameter(0)
  ROOT %w = (s32[], f32[1024]{0}) while(%a), body=%body, condition=%less, """
PROGRAM += 'backend_config={"known_trip_count":{"n":"5"}}\n}\n'


def test_loops_slices_and_updates_in_place():
    read, written = traffic_of(PROGRAM, 4096)
    # The kernel writes all, the last fusion a quarter; the slice itself is too small to count.
    assert written == 5 * (4096 + 1024)
    assert read == 5 * (4096 + 1024)
    assert traffic_of(PROGRAM, 8192) == (0, 0)
