"""The run directory: its default name, its lock, and what a start in it may change.

A directory belongs to one configuration, code and data. A start with others is refused, and the
difference is shown. It holds `config.json` (written last when the directory is made),
`history.jsonl` (one line for each start), `lock` while a run works in it, and what training writes.
Process 0 writes, the others compare.
"""

import ast
import contextlib
import datetime
import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
import socket
import sys
from collections.abc import Callable, Iterator

import jax
import ml_collections
from etils import epath

import densejax
from densejax import models
from densejax.config import UserError, flatten
from densejax.config import default as default_config
from densejax.runs import files, hosts, lock

# The length of a run. With another value it has another result, but it can continue from its step.
LENGTH = ("train.epochs", "train.max_steps")
# A resume may change these keys and everything below them.
RESUMABLE = (
    *LENGTH,
    *("checkpoint.every_epochs", "checkpoint.keep_latest", "data.directory", "data.manual_dir"),
    *("data.workers", "evaluate.assess", "evaluate.batch_size", "log", "parallel.mode", "profile"),
    "train.max_skipped_steps",
)
PACKAGES = ("flax", "jax", "jaxlib", "numpy", "optax", "orbax-checkpoint")
# --mode=eval may change these as well: how a trained network is measured.
MEASURED = ("checkpoint.select", "evaluate")
# Modules that cannot change a result; all others count as code that can.
UNMEASURED = (
    *("analysis", "assess", "command_line", "compile", "cut", "export", "inference", "main"),
    *("predict", "pretrained", "reuse", "summary", "topology", "runs.formats", "runs.goodput"),
    *("runs.hosts", "runs.interrupt", "runs.large_pages", "runs.lock", "runs.metric_log"),
    *("runs.screen", "__main__"),
)
# A directory that has one of these files but no config.json is not taken for an empty one.
RUN_FILES = ("checkpoints", "goodput.json", "metrics.jsonl", "summary.json", "timings.jsonl")
# Flags of XLA that change no number.
XLA_FLAGS_WITHOUT_EFFECT = ("--xla_dump", "--xla_force_host_platform_device_count")


class WorkdirError(UserError):
    """The run directory is in use, of another configuration, or cannot be written."""


def default(config: ml_collections.ConfigDict) -> str:
    """`runs/<name>-<digest>`, so that the same command finds the same directory again."""
    return f"runs/{config.name}-{digest(config)[:8]}"


def digest(config: ml_collections.ConfigDict) -> str:
    """SHA-256 of the configuration without the `RESUMABLE` keys, but with `LENGTH`.

    The length counts, so that a short trial does not silently become the first part of the real
    run: a run goes on to more steps only if --workdir names its directory. A folder of images
    counts, too, since other images are in another folder.
    """
    flat = _flat(config.to_dict())
    is_memory = flat.get("data.storage", '"memory"') == '"memory"'
    said = LENGTH if is_memory else (*LENGTH, "data.manual_dir")
    kept = {key: flat[key] for key in flat if key in said or not _is_below(RESUMABLE, key)}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def difference(old: dict, new: dict) -> list[str]:
    """One "dotted.key: old -> new" for each key that differs; a tuple is equal to a list."""
    old, new = _flat(old), _flat(new)
    return [
        f"{key}: {old.get(key, '(absent)')} -> {new.get(key, '(absent)')}"
        for key in sorted(old | new)
        if old.get(key) != new.get(key)
    ]


def latest(root: str = "runs") -> str:
    """The run that was started last below a folder, by itself or in a sweep.

    Raises:
      WorkdirError: there is none.
    """
    places = [f"{folder}/history.jsonl" for folder in ("*", "*/*", "*/*/*")]
    starts = [file for place in places for file in pathlib.Path(root).glob(place)]
    if not starts:
        raise WorkdirError("--workdir=latest: there is no run in the folder runs here; name one")
    return str(max(starts, key=lambda file: file.stat().st_mtime).parent)


def completed(stored: dict) -> dict:
    """A stored configuration, with defaults for keys that are newer than its run.

    Raises:
      ValueError, LookupError, TypeError, AttributeError: it is damaged.
    """
    config = default_config().to_dict()
    for key, value in (stored | {"model": models.completed(stored["model"])}).items():
        section = config.get(key)
        config[key] = section | value if isinstance(section, dict) else value
    return config


def same_run(old: dict, config: ml_collections.ConfigDict) -> bool:
    """Whether a run of the configuration `old` ends with the result that `config` asks for."""
    return not any(
        key in LENGTH or not _is_below(RESUMABLE, key)
        for key in (line.partition(":")[0] for line in difference(completed(old), config.to_dict()))
    )


def version_changes(recorded: dict[str, str], current: dict[str, str]) -> list[str]:
    """What differs between recorded and current versions, as `difference` says it.

    A name that an older version of this package did not record is not compared, except "code": a
    result of unknown code is of other code.
    """
    names = {name for name in current if name in recorded or name == "code"}
    return difference(
        {"versions": {name: recorded[name] for name in names & recorded.keys()}},
        {"versions": {name: current[name] for name in names}},
    )


def history(path: epath.Path) -> list[dict]:
    """The recorded starts of a run directory, oldest first; [] where there is none.

    Raises:
      WorkdirError: history.jsonl is damaged.
    """
    lines = (files.read_text(path / "history.jsonl") or "").splitlines()
    try:
        starts = [files.unseal(files.parse_json(line)) for line in lines]
        if not all(isinstance(start["changes"], list) for start in starts):
            raise ValueError("changes are not a list")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise _unusable(path, f"history.jsonl is damaged ({error})") from error
    return starts


@functools.cache
def code_digest(root: pathlib.Path = pathlib.Path(__file__).parents[1]) -> str:
    """A digest of the code that can change a result, without comments, docstrings and layout."""
    code = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        name = ".".join(path.relative_to(root).with_suffix("").parts)
        if not _is_below(UNMEASURED, name):
            tree = ast.parse(path.read_bytes())
            for node in ast.walk(tree):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                    is_documented = ast.get_docstring(node) is not None
                    node.body = node.body[1:] if is_documented else node.body
            code.update(f"{name}\n{ast.unparse(tree)}\n".encode())
    return code.hexdigest()[:12]


def versions() -> dict[str, str]:
    """What a result depends on besides its configuration and data; starts the devices.

    "matmul_precision" includes the platform, which decides what "default" means: by default JAX
    multiplies float32 matrices in TF32 on an H100 and in bfloat16 on a TPU.
    """
    precision = jax.config.jax_default_matmul_precision or "default"
    flags = os.environ.get("XLA_FLAGS", "").split()
    return {
        "python": sys.version.split()[0],
        "code": code_digest(),
        "densejax": densejax.__version__,
        **{name: importlib.metadata.version(name) for name in PACKAGES},
        "matmul_precision": f"{precision} on {jax.default_backend()}",
        "x64": str(jax.config.jax_enable_x64),
        "xla_flags": " ".join(f for f in flags if not f.startswith(XLA_FLAGS_WITHOUT_EFFECT)),
    }


@contextlib.contextmanager
def open_run(
    path: epath.PathLike,
    config: ml_collections.ConfigDict,
    force: bool = False,
    current: dict[str, str] | None = None,
) -> Iterator[Callable[[], None]]:
    """Makes or reopens the directory that all processes share, and holds its lock.

    The stored configuration may differ in the `RESUMABLE` keys. With `force` it may differ in any
    key, and the versions may differ, too. `config.json` then takes the new values, and
    `history.jsonl` records the change. Within the context, only the user may write new files.

    Args:
      path: of the run directory.
      config: the whole configuration.
      force: accept another configuration, code or data.
      current: versions of the code, its packages and the data.

    Yields:
      A function to call before every write; LockError if another process has the lock by now.

    Raises:
      WorkdirError: on every process, if one of them refuses.
    """
    current = versions() if current is None else current
    path, config, is_writer = epath.Path(path), config.to_dict(), jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        stack.callback(os.umask, before := os.umask(0o022))
        os.umask(before | 0o022)
        for my_turn in (is_writer, not is_writer):  # process 0 writes, then the others compare
            problem = ""
            try:
                if my_turn and is_writer:
                    is_remote = "://" in os.fspath(path)  # object stores have no modes
                    path.mkdir(parents=True, exist_ok=True, mode=None if is_remote else 0o700)
                    require_held = stack.enter_context(lock.locked(path))
                    changes = _accepted_changes(path, config, current, force)
                    require_held()
                    _record_start(path, config, current, changes)
                elif my_turn:
                    if not files.becomes_visible(path / "config.json"):
                        raise WorkdirError(
                            f"workdir={path}: process {jax.process_index()} does not see what "
                            f"process 0 wrote there. Choose a --workdir that all hosts share."
                        )
                    _accepted_changes(path, config, current, force=False)
            except UserError as error:
                problem = str(error)
            except (OSError, ValueError) as error:
                problem = f"workdir={path}: {error}. Choose a --workdir that can be written."
            if any(problems := hosts.gather(problem)):
                raise WorkdirError(problem or max(problems))
        yield require_held if is_writer else (lambda: None)


def check(
    path: epath.PathLike,
    config: ml_collections.ConfigDict,
    current: dict[str, str] | None = None,
    measures: bool = False,
) -> list[str]:
    """Checks, without the lock, that `path` is a run of this configuration.

    Args:
      path: of the run directory.
      config: may differ from the run's in the `RESUMABLE` keys.
      current: versions, which must be those of the run; None: any.
      measures: whether the `MEASURED` keys and the versions may differ as well.

    Returns:
      What differs from the run.

    Raises:
      WorkdirError: it is no run, or one of another configuration, code or data.
    """
    path, accepted = epath.Path(path), (*RESUMABLE, *((*MEASURED, "versions") * measures))
    try:
        changes = _accepted_changes(path, config.to_dict(), current or {}, False, accepted)
    except OSError as error:
        raise WorkdirError(f"workdir={path}: {error}.") from error
    if changes is None:
        raise WorkdirError(f"workdir={path}: not a run directory (it has no config.json).")
    return changes


def _accepted_changes(path, config, current, force, accepted=RESUMABLE) -> list[str] | None:
    # None: there is no run yet.
    stored, starts = files.read_text(path / "config.json"), history(path)
    if stored is None:
        left = [name for name in RUN_FILES if (path / name).exists()]
        if left and not force:
            names = " and ".join(left)
            raise _unusable(path, f"it has {names} but no config.json, which says what run that is")
        return None
    try:
        changes = difference(completed(files.parse_json(stored)), config)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise _unusable(path, f"config.json is damaged ({error})") from error
    if current and not starts:
        text = "history.jsonl, which says what code the run is of, is missing"
        raise _unusable(path, text)
    changes += version_changes(starts[-1]["versions"], current) if current else []
    refused = [line for line in changes if not _is_below(accepted, line.partition(":")[0])]
    if refused and not force:
        advice = (
            "Choose another --workdir, or --resume=force to take the new."
            if accepted == RESUMABLE
            else f"Give the run's own values; of other keys, those below {' and '.join(MEASURED)} "
            f"may differ."
        )
        raise WorkdirError(
            f"workdir={path} is of another configuration, code or data ({'; '.join(refused)}). "
            f"{advice}"
        )
    return changes


def _record_start(path, config, current, changes) -> None:
    file = path / "history.jsonl"
    start = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "versions": current,
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "command": sys.argv,  # with --resume=force where it was forced
        "changes": changes or [],
    }
    files.write(file, (files.read_text(file) or "") + json.dumps(files.seal(start)) + "\n")
    if changes != []:  # new, or changed
        files.write_json(path / "config.json", config)


def _unusable(path: epath.Path, problem: str) -> WorkdirError:
    return WorkdirError(f"workdir={path}: {problem}; restore it or choose another --workdir")


def _flat(tree: dict) -> dict[str, str]:
    return {key: json.dumps(value, sort_keys=True) for key, value in flatten(tree).items()}


def _is_below(names: tuple[str, ...], key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)
