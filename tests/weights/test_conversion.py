"""Other projects' names, written out here from their code, to variables and back, bit for bit."""

import jax
import numpy as np
import pytest

from densejax import models
from densejax.config import UserError
from densejax.weights import conversion
from densejax.weights.conversion import from_keras, from_torch, to_torch
from tests.weights.test_store import traced_once  # noqa: F401

DENSENET = {"blocks": (2, 1), "growth_rate": 4, "stem_width": 8, "stem": "imagenet"}
THREE = {"blocks": (1, 1, 1), "growth_rate": 4, "stem_width": 8}
BOTTLENECK = {"blocks": (1, 2), "widths": (4, 8), "block": "bottleneck", "stem": "imagenet"}
BASIC = {"blocks": (1, 2), "widths": (4, 8)}
VOVNET = {
    "modules": (1, 2),
    "widths": (4, 6),
    "output_widths": (8, 12),
    "module_depth": 2,
    "stem_widths": (4, 6, 8),
}


RDNET = {
    **{"stem_width": 8, "growth_rates": (4, 4), "stage_depth": 2},
    **{"downsampling": (2,), "kernel_size": 3, "squeeze_excite_from": 2},
}
HARDNET = {
    **{"blocks": (2, 1, 4, 2), "growth_rates": (4, 4, 4, 4), "output_widths": (6, 6, 6, 12)},
    **{"stem_widths": (4, 6), "downsampling": (1, 2, 3)},
}


def network(family, fields, num_classes=7):
    section = {"densenet": "densenet121", "resnet": "resnet18", "vovnet": "vovnet39"}
    section = (section | {"rdnet": "rdnet_tiny", "hardnet": "hardnet68"})[family]
    reset = {"stem": "cifar"} if family in ("densenet", "resnet") else {}
    return models.create(models.fields(section, **{**reset, **fields}), num_classes)


# The shapes of state_dicts.


def norm(name, width):
    shapes = dict.fromkeys(("weight", "bias", "running_mean", "running_var"), (width,))
    return {
        f"{name}.{leaf}": shape for leaf, shape in {**shapes, "num_batches_tracked": ()}.items()
    }


def conv(name, inputs, outputs, size, bias=False):
    biases = {f"{name}.bias": (outputs,)} if bias else {}
    return {f"{name}.weight": (outputs, inputs, size, size)} | biases


def linear(name, inputs, classes):
    return {f"{name}.weight": (classes, inputs), f"{name}.bias": (classes,)} if classes else {}


def densenet(blocks=(2, 1), classes=7, channels=3, dot="", last="norm5", size=7, norm0=True):
    shapes, width, k = conv("features.conv0", channels, 8, size), 8, 4
    shapes |= norm("features.norm0", 8) if norm0 else {}
    for block, layers in enumerate(blocks, 1):
        for layer in range(1, layers + 1):
            at = f"features.denseblock{block}.denselayer{layer}"
            shapes |= norm(f"{at}.norm{dot}1", width) | conv(f"{at}.conv{dot}1", width, 4 * k, 1)
            shapes |= norm(f"{at}.norm{dot}2", 4 * k) | conv(f"{at}.conv{dot}2", 4 * k, k, 3)
            width += k
        if block < len(blocks):
            at = f"features.transition{block}"
            shapes |= norm(f"{at}.norm", width) | conv(f"{at}.conv", width, width // 2, 1)
            width //= 2
    return shapes | norm(f"features.{last}", width) | linear("classifier", width, classes)


def resnet(bottleneck, size):
    shapes, inputs = conv("conv1", 3, 4, size) | norm("bn1", 4), 4
    for stage, (blocks, width) in enumerate(((1, 4), (2, 8)), 1):
        widths = ((width, 1), (width, 3), (4 * width, 1)) if bottleneck else ((width, 3),) * 2
        for block in range(blocks):
            at, x = f"layer{stage}.{block}", inputs
            for index, (outputs, kernel) in enumerate(widths, 1):
                shapes |= conv(f"{at}.conv{index}", x, outputs, kernel)
                shapes |= norm(f"{at}.bn{index}", outputs)
                x = outputs
            if inputs != x:
                shapes |= conv(f"{at}.downsample.0", inputs, x, 1) | norm(f"{at}.downsample.1", x)
            inputs = x
    return shapes | linear("fc", inputs, 7)


def vovnet(authors, separable=False):
    """With `separable`, VoVNetV2 of separable layers."""
    shapes, inputs = {}, 3

    def layer(name, inputs, outputs):
        if separable:
            convs = conv(f"{name}conv_dw", 1, inputs, 3) | conv(
                f"{name}conv_pw", inputs, outputs, 1
            )
        else:
            convs = conv(f"{name}conv", inputs, outputs, 3)
        return convs | norm(f"{name}{'norm' if authors else 'bn'}", outputs)

    for index, width in enumerate((4, 6, 8)):
        name = f"stem.stem_{index + 1}/" if authors else f"stem.{index}."
        first = conv(f"{name}conv", 3, width, 3) | norm(f"{name}bn", width)
        shapes |= first if separable and not index else layer(name, inputs, width)
        inputs = width
    for stage, (modules, width, outputs) in enumerate(((1, 4, 8), (2, 6, 12))):
        for module in range(modules):
            place = f"OSA{stage + 2}_{module + 1}"
            x = inputs
            if separable and inputs != width:
                name, x = f"stages.{stage}.blocks.{module}.conv_reduction.", width
                shapes |= conv(f"{name}conv", inputs, width, 1) | norm(f"{name}bn", width)
            for index in range(2):
                name = f"stages.{stage}.blocks.{module}.conv_mid.{index}."
                if authors:
                    name = f"stage{stage + 2}.{place}.layers.{index}.{place}_{index}/"
                shapes |= layer(name, x, width)
                x = width
            name = f"stages.{stage}.blocks.{module}.conv_concat."
            if authors:
                name = f"stage{stage + 2}.{place}.concat.{place}_concat/"
            shapes |= conv(f"{name}conv", inputs + 2 * width, outputs, 1)
            shapes |= norm(f"{name}{'norm' if authors else 'bn'}", outputs)
            if separable and module == modules - 1:
                shapes |= conv(f"stages.{stage}.blocks.{module}.attn.fc", outputs, outputs, 1, True)
            inputs = outputs
    return shapes | linear("classifier" if authors else "head.fc", inputs, 7)


def rdnet(stem):
    def layer_norm(name, width):
        return {f"{name}.weight": (width,), f"{name}.bias": (width,)}

    shapes, width = conv(f"{stem}.0", 3, 8, 4, True) | layer_norm(f"{stem}.1", 8), 8
    for stage in range(2):
        at = f"dense_stages.{stage}"
        if stage:
            shapes |= layer_norm(f"{at}.0", width) | conv(f"{at}.1", width, 8, 2, True)
            width = 8
        for index in range(2):
            block = f"{at}.{2 * stage}.dense_block{index}"
            shapes |= {f"{block}.gamma": (4,)}
            shapes |= conv(f"{block}.layers.layers.0", 1, width, 3, True)
            shapes |= layer_norm(f"{block}.layers.layers.1", width)
            inner = 4 * width // 8 * 8
            shapes |= conv(f"{block}.layers.layers.2", width, inner, 1, True)
            shapes |= conv(f"{block}.layers.layers.4", inner, 4, 1, True)
            shapes |= conv(f"{block}.layers.layers.5.fc", 4, 4, 1, True) if stage else {}
            width += 4
    return shapes | layer_norm("head.norm", width) | linear("head.fc", width, 7)


def hardnet(separable):
    """Blocks of layers that read (1), (1, 0), (2) and (3, 2, 0), numbered from the input, 0."""

    def layer(name, inputs, outputs, size):
        return conv(f"{name}.conv", inputs, outputs, size) | norm(f"{name}.norm", outputs)

    def halved(index, width):
        name = f"base.{index}"
        if not separable:
            return {}
        return conv(f"{name}.dwconv", 1, width, 3) | norm(f"{name}.norm", width)

    shapes = layer("base.0", 3, 4, 3) | layer("base.1", 4, 6, 1 if separable else 3)
    shapes |= halved(2, 6)
    # (inputs, outputs) of each layer: k times 1.7 for each source but the first, made even.
    blocks = [[(6, 4), (10, 6)], [(6, 4)], [(6, 4), (10, 6), (6, 4), (16, 12)], [(6, 4), (10, 6)]]
    for number, (block, emitted, width) in enumerate(
        zip(blocks, (10, 4, 20, 10), (6, 6, 6, 12), strict=True)
    ):
        at = 3 + 3 * number
        for index, (inputs, outputs) in enumerate(block):
            name = f"base.{at}.layers.{index}"
            if separable:
                shapes |= layer(f"{name}.layer1", inputs, outputs, 1)
                shapes |= conv(f"{name}.layer2.dwconv", 1, outputs, 3)
                shapes |= norm(f"{name}.layer2.norm", outputs)
            else:
                shapes |= layer(name, inputs, outputs, 3)
        shapes |= layer(f"base.{at + 1}", emitted, width, 1)
        shapes |= halved(at + 2, width) if number < 3 else {}
    return shapes | linear("base.14.3", 12, 7)


def draw(shapes, seed=0):
    """Random arrays, drawn in the order of the shapes."""
    random = np.random.default_rng(seed)
    return {
        name: np.asarray(7)
        if name.endswith("tracked")
        else random.uniform(0.2, 1.0, shape).astype(np.float32)
        for name, shape in shapes.items()
    }


CASES = {
    "densenet": ("densenet", DENSENET, densenet()),
    "densenet of three blocks": (
        *("densenet", THREE),
        densenet((1, 1, 1), size=3, norm0=False),
    ),
    "densenet without a classifier": ("densenet", DENSENET, densenet(classes=0)),
    "densenet of one channel": ("densenet", DENSENET, densenet(channels=1)),
    "basic resnet": ("resnet", BASIC, resnet(False, 3)),
    "bottleneck resnet": ("resnet", BOTTLENECK, resnet(True, 7)),
    "vovnet": ("vovnet", VOVNET, vovnet(authors=True)),
    "timm's vovnet": ("vovnet", VOVNET | {"identity": False}, vovnet(authors=False)),
    "timm's vovnet v2": (
        *("vovnet", VOVNET | {"separable": True, "squeeze_excite": True}),
        vovnet(authors=False, separable=True),
    ),
    "timm's rdnet": ("rdnet", RDNET, rdnet("stem")),
    "hardnet": ("hardnet", HARDNET, hardnet(separable=False)),
    "separable hardnet": ("hardnet", HARDNET | {"separable": True}, hardnet(separable=True)),
    "rdnet": ("rdnet", RDNET | {"head_norm_epsilon": 1e-5}, rdnet("stem.stem")),
}


def without_counts(state):
    return {name: array for name, array in state.items() if not name.endswith("tracked")}


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert (found[name].shape, found[name].dtype) == (array.shape, array.dtype), name
        assert found[name].tobytes() == array.tobytes(), name


@pytest.mark.parametrize("case", CASES)
def test_a_state_dict_comes_back_bitwise(case):
    family, fields, shapes = CASES[case]
    model = network(family, fields, num_classes=0 if "without" in case else 7)
    state = draw(shapes)
    variables = from_torch(model, state)
    project = "timm" if "timm" in case else ""
    assert_same_bits(to_torch(model, variables, project), without_counts(state))


def test_what_torch_means_by_its_axes_and_names():
    state = draw(densenet())
    variables = from_torch(network("densenet", DENSENET), state)
    params, stats = variables["params"], variables["batch_stats"]
    theirs = state["features.denseblock1.denselayer2.conv2.weight"]
    ours = params["block1"]["layer2"]["conv2"]["kernel"]
    assert ours.shape == (3, 3, 16, 4) and ours[0, 2, 11, 3] == theirs[3, 11, 0, 2]
    weight, head = state["classifier.weight"], params["head"]["classifier"]
    assert head["kernel"].shape == (12, 7) and head["kernel"][5, 3] == weight[3, 5]
    for ours, theirs in (
        (params["norm"]["scale"], "weight"),
        (params["norm"]["bias"], "bias"),
        (stats["norm"]["mean"], "running_mean"),
        (stats["norm"]["var"], "running_var"),
    ):
        np.testing.assert_array_equal(ours, state[f"features.norm5.{theirs}"])


@pytest.mark.parametrize(
    "spelling", [{"dot": "."}, {"last": "norm_final"}, {"dot": ".", "last": "norm_final"}]
)
def test_every_spelling_is_the_same_network(spelling):
    expected = from_torch(network("densenet", DENSENET), draw(densenet()))
    found = from_torch(network("densenet", DENSENET), draw(densenet(**spelling)))
    assert_same_bits(conversion.flatten(found), conversion.flatten(expected))
    wrapped = {f"module.{name}": array for name, array in draw(densenet(**spelling)).items()}
    found = from_torch(network("densenet", DENSENET), wrapped)
    assert_same_bits(conversion.flatten(found), conversion.flatten(expected))


# Keras: the names of its DenseNet and ResNet50 against torchvision's.


def keras_name(torch_name):
    """The Keras layer of a torchvision module, and whether it is a norm."""
    parts = torch_name.split(".")
    if parts[0] == "features":
        if parts[1] in ("conv0", "norm0"):
            return f"conv1_{'bn' if parts[1] == 'norm0' else 'conv'}"
        if parts[1] == "norm5":
            return "bn"
        number = int(parts[1][-1]) + 1
        if parts[1].startswith("transition"):
            return f"pool{number}_{'bn' if parts[2] == 'norm' else 'conv'}"
        layer = {"norm1": "0_bn", "conv1": "1_conv", "norm2": "1_bn", "conv2": "2_conv"}[parts[3]]
        return f"conv{number}_block{parts[2].removeprefix('denselayer')}_{layer}"
    if parts[0] in ("classifier", "fc"):
        return "predictions"
    if parts[0] in ("conv1", "bn1"):
        return f"conv1_{parts[0][:-1]}"
    inner = {"downsample.0": "0_conv", "downsample.1": "0_bn"}.get(
        ".".join(parts[2:4]), f"{parts[2][-1]}_{parts[2][:-1]}"
    )
    return f"conv{int(parts[0][-1]) + 1}_block{int(parts[1]) + 1}_{inner}"


def keras_weights(state):
    """A state_dict as Keras has it."""
    weights = {}
    for name, array in without_counts(state).items():
        module, _, leaf = name.rpartition(".")
        layer = keras_name(name)
        is_norm = layer.endswith("bn")
        leaves = {"weight": "gamma" if is_norm else "kernel", "bias": "beta" if is_norm else "bias"}
        leaves |= {"running_mean": "moving_mean", "running_var": "moving_variance"}
        array = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
        weights[f"{layer}/{leaves[leaf]}"] = array
    return weights


def test_keras_names_are_those_of_the_same_network():
    state = draw(densenet())
    expected = from_torch(network("densenet", DENSENET), state)
    keras = network("densenet", DENSENET | {"batch_norm_epsilon": 1.001e-5})
    found = from_keras(keras, keras_weights(state))
    assert_same_bits(conversion.flatten(found), conversion.flatten(expected))
    numbered = {f"{name}:0": array for name, array in keras_weights(state).items()}
    assert_same_bits(conversion.flatten(from_keras(keras, numbered)), conversion.flatten(expected))


def test_keras_residual_names_are_those_of_the_same_network():
    shapes = resnet(True, 7)
    biases = {
        name.replace("weight", "bias"): shape[:1]
        for name, shape in shapes.items()
        if len(shape) == 4
    }
    state = draw(shapes | biases)
    fields = BOTTLENECK | {"convolution_bias": True, "stride_on": "1x1"}
    model = network("resnet", fields | {"batch_norm_epsilon": 1.001e-5})
    found = from_keras(model, keras_weights(state))
    assert_same_bits(conversion.flatten(found), conversion.flatten(from_torch(model, state)))


# What does not fit.


def changed(state, drop=(), **add):
    return {name: array for name, array in state.items() if name not in drop} | add


STATE = draw(densenet())
NAN = np.where(np.arange(8) == 3, np.nan, STATE["features.norm0.bias"])
REFUSED = {
    "missing": (
        changed(STATE, drop=["features.norm5.running_var"]),
        ["missing: features.norm5.running_var"],
    ),
    "unexpected": (changed(STATE, extra=np.zeros(3, np.float32)), ["unexpected: extra"]),
    "shape": (
        changed(STATE, **{"features.norm0.bias": np.zeros(9, np.float32)}),
        ["of another shape", "features.norm0.bias (9,), not (8,)"],
    ),
    "all at once": (
        changed(STATE, ["features.norm0.bias"], other=np.zeros(2, np.float32)),
        ["missing: features.norm0.bias", "unexpected: other"],
    ),
    "not finite": (
        changed(STATE, **{"features.norm0.bias": NAN}),
        ["not of finite numbers: features.norm0.bias"],
    ),
    "integers": (
        changed(STATE, **{"features.norm0.bias": np.zeros(8, np.int32)}),
        ["not of finite numbers: features.norm0.bias"],
    ),
    "classes": (draw(densenet(classes=9)), ["classifier.bias (9,), not (7,)", "`adapt`"]),
    "a stem that is no convolution": (
        changed(STATE, **{"features.conv0.weight": np.zeros(3, np.float32)}),
        ["features.conv0.weight (3,), not (7, 7, 3, 8)"],
    ),
    "deeper": (draw(densenet((3, 1))), ["unexpected: ", "denselayer3.conv1.weight", " more"]),
    "another family": (draw(resnet(True, 7)), ["none of features.conv0.weight"]),
    "nothing": ({}, ["none of features.conv0.weight"]),
    "twice": (
        changed(STATE, **{"features.norm_final.bias": STATE["features.norm5.bias"]}),
        ["features.norm_final.bias", "twice"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_said_in_one_line(case):
    state, said = REFUSED[case]
    with pytest.raises(UserError) as caught:
        from_torch(network("densenet", DENSENET), state)
    line = str(caught.value)
    assert "\n" not in line and len(line) < 1000 and all(part in line for part in said), line


def test_long_lists_are_cut():
    with pytest.raises(UserError) as caught:
        from_torch(network("densenet", DENSENET), {"features.conv0.weight": np.zeros((8, 3, 7, 7))})
    assert "missing: " in str(caught.value) and " and 40 more" in str(caught.value)


@pytest.mark.parametrize(
    "family, fields, convert, said",
    [
        ("densenet", DENSENET, from_keras, "model.batch_norm_epsilon = 1e-05: .* 1.001e-05"),
        ("vovnet", VOVNET, None, "model.identity = True: .* timm has False"),
        ("resnet", BASIC | {"preactivation": True}, None, "params/norm.*torchvision has no name"),
    ],
)
def test_a_network_that_the_project_does_not_have_is_refused(family, fields, convert, said):
    model = network(family, fields)
    shapes = conversion.abstract(model, 3)
    variables = conversion.unflatten({p: np.ones(s.shape, "f") for p, s in shapes.items()})
    with pytest.raises(UserError, match=said):
        if convert:
            convert(model, keras_weights(STATE))
        else:
            to_torch(model, variables, "timm" if family == "vovnet" else "")
    with pytest.raises(UserError, match="project = 'caffe'"):
        to_torch(model, variables, "caffe")


# Adaptation, only where it is asked for.


def test_another_number_of_classes_gets_a_new_classifier_alone():
    before = {name: array.copy() for name, array in STATE.items()}
    found = conversion.flatten(from_torch(network("densenet", DENSENET, 100), STATE, adapt=True))
    same = conversion.flatten(from_torch(network("densenet", DENSENET), STATE))
    kernel, bias = (found.pop(path) for path in conversion.CLASSIFIER)
    assert_same_bits(found, {p: a for p, a in same.items() if p not in conversion.CLASSIFIER})
    assert kernel.shape == (12, 100) and np.abs(kernel).max() <= 12**-0.5
    assert kernel.std() == pytest.approx((3 * 12) ** -0.5, rel=0.1) and not bias.any()
    other = from_torch(network("densenet", DENSENET, 100), STATE, adapt=True, seed=1)
    assert np.abs(other["params"]["head"]["classifier"]["kernel"] - kernel).max() > 0.1
    assert_same_bits(STATE, before)


def test_a_classifier_that_fits_is_kept():
    model = network("densenet", DENSENET)
    kept, strict = (conversion.flatten(from_torch(model, STATE, adapt=a)) for a in (True, False))
    assert_same_bits(kept, strict)


def test_weights_and_networks_without_a_classifier():
    headless, model = draw(densenet(classes=0)), network("densenet", DENSENET)
    with pytest.raises(UserError, match=r"missing: classifier.bias, classifier.weight; `adapt`"):
        from_torch(model, headless)
    assert from_torch(model, headless, adapt=True)["params"]["head"]["classifier"]["bias"].size == 7
    with pytest.raises(UserError, match="unexpected: classifier.bias, classifier.weight"):
        from_torch(network("densenet", DENSENET, 0), STATE)
    assert "head" not in from_torch(network("densenet", DENSENET, 0), STATE, adapt=True)["params"]


@pytest.mark.parametrize("has, wants", [(3, 1), (1, 3)])
def test_other_image_channels_see_grey_images_the_same(has, wants):
    model, state = network("densenet", DENSENET), draw(densenet(channels=has))
    with pytest.raises(UserError, match="features.conv0.weight .*`adapt`"):
        from_torch(model, state, image_channels=wants)
    grey = np.random.default_rng(0).normal(size=(2, 32, 32, 1)).astype(np.float32)
    logits = [
        jax.jit(model.apply)(variables, np.repeat(grey, channels, -1))[0]
        for variables, channels in (
            (from_torch(model, state), has),
            (from_torch(model, state, image_channels=wants, adapt=True), wants),
        )
    ]
    assert np.isfinite(logits[0]).all() and np.std(logits[0], axis=0).min() > 0
    np.testing.assert_allclose(*logits, rtol=1e-5, atol=1e-6)


def test_between_two_numbers_of_colours_there_is_no_rule():
    with pytest.raises(UserError, match=r"conv0.weight \(7, 7, 3, 8\), not \(7, 7, 4, 8\)"):
        from_torch(network("densenet", DENSENET), STATE, image_channels=4, adapt=True)
