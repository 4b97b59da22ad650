"""The script for students runs from its top to its bottom; on a smaller network, for one epoch."""

import pathlib
import runpy
import sys

import pytest

import densejax
from densejax import models
from densejax.config import UserError

SCRIPT = pathlib.Path(densejax.__file__).parents[1] / "experiments" / "first_steps.py"


def test_first_steps(tmp_path, monkeypatch, capsys):
    fields = models.fields

    def fewer(name, **changes):
        return fields(name, **changes | {"blocks": (1, 1), "growth_rate": 4})

    monkeypatch.setattr(models, "fields", fewer)

    def call(*flags):
        monkeypatch.setattr(sys, "argv", ["first_steps.py", f"--output={tmp_path}", *flags])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        return ended.value.code

    call("--epochs=1")
    output = capsys.readouterr().out
    # Stem 8, a layer of four and half of twelve: 6 + 4 feature maps, ten classes and their biases.
    assert "head         10" in output and "         110  " in output
    assert "test accuracy" in output
    assert [line.split()[0] for line in output.splitlines()[-2:]] == ["input", "layer1"]
    assert (tmp_path / "reuse.png").read_bytes().startswith(b"\x89PNG")
    # Another number of epochs is another run: fewer are not refused.
    monkeypatch.setattr("densejax.training.loop.run", lambda config, path, mode: asked.append(path))
    monkeypatch.setattr("densejax.inference.classifier.load", stop)
    asked = []
    assert call("--epochs=2") == call("--epochs=1") == 2
    assert [pathlib.Path(path).is_dir() for path in asked] == [False, True]
    assert capsys.readouterr().err == "densejax: enough\n" * 2


def stop(path):
    raise UserError("enough")
