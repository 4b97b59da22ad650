"""One-shot aggregation against NumPy, and PyTorch's max-pooling in ceil mode."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from densejax import models
from densejax.models import counts, layers
from densejax.models.dense_block import DenseBlock
from densejax.models.vovnet import OneShotAggregation, ceil_max_pool
from tests.models import oracle

BOUND = layers.Layers(train=False)


@pytest.mark.parametrize("identity, output_width", [(False, 7), (True, 5)])
def test_module_equals_numpy(identity, output_width):
    x = np.random.default_rng(0).normal(size=(2, 5, 6, 5)).astype(np.float32)
    module = OneShotAggregation(3, 4, output_width, identity, BOUND)
    variables = oracle.random_variables(module, x)

    def layer(x, name):
        own = oracle.child(variables, name)
        y = oracle.conv(x, oracle.child(own, "conv"))
        return oracle.relu(oracle.norm(y, oracle.child(own, "norm")))

    first = layer(x.astype(float), "layer1")
    second = layer(first, "layer2")
    third = layer(second, "layer3")
    y = layer(np.concatenate([x, first, second, third], axis=-1), "aggregation")
    expected = y + x if identity else y
    np.testing.assert_allclose(jax.jit(module.apply)(variables, x), expected, rtol=1e-4, atol=1e-5)


def test_module_of_v2_equals_numpy():
    """Separable layers, of which the first reads a reduced input, and squeeze-excitation."""
    x = np.random.default_rng(0).normal(size=(2, 5, 6, 5)).astype(np.float32)
    module = OneShotAggregation(2, 4, 5, True, BOUND, separable=True, squeeze_excite=True)
    variables = oracle.random_variables(module, x)

    def layer(x, name, conv):
        own = oracle.child(variables, name)
        if "depthwise" in own["params"]:
            x = oracle.depthwise(x, oracle.child(own, "depthwise"))
        y = oracle.conv(x, oracle.child(own, conv))
        return oracle.relu(oracle.norm(y, oracle.child(own, "norm")))

    first = layer(layer(x.astype(float), "reduction", "conv"), "layer1", "pointwise")
    outputs = np.concatenate([x, first, layer(first, "layer2", "pointwise")], axis=-1)
    y = layer(outputs, "aggregation", "conv")
    expected = x + oracle.squeeze_excite(y, oracle.child(variables, "squeeze_excite"))
    np.testing.assert_allclose(jax.jit(module.apply)(variables, x), expected, rtol=1e-4, atol=1e-5)


def test_one_shot_block_of_densenet_equals_numpy():
    x = np.random.default_rng(0).normal(size=(2, 5, 6, 5)).astype(np.float32)
    module = DenseBlock(2, 4, bottleneck=False, connect="one_shot")
    variables = oracle.random_variables(module, x)

    def layer(x, name):
        own = oracle.child(variables, name)
        y = oracle.relu(oracle.norm(x, oracle.child(own, "norm1")))
        return oracle.conv(y, oracle.child(own, "conv1"))

    first = layer(x.astype(float), "layer1")
    expected = np.concatenate([x, first, layer(first, "layer2")], axis=-1)
    np.testing.assert_allclose(jax.jit(module.apply)(variables, x), expected, rtol=1e-4, atol=1e-5)


def test_a_single_pixel_stays():
    x = jnp.ones((1, 1, 1, 2))
    np.testing.assert_array_equal(ceil_max_pool(x), x)


def test_identity_adds_no_parameters_and_no_multiply_adds():
    found = []
    for identity in (True, False):
        fields = {"modules": (2, 1, 1, 1), "module_depth": 1, "identity": identity}
        network = models.create(models.fields("vovnet39", **fields), 10)
        found.append(counts.of_network(network, (64, 64, 3)))
    assert found[0] == found[1]


def test_identity_is_added_where_a_stage_repeats_its_module():
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    modules = []

    def record(next_function, arguments, keywords, context):
        if isinstance(context.module, OneShotAggregation):
            modules.append((context.module.name, context.module.identity))
        return next_function(*arguments, **keywords)

    with nn.intercept_methods(record):
        fields = models.fields("vovnet57", modules=(1, 1, 3, 2), module_depth=1)
        model = models.create(fields, 10)
        jax.eval_shape(model.init, jax.random.key(0), image)
    assert len(modules) == 7
    assert all(identity != name.endswith("module1") for name, identity in modules)
