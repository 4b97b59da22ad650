"""Programs whose batch lies on four devices under plain `jit`: what they send, need and give."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from densejax.models import DenseBlock, convolution
from densejax.models.convolution import Convolution
from densejax.topology import hlo
from tests.models.oracle import random_variables
from tests.models.test_in_place import assert_close, compiled, draws, float64

WHOLE, DIVIDED = PartitionSpec(), PartitionSpec("data")


class Network(nn.Module):
    """Somebody else's network, with a dense block in it."""

    axis: str | None = None

    @nn.compact
    def __call__(self, images, keys, train=True):
        dtype = images.dtype
        x = nn.Conv(4, (3, 3), dtype=dtype)(images)
        block = DenseBlock(1, 4, dropout_rate=0.3, batch_norm_axis=self.axis, dtype=dtype)
        x = block(x, train, keys)
        norm = nn.BatchNorm(not train, axis_name=self.axis, dtype=dtype)
        return nn.relu(norm(x)).mean((1, 2))


def gradients(axis, variables, images, keys):
    """The loss, new statistics and gradients; of a device's share where there is an axis."""

    def loss(params, images):
        inputs = variables | {"params": params}
        y, updates = Network(axis).apply(inputs, images, keys, mutable=["batch_stats"])
        return (jnp.square(y) * jnp.arange(1.0, y.shape[-1] + 1)).sum(), updates

    function = jax.value_and_grad(loss, (0, 1), has_aux=True)
    (value, updates), (d_params, d_images) = function(variables["params"], images)
    value = lax.psum(value, axis) if axis else value
    return {"loss": value, "params": d_params, "images": d_images} | updates


def placed(function, kind, whole, *divided, devices=4):
    """The program of a function and its result, with arguments on a mesh of devices."""
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(kind,))
    whole = jax.device_put(whole, NamedSharding(mesh, WHOLE))
    divided = jax.device_put(divided, NamedSharding(mesh, DIVIDED))
    program = compiled(function).lower(whole, *divided).compile()
    return program, program(whole, *divided)


def sent(program):
    """Bytes that a program sends, by the kind of collective."""
    counts = hlo.read(program.as_text())
    return {kind: counts[kind] for kind in hlo.COLLECTIVES if counts[kind]}


@pytest.fixture
def double():
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def example():
    """Variables, images and keys, and what one device makes of them; double precision."""
    images, keys = draws(16, 8, 8, 3), np.random.default_rng(1).integers(0, 2**32, (16, 2))
    keys = keys.astype(np.uint32)
    variables = random_variables(Network(), images.astype(np.float32), keys)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        inputs = float64(variables), images, keys
        return inputs, jax.device_get(compiled(functools.partial(gradients, None))(*inputs))


def test_a_block_sends_and_needs_what_it_does_under_shard_map(double, example):
    mapped = jax.shard_map(
        functools.partial(gradients, "data"),
        mesh=jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,)),
        in_specs=(WHOLE, DIVIDED, DIVIDED),
        out_specs={"loss": WHOLE, "params": WHOLE, "images": DIVIDED, "batch_stats": WHOLE},
    )
    inputs, expected = example
    memory = []
    for function in functools.partial(gradients, None), mapped:
        program, result = placed(function, AxisType.Auto, *inputs)
        assert_close(result, expected, 1e-10)
        assert sent(program).keys() == {"all-reduce"}
        memory.append(program.memory_analysis().temp_size_in_bytes)
    assert memory[0] < 1.05 * memory[1]


@pytest.mark.slow
def test_axes_may_be_explicit(double, example):
    inputs, expected = example
    program, result = placed(functools.partial(gradients, None), AxisType.Explicit, *inputs)
    assert_close(result, expected, 1e-10)
    assert sent(program).keys() == {"all-reduce"}


def test_a_block_with_running_statistics_sends_nothing(double, example):
    def features(variables, images):
        return Network().apply(variables, images, None, train=False)

    (variables, images, _), _ = example
    program, result = placed(features, AxisType.Auto, variables, images)
    assert not sent(program)
    np.testing.assert_allclose(result, compiled(features)(variables, images), 1e-10)


@pytest.mark.parametrize("devices, batch", [(1, 3), (4, 8)])
def test_depthwise_convolutions_with_explicit_axes(devices, batch):
    module = Convolution(2, (3, 3), 1, False, jnp.float32, nn.initializers.ones, 2)
    images = draws(batch, 4, 4, 2).astype(np.float32)
    variables = {"params": {"kernel": draws(3, 3, 1, 2).astype(np.float32)}}

    @jax.grad
    def gradient(variables, images):
        return jnp.square(module.apply(variables, images)).sum()

    _, result = placed(gradient, AxisType.Explicit, variables, images, devices=devices)
    assert_close(result, compiled(gradient)(variables, images), 1e-5)


@pytest.mark.parametrize("channels, groups", [(3, 1), (8, 8)], ids=["narrow", "depthwise"])
def test_the_gradient_of_a_kernel_is_sent_once(monkeypatch, channels, groups):
    plan = convolution.Plan(piece_bytes=1, products=True)  # it is summed image by image
    monkeypatch.setitem(convolution.PLANS, "cpu", plan)
    module = Convolution(8, (3, 3), 1, False, jnp.float32, nn.initializers.ones, groups)
    images = draws(8, 6, 6, channels).astype(np.float32)
    variables = random_variables(module, images)

    @jax.grad
    def gradient(variables, images):
        return (jnp.square(module.apply(variables, images)) * jnp.arange(8.0)).sum()

    program, result = placed(gradient, AxisType.Auto, variables, images)
    kernel = variables["params"]["kernel"]
    assert sent(program) == {"all-reduce": kernel.nbytes}
    assert_close(result, compiled(gradient)(variables, images), 1e-5)
