"""A run and a directory of weights that an older version wrote still open.

`old_run.zip` was written at commit c84059a, before the modules moved into rooms: `run/` is the tiny
run of one epoch, `weights/` its network by `pretrained.save`, `expected.json` its logits of the
images that are drawn below, and its configuration.
"""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from densejax import models
from densejax.config import UserError, default
from densejax.data import facts
from densejax.inference import classifier
from densejax.training import loop
from densejax.weights import store
from tests import small
from tests.programs import shared_programs  # noqa: F401

ARCHIVE = pathlib.Path(__file__).parent / "old_run.zip"
IMAGES = np.random.default_rng(0).integers(0, 17, (2, 8, 8, 1)).astype(np.uint8)


@pytest.fixture
def old(tmp_path):
    shutil.unpack_archive(ARCHIVE, tmp_path)
    return tmp_path


def expected(folder, **changes):
    """(logits, the configuration of the same run by today's schema)."""
    content = json.loads((folder / "expected.json").read_text())
    config = default()
    stored = facts.without_lists(content["config"])
    config.model = ConfigDict(models.completed(stored.pop("model")))
    config.update(stored | {"data": stored["data"] | {"directory": str(small.SESSION / "data")}})
    config.update_from_flattened_dict(changes)
    return np.array(content["logits"]), config


def test_a_run_predicts_and_is_evaluated(old, capsys):
    logits, config = expected(old)
    network = classifier.load(old / "run")
    found = jax.jit(network.logits)(network.variables, IMAGES)
    np.testing.assert_allclose(found, logits, rtol=1e-4)
    assert loop.run(config, str(old / "run"), "eval") == 0
    found = json.loads(capsys.readouterr().out)
    stored = json.loads((old / "run" / "summary.json").read_text())
    assert found["test_accuracy"] == stored["test_accuracy"]
    expected_changes = ("versions.", "data.directory: ")
    assert [line for line in found["changes"] if not line.startswith(expected_changes)] == []


def test_a_run_goes_on_where_other_code_is_accepted(old):
    _, config = expected(old, **{"train.epochs": 2})
    with pytest.raises(UserError, match="versions.code"):
        loop.run(config, str(old / "run"))
    assert loop.run(config, str(old / "run"), force=True) == 0
    summary = json.loads((old / "run" / "summary.json").read_text())
    assert summary["steps"] == 10 and summary["config"]["train"]["loss"] == "cross_entropy"


def test_weights_open(old):
    logits, config = expected(old)
    description, variables = store.load(str(old / "weights"))
    model = models.create(description["model"], 10)
    preparation = classifier.load(old / "run").preparation
    found, _ = jax.jit(model.apply)(variables, preparation.evaluation(IMAGES))
    np.testing.assert_allclose(found, logits, rtol=1e-4)
    assert store.load(str(old / "run"))[0]["num_classes"] == 10
