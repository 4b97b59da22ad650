"""What is opened from a directory: the checkpoint that was chosen, or other projects' weights."""

import json
import types

import jax
import numpy as np
import pytest

from densejax import models
from densejax.config import UserError
from densejax.inference import classifier
from densejax.training import experiment
from tests import small


@pytest.fixture(scope="module")
def first_state():
    """The state of a tiny run before its first step."""
    return experiment.build(small.tiny()).init()


def shifted(state, by):
    return state.replace(params=jax.tree.map(lambda leaf: leaf + by, state.params))


def test_the_newest_checkpoint_is_taken(tmp_path, first_state):
    states = [(step, shifted(first_state, float(step)), {}) for step in (1, 2)]
    network = classifier.load(small.saved(tmp_path / "run", small.tiny(), *states))
    small.assert_same_bits(network.variables["params"], states[-1][1].params)
    small.assert_same_bits(network.variables["batch_stats"], first_state.batch_stats)
    assert network.image_shape == (8, 8, 1)
    assert network.class_names == tuple("0123456789")


def test_the_best_checkpoint_is_taken_where_the_run_chose_it(tmp_path, first_state):
    config = small.tiny(
        data__validation_size=100, evaluate__split="validation", checkpoint__select="best"
    )
    states = [
        (step, shifted(first_state, float(step)), {"validation_error": error})
        for step, error in ((1, 0.3), (2, 0.1), (3, 0.2))
    ]
    network = classifier.load(small.saved(tmp_path / "run", config, *states))
    small.assert_same_bits(network.variables["params"], states[1][1].params)


def test_the_preparation_is_the_run_s_without_augmentation(tmp_path, first_state):
    config = small.tiny(data__normalization="scale", data__image_size=16)
    path = small.saved(tmp_path / "run", config, (1, first_state, {}))
    images = np.full((2, 8, 8, 1), 51, np.uint8)
    prepared = classifier.load(path).preparation.evaluation(images)
    np.testing.assert_allclose(prepared, np.full((2, 16, 16, 1), 0.2), rtol=1e-6)


def test_a_run_that_is_older_than_a_key_is_opened(tmp_path, first_state):
    path = small.saved(tmp_path / "run", small.tiny(), (1, first_state, {}))
    config = json.loads((path / "config.json").read_text())
    del config["model"]["connect"], config["model"]["stem"], config["log"]["seconds"]
    (path / "config.json").write_text(json.dumps(config))
    network = classifier.load(path)
    small.assert_same_bits(network.variables["params"], first_state.params)
    config["train"]["epoch"] = 3
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="unknown key train.epoch "):
        classifier.load(path)


def test_a_run_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(UserError, match="run: there is no checkpoint in it yet; train first"):
        classifier.load(small.saved(tmp_path / "run", small.tiny()))


@pytest.mark.parametrize(
    "content",
    [None, "", "[3]", "{}", '{"model": {"family": "x"}}', '{"model": 3}', "\0", "[" * 10**5],
)
def test_what_is_no_directory_of_a_run_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError) as caught:
        classifier.load(tmp_path)
    assert len(str(caught.value).splitlines()) == 1


# --- Weights of other projects; their reading is tested with densejax.pretrained.


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """Makes a directory of weights of a tiny network with the given description."""

    def make(**description):
        fields = models.fields("densenet_bc_40_12", depth=None, blocks=(1, 1), growth_rate=2)
        description = {"num_classes": 3, "image_channels": 3, **description}
        description = {"model": fields.to_dict(), **description}
        model = models.create(description["model"], description["num_classes"])
        image = np.zeros((1, 8, 8, 3), np.float32)
        variables = jax.tree.map(
            lambda leaf: np.full(leaf.shape, 0.5, np.float32),
            jax.eval_shape(model.init, jax.random.key(0), image),
        )
        (tmp_path / "model.json").write_text(json.dumps(description))
        stub = types.SimpleNamespace(load=lambda directory: (description, variables))
        monkeypatch.setattr(classifier, "store", stub)
        return tmp_path

    return make


FACTS = {"image_shape": [8, 8, 3], "mean": [1.0, 2.0, 3.0], "std": [4.0, 5.0, 6.0]}


def test_weights_are_opened_by_their_description(weights):
    network = classifier.load(weights(**FACTS, class_names=["a", "b", "c"]))
    assert (network.image_shape, network.class_names) == ((8, 8, 3), ("a", "b", "c"))
    images = np.full((1, 8, 8, 3), 13, np.uint8)
    prepared = network.preparation.evaluation(images)
    np.testing.assert_allclose(prepared[0, 0, 0], [12 / 4, 11 / 5, 10 / 6], rtol=1e-6)
    logits = jax.jit(network.logits)(network.variables, images)
    assert (logits.shape, logits.dtype) == ((1, 3), np.float32)


def test_imagenet_s_facts_are_known(weights):
    network = classifier.load(weights(num_classes=1000, image_channels=3))
    assert network.image_shape == (224, 224, 3)
    assert network.class_names[999] == "999"
    # torchvision: mean (0.485, 0.456, 0.406) and std (0.229, 0.224, 0.225) of images in [0, 1]
    white = network.preparation.evaluation(np.full((1, 1, 1, 3), 255, np.uint8))[0, 0, 0]
    np.testing.assert_allclose(white, [2.2489, 2.4286, 2.64], atol=1e-4)


@pytest.mark.parametrize(
    ("description", "says"),
    [
        ({}, "model.json: add image_shape, mean, std;"),
        ({**FACTS, "image_shape": [8, 8, 1]}, r"image_shape = \[8, 8, 1\]: give \[height, width, "),
        ({**FACTS, "image_shape": [8, 8.5, 3]}, "image_shape = "),
        ({**FACTS, "image_shape": 8}, "image_shape = 8: give "),
        ({**FACTS, "mean": [1.0]}, r"mean = \[1.0\]: give 3 numbers from 0 to 255"),
        ({**FACTS, "mean": [1, 2, float("nan")]}, "mean = "),
        ({**FACTS, "std": [1, 2, 0]}, r"std = \[1, 2, 0\]: give 3 above 0"),
        ({**FACTS, "class_names": ["a", "b"]}, r"class_names = \['a', 'b'\]: give 3 names"),
        ({**FACTS, "class_names": "abc"}, "class_names = 'abc': give 3 names"),
        ({**FACTS, "num_classes": 0}, "without a classifier"),
        ({"names": "keras", "model": dict(models.fields("resnet20_cifar"))}, "Keras' ResNets"),
    ],
)
def test_weights_that_cannot_see_an_image_are_refused(weights, description, says):
    with pytest.raises(UserError, match=says):
        classifier.load(weights(**description))


@pytest.mark.parametrize("classes", [0, 9])
def test_the_network_alone_needs_no_facts_of_images(weights, classes):
    model, variables = classifier.network(weights(num_classes=classes))
    assert model.num_classes == classes and set(variables) == {"params", "batch_stats"}


def test_weights_are_for_the_middle_of_files(weights):
    assert classifier.load(weights(num_classes=1000)).resize_size == 256  # torchvision's
    assert classifier.load(weights(**FACTS)).resize_size == 0  # small images are not cropped
    tall = FACTS | {"image_shape": [128, 96, 3]}
    assert classifier.load(weights(**tall)).resize_size == 0  # a file has a middle of that shape
