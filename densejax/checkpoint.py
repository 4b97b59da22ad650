"""Checkpoints: orbax writes them in the background, a record of every leaf makes damage visible.

Orbax restores a flipped bit in array data without a word. Each save therefore commits, atomically
with the state, a JSON record: dtype, shape and SHA-256 of every leaf and the metrics, under a
SHA-256 of its own. A restored state that differs from its record is never returned.
"""

import hashlib
import json
import math
import types
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from densejax.config import UserError


class CheckpointError(UserError):
    """A checkpoint cannot be written, cannot be read, or is of another model."""


class _Damaged(CheckpointError):
    """A checkpoint is incomplete, or its content is not what was saved."""


class Checkpoints:
    """The checkpoints of one run; every process calls every method, in the same order.

    Nothing on disk changes before the first save. The methods raise CheckpointError alone.
    """

    def __init__(self, directory: epath.PathLike, keep_latest: int = 2, keep_best: str = ""):
        """Keeps the `keep_latest` newest steps and the one with the lowest metric `keep_best`."""
        path = epath.Path(directory)
        self._directory = path if "://" in str(directory) else path.resolve()  # as orbax asks
        self._keep_latest, self._keep_best = keep_latest, keep_best
        self._damaged: set[int] = set()
        policy = types.SimpleNamespace(should_preserve=self._should_preserve)
        options = ocp.CheckpointManagerOptions(create=False, preservation_policy=policy)
        self._manager = ocp.CheckpointManager(self._directory, options=options)
        self._metrics = {step: self._record(step)["metrics"] for step in self.steps()}

    def steps(self) -> list[int]:
        """Every step, oldest first, without those that `restore_latest` found damaged."""
        return sorted(set(self._manager.all_steps()) - self._damaged)

    def latest_step(self) -> int | None:
        """The newest step, None when there is none."""
        return max(self.steps(), default=None)

    def best_step(self) -> int | None:
        """The step with the lowest finite `keep_best`, the first of equals; None without one."""
        values = {step: self._metrics[step].get(self._keep_best, math.nan) for step in self.steps()}
        return min((s for s in values if math.isfinite(values[s])), key=values.get, default=None)

    def save(self, step: int, state, metrics: Mapping[str, float]) -> None:
        """Starts to save a pytree of arrays, each replicated or addressable by this process.

        Its buffers may be donated once this returns. A step that exists is left alone. Raises
        CheckpointError also when the save before this one failed (disk full, ...).
        """
        if step in self.steps():
            return
        if newer := [other for other in self.steps() if other > step]:
            raise CheckpointError(f"step={step}: delete the newer {newer} in {self._directory}")
        for name, leaf in _named(state):
            if jnp.issubdtype(leaf.dtype, jnp.floating) and not np.isfinite(leaf).all():
                raise CheckpointError(
                    f"step={step}: {name} is not finite, so nothing was saved; lower "
                    f"optimizer.learning_rate and go on from step {self.latest_step()}"
                )
        record = {"leaves": _leaves(state), "metrics": {k: float(v) for k, v in metrics.items()}}
        args = {
            "state": ocp.args.StandardSave(state),
            "record": ocp.args.JsonSave(record | {"sha256": _digest(record)}),
        }
        self._guarded(self._make_ready_to_write)
        self._metrics[step] = record["metrics"]
        self._guarded(self._manager.save, step, args=ocp.args.Composite(**args), force=True)

    def restore_latest(self, abstract_state):
        """The newest undamaged state, bitwise as saved; None when there is no checkpoint at all.

        `abstract_state`: its `jax.ShapeDtypeStruct`s with shardings. Damaged steps are logged and
        passed over (the next save deletes them); all damaged or another model: CheckpointError.
        """
        damage = {}
        for step in reversed(self.steps()):
            try:
                state = self.restore_step(step, abstract_state)
            except _Damaged as error:
                logging.warning("%s; trying the one before.", error)
                damage[step] = str(error)
            else:
                self._damaged |= set(damage)
                return state
        if damage:
            raise CheckpointError("\n  ".join(["No checkpoint is intact:", *damage.values()]))
        return None

    def restore_best(self, abstract_state):
        """The state of `best_step()`."""
        if (step := self.best_step()) is None:
            raise CheckpointError(f"No checkpoint in {self._directory} has a {self._keep_best!r}.")
        return self.restore_step(step, abstract_state)

    def restore_step(self, step: int, abstract_state):
        """The state of `step`; CheckpointError when it is missing, damaged or does not fit."""
        if step not in self.steps():
            raise CheckpointError(f"No checkpoint {step} in {self._directory}, only {self.steps()}")
        path, record = self._directory / str(step), self._record(step)
        _require_everywhere(path, record["problem"])
        _check_fit(path, record["leaves"], abstract_state)
        try:
            args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state))
            state = self._manager.restore(step, args=args).state
            wrong = sorted(set(record["leaves"].items()) - set(_leaves(state).items()))
            problem = f"{len(wrong)} leaves are not as saved: {wrong[0][0]} ..." if wrong else ""
        except Exception as error:  # tensorstore, zstd, JSON and orbax share no class
            problem = _brief(error)
        _require_everywhere(path, problem)
        return state

    def wait(self) -> None:
        """Blocks until the save under way is committed; CheckpointError when it failed."""
        self._guarded(self._manager.wait_until_finished)

    def close(self) -> None:
        """Waits like `wait` and ends orbax's threads, also when the save failed."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def _should_preserve(self, checkpoints, *, context) -> list[bool]:
        keep = {*self.steps()[-self._keep_latest :], self.best_step()}
        return [info.step in keep for info in checkpoints]

    def _make_ready_to_write(self) -> None:
        self._manager.wait_until_finished()  # a temporary directory is now a killed save's
        for step in sorted(self._damaged):
            self._manager.delete(step)
        self._damaged.clear()
        if jax.process_index() == 0:
            self._directory.mkdir(parents=True, exist_ok=True)
            for leftover in self._directory.glob("*.orbax-checkpoint-tmp*"):
                leftover.rmtree()

    def _guarded(self, write, *args, **kwargs) -> None:
        try:
            write(*args, **kwargs)
        except Exception as error:  # orbax, tensorstore and the file system share no class
            self._manager.reload()  # orbax has forgotten the steps it was about to delete
            message = f"Cannot save in {self._directory}: {_brief(error)}. Is the disk full?"
            raise CheckpointError(message) from error

    def _record(self, step: int) -> dict:
        try:
            record = json.loads((self._directory / f"{step}/record/metadata").read_text())
            if record.pop("sha256") != _digest(record):
                raise ValueError("the record is not as saved")
            return record | {"problem": ""}
        except Exception as error:  # a flipped bit can raise anything
            return {"problem": _brief(error), "metrics": {}}


def _require_everywhere(path: epath.Path, problem: str) -> None:
    # All processes must take the same checkpoint: a problem in one is a problem in all.
    if not multihost_utils.process_allgather(np.asarray(not problem)).all():
        raise _Damaged(f"Checkpoint {path} is damaged ({problem or 'in another process'})")


def _check_fit(path: epath.Path, leaves: dict[str, str], abstract_state) -> None:
    saved = {name: text.rpartition(" ")[0] for name, text in leaves.items()}
    model = _leaves(abstract_state)
    lines = [
        f"{name}: {saved.get(name, 'absent')} in the checkpoint, "
        f"{model.get(name, 'absent')} in the model"
        for name in sorted(saved | model)
        if saved.get(name) != model.get(name)
    ]
    if lines:
        lines[20:] = [f"... {len(lines) - 20} more"] * (len(lines) > 20)
        raise CheckpointError("\n  ".join([f"Checkpoint {path} is of another model:", *lines]))


def _named(tree) -> list[tuple[str, np.ndarray]]:
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(tree))
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves]


def _leaves(tree) -> dict[str, str]:
    # Path -> "float32[3, 4]", for arrays "float32[3, 4] SHA-256 of the bytes".
    table = {}
    for name, leaf in _named(tree):
        table[name] = f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            table[name] += f" {hashlib.sha256(leaf.tobytes()).hexdigest()}"
    return table


def _digest(record: dict) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
