"""The command for a GPU, rehearsed without one: its parts run, are kept and are told in a table."""

import json
import os
import subprocess
import sys

import gpu
import numpy as np
import pytest

from densejax.config import UserError

FACTS = {"card_and_driver": "card", "versions": {"jax": "1"}, "code": "c", "date": "d"}


def rehearse(folder, *flags):
    return subprocess.run(
        [sys.executable, gpu.__file__, f"--output={folder}", "--rehearse", *flags],
        capture_output=True,
        text=True,
        cwd=gpu.ROOT,
        env=os.environ | {"FASHION_MNIST": str(folder / "missing")},  # it would train for an hour
    )


def test_distance_is_relative_and_over_all_arrays():
    assert gpu.distance({"a": [3.0], "b": [5.0]}, {"a": [3.0], "b": [4.0]}) == pytest.approx(0.2)


def test_the_table_compares_with_the_floor_and_with_ours():
    """4 GB at 1 TB/s take 4 ms: half of a step of 8 ms."""
    row = {"seconds_per_step": 0.008, "images_per_second": 500, "tries": [0.007, 0.008, 0.009]}
    row |= {"compile_seconds": None}
    peer = row | {"seconds_per_step": 0.012}
    results = {
        "device": FACTS | {"copy_bytes_per_second": 1e12},
        "forms": FACTS | {"good": True},
        "net_4": FACTS
        | {"floor_bytes": 4e9, "rows": {"train, densejax": row, "train, torchvision": peer}},
    }
    text = gpu.table(results)
    assert 'forms: {"good": true}' in text
    ours, theirs = [line.split()[2:] for line in text.splitlines() if line.startswith("net_4")]
    assert ours == ["densejax", "500", "8.00", "3", "7.00", "to", "9.00", "1.00", "-", "50",
                    "-", "0"]  # fmt: skip
    assert theirs[0] == "torchvision" and theirs[7] == "1.50"


def test_what_is_no_part(tmp_path, monkeypatch):
    flags = [f"--output={tmp_path}", "--rehearse", "--parts=speed"]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *flags])
    with pytest.raises(UserError, match="^--parts: speed unknown; allowed are device, forms"):
        gpu.main()


@pytest.mark.slow
def test_parts_are_kept(tmp_path):
    done = rehearse(tmp_path, "--parts=device,forms,fashion")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "device.json").read_text())
    assert found["copy_bytes_per_second"] > 0 and found["versions"]["jax"]
    assert np.isfinite(list(found["float32_product_error"].values())).all()
    assert json.loads((tmp_path / "forms.json").read_text())["good"]
    again = rehearse(tmp_path, "--parts=device,forms,fashion")
    assert "device:" not in again.stdout.splitlines()[0]  # no part has run
    assert again.stdout in done.stdout
