"""How a trained network errs: which classes it confuses, how well its confidence is calibrated.

The numbers are functions of logits and labels; `of_run` writes them and their pictures into a run.
"""

import contextlib
import json
import math
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict
from scipy.special import softmax

from densejax.analysis import plots
from densejax.config import UserError
from densejax.inference import classifier
from densejax.runs import files, formats, hosts, workdir
from densejax.training import result
from densejax.training.experiment import Experiment
from densejax.training.step import TrainState, evaluated_logits

BINS = 15  # as in Guo et al. 2017
SHOWN = 24  # mistakes with a picture


def predictions(
    experiment: Experiment, state: TrainState, split: str
) -> tuple[np.ndarray, np.ndarray]:
    """Logits [images, classes] and labels [images] of a split, each image once, in its order.

    They are computed as an evaluation computes them; every process calls this and gets all.
    """

    def step(task, state, batch):
        logits = evaluated_logits(task.model, task.preparation, state.variables, batch["image"])
        found = (logits, batch["label"], batch["mask"])
        # On every replica, the whole batch.
        return jax.lax.all_gather(found, task.axis, tiled=True, to="invarying")

    step, found = experiment.map(step), []
    with contextlib.closing(experiment.data.evaluation[split].evaluation()) as batches:
        for batch in batches:
            logits, labels, mask = jax.device_get(step(state, batch))
            found.append((logits[mask], labels[mask]))
    return tuple(map(np.concatenate, zip(*found, strict=True)))


def winners(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The class that each image is taken for [images]; a tie counts against the label."""
    others, rows = logits.copy(), np.arange(len(labels))
    others[rows, labels] = -np.inf
    return np.where(logits[rows, labels] > others.max(1), labels, others.argmax(1))


def confusion(labels: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """The number of images [classes, classes], by their class and by the class predicted."""
    pairs = labels.astype(np.int64) * classes + predicted
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def by_class(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """The "precision", "recall" and "f1" of each class [classes]; NaN for 0 / 0."""
    right, images, predicted = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    with np.errstate(invalid="ignore"):
        scores = right / predicted, right / images, 2 * right / (images + predicted)
    return dict(zip(("precision", "recall", "f1"), scores, strict=True))


def calibration(
    confidences: np.ndarray, correct: np.ndarray, bins: int = BINS
) -> tuple[float, dict[str, np.ndarray]]:
    """The expected calibration error, and what it is of (Guo et al. 2017, equations 1 to 3).

    Args:
      confidences: the largest probability of each image.
      correct: whether the class that has it is the image's.
      bins: M; bin m has the images whose confidence is above (m - 1) / M and at most m / M.

    Returns:
      The error, and by bin the number of "images" and the mean "confidence" and "accuracy", NaN
      where a bin is empty.
    """
    place = np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], confidences)
    images, sums = np.bincount(place, minlength=bins), []
    for values in (confidences, correct):
        sums.append(np.bincount(place, values, bins))
    error = float(np.abs(sums[1] - sums[0]).sum() / len(place))
    with np.errstate(invalid="ignore"):
        means = {"confidence": sums[0] / images, "accuracy": sums[1] / images}
    return error, {"images": images, **means}


def assess(logits: np.ndarray, labels: np.ndarray, class_names: tuple[str, ...]) -> dict[str, Any]:
    """All of the above as JSON, where None stands for NaN, with the most confident mistakes.

    Probabilities are the softmax of the logits, whatever the loss was that trained the network.
    """
    predicted = winners(logits, labels)
    probabilities = softmax(logits.astype(np.float64), axis=1)
    confidences, correct = probabilities.max(1), predicted == labels
    counts = confusion(labels, predicted, len(class_names))
    error, bins = calibration(confidences, correct)
    wrong = np.flatnonzero(~correct)
    wrong = wrong[np.argsort(-confidences[wrong], kind="stable")]
    mistakes = [
        {"image": int(place), "class": class_names[labels[place]]}
        | {"predicted": class_names[predicted[place]], "probability": float(confidences[place])}
        for place in wrong[:SHOWN]
    ]

    def listed(arrays):
        lists = {name: array.tolist() for name, array in arrays.items()}
        return {name: [x if x == x else None for x in values] for name, values in lists.items()}

    return {
        "images": len(labels),
        "accuracy": float(correct.mean()),
        "calibration_error": error,
        "calibration": listed(bins),
        "classes": {"name": list(class_names), **listed(by_class(counts))},
        "confusion": counts.tolist(),
        "mistakes": mistakes,
    }


def of_run(path: epath.Path, split: str = "") -> dict[str, Any]:
    """Assesses the network that a run's result is of; writes `assessment/` into its directory.

    Every process calls it, process 0 writes: pictures, and at last assessment.json, sealed.

    Args:
      path: of the run directory.
      split: images that the run measures; "": those of its result.

    Raises:
      UserError: it is no run, has no checkpoint, is of other data, or cannot be written.
    """
    experiment = classifier.experiment_of(path)
    config, info = experiment.config, experiment.info
    part_size = config.train.batch_size // config.train.accumulate_steps
    devices = math.gcd(jax.device_count(), config.evaluate.batch_size, part_size)
    experiment.devices = jax.devices()[:devices]
    split, summary = split or config.evaluate.final_split, result.read(path)
    with contextlib.closing(classifier.data_of(experiment, path)) as data:
        if split not in data.evaluation:
            raise UserError(f"--split={split}: this run measures {', '.join(data.evaluation)}")
        state = classifier.result_state(experiment, path)
        found = assess(*predictions(experiment, state, split), info.class_names)
        found |= {"split": split, "steps": int(state.step), "result": files.digest(summary or {})}
        if jax.process_index():
            return found
        mistakes = found["mistakes"]
        examples = data.evaluation[split].examples([mistake["image"] for mistake in mistakes])
    for mistake, (*_, file) in zip(mistakes, examples, strict=True):
        mistake["file"] = file
    pictures = {
        "confusion": plots.confusion(np.array(found["confusion"]), info.class_names),
        "reliability": plots.reliability(found["calibration"], found["calibration_error"]),
        "mistakes": plots.mistakes(mistakes, [image for image, *_ in examples], info.white_level),
    }
    folder = path / "assessment"
    with files.writing(f"workdir={path}", "give a run that can be written"):
        folder.mkdir(exist_ok=True)
        for name, picture in pictures.items():
            plots.save(picture, folder / f"{name}.png")
        files.write(folder / "assessment.json", json.dumps(files.seal(found)) + "\n")
    return found


def read(path: epath.Path) -> dict[str, Any]:
    """The assessment of the run's present result; {} if there is none.

    Raises:
      UserError: it is damaged.
    """
    file, summary = path / "assessment" / "assessment.json", result.read(path)
    if summary is None or (text := files.read_text(file)) is None:
        return {}
    try:
        found = files.unseal(files.parse_json(text))
        return found if found["result"] == files.digest(summary) else {}
    except (ValueError, LookupError, AttributeError) as error:
        raise UserError(
            f"{file} is damaged ({error}): delete it, python -m densejax.assess makes it again"
        ) from error


def at_the_end(path: epath.Path, config: ConfigDict) -> None:
    """Assesses the result that a run has come to, unless that is done or the run was stopped.

    Raises:
      UserError: whatever went wrong; the result is written all the same.
    """
    try:
        summary = result.read(path)
        ended = summary is not None and workdir.same_run(summary["config"], config)
        if hosts.gather(ended and not read(path))[0]:
            result.say(line(of_run(path), path))
    except Exception as error:  # of pictures, too
        raise UserError(
            f"the result is written, and not assessed ({files.first_line(error)}); python -m "
            f"densejax.assess --workdir={path} tries again"
        ) from error


def line(found: dict[str, Any], path: epath.Path) -> str:
    """One line that says what came out and where it is."""
    error = formats.percent(found["calibration_error"])
    return (
        f"{formats.plural(found['images'], found['split'] + ' image')}: accuracy "
        f"{formats.percent(found['accuracy'])}, calibration error {error}; {path}/assessment has "
        f"the classes, the mistakes and the pictures"
    )
