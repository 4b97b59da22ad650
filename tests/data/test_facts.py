"""What a run remembers of its data is read back, and other data are named."""

import dataclasses
import json

import numpy as np
import pytest

from densejax.config import UserError
from densejax.data import facts
from densejax.data.official import SetInfo

INFO = SetInfo((4, 6, 3), ("cat", "dog"), {"train": 5, "test": 2}, (1.0, 2.0, 3.5), (4.0, 5.0, 6.0))


def grey(*levels):
    return np.stack([np.full((4, 6, 3), level, np.uint8) for level in levels])


def test_the_border_is_the_outermost_pixels():
    image = np.zeros((1, 4, 6, 3), np.uint8)
    image[:, 1:3, 1:5] = 90  # 8 of 24 pixels
    found = facts.brightness(image)
    assert (found["mean value"], found["border"]) == (30, 0)
    found = facts.brightness(90 - image)
    assert (found["mean value"], found["border"]) == (60, 90)


def test_it_is_read_as_it_was_written(tmp_path):
    assert facts.read(tmp_path) is None  # a run that is older than the file
    facts.write(tmp_path, INFO, grey(100, 140))
    found = facts.read(tmp_path)
    assert dataclasses.replace(found, usual_brightness={}) == INFO
    for low, high in found.usual_brightness.values():  # half of their distance beyond the images
        assert low == pytest.approx(80, abs=1) and high == pytest.approx(160, abs=1)
    facts.write(tmp_path, INFO, grey(200))  # a tenth of the largest value, where they are alike
    assert facts.read(tmp_path).usual_brightness["border"] == (180, 220)
    facts.write(tmp_path, INFO, grey(1)[:0])  # no image could be read: none is unusual
    low, high = facts.read(tmp_path).usual_brightness["border"]
    assert low < 0 and high > 255


@pytest.mark.parametrize("text", ["[3]", "no JSON", ""])
def test_a_damaged_file_is_one_line(tmp_path, text):
    (tmp_path / "data.json").write_text(text)
    with pytest.raises(UserError, match="data.json: it is damaged") as caught:
        facts.read(tmp_path)
    assert len(str(caught.value).splitlines()) == 1


def test_a_changed_name_is_damage(tmp_path):
    facts.write(tmp_path, INFO, grey(100))
    text = (tmp_path / "data.json").read_text()
    (tmp_path / "data.json").write_text(text.replace("cat", "cav"))
    with pytest.raises(UserError, match="data.json: it is damaged .its content is not what was wr"):
        facts.read(tmp_path)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"class_names": ("alsatian", "cat")}, r"\(missing dog; new alsatian\): name the data"),
        ({"class_names": ("cat", "dog", "owl")}, r"\(new owl\)"),
        ({"class_names": ("dog", "cat")}, r"\(the same in another order\)"),
        (
            {"mean": (1.0, 2.0, 3.0)},
            r"trained with mean = \(1.0, 2.0, 3.5\), not \(1.0, 2.0, 3.0\)",
        ),
    ],
)
def test_other_data_are_named(tmp_path, changes, says):
    facts.require_same(tmp_path, INFO)
    facts.write(tmp_path, INFO, grey(100))
    facts.require_same(tmp_path, INFO)
    with pytest.raises(UserError, match=says):
        facts.require_same(tmp_path, dataclasses.replace(INFO, **changes))


# --- Weights.


def levels(directory):
    found = facts.of_weights(directory, ("mean", "std"))
    return found["mean"], found["std"]


@pytest.fixture
def weights(tmp_path):
    """Writes a model.json; returns its folder."""

    def make(**description):
        description = {
            "num_classes": 7,
            "image_channels": 3,
            "model": {"family": "densenet"},
            **description,
        }
        (tmp_path / "model.json").write_text(json.dumps(description))
        return str(tmp_path)

    return make


def test_levels_are_those_of_the_weights(weights, tmp_path):
    # torchvision: mean (0.485, 0.456, 0.406) and std (0.229, 0.224, 0.225) of images in [0, 1]
    mean, std = levels(weights(num_classes=1000))
    np.testing.assert_allclose(np.array(mean) / 255, [0.485, 0.456, 0.406], rtol=1e-12)
    np.testing.assert_allclose(np.array(std) / 255, [0.229, 0.224, 0.225], rtol=1e-12)
    assert levels(weights(mean=[1, 2, 3], std=[4, 5, 6])) == ((1, 2, 3), (4, 5, 6))
    facts.write(tmp_path, INFO, grey(100))  # a run that others start from
    assert levels(str(tmp_path)) == (INFO.mean, INFO.std)


@pytest.mark.parametrize(
    ("description", "says"),
    [
        ({}, "model.json: add mean, std;"),
        ({"mean": [1, 2, 3], "std": [1, 2, 0]}, r"std = \[1, 2, 0\]: give 3 above 0"),
        ({"names": "keras", "model": {"family": "resnet"}}, "order blue, green, red"),
        ({"model": 3}, "no model.json that can be read"),
    ],
)
def test_weights_without_levels_are_refused(weights, description, says):
    with pytest.raises(UserError, match=says):
        levels(weights(**description))


def test_no_weights_are_refused(tmp_path):
    with pytest.raises(UserError, match="no model.json that can be read"):
        levels(str(tmp_path))
    with pytest.raises(UserError, match="densenet121.pth': there is no such file or directory"):
        levels(str(tmp_path / "densenet121.pth"))
