"""Keras Applications, on its JAX backend, computes what our networks do from its weights."""

import functools
import importlib
import os

import jax
import numpy as np
import pytest

from densejax import models, pretrained
from densejax.models import counts
from densejax.weights import conversion
from densejax.weights.names import LAYOUTS

# XLA optimises each of these programs for seconds; they run once.
compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
KERAS = {family: layouts[1].fields for family, layouts in LAYOUTS.items() if family != "vovnet"}


@pytest.fixture(scope="module")
def keras():
    """Keras on JAX; strict dtype promotion is this project's rule, not Keras'."""
    os.environ["KERAS_BACKEND"] = "jax"
    module = importlib.import_module("keras")
    assert module.backend.backend() == "jax"
    with jax.numpy_dtype_promotion("standard"):
        yield module


def randomise(network, seed=0):
    """Statistics, scales and biases that no initialiser would give."""
    random = np.random.default_rng(seed)
    for variable in network.weights:
        name = variable.path.rpartition("/")[2]
        if name in ("gamma", "moving_variance"):
            variable.assign(random.uniform(0.5, 1.5, variable.shape).astype(np.float32))
        elif name != "kernel":
            variable.assign(random.normal(0, 0.2, variable.shape).astype(np.float32))
    return network


def images(size, number=2):
    return np.random.default_rng(1).normal(size=(number, size, size, 3)).astype(np.float32)


def small_densenet(keras):
    """Keras' builder with fewer layers, and ours."""
    application = importlib.import_module("keras.src.applications.densenet").DenseNet
    network = application(
        blocks=[2, 1, 1, 1],
        weights=None,
        input_shape=(32, 32, 3),
        classes=7,
        classifier_activation=None,
    )
    fields = models.fields("densenet121", blocks=(2, 1, 1, 1), **KERAS["densenet"])
    return randomise(network), models.create(fields, 7)


def logits_of(network, image):
    """Keras' logits by one compiled program."""
    trainable, other = ([v.value for v in part] for part in split(network))
    return compiled(lambda t, o, x: network.stateless_call(t, o, x, training=False)[0])(
        trainable, other, image
    )


def split(network):
    return network.trainable_variables, network.non_trainable_variables


def assert_close(found, expected, relative):
    error = np.abs(np.asarray(found) - expected).max() / np.abs(expected).max()
    assert error < relative, error


@pytest.mark.parametrize(
    "name, application, family",
    [("densenet121", "DenseNet121", "densenet"), ("resnet50", "ResNet50", "resnet")],
)
def test_logits_are_those_of_keras(keras, name, application, family):
    shape = {"weights": None, "classifier_activation": None, "input_shape": (64, 64, 3)}
    network = randomise(getattr(keras.applications, application)(**shape, classes=11))
    model = models.create(models.fields(name, **KERAS[family]), 11)
    variables = pretrained.from_keras(model, network)
    assert counts.parameters(variables) == sum(v.value.size for v in network.trainable_variables)
    image = images(64)
    expected = np.asarray(logits_of(network, image))
    assert expected.std(axis=0).min() > 0 and expected.std() > 0.1
    assert_close(compiled(model.apply)(variables, image)[0], expected, 1e-4)


def test_another_epsilon_would_be_seen(keras):
    network, model = small_densenet(keras)
    expected = np.asarray(logits_of(network, images(32)))
    variables = pretrained.from_keras(model, network)
    assert_close(compiled(model.apply)(variables, images(32))[0], expected, 1e-5)
    other = model.clone(batch_norm_epsilon=1e-3)
    with pytest.raises(AssertionError):
        assert_close(compiled(other.apply)(variables, images(32))[0], expected, 1e-5)


def test_gradients_of_training_are_those_of_keras(keras):
    network, model = small_densenet(keras)
    variables, image = pretrained.from_keras(model, network), images(32, number=4)
    direction = np.random.default_rng(2).normal(size=(4, 7)).astype(np.float32)

    def theirs(trainable):
        other = [variable.value for variable in network.non_trainable_variables]
        logits, updated = network.stateless_call(trainable, other, image, training=True)
        return (logits * direction).sum(), updated

    def ours(params):
        (logits, _), updates = model.apply(
            variables | {"params": params}, image, True, mutable=["batch_stats"]
        )
        return (logits * direction).sum(), updates["batch_stats"]

    values = [variable.value for variable in network.trainable_variables]
    (expected, _), gradients = compiled(jax.value_and_grad(theirs, has_aux=True))(values)
    (found, _), gradient = compiled(jax.value_and_grad(ours, has_aux=True))(variables["params"])
    assert found == pytest.approx(float(expected), rel=1e-4)
    paths = {
        LAYOUTS["densenet"][1].name(path): path for path in conversion.flatten({"params": gradient})
    }
    flat = conversion.flatten({"params": gradient})
    assert len(values) == len(flat)
    for variable, theirs_ in zip(network.trainable_variables, gradients, strict=True):
        assert_close(flat[paths[variable.path]], np.asarray(theirs_), 1e-3)


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")
def test_a_file_of_the_form_that_keras_publishes(keras, tmp_path, monkeypatch):
    h5py = pytest.importorskip("h5py")
    legacy = importlib.import_module("keras.src.legacy.saving.legacy_h5_format")
    network, _ = small_densenet(keras)
    for name in ("weights.h5", "model.h5"):
        with h5py.File(tmp_path / name, "w") as file:
            group = file if name == "weights.h5" else file.create_group("model_weights")
            legacy.save_weights_to_hdf5_group(group, network)
    small = models.MODELS["densenet121"] | {"blocks": (2, 1, 1, 1)}
    monkeypatch.setitem(models.MODELS, "small", small)
    for name in ("weights.h5", "model.h5"):
        output = str(tmp_path / f"{name}.out")
        made = pretrained.convert_file("small", str(tmp_path / name), output)
        assert made["num_classes"] == 7 and made["model"]["batch_norm_epsilon"] == 1.001e-5
        description, variables = pretrained.load(output)
        model = models.create(description["model"], 7)
        expected = np.asarray(logits_of(network, images(32)))
        assert_close(compiled(model.apply)(variables, images(32))[0], expected, 1e-5)


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")
@pytest.mark.parametrize("form", ["weights.h5", "h5", "keras"])
def test_a_model_within_a_model_and_a_renamed_classifier(keras, tmp_path, monkeypatch, form):
    pytest.importorskip("h5py")
    inner = importlib.import_module("keras.src.applications.densenet").DenseNet(
        blocks=[2, 1, 1, 1],
        weights=None,
        input_shape=(32, 32, 3),
        include_top=False,
        pooling="avg",
    )
    head = [keras.layers.Dropout(0.5), keras.layers.Dense(5, name="head")]
    network = randomise(keras.Sequential([keras.Input((32, 32, 3)), inner, *head]))
    path, output = str(tmp_path / f"network.{form}"), str(tmp_path / "out")
    network.save_weights(path) if form == "weights.h5" else network.save(path)
    small = models.MODELS["densenet121"] | {"blocks": (2, 1, 1, 1)}
    monkeypatch.setitem(models.MODELS, "small", small)
    made = pretrained.convert_file("small", path, output)
    assert len(made["assumed"]) == 1 and "head/kernel is taken for" in made["assumed"][0]
    description, variables = pretrained.load(output)
    model = models.create(description["model"], 5)
    expected = np.asarray(logits_of(network, images(32)))
    assert_close(compiled(model.apply)(variables, images(32))[0], expected, 1e-5)


def test_the_numbers_of_keras_are_known():
    """ResNet50's and DenseNet121's trainable parameters, as Keras prints them."""
    image = (64, 64, 3)
    for name, family, number in (
        ("resnet50", "resnet", 25_583_592),
        ("densenet121", "densenet", 7_978_856),
    ):
        model = models.create(models.fields(name, **KERAS[family]), 1000)
        assert counts.of_network(model, image)[0] == number
