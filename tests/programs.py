"""Compiled programs that the tests of one process share, as tracing takes most of their time."""

import dataclasses

import pytest

from densejax.config import flatten
from densejax.training.experiment import Experiment

FOUND = {}
LOOP = ("checkpoint.", "evaluate.every_epochs", "train.patience")  # no program depends on them


@pytest.fixture(scope="module", autouse=True)
def shared_programs():
    """The programs by configuration, devices and step; a module that imports this shares them."""
    plain_map, plain_init = Experiment.map, Experiment._init.func

    def compiled_once(self, *key, make):
        values = sorted((name, str(value)) for name, value in flatten(self.config).items())
        values = tuple(one for one in values if not one[0].startswith(LOOP))
        key = (values, self.mesh, *key)
        if key not in FOUND:
            FOUND[key] = make(dataclasses.replace(self))  # which keeps no images
        return FOUND[key]

    def map_once(self, step, donate=False):
        return compiled_once(self, step, donate, make=lambda new: plain_map(new, step, donate))

    def init_once(self):
        return compiled_once(self, make=plain_init)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Experiment, "map", map_once)
        patch.setattr(Experiment, "_init", property(init_once))
        yield
