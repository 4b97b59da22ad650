"""DenseNet against an independent NumPy forward pass, and the facts of its architecture."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from densejax import models
from densejax.config import UserError
from densejax.models import fields
from densejax.models.dense_block import IMPLEMENTATIONS, DenseBlock
from densejax.models.densenet import DenseNet
from densejax.models.regularization import Dropout
from tests.models import oracle

tiny = functools.partial(DenseNet, num_classes=10, growth_rate=4, blocks=(2, 2))


def abstract(model, image_shape):
    """Shapes and dtypes of (variables, (logits, features)); nothing is computed."""
    image = jax.ShapeDtypeStruct(image_shape, jnp.float32)
    result, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), image)
    return variables, result


# The oracle: the paper's section 3 written out in float64, PyTorch's padding, no JAX.


def forward(variables, image, train, depths, rates, bottleneck, stem):
    """Logits, and the running statistics after the pass, by path."""
    params = flatten_dict(jax.tree.map(np.float64, variables["params"]), sep="/")
    stats = flatten_dict(jax.tree.map(np.float64, variables["batch_stats"]), sep="/")
    after = dict(stats)

    def norm_relu(x, path):
        mean, variance = stats[f"{path}/mean"], stats[f"{path}/var"]
        if train:
            after[f"{path}/mean"] = 0.9 * mean + 0.1 * x.mean((0, 1, 2))
            after[f"{path}/var"] = 0.9 * variance + 0.1 * x.var((0, 1, 2))  # biased
            mean, variance = x.mean((0, 1, 2)), x.var((0, 1, 2))
        x = (x - mean) / np.sqrt(variance + 1e-5)
        return np.maximum(x * params[f"{path}/scale"] + params[f"{path}/bias"], 0)

    def conv(x, path, stride=1):
        kernel = {"params": {"kernel": params[f"{path}/kernel"]}}
        return oracle.conv(x, kernel, stride) + params.get(f"{path}/bias", 0)

    x = conv(np.float64(image), "stem/conv", 2 if stem == "imagenet" else 1)
    if stem == "imagenet":
        x = norm_relu(x, "stem/norm")
        x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
        x = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(1, 2))[:, ::2, ::2]
        x = x.max((-2, -1))
    for number, (depth, rate) in enumerate(zip(depths, rates, strict=True), 1):
        outputs = [x]  # of all layers so far
        for layer in range(1, depth + 1):
            path = f"block{number}/layer{layer}"
            y = norm_relu(np.concatenate(outputs, axis=-1), f"{path}/norm1")
            y = conv(y, f"{path}/conv1")
            if bottleneck:
                y = conv(norm_relu(y, f"{path}/norm2"), f"{path}/conv2")
            assert y.shape[-1] == rate
            outputs.append(y)
        x = np.concatenate(outputs, axis=-1)
        if number < len(depths):
            path = f"transition{number}"
            x = conv(norm_relu(x, f"{path}/norm"), f"{path}/conv")
            x = (x[:, ::2, ::2] + x[:, 1::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, 1::2]) / 4
    pooled = norm_relu(x, "norm").mean((1, 2))
    return pooled @ params["head/classifier/kernel"] + params["head/classifier/bias"], after


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
    "bottleneck, stem, bias",
    [(False, "cifar", False), (True, "cifar", False), (True, "imagenet", True)],
)
def test_forward_equals_numpy(bottleneck, stem, bias, train):
    rates = (4, 3)
    model = tiny(
        growth_rate=rates,
        bottleneck=bottleneck,
        compression=0.5 if bottleneck else 1.0,
        stem=stem,
        convolution_bias=bias,
    )
    size = 8 if stem == "cifar" else 16
    image = np.random.default_rng(7).normal(size=(4, size, size, 3)).astype(np.float32)
    variables = oracle.random_variables(model, image)
    expected, stats = forward(variables, image, train, (2, 2), rates, bottleneck, stem)

    @jax.jit
    def apply(variables, image):
        return model.apply(variables, image, train=train, mutable=["batch_stats"])

    (logits, _), updated = apply(variables, image)
    assert logits.std() > 0.1
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
    updated = flatten_dict(updated["batch_stats"], sep="/")
    assert updated.keys() == stats.keys()
    for path, value in stats.items():
        np.testing.assert_allclose(updated[path], value, rtol=1e-5, atol=1e-5, err_msg=path)


def test_parameter_paths_are_the_public_format():
    variables, _ = abstract(tiny(blocks=(1, 2)), (1, 8, 8, 3))
    norms = ["block1/layer1/norm1", "block1/layer1/norm2", "block2/layer1/norm1"]
    norms += ["block2/layer1/norm2", "block2/layer2/norm1", "block2/layer2/norm2"]
    norms += ["transition1/norm", "norm"]
    convs = ["stem/conv", "transition1/conv", "block1/layer1/conv1", "block1/layer1/conv2"]
    convs += ["block2/layer1/conv1", "block2/layer1/conv2"]
    convs += ["block2/layer2/conv1", "block2/layer2/conv2"]
    expected = {f"{norm}/{leaf}" for norm in norms for leaf in ("scale", "bias")}
    expected |= {f"{conv}/kernel" for conv in convs}
    expected |= {"head/classifier/kernel", "head/classifier/bias"}
    assert set(flatten_dict(variables["params"], sep="/")) == expected
    stats = {f"{norm}/{leaf}" for norm in norms for leaf in ("mean", "var")}
    assert set(flatten_dict(variables["batch_stats"], sep="/")) == stats


def test_features_are_named_cifar():
    model = DenseNet(10, depth=40, growth_rate=12, bottleneck=False, compression=1.0)
    _, (logits, features) = abstract(model, (2, 32, 32, 3))
    assert logits.shape == (2, 10)
    assert {name: value.shape[1:] for name, value in features.items()} == {
        "stem": (32, 32, 16),
        "block1": (32, 32, 160),
        "transition1": (16, 16, 160),
        "block2": (16, 16, 304),
        "transition2": (8, 8, 304),
        "block3": (8, 8, 448),
        "final": (8, 8, 448),
        "pooled": (448,),
    }


def test_features_are_named_imagenet():
    model = DenseNet(1000, blocks=(1, 1, 1, 1), growth_rate=32, stem="imagenet")
    _, (_, features) = abstract(model, (1, 224, 224, 3))
    assert {name: value.shape[1:] for name, value in features.items()} == {
        "stem": (56, 56, 64),
        "block1": (56, 56, 96),
        "transition1": (28, 28, 48),
        "block2": (28, 28, 80),
        "transition2": (14, 14, 40),
        "block3": (14, 14, 72),
        "transition3": (7, 7, 36),
        "block4": (7, 7, 68),
        "final": (7, 7, 68),
        "pooled": (68,),
    }


@pytest.mark.parametrize(
    "changes, width",
    [
        # The others are in the published counts of test_models.py.
        ({"bottleneck": False, "compression": 1.0, "stem": "imagenet"}, 24),
        ({"growth_rate": (20, 12, 12)}, 40),
    ],
)
def test_stem_width(changes, width):
    _, (_, features) = abstract(DenseNet(10, **{"depth": 10} | changes), (1, 32, 32, 3))
    assert features["stem"].shape[-1] == width


def test_compression_rounds_down():
    _, (_, features) = abstract(tiny(growth_rate=3, stem_width=5), (1, 8, 8, 3))
    assert features["block1"].shape[-1] == 11 and features["transition1"].shape[-1] == 5


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_block_of_d2l(name):
    # d2l.ai, section 8.7.2: DenseBlock(2, 10) on 3 channels gives 23.
    block = DenseBlock(2, 10, bottleneck=False, block=name)
    image = jax.ShapeDtypeStruct((4, 8, 8, 3), jnp.float32)
    features, _ = jax.eval_shape(block.init_with_output, jax.random.key(0), image)
    assert features.shape == (4, 8, 8, 23)


def test_network_of_d2l():
    # d2l.ai, section 8.7.4: 96x96 images of one channel; transitions halve 192, 224 and 240.
    section = dict(fields("densenet_d2l"))
    assert section.pop("family") == "densenet"
    variables, (logits, features) = abstract(DenseNet(10, **section), (1, 96, 96, 1))
    assert logits.shape == (1, 10)
    widths = [features[f"transition{number}"].shape[-1] for number in (1, 2, 3)]
    assert widths == [96, 112, 120] and features["block4"].shape == (1, 3, 3, 248)
    params = flatten_dict(variables["params"], sep="/")
    convs = [path for path in params if path.endswith("kernel") and "conv" in path.split("/")[-2]]
    assert len(convs) == 1 + 16 + 3
    assert all(path.replace("kernel", "bias") in params for path in convs)
    assert params["stem/conv/bias"].shape == (64,)


def test_initial_values():
    model = tiny(convolution_bias=True, growth_rate=24)
    key = jax.random.key(3, impl="rbg")  # compiles in a third of threefry's time
    variables = jax.jit(model.init)(key, jnp.zeros((1, 8, 8, 3)))
    params = flatten_dict(variables["params"], sep="/")
    convs = [p for p in params if p.endswith("kernel") and not p.startswith("head")]
    assert len(convs) == 10
    for path in convs:
        kernel = np.asarray(params[path])
        height, width, _, c_out = kernel.shape
        expected = np.sqrt(2 / (height * width * c_out))
        error = expected / np.sqrt(2 * kernel.size)  # standard error of a sample's std
        assert abs(kernel.std() - expected) < 5 * error, path
        assert np.abs(kernel).max() > 2.5 * expected, path  # normal, not truncated or uniform
    classifier = np.asarray(params["head/classifier/kernel"])
    bound = 1 / np.sqrt(len(classifier))
    assert 0.99 * bound < np.abs(classifier).max() <= bound
    np.testing.assert_allclose(classifier.std(), bound / np.sqrt(3), rtol=0.1)
    for path, leaf in params.items():
        if not path.endswith("kernel"):
            np.testing.assert_array_equal(leaf, 1.0 if path.endswith("scale") else 0.0)
    for path, leaf in flatten_dict(variables["batch_stats"], sep="/").items():
        np.testing.assert_array_equal(leaf, 1.0 if path.endswith("var") else 0.0)


@pytest.mark.parametrize("bottleneck", [False, True], ids=["plain", "bc"])
def test_dropout_follows_every_convolution_but_the_stem(bottleneck):
    model = tiny(bottleneck=bottleneck, dropout_rate=0.2, block="concat")
    calls = []

    def record(call, arguments, named, context):
        result = call(*arguments, **named)
        if context.method_name == "__call__":
            calls.append((context.module, arguments[0], result))
        return result

    def run(variables, image, keys):
        with nn.intercept_methods(record):
            model.apply(variables, image, train=True, keys=keys, mutable=["batch_stats"])

    variables, _ = abstract(model, (2, 8, 8, 3))
    keys = jax.ShapeDtypeStruct((2, 2), jnp.uint32)
    jax.eval_shape(run, variables, jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32), keys)
    dropped = {id(value): module for module, value, _ in calls if isinstance(module, Dropout)}
    kernels = flatten_dict(variables["params"], sep="/")
    convolved = {}
    for module, _, result in calls:
        path = "/".join(module.path)
        if f"{path}/kernel" in kernels and kernels[f"{path}/kernel"].ndim == 4:
            convolved[id(result)] = path
    assert [p for key, p in convolved.items() if key not in dropped] == ["stem/conv"]
    assert dropped.keys() <= convolved.keys() and {d.rate for d in dropped.values()} == {0.2}
    assert len({d.path for d in dropped.values()}) == len(dropped) == 4 * (1 + bottleneck) + 1


def test_dropout_draws_from_the_keys_in_training_alone():
    model, plain = tiny(dropout_rate=0.5, blocks=(1,)), tiny(blocks=(1,))
    image = np.random.default_rng(1).normal(size=(2, 8, 8, 3)).astype(np.float32)
    variables = oracle.random_variables(plain, image)
    same = [str(jax.make_jaxpr(network.apply)(variables, image)) for network in (model, plain)]
    assert same[0] == same[1]

    @jax.jit
    def train(keys):
        return model.apply(variables, image, train=True, keys=keys, mutable=["batch_stats"])[0][0]

    keys = jnp.asarray([[1, 2], [3, 4]], jnp.uint32)
    np.testing.assert_array_equal(train(keys), train(keys))
    assert (train(keys) != train(keys + jnp.uint32(1))).all()


@pytest.mark.parametrize(
    "field, value, kind",
    [
        ("depth", 40.0, "int"),
        ("depth", True, "int"),
        ("blocks", (6, 1.5), "tuple[int, ...]"),
        ("growth_rate", 1.5, "int | tuple[int, ...]"),
        ("bottleneck_width", 2.5, "int"),
        ("bottleneck", 1, "bool"),
        ("stem", 3, "str"),
    ],
)
def test_mistyped_fields_are_said_in_one_line(field, value, kind):
    section = dict(models.fields("densenet_bc_40_12")) | {field: value}
    with pytest.raises(UserError) as error:
        models.create(section, 10)
    line = str(error.value)
    assert line.startswith(f"model.{field} = {value!r}: give a value of type ") and kind in line


def test_an_epsilon_below_zero_is_refused():
    with pytest.raises(UserError, match="model.batch_norm_epsilon = -1.0: must be above 0"):
        models.create(models.fields("densenet_40_12", batch_norm_epsilon=-1.0), 10)


def test_an_image_too_small_for_the_network_is_a_user_error():
    with pytest.raises(UserError):
        abstract(tiny(stem="imagenet", blocks=(1, 1, 1, 1)), (1, 8, 8, 3))


def test_good_fields_pass():
    for changes in ({"depth": 10}, {"blocks": (1,)}, {"depth": 7, "bottleneck": False}):
        DenseNet(10, **changes).check()
    DenseNet(10, depth=40, growth_rate=(4, 8, 16), compression=1.0, stem_width=1).check()


def test_stochastic_depth_drops_new_feature_maps_by_a_linear_rule():
    """p_l = 1 - l / L (1 - p_L) of Huang et al., arXiv:1603.09382; examples by themselves."""
    network = DenseNet(10, blocks=(1, 3), growth_rate=2, survival=0.2)
    generator = np.random.default_rng(1)
    image = generator.uniform(size=(400, 4, 4, 3)).astype(np.float32)
    variables = oracle.random_variables(network, image)
    keys = generator.integers(2**32, size=(400, 2), dtype=np.uint32)
    compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

    @compiled
    def blocks(keys, image):
        mutable = ["batch_stats"]
        (_, features), _ = network.apply(variables, image, train=True, keys=keys, mutable=mutable)
        return features["block1"], features["block2"]

    first, second = jax.device_get(blocks(keys, image))
    kept = [np.any(first[..., -2:] != 0, (1, 2, 3))]
    kept += [
        np.any(second[..., 2 * i - 6 or None : (2 * i - 4) or None] != 0, (1, 2, 3))
        for i in range(3)
    ]
    for rows, probability in zip(kept, (0.8, 0.6, 0.4, 0.2), strict=True):
        assert abs(rows.mean() - probability) < 5 * np.sqrt(probability * (1 - probability) / 400)
    assert abs(np.corrcoef(kept[1], kept[2])[0, 1]) < 0.25  # drawn independently
    plain = network.clone(survival=1.0)
    _, features = compiled(network.apply)(variables, image)
    _, unscaled = compiled(plain.apply)(variables, image)
    np.testing.assert_allclose(
        features["block1"][..., -2:], 0.8 * unscaled["block1"][..., -2:], rtol=1e-5, atol=1e-6
    )
