"""Weights files of all kinds, the directory made of them, and runs that start from it."""

import hashlib
import json
import os
import shutil
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
from densejax.runs import files
from densejax.training import loop
from densejax.weights import conversion
from densejax.weights import files as weight_files
from tests import small
from tests.models import oracle
from tests.weights.test_files import torch_file

SMALL = {
    **{"family": "densenet", "stem": "imagenet", "blocks": (2, 1), "growth_rate": 4},
    "stem_width": 8,
}
RESIDUAL = {"family": "resnet", "stem": "imagenet", "block": "bottleneck", "blocks": (1, 1)}


def variables_of(model, channels=3, seed=0):
    image = jax.ShapeDtypeStruct((1, 64, 64, channels), np.float32)
    return oracle.random_variables(model, image, seed=seed)


@pytest.fixture
def arrays_of_small(monkeypatch):
    """A preset of a few layers, and a state_dict of it."""
    monkeypatch.setitem(models.MODELS, "small", SMALL)
    model = models.create(models.fields("small"), 7)
    return pretrained.to_torch(model, variables_of(model))


@pytest.fixture
def file(arrays_of_small, tmp_path):
    """The state_dict in a file."""
    path = tmp_path / "small.safetensors"
    path.write_bytes(safetensors.numpy.save(arrays_of_small))
    return path


def command(capsys, *arguments):
    """(exit code, standard output, standard error) of the command."""
    try:
        code = pretrained.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


def refused(capsys, *arguments):
    """The one line that the command refuses with."""
    code, output, error = command(capsys, *arguments)
    assert (code, output) == (2, "") and error.count("\n") == 1, error
    assert error.startswith("densejax: ")
    return error


# The command and its directory.


def test_the_command_makes_a_directory_that_load_reads(arrays_of_small, file, tmp_path, capsys):
    output = tmp_path / "deep" / "weights"
    code, said, _ = command(capsys, "--model=small", f"--weights={file}", f"--output={output}")
    assert code == 0 and said == f"{output}: small, 7 classes, 3 image channels\n"
    assert sorted(path.name for path in output.iterdir()) == ["model.json", "weights.safetensors"]
    arrays = safetensors.numpy.load((output / "weights.safetensors").read_bytes())
    name = "features.denseblock1.denselayer2.conv2.weight"
    np.testing.assert_array_equal(
        arrays["params/block1/layer2/conv2/kernel"], arrays_of_small[name].transpose(2, 3, 1, 0)
    )
    np.testing.assert_array_equal(
        arrays["batch_stats/stem/norm/var"], arrays_of_small["features.norm0.running_var"]
    )
    assert {array.dtype for array in arrays.values()} == {np.dtype("float32")}

    description, variables = pretrained.load(str(output))
    assert description["model"] == models.fields("small").to_dict()  # tuples again
    assert (description["num_classes"], description["image_channels"]) == (7, 3)
    assert description["source"] == str(file) and description["names"] == "torchvision"
    assert description["source_sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    model = models.create(description["model"], description["num_classes"])
    again = pretrained.to_torch(model, variables)
    assert again.keys() == arrays_of_small.keys()
    assert all(again[name].tobytes() == arrays_of_small[name].tobytes() for name in arrays_of_small)


def test_the_same_file_gives_the_same_bytes(file, tmp_path):
    for name in "ab":
        pretrained.convert_file("small", str(file), str(tmp_path / name))
    for name in ("model.json", "weights.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_classes_and_channels_change_only_where_that_is_asked_for(file, tmp_path, capsys):
    ask = ["--model=small", f"--weights={file}", f"--output={tmp_path / 'new'}"]
    assert "classifier.bias (7,), not (10,)" in refused(capsys, *ask, "--num_classes=10")
    assert "features.conv0.weight" in refused(capsys, *ask, "--in_channels=1")
    assert not (tmp_path / "new").exists()
    code, said, _ = command(capsys, *ask, "--num_classes=10", "--in_channels=1", "--adapt")
    assert code == 0 and said.endswith("small, 10 classes, 1 image channels\n")
    description, variables = pretrained.load(str(tmp_path / "new"))
    assert (description["num_classes"], description["image_channels"]) == (10, 1)
    assert variables["params"]["stem"]["conv"]["kernel"].shape == (7, 7, 1, 8)


@pytest.mark.parametrize(("classes", "remembered"), [(1000, True), (7, False)])
def test_weights_of_imagenet_remember_its_levels(arrays_of_small, tmp_path, classes, remembered):
    file = tmp_path / "weights.safetensors"
    model = models.create(models.fields("small"), classes)
    file.write_bytes(safetensors.numpy.save(pretrained.to_torch(model, variables_of(model))))
    output = str(tmp_path / "new")
    pretrained.convert_file("small", str(file), output, num_classes=10, adapt=True)
    description, _ = pretrained.load(output)
    assert ("mean" in description, "std" in description) == (remembered, remembered)
    if remembered:  # torchvision's, of images in [0, 1]
        np.testing.assert_allclose(np.array(description["mean"]) / 255, [0.485, 0.456, 0.406])
        np.testing.assert_allclose(np.array(description["std"]) / 255, [0.229, 0.224, 0.225])


def test_weights_without_a_classifier_make_a_network_without_one(arrays_of_small, tmp_path, capsys):
    file = tmp_path / "headless.safetensors"
    headless = {name: array for name, array in arrays_of_small.items() if "classifier" not in name}
    file.write_bytes(safetensors.numpy.save(headless))
    made = pretrained.convert_file("small", str(file), str(tmp_path / "out"))
    assert made["num_classes"] == 0
    assert "head" not in pretrained.load(str(tmp_path / "out"))[1]["params"]


def test_what_keras_names_imply_is_written_down(tmp_path, monkeypatch):
    monkeypatch.setitem(models.MODELS, "small", RESIDUAL | {"widths": (4, 8)})
    keras = {"batch_norm_epsilon": 1.001e-5, "convolution_bias": True, "stride_on": "1x1"}
    model = models.create(models.fields("small", **keras), 7)
    layout = conversion.LAYOUTS["resnet"][1]
    flat = conversion.flatten(variables_of(model))
    file = tmp_path / "small.safetensors"
    file.write_bytes(safetensors.numpy.save({layout.name(p): a for p, a in flat.items()}))
    made = pretrained.convert_file("small", str(file), str(tmp_path / "out"))
    assert made["names"] == "keras" and made["model"].items() >= keras.items()
    small.assert_same_bits(pretrained.load(str(tmp_path / "out"))[1], conversion.unflatten(flat))


def test_it_is_a_command(file, tmp_path):
    words = [f"--weights={file}", f"--output={tmp_path / 'out'}", "--model=small"]
    run = subprocess.run(
        [sys.executable, "-m", "densejax.pretrained", *words],
        capture_output=True,
        text=True,
        env=os.environ | small.ENVIRONMENT,
    )
    assert run.returncode == 2, run.stderr  # the preset is this process's alone
    assert run.stderr.startswith("densejax: model = 'small': allowed are ")


# Files that cannot be read.


def test_mistakes_are_one_line(arrays_of_small, file, tmp_path, capsys):
    (tmp_path / "there").mkdir()
    (tmp_path / "broken.safetensors").write_bytes(file.read_bytes()[:1000])
    bad = tmp_path / "nan.safetensors"
    nan = arrays_of_small | {"features.norm0.bias": np.full(8, np.nan, np.float32)}
    bad.write_bytes(safetensors.numpy.save(nan))
    new = f"--output={tmp_path / 'new'}"
    for arguments, said in {
        ("--model=small", f"--weights={file}", f"--output={tmp_path / 'there'}"): "exists; name a",
        ("--model=tiny", f"--weights={file}", new): "model = 'tiny': allowed are ",
        ("--model=vovnet39", f"--weights={file}", new): "another family",
        ("--model=densenet121", f"--weights={file}", new): " missing: ",
        ("--model=small", f"--weights={tmp_path / 'no.safetensors'}", new): "FileNotFoundError",
        ("--model=small", f"--weights={tmp_path / 'broken.safetensors'}", new): "cannot be read",
        (
            "--model=small",
            f"--weights={bad}",
            new,
        ): "not of finite numbers: features.norm0.bias",
        ("--model=small", f"--weights={tmp_path / 'weights.npz'}", new): ".safetensors, .pth, .pt",
        ("--model=small", f"--weights={file}", new, "--num_classes=-1"): "--num_classes=-1",
        ("--model=small", f"--weights={file}", new, "--num_classes=x"): "invalid int value: 'x'",
        ("--model=small", f"--weights={file}", new, "--shape=3"): "unrecognized arguments: --shape",
        ("--model=small", f"--weights={file}", new, "--shortcut=x"): "model.shortcut: densenet has",
        ("--model=small",): "the following arguments are required: --weights, --output",
    }.items():
        assert said in refused(capsys, *arguments), arguments
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "weights, module",
    [("x.h5", "h5py"), ("hf-hub:timm/x", "huggingface_hub")],
)
def test_a_reader_that_is_not_installed_is_named(weights, module, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / weights.replace("/", "-")).write_bytes(b"")
    said = f"--weights={weights}: cannot be read .ImportError: {module} is needed; install "
    with pytest.raises(UserError, match=said) as caught:
        weight_files.read(weights)
    assert "\n" not in str(caught.value)


TREES = {  # what people save, and what is named because it had to be assumed
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
    "a head outside": (
        lambda state: {
            name.replace("classifier.", "fc.")
            if "classifier" in name
            else f"backbone.{name}": array
            for name, array in state.items()
        },
        ["fc.weight is taken for classifier.weight"],
    ),
}
ONE = np.asarray(1)


def before(prefix, state):
    return {f"{prefix}{name}": array for name, array in state.items()}


def twice(state):
    return {name: 2 * array for name, array in state.items()}


@pytest.mark.parametrize("tree", TREES)
def test_a_network_is_found_among_what_was_saved_with_it(tree, arrays_of_small, tmp_path, capsys):
    change, assumed = TREES[tree]
    (tmp_path / "a.pth").write_bytes(torch_file(change(arrays_of_small)))
    ask = ["--model=small", f"--weights={tmp_path / 'a.pth'}", f"--output={tmp_path / 'out'}"]
    code, said, error = command(capsys, *ask, "--allow_pickle")
    assert code == 0, error
    assert said.splitlines()[1:] == [f"assumed: {line}" for line in assumed]
    description, variables = pretrained.load(str(tmp_path / "out"))
    again = pretrained.to_torch(models.create(description["model"], 7), variables)
    small.assert_same_bits(again, arrays_of_small)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda s: before("a.", s) | before("b.", s), "of several networks: net::a., net::b."),
        (lambda s: s | {"extra.weight": np.ones((2, 2), "f")}, "unexpected: extra.weight"),
        (lambda s: before("a.", s) | {"criterion.weight": ONE}, "unexpected: criterion.weight"),
    ],
)
def test_a_network_that_is_not_the_only_one_is_refused(
    change, said, arrays_of_small, tmp_path, capsys
):
    (tmp_path / "a.pth").write_bytes(torch_file({"net": change(arrays_of_small)}))
    ask = ["--model=small", f"--weights={tmp_path / 'a.pth'}", f"--output={tmp_path / 'out'}"]
    assert said in refused(capsys, *ask)


# Option A of ResNets, which no weights show.


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
    "head, arguments, before, shortcut, is_said",
    [
        ("linear", [], 0.5, "identity_middle", False),
        ("linear", ["--shortcut=identity"], 0, "identity", False),
        ("fc", [], 0, "identity", True),
        ("fc", ["--shortcut=identity_middle"], 0.5, "identity_middle", False),
    ],
)
def test_where_a_shortcut_pads_is_known_or_said(
    head, arguments, before, shortcut, is_said, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(
        models.MODELS, "small", models.MODELS["resnet20_cifar"] | {"blocks": (1,) * 3}
    )
    model = models.create(models.fields("small"), 10)
    state = pretrained.to_torch(model, variables_of(model))
    image = np.random.default_rng(0).normal(size=(2, 3, 16, 16)).astype(np.float32)
    state |= {f"linear.{leaf}": state.pop(f"fc.{leaf}") for leaf in ("weight", "bias")}
    expected, other = (padded(state, image, share) for share in (before, 0.5 - before))
    named = {f"module.{name.replace('linear', head)}": array for name, array in state.items()}
    (tmp_path / "a.th").write_bytes(torch_file({"state_dict": named, "best_prec1": 91.5}, True))
    ask = ["--model=small", f"--weights={tmp_path / 'a.th'}", f"--output={tmp_path / 'out'}"]
    code, said, error = command(capsys, *ask, *arguments)
    assert code == 0 and ("assumed: model.shortcut = 'identity', " in said) == is_said, error
    description, variables = pretrained.load(str(tmp_path / "out"))
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


CHANGES = {  # what is done to one array: a refusal, but where the numbers stay the same
    "as it is": lambda array: array,
    "float16": lambda array: array.astype(np.float16),
    "float64": lambda array: array.astype(np.float64),
    "bfloat16": lambda array: array.astype(jax.numpy.bfloat16),
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
SAME = {"as it is", "float16", "float64", "bfloat16"}
ODD_NAMES = st.one_of(
    st.sampled_from(["module.conv1.weight", "conv1.weight\n", "x" * 5000, "\x1b[2J", ""]), st.text()
)


@hypothesis.settings(max_examples=120)
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
    (folder / "a.safetensors").write_bytes(safetensors.numpy.save(state))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.MODELS, "tiny", TINY)
        try:
            pretrained.convert_file("tiny", str(folder / "a.safetensors"), str(folder / "out"))
        except UserError as error:
            line = str(error)
            assert line.isprintable() and len(line) < 12_000 and not is_same, (line, which, change)
            assert sorted(path.name for path in folder.iterdir()) == ["a.safetensors"]
            return
        description, variables = pretrained.load(str(folder / "out"))
    assert is_same, (name, change, extra)
    again = pretrained.to_torch(
        models.create(description["model"], description["num_classes"]), variables
    )
    expected = tiny_state | {name: np.asarray(changed).astype(np.float32)}
    assert all(again[name].tobytes() == expected[name].tobytes() for name in expected)


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


def test_a_negative_variance_is_refused(arrays_of_small, tmp_path, capsys):
    bad = arrays_of_small | {"features.norm0.running_var": np.full(8, -1, np.float32)}
    (tmp_path / "bad.safetensors").write_bytes(safetensors.numpy.save(bad))
    ask = ["--model=small", f"--weights={tmp_path / 'bad.safetensors'}", f"--output={tmp_path}/o"]
    assert "of negative variance: features.norm0.running_var" in refused(capsys, *ask)


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


# Directories that are not what was written.


@pytest.fixture
def folder(file, tmp_path):
    """A directory of the small network."""
    pretrained.convert_file("small", str(file), str(tmp_path / "folder"))
    return tmp_path / "folder"


def rewritten(folder, **changes):
    path = folder / "model.json"
    description = json.loads(path.read_text())
    path.write_text(json.dumps(description | changes))


def test_a_kill_before_the_end_leaves_nothing_that_loads(
    arrays_of_small, file, tmp_path, monkeypatch
):
    def killed(path, text):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(files, "write", killed)
        pretrained.convert_file("small", str(file), str(tmp_path / "half"))
    assert [path.name for path in (tmp_path / "half").iterdir()] == ["weights.safetensors"]
    with pytest.raises(UserError, match="not a directory of densejax.pretrained"):
        pretrained.load(str(tmp_path / "half"))


def damage_weights(folder):
    data = bytearray((folder / "weights.safetensors").read_bytes())
    data[-5] ^= 1
    (folder / "weights.safetensors").write_bytes(data)


def linked(folder, target, name="weights.safetensors"):
    (folder / name).unlink()
    (folder / name).symlink_to(target)
    return folder / name


DAMAGES = {
    "no directory": lambda folder: shutil.rmtree(folder),
    "no weights": lambda folder: (folder / "weights.safetensors").unlink(),
    "a flipped bit": damage_weights,
    "half a description": lambda folder: (folder / "model.json").write_text('{"model": '),
    "a list": lambda folder: (folder / "model.json").write_text("[]"),
    "no model": lambda folder: rewritten(folder, model=None),
    "another family": lambda folder: rewritten(folder, model={"family": "vgg"}),
    "an unknown field": lambda folder: rewritten(folder, model=SMALL | {"depth_wise": True}),
    "another depth": lambda folder: rewritten(folder, model=SMALL | {"blocks": [2, 2]}),
    "other classes": lambda folder: rewritten(folder, num_classes=10),
    "classes in words": lambda folder: rewritten(folder, num_classes="ten"),
    "classes below zero": lambda folder: rewritten(folder, num_classes=-1),
    "no channels": lambda folder: rewritten(folder, image_channels=0),
    "blocks that would take gigabytes": lambda folder: rewritten(
        folder, model=SMALL | {"blocks": [10**9, 1]}
    ),
    "blocks that would take hours": lambda folder: rewritten(
        folder, model=SMALL | {"blocks": [10**5, 1]}
    ),
    "many blocks": lambda folder: rewritten(folder, model=SMALL | {"blocks": [1] * 10**5}),
    "a depth without end": lambda folder: rewritten(
        folder, model=SMALL | {"blocks": None, "depth": 3 * 10**9 + 1}
    ),
    "modules without end": lambda folder: rewritten(
        folder, model={"family": "vovnet", "modules": [1] * 4, "module_depth": 10**9}
    ),
    "wide layers": lambda folder: rewritten(folder, model=SMALL | {"growth_rate": 10**9}),
    "weights of a device": lambda folder: linked(folder, "/dev/zero"),
    "weights of a directory": lambda folder: linked(folder, "/"),
    "weights of a pipe": lambda folder: os.mkfifo(linked(folder, "nowhere").parent / "nowhere"),
    "a description of a device": lambda folder: linked(folder, "/dev/zero", "model.json"),
    "brackets without end": lambda folder: (folder / "model.json").write_text("[" * 10**5),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_directory_is_refused_in_one_line(damage, folder):
    DAMAGES[damage](folder)
    with pytest.raises(UserError) as caught:
        pretrained.load(str(folder))
    assert str(caught.value).startswith(str(folder)) and "\n" not in str(caught.value)


def test_a_field_that_is_newer_than_the_directory_is_at_its_default(folder):
    description = json.loads((folder / "model.json").read_text())
    del description["model"]["join"]
    (folder / "model.json").write_text(json.dumps(description))
    assert pretrained.load(str(folder))[0]["model"]["join"] == "dense"


def test_a_digest_is_told_without_reading_an_array(folder, tmp_path):
    data = (folder / "weights.safetensors").read_bytes()
    (folder / "weights.safetensors").unlink()
    assert pretrained.digest(str(folder)) == hashlib.sha256(data).hexdigest()
    run = small.trained()
    assert len(pretrained.digest(str(run))) == 64
    for name in ("config.json", "checkpoints/5/MANIFEST"):
        (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(run / name, tmp_path / "copy" / name)
    assert pretrained.digest(str(tmp_path / "copy")) == pretrained.digest(str(run))
    for damage in ("checkpoints/5/MANIFEST", "checkpoints/5", "config.json"):
        path = tmp_path / "copy" / damage
        path.rmdir() if path.is_dir() else path.unlink()
        with pytest.raises(UserError):
            pretrained.digest(str(tmp_path / "copy"))


# Runs that start from a directory.


def start_from(path, seed=1, num_classes=10, **changes):
    """A directory with the tiny run's network, and the configuration of a run from it."""
    fields = small.tiny(**changes).model
    variables = variables_of(models.create(fields, num_classes), channels=1, seed=seed)
    description = {"model": fields.to_dict(), "num_classes": num_classes, "image_channels": 1}
    pretrained.save(str(path), description, variables)
    return variables, small.tiny(train__weights=str(path))


def test_a_run_normalises_as_its_weights_say(tmp_path):
    _, config = start_from(tmp_path / "weights")
    config.data.normalization = "weights"
    with pytest.raises(UserError, match="model.json: add mean, std;"):
        small.build(config)
    path = tmp_path / "weights/model.json"
    description = json.loads(path.read_text())
    path.write_text(json.dumps(description | {"mean": [3.0], "std": [2.0]}))
    preparation = small.build(config).task.preparation
    assert (preparation.mean, preparation.std) == ((3.0,), (2.0,))
    path.write_text(
        json.dumps(description | {"mean": [3.0] * 3, "std": [2.0] * 3, "image_channels": 3})
    )
    with pytest.raises(UserError, match="for images of 3 channels, and these have 1"):
        small.build(config)


def test_a_run_starts_from_its_weights(tmp_path):
    variables, config = start_from(tmp_path / "weights")
    experiment = small.build(config)
    state, drawn = experiment.start(), experiment.init()
    small.assert_same_bits({"params": state.params, "batch_stats": state.batch_stats}, variables)
    small.assert_same_bits(
        state.replace(params=0, batch_stats=0), drawn.replace(params=0, batch_stats=0)
    )
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == jax.tree.map(
        lambda leaf: leaf.sharding, experiment.abstract_state
    )


@pytest.mark.parametrize("select", ["last", "best"])
def test_a_run_starts_from_the_checkpoint_of_another_runs_result(tmp_path, select, capsys):
    config = small.tiny(
        checkpoint__select=select,
        data__validation_size=200,
        evaluate__split="validation",
        evaluate__every_epochs=1,
    )
    assert loop.run(config, str(tmp_path / "first"), "train") == 0
    result = json.loads((tmp_path / "first" / "summary.json").read_text())
    config.train.weights = str(tmp_path / "first")
    config.model.dropout_rate = 0.0
    capsys.readouterr()
    assert loop.run(config, str(tmp_path / "second"), "eval") == 0
    assert json.loads(capsys.readouterr().out)["test_loss"] == result["test_loss"]
    description, _ = pretrained.load(str(tmp_path / "first"))
    assert (description["num_classes"], description["image_channels"]) == (10, 1)
    (tmp_path / "first" / "checkpoints").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="first: the run has no checkpoint to start from yet"):
        loop.run(config, str(tmp_path / "second"), "train")


def test_evaluation_alone_needs_no_run(tmp_path, capsys):
    _, config = start_from(tmp_path / "weights")
    assert loop.run(config, str(tmp_path / "run"), "eval") == 0
    printed = json.loads(capsys.readouterr().out)
    experiment = small.build(config)
    assert printed["steps"] == 0 and not (tmp_path / "run").exists()
    assert printed["test_loss"] == experiment.evaluate(experiment.start(), "test")["loss"]
    other = start_from(tmp_path / "other", seed=2)[1]
    assert loop.run(other, str(tmp_path / "run"), "eval") == 0
    assert json.loads(capsys.readouterr().out)["test_loss"] != printed["test_loss"]


def test_a_run_reads_them_once_and_then_its_own_checkpoints(tmp_path, capsys):
    _, config = start_from(tmp_path / "weights")
    config.train.epochs = 1
    assert loop.run(config, str(tmp_path / "run"), "train") == 0
    first, drawn = (
        json.loads((path / "metrics.jsonl").read_text().splitlines()[0])
        for path in (tmp_path / "run", small.trained())
    )
    assert first["step"] == drawn["step"] and first["train_loss"] != drawn["train_loss"]
    shutil.rmtree(tmp_path / "weights")
    config.train.epochs = 2
    assert loop.run(config, str(tmp_path / "run"), "train") == 0
    capsys.readouterr()
    assert loop.run(config, str(tmp_path / "run"), "eval") == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 10


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"num_classes": 7}, "params/head/classifier/bias (7,), not (10,), "),
        ({"model__blocks": (1, 2)}, "unexpected: "),
        ({"model__batch_norm_epsilon": 1e-3}, "model.batch_norm_epsilon = 0.001, not 1e-05"),
    ],
)
def test_weights_of_another_network_are_refused_before_anything_is_written(tmp_path, changes, said):
    path = tmp_path / "weights"
    _, config = start_from(path, **changes)
    with pytest.raises(UserError) as caught:
        loop.run(config, str(tmp_path / "run"), "train")
    line = str(caught.value)
    assert line.startswith(f"train.weights = '{path}': ") and said in line and "\n" not in line
    assert not (tmp_path / "run").exists()


def test_dropout_and_the_form_of_a_block_may_differ(tmp_path):
    start_from(tmp_path / "weights", model__dropout_rate=0.0)
    assert small.build(small.tiny(train__weights=str(tmp_path / "weights"))).weights


def test_a_directory_that_is_not_there_is_refused(tmp_path):
    config = small.tiny(train__weights=str(tmp_path / "nowhere"))
    for mode in ("train", "eval"):
        with pytest.raises(UserError, match="nowhere: not a directory of densejax.pretrained"):
            loop.run(config, str(tmp_path / "run"), mode)
    assert not (tmp_path / "run").exists()
