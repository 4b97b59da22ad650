"""What the tests of one process share, as tracing takes most of their time: programs and counts."""

import dataclasses
import functools

import pytest

from densejax import data
from densejax.config import flatten
from densejax.models import connections, counts
from densejax.training import optimizer
from densejax.training.experiment import Experiment
from densejax.training.losses import LOSSES
from densejax.training.step import eval_step

FOUND = {}
NO_PROGRAM = (  # depends on these keys, or on what the key of a program has beside them
    *("seed", "name", "checkpoint.", "log.seconds", "train.patience", "data.directory"),
    *("data.manual_dir", "train.weights", "train.new_classifier"),
    *("evaluate.every_epochs", "evaluate.assess", "evaluate.split", "evaluate.final_split"),
    "evaluate.train_images",
)
NO_TRAINING = ("evaluate.",)
NO_EVALUATION = ("optimizer.", "augmentation.", "log.", "train.epochs", "train.max_steps")


@pytest.fixture(scope="module", autouse=True)
def shared_programs():
    """The programs by configuration, devices and step; a module that imports this shares them."""
    plain_map, plain_init = Experiment.map, Experiment._init.func

    def compiled_once(self, *key, make, without=()):
        if self.config.train.class_weights != "none":  # they are of the labels
            return make(self)
        values = sorted((name, str(value)) for name, value in flatten(self.config).items())
        without = (*NO_PROGRAM, *without)
        values = tuple(one for one in values if not one[0].startswith(without))
        task = self.task  # names in tables may stand for something else in another test
        name, loss = self.config.optimizer.name, self.config.train.loss
        pattern = connections.CONCATENATING | connections.ADDING
        pattern = pattern.get(str(getattr(task.model, "connect", "")).partition(":")[0])
        tables = optimizer.OPTIMIZERS[name], LOSSES[loss], pattern
        sizes = task.image_shape, data.train_size(self.config, self.info)
        key = (values, task.model, tables, sizes, str(task.preparation), self.mesh, *key)
        if key not in FOUND:
            FOUND[key] = make(dataclasses.replace(self))  # which keeps no images
        return FOUND[key]

    def map_once(self, step, donate=False):
        without = NO_EVALUATION if step is eval_step else NO_TRAINING
        make = functools.partial(plain_map, step=step, donate=donate)
        steps = None if step is eval_step else self.steps
        return compiled_once(self, step, donate, steps, make=make, without=without)

    def init_once(self):
        return compiled_once(self, make=plain_init, without=NO_TRAINING)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Experiment, "map", map_once)
        patch.setattr(Experiment, "_init", property(init_once))
        patch.setattr(counts, "of_network", functools.cache(counts.of_network))
        yield
