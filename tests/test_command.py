"""The command `densejax`: short names that stand for the modules' own commands."""

import importlib.util
import os
import pathlib
import runpy
import subprocess
import sys
import tomllib

import pytest

import densejax
from densejax import __main__

ROOT = pathlib.Path(densejax.__file__).parents[1]


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a command line; returns the exit code, what was printed, and what module got it."""
    started = []

    def start(module, run_name, alter_sys):
        started.append((module, *sys.argv[1:]))
        assert (run_name, alter_sys) == ("__main__", True)

    monkeypatch.setattr(runpy, "run_module", start)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["densejax", *words])
        return __main__.main(), *capsys.readouterr(), started

    return run


def test_a_command_of_another_package_keeps_its_own_ctrl_c(tmp_path):
    """Python imports a package before `sys.argv[0]` is the module's file: it is "-m" then."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "__init__.py").write_text("import densejax\n")
    # A shell starts its jobs in the background with Ctrl-C ignored.
    (tmp_path / "other" / "run.py").write_text(
        "import signal\n"
        "allowed = signal.SIG_IGN, signal.default_int_handler\n"
        "print(signal.getsignal(signal.SIGINT) in allowed)\n"
    )
    words = [sys.executable, "-m", "other.run", "densejax.main"]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    assert subprocess.check_output(words, env=environment, text=True) == "True\n"


def test_a_command_is_its_module_with_the_same_flags(run):
    run("train", "--config=configs/digits.py", "--config.seed=1")
    run("eval", "--workdir=latest")
    *_, started = run("predict", "image.png", "--help")
    assert started == [
        ("densejax.main", "--config=configs/digits.py", "--config.seed=1"),
        ("densejax.main", "--mode=eval", "--workdir=latest"),
        ("densejax.predict", "image.png", "--help"),
    ]


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_help_has_a_line_for_each_command(run, words):
    code, output, error, started = run(*words)
    lines = [line.split(maxsplit=2) for line in output.splitlines() if line.startswith("  ")]
    assert (code, error, started) == (0, "", [])
    assert [line[1] for line in lines] == list(__main__.COMMANDS)
    assert all(len(line) <= 80 for line in output.splitlines())


def test_every_command_has_its_module():
    for module, _, does in __main__.COMMANDS.values():
        assert importlib.util.find_spec(f"densejax.{module}") and does.endswith(".")


def test_an_unknown_command_is_one_line(run):
    code, output, error, _ = run("trian")
    assert (code, output) == (2, "")
    assert error.startswith("densejax: 'trian' is no command (did you mean train?); commands are ")


def test_the_package_and_its_lock_have_one_name():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lock = tomllib.loads((ROOT / "uv.lock").read_text())["package"]
    (own,) = [package for package in lock if package["source"] == {"editable": "."}]
    assert project["name"] == own["name"] == "densejax-lab"
    assert project["version"] == own["version"] == densejax.__version__
    names = {one.split(">")[0].split("[")[0] for one in project["dependencies"]}
    assert names == {one["name"] for one in own["dependencies"]}
    assert project["scripts"] == {"densejax": "densejax.__main__:main"}


@pytest.mark.slow
def test_the_real_command_has_the_exit_code_and_the_line_of_its_module():
    words = [sys.executable, "-m", "densejax", "predict", "--workdir=configs", "image.png"]
    answer = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert (answer.returncode, answer.stdout) == (2, "")
    assert answer.stderr.startswith("densejax: --workdir=configs: neither a run's directory nor ")
