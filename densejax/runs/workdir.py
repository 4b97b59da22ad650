"""The run directory: its default name, its lock, its configuration and what a resume accepts.

It holds `config.json` (written last when it is made), `history.jsonl` (one line per start), `lock`
while a run works in it, and what training writes. Process 0 writes, the others compare.
"""

import ast
import contextlib
import dataclasses
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

from densejax import models
from densejax.config import UserError, flatten
from densejax.config import default as default_config
from densejax.runs import files, hosts, lock

# What a resume may change: these keys and everything below them.
RESUMABLE = (
    *("checkpoint.every_epochs", "checkpoint.keep_latest", "data.directory", "data.manual_dir"),
    *("data.workers", "evaluate.batch_size", "log", "parallel.mode", "profile", "train.epochs"),
    "train.max_skipped_steps",
)
PACKAGES = ("densejax", "flax", "jax", "jaxlib", "numpy", "optax", "orbax-checkpoint")
# What --mode=eval may change besides: how a trained network is measured.
MEASURED = ("checkpoint.select", "evaluate")
# Modules of this package that cannot change a result. A new module counts until it is listed here.
UNMEASURED = (
    *("analysis", "command_line", "compile", "export", "inference", "main", "predict"),
    *("pretrained", "reuse", "summary", "topology", "runs.formats", "runs.goodput", "runs.hosts"),
    *("runs.interrupt", "runs.lock", "runs.metric_log"),
)
# What a run is made of: a directory that has one of them belongs to a run, or to somebody.
RUN_FILES = ("checkpoints", "goodput.json", "metrics.jsonl", "summary.json", "timings.jsonl")
# Flags of XLA that change no number.
XLA_FLAGS_WITHOUT_EFFECT = ("--xla_dump", "--xla_force_host_platform_device_count")


class WorkdirError(UserError):
    """The run directory is in use, of another configuration, or cannot be written."""


def default(config_name: str, config: ml_collections.ConfigDict) -> str:
    """`runs/<name>-<digest>`: the same command finds the same directory again."""
    return f"runs/{config_name}-{digest(config)[:8]}"


def digest(config: ml_collections.ConfigDict) -> str:
    """SHA-256 of all that a result depends on: of the `RESUMABLE` keys `train.epochs` alone.

    A short trial must not become the first part of the real run without a word: the same directory
    goes on to more epochs only where --workdir names it.
    """
    flat = _flat(config.to_dict())
    kept = {
        key: flat[key] for key in flat if not _is_below(RESUMABLE, key) or key == "train.epochs"
    }
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def difference(old: dict, new: dict) -> list[str]:
    """One "dotted.key: old -> new" per key that differs; values as JSON, a tuple is a list."""
    old, new = _flat(old), _flat(new)
    return [
        f"{key}: {old.get(key, '(absent)')} -> {new.get(key, '(absent)')}"
        for key in sorted(old | new)
        if old.get(key) != new.get(key)
    ]


def completed(stored: dict) -> dict:
    """A stored configuration; a key that is newer than its run is at its default.

    Raises:
      ValueError, LookupError, TypeError, AttributeError: it is damaged.
    """
    config, family = default_config().to_dict(), models.FAMILIES[stored["model"]["family"]]
    fields = (field for field in dataclasses.fields(family) if field.name not in models.RUN_FIELDS)
    config["model"] = {field.name: field.default for field in fields}
    for key, value in stored.items():
        section = config.get(key)
        config[key] = section | value if isinstance(section, dict) else value
    return config


def same_run(old: dict, config: ml_collections.ConfigDict) -> bool:
    """Whether a finished run's configuration asks for the same steps and the same result."""
    return not any(
        line.startswith("train.epochs:") or not _is_below(RESUMABLE, line.partition(":")[0])
        for line in difference(completed(old), config.to_dict())
    )


def version_changes(before: dict[str, str], found: dict[str, str]) -> list[str]:
    """What differs between recorded versions and those `found`, as `difference` says it.

    A name that was not recorded yet, by an older version of this package, is not compared, but for
    "code": a result whose code nobody knows is of other code.
    """
    names = {name for name in found if name in before or name == "code"}
    return difference(
        {"versions": {name: before[name] for name in names & before.keys()}},
        {"versions": {name: found[name] for name in names}},
    )


def history(path: epath.Path) -> list[dict]:
    """The starts that a run directory records, oldest first; [] where there is none.

    Raises:
      WorkdirError: history.jsonl is damaged.
    """
    lines = (files.read_text(path / "history.jsonl") or "").splitlines()
    try:
        starts = [unseal(files.parse_json(line)) for line in lines]
        if not all(isinstance(start["changes"], list) for start in starts):
            raise ValueError("changes are not a list")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise WorkdirError(
            f"workdir={path}: history.jsonl is damaged ({error}); restore it or choose another "
            f"--workdir"
        ) from error
    return starts


def changes(path: epath.Path) -> list[str]:
    """Every change that starts in a run directory have made, oldest first."""
    return [change for start in history(path) for change in start["changes"]]


@functools.cache
def code_digest(root: pathlib.Path = pathlib.Path(__file__).parents[1]) -> str:
    """A digest of the code that can change a result: comments, docstrings and layout do not."""
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

    "code" is `code_digest`; "matmul_precision" names the platform as well, whose default it may be:
    float32 products are TF32 on an H100 and bfloat16 on a TPU unless JAX is told otherwise.
    """
    precision = jax.config.jax_default_matmul_precision or "default"
    flags = os.environ.get("XLA_FLAGS", "").split()
    return {
        "python": sys.version.split()[0],
        "code": code_digest(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
        "matmul_precision": f"{precision} on {jax.default_backend()}",
        "x64": str(jax.config.jax_enable_x64),
        "xla_flags": " ".join(f for f in flags if not f.startswith(XLA_FLAGS_WITHOUT_EFFECT)),
    }


def unseal(record: dict) -> dict:
    """A record of a run as it was written, whose "versions" are there.

    Raises:
      ValueError, LookupError, TypeError, AttributeError: it is damaged.
    """
    # Before versions had a precision, records had no seal.
    content = files.unseal(record, is_old="matmul_precision" not in record["versions"])
    if not all(isinstance(text, str) for text in content["versions"].values()):
        raise ValueError("versions are not text")
    return content


@contextlib.contextmanager
def open_run(
    path: epath.PathLike,
    config: ml_collections.ConfigDict,
    force: bool = False,
    found: dict[str, str] | None = None,
) -> Iterator[Callable[[], None]]:
    """Makes or reopens the directory that all processes share and holds its lock.

    The stored configuration may differ in the `RESUMABLE` keys, with `force` in any; `config.json`
    then takes the new values and `history.jsonl` records the change. The same holds for the
    versions `found`, of the code, its packages and the data. Raises WorkdirError on every process
    when one of them refuses. Nobody but the user may write what is written within.

    Yields:
      What to call before every write: LockError where another process has the lock by now.
    """
    found = versions() if found is None else found
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
                    changes = _accepted_changes(path, config, found, force)
                    require_held()
                    _record_start(path, config, found, changes)
                elif my_turn:
                    _wait_for(path / "config.json")
                    _accepted_changes(path, config, found, force=False)
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
    found: dict[str, str] | None = None,
    measures: bool = False,
) -> list[str]:
    """For readers, who take no lock: WorkdirError unless `path` is a run of this configuration.

    Args:
      path: of the run directory.
      config: may differ in the `RESUMABLE` keys.
      found: versions that must be those of the run; None: any.
      measures: whether the configuration may differ in the `MEASURED` keys too, and the versions.

    Returns:
      What differs from the run.
    """
    path, accepted = epath.Path(path), (*RESUMABLE, *((*MEASURED, "versions") * measures))
    try:
        changes = _accepted_changes(path, config.to_dict(), found or {}, False, accepted)
    except OSError as error:
        raise WorkdirError(f"workdir={path}: {error}.") from error
    if changes is None:
        raise WorkdirError(f"workdir={path}: not a run directory (it has no config.json).")
    return changes


def _accepted_changes(path, config, found, force, accepted=RESUMABLE) -> list[str] | None:
    stored, starts = files.read_text(path / "config.json"), history(path)
    if stored is None:
        left = [name for name in RUN_FILES if (path / name).exists()]
        if left and not force:
            raise WorkdirError(
                f"workdir={path}: it has {' and '.join(left)} but no config.json, which says what "
                f"run that is; restore it or choose another --workdir"
            )
        return None
    try:
        stored = files.parse_json(stored)
        if missing := {"data", "model", "train"} & config.keys() - stored.keys():
            raise ValueError(f"it has no {min(missing)}")
        changes = difference(completed(stored), config)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise WorkdirError(
            f"workdir={path}: config.json is damaged ({error}); restore it or choose another "
            f"--workdir"
        ) from error
    if found and not starts:
        raise WorkdirError(
            f"workdir={path}: history.jsonl, which says what code the run is of, is missing; "
            f"restore it or choose another --workdir"
        )
    changes += version_changes(starts[-1]["versions"], found) if found else []
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


def _wait_for(stored) -> None:
    if not files.becomes_visible(stored):
        raise WorkdirError(
            f"workdir={stored.parent}: process {jax.process_index()} does not see what process "
            f"0 wrote there. Choose a --workdir that all hosts share."
        )


def _record_start(path, config, found, changes) -> None:
    file = path / "history.jsonl"
    start = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "versions": found,
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "command": sys.argv,  # with --resume=force where it was forced
        "changes": changes or [],
    }
    files.write(file, (files.read_text(file) or "") + json.dumps(files.seal(start)) + "\n")
    if changes != []:  # new, or changed
        files.write_json(path / "config.json", config)


def _flat(tree: dict) -> dict[str, str]:
    return {key: json.dumps(value, sort_keys=True) for key, value in flatten(tree).items()}


def _is_below(names: tuple[str, ...], key: str) -> bool:
    """Whether a dotted key is one of some names, or below one of them."""
    return any(key == name or key.startswith(f"{name}.") for name in names)
