"""An exported network runs where the package is not, on any number of images."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from densejax import export, models
from densejax.data import builders
from densejax.data.augment import Preparation
from densejax.inference import classifier
from tests import small
from tests.test_command_line import ROOT, command, one_line  # noqa: F401

# What somebody types who does not have the package: importing it raises.
STRANGER = """
import sys
sys.modules["densejax"] = None
import jax, numpy as np
function = jax.export.deserialize(open("network.bin", "rb").read())
images = np.load("images.npy")
np.save("logits.npy", function.call(images))
np.save("one.npy", function.call(images[:1]))
"""


@pytest.fixture
def run_export(command):  # noqa: F811
    return functools.partial(command, main=export.main, config="unused")


def test_a_stranger_computes_the_network_s_logits(run_export, tmp_path):
    code, output, error = run_export(
        f"--workdir={small.trained()}", f"--output={tmp_path}/network.bin"
    )
    assert (code, error) == (0, "")
    assert output.startswith(f"{tmp_path}/network.bin: ")
    assert "uint8 [batch, 8, 8, 1] -> float32 [batch, 10], for cpu, cuda, tpu" in output
    images, _ = builders.read("digits", "test", str(small.SESSION / "data"))
    np.save(tmp_path / "images.npy", images[:7])
    flat = os.path.dirname(os.path.dirname(sys.modules["flatbuffers"].__file__))
    environment = os.environ | {"PYTHONPATH": flat, "JAX_PLATFORMS": "cpu"}
    words = [sys.executable, "-c", STRANGER]
    answer = subprocess.run(
        words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert (answer.returncode, answer.stderr) == (0, "")

    network, facts = classifier.load(small.trained()), builders.SETS["digits"]
    normalised = (images[:7].astype(np.float32) - np.float32(facts.mean)) / np.float32(facts.std)
    expected, _ = jax.jit(network.model.apply)(network.variables, normalised)
    logits, one = np.load(tmp_path / "logits.npy"), np.load(tmp_path / "one.npy")
    assert logits.dtype == np.float32 and np.ptp(logits) > 0.1
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(one, expected[:1], rtol=0, atol=1e-5)


def drawn(fields, image_shape, dtype="float32", image_size=0):
    """A classifier of seven classes with variables drawn at random."""
    model = models.create(fields, 7, jnp.dtype(dtype))
    size = image_size or image_shape[0]
    image = jax.ShapeDtypeStruct((1, size, size, image_shape[2]), jnp.float32)
    generator = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda leaf: generator.uniform(0.1, 0.5, leaf.shape).astype(np.float32),
        jax.eval_shape(model.clone(dtype=jnp.float32).init, jax.random.key(0), image),
    )
    preparation = Preparation((9.0,), (99.0,), image_size=image_size, dtype=dtype)
    return classifier.Classifier(model, variables, preparation, image_shape, tuple("abcdefg"))


SMALL = {"depth": None, "blocks": (1, 1), "growth_rate": 2}


@pytest.mark.parametrize(
    ("name", "changes", "dtype"),
    [
        ("densenet_bc_40_12", SMALL | {"stem": "imagenet"}, "bfloat16"),
        ("densenet_one_shot_19_43", SMALL, "float32"),
        ("resnet20_cifar", {"blocks": (1, 1, 1)}, "float32"),
        ("preact_resnet164", {"blocks": (1, 1), "widths": (2, 4), "survival": 0.5}, "float32"),
        ("vovnet27_slim", {"module_depth": 1}, "float32"),
        ("rdnet_cifar", {"growth_rates": (8,), "downsampling": ()}, "bfloat16"),
        ("resnet18", {"blocks": (1, 1), "widths": (2, 4)}, "float32"),
        ("hardnet68", {"blocks": (1,) * 5}, "float32"),
    ],
)
def test_every_family_takes_any_number_of_images(name, changes, dtype):
    network = drawn(models.fields(name, **changes), (32, 32, 3), dtype)
    with jax.numpy_dtype_promotion("standard"):  # Linen's BatchNorm mixes bfloat16 and float32
        exported = jax.export.deserialize(network.serialised(("cpu", "cuda", "tpu")))
    assert exported.platforms == ("cpu", "cuda", "tpu")
    (images,), (logits,) = exported.in_avals, exported.out_avals
    assert (images.dtype, images.shape[1:]) == (np.uint8, (32, 32, 3))
    assert (logits.dtype, logits.shape[1]) == (np.float32, 7)
    assert images.shape[0] == logits.shape[0] and str(logits.shape[0]) == "batch"
    assert "stablehlo.gather" not in str(exported.mlir_module())


def test_resizing_is_part_of_it():
    network = drawn(models.fields("densenet_bc_40_12", **SMALL), (8, 8, 1), image_size=12)
    exported = jax.export.deserialize(network.serialised(("cpu",)))
    images = np.random.default_rng(1).integers(0, 256, (3, 8, 8, 1)).astype(np.uint8)
    assert exported.platforms == ("cpu",)
    expected = jax.jit(network.logits)(network.variables, images)
    np.testing.assert_allclose(exported.call(images), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "--workdir: give a value"),
        (["--workdir=configs"], "--output: give a value"),
        (["--workdir=configs", "--output=x"], "--workdir=configs: neither a run's directory"),
        (["--workdir=x", "--output=x", "--platforms=gpu"], "--platforms=gpu: allowed are cpu, "),
        (["--workdir=x", "--output=x", "--platforms="], "--platforms=: give a value"),
        (["--workdir={run}", "--output=/none/x"], "--output=/none/x: No such file or directory"),
        (["--output=x", "stray"], "'stray' is no flag"),
    ],
)
def test_bad_input_is_one_line(run_export, arguments, says):
    arguments = [argument.replace("{run}", str(small.trained())) for argument in arguments]
    assert one_line(run_export(*arguments)).startswith(says)


@pytest.mark.slow
def test_the_real_command_needs_no_card():
    words = [sys.executable, "-m", "densejax.export"]
    answer = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    line = one_line((answer.returncode, answer.stdout, answer.stderr))
    assert line.startswith("--workdir: give a value")
