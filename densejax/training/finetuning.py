"""Fine-tuning: which parameters of a network learn, and which keep what they are."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict

from densejax.config import UserError
from densejax.models.layers import belongs
from densejax.training import optimizer
from densejax.training.step import Task, init_state

HEAD = "head"  # the part that the classifier is in


def restrict(task: Task, config: ConfigDict, head_steps: int) -> Task:
    """The task with `train.frozen` frozen; in the first `head_steps`, only the classifier learns.

    What is frozen gets no gradient, update or weight decay, and runs as in evaluation. So at first
    the classifier learns from the features that evaluation gives it. The parts that learn only
    later have an optimizer of their own, which starts at the rate that the schedule has then.

    Raises:
      UserError: the network has no such part, or cannot freeze a part.
    """
    train = config.train
    wanted = {"frozen": train.frozen, "head_epochs": (HEAD,) if head_steps else ()}
    if not any(wanted.values()):
        return task
    state = jax.eval_shape(functools.partial(init_state, task), np.uint32(config.seed))
    norms = {path[:-1] for path in traverse_util.flatten_dict(state.batch_stats)}
    parts = list(state.params) if hasattr(task.model, "frozen") else []
    known = [*parts, *(["batch_norm"] if parts and norms else [])]
    for key, names in wanted.items():
        for name in names:
            if name not in known and not any(belongs(part, name) for part in parts):
                raise UserError(
                    f"train.{key} = {train[key]!r}: the network has no part {name!r} that can be "
                    f"frozen or left to learn; it has {', '.join(known) or 'none'}"
                )

    def group(path):
        is_norm = "batch_norm" in train.frozen and path[:-1] in norms
        if is_norm or any(belongs(path[0], part) for part in train.frozen):
            return "frozen"
        return "head" if head_steps and belongs(path[0], HEAD) else "rest"

    groups = traverse_util.path_aware_map(lambda path, _: group(path), state.params)

    def without(held, frozen):
        learns = jax.tree.map(lambda group: group not in held, groups)
        settings = (config.optimizer, task.learning_rate, groups, held, head_steps)
        return dataclasses.replace(
            task,
            model=task.model.clone(frozen=frozen),
            hold=functools.partial(_hold, learns),
            optimizer=optimizer.create(*settings),
        )

    others = (part for part in state.params if not belongs(part, HEAD))
    head = without(("frozen", "rest"), (*train.frozen, *others)) if head_steps else None
    return dataclasses.replace(without(("frozen",), train.frozen), head=head)


def _hold(learns: Any, params: Any) -> Any:
    return jax.tree.map(
        lambda leaf, learns: leaf if learns else jax.lax.stop_gradient(leaf), params, learns
    )
