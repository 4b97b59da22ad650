"""What README.md says to type exists and is accepted; its files, cards and keys are there."""

import pathlib
import re
import runpy
import shlex
import sys

import pytest

import densejax
from densejax import config as schema
from densejax import models
from densejax.training import experiment
from tests.test_command_line import command  # noqa: F401

ROOT = pathlib.Path(densejax.__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```\n(.*?)```", README, re.DOTALL)
LINES = [line.strip() for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]
COMMANDS = [
    shlex.split(line, comments=True)
    for line in LINES
    if line.startswith("python -m densejax.main ")
]

SCRIPTS = [  # run.py has flags of another kind, parity_torch.py needs torch
    shlex.split(line, comments=True)
    for line in re.findall(r"python (experiments/(?!run|parity)[^`\n]*)", README)
]

pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


def test_there_are_commands():
    assert len(COMMANDS) >= 4


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_command_is_accepted(words, command, monkeypatch):  # noqa: F811
    built, build = [], experiment.build

    def stop(config):
        built.append(build(config))
        raise schema.UserError("enough")

    monkeypatch.setattr("densejax.training.loop.build", stop)
    assert command(*words[3:]) == (2, "", "densejax: enough\n")
    assert len(built) == 1


@pytest.mark.parametrize("words", SCRIPTS, ids=" ".join)
def test_flags_of_a_script_are_accepted(words, monkeypatch, capsys):
    class Parsed(Exception):
        pass

    def parse_args(parser):
        raise Parsed(parser.parse_known_args()[1])

    monkeypatch.setattr("argparse.ArgumentParser.parse_args", parse_args)
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.syspath_prepend((ROOT / words[0]).parent)
    with pytest.raises(Parsed, match=r"^\[\]$"):
        runpy.run_path(str(ROOT / words[0]), run_name="__main__")


def test_the_environment_is_activated_before_the_first_command():
    commands = [line.split()[0] for line in LINES if line and not line.startswith("make")]
    assert commands[:2] == [".", "python"] and ". .venv/bin/activate" in LINES
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"^BIN := \.venv/bin$", makefile, re.MULTILINE)


@pytest.mark.parametrize("target", re.findall(r"\]\((?!http)([^)#]+)\)", README))
def test_a_link_leads_to_a_file(target):
    assert (ROOT / target).exists()


def test_scripts_make_targets_and_cards_are_there():
    for script in re.findall(r"python (\S+\.py)", README):
        assert (ROOT / script).exists(), script
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {line.split()[1] for line in LINES if line.startswith("make ")} <= set(targets)
    cards = {path.name for path in (ROOT / "configs").glob("*.py")}
    assert set(re.findall(r"^\| `(\w+\.py)`", README, re.MULTILINE)) == cards


def test_keys_and_networks_are_there():
    keys = {*schema.flatten(schema.default()), "summary.json", "metrics.jsonl", "data.json"}
    sections = {key.partition(".")[0] for key in keys if "." in key}
    for key in re.findall(rf"`((?:{'|'.join(sections)})\.\w+)(?:=\w+)?`", README):
        assert key in keys, key
    for name in re.findall(r"^\| `(densenet\w+)`", README, re.MULTILINE):
        assert name in models.MODELS
