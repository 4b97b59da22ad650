"""`densejax.create`: a network by name, with drawn or given variables."""

import jax
import numpy as np
import pytest

import densejax
from densejax import models
from densejax.config import UserError
from densejax.models import counts
from densejax.weights import store
from tests import small

SMALL = {"depth": None, "blocks": (1, 1), "growth_rate": 2}


def test_three_lines_classify_an_image():
    photograph = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    model, variables = densejax.create("densenet_bc_40_12", num_classes=10, **SMALL)
    image = (photograph - (123.675, 116.28, 103.53)) / (58.395, 57.12, 57.375)
    logits, features = jax.eval_shape(model.apply, variables, image[None].astype("float32"))
    assert (logits.shape, logits.dtype) == ((1, 10), np.float32)
    names = {"stem", "block1", "transition1", "block2", "final", "pooled"}
    assert features.keys() == names  # test_families.py has their order


def test_variables_are_drawn_from_seed_0():
    model, variables = densejax.create("densenet_bc_40_12", num_classes=10, **SMALL)
    options = {"xla_backend_optimization_level": 0}
    drawn = jax.jit(model.init, compiler_options=options)(
        jax.random.key(0), np.zeros((1, 8, 8, 3), np.float32)
    )
    assert small.distance(variables, drawn) < 1e-6
    assert counts.parameters(variables) == counts.of_network(model, (32, 32, 3))[0]


def test_variables_can_be_drawn_within_a_traced_function():
    def drawn():
        return densejax.create("densenet_bc_40_12", num_classes=10, **SMALL)[1]

    alone, options = drawn(), {"xla_backend_optimization_level": 0}
    assert jax.tree.map(np.shape, jax.eval_shape(drawn)) == jax.tree.map(np.shape, alone)
    assert small.distance(jax.jit(drawn, compiler_options=options)(), alone) < 1e-6


def test_images_may_have_another_number_of_channels():
    model, variables = densejax.create("densenet_bc_40_12", num_classes=0, channels=1, **SMALL)
    images = np.zeros((2, 8, 8, 1), np.float32)
    logits, features = jax.eval_shape(model.apply, variables, images)
    assert logits is None and features["pooled"].shape == (2, 5)


@pytest.fixture
def weights(monkeypatch):
    """A directory that densejax.pretrained reads as a network of seven classes."""
    fields = dict(models.fields("densenet_bc_40_12", **SMALL, batch_norm_epsilon=0.5))
    model = models.create(models.fields("densenet_bc_40_12", **SMALL), 7)
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 8, 8, 3), np.float32))
    variables = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.5, np.float32), shapes)
    description = {"model": fields, "num_classes": 7, "image_channels": 3}
    monkeypatch.setattr(store, "load", lambda directory: (description, variables))
    return variables


def test_weights_bring_what_they_do_not_show(weights):
    model, variables = densejax.create(
        "densenet_bc_40_12", num_classes=7, weights="x", dropout_rate=0.2, **SMALL
    )
    small.assert_same_bits(variables, weights)
    assert (model.batch_norm_epsilon, model.dropout_rate) == (0.5, 0.2)


@pytest.mark.parametrize(
    ("name", "classes", "fields"),
    [
        ("densenet_bc_40_12", 10, SMALL),
        ("resnet20_cifar", 7, {}),
    ],
)
def test_weights_of_another_network_are_refused(weights, name, classes, fields):
    own = "weights=x: of densenet with blocks = .* with 7 classes, "
    with pytest.raises(UserError, match=f"{own}not of a {name} with {classes} classes"):
        densejax.create(name, num_classes=classes, weights="x", **fields)


@pytest.mark.parametrize("name", ["plain20_cifar", "resnet20_cifar"])
def test_weights_of_a_network_that_is_joined_otherwise_are_refused(monkeypatch, name):
    (theirs,) = {"plain20_cifar", "resnet20_cifar"} - {name}
    fields = {"blocks": (1, 1), "widths": (4, 8)}
    section = dict(models.fields(theirs, **fields))
    model = models.create(section, 10)
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 8, 8, 3), np.float32))
    variables = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    description = {"model": section, "num_classes": 10, "image_channels": 3}
    monkeypatch.setattr(store, "load", lambda directory: (description, variables))
    found, _ = densejax.create(theirs, 10, weights="x", **fields)
    assert found.connect == section["connect"]
    with pytest.raises(UserError, match=f"weights=x: .* not of a {name} with 10 classes"):
        densejax.create(name, 10, weights="x", **fields)


def test_unknown_names_and_fields_are_refused():
    with pytest.raises(UserError, match="model = 'densenet' .did you mean densenet"):
        densejax.create("densenet")
    with pytest.raises(UserError, match="model.width: densenet has "):
        densejax.create("densenet121", width=3)
