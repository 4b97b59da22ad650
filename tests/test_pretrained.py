"""The command that makes a directory of weights: what it reads, assumes, adapts and refuses."""

# ruff: noqa: F401, F811 (fixtures are imported)

import functools
import hashlib
import subprocess
import sys
import types

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
import safetensors.numpy

from densejax import models, pretrained
from densejax.config import UserError
from densejax.weights import conversion
from densejax.weights import files as weight_files
from tests import small
from tests.test_command_line import ROOT, command, one_line
from tests.weights.test_files import torch_file
from tests.weights.test_store import converted, file, state_dict, traced_once, variables_of

RESIDUAL = {"family": "resnet", "stem": "imagenet", "block": "bottleneck", "blocks": (1, 1)}


@pytest.fixture
def convert(command, tmp_path):
    """Runs the command on a file of the small network; it writes into the folder `new`."""

    def run(weights, *flags):
        words = [f"--weights={weights}", f"--output={tmp_path / 'new'}", *flags]
        return command("--model=small", *words, main=pretrained.main, config="unused")

    return run


def made(answer, tmp_path):
    """What the command has written, and the lines that it has printed."""
    code, output, error = answer
    assert (code, error) == (0, "")
    return *pretrained.load(str(tmp_path / "new")), output.splitlines()


def safe(path, arrays):
    """Writes arrays as a .safetensors file."""
    path.write_bytes(safetensors.numpy.save(arrays))
    return path


def test_the_command_makes_a_directory_that_load_reads(state_dict, file, tmp_path, convert):
    description, variables, lines = made(convert(file), tmp_path)
    output = tmp_path / "new"
    assert lines == [f"{output}: small, 7 classes, 3 image channels"]
    assert sorted(path.name for path in output.iterdir()) == ["model.json", "weights.safetensors"]
    arrays = safetensors.numpy.load((output / "weights.safetensors").read_bytes())
    name = "features.denseblock1.denselayer2.conv2.weight"
    np.testing.assert_array_equal(
        arrays["params/block1/layer2/conv2/kernel"], state_dict[name].transpose(2, 3, 1, 0)
    )
    np.testing.assert_array_equal(
        arrays["batch_stats/stem/norm/var"], state_dict["features.norm0.running_var"]
    )
    assert {array.dtype for array in arrays.values()} == {np.dtype("float32")}
    assert description["model"] == models.fields("small").to_dict()  # tuples, not JSON's lists
    assert (description["num_classes"], description["image_channels"]) == (7, 3)
    assert description["source"] == str(file) and description["names"] == "torchvision"
    assert description["source_sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    model = models.create(description["model"], description["num_classes"])
    small.assert_same_bits(pretrained.to_torch(model, variables), state_dict)
    pretrained.convert_file("small", str(file), str(tmp_path / "again"))
    for name in ("model.json", "weights.safetensors"):
        assert (output / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_classes_and_channels_change_only_where_that_is_asked_for(file, tmp_path, convert):
    assert "classifier.bias (7,), not (10,)" in one_line(convert(file, "--num_classes=10"))
    assert "features.conv0.weight" in one_line(convert(file, "--in_channels=1"))
    assert not (tmp_path / "new").exists()
    answer = convert(file, "--num_classes=10", "--in_channels=1", "--adapt")
    description, variables, lines = made(answer, tmp_path)
    assert lines[0].endswith("small, 10 classes, 1 image channels")
    assert (description["num_classes"], description["image_channels"]) == (10, 1)
    assert variables["params"]["stem"]["conv"]["kernel"].shape == (7, 7, 1, 8)


@pytest.mark.parametrize(("classes", "remembered"), [(1000, True), (7, False)])
def test_weights_of_imagenet_remember_its_levels(state_dict, tmp_path, classes, remembered):
    model = models.create(models.fields("small"), classes)
    weights = safe(tmp_path / "a.safetensors", pretrained.to_torch(model, variables_of(model)))
    output = str(tmp_path / "new")
    pretrained.convert_file("small", str(weights), output, num_classes=10, adapt=True)
    description, _ = pretrained.load(output)
    assert ("mean" in description, "std" in description) == (remembered, remembered)
    said = "images are normalised as ImageNet's, which weights do not show"
    assert description["assumed"] == [said] * remembered
    if remembered:  # torchvision's, of images in [0, 1]
        np.testing.assert_allclose(np.array(description["mean"]) / 255, [0.485, 0.456, 0.406])
        np.testing.assert_allclose(np.array(description["std"]) / 255, [0.229, 0.224, 0.225])


def test_weights_without_a_classifier_make_a_network_without_one(state_dict, tmp_path):
    headless = {name: array for name, array in state_dict.items() if "classifier" not in name}
    weights = safe(tmp_path / "headless.safetensors", headless)
    made = pretrained.convert_file("small", str(weights), str(tmp_path / "new"))
    assert made["num_classes"] == 0
    assert "head" not in pretrained.load(str(tmp_path / "new"))[1]["params"]


def test_what_keras_names_imply_is_written_down(tmp_path, monkeypatch):
    monkeypatch.setitem(models.MODELS, "small", RESIDUAL | {"widths": (4, 8)})
    keras = {"batch_norm_epsilon": 1.001e-5, "convolution_bias": True, "stride_on": "1x1"}
    model = models.create(models.fields("small", **keras), 7)
    layout = conversion.LAYOUTS["resnet"][1]
    flat = conversion.flatten(variables_of(model))
    weights = safe(tmp_path / "a.safetensors", {layout.name(p): a for p, a in flat.items()})
    made = pretrained.convert_file("small", str(weights), str(tmp_path / "new"))
    assert made["names"] == "keras" and made["model"].items() >= keras.items()
    small.assert_same_bits(pretrained.load(str(tmp_path / "new"))[1], conversion.unflatten(flat))


# Bad input.


@pytest.mark.parametrize(
    "weights, flags, says",
    [
        ("small", ["--output={tmp}"], "exists; name a new directory"),
        ("small", ["--model=tiny"], "model = 'tiny': allowed are "),
        ("small", ["--model=vovnet39"], "of another family"),
        ("none", [], "FileNotFoundError"),
        ("broken", [], "cannot be read"),
        ("nan", [], "not of finite numbers: features.norm0.bias"),
        ("negative", [], "of negative variance: features.norm0.running_var"),
        ("small", ["--weights=weights.npz"], ".safetensors, .pth, .pt"),
        ("small", ["--num_classes=-1"], "flag --num_classes=-1: "),
        ("small", ["--in_channels=0"], "flag --in_channels=0: "),
        ("small", ["--num_classes=x"], "flag --num_classes=x: invalid literal for int()"),
        ("small", ["--shape=3"], "Unknown command line flag 'shape'"),
        ("small", ["--shortcut=x"], "model.shortcut: densenet has"),
        ("small", ["--weights="], "--weights=: give a value"),
        ("small", ["--config=configs/digits.py"], "--config: nothing here reads it"),
        ("small", ["stray"], "'stray' is no flag"),
    ],
)
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_bad_input_is_one_line(weights, flags, says, state_dict, file, tmp_path, convert):
    path = tmp_path / f"{weights}.safetensors"
    if weights == "broken":
        path.write_bytes(file.read_bytes()[:1000])
    elif weights in ("nan", "negative"):
        name, value = {"nan": ("bias", np.nan), "negative": ("running_var", -1)}[weights]
        safe(path, state_dict | {f"features.norm0.{name}": np.full(8, value, np.float32)})
    flags = [flag.replace("{tmp}", str(tmp_path)) for flag in flags]
    assert says in one_line(convert(path, *flags))
    assert not (tmp_path / "new").exists()


def test_flags_that_are_missing_are_named(command):
    run = functools.partial(command, main=pretrained.main, config="unused")
    assert one_line(run()).startswith("--model: give a value")
    assert one_line(run("--model=x")).startswith("--weights: give a value")
    assert one_line(run("--model=x", "--weights=x")).startswith("--output: give a value")


@pytest.mark.parametrize(
    "weights, module", [("x.h5", "h5py"), ("hf-hub:timm/x", "huggingface_hub")]
)
def test_a_reader_that_is_not_installed_is_named(weights, module, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / weights.replace("/", "-")).write_bytes(b"")
    said = f"--weights={weights}: cannot be read .ImportError: {module} is needed; pip install "
    with pytest.raises(UserError, match=said) as caught:
        weight_files.read(weights)
    assert "\n" not in str(caught.value)


def test_the_hub_is_asked_for_safetensors(file, monkeypatch):
    asked = []

    def download(*arguments):
        asked.append(arguments)
        return str(file)

    hub = types.SimpleNamespace(hf_hub_download=download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    arrays, _ = weight_files.read("hf-hub:timm/densenet121.tv_in1k")
    assert asked == [("timm/densenet121.tv_in1k", "model.safetensors")]
    assert "classifier.weight" in arrays
    hub.hf_hub_download = lambda *_: 1 / 0
    with pytest.raises(UserError, match="--weights=hf-hub:a/b: cannot be read .ZeroDivision"):
        weight_files.read("hf-hub:a/b")


@pytest.mark.slow
def test_the_real_command_needs_no_card():
    words = [sys.executable, "-m", "densejax.pretrained", "--model=small"]
    answer = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    line = one_line((answer.returncode, answer.stdout, answer.stderr))
    assert line.startswith("--weights: give a value")


# The network is a part of what was saved.

ONE = np.asarray(1)


def before(prefix, state):
    return {f"{prefix}{name}": array for name, array in state.items()}


def twice(state):
    return {name: 2 * array for name, array in state.items()}


def head_outside(state):
    """The classifier stands beside the prefix, under another name."""
    classifier = {name: state[name] for name in state if "classifier" in name}
    inside = {name: state[name] for name in state if name not in classifier}
    renamed = {name.replace("classifier.", "fc."): array for name, array in classifier.items()}
    return before("backbone.", inside) | renamed


TREES = {  # what people save, and what is said because it had to be assumed
    "net": (lambda state: {"net": state, "epoch": 3}, []),
    "model": (lambda state: {"model": state, "optimizer": {"state": {0: {"x": ONE}}}}, []),
    "model_state_dict": (lambda state: {"model_state_dict": state}, []),
    "state_dict": (lambda state: {"state_dict": state, "best": ONE}, []),
    "prefixes": (lambda state: before("module._orig_mod.backbone.", state), []),
    "an average": (lambda state: before("module.", state) | {"n_averaged": ONE}, []),
    "two": (
        lambda state: {"state_dict": twice(state), "state_dict_ema": state},
        ["state_dict_ema:: is taken, not state_dict::"],
    ),
    "two in one": (
        lambda state: before("model.", twice(state)) | before("ema.module.", state),
        ["ema.module. is taken, not model."],
    ),
    "another head": (
        lambda state: {name.replace("classifier.", "head."): a for name, a in state.items()},
        ["head.weight is taken for classifier.weight"],
    ),
    "a head outside": (head_outside, ["fc.weight is taken for classifier.weight"]),
}


@pytest.mark.parametrize("tree", TREES)
def test_a_network_is_found_among_what_was_saved_with_it(tree, state_dict, tmp_path, convert):
    change, assumed = TREES[tree]
    (tmp_path / "a.pth").write_bytes(torch_file(change(state_dict)))
    answer = convert(tmp_path / "a.pth")
    description, variables, lines = made(answer, tmp_path)
    assert lines[1:] == [f"assumed: {line}" for line in assumed]
    again = pretrained.to_torch(models.create(description["model"], 7), variables)
    small.assert_same_bits(again, state_dict)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda s: before("a.", s) | before("b.", s), "of several networks: net::a., net::b."),
        (lambda s: s | {"extra.weight": np.ones((2, 2), "f")}, "unexpected: extra.weight"),
        (lambda s: before("a.", s) | {"criterion.weight": ONE}, "unexpected: criterion.weight"),
    ],
)
def test_a_network_that_is_not_the_only_one_is_refused(change, said, state_dict, tmp_path, convert):
    (tmp_path / "a.pth").write_bytes(torch_file({"net": change(state_dict)}))
    assert said in one_line(convert(tmp_path / "a.pth"))


# The shortcuts of ResNets without projections, which no weights show.


def padded(state, image, before):
    """The logits of pytorch_resnet_cifar10's network of one block a stage, by its own code.

    A shortcut gets `before` of its new channels in front of the old ones.
    """

    def conv(name, x, stride=1):
        return jax.lax.conv_general_dilated(x, state[f"{name}.weight"], (stride,) * 2, [(1, 1)] * 2)

    def norm(name, x):
        scale, bias, mean, var = (
            state[f"{name}.{leaf}"][:, None, None]
            for leaf in ("weight", "bias", "running_mean", "running_var")
        )
        return (x - mean) / np.sqrt(var + 1e-5) * scale + bias

    x = np.maximum(norm("bn1", conv("conv1", image)), 0)
    for stage in (1, 2, 3):
        at, stride = f"layer{stage}.0", 1 if stage == 1 else 2
        y = np.maximum(norm(f"{at}.bn1", conv(f"{at}.conv1", x, stride)), 0)
        y = norm(f"{at}.bn2", conv(f"{at}.conv2", y))
        new = y.shape[1] - x.shape[1]
        front = round(new * before)
        x = np.pad(x[:, :, ::stride, ::stride], [(0, 0), (front, new - front), (0, 0), (0, 0)])
        x = np.maximum(y + x, 0)
    return x.mean((2, 3)) @ state["linear.weight"].T + state["linear.bias"]


@pytest.mark.parametrize(
    "head, flags, before, shortcut, is_said",
    [
        ("linear", [], 0.5, "identity_middle", False),
        ("linear", ["--shortcut=identity"], 0, "identity", False),
        ("fc", [], 0, "identity", True),
        ("fc", ["--shortcut=identity_middle"], 0.5, "identity_middle", False),
    ],
)
def test_where_a_shortcut_pads_is_known_or_said(
    head, flags, before, shortcut, is_said, tmp_path, monkeypatch, convert
):
    preset = models.MODELS["resnet20_cifar"] | {"blocks": (1,) * 3}
    monkeypatch.setitem(models.MODELS, "small", preset)
    model = models.create(models.fields("small"), 10)
    state = pretrained.to_torch(model, variables_of(model))
    image = np.random.default_rng(0).normal(size=(2, 3, 16, 16)).astype(np.float32)
    state |= {f"linear.{leaf}": state.pop(f"fc.{leaf}") for leaf in ("weight", "bias")}
    expected, other = (padded(state, image, share) for share in (before, 0.5 - before))
    named = {f"module.{name.replace('linear', head)}": array for name, array in state.items()}
    (tmp_path / "a.th").write_bytes(torch_file({"state_dict": named, "best_prec1": 91.5}, True))
    description, variables, lines = made(convert(tmp_path / "a.th", *flags), tmp_path)
    assert ("assumed: model.shortcut = 'identity', " in "".join(lines)) == is_said
    assert description["model"]["shortcut"] == shortcut
    model = models.create(description["model"], 10)
    logits = jax.jit(model.apply)(variables, image.transpose(0, 2, 3, 1))[0]
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    assert np.abs(logits - other).max() > 0.01


# Weights that are not the network's.

TINY = {"family": "resnet", "blocks": (1,), "widths": (4,)}
TOO_LARGE = np.float64(1e300)  # finite until it is float32


@pytest.fixture(scope="module")
def tiny_state():
    """A state_dict of the smallest network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.MODELS, "tiny", TINY)
        model = models.create(models.fields("tiny"), 3)
    return pretrained.to_torch(model, variables_of(model))


def with_first(array, value):
    array = array.copy()
    array.flat[0] = value
    return array


SAME = {  # what may be done to one array without a refusal
    "as it is": lambda array: array,
    "float16": lambda array: array.astype(np.float16),
    "float64": lambda array: array.astype(np.float64),
    "bfloat16": lambda array: array.astype(jax.numpy.bfloat16),
}
CHANGES = SAME | {
    "int32": lambda array: array.astype(np.int32),
    "bool": lambda array: array > 0,
    "not a number": lambda array: with_first(array, np.nan),
    "infinite": lambda array: with_first(array, -np.inf),
    "infinite in float32": lambda array: with_first(array.astype(np.float64), TOO_LARGE),
    "empty": lambda array: array[:0],
    "one number": lambda array: array.flatten()[0],
    "one more": lambda array: np.concatenate([array, array[:1]]),
    "one axis more": lambda array: array[None],
    "flat": lambda array: array.flatten() if array.ndim > 1 else array[:, None],
    "missing": lambda array: None,
}
ODD_NAMES = st.one_of(
    st.sampled_from(["module.conv1.weight", "conv1.weight\n", "x" * 5000, "\x1b[2J", ""]), st.text()
)


@hypothesis.settings(max_examples=60)
@hypothesis.given(
    which=st.integers(0, 10**6),
    change=st.sampled_from(sorted(CHANGES)),
    extra=st.none() | ODD_NAMES,
)
def test_changed_weights_are_refused_or_the_same(
    tiny_state, tmp_path_factory, which, change, extra
):
    folder = tmp_path_factory.mktemp("weights")
    state, name = dict(tiny_state), sorted(tiny_state)[which % len(tiny_state)]
    changed = CHANGES[change](state.pop(name))
    state |= {} if changed is None else {name: np.asarray(changed)}
    if extra is not None and extra not in state:
        state[extra] = np.ones(3, np.float32)
    is_same = change in SAME and state.keys() == tiny_state.keys()
    weights = safe(folder / "a.safetensors", state)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.MODELS, "tiny", TINY)
        try:
            pretrained.convert_file("tiny", str(weights), str(folder / "new"))
        except UserError as error:
            line = str(error)
            assert line.isprintable() and len(line) < 12_000 and not is_same, (line, which, change)
            assert sorted(path.name for path in folder.iterdir()) == ["a.safetensors"]
            return
        description, variables = pretrained.load(str(folder / "new"))
    assert is_same, (name, change, extra)
    model = models.create(description["model"], description["num_classes"])
    expected = tiny_state | {name: np.asarray(changed).astype(np.float32)}
    small.assert_same_bits(pretrained.to_torch(model, variables), expected)


@hypothesis.given(
    change=st.sampled_from(["cut", "byte", "header"]),
    place=st.floats(0, 1, exclude_max=True),
    value=st.integers(0, 255),
)
def test_a_damaged_file_is_refused_or_of_finite_numbers(tmp_path_factory, change, place, value):
    path = tmp_path_factory.mktemp("file") / "a.safetensors"
    data = bytearray(safetensors.numpy.save({"a": np.ones((2, 3), np.float32)}))
    at = int(place * (len(data) if change != "header" else 8))
    data[at] = value
    path.write_bytes(data[:at] if change == "cut" else data)
    try:
        arrays, _ = weight_files.read(str(path))
    except UserError as error:
        assert str(error).isprintable() and str(error).startswith(f"--weights={path}: cannot be")
    else:
        assert sum(array.size for array in arrays.values()) <= 24
