"""Every block of Python in docs/ runs as it stands, and every link leads somewhere."""

import pathlib
import re
import sys

import pytest

import densejax
from densejax import models
from densejax.data import added
from densejax.models import connections
from densejax.training import losses, optimizer, parallel

ROOT = pathlib.Path(densejax.__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
TABLES = (losses.LOSSES, optimizer.OPTIMIZERS, models.FAMILIES, models.MODELS, added.ADDED)
TABLES += (connections.CONCATENATING, connections.ADDING)


@pytest.fixture
def tables():
    """What a page adds to the tables is taken away again."""
    before = [dict(table) for table in TABLES]
    yield
    for table, content in zip(TABLES, before, strict=True):
        table.clear()
        table.update(content)


def blocks(page):
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.usefixtures("tables")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.setattr(parallel, "start", lambda: None)  # it would choose another cache
    monkeypatch.setattr(sys, "argv", ["notebook"])
    page_code = {"__name__": "page"}
    for block in blocks(page):
        exec(compile(block, page.name, "exec"), page_code)
    assert blocks(page)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_a_page_lead_to_files(page):
    for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target
