"""README.md and docs/: links lead somewhere, commands are accepted, Python runs, tables hold."""

import copy
import importlib.util
import json
import pathlib
import re
import runpy
import shlex
import sys
from unittest import mock

import pytest
from absl import flags
from ml_collections import config_flags

import densejax
from densejax import config as schema
from densejax import models
from densejax.__main__ import COMMANDS
from densejax.data import added
from densejax.models import connections
from densejax.training import experiment, losses, optimizer, parallel
from tests.programs import shared_programs  # noqa: F401

ROOT = pathlib.Path(densejax.__file__).parents[1]
WRITTEN = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINKING = [*WRITTEN, *ROOT.glob("CHANGELOG.md"), *ROOT.glob("launch/*.md")]
LINKING += sorted(ROOT.glob("experiments/results/*/README.md"))
TABLES = (losses.LOSSES, optimizer.OPTIMIZERS, models.FAMILIES, models.MODELS, added.ADDED)
TABLES += (connections.CONCATENATING, connections.ADDING)
specification = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
generate = importlib.util.module_from_spec(specification)
specification.loader.exec_module(generate)

pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


def name(page):
    return str(page.relative_to(ROOT))


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def shell(page):
    """Every line of a page's commands, as words."""
    text = "".join(blocks(page, "sh")).replace("\\\n", " ")
    inline = re.findall(r"`((?:python|make|densejax) [^`\n]+)`", page.read_text())
    for line in [*text.splitlines(), *inline]:
        words = shlex.split(line, comments=True)
        if words[:1] == ["taskset"]:
            words = words[3:]
        if words and words[-1] != "...":
            yield words


def typed(start):
    """What begins with these words, each command once, from all pages."""
    found = {tuple(w) for page in WRITTEN for w in shell(page) if w[: len(start)] == start}
    return sorted(words for words in found if len(words) > len(start))


# --- Links.


def anchors(page):
    """What GitHub makes of a page's headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", LINKING, ids=name)
def test_links_and_anchors_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\((?!http)([^)]+)\)", text):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_every_page_is_reached_from_readme():
    reached, new = set(), {ROOT / "README.md"}
    while new:
        page = new.pop()
        reached.add(page)
        links = re.findall(r"\]\((?!http)([^)#]+\.md)", page.read_text())
        new |= {(page.parent / link).resolve() for link in links} - reached
    assert set(WRITTEN) <= reached


def test_readme_is_short_and_activates_the_environment_first():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
    words = [line[0] for line in shell(ROOT / "README.md")]
    assert words[:5] == ["git", "cd", "make", ".", "python"]
    assert re.search(r"^BIN := \.venv/bin$", (ROOT / "Makefile").read_text(), re.MULTILINE)


# --- Commands.


def defined(file):
    """The flags that a command defines."""
    return set(re.findall(r'DEFINE_\w+\(\s*"(\w+)"', file.read_text()))


def commands():
    for words in typed(["densejax"]):
        if words[1:] == ("--help",):
            continue
        file = ROOT / f"densejax/{COMMANDS[words[1]][0]}.py"
        yield pytest.param(file, words[2:], id=shlex.join(words))
    for words in typed(["python"]):
        text = shlex.join(words)
        if words[1] == "-m" and words[2].startswith("densejax."):
            file = ROOT / f"{words[2].replace('.', '/')}.py"
            yield pytest.param(file, words[3:], id=text)
        elif words[1] == "experiments/run.py":
            yield pytest.param(ROOT / words[1], words[2:], id=text)


@pytest.mark.parametrize("file, words", list(commands()))
def test_a_command_is_accepted(file, words, monkeypatch):
    monkeypatch.chdir(ROOT)
    given = {word[2:].partition("=")[0] for word in words if word.startswith("--")}
    of_card = {flag for flag in given if flag.partition(".")[0] == "config"}
    assert given - of_card <= defined(file) | {"help"}
    if of_card:
        arguments = ["command", *(word for word in words if word.startswith("--config"))]
        sys.modules.pop("config_config", None)  # the card before
        values = flags.FlagValues()
        found = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=arguments)
        values(arguments)
        schema.checked(found.value)
        models.create(found.value.model, 10)


def scripts():
    for words in typed(["python"]):
        if words[1].startswith("experiments/") and words[1] != "experiments/run.py" and words[2:]:
            yield words[1:]


@pytest.mark.parametrize("words", list(scripts()), ids=" ".join)
def test_flags_of_a_script_are_accepted(words, monkeypatch):
    class Parsed(Exception):
        pass

    def parse_args(parser):
        raise Parsed(parser.parse_known_args()[1])

    monkeypatch.setattr("argparse.ArgumentParser.parse_args", parse_args)
    monkeypatch.setattr(sys, "argv", list(words))
    monkeypatch.syspath_prepend((ROOT / words[0]).parent)
    with pytest.raises(Parsed, match=r"^\[\]$"):
        runpy.run_path(str(ROOT / words[0]), run_name="__main__")


def test_make_targets_are_there():
    targets = re.findall(r"^([a-z -]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {words[1] for words in typed(["make"])} <= set(" ".join(targets).split())


def test_keys_are_there():
    keys = set(schema.flatten(schema.default()))
    sections = {key.partition(".")[0] for key in keys if "." in key}
    for page in WRITTEN:
        for key in re.findall(rf"`((?:{'|'.join(sections)})\.\w+)(?:=[^`]*)?`", page.read_text()):
            assert key in keys or key == "data.json", (page, key)


# --- Python.


@pytest.fixture
def tables():
    """What a page adds to the tables is taken away again."""
    before = [dict(table) for table in TABLES]
    yield
    for table, content in zip(TABLES, before, strict=True):
        table.clear()
        table.update(content)


def with_python():
    for page in WRITTEN:
        found = [block for block in blocks(page, "python") if not block.startswith("# not run: ")]
        if found:
            slow = page.name not in ("README.md", "extending.md")
            marks = [pytest.mark.slow] if slow else []
            yield pytest.param(found, id=name(page), marks=marks)
    for notebook in sorted(ROOT.glob("docs/notebooks/*.ipynb")):
        cells = json.loads(notebook.read_text())["cells"]
        found = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        found = [code.removeprefix("%matplotlib inline") for code in found]
        yield pytest.param(found, id=name(notebook), marks=[pytest.mark.slow])


@pytest.mark.usefixtures("tables")
@pytest.mark.parametrize("found", list(with_python()))
def test_the_python_of_a_page_runs(found, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.setattr(parallel, "start", lambda: None)  # it would choose another cache
    monkeypatch.setattr(sys, "argv", ["notebook"])
    train = densejax.train

    def few_steps(config, *arguments, **keywords):
        experiment.build(config)  # the page's own configuration, which may be refused
        config = copy.deepcopy(config)
        config.train.max_steps, config.log.every_steps = 8, 4
        config.optimizer.warmup_epochs = 0.0
        return train(config, *arguments, **keywords)

    monkeypatch.setattr(densejax, "train", few_steps)
    wandb = mock.MagicMock()  # it is not installed, and would need an account
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    page_code = {"__name__": "page"}
    for block in found:
        exec(compile(block, "page", "exec"), page_code)
    if any("import wandb" in block for block in found):
        sent = [call.kwargs["step"] for call in wandb.init.return_value.log.call_args_list]
        names = set().union(*(call.args[0] for call in wandb.init().log.call_args_list))
        assert sent == sorted(sent) and {"train_loss", "test_accuracy"} <= names
        assert wandb.init.call_args_list[0].kwargs["config"]["train.epochs"] == 1


# --- Tables.


@pytest.mark.parametrize("part", sorted(set(generate.PARTS) - set(generate.SLOW)))
def test_a_table_is_up_to_date(part):
    pages = [page for page in generate.pages() if f"<!-- begin {part} -->" in page.read_text()]
    assert pages, part
    for page in pages:
        text = page.read_text()
        assert generate.filled(text, {part: generate.PARTS[part]}) == text, "make docs writes it"


def test_notebooks_have_their_outputs():
    for notebook in ROOT.glob("docs/notebooks/*.ipynb"):
        cells = [c for c in json.loads(notebook.read_text())["cells"] if c["cell_type"] == "code"]
        assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
        assert any(cell["outputs"] for cell in cells)


@pytest.mark.slow
@pytest.mark.parametrize("part", generate.SLOW)
def test_a_long_table_is_up_to_date(part):
    test_a_table_is_up_to_date(part)


def test_the_long_tables_name_all_that_there_is():
    networks = (ROOT / "docs/guide/networks.md").read_text()
    assert re.findall(r"^\| `(\w+)` \| \d+x", networks, re.MULTILINE) == list(models.MODELS)
    page = (ROOT / "docs/guide/command_line.md").read_text()
    found = re.findall(r"^### `python (?:-m )?(.*?)`\n\n```text\n(.*?)^```", page, re.S | re.M)
    for title, text in found:
        file = ROOT / f"{title.removesuffix('.py').replace('.', '/')}.py"
        assert defined(file) <= set(re.findall(r"^ *--(?:\[no\])?(\w+)", text, re.M)), title
    files = {file.stem for file in (ROOT / "densejax").glob("*.py")}
    named = {title.removeprefix("densejax.") for title, _ in found}
    assert {
        n for n in files if "command_line.run(" in (ROOT / f"densejax/{n}.py").read_text()
    } <= named
