"""Counts of compiled programs whose arithmetic, traffic and loops are known."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from densejax.topology import hlo
from densejax.training import parallel


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def counts(function, *arguments):
    return hlo.read(jax.jit(function).lower(*arguments).compile().as_text())


def convolve(x, kernel, stride=1):
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), "SAME", dimension_numbers=numbers
    )


def test_a_product():
    found = counts(jnp.matmul, shape(256, 128), shape(128, 64))
    assert found["flops"] == 2 * 256 * 128 * 64
    assert found["bytes"] == 4 * (256 * 128 + 128 * 64 + 256 * 64)
    assert (found["kernels"], found["convolutions"], found["unknown_loops"]) == (1, 0, 0)


def test_bytes_follow_the_type():
    def add(x):
        return x + jnp.ones_like(x)

    sizes = {jnp.float32: 4, jnp.bfloat16: 2, jnp.uint8: 1}
    for dtype, size in sizes.items():
        assert counts(add, shape(1024, 1024, dtype=dtype))["bytes"] == 2 * size * 2**20


def test_a_convolution():
    found = counts(convolve, shape(2, 16, 16, 8), shape(3, 3, 8, 32))
    assert found["flops"] == 2 * 2 * 16 * 16 * 32 * 9 * 8
    assert found["bytes"] == 4 * (2 * 16 * 16 * 8 + 9 * 8 * 32 + 2 * 16 * 16 * 32)
    assert found["convolutions"] == 1


@pytest.mark.parametrize("stride", [1, 2])
def test_the_three_convolutions_of_a_training_step_are_equal_work(stride):
    def step(x, kernel):
        return jax.grad(lambda x, k: (convolve(x, k, stride) ** 2).sum(), (0, 1))(x, kernel)

    found = counts(step, shape(2, 16, 16, 8), shape(3, 3, 8, 32))
    assert found["convolutions"] == 3
    assert found["flops"] == 3 * 2 * 2 * (16 // stride) ** 2 * 32 * 9 * 8


def test_a_loop_counts_each_of_its_turns():
    def turns(length):
        def loop(x, w):
            return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length)[0]

        return counts(loop, shape(256, 128), shape(128, 128))

    found, more = turns(10), turns(30)
    assert found["flops"] == 10 * 2 * 256 * 128 * 128
    assert found["unknown_loops"] == 0
    turn = 4 * (256 * 128 + 128 * 128 + 256 * 128)
    assert 20 * turn < more["bytes"] - found["bytes"] < 60 * turn


def test_a_loop_without_an_end_counts_once_and_is_told():
    def loop(x):
        return jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ x, x)

    found = counts(loop, shape(64, 64))
    assert (found["unknown_loops"], found["flops"]) == (1, 2 * 64**3)


LOOP = """
HloModule loop

%body.1 (a: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %a = (s32[], f32[8,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%a), index=0
  %x = f32[8,8]{1,0:T(8,128)S(1)} get-tuple-element(%a), index=1
  %y = f32[8,8]{1,0:T(8,128)} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %t = (s32[], f32[8,8]{1,0}) tuple(%i, %y)
}

%condition.1 (b: (s32[], f32[8,8])) -> pred[] {
  %b = (s32[], f32[8,8]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%b), index=0
  %limit = s32[] constant(12)
  ROOT %lt = pred[] compare(%j, %limit), direction=LT
}

ENTRY %main (p: f32[8,8]) -> f32[8,8] {
  %p = f32[8,8]{1,0} parameter(0)
  %zero = s32[] constant(5)
  %init = (s32[], f32[8,8]{1,0}) tuple(%zero, %p)
  %w = (s32[], f32[8,8]{1,0}) while(%init), condition=%condition.1, body=%body.1
  ROOT %r = f32[8,8]{1,0} get-tuple-element(%w), index=1
}
"""


def test_turns_are_read_from_the_condition_and_memories_are_kept_apart():
    """TPU programs say neither the number of turns, nor do they keep everything in main memory."""
    found = hlo.read(LOOP)
    assert found["flops"] == 7 * 2 * 8**3
    assert (found["bytes"], found["on_chip_bytes"]) == (7 * 256, 7 * 512)
    assert hlo.read(LOOP.replace("direction=LT", "direction=NE"))["unknown_loops"] == 1


def test_an_update_in_place_moves_what_it_updates():
    def loop(buffer):
        def turn(i, buffer):
            part = jax.lax.dynamic_slice(buffer, (0, 0), (1024, 8))
            return jax.lax.dynamic_update_slice(buffer, part * 2, (0, 8 * i + 8))

        return jax.lax.fori_loop(0, 7, turn, buffer)

    moved = counts(loop, shape(1024, 1024))["bytes"] - 2 * 4 * 2**20  # one copy: not donated
    assert 7 * 2 * 4 * 1024 * 8 <= moved < 4 * 2**20  # far less than seven times the buffer


FUSED = """
%fused (p0: f32[1024,64], p1: f32[8,64], p2: s32[]) -> f32[65536] {
  %p0 = f32[1024,64]{1,0} parameter(0)
  %p1 = f32[8,64]{1,0} parameter(1)
  %p2 = s32[] parameter(2)
  %flat = f32[64,1024]{1,0} bitcast(%p0)
  %part = f32[64,8]{1,0} slice(%flat), slice={[0:64], [8:16]}
  %piece = f32[8,64]{1,0} bitcast(%part)
  %sum = f32[8,64]{1,0} add(%piece, %p1)
  %whole = f32[1024,64]{1,0} dynamic-update-slice(%p0, %sum, %p2, %p2)
  ROOT %out = f32[65536]{0} bitcast(%whole)
}

ENTRY %main (x: f32[1024,64], y: f32[8,64], i: s32[]) -> f32[65536] {
  %x = f32[1024,64]{1,0} parameter(0)
  %y = f32[8,64]{1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %r = f32[65536]{0} fusion(%x, %y, %i), kind=kLoop, calls=%fused
}
"""


def test_a_fusion_reads_a_slice_and_updates_a_part():
    found = hlo.read(FUSED)
    assert found["bytes"] == 3 * 4 * 8 * 64 + 4  # slice, summand and update, and the place
    assert found["kernels"] == 1


def test_a_part_lies_where_its_array_lies():
    found = hlo.read(FUSED.replace("%x = f32[1024,64]{1,0}", "%x = f32[1024,64]{1,0:T(8,128)S(1)}"))
    assert (found["on_chip_bytes"], found["bytes"]) == (4 * 8 * 64, 2 * 4 * 8 * 64 + 4)


TPU = """
%inner (p0: bf16[8,8,64], p1: bf16[8,8,64]) -> bf16[8,8,16] {
  %p0 = bf16[8,8,64]{0,2,1} parameter(0)
  %p1 = bf16[8,8,64]{0,2,1} parameter(1)
  %some = bf16[8,8,16]{0,2,1} slice(%p1), slice={[0:8], [0:8], [0:16]}
  %more = bf16[8,8,16]{0,2,1} slice(%p0), slice={[0:8], [0:8], [16:32]}
  ROOT %sum = bf16[8,8,16]{0,2,1} add(%some, %more)
}

%outer (q0: bf16[8,8,64], q1: bf16[8,8,64]) -> (f32[16], f32[16]) {
  %q0 = bf16[8,8,64]{0,2,1} parameter(0)
  %q1 = bf16[8,8,64]{0,2,1} parameter(1)
  %z = bf16[8,8,16]{0,2,1} fusion(%q0, %q1), kind=kLoop, calls=%inner
  %whole = bf16[8,8,64]{0,2,1} negate(%q1)
  ROOT %sums = (f32[16]{0}, f32[16]{0}) reduce(%z, %whole), dimensions={0,1}, to_apply=%add
}

ENTRY %main (x: bf16[8,8,64], k: bf16[8,8,4,8]) -> (f32[16], f32[16]) {
  %x = bf16[8,8,64]{0,2,1} parameter(0)
  %y = bf16[2,4,1,1]{1,0,3,2} parameter(1)
  %k = bf16[8,8,4,8]{3,2,1,0} parameter(2)
  %start = ((bf16[8,8,64]{0,2,1}), bf16[2,8,64]{0,2,1:T(8,128)S(1)}, s32[]{:S(2)}) \
slice-start(%x), slice={[0:2], [0:8], [0:64]}
  %done = bf16[2,8,64]{0,2,1:T(8,128)S(1)} slice-done(%start)
  %wide = bf16[2,8,8,8]{0,3,2,1} convolution(%y, %k), \
window={size=8x8 pad=7_7x7_7 rhs_reversal=1x1}, dim_labels=bf01_01io->b01f
  ROOT %r = (f32[16]{0}, f32[16]{0}) fusion(%x, %x), kind=kLoop, calls=%outer
}
"""


def test_fusions_in_fusions_asynchronous_slices_and_a_tpus_way_to_widen_a_pixel():
    found, part, image = hlo.read(TPU), 2 * 8 * 8 * 16, 2 * 8 * 8 * 64
    product = 2 * (2 * 4 + 8 * 8 * 4 * 8 + 2 * 8 * 8 * 8)
    assert found["bytes"] == image / 4 + product + part + image + 2 * 4 * 16
    assert found["on_chip_bytes"] == image / 4
    assert found["flops"] == 2 * (2 * 8 * 8 * 8) * 4  # of 64 places of the kernel one is the pixel


CUDNN = """
ENTRY %main (x: f32[2,16,16,8], k: f32[32,3,3,8], dy: f32[2,8,8,32]) -> f32[2,16,16,8] {
  %x = f32[2,16,16,8]{3,2,1,0} parameter(0)
  %k = f32[32,3,3,8]{3,2,1,0} parameter(1)
  %dy = f32[2,8,8,32]{3,2,1,0} parameter(2)
  %y = (f32[2,8,8,32]{3,2,1,0}, u8[0]{0}) custom-call(%x, %k), window={size=3x3 stride=2x2}, \
dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convForward"
  %dk = (f32[32,3,3,8]{3,2,1,0}, u8[0]{0}) custom-call(%x, %dy), window={size=3x3 stride=2x2}, \
dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBackwardFilter"
  ROOT %dx = (f32[2,16,16,8]{3,2,1,0}, u8[0]{0}) custom-call(%dy, %k), window={size=3x3}, \
dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBackwardInput"
}
"""


def test_convolutions_of_a_gpu_are_custom_calls():
    found = hlo.read(CUDNN)
    assert (found["convolutions"], found["custom_calls"]) == (3, 3)
    assert found["flops"] == 3 * 2 * 2 * 8 * 8 * 32 * 9 * 8
    sizes = {"x": 2 * 16 * 16 * 8, "k": 32 * 9 * 8, "dy": 2 * 8 * 8 * 32}
    assert found["bytes"] == 3 * 4 * sum(sizes.values())


SWAPPED = """
ENTRY %main (k: bf16[48,24,1,1], x: bf16[128,32,32,24]) -> bf16[128,32,32,48] {
  %k = bf16[48,24,1,1]{1,0,3,2} parameter(0)
  %x = bf16[128,32,32,24]{3,0,2,1} parameter(1)
  ROOT %y = bf16[128,32,32,48]{3,0,2,1} convolution(%k, %x), window={size=32x32 \
pad=31_31x31_31 rhs_reversal=1x1}, dim_labels=bf01_o01i->f01b
}
"""


def test_a_convolution_whose_operands_are_swapped_is_the_same_work():
    found = hlo.read(SWAPPED)
    assert found["flops"] == 2 * 128 * 32 * 32 * 24 * 48
    small = SWAPPED.replace("size=32x32 pad=31_31x31_31", "size=3x3 pad=1_1x1_1")
    small = small.replace("[128,32,32,24]", "[128,3,3,24]")  # a kernel on one pixel, padded
    assert hlo.read(small)["flops"] == 9 * found["flops"]


@pytest.mark.parametrize(
    "kind, function, operand",
    [
        ("all-reduce", lambda x: jax.lax.psum(x, "data"), 4 * 64),
        ("all-gather", lambda x: jax.lax.all_gather(x, "data"), 4 * 64),
        ("reduce-scatter", lambda x: jax.lax.psum_scatter(x, "data", tiled=True), 4 * 64),
        ("all-to-all", lambda x: jax.lax.all_to_all(x, "data", 0, 0, tiled=True), 4 * 64),
        ("collective-permute", lambda x: jax.lax.ppermute(x, "data", [(0, 1), (1, 0)]), 4 * 64),
    ],
)
def test_collectives(kind, function, operand):
    mesh, spec = parallel.mesh(), PartitionSpec("data")
    assert mesh.size == 4
    out = {"all-reduce": PartitionSpec()}.get(kind, spec)
    mapped = jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=out)
    found = counts(mapped, shape(4 * 64))
    assert {name: found[name] for name in found if "-" in name} == {kind: operand}
    assert found["collectives"] == 1
