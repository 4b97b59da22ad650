"""Residual and plain blocks against NumPy, shortcuts, and stochastic depth."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from jax.sharding import PartitionSpec as P

from densejax import models
from densejax.config import UserError
from densejax.models import layers
from densejax.models.regularization import StochasticDepth
from densejax.models.resnet import Block, ResNet
from densejax.training import parallel
from tests.models import oracle

BASIC = ((6, 3, 2), (6, 3, 1))
BOTTLENECK = ((3, 1, 1), (3, 3, 2), (12, 1, 1))
ORIGINAL = ((3, 1, 2), (3, 3, 1), (12, 1, 1))


def bind(train=False, keys=None):
    return layers.Layers(train=train, keys=keys)


def block(convolutions, **fields):
    rest = {"preactivation": False, "shortcut": "projection", "zero_init": False}
    return Block(convolutions, 1.0, layers=bind(), **rest | fields)


def forward(x, variables, convolutions, *, preactivation=False, shortcut="projection"):
    """A block of the papers, He et al. 2016a figure 5 and 2016b figure 4(e), in eval mode."""

    def conv(x, name, stride):
        return oracle.conv(x, oracle.child(variables, name), stride)

    def norm(x, name):
        return oracle.norm(x, oracle.child(variables, name))

    stride = np.prod([step for *_, step in convolutions])
    y = x
    for index, (_, _, step) in enumerate(convolutions, 1):
        if preactivation:
            y = oracle.relu(norm(y, f"norm{index}"))
            if index == 1 and "projection" in variables["params"]:
                x = y
            y = conv(y, f"conv{index}", step)
        else:
            y = norm(conv(y, f"conv{index}", step), f"norm{index}")
            y = oracle.relu(y) if index < len(convolutions) else y
    if shortcut and "projection" in variables["params"]:
        x = conv(x, "projection", stride)
        y = y + (x if preactivation else norm(x, "projection_norm"))
    elif shortcut:
        y[..., : x.shape[-1]] += x[:, ::stride, ::stride]
    return y if preactivation else oracle.relu(y)


@pytest.mark.parametrize(
    "convolutions, channels, fields",
    [
        (BASIC, 4, {}),
        (BASIC, 4, {"shortcut": "identity"}),
        (BASIC, 4, {"shortcut": None}),
        (((6, 3, 1), (6, 3, 1)), 6, {}),
        (BOTTLENECK, 5, {}),
        (ORIGINAL, 5, {}),
        (BOTTLENECK, 5, {"shortcut": "identity"}),
        (ORIGINAL, 5, {"preactivation": True}),
        (ORIGINAL, 5, {"preactivation": True, "shortcut": "identity"}),
        (((3, 1, 1), (3, 3, 1), (12, 1, 1)), 12, {"preactivation": True}),
    ],
)
def test_block_equals_numpy(convolutions, channels, fields):
    x = np.random.default_rng(1).normal(size=(2, 7, 8, channels)).astype(np.float32)
    module = block(convolutions, **fields)
    variables = oracle.random_variables(module, x)
    found = jax.jit(module.apply)(variables, x)
    expected = forward(x.astype(float), variables, convolutions, **fields)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_zero_init_starts_as_the_shortcut():
    x = np.random.default_rng(0).normal(size=(2, 6, 6, 4)).astype(np.float32)
    module = block(BASIC, zero_init=True, shortcut="identity")
    y, variables = jax.jit(module.init_with_output)(jax.random.key(0), x)
    expected = np.concatenate([np.maximum(x[:, ::2, ::2], 0), np.zeros((2, 3, 3, 2))], axis=-1)
    np.testing.assert_array_equal(y, expected)
    params = variables["params"]
    scales = {name: set(np.unique(params[name]["scale"])) for name in ("norm1", "norm2")}
    assert scales == {"norm1": {1.0}, "norm2": {0.0}}


def test_names_have_the_depth_they_are_called_after():
    for name, fields in models.MODELS.items():
        if fields["family"] == "resnet":
            network = models.create(models.fields(name), 10)
            per_block = 3 if network.block == "bottleneck" else 2
            depth = int("".join(filter(str.isdigit, name)))
            assert per_block * sum(network.blocks) + 2 == depth, name


def test_plain_networks_are_residual_ones_without_shortcuts():
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    plain, residual = (
        jax.eval_shape(models.create(models.fields(name), 10).init, jax.random.key(0), image)
        for name in ("plain20_cifar", "resnet20_cifar")
    )
    assert plain == residual


def test_convolution_bias_reaches_every_convolution():
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    model = models.create(models.fields("resnet50", convolution_bias=True), 1000)
    params = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
    biased = {
        path[:-1]: leaf.shape
        for path, leaf in traverse_util.flatten_dict(params).items()
        if path[-1] == "bias" and "norm" not in path[-2]
    }
    assert len(biased) == 54 and ("stage2_block1", "projection") in biased
    # Keras Applications' ResNet50 has 25,583,592 trainable parameters, torchvision's 25,557,032.
    assert sum(shape[0] for shape in biased.values()) - 1000 == 25_583_592 - 25_557_032


def test_a_bias_is_added():
    x = np.random.default_rng(0).normal(size=(1, 6, 6, 3)).astype(np.float32)
    plain, biased = (
        ResNet(0, blocks=(1,), widths=(4,), preactivation=True, convolution_bias=bias)
        for bias in (False, True)
    )
    variables = oracle.random_variables(biased, x)
    shift = variables["params"]["stem"]["conv"]["bias"]
    stem, moved = (model.apply(variables, x)[1]["stem"] for model in (plain, biased))
    np.testing.assert_allclose(moved, stem + shift, rtol=1e-5)


# Stochastic depth.


def random_keys(number, seed=0):
    generator = np.random.default_rng(seed)
    return generator.integers(2**32, size=(number, 2), dtype=np.uint32)


def test_survival_falls_linearly_with_depth():
    found = {}

    def record(next_function, arguments, keywords, context):
        if isinstance(context.module, StochasticDepth):
            found["/".join(context.module.path)] = context.module.probability
        return next_function(*arguments, **keywords)

    network = ResNet(10, blocks=(2, 2), widths=(4, 8), survival=0.5)
    image = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
    with nn.intercept_methods(record):
        jax.eval_shape(network.init, jax.random.key(0), image)
    assert found == {
        "stage1_block1/survival": 0.875,
        "stage1_block2/survival": 0.75,
        "stage2_block1/survival": 0.625,
        "stage2_block2/survival": 0.5,
    }


def test_a_block_that_does_not_survive_is_its_shortcut():
    x = np.random.default_rng(0).normal(size=(64, 4, 4, 6)).astype(np.float32)
    bound = bind(True, random_keys(64))
    shape = ((6, 3, 1), (6, 3, 1))
    policy = {"preactivation": False, "shortcut": "identity", "zero_init": False}
    whole, dropping = (Block(shape, p, layers=bound, **policy) for p in (1.0, 0.5))
    variables = oracle.random_variables(whole, x)
    apply = {"mutable": ["batch_stats"]}
    kept = np.asarray(whole.apply(variables, x, **apply)[0])
    found = np.asarray(dropping.apply(variables, x, **apply)[0])
    shortcut = (found == np.maximum(x, 0)).all((1, 2, 3))
    branch = (found == kept).all((1, 2, 3))
    assert (shortcut ^ branch).all() and 16 < shortcut.sum() < 48


def test_survival_does_not_depend_on_the_layout_over_devices():
    generator = np.random.default_rng(0)
    image = generator.normal(size=(8, 8, 8, 3)).astype(np.float32)
    keys = random_keys(8)
    fields = {"blocks": (1, 2), "widths": (4, 8), "survival": 0.3}
    variables = oracle.random_variables(ResNet(10, **fields), image)

    def logits(axis):
        network = ResNet(10, batch_norm_axis=axis, **fields)
        return lambda v, x, k: network.apply(v, x, True, k, mutable=["batch_stats"])[0][0]

    alone = jax.jit(logits(None))(variables, image, keys)
    axis = parallel.AXIS
    spread = jax.jit(
        jax.shard_map(
            logits(axis),
            mesh=parallel.mesh(),
            in_specs=(P(), P(axis), P(axis)),
            out_specs=P(axis),
        )
    )(variables, image, keys)
    assert len(spread.sharding.device_set) == 4
    np.testing.assert_allclose(spread, alone, rtol=1e-4, atol=1e-4)
    other = jax.jit(logits(None))(variables, image, random_keys(8, seed=1))
    assert np.abs(other - alone).max() > 0.1


def test_a_mistyped_tuple_says_what_its_parts_are():
    section = dict(models.fields("resnet20_cifar")) | {"widths": (16.0, 32, 64)}
    with pytest.raises(UserError, match=r"model.widths = .*: give a value of type tuple\[int, "):
        models.create(section, 10)
