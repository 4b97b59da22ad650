"""The command that cuts connections, on the run that the tests share."""

# ruff: noqa: F401, F811 (a fixture is imported)

import functools
import json

import numpy as np
import pytest

from densejax import cut, data
from densejax.config import UserError
from densejax.data import builders
from densejax.training import experiment
from tests import small
from tests.programs import shared_programs  # noqa: F401
from tests.test_command_line import command, one_line

pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


def test_command(command, tmp_path):
    say = functools.partial(command, main=cut.main, config="unused")
    code, output, error = say(f"--workdir={small.trained()}", f"--output={tmp_path}/new")
    assert (code, error) == (0, "")
    assert output.startswith("360 test images: accuracy ") and "of 4 connections" in output
    assert (tmp_path / "new" / "cut.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((tmp_path / "new" / "cut.json").read_text())
    summary = json.loads((small.trained() / "summary.json").read_text())
    assert (found["split"], found["images"]) == ("test", summary["test_examples"])
    for name in ("loss", "accuracy"):
        assert found["uncut"][name] == pytest.approx(summary[f"test_{name}"], rel=1e-5)
    names = [(one["block"], one["target"], one["source"]) for one in found["connections"]]
    ends = [("block1", "transition1"), ("block2", "classifier")]
    assert names == [(*end, source) for end in ends for source in ("input", "layer1")]
    for one in found["connections"]:
        assert one["loss_increase"] == one["loss"] - found["uncut"]["loss"] != 0
        assert one["weight"] > 0
    assert one_line(say()).startswith("--workdir: give a value")
    (tmp_path / "model.json").touch()
    said = f"--workdir={tmp_path}: weights have no images of their own; give a run\n"
    assert one_line(say(f"--workdir={tmp_path}")) == said


def test_held_out_images_come_before_test_images(tmp_path):
    config = small.tiny(data__validation_size=100)
    split, images, labels = cut.held_out(experiment.build(config), tmp_path, 1000)
    stored = builders.read("digits", "train", config.data.directory)
    _, held_out = data.hold_out(len(stored[1]), 100, 0, None)
    assert split == "validation"
    np.testing.assert_array_equal(images, stored[0][held_out])
    np.testing.assert_array_equal(labels, stored[1][held_out])


def test_some_images_are_spread_over_the_split(tmp_path):
    config = small.tiny()
    split, images, labels = cut.held_out(experiment.build(config), tmp_path, 100)
    stored, _ = builders.read("digits", "test", config.data.directory)
    places = [int(np.flatnonzero((stored == image).all((1, 2, 3)))[0]) for image in images]
    assert (split, len(labels), len(set(places))) == ("test", 100, 100)
    assert places == sorted(places) and 150 < np.mean(places) < 210


def test_other_data_are_refused():
    other = experiment.build(small.tiny(data__validation_size=100))
    with pytest.raises(UserError, match="the run is of other data"):
        cut.held_out(other, small.trained(), 100)
