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
from tests import small

# XLA optimises each of these programs for seconds; they run once.
compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
KERAS = {family: layouts[1].fields for family, layouts in LAYOUTS.items() if family != "vovnet"}
SMALL = models.MODELS["densenet121"] | {"blocks": (2, 1, 1, 1)}
# Of h5py, which Keras gives arrays of JAX.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept:DeprecationWarning"
)


@pytest.fixture(scope="module")
def keras():
    """Keras on JAX; strict dtype promotion is this project's rule, not Keras'."""
    os.environ["KERAS_BACKEND"] = "jax"
    module = importlib.import_module("keras")
    assert module.backend.backend() == "jax"
    module.utils.set_random_seed(0)
    with jax.numpy_dtype_promotion("standard"):
        yield module


def randomise(network):
    """Statistics, scales and biases that no initialiser would give."""
    random = np.random.default_rng(0)
    for variable in network.weights:
        name = variable.path.rpartition("/")[2]
        if name in ("gamma", "moving_variance"):
            variable.assign(random.uniform(0.5, 1.5, variable.shape).astype(np.float32))
        elif name != "kernel":
            variable.assign(random.normal(0, 0.2, variable.shape).astype(np.float32))
    return network


def images(size, number=2):
    return np.random.default_rng(1).normal(size=(number, size, size, 3)).astype(np.float32)


def densenet(**options):
    """Keras' builder with fewer layers."""
    application = importlib.import_module("keras.src.applications.densenet").DenseNet
    return application(blocks=SMALL["blocks"], weights=None, input_shape=(32, 32, 3), **options)


@pytest.fixture(scope="module")
def pair(keras):
    """A small DenseNet of Keras, ours, and the variables converted from Keras'."""
    network = randomise(densenet(classes=7, classifier_activation=None))
    fields = models.fields("densenet121", blocks=SMALL["blocks"], **KERAS["densenet"])
    model = models.create(fields, 7)
    return network, model, pretrained.from_keras(model, network)


def values(variables):
    return [variable.value for variable in variables]


def logits_of(network, image):
    """Keras' logits by one compiled program."""
    trainable, other = network.trainable_variables, network.non_trainable_variables
    return compiled(lambda t, o, x: network.stateless_call(t, o, x, training=False)[0])(
        values(trainable), values(other), image
    )


def assert_close(found, expected, relative):
    error = np.abs(np.asarray(found) - expected).max() / np.abs(expected).max()
    assert error < relative, error


def test_logits_are_those_of_keras(pair):
    network, model, variables = pair
    expected = np.asarray(logits_of(network, images(32)))
    assert expected.std(axis=0).min() > 0 and expected.std() > 0.1
    assert_close(compiled(model.apply)(variables, images(32))[0], expected, 1e-5)
    other = model.clone(batch_norm_epsilon=1e-3)  # another epsilon would be seen
    with pytest.raises(AssertionError):
        assert_close(compiled(other.apply)(variables, images(32))[0], expected, 1e-5)


@pytest.mark.parametrize(
    "name, application, family",
    [
        pytest.param("densenet121", "DenseNet121", "densenet", marks=pytest.mark.slow),
        pytest.param("resnet50", "ResNet50", "resnet", marks=pytest.mark.slow),
    ],
)
def test_logits_of_a_published_network_are_those_of_keras(keras, name, application, family):
    shape = {"weights": None, "classifier_activation": None, "input_shape": (32, 32, 3)}
    network = randomise(getattr(keras.applications, application)(**shape, classes=11))
    model = models.create(models.fields(name, **KERAS[family]), 11)
    variables = pretrained.from_keras(model, network)
    assert counts.parameters(variables) == sum(v.value.size for v in network.trainable_variables)
    expected = np.asarray(logits_of(network, images(32)))
    assert expected.std(axis=0).min() > 0 and expected.std() > 0.1
    assert_close(compiled(model.apply)(variables, images(32))[0], expected, 1e-4)


def test_gradients_of_training_are_those_of_keras(pair):
    network, model, variables = pair
    image = images(32, number=4)
    direction = np.random.default_rng(2).normal(size=(4, 7)).astype(np.float32)

    def theirs(trainable):
        other = values(network.non_trainable_variables)
        logits, updated = network.stateless_call(trainable, other, image, training=True)
        return (logits * direction).sum(), updated

    def ours(params):
        (logits, _), updates = model.apply(
            variables | {"params": params}, image, True, mutable=["batch_stats"]
        )
        return (logits * direction).sum(), updates["batch_stats"]

    trainable = network.trainable_variables
    differentiate = functools.partial(jax.value_and_grad, has_aux=True)
    (expected, _), gradients = compiled(differentiate(theirs))(values(trainable))
    (found, _), gradient = compiled(differentiate(ours))(variables["params"])
    assert found == pytest.approx(float(expected), rel=1e-4)
    flat = conversion.flatten({"params": gradient})
    by_name = {LAYOUTS["densenet"][1].name(path): array for path, array in flat.items()}
    assert len(trainable) == len(by_name)
    for variable, expected in zip(trainable, gradients, strict=True):
        assert_close(by_name[variable.path], np.asarray(expected), 1e-3)


@pytest.mark.parametrize("form", ["weights", "model"])
def test_a_file_of_the_form_that_keras_publishes(pair, tmp_path, monkeypatch, form):
    h5py = pytest.importorskip("h5py")
    legacy = importlib.import_module("keras.src.legacy.saving.legacy_h5_format")
    network, model, variables = pair
    path, output = tmp_path / "a.h5", str(tmp_path / "new")
    with h5py.File(path, "w") as file:
        group = file if form == "weights" else file.create_group("model_weights")
        legacy.save_weights_to_hdf5_group(group, network)
    monkeypatch.setitem(models.MODELS, "small", SMALL)
    made = pretrained.convert_file("small", str(path), output)
    assert made["num_classes"] == 7 and made["model"]["batch_norm_epsilon"] == 1.001e-5
    small.assert_same_bits(pretrained.load(output)[1], variables)


def test_a_model_within_a_model_and_a_renamed_classifier(keras, tmp_path, monkeypatch):
    pytest.importorskip("h5py")
    inner = densenet(include_top=False, pooling="avg")
    classifier = keras.layers.Dense(5, name="head")
    layers = [keras.Input((32, 32, 3)), inner, keras.layers.Dropout(0.5), classifier]
    network = randomise(keras.Sequential(layers))
    weights = {f"{x.name}/{v.name}": np.asarray(v) for x in inner.layers for v in x.weights}
    weights |= {f"predictions/{v.name}": np.asarray(v) for v in classifier.weights}
    monkeypatch.setitem(models.MODELS, "small", SMALL)
    for form in ("weights.h5", "h5", "keras"):
        path, output = str(tmp_path / f"network.{form}"), str(tmp_path / f"of {form}")
        network.save_weights(path) if form == "weights.h5" else network.save(path)
        made = pretrained.convert_file("small", path, output)
        assert len(made["assumed"]) == 1 and "head/kernel is taken for" in made["assumed"][0]
        description, variables = pretrained.load(output)
        model = models.create(description["model"], 5)
        small.assert_same_bits(variables, pretrained.from_keras(model, weights))
