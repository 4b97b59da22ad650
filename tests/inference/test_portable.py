"""A network taken elsewhere: its arrays bit for bit, its facts, and code of the card that runs."""

# ruff: noqa: F401, F811 (a fixture is imported)

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors

from densejax import export, models, pretrained
from densejax.data import builders
from densejax.data.augment import Preparation
from densejax.inference import classifier, portable
from densejax.weights.names import PEERS
from tests import small
from tests.test_command_line import command, one_line

pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


@pytest.fixture
def run_export(command):
    return functools.partial(command, main=export.main, config="unused")


def test_what_is_written_gives_the_same_logits(run_export, tmp_path, monkeypatch):
    folder, run = tmp_path / "out", f"--workdir={small.trained()}"
    code, output, error = run_export(run, "--names=torchvision", f"--output={folder}")
    assert (code, error) == (0, "") and "is known to compute the same, 10 classes" in output
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "model.safetensors"]

    network, facts = classifier.load(small.trained()), builders.SETS["digits"]
    fields = {name: value for name, value in small.tiny().model.items() if name != "dropout_rate"}
    monkeypatch.setitem(models.MODELS, "tiny", fields)
    pretrained.convert_file("tiny", str(folder / "model.safetensors"), str(tmp_path / "again"))
    description, variables = pretrained.load(str(tmp_path / "again"))
    small.assert_same_bits(variables, network.variables)
    image = np.random.default_rng(0).normal(size=(5, 8, 8, 1)).astype(np.float32)
    logits = [
        np.asarray(jax.jit(model.apply)(weights, image)[0])
        for model, weights in (
            (models.create(description["model"], 10), variables),
            (network.model, network.variables),
        )
    ]
    assert np.ptp(logits[0]) > 0.1 and logits[0].tobytes() == logits[1].tobytes()

    with safetensors.safe_open(folder / "model.safetensors", "numpy") as file:
        found = {
            key: json.loads(value) for key, value in file.metadata().items() if key != "format"
        }
    # A white pixel of a digit is 16 in memory, and 1 elsewhere.
    assert found["class_names"] == list("0123456789") and found["image_shape"] == [8, 8, 1]
    assert found["mean"] == pytest.approx([facts.mean[0] / 16])
    assert found["std"] == pytest.approx([facts.std[0] / 16])

    card = (folder / "README.md").read_text()
    summary = json.loads((small.trained() / "summary.json").read_text())
    accuracy = f"test accuracy {100 * summary['test_accuracy']:.2f} % on 360 images"
    assert accuracy in card and f"{summary['parameters']:,} parameters" in card
    assert "names of torchvision; no network" in card and '"train.batch_size": 256' in card
    monkeypatch.chdir(folder)
    (block,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    made = {}
    exec(block, made)
    small.assert_same_bits(made["variables"], network.variables)


def test_bad_input_is_one_line(run_export, tmp_path):
    run = f"--workdir={small.trained()}"
    for arguments, says in (
        (["--names=timm", "--platforms=cpu"], "--names=timm: weights are for any platform"),
        (
            ["--names=caffe"],
            "project = 'caffe': has no names for a DenseNet; known are torchvision",
        ),
        (["--names=timm", f"--output={tmp_path}"], f"--output={tmp_path}: exists; name a new"),
    ):
        assert one_line(run_export(run, "--output=/none", *arguments)).startswith(says)


def stand_in(name, channels=3, **fields):
    """A classifier of a named network, of five classes, whose numbers are all zero."""
    model = models.create(models.fields(name, **fields), 5, jnp.dtype("bfloat16"), "data")
    image = jax.ShapeDtypeStruct((1, 224, 224, channels), jnp.float32)
    shapes = jax.eval_shape(model.clone(batch_norm_axis=None).init, jax.random.key(0), image)
    variables = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    settings = Preparation((51.0,) * channels, (102.0,) * channels)
    shape = (224, 224, channels)
    return classifier.Classifier(model, variables, settings, shape, tuple("abcde"), 256)


@pytest.mark.parametrize(
    ("name", "fields", "channels", "torchvision", "timm"),
    [
        (
            "densenet121",
            {"dropout_rate": 0.2, "recompute": "block"},
            3,
            "densenet121",
            "densenet121",
        ),
        ("densenet121", {}, 1, "", "densenet121"),
        ("densenet121", {"batch_norm_epsilon": 1e-3}, 3, "", ""),
        ("densenet121", {"connect": "window:size=2"}, 3, "", ""),
        ("densenet264", {}, 3, "", ""),
        ("resnet50", {"zero_init": True}, 3, "resnet50", "resnet50"),
        ("resnet50", {"stride_on": "1x1"}, 3, "", ""),
        ("resnet18", {"survival": 0.5}, 3, "", ""),  # scaled in an evaluation, too
        ("vovnet39", {"identity": False}, 3, None, "vovnet39a"),
        ("vovnet39", {"identity": True}, 3, None, ""),
        ("rdnet_tiny", {"head_norm_epsilon": 1e-6, "drop_path": 0.1}, 3, None, "rdnet_tiny"),
    ],
)
def test_a_project_has_the_network_that_computes_the_same(
    name, fields, channels, torchvision, timm
):
    model = models.create(models.fields(name, **fields), 5, jnp.dtype("bfloat16"), "data")
    shape = (224, 224, channels)
    network = classifier.Classifier(model, {}, Preparation((0,), (1,)), shape, tuple("abcde"))
    for project, expected in (("torchvision", torchvision), ("timm", timm)):
        if expected is not None:
            assert portable.peer_of(network, project) == expected
    assert {name for peers in PEERS.values() for name in peers} <= set(models.MODELS)


def test_timm_reads_a_configuration(tmp_path, monkeypatch):
    few = {"blocks": (1, 1), "growth_rate": 4, "stem_width": 8}  # by the same name
    monkeypatch.setitem(models.MODELS, "densenet121", models.MODELS["densenet121"] | few)
    network = stand_in("densenet121", channels=1)
    pretrained.save(
        tmp_path / "source",
        {"model": {}, "num_classes": 5, "image_channels": 1, "source": "x.pth"},
        network.variables,
    )
    assert (
        portable.write(network, tmp_path / "source", "timm", str(tmp_path / "out")) == "densenet121"
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.pop("pretrained_cfg") == {
        "input_size": [1, 224, 224],
        "interpolation": "bilinear",
        "crop_pct": 0.875,
        "mean": [0.2],
        "std": [0.4],
        "classifier": "classifier",
    }
    assert config == {
        "architecture": "densenet121",
        "num_classes": 5,
        "label_names": list("abcde"),
        "model_args": {"in_chans": 1},
    }
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: timm\n") and "converted from `x.pth`" in card
    assert 'timm.create_model("local-dir:.", pretrained=True)' in card
    assert "224x224, 1 channels, the middle of an image whose shorter side has 256" in card
