"""The clock of a run over several starts."""

import json
import os

import pytest
from etils import epath

from densejax.config import UserError
from densejax.runs import goodput
from densejax.runs.goodput import Goodput


@pytest.fixture
def clock(monkeypatch):
    """Both clocks stand still until a test moves them."""
    now = [1000.0]
    monkeypatch.setattr(goodput.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(goodput.time, "time", lambda: now[0])
    return now


def test_a_killed_start_loses_what_lies_behind_its_last_save(tmp_path, clock, caplog):
    path = epath.Path(tmp_path / "goodput.json")
    first = Goodput(path, 0, began=990.0)  # ten seconds of imports
    first.switch_to("step")
    clock[0] += 100
    with first.measure("save"):
        clock[0] += 2
    first.checkpoint_saved(50, [50])
    clock[0] += 30
    first.write()
    clock[0] += 500  # killed at some moment; started again, with imports of 5 seconds
    second = Goodput(path, 50, began=clock[0] - 5, starts=3)  # another wrote nothing between
    assert second.seconds["lost"] == 30 and second.seconds["down"] == 495
    second.switch_to("step")
    clock[0] += 40
    second.checkpoint_saved(90, [50, 90])
    second.write()
    found = json.loads(path.read_text())
    expected = {"start_up": 15, "step": 140, "save": 2, "lost": 30, "down": 495}
    assert found["seconds"] == dict.fromkeys(goodput.KINDS, 0.0) | expected
    assert found["starts"] == 3 and found["share_of_steps"] == 140 / sum(expected.values())
    # The newest checkpoint is damaged: what led to it is lost too.
    assert Goodput(path, 50, began=clock[0]).seconds["lost"] == 30 + 5 + 40
    # And without a checkpoint everything is.
    assert Goodput(path, 0, began=clock[0]).seconds["lost"] == 30 + 15 + 140 + 2
    for damaged in (b"{", b"\xff" + path.read_bytes()[1:]):
        path.write_bytes(damaged)
        assert Goodput(path, 50, began=clock[0]).seconds["lost"] == 0
    assert "the clock starts at zero" in caplog.text


def test_it_is_written_now_and_then(tmp_path, clock):
    path = epath.Path(tmp_path / "goodput.json")
    one = Goodput(path, 0, began=1000.0, every=10.0)
    clock[0] += 9
    one.write(now=False)
    assert not path.exists()
    clock[0] += 2
    one.write(now=False)
    assert path.exists()


def test_who_lost_the_directory_writes_nothing(tmp_path, clock):
    def guard():
        raise UserError("another process took it over")

    path = epath.Path(tmp_path / "goodput.json")
    with pytest.raises(UserError, match="took it over"):
        Goodput(path, 0, began=990.0, guard=guard).write()
    assert not path.exists()


def test_what_is_no_file_in_its_place_is_named(tmp_path):
    os.mkfifo(tmp_path / "goodput.json")
    with pytest.raises(UserError, match="goodput.json cannot be read"):
        Goodput(epath.Path(tmp_path / "goodput.json"), 0, began=0.0)
