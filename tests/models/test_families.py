"""What holds for every family: precision, shapes, features, and a gradient of every parameter."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict, freeze

from densejax import models
from densejax.config import UserError
from densejax.models.convolution import tracing_for
from tests.models import oracle
from tests.models.test_in_place import on_a_cpu  # noqa: F401

# Every form of every family, a few layers deep, on 32x32: fields and features in their order.
RESIDUAL = ["stem", "stage1", "stage2", "final", "pooled"]
SMALL = {"family": "resnet", "blocks": (1, 2), "widths": (4, 8)}
BOTTLENECK = SMALL | {"block": "bottleneck"}
VOVNET = {
    "family": "vovnet",
    "modules": (1, 2),
    "widths": (4, 4),
    "output_widths": (8, 12),
    "module_depth": 2,
    "stem_widths": (4, 4, 8),
}
HARDNET = {
    "family": "hardnet",
    **{"stem_widths": (4, 4), "blocks": (2, 4), "growth_rates": (4, 4), "downsampling": (1,)},
    **{"output_widths": (8, 12), "dropout_rate": 0.2},
}
TWINS = {
    "densenet": {"family": "densenet", "blocks": (1, 2), "growth_rate": 4},
    "one_shot": {"family": "densenet", "blocks": (1, 2), "growth_rate": 4, "connect": "one_shot"},
    "basic": SMALL | {"shortcut": "identity"},
    "bottleneck": BOTTLENECK | {"stem": "imagenet"},
    "original": BOTTLENECK | {"stride_on": "1x1"},
    "preactivation": BOTTLENECK | {"preactivation": True, "stride_on": "1x1"},
    "stochastic": SMALL | {"survival": 0.5},
    "plain": SMALL | {"connect": "chain"},
    "vovnet": VOVNET,
    "vovnet_v2": VOVNET | {"separable": True, "squeeze_excite": True},
    "rdnet": {
        "family": "rdnet",
        **{"stem_width": 8, "stem_stride": 1, "stage_depth": 2, "growth_rates": (4, 4)},
        **{"downsampling": (2,), "kernel_size": 3, "squeeze_excite_from": 2, "drop_path": 0.5},
    },
    "hardnet": HARDNET,
    "hardnet_ds": HARDNET | {"separable": True, "dropout_rate": 0.0},
}


def build(twin, num_classes=7, **keywords):
    fields = dict(twin)
    model = models.FAMILIES[fields.pop("family")](num_classes, **fields, **keywords)
    model.check()
    return model


def abstract(model, shape, train=False):
    """(logits, features) and the variables, as shapes."""

    def forward(image):
        keys = jnp.zeros((shape[0], 2), jnp.uint32)
        variables = model.init(jax.random.key(0), image)
        return model.apply(variables, image, train, keys, mutable=["batch_stats"])[0], variables

    return jax.eval_shape(forward, jax.ShapeDtypeStruct(shape, jnp.float32))


# One for each way through a family's code.
KINDS = ("densenet", "basic", "bottleneck", "preactivation", "vovnet", "rdnet", "hardnet")


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("twin", TWINS)
def test_precision_and_shapes_of_features_logits_and_variables(twin, train):
    """In bfloat16, of images with five channels and sizes that are odd, also when halved."""
    model, shape = build(TWINS[twin], dtype=jnp.bfloat16), (2, 33, 19, 5)
    # For all platforms, whose results must agree. Linen's BatchNorm mixes bfloat16 and float32.
    with tracing_for(""), jax.numpy_dtype_promotion("standard"):
        (logits, features), variables = abstract(model, shape, train)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    assert logits.dtype == features["pooled"].dtype == jnp.float32
    dtypes = {features[name].dtype for name in features if name != "pooled"}
    assert dtypes == {jnp.dtype("bfloat16")} and logits.shape == (2, 7)
    assert all(0 not in feature.shape for feature in features.values())
    if TWINS[twin]["family"] == "resnet":  # PyTorch's sizes: every halving rounds up
        halvings = 3 if twin == "bottleneck" else 1
        sizes = tuple(-(-size // 2**halvings) for size in shape[1:3])
        assert features["stage2"].shape[1:3] == sizes


@pytest.mark.parametrize("twin", KINDS)
def test_without_a_classifier_the_features_stay(twin):
    image = jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32)
    ((_, features), variables), ((logits, headless), headless_variables) = (
        jax.eval_shape(build(TWINS[twin], classes).init_with_output, jax.random.key(0), image)
        for classes in (7, 0)
    )
    assert logits is None and headless == features
    del variables["params"]["head"]
    assert headless_variables == variables


@pytest.mark.parametrize("twin", KINDS)
def test_feature_info_names_channels_and_reduction_in_order(twin):
    info = models.feature_info(build(TWINS[twin], num_classes=0), (64, 64, 3))
    times = 4 if TWINS[twin].get("block") == "bottleneck" else 1
    is_vovnet = TWINS[twin]["family"] == "vovnet"
    first = 4 if is_vovnet or twin == "bottleneck" else 1
    channels = (8, 8, 12) if is_vovnet else (4, 4 * times, 8 * times)
    channels = (8, 16, 16) if twin == "rdnet" else channels
    expected = {
        "stem": (channels[0], first),
        "stage1": (channels[1], first),
        "stage2": (channels[2], 2 * first),
        "final": (channels[2], 2 * first),
        "pooled": (channels[2], None),
    }
    if TWINS[twin]["family"] == "hardnet":
        expected = {
            "stem": (4, 4),
            "block1": (8, 4),
            "block2": (12, 8),
            "final": (12, 8),
            "pooled": (12, None),
        }
    if TWINS[twin]["family"] == "densenet":
        expected = {
            "stem": (8, 1),
            "block1": (12, 1),
            "transition1": (6, 2),
            "block2": (14, 2),
            "final": (14, 2),
            "pooled": (14, None),
        }
    assert list(info.items()) == list(expected.items())


def test_reduction_does_not_depend_on_odd_sizes():
    """97 pixels are halved to 4 or to 3; neither is a 32nd."""
    small = {
        "densenet121": {"blocks": (1,) * 4},
        "resnet18": {"blocks": (1,) * 4},
        "vovnet39": {"modules": (1,) * 4, "module_depth": 1},
        "rdnet_tiny": {"growth_rates": (8,) * 4, "downsampling": (2, 3, 4), "stage_depth": 1},
        "hardnet68": {"blocks": (1,) * 5},
    }
    for name, changes in small.items():
        model = models.create(models.fields(name, **changes), 0)
        assert models.feature_info(model, (97, 97, 3))["final"][1] == 32, name


# The others are trained by the golden runs, or differ by a stride.
FAST = ("bottleneck", "preactivation")
FROZEN = ("densenet", "bottleneck", "rdnet", "hardnet")  # each of another kind


@pytest.mark.parametrize(
    "twin", [pytest.param(t, marks=() if t in FAST else pytest.mark.slow) for t in TWINS]
)
def test_gradient_reaches_every_parameter(twin):
    model = build(TWINS[twin])
    generator = np.random.default_rng(0)
    image = generator.normal(size=(4, 16, 16, 3)).astype(np.float32)
    keys = generator.integers(2**32, size=(4, 2), dtype=np.uint32)
    variables = oracle.random_variables(model, image)

    def loss(params):
        (logits, _), _ = model.apply(
            variables | {"params": params}, image, True, keys, mutable=["batch_stats"]
        )
        return (logits * jnp.asarray(generator.normal(size=(4, 7)), jnp.float32)).sum()

    gradient = jax.jit(jax.grad(loss), compiler_options={"xla_backend_optimization_level": 0})(
        variables["params"]
    )
    for path, leaf in jax.tree.leaves_with_path(gradient):
        name = jax.tree_util.keystr(path)
        assert np.isfinite(leaf).all(), name
        assert np.abs(leaf).max() > 0, name


@pytest.mark.parametrize(
    "twin", [pytest.param(t, marks=() if t in FROZEN else pytest.mark.slow) for t in TWINS]
)
def test_frozen_parts_run_as_in_evaluation(twin):
    model = build(TWINS[twin])
    generator = np.random.default_rng(0)
    image = generator.normal(size=(2, 16, 16, 3)).astype(np.float32)
    keys = generator.integers(2**32, size=(2, 2), dtype=np.uint32)
    variables = oracle.random_variables(model, image)

    def run(model, train):
        def forward(variables):
            return model.apply(variables, image, train, keys, mutable=["batch_stats"])

        options = {"xla_backend_optimization_level": 0}
        return jax.jit(forward, compiler_options=options)(variables)

    (logits, _), _ = run(model, False)
    (found, _), updates = run(model.clone(frozen=tuple(variables["params"])), True)
    np.testing.assert_allclose(found, logits, rtol=1e-5, atol=1e-5)
    statistics = variables.get("batch_stats", {})
    jax.tree.map(np.testing.assert_array_equal, updates.get("batch_stats", {}), statistics)
    if statistics and "dropout_rate" not in TWINS[twin] and "survival" not in TWINS[twin]:
        (found, _), updates = run(model.clone(frozen=("batch_norm",)), True)
        np.testing.assert_allclose(found, logits, rtol=1e-4, atol=1e-4)
        jax.tree.map(np.testing.assert_array_equal, updates["batch_stats"], statistics)


@pytest.mark.parametrize(
    "twin, batch",  # what computes in pieces has another way for an empty batch
    [
        *itertools.product(("random", "bottleneck", "rdnet"), (0, 4)),
        *itertools.product(("preactivation", "vovnet_v2"), (4,)),
        ("dsnet", 4),
    ],
)
def test_what_flax_users_may_do(twin, batch):
    """Frozen variables, an empty batch, typed keys, JAX told to refuse operands of other ranks."""
    others = {
        "random": TWINS["densenet"] | {"dropout_rate": 0.5, "survival": 0.5},
        "dsnet": TWINS["preactivation"] | {"connect": "dsnet", "blocks": (2,), "widths": (8,)},
    }
    model = build((TWINS | others)[twin])

    def gradients(image, keys):
        variables = freeze(model.init(jax.random.key(0), image))
        keys = jax.random.wrap_key_data(keys)
        logits, _ = model.apply(variables, image)

        def loss(params):
            inputs = {**variables, "params": params}
            (logits, _), _ = model.apply(inputs, image, True, keys, mutable=["batch_stats"])
            return logits.sum()

        return logits, jax.grad(loss)(variables["params"])

    image = jax.ShapeDtypeStruct((batch, 32, 32, 3), jnp.float32)
    keys = jax.ShapeDtypeStruct((batch, 2), jnp.uint32)
    with tracing_for(""), jax.numpy_rank_promotion("raise"):
        logits, gradient = jax.eval_shape(gradients, image, keys)
    assert logits.shape == (batch, 7) and isinstance(gradient, FrozenDict)


@pytest.mark.parametrize("name", ["densenet121", "resnet18", "vovnet39"])
def test_an_unknown_field_lists_the_fields_of_its_family(name):
    with pytest.raises(UserError, match=r"model\.groups: .* batch_norm_epsilon"):
        models.fields(name, groups=2)


# Fields of which the last is refused, and what the message says beside its name and value.
REFUSED = {
    "densenet": [
        ({}, "exactly one"),
        ({"blocks": (1, 1), "depth": 40}, "model.blocks = (1, 1): give exactly one"),
        ({"depth": 41}, "bottleneck = True it must be 6n + 4, n >= 1; the nearest are 40 and 46"),
        ({"depth": 4}, "6n + 4, n >= 1; the nearest are 10 and 16"),
        ({"depth": -9}, "6n + 4, n >= 1; the nearest are 10 and 16"),
        ({"bottleneck": False, "depth": 42}, "3n + 4, n >= 1; the nearest are 40 and 43"),
        ({"blocks": ()}, "positive"),
        ({"blocks": (6, 0)}, "positive"),
        ({"depth": 40, "growth_rate": 0}, "positive integer"),
        ({"depth": 40, "growth_rate": (12, 12)}, "each of the 3"),
        ({"depth": 40, "stem": "vgg"}, "cifar, imagenet"),
        ({"depth": 40, "block": "sum"}, "in_place, concat"),
        ({"depth": 40, "compression": 0.0}, "(0, 1]"),
        ({"depth": 40, "compression": 1.5}, "(0, 1]"),
        ({"blocks": (2, 2), "compression": 0.01}, "without a channel"),
        ({"depth": 40, "dropout_rate": 1.0}, "[0, 1)"),
        ({"depth": 40, "dropout_rate": -0.1}, "[0, 1)"),
        ({"depth": 40, "survival": 0.0}, "(0, 1]"),
        ({"depth": 40, "bottleneck_width": 0}, "at least 1"),
        ({"depth": 40, "stem_width": 0}, "at least 1"),
    ],
    "resnet": [
        ({"block": "wide"}, "basic, bottleneck"),
        ({"stem": "vgg"}, "cifar, imagenet"),
        ({"connect": "concat"}, "add, chain"),
        ({"connect": "hyper"}, "model.preactivation = True"),
        ({"preactivation": True, "connect": "hyper:streams=0"}, "at least 1"),
        (
            {"preactivation": True, "block": "bottleneck", "blocks": (1,) * 3, "connect": "hyper"},
            "has no effect",
        ),
        ({"shortcut": "C"}, "projection, identity"),
        ({"block": "bottleneck", "stride_on": "2x2"}, "3x3, 1x1"),
        ({"stride_on": "1x1"}, "model.block = 'basic' ignores it"),
        ({"blocks": ()}, "positive integers"),
        ({"blocks": (1, 0, 1)}, "3 positive integers"),
        ({"widths": (16, 32)}, "3 positive integers"),
        ({"shortcut": "identity", "widths": (8, 4, 4)}, "identity"),
        ({"survival": 0.0}, "(0, 1]"),
        ({"survival": 1.5}, "(0, 1]"),
        ({"connect": "chain", "survival": 0.5}, "model.connect = 'chain' ignores it"),
        ({"connect": "chain", "zero_init": True}, "model.connect = 'chain' ignores it"),
        ({"connect": "chain", "shortcut": "identity"}, "model.connect = 'chain' ignores it"),
        ({"preactivation": True, "zero_init": True}, "model.preactivation = True ignores it"),
    ],
    "vovnet": [
        ({"modules": ()}, "positive integers"),
        ({"modules": (1, 1, 0, 1)}, "4 positive integers"),
        ({"widths": (4, 4)}, "4 positive integers"),
        ({"output_widths": (4, 4, 4, 4.5)}, "4 positive integers"),
        ({"stem_widths": (4, 4)}, "3 positive integers"),
        ({"module_depth": 0}, "at least 1"),
    ],
    "rdnet": [
        ({"growth_rates": ()}, "positive integers"),
        ({"growth_rates": (4, 0)}, "2 positive integers"),
        ({"stem_width": 0}, "at least 1"),
        ({"stage_depth": 0}, "at least 1"),
        ({"downsampling": (1, 2)}, "numbers from 2 to 7, in rising order"),
        ({"downsampling": (3, 2)}, "in rising order"),
        ({"downsampling": (2, 2)}, "in rising order"),
        ({"kernel_size": 4}, "must be odd"),
        ({"stem_stride": 3}, "must be a power of two"),
        ({"compression": 0.0}, "(0, 1]"),
        ({"stem_width": 1, "growth_rates": (4, 4), "downsampling": (), "compression": 0.5}, "8"),
        ({"expansion": 0.1}, "fewer than 8 channels"),
        ({"drop_path": 1.0}, "[0, 1)"),
        ({"layer_scale": 0.0}, "above 0"),
        ({"head_norm_epsilon": 0.0}, "above 0"),
    ],
    "hardnet": [
        ({"blocks": ()}, "5 positive integers"),
        ({"growth_rates": (4, 4)}, "5 positive integers"),
        ({"output_widths": (4,)}, "5 positive integers"),
        ({"stem_widths": (4,)}, "2 positive integers"),
        ({"downsampling": (3, 1)}, "from 1 to 5, in rising order"),
        ({"downsampling": (6,)}, "from 1 to 5, in rising order"),
        ({"connect": "harmonic"}, "dense, chain, "),
        ({"dropout_rate": 1.0}, "[0, 1)"),
    ],
}


@pytest.mark.parametrize(
    "family, changes, said",
    [(family, *case) for family, cases in REFUSED.items() for case in cases],
)
def test_fields_that_describe_no_network_are_said_in_one_line(family, changes, said):
    with pytest.raises(UserError) as error:
        models.FAMILIES[family](10, **changes).check()
    line, (field, value) = str(error.value), list((changes or {"depth": None}).items())[-1]
    assert "\n" not in line and line.startswith(f"model.{field} = {value!r}") and said in line, line
