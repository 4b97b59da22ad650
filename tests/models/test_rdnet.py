"""A layer of RDNet against NumPy, and drop path."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from densejax import models
from densejax.models import layers, rdnet
from tests.models import oracle

BOUND = layers.Layers(train=False, convolution_bias=True)
erf = np.vectorize(math.erf)


def layer_norm(x, variables, epsilon=1e-6):
    centred, params = x - x.mean(-1, keepdims=True), variables["params"]
    deviation = np.sqrt(np.square(centred).mean(-1, keepdims=True) + epsilon)
    return centred / deviation * params["scale"] + params["bias"]


@pytest.mark.parametrize("squeeze_excite", [False, True])
def test_layer_equals_numpy(squeeze_excite):
    x = 5 + np.random.default_rng(0).normal(size=(2, 5, 6, 5)).astype(np.float32)
    module = rdnet.Layer(3, 7, 4.0, squeeze_excite, 1e-6, 0.5, BOUND)
    variables = oracle.random_variables(module, x)

    def biased(y, name):
        return y + variables["params"][name]["bias"]

    y = biased(oracle.depthwise(x, oracle.child(variables, "depthwise")), "depthwise")
    y = layer_norm(y, oracle.child(variables, "norm"))
    y = biased(oracle.conv(y, oracle.child(variables, "expand")), "expand")
    assert y.shape[-1] == 16  # 4 times 5, down to a multiple of 8
    y = y * (1 + erf(y / math.sqrt(2))) / 2
    y = biased(oracle.conv(y, oracle.child(variables, "reduce")), "reduce")
    if squeeze_excite:
        y = oracle.squeeze_excite(y, oracle.child(variables, "squeeze_excite"))
    expected = y * variables["params"]["layer_scale"]
    np.testing.assert_allclose(jax.jit(module.apply)(variables, x), expected, rtol=1e-4, atol=1e-5)


def test_head_and_patches_equal_numpy():
    x = 5 + np.random.default_rng(0).normal(size=(2, 4, 7, 5)).astype(np.float32)
    head = layers.Head(3, norm_epsilon=0.5)
    variables = oracle.random_variables(head, x)
    y = layer_norm(x.mean((1, 2)), oracle.child(variables, "norm"), 0.5)
    classifier = variables["params"]["classifier"]
    expected = y @ classifier["kernel"] + classifier["bias"]
    np.testing.assert_allclose(head.apply(variables, x)[0], expected, rtol=1e-4)

    patches = rdnet.Patches(8, 2, True, BOUND)
    variables = oracle.random_variables(patches, x)
    y = layer_norm(x[:, :, :6].astype(float), oracle.child(variables, "norm"))
    y = y.reshape(2, 2, 2, 3, 2, 5)  # the last column is in no patch
    conv = variables["params"]["conv"]
    expected = np.einsum("bhiwjc,ijcn->bhwn", y, conv["kernel"]) + conv["bias"]
    np.testing.assert_allclose(patches.apply(variables, x), expected, rtol=1e-4, atol=1e-5)


def test_rates_of_drop_path_rise_linearly_from_0(monkeypatch):
    rates = []
    init = rdnet.Layer.__call__

    def record(layer, x):
        rates.append(layer.drop_path)
        return init(layer, x)

    monkeypatch.setattr(rdnet.Layer, "__call__", record)
    fields = {"growth_rates": (8, 8, 8), "downsampling": (2,), "kernel_size": 3, "drop_path": 0.2}
    network = models.create(models.fields("rdnet_tiny", **fields), 10)
    image = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
    jax.eval_shape(network.init, jax.random.key(0), image)
    np.testing.assert_allclose(rates, np.linspace(0, 0.2, 9))


def test_drop_path_keeps_the_expectation_and_drops_by_the_examples_key_alone():
    class Network(rdnet.nn.Module):
        @rdnet.nn.compact
        def __call__(self, x, keys):
            return layers.Layers(train=True, keys=keys).drop_path(x, 0.3, name="drop_path")

    keys = jax.random.key_data(jax.random.split(jax.random.key(0), 4000))
    y = np.asarray(Network().apply({}, jnp.ones((4000, 2, 2, 1)), keys))
    assert (y == y[:, :1, :1]).all() and set(np.unique(y)) == {0.0, np.float32(1 / 0.7)}
    assert abs(y.mean() - 1) < 4 * math.sqrt(0.3 / 0.7 / 4000)
    part = Network().apply({}, jnp.ones((1000, 2, 2, 1)), keys[1000:2000])
    np.testing.assert_array_equal(part, y[1000:2000])

    module = rdnet.Layer(3, 3, 4.0, False, 1.0, 0.3, BOUND)
    x = jnp.ones((1, 2, 2, 8))
    variables = oracle.random_variables(module, x)
    never = module.clone(drop_path=0.0)
    np.testing.assert_array_equal(module.apply(variables, x), never.apply(variables, x))
