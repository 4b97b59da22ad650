"""Convolutions as matrix products, and their gradients by hand, against XLA's convolution."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from densejax.models import convolution, counts, in_place
from densejax.models.convolution import (
    PLANS,
    Convolution,
    arrange_kernel,
    conv3x3,
    conv3x3_backward,
    per_platform,
    pointwise,
    pointwise_backward,
    restore_kernel,
    tracing_for,
)


def draws(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def pulled(functions, x, kernel):
    """The result of each function, and the gradients of what it was given."""
    pulls = [jax.vjp(function, x, kernel) for function in functions]
    dy = draws(*pulls[-1][0].shape, seed=2)
    return [(y, pull(dy)) for y, pull in pulls]


def xla(x, params):
    """XLA's convolution, in x's precision, zeros around."""
    kernel = params["kernel"].astype(x.dtype)
    numbers = ("NHWC", "HWIO", "NHWC")
    margins = [(size // 2, size // 2) for size in kernel.shape[:2]]
    y = lax.conv_general_dilated(x, kernel, (1, 1), margins, dimension_numbers=numbers)
    return y + params["bias"].astype(x.dtype) if "bias" in params else y


def by(platform):
    """A 3x3 convolution and its gradients by the plan of a platform."""
    plan = PLANS[platform]

    def backward(x, dy, params):
        dx, gradient = conv3x3_backward(x, dy, arrange_kernel(params, plan))
        return dx, restore_kernel(gradient, plan)

    return lambda x, params: conv3x3(x, arrange_kernel(params, plan)), backward


FORMS = pytest.mark.parametrize(
    "size, forward, backward",
    [((1, 1), pointwise, pointwise_backward), ((3, 3), *by("cpu")), ((3, 3), *by("default"))],
    ids=["1x1", "3x3_products", "3x3_convolution"],
)


@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
@FORMS
def test_forward_and_backward_are_xlas(size, forward, backward, bias):
    with jax.enable_x64(True):
        x, params = draws(2, 5, 4, 6), {"kernel": draws(*size, 6, 3, seed=1)}
        params |= {"bias": draws(3, seed=2)} if bias else {}

        @jax.jit
        def both(x, params, dy):
            expected, pull = jax.vjp(xla, x, params)
            ours = forward(x, params), backward(x, dy, params), jax.vjp(forward, x, params)[1](dy)
            return ours, (expected, pull(dy), pull(dy))

        ours, theirs = both(x, params, draws(2, 5, 4, 3, seed=3))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-12, 1e-12), ours, theirs)


@FORMS
def test_bfloat16_has_parameter_gradients_in_float32(size, forward, backward):
    params = {"kernel": draws(*size, 6, 3, seed=1), "bias": draws(3, seed=2)}
    params = {name: leaf.astype(np.float32) for name, leaf in params.items()}
    x, dy = (jnp.asarray(draws(8, 5, 4, c, seed=c), jnp.bfloat16) for c in (6, 3))

    @jax.jit
    def both(x, params, dy):
        ours = forward(x, params), backward(x, dy, params)
        y, pull = jax.vjp(xla, x.astype(jnp.float32), params)
        return ours, (y, pull(dy.astype(jnp.float32)))

    (y, (dx, gradients)), theirs = both(x, params, dy)
    assert y.dtype == dx.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype("float32")}
    for ours, exact in zip(*map(jax.tree.leaves, ((y, dx, gradients), theirs)), strict=True):
        assert np.abs(np.asarray(ours, np.float32) - exact).max() < 0.02 * np.abs(exact).max()


SHAPES = [  # size and stride of the kernel, size and channels of the images
    (3, 1, (5, 4), 3),
    (3, 2, (6, 5), 3),
    (7, 2, (12, 9), 3),
    (7, 2, (9, 8), 1),
    (5, 3, (7, 11), 2),
    (3, 1, (5, 4), 1),  # narrower than the gradient of the output
    (3, 2, (7, 6), 8),
    (2, 2, (8, 6), 5),  # patches
]


@pytest.mark.parametrize(
    "platform, piece_bytes, size, stride, shape, channels",
    [
        *(("cpu", 1, *case) for case in SHAPES),  # image by image
        ("cpu", 8000, *SHAPES[1]),  # two images, of 3072 bytes each
        ("cpu", float("inf"), *SHAPES[1]),
        ("cuda", float("inf"), *SHAPES[1]),  # XLA's convolution itself
    ],
)
def test_convolutions_have_xlas_gradients(
    monkeypatch, platform, piece_bytes, size, stride, shape, channels
):
    plan = convolution.Plan(piece_bytes, products=True)
    monkeypatch.setitem(PLANS, "cpu", plan)
    module = Convolution(6, (size, size), stride, False, jnp.float64, jax.nn.initializers.ones)
    with jax.enable_x64(True), tracing_for(platform):
        x, kernel = draws(4, *shape, channels), draws(size, size, channels, 6, seed=1)

        def theirs(x, kernel):
            margins, numbers = [(size // 2 * (size % 2),) * 2] * 2, ("NHWC", "HWIO", "NHWC")
            strides = (stride, stride)
            return lax.conv_general_dilated(x, kernel, strides, margins, dimension_numbers=numbers)

        def ours(x, kernel):
            return module.apply({"params": {"kernel": kernel}}, x)

        both = functools.partial(pulled, (ours, theirs))
        first, second = jax.jit(both)(x, kernel)
        program = str(jax.make_jaxpr(both)(x, kernel))
    assert ("dot_general" in program) == (platform == "cpu")
    assert bool(re.search(r"length=2\b", program)) == (piece_bytes == 8000)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-11, 1e-11), first, second)


@pytest.mark.parametrize("shape", [(5, 6), (16, 17)])
def test_1x1_convolutions_with_a_stride_are_xlas(shape):
    module = Convolution(6, (1, 1), 2, False, jnp.float64, jax.nn.initializers.ones)

    def ours(x, kernel):
        return module.apply({"params": {"kernel": kernel}}, x)

    def theirs(x, kernel):
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x, kernel, (2, 2), "VALID", dimension_numbers=numbers)

    with jax.enable_x64(True):
        x, kernel = draws(4, *shape, 5), draws(1, 1, 5, 6, seed=1)
        first, second = jax.jit(functools.partial(pulled, (ours, theirs)))(x, kernel)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-11, 1e-11), first, second)


@pytest.mark.parametrize("cores, images", [(1, 2), (4, 2), (5, 4)])
def test_pieces_are_smaller_where_each_device_is_a_core(monkeypatch, cores, images):
    monkeypatch.setattr(convolution, "cores", lambda: cores)  # the tests have four devices
    features, core_bytes = np.zeros((8, 1, 1, 1), np.float32), PLANS["cpu"].core_bytes
    assert in_place._piece_size(convolution.Plan(16, core_bytes=8), features) == images
    assert in_place._piece_size(convolution.Plan(16), features) == 4
    assert (PLANS["cpu"].most_bytes() == core_bytes < PLANS["cpu"].piece_bytes) == (images == 2)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert convolution.Plan(16, core_bytes=8).most_bytes() == 16


@pytest.mark.parametrize("text, size", [("512K\n", 2**19), ("2048K", 2**21), ("", 2**21)])
def test_caches_of_all_cores(monkeypatch, tmp_path, text, size):
    file = tmp_path / "size"
    monkeypatch.setattr(convolution, "CACHE_SIZE", file)
    assert convolution.cache_bytes() == convolution.cores() * 2**21  # there is no file
    file.write_text(text)
    assert convolution.cache_bytes() == convolution.cores() * size


@pytest.mark.parametrize(
    "platform, size, stride, shape",
    [
        ("cpu", 3, 1, (5, 4)),
        ("cpu", 3, 2, (6, 5)),
        ("cpu", 7, 1, (4, 5)),
        ("cpu", 2, 2, (5, 4)),
        ("cuda", 3, 2, (6, 5)),
    ],
)
def test_depthwise_convolutions_are_xlas(monkeypatch, platform, size, stride, shape):
    monkeypatch.setattr(convolution, "ROWS_AT_ONCE", 2)
    module = Convolution(6, (size,) * 2, stride, False, jnp.float64, jax.nn.initializers.ones, 6)
    padding = [(size // 2, size // 2) if size % 2 else (0, 0)] * 2
    settings = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "feature_group_count": 6}
    with jax.enable_x64(True), tracing_for(platform):
        x, kernel = draws(3, *shape, 6), draws(size, size, 1, 6, seed=1)

        def theirs(x, kernel):
            return lax.conv_general_dilated(x, kernel, (stride,) * 2, padding, **settings)

        def ours(x, kernel):
            return module.apply({"params": {"kernel": kernel}}, x)

        both = functools.partial(pulled, (ours, theirs))
        first, second = jax.jit(both)(x, kernel)
        program = str(jax.make_jaxpr(ours)(x, kernel))
    assert program.count("conv_general_dilated") == (platform != "cpu")
    assert program.count("scan[") == (platform == "cpu")  # over the images
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-12, 1e-12), first, second)


def test_a_bfloat16_depthwise_convolution_is_summed_in_float32():
    x, kernel = (np.abs(draws(*shape)) for shape in ((512, 6, 6, 2), (5, 5, 1, 2)))
    module = Convolution(2, (5, 5), 1, False, jnp.bfloat16, jax.nn.initializers.ones, groups=2)

    def gradient(kernel):
        y = module.apply({"params": {"kernel": kernel}}, x.astype(np.float32))
        return y.astype(jnp.float32).sum(), y

    with tracing_for("cpu"):
        found, y = jax.jit(jax.grad(gradient, has_aux=True))(kernel.astype(np.float32))
    padded = np.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)))
    shifted = np.array([[padded[:, i : i + 6, j : j + 6] for j in range(5)] for i in range(5)])
    np.testing.assert_allclose(found[:, :, 0], shifted.sum((2, 3, 4)), 0.01)
    assert y.dtype == jnp.bfloat16
    exact = np.einsum("ijbhwc,ijc->bhwc", shifted, kernel[:, :, 0])
    np.testing.assert_allclose(y.astype(np.float32), exact, 0.02)


def test_groups_read_their_own_channels_and_take_no_other_multiply_adds():
    x, kernel = (draws(*shape).astype(np.float32) for shape in ((2, 4, 4, 6), (3, 3, 2, 9)))
    module = Convolution(9, (3, 3), 1, True, jnp.float32, jax.nn.initializers.ones, groups=3)
    y = module.apply({"params": {"kernel": kernel, "bias": np.ones(9, np.float32)}}, x)
    for group in range(3):
        outputs = slice(3 * group, 3 * group + 3)
        expected = xla(x[..., 2 * group : 2 * group + 2], {"kernel": kernel[..., outputs]}) + 1
        np.testing.assert_allclose(y[..., outputs], expected, 1e-4, 1e-5)
    depthwise = Convolution(6, (7, 7), 2, True, jnp.float32, jax.nn.initializers.ones, groups=6)
    for either, expected in ((module, 9 * 16 * 9 * 2), (depthwise, 6 * 4 * 49)):
        init = functools.partial(either.init_with_output, jax.random.key(0))
        jax.eval_shape(init, x)  # a trace for all platforms, which must not be taken again
        assert counts.multiply_adds(init, x[:1]) == expected


def test_the_gradient_of_a_bfloat16_kernel_is_summed_in_float32(monkeypatch):
    monkeypatch.setitem(PLANS, "cpu", convolution.Plan(1, products=True))
    # All positive, so that rounding errors of a long sum in bfloat16 do not cancel.
    x, kernel = (np.abs(draws(*shape)) for shape in ((512, 6, 6, 3), (3, 3, 3, 2)))
    module = Convolution(2, (3, 3), 1, False, jnp.bfloat16, jax.nn.initializers.ones)

    def gradient(kernel):
        y = module.apply({"params": {"kernel": kernel}}, x.astype(np.float32))
        return y.astype(jnp.float32).sum()

    with tracing_for("cpu"):
        found = jax.jit(jax.grad(gradient))(kernel.astype(np.float32))
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    exact = [[padded[:, i : i + 6, j : j + 6].sum((0, 1, 2)) for j in range(3)] for i in range(3)]
    np.testing.assert_allclose(
        found, np.broadcast_to(np.array(exact)[..., None], found.shape), 0.01
    )


def test_a_pointwise_module_is_flaxs_convolution():
    x = draws(2, 3, 4, 5).astype(np.float32)
    ones = jax.nn.initializers.ones
    module = Convolution(3, (1, 1), 1, use_bias=True, dtype=jnp.bfloat16, kernel_init=ones)
    y, variables = module.init_with_output(jax.random.key(0), x)
    shapes = {"kernel": (1, 1, 5, 3), "bias": (3,)}
    assert {name: leaf.shape for name, leaf in variables["params"].items()} == shapes
    assert {leaf.dtype for leaf in variables["params"].values()} == {jnp.dtype("float32")}
    assert y.dtype == jnp.bfloat16
    expected = np.broadcast_to(x.sum(-1, keepdims=True), y.shape)
    np.testing.assert_allclose(np.asarray(y, np.float32), expected, atol=0.1)


@pytest.mark.parametrize(
    "platform, plan", [("cpu", "cpu"), ("tpu", "tpu"), ("cuda", "cuda"), ("rocm", "default")]
)
def test_a_platforms_plan_is_the_one_that_is_compiled(platform, plan):
    marks = {
        PLANS["cpu"]: 111.0,
        PLANS["tpu"]: 333.0,
        PLANS["cuda"]: 444.0,
        PLANS["default"]: 222.0,
    }  # equal plans would be one
    step = jax.jit(lambda x: per_platform(lambda plan, x: x + marks[plan], x))
    lowered = step.trace(jnp.float32(0)).lower(lowering_platforms=(platform,))
    found = [name for name in PLANS if f"{marks[PLANS[name]]:e}" in lowered.as_text()]
    assert found == [plan]


def test_training_on_a_gpu_is_by_its_plan():
    """JAX calls the devices of platform "cuda" "gpu"."""
    with tracing_for("gpu"):
        assert per_platform(lambda plan: plan) == PLANS["cuda"]
