"""Checkpoints: orbax writes them in the background, a manifest makes any damage visible.

Orbax restores a flipped bit in array data without a word. Each save therefore commits, atomically
with the state, MANIFEST: SHA-256 of every file; dtype, shape and SHA-256 of every leaf; the
metrics; all under a SHA-256 of its own. What differs from its manifest is never returned, and what
has none was never committed.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import metadata

from densejax import files
from densejax.config import UserError

MANIFEST = "MANIFEST"
SLOW = 1.0  # seconds that a step may wait for the save before it without a warning


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
        self._under_way: int | None = None
        self._problem = ""
        self._handler = _Handler()
        logging.get_absl_logger().addFilter(_is_news)
        self._writer = ocp.AsyncCheckpointer(
            self._handler,
            checkpoint_metadata_store=_NoRecord(),
        )
        steps = _agreed(path)
        self._metrics = {step: _manifest(self._directory / str(step))["metrics"] for step in steps}

    def steps(self) -> list[int]:
        """Every step, oldest first, without those that `restore_latest` found damaged."""
        return sorted(set(self._metrics) - self._damaged)

    def latest_step(self) -> int | None:
        """The newest step, None when there is none."""
        return max(self.steps(), default=None)

    def best_step(self) -> int | None:
        """The step with the lowest finite `keep_best`, the first of equals; None without one."""
        return next(iter(self._best_first()), None)

    def metrics(self, step: int) -> dict[str, float]:
        """The metrics that a step was saved with; {} without that step."""
        return self._metrics.get(step, {})

    def digest(self, step: int, names: tuple[str, ...]) -> str:
        """SHA-256 of the leaves of a step below any of `names`, told by its manifest alone."""
        manifest = _manifest(self._directory / str(step))
        if manifest["problem"]:
            raise _Damaged(f"Checkpoint {self._directory / str(step)}: {manifest['problem']}")
        leaves = manifest["leaves"].items()
        return _digest({name: leaf for name, leaf in leaves if name.partition("/")[0] in names})

    def save(self, step: int, state, metrics: Mapping[str, float], problem: str = "") -> None:
        """Starts to save a pytree of arrays, each replicated or addressable by this process.

        Its buffers may be donated once this returns. A step that exists is left alone. A disk that
        refuses (full, read-only, ...) is logged and the older steps stay; the next save tries
        again, and `wait` raises what became of the last.

        Args:
          step: of the state.
          state: the pytree.
          metrics: what `keep_best` chooses by.
          problem: what keeps this process from saving now; "" nothing.

        Raises:
          CheckpointError: a state that is not finite, or one behind a newer checkpoint.
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
        self._settle()
        self._under_way = step
        self._metrics[step] = {name: float(value) for name, value in metrics.items()}
        self._handler.manifest = {"leaves": _leaves(state), "metrics": self._metrics[step]}
        if not self._failed(problem or _problem_of(self._make_room)):
            args = _Save(state)
            path = self._directory / str(step)
            self._failed(_problem_of(self._writer.save, path, args=args, force=True))

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """Gives a step that exists, saved before it was evaluated, its metrics."""
        self._settle()
        if step in self.steps():
            self._metrics[step] = {name: float(value) for name, value in metrics.items()}
            if jax.process_index() == 0 and (
                problem := _problem_of(self._write_metrics, self._directory / str(step))
            ):
                logging.error("The metrics of step %d could not be saved: %s", step, problem)

    def restore_latest(self, abstract_state):
        """The newest undamaged state, bitwise as saved; None when there is no checkpoint at all.

        `abstract_state`: its `jax.ShapeDtypeStruct`s with shardings. Damaged steps are logged and
        passed over (the next save deletes them); all damaged or another model: CheckpointError.
        """
        return self._first_intact(reversed(self.steps()), abstract_state)

    def restore_best(self, abstract_state):
        """The undamaged state with the lowest `keep_best`, as `restore_latest` does it."""
        state = self._first_intact(self._best_first(), abstract_state)
        if state is None:
            raise CheckpointError(f"No checkpoint in {self._directory} has a {self._keep_best!r}.")
        return state

    def restore_step(self, step: int, abstract_state):
        """The state of `step`; CheckpointError when it is missing, damaged or does not fit."""
        if step not in self.steps():
            raise CheckpointError(f"No checkpoint {step} in {self._directory}, only {self.steps()}")
        path = self._directory / str(step)
        manifest = _manifest(path)
        _require_everywhere(path, manifest["problem"] or _wrong_file(path, manifest["files"]))
        _check_fit(path, manifest["leaves"], abstract_state)
        try:
            state = self._writer.restore(path, args=_Restore(abstract_state))
            wrong = sorted(set(manifest["leaves"].items()) - set(_leaves(state).items()))
            problem = f"{len(wrong)} leaves are not as saved: {wrong[0][0]} ..." if wrong else ""
        except Exception as error:  # tensorstore, zstd, JSON and orbax share no class
            problem = _brief(error)
        _require_everywhere(path, problem)
        return state

    def wait(self) -> None:
        """Blocks until the save under way is committed; CheckpointError when the last failed."""
        self._settle()
        if self._problem:
            raise CheckpointError(self._problem)

    def close(self) -> None:
        """Waits like `wait` and ends orbax's threads, also when the save failed."""
        try:
            self.wait()
        finally:
            self._writer.close()

    def _write_metrics(self, path: epath.Path) -> None:
        manifest = _manifest(path)
        if problem := manifest.pop("problem"):
            raise _Damaged(problem)
        _write_manifest(path, manifest | {"metrics": self._metrics[int(path.name)]})

    def _best_first(self) -> list[int]:
        values = {step: self._metrics[step].get(self._keep_best, math.nan) for step in self.steps()}
        return sorted((s for s in values if math.isfinite(values[s])), key=values.get)

    def _first_intact(self, steps: Iterable[int], abstract_state):
        damage = {}
        for step in steps:
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

    def _settle(self) -> None:
        """Waits for the save under way; if it went well, what it makes superfluous goes."""
        if self._under_way is None:
            return
        begin = time.monotonic()
        problem = _problem_of(self._writer.wait_until_finished)
        if (waited := time.monotonic() - begin) > SLOW:
            logging.warning("Waited %.1f s for the save of step %d.", waited, self._under_way)
        if self._failed(problem):
            return
        self._under_way, self._problem = None, ""
        kept = {*self.steps()[-self._keep_latest :], *self._best_first()[:1]}
        self._delete(set(self.steps()) - kept)

    def _failed(self, problem: str) -> bool:
        # All processes take part in a save or none does.
        if np.all(multihost_utils.process_allgather(np.asarray(not problem))):
            return False
        step, self._under_way = self._under_way, None
        del self._metrics[step]
        problem = problem or "another process could not write"
        self._problem = f"Step {step} could not be saved in {self._directory}: {problem}"
        logging.error("%s. The steps %s are there; the next save tries again.",
                      self._problem, self.steps())  # fmt: skip
        return True

    def _make_room(self) -> None:
        self._delete(self._damaged)
        self._damaged = set()
        if jax.process_index() == 0:
            self._directory.mkdir(parents=True, exist_ok=True)
            for leftover in self._directory.glob("*.orbax-checkpoint-tmp*"):
                leftover.rmtree()

    def _delete(self, steps: set[int]) -> None:
        for step in sorted(steps):
            self._metrics.pop(step, None)
            if jax.process_index() == 0:
                _problem_of((self._directory / str(step)).rmtree, missing_ok=True)


class _NoRecord(metadata.MetadataStore):
    """In place of orbax's own record of a step, which it would change after the manifest."""


class _Handler(ocp.StandardCheckpointHandler):
    """Orbax's, which also writes the manifest before the directory gets its final name."""

    manifest: dict

    def finalize(self, directory: epath.Path) -> None:
        super().finalize(directory)
        paths = {str(path.relative_to(directory)): path for path in _files(directory)}
        digests = {name: _file_digest(path) for name, path in paths.items()}
        _write_manifest(directory, self.manifest | {"files": digests})


@ocp.args.register_with_handler(_Handler, for_save=True)
class _Save(ocp.args.StandardSave):
    pass


@ocp.args.register_with_handler(_Handler, for_restore=True)
class _Restore(ocp.args.StandardRestore):
    pass


def _is_news(record) -> bool:
    # Orbax logs with a traceback what it raises anyway, and this module says in one line.
    return record.levelname != "ERROR" or "/orbax/" not in record.pathname


def _agreed(path: epath.Path) -> list[int]:
    # The steps that process 0 sees: with a list of its own each could go on from another one.
    found = path.glob("*") if path.is_dir() else ()
    steps = sorted(int(entry.name) for entry in found if entry.name.isdecimal())
    if jax.process_count() == 1:
        return steps
    whole = [(path / str(step) / MANIFEST).exists() for step in steps]
    number = int(multihost_utils.broadcast_one_to_all(np.asarray(len(steps))))
    mine = np.zeros((number, 2), int) if jax.process_index() else np.stack([steps, whole], -1)
    agreed = multihost_utils.broadcast_one_to_all(mine.reshape(number, 2)).tolist()
    unseen = [n for n, whole in agreed if whole and not files.appears(path / str(n) / MANIFEST)]
    if not multihost_utils.process_allgather(np.asarray(not unseen)).all():
        raise CheckpointError(
            f"{path}: process {jax.process_index()} does not see the steps {unseen} that process 0 "
            f"sees"
            if unseen
            else f"{path}: another process does not see what process 0 sees"
        )
    return [step for step, _ in agreed]


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


def _manifest(path: epath.Path) -> dict:
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        if manifest.pop("sha256") != _digest(manifest):
            raise ValueError("not as saved")
        return manifest | {"problem": ""}
    except Exception as error:  # a flipped bit can raise anything
        return {"problem": f"{MANIFEST}: {_brief(error)}", "metrics": {}}


def _write_manifest(path: epath.Path, manifest: dict) -> None:
    files.write(path / MANIFEST, json.dumps(manifest | {"sha256": _digest(manifest)}))


def _wrong_file(path: epath.Path, digests: dict[str, str]) -> str:
    # What is wrong with the first file that is not as saved, "" where all are.
    for name, digest in digests.items():
        try:
            if _file_digest(path / name) != digest:
                return f"{name} is not as saved"
        except OSError as error:
            return _brief(error)
    return ""


def _files(directory: epath.Path) -> Iterator[epath.Path]:
    for entry in sorted(directory.iterdir()):
        if entry.is_dir():
            yield from _files(entry)
        else:
            yield entry


def _file_digest(path: epath.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(manifest: dict) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _problem_of(action: Callable, *args, **kwargs) -> str:
    try:
        action(*args, **kwargs)
    except Exception as error:  # orbax, tensorstore and the file system share no class
        return _brief(error)
    return ""


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
