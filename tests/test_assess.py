"""The assessment of a run: of the network that its result is of, written once, never in its way."""

# ruff: noqa: F401, F811 (a fixture is imported)

import functools
import json
import os
import shutil
import signal

import numpy as np
import pytest
from PIL import Image

import densejax
from densejax import assess
from densejax.analysis import assessment, plots
from densejax.config import UserError
from densejax.runs import files
from densejax.training import parallel
from tests import small
from tests.programs import shared_programs  # noqa: F401
from tests.test_command_line import command, one_line
from tests.test_predict import photo_run

pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
PICTURES = ("confusion", "reliability", "mistakes")


def written(path):
    """assessment.json, whose seal is right, beside three pictures."""
    for name in PICTURES:
        with Image.open(path / "assessment" / f"{name}.png") as image:
            image.load()
            assert min(image.size) > 100 and len(image.convert("L").getcolors()) > 3
    return files.unseal(json.loads((path / "assessment" / "assessment.json").read_text()))


def test_command(command, tmp_path):
    path = shutil.copytree(small.trained(), tmp_path / "run")
    say = functools.partial(command, main=assess.main, config="unused")
    code, output, error = say(f"--workdir={path}")
    assert (code, error) == (0, "")
    found, summary = written(path), json.loads((path / "summary.json").read_text())
    assert (found["split"], found["images"], found["steps"]) == ("test", 360, 5)
    assert found["accuracy"] == summary["test_accuracy"]
    assert assessment.read(path) == found
    lines = output.splitlines()
    assert len(lines) == 12 and lines[0].split()[-3:] == ["precision", "recall", "f1"]
    assert lines[-1].startswith("360 test images: accuracy ")
    recalls = [float(line.split()[-4]) for line in lines[1:-1] if "-" not in line]
    assert recalls == sorted(recalls)

    assert one_line(say(f"--workdir={path}", "--split=train")).startswith("--split=train: this run")
    assert one_line(say()).startswith("--workdir: give a value")
    (tmp_path / "model.json").touch()
    assert "weights have no images" in one_line(say(f"--workdir={tmp_path}"))
    # Of another result, it is none; what is damaged is named.
    content = {k: v for k, v in summary.items() if k != "sha256"} | {"steps": 6}
    files.write_json(path / "summary.json", files.seal(content))
    assert assessment.read(path) == {}
    (path / "assessment" / "assessment.json").write_text("{}")
    with pytest.raises(UserError, match="assessment.json is damaged"):
        assessment.read(path)


def test_a_run_is_assessed_at_its_end(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(parallel, "start", lambda: None)  # it would choose another cache
    changes = {"data__validation_size": 77, "evaluate__split": "validation"}
    config = small.tiny(
        **changes, checkpoint__select="best", train__average_decay=0.5, evaluate__assess=True
    )

    def stop(step, values):
        os.kill(os.getpid(), signal.SIGTERM)

    assert densejax.train(config, str(tmp_path), [stop]) is None
    assert not (tmp_path / "assessment").exists()

    monkeypatch.setattr(plots, "reliability", lambda *_: 1 / 0)
    with pytest.raises(UserError, match="the result is written, and not assessed .ZeroDivision"):
        densejax.train(config, str(tmp_path))
    monkeypatch.undo()
    monkeypatch.setattr(parallel, "start", lambda: None)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert not (tmp_path / "assessment" / "assessment.json").exists()
    capfd.readouterr()

    assert densejax.train(config, str(tmp_path)).items() <= summary.items()  # it is finished
    found = written(tmp_path)
    assert (found["split"], found["steps"]) == ("test", summary["steps"])
    assert found["accuracy"] == summary["test_accuracy"]
    assert "calibration error" in capfd.readouterr().out.splitlines()[-1]
    monkeypatch.setattr(assessment, "of_run", lambda *_: pytest.fail("it is done again"))
    densejax.train(config, str(tmp_path))


def test_a_run_without_a_checkpoint_is_refused(tmp_path):
    config = small.tiny(train__weights=str(small.trained()))
    with pytest.raises(UserError, match="there is no checkpoint in it yet; train first"):
        assessment.of_run(small.saved(tmp_path / "run", config))


def test_a_stream_names_the_files(tmp_path):
    path, built, state, images = photo_run(tmp_path, 0)
    found = assessment.of_run(path)
    assert written(path) == found
    assert found["accuracy"] == built.evaluate(state, "test")["accuracy"] < 1
    assert len(found["mistakes"]) == round(19 * (1 - found["accuracy"]))
    (batch,) = built.data.evaluation["test"].evaluation()
    for one in found["mistakes"]:
        assert one["file"] == str(images[one["image"]]) and f"/{one['class']}/" in one["file"]
    places = [one["image"] for one in found["mistakes"]]
    for place, (image, *_) in zip(
        places, built.data.evaluation["test"].examples(places), strict=True
    ):
        np.testing.assert_array_equal(image, batch["image"][place])
