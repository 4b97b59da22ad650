"""The faults' own book-keeping: what was seen is what the table says."""

import json
import random

import pytest

from experiments import faults


@pytest.fixture
def book(tmp_path, monkeypatch):
    """Three faults: one that is survived, one that is noticed, one that is silent."""

    def survived(path, draw, tries):
        return tries

    def hurt(path, draw, silent):
        raise faults.Failed("other arrays", silent)

    table = {"good": (2, survived, 5), "bad": (1, hurt, False), "worst": (1, hurt, True)}
    monkeypatch.setattr(faults, "FAULTS", table | {"skipped": None})
    for name, number in (("good", 0), ("good", 1), ("bad", 0), ("worst", 0)):
        faults.case(name, tmp_path / f"{name} {number}.json", tmp_path / "run")
    return tmp_path


def test_the_table_adds_up_the_cases(book):
    assert faults.table(book).splitlines()[2:] == [
        "| good | 10 | 10 | 0 |",
        "| bad | 1 | 0 | 0 |",
        "| worst | 1 | 0 | 1 |",
        "| skipped | not run |  |  |",
    ]
    assert json.loads((book / "bad 0.json").read_text())["problem"] == "other arrays"


def test_harm_is_done(tmp_path):
    file, draw = tmp_path / "file", random.Random(0)
    for _ in range(20):
        file.write_bytes(bytes(100))
        faults.flip(file, draw)
        assert sum(byte.bit_count() for byte in file.read_bytes()) == 1
        faults.cut(file, draw)
        assert not file.exists() or file.stat().st_size < 100
