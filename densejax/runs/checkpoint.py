"""Checkpoints that are restored bit for bit or reported as damaged; orbax writes and reads them.

Orbax does not notice a flipped bit in array data. Each save therefore has a MANIFEST: its step, the
SHA-256 of every file and of every array, its metrics, all sealed by a SHA-256. It is committed
together with the state: a directory without it is no checkpoint, and a state that differs from it
is never returned.
"""

import glob
import hashlib
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint import metadata

from densejax.config import UserError
from densejax.runs import files, hosts

MANIFEST = "MANIFEST"
SLOW = 1.0  # seconds that a run may wait for the previous save without a warning


class CheckpointError(UserError):
    """A checkpoint cannot be written, cannot be read, or belongs to another model."""


class _Damaged(CheckpointError):
    """A checkpoint is incomplete, or its content is not what was saved."""


class Checkpoints:
    """The checkpoints of one run; every process calls every method, in the same order.

    Opening them changes nothing on disk. Every method may raise CheckpointError and the errors of
    `guard`.

    Attributes:
      damaged_steps: those that the last `restore_latest` or `restore_best` could not take.
    """

    def __init__(
        self,
        directory: epath.PathLike,
        keep_latest: int = 2,
        keep_best: str = "",
        guard: Callable[[], None] = lambda: None,
    ):
        """Reads which steps there are.

        Args:
          directory: of the checkpoints; it need not exist.
          keep_latest: how many of the newest steps are kept.
          keep_best: the step with the lowest value of this metric is kept as well; "": none.
          guard: called before anything is written or deleted; raises a UserError where this process
            must not do so any more.
        """
        path = epath.Path(directory)
        # Orbax wants an absolute path.
        self._directory = path if "://" in str(directory) else path.resolve()
        self._keep_latest, self._keep_best, self._guard = keep_latest, keep_best, guard
        self.damaged_steps: list[int] = []
        self._to_delete: set[int] = set()  # damaged, on disk until the next save
        self._saving: int | None = None
        self._last_problem = ""
        self._manifest: dict = {}  # of the save that is under way
        self._handler = ocp.StandardCheckpointHandler()
        # No subclass: orbax knows the arguments of registered classes of handlers alone.
        self._handler.finalize = self._finalize
        logging.get_absl_logger().addFilter(_is_no_orbax_error)
        # Orbax would change its metadata file after the manifest has its SHA-256: it writes none.
        no_metadata = metadata.metadata_store(enable_write=False, blocking_write=True)
        self._writer = ocp.AsyncCheckpointer(
            self._handler,
            # Otherwise a directory that cannot be made blocks orbax's threads for 300 s.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
            checkpoint_metadata_store=no_metadata,
        )
        self._saved = _steps_of_process_0(self._directory)

    def steps(self) -> list[int]:
        """Every step, oldest first, without those that turned out to be damaged."""
        return sorted(self._saved)

    def latest_step(self) -> int | None:
        """The newest step; None without one."""
        return max(self.steps(), default=None)

    def best_step(self) -> int | None:
        """The step with the lowest finite `keep_best`, the first of equals; None without one."""
        return next(iter(self._best_first()), None)

    def metrics(self, step: int) -> dict[str, float]:
        """The metrics of a step; {} without that step."""
        return self._saved.get(step, {}).get("metrics", {})

    def records(self, step: int) -> dict:
        """The records that a step was saved with; {} without any, or without that step."""
        return self._saved.get(step, {}).get("records", {})

    def digest(self, step: int, names: tuple[str, ...]) -> str:
        """SHA-256 of the arrays of a step below any of `names`, from its manifest only."""
        manifest = _manifest(self._directory / str(step))
        if manifest["problem"]:
            raise _Damaged(f"Checkpoint {self._directory / str(step)}: {manifest['problem']}")
        leaves = manifest["leaves"]
        return files.digest({name: leaves[name] for name in leaves if name.split("/")[0] in names})

    def save(
        self, step: int, state, metrics: Mapping[str, float], problem: str = "", records=None
    ) -> None:
        """Starts to save a state; its buffers may be donated once this returns.

        A step that exists is not saved again. If the disk refuses (full, read-only, ...), this is
        logged, the older steps stay, and the next save tries again; `wait` raises if the last save
        failed.

        Args:
          step: of the state.
          state: a pytree of arrays, each replicated or addressable by this process.
          metrics: numbers by name, among them the one that `keep_best` names.
          problem: why this process must not save now; "": it may.
          records: a dict of JSON values; the method `records` returns it.

        Raises:
          CheckpointError: the state is not finite, or older than the newest checkpoint.
        """
        if step in self.steps():
            return
        if newer := [other for other in self.steps() if other > step]:
            raise CheckpointError(f"step={step}: delete the newer {newer} in {self._directory}")
        fetched = jax.device_get(state)
        for name, leaf in _named(fetched):
            if jnp.issubdtype(leaf.dtype, jnp.floating) and not np.isfinite(leaf).all():
                raise CheckpointError(
                    f"step={step}: {name} is not finite, so nothing was saved; lower "
                    f"optimizer.learning_rate and go on from step {self.latest_step()}"
                )
        self._settle()
        self._guard()
        metrics = {name: float(value) for name, value in metrics.items()}
        facts = {"step": step, "metrics": metrics, "records": records or {}}
        self._manifest = facts | {"leaves": _leaves(fetched)}
        if self._has_failed(step, problem or _problem_of(self._make_room)):
            return
        path, args = self._directory / str(step), ocp.args.StandardSave(state)
        if not self._has_failed(step, _problem_of(self._writer.save, path, args=args, force=True)):
            self._saving, self._saved[step] = step, facts

    def set_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Sets the metrics of a step that was saved before it was evaluated."""
        self._settle()
        if step not in self.steps():
            return
        self._guard()
        path = self._directory / str(step)
        metrics = {name: float(value) for name, value in metrics.items()}
        manifest = _manifest(path) | {"metrics": metrics}
        problem = manifest.pop("problem")
        if not problem and jax.process_index() == 0:
            problem = _problem_of(_write_manifest, path, manifest)
        if problem := hosts.gather(problem)[0]:
            logging.error("The metrics of step %d could not be saved: %s", step, problem)
        else:
            self._saved[step] |= {"metrics": metrics}

    def restore_latest(self, abstract_state):
        """The newest undamaged state, bit for bit as saved; None when there is no checkpoint.

        Damaged steps are logged, and the next save deletes them.

        Args:
          abstract_state: the state's `jax.ShapeDtypeStruct`s with shardings.

        Raises:
          CheckpointError: every checkpoint is damaged, or one belongs to another model.
        """
        self._settle()
        return self._first_undamaged(reversed(self.steps()), abstract_state)

    def restore_best(self, abstract_state):
        """Like `restore_latest`, the undamaged state with the lowest `keep_best`."""
        self._settle()
        steps = [*self._steps_without_metrics(), *self._best_first()]
        state = self._first_undamaged(steps, abstract_state)
        if state is None:
            raise CheckpointError(f"No checkpoint in {self._directory} has a {self._keep_best!r}.")
        return state

    def restore_step(self, step: int, abstract_state=None):
        """The state of `step`; without an `abstract_state` as dicts and lists.

        Raises:
          CheckpointError: it is missing, damaged or belongs to another model.
        """
        if step not in self.steps():
            raise CheckpointError(f"No checkpoint {step} in {self._directory}, only {self.steps()}")
        path = self._directory / str(step)
        try:
            manifest = _manifest(path)
            problem = self._saved[step].get("problem") or manifest["problem"]
            problem = problem or _problem_of_files(path, manifest["files"])
        except PermissionError as error:
            raise _unreadable(path, error) from error
        _require_everywhere(path, problem)
        if abstract_state is not None:
            _check_fit(path, manifest["leaves"], abstract_state)
        try:
            # Leaves are matched by name. Orbax would also insist on the same empty parts, but a
            # state of another version of this package need not have them.
            wanted = dict(_named(abstract_state))
            replicated = NamedSharding(Mesh(np.array(jax.devices()), "all"), PartitionSpec())
            tree = self._handler.metadata(path).tree
            saved = [
                jax.ShapeDtypeStruct(
                    *(leaf.shape, leaf.dtype),
                    sharding=wanted[name].sharding if name in wanted else replicated,
                )
                for name, leaf in _named(tree)
            ]
            saved = jax.tree.unflatten(jax.tree.structure(tree), saved)
            state = self._writer.restore(path, args=ocp.args.StandardRestore(saved))
            wrong = sorted(set(manifest["leaves"].items()) - set(_leaves(state).items()))
            problem = f"{len(wrong)} leaves are not as saved: {wrong[0][0]} ..." if wrong else ""
            if abstract_state is not None and not problem:
                leaves, structure = dict(_named(state)), jax.tree.structure(abstract_state)
                state = jax.tree.unflatten(structure, [leaves[name] for name in wanted])
        except (MemoryError, PermissionError, jax.errors.JaxRuntimeError) as error:
            # This is no damage, so no other step may take its place.
            raise CheckpointError(f"{path} cannot be read ({files.first_line(error)})") from error
        except Exception as error:  # errors of tensorstore, zstd, JSON and orbax share no class
            problem = files.first_line(error)
        _require_everywhere(path, problem)
        return state

    def wait(self) -> None:
        """Blocks until the current save is committed; CheckpointError if the last one failed."""
        self._settle()
        if self._last_problem:
            raise CheckpointError(self._last_problem)

    def close(self) -> None:
        """Waits like `wait` and ends orbax's threads, also when the save failed."""
        try:
            self.wait()
        finally:
            self._writer.close()

    def _finalize(self, directory: epath.Path) -> None:
        """What orbax calls before a save gets its final name; it also writes the manifest."""
        type(self._handler).finalize(self._handler, _LiteralPath(directory))
        paths = {str(path.relative_to(directory)): path for path in _files(directory)}
        digests = {name: _file_digest(path) for name, path in paths.items()}
        self._guard()
        _write_manifest(directory, self._manifest | {"files": digests})

    def _best_first(self) -> list[int]:
        values = {step: self.metrics(step).get(self._keep_best, math.nan) for step in self.steps()}
        return sorted((s for s in values if math.isfinite(values[s])), key=values.get)

    def _steps_without_metrics(self) -> list[int]:
        # Their manifests could not be read, so each of them may be the best.
        return [step for step, facts in self._saved.items() if facts.get("problem")]

    def _first_undamaged(self, steps: Iterable[int], abstract_state):
        damage = {}
        for step in steps:
            try:
                state = self.restore_step(step, abstract_state)
            except _Damaged as error:
                logging.warning("%s; trying the next one.", error)
                damage[step] = str(error)
            else:
                self._to_delete |= set(damage)
                self._saved = {s: facts for s, facts in self._saved.items() if s not in damage}
                self.damaged_steps = sorted(damage)
                return state
        if damage:
            raise CheckpointError(f"no checkpoint is intact: {'; '.join(damage.values())}")
        return None

    def _settle(self) -> None:
        """Waits for the current save; if it went well, deletes the steps not to be kept."""
        if self._saving is None:
            return
        step, self._saving = self._saving, None
        begin = time.monotonic()
        problem = _problem_of(self._writer.wait_until_finished)
        if (waited := time.monotonic() - begin) > SLOW:
            logging.warning("Waited %.1f s for the save of step %d.", waited, step)
        if not problem and jax.process_index() == 0:
            problem = _manifest(self._directory / str(step))["problem"]  # as it is on disk
        if problem:
            self._guard()  # another process may have taken over and deleted this save
        if self._has_failed(step, problem):
            return
        self._last_problem = ""
        kept = {*self.steps()[-self._keep_latest :], *self._best_first()[:1]}
        kept |= set(self._steps_without_metrics()) if self._keep_best else set()
        self._delete(set(self.steps()) - kept)

    def _has_failed(self, step: int, problem: str) -> bool:
        # All processes take part in a save or none does.
        if hosts.all_true(not problem):
            return False
        self._saved.pop(step, None)
        problem = problem or "another process could not write"
        self._last_problem = f"Step {step} could not be saved in {self._directory}: {problem}"
        logging.error("%s. The steps %s are there; the next save tries again.",
                      self._last_problem, self.steps())  # fmt: skip
        return True

    def _make_room(self) -> None:
        self._delete(self._to_delete)
        self._to_delete = set()
        if jax.process_index() == 0:
            self._directory.mkdir(parents=True, exist_ok=True)
            for entry in self._directory.iterdir():
                if ".orbax-checkpoint-tmp" in entry.name:  # left by a killed save
                    entry.rmtree()

    def _delete(self, steps: set[int]) -> None:
        for step in sorted(steps):
            self._guard()
            self._saved.pop(step, None)
            if jax.process_index() == 0 and (
                problem := _problem_of((self._directory / str(step)).rmtree, missing_ok=True)
            ):
                logging.warning("Step %d could not be deleted: %s", step, problem)


class _LiteralPath(type(epath.Path())):
    """A path in which orbax may search by patterns although its own name has a `[` or `*`."""

    def glob(self, pattern: str) -> Iterator[epath.Path]:
        return epath.Path(glob.escape(str(self))).glob(pattern)


def _is_no_orbax_error(record) -> bool:
    # Orbax logs what it raises, with a traceback; this module reports it in one line.
    return record.levelname != "ERROR" or "/orbax/" not in record.pathname


def _steps_of_process_0(path: epath.Path) -> dict[int, dict]:
    # All processes must go on from the same step, so process 0 reads for all of them.
    steps = hosts.gather(_read_steps(path) if jax.process_index() == 0 else [])[0]
    undamaged = [step for step, facts in steps if not facts["problem"]]
    missing = [s for s in undamaged if not files.becomes_visible(path / str(s) / MANIFEST)]
    if not hosts.all_true(not missing):
        who = f"process {jax.process_index()}" if missing else "another process"
        raise CheckpointError(f"{path}: {who} does not see the steps {missing} that process 0 sees")
    return dict(steps)


def _read_steps(path: epath.Path) -> list[tuple[int, dict]]:
    # (step, its metrics, records and what is wrong with its manifest).
    if "\\" in path.as_posix():
        raise CheckpointError(f"{path}: orbax takes \\ for /; choose a --workdir without it")
    if not path.is_dir() and not os.path.lexists(path):
        return []
    try:
        names = [entry.name for entry in path.iterdir()]
        steps = sorted(int(name) for name in names if re.fullmatch("0|[1-9][0-9]*", name))
        manifests = [_manifest(path / str(step)) for step in steps]
    except OSError as error:  # a dangling link, a file, a directory of another user
        raise _unreadable(path, error) from error
    defaults = {"problem": "", "metrics": {}, "records": {}}
    facts = [{name: each.get(name, defaults[name]) for name in defaults} for each in manifests]
    return list(zip(steps, facts, strict=True))


def _unreadable(path: epath.Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{path} cannot be read ({error}); make it readable, or choose another --workdir"
    )


def _require_everywhere(path: epath.Path, problem: str) -> None:
    # All processes must restore the same checkpoint: a problem of one is a problem of all.
    if not hosts.all_true(not problem):
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
        lines[20:] = [f"and {len(lines) - 20} more"] * (len(lines) > 20)
        raise CheckpointError(f"checkpoint {path} belongs to another model: {'; '.join(lines)}")


def _named(tree) -> list[tuple[str, Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves]


def _leaves(tree) -> dict[str, str]:
    # By path: "float32[3, 4]", and for arrays "float32[3, 4] SHA-256 of the bytes".
    table = {}
    for name, leaf in _named(jax.device_get(tree)):
        table[name] = f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            table[name] += f" {hashlib.sha256(leaf.tobytes()).hexdigest()}"
    return table


def _manifest(path: epath.Path) -> dict:
    try:
        with files.opened(path / MANIFEST) as file:
            manifest = files.unseal(json.loads(file.read()))
        if manifest.get("step", int(path.name)) != int(path.name):
            raise ValueError(f"it is of step {manifest['step']}")
        return manifest | {"problem": ""}
    except PermissionError:  # this is no damage, so no other step may take its place
        raise
    except Exception as error:  # a flipped bit can raise anything
        return {"problem": f"{MANIFEST}: {files.first_line(error)}"}


def _write_manifest(path: epath.Path, manifest: dict) -> None:
    files.write(path / MANIFEST, json.dumps(files.seal(manifest)))


def _problem_of_files(path: epath.Path, digests: dict[str, str]) -> str:
    # The problem of the first file that is not as it was saved; "" if all are.
    for name, digest in digests.items():
        try:
            if _file_digest(path / name) != digest:
                return f"{name} is not as saved"
        except PermissionError:
            raise
        except OSError as error:
            return files.first_line(error)
    return ""


def _files(directory: epath.Path) -> Iterator[epath.Path]:
    for entry in sorted(directory.iterdir()):
        if entry.is_dir():
            yield from _files(entry)
        else:
            yield entry


def _file_digest(path: epath.Path) -> str:
    with files.opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _problem_of(action: Callable, *args, **kwargs) -> str:
    try:
        action(*args, **kwargs)
    except UserError:  # of the guard: it ends the run
        raise
    except Exception as error:  # errors of orbax, tensorstore and file systems share no class
        return files.first_line(error)
    return ""
