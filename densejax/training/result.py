"""What a run reports: a summary before its first step, and its result in summary.json.

A result is sealed against damage. It is given again only while code, data, weights and precision
are still those that it was measured with.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from densejax import data, models
from densejax.config import UserError, printable
from densejax.models import counts
from densejax.models.convolution import cores
from densejax.runs import files, formats, large_pages, workdir
from densejax.training.experiment import Experiment, matmul_precision
from densejax.training.step import TrainState
from densejax.weights import store
from densejax.weights.files import HUB


def say(text: str) -> None:
    """Prints on process 0 alone."""
    if jax.process_index() == 0:
        with contextlib.suppress(OSError):  # the output may be a file on a full disk
            print(text, flush=True)


def summarise(experiment: Experiment, path: epath.Path, start: int) -> dict[str, Any]:
    """Prints what is about to run; returns the part of it that the result stores."""
    task, config = experiment.task, experiment.config
    parameters, multiply_adds = counts.of_network(task.model, task.network_shape)
    device = f"{experiment.mesh.size} x {jax.devices()[0].device_kind}"
    precision, dtype = matmul_precision(config), experiment.computed_task.preparation.dtype
    if dtype != config.train.dtype:
        dtype += f" (a CPU is slower in {config.train.dtype})"
    products = f", products in {precision}" if dtype == "float32" != precision else ""
    pages = f", large pages by {large_pages.VARIABLE}" if large_pages.are_used() else ""
    train = experiment.data.train
    sizes = {name: split.size for name, split in experiment.data.evaluation.items()}
    rows = [
        ("run", str(path)),
        ("model", models.described(config.model)),
        ("size", f"{formats.count(parameters)} parameters, "
                 f"{formats.si(multiply_adds)} multiply-adds an image"),
        ("data", f"{config.data.name}, {formats.plural(train.size, 'image')} train, "
                 + ", ".join(f"{formats.count(n)} {name}" for name, n in sizes.items())),
        ("steps", f"{formats.count(experiment.steps)} of "
                  f"{formats.plural(config.train.batch_size, 'image')}, "
                  + formats.plural(round(experiment.steps / train.steps_per_epoch, 3), "epoch")
                  + (f", resuming after {start}" if start else "")),
        ("devices", f"{device}, {config.parallel.mode}, {dtype}{products}{pages}"),
        *(("hint", text) for text in unused_cores(experiment.mesh.size, config)),
        *((name, printable(text)) for name, text in experiment.data.notes.items()),
    ]  # fmt: skip
    say(formats.table(rows))
    described = {"parameters": parameters, "multiply_adds": multiply_adds, "device": device}
    return described | ({"notes": dict(experiment.data.notes)} if experiment.data.notes else {})


def unused_cores(devices: int, config: ConfigDict) -> list[str]:
    """A hint how to make each core a device, if one CPU device has several cores; else [].

    It is given where the same command would work and compute the same on so many devices.

    On small images XLA divides few operations among cores. On two cores, the step of
    DenseNet-BC-100-12 took 0.6 of the time with two devices; that of DenseNet-121 took 0.85.
    """
    number = cores()
    if jax.default_backend() != "cpu" or devices > 1 or number == 1:
        return []
    images = config.train.batch_size // config.train.accumulate_steps, config.evaluate.batch_size
    if any(size % number for size in images) or config.parallel.batch_norm != "global":
        return []
    return [f"JAX_NUM_CPU_DEVICES={number} makes each core a device: faster on small images"]


def measure(
    experiment: Experiment,
    state: TrainState,
    known: dict[str, dict[str, float]] | None = None,
    stops: Callable[[], bool] | None = None,
) -> dict[str, Any] | None:
    """The result of a state on `evaluate.final_split`; None if `stops()` was true meanwhile.

    With `evaluate.train_images`, training images are measured, too. `known` has metrics by split
    that need not be measured again.
    """
    evaluation, result = experiment.data.evaluation, {}
    for split in (experiment.config.evaluate.final_split, *({"train"} & set(evaluation))):
        values = (known or {}).get(split) or experiment.evaluate(state, split, stops)
        if values is None:
            return None
        result |= {f"{split}_{name}": value for name, value in values.items()}
        result[f"{split}_error"] = 1 - values["accuracy"]
        result[f"{split}_examples"] = evaluation[split].size
        if split == "test":
            result["test_split"] = experiment.data.test_split
    return result | {"steps": int(state.step), "skipped_steps": int(state.skipped[0])}


def versions(config: ConfigDict) -> dict[str, str]:
    """`workdir.versions`, and all else that a result depends on except the data.

    Raises:
      UserError: `train.weights` names neither weights nor a run.
    """
    with jax.default_matmul_precision(matmul_precision(config)):
        current = workdir.versions()
    # A run that resumes does not need them any more; a run that starts will report them missing.
    source = config.train.weights
    if source and (source.startswith(HUB) or files.path_of("train.weights", source).exists()):
        current["weights"] = store.digest(source)
    if config.parallel.batch_norm != "global":  # statistics of parts of the batch
        current["devices"] = str(jax.device_count())
    return current


def read(path: epath.Path) -> dict[str, Any] | None:
    """The result that a run directory has, None where there is none.

    Raises:
      UserError: summary.json is damaged.
    """
    file = path / "summary.json"
    text = files.read_text(file)
    try:
        if text is None:
            return None
        summary = files.unseal(files.parse_json(text))
        line(summary, path)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"{file} is damaged ({error}): delete it, the same command measures it again"
        ) from error
    return summary


def finished(
    path: epath.Path, config: ConfigDict, current: dict[str, str], force: bool = False
) -> dict[str, Any] | None:
    """The result of a run that a configuration asks for; None where there is none yet.

    Args:
      path: of the run directory.
      config: the whole configuration.
      current: today's `versions`; the version of the data is computed here if there is a result.
      force: do not count a result of other versions, so that it is measured again.

    Raises:
      UserError: the result was measured with other versions, or it is damaged.
    """
    summary = read(path)
    if summary is None or not workdir.same_run(summary["config"], config):
        return None
    changes = workdir.version_changes(summary["versions"], current)
    if not changes:
        data_version = {"data": data.version(config)}
        changes = workdir.version_changes(summary["versions"], data_version)
    if changes and not force:
        raise UserError(
            f"workdir={path}: its result was measured with other versions "
            f"({'; '.join(changes)}). --resume=force measures its checkpoint again; another "
            f"--workdir trains again"
        )
    return None if changes else summary


def line(summary: dict[str, Any], path: epath.Path) -> str:
    """One line with the result, and one that says where the rest of it is."""
    split = summary["config"]["evaluate"]["final_split"]
    accuracy = formats.percent(summary[f"{split}_accuracy"])
    images = formats.plural(summary[f"{split}_examples"], "image")
    stored = summary.get("test_split", "test") if split == "test" else split
    text = f"{split} accuracy {accuracy} on {images}"
    text += f" of the split {stored!r}" if stored != split else ""
    if damaged := summary.get("damaged_checkpoints"):
        text += f" at step {summary['steps']}, as the checkpoints of steps {damaged} are damaged"
    return f"{text}\n{path}/summary.json has the rest"
