"""Bad input of the small scripts is one line and exit code 2, and nothing is written."""

import json
import pathlib
import subprocess
import sys

import curve
import layouts
import pods
import pytest
import script
import without_training

import densejax
from densejax.config import UserError


@pytest.mark.parametrize(
    "module, flags, message",
    [
        (curve, "--workdir=missing --output=a.png", "--workdir=missing: it is no run"),
        (curve, "--workdir=empty --output=a.png", "--workdir=empty: it is no run"),
        (curve, "--workdir=file --output=a.png", "--workdir=file: it is no run"),
        (curve, "--workdir=damaged --output=a.png", "damaged/metrics.jsonl is damaged "),
        (curve, "--workdir= --output=a.png", "argument --workdir: name a file or a folder"),
        (curve, "--workdir=empty", "the following arguments are required: --output; --help"),
        (without_training, "--output=file --figures counts", "file: File exists"),
        (without_training, "--output= --figures counts", "argument --output: name a file"),
        (without_training, "--output=a --figures b", "argument --figures: invalid choice: 'b'"),
        (
            without_training,
            "--output=no://a --figures counts",
            "argument --output: invalid path",
        ),
        (pods, "--output=file --report", "file: File exists"),
        (pods, "--output=empty --cuda_python=/no/python", "/no/python: No such file"),
        (pods, "--output=damaged --report", "damaged/densenet121-h100-8.json is damaged"),
        (layouts, "--output=a --runs=file", "HERE/file/1x1-shard_map-float64: Not a directory"),
        (layouts, "--output=a --runs=", "argument --runs: name a file or a folder"),
    ],
)
def test_bad_input_is_one_line(module, flags, message, monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("a file in the place of a folder")
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    for name in ("metrics.jsonl", "config.json", "densenet121-h100-8.json"):
        (tmp_path / "damaged" / name).write_text("{}\n[\n")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["script.py", *flags.split()])
    with pytest.raises(SystemExit) as ended:
        script.run(module.main)
    said = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and len(said) <= 2  # pods.py says first what it compiles
    assert said[-1].startswith(f"densejax: {message.replace('HERE', str(tmp_path))}")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_process_without_end_is_ended():
    endless = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
    with pytest.raises(UserError, match="^run: a process went on after 0.1 seconds; output0 and"):
        layouts.wait("run", [endless], seconds=0.1)
    assert endless.wait() < 0


def test_curve_draws_a_run_whose_last_line_is_torn(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"epoch": 1, "train_loss": 1.5, "train_accuracy": 0.5}\n{"epo'
    )
    config = {"augmentation": {"shift": 0, "flip": False}, "train": {"label_smoothing": 0.0}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    curve.draw(tmp_path, tmp_path / "curve")
    assert (tmp_path / "curve").read_bytes().startswith(b"\x89PNG")


def test_a_cell_is_compiled_again_where_its_code_is_newer(monkeypatch, tmp_path):
    digests, compiled = {"densejax": "a", "topology": "b"}, []
    root = pathlib.Path(densejax.__file__).parent

    def run(command, **options):
        compiled.append(dict(digests))
        return subprocess.CompletedProcess(command, 0, "{}", "")

    monkeypatch.setattr(pods.workdir, "code_digest", lambda folder=root: digests[folder.name])
    monkeypatch.setattr(pods.subprocess, "run", run)
    for changed in ({}, {}, {"topology": "c"}, {"densejax": "d"}):
        digests |= changed
        pods.compile_cell("densenet121", "h100:8", "python", tmp_path / "cell.json")
    assert [list(found.values()) for found in compiled] == [["a", "b"], ["a", "c"], ["d", "c"]]
