"""A set of arrays trains as the same set from its files does; what is no set is one line."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from densejax import data
from densejax.config import UserError
from densejax.data import added, builders
from densejax.inference import classifier, prediction
from densejax.training import loop, parallel
from tests import small


@pytest.fixture(autouse=True)
def forget():
    yield
    added.ADDED.clear()


def digits():
    """The arrays of the official set."""
    folder = str(small.SESSION / "data")
    return {split: builders.read("digits", split, folder) for split in ("train", "test")}


def config(**changes):
    return small.tiny(data__name="mine", data__directory="/nowhere", **changes)


@pytest.mark.slow
def test_a_run_on_arrays_is_the_run_on_the_set_that_they_are_of(tmp_path):
    """Metrics and weights, bit for bit; another process that has no arrays still predicts."""
    official, arrays, changes = small.trained(), tmp_path / "arrays", {"train__epochs": 1}
    levels = {key: getattr(builders.SETS["digits"], key) for key in ("mean", "std")}
    info = dataclasses.replace(data.add("mine", digits()), **levels)  # they are rounded there
    added.ADDED["mine"] = info, added.ADDED["mine"][1]
    assert loop.run(config(**changes), str(arrays), "train") == 0
    assert (arrays / "metrics.jsonl").read_text() == (official / "metrics.jsonl").read_text()
    first, second = small.restored(arrays), small.restored(official)
    assert first.keys() == second.keys()
    assert all(first[name].tobytes() == second[name].tobytes() for name in first)
    results = [json.loads((path / "summary.json").read_text()) for path in (arrays, official)]
    assert results[0]["versions"]["data"] == results[1]["versions"]["data"]
    assert results[0]["test_examples"] == 360
    assert loop.run(config(**changes), str(arrays), "eval") == 0

    added.ADDED.clear()  # as in another process
    Image.new("L", (8, 8), 100).save(tmp_path / "grey.png")
    (found,) = prediction.predict(classifier.load(arrays), (tmp_path / "grey.png",))
    assert len(found["classes"]) == 5
    with pytest.raises(UserError, match="data.name = mine: neither one of .* densejax.data.add"):
        loop.run(config(**changes, seed=1), str(tmp_path / "new"), "train")


def test_facts_are_computed_from_the_training_images():
    arrays = digits()
    info = data.add("mine", arrays | {"extra": arrays["test"]}, list("abcdefghij"))
    images = arrays["train"][0] / 1.0
    assert info == data.info(config())
    assert (info.image_shape, info.class_names) == ((8, 8, 1), tuple("abcdefghij"))
    assert info.splits == {"train": 1437, "test": 360, "extra": 360}
    np.testing.assert_allclose((*info.mean, *info.std), (images.mean(), images.std()), rtol=1e-12)
    assert data.add("mine", arrays).class_names == tuple("0123456789")
    assert data.train_size(config(data__validation_size=37), info) == 1400


def test_other_arrays_are_other_data_and_extra_splits_train():
    arrays = digits()
    data.add("mine", arrays)
    version = data.version(config())
    assert version == data.version(small.tiny())
    arrays["train"][1][0] += 1
    assert data.version(config()) == version  # the set has a copy
    data.add("mine", arrays | {"more": arrays["test"]})
    assert data.version(config()) != version
    mesh = parallel.mesh()
    both = config(data__train_split="train+more")
    found = data.create(both, parallel.replicated(mesh), parallel.split(mesh))
    assert found.train.size == 1437 + 360


def test_measured_training_images_are_of_all_classes():
    arrays = digits()
    images, labels = arrays["train"]
    order = np.argsort(labels, kind="stable")
    data.add("mine", arrays | {"train": (images[order], labels[order])})
    mesh = parallel.mesh()
    measured = config(evaluate__train_images=100)
    found = data.create(measured, parallel.replicated(mesh), parallel.split(mesh))
    examples = found.evaluation["train"].examples(list(range(100)))
    label_of = {image.tobytes(): label for image, label in zip(images, labels, strict=True)}
    assert all(label_of[image.tobytes()] == label for image, label, _ in examples)
    assert {label for _, label, _ in examples} == set(range(10))


IMAGES, LABELS = np.arange(32, dtype=np.uint8).reshape(2, 4, 4, 1), np.array([0, 1])
GOOD = {"train": (IMAGES, LABELS)}


@pytest.mark.parametrize(
    ("splits", "says"),
    [
        ({"test": (IMAGES, LABELS)}, "splits must have 'train'; it has test"),
        ({"train": (IMAGES / 255, LABELS)}, r"train images are float64\[2, 4, 4, 1\], not uint8"),
        ({"train": (IMAGES[..., 0], LABELS)}, r"train images have the shape \[2, 4, 4\]; give"),
        ({"train": (IMAGES[:0], LABELS[:0])}, r"train images have the shape \[0, 4, 4, 1\]; give"),
        (GOOD | {"test": (IMAGES[:, :3], LABELS)}, r"test images are uint8\[2, 3, 4, 1\], not"),
        (GOOD | {"test": (IMAGES, LABELS[:1])}, r"test has labels of the shape \[1\] for 2 images"),
        (
            GOOD | {"test": (IMAGES, LABELS[:, None])},
            r"test has labels of the shape \[2, 1\]",
        ),
        ({"train": (IMAGES, LABELS.astype(str))}, "train has labels of type <U"),
        ({"train": (IMAGES, LABELS + 10**9)}, "train has the label 1000000001; number the"),
        ({"train": (IMAGES,)}, ""),
        ({"train": ([IMAGES[0], IMAGES[0, :3]], LABELS)}, ""),
        ({"train": (IMAGES, LABELS / 2)}, "train has labels of type float64, not integers"),
        ({"train": (IMAGES, LABELS - 1)}, "train has labels -1 to 0, not 0 to 0"),
        (GOOD | {"test": (IMAGES, LABELS + 1)}, "test has labels 1 to 2, not 0 to 1"),
        ({"train": (IMAGES * 0, LABELS)}, "channel 0 of the train images has one value everywhere"),
    ],
)
def test_what_is_no_set_is_one_line(splits, says):
    with pytest.raises(UserError, match=rf"densejax.data.add\('mine'\): {says}") as caught:
        data.add("mine", splits)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["digits", "imagenet2012", ""])
def test_official_names_are_taken(name):
    with pytest.raises(UserError, match="this name is taken"):
        data.add(name, GOOD)


def test_names_of_classes_may_be_numbers():
    assert data.add("numbered", GOOD, class_names=np.arange(2)).class_names == ("0", "1")
