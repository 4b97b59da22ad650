"""What a run remembers of its data in `data.json`: classes, normalisation, range of brightness."""

import json
from typing import Any

import numpy as np
from etils import epath

from densejax.config import UserError
from densejax.data.official import STREAMED, SetInfo
from densejax.runs import files

FILE = "data.json"
KEYS = {  # of the file, and the field of SetInfo that each holds
    **{key: key for key in ("image_shape", "class_names", "splits", "mean", "std")},
    **{"white": "white_level", "usual": "usual_brightness"},
}
# The images of weights of 1,000 classes whose model.json says nothing else; in uint8 units.
IMAGENET = {key: getattr(STREAMED["imagenet2012"], key) for key in ("image_shape", "mean", "std")}

BGR = ("keras", "resnet")  # the project and the family whose networks read blue, green, red


def brightness(images: np.ndarray) -> dict[str, np.ndarray]:
    """Mean values of images [batch, height, width, channels] and of their outermost pixels.

    The second one tells a white background from a black one.
    """
    is_border = np.ones(images.shape[1:3], bool)
    is_border[1:-1, 1:-1] = False
    return {"mean value": images.mean((1, 2, 3)), "border": images[:, is_border].mean((1, 2))}


def write(path: epath.Path, info: SetInfo, images: np.ndarray) -> None:
    """Writes what a run has to remember; UserError where the disk refuses.

    Args:
      path: the run directory.
      info: of the set, with the mean and std that normalise the images.
      images: some that train, uint8 [batch, height, width, channels], as evaluation takes them.
    """
    ranges = {}
    for name, values in brightness(images).items():
        low, high = np.percentile(values, (1, 99)) if len(images) else (0, 255)
        margin = max((high - low) / 2, images.max(initial=0) / 10)
        ranges[name] = (low - margin, high + margin)
    fields = vars(info) | {"usual_brightness": ranges}
    content = {key: fields[field] for key, field in KEYS.items()}
    with files.writing(f"{path / FILE} cannot be written", "choose another --workdir"):
        files.write_json(path / FILE, files.seal(content))


def read(path: epath.Path) -> SetInfo | None:
    """What `write` wrote into a run directory; None for a run that is older than this file.

    Raises:
      UserError: a damaged file.
    """
    if (text := files.read_text(path / FILE)) is None:
        return None
    try:
        stored = without_lists(files.unseal(files.parse_json(text)))
        return SetInfo(**{field: stored[key] for key, field in KEYS.items()})
    except Exception as error:  # damage leads to errors of many kinds
        raise UserError(f"{path / FILE}: it is damaged ({error}); restore it") from error


def require_same(path: epath.Path, info: SetInfo) -> None:
    """Raises UserError where a run was trained with other classes, mean or std than `info` has."""
    if (learned := read(path)) is None:
        return
    hint = "name the data that it was trained on, or choose another --workdir"
    old, new = learned.class_names, info.class_names
    if old != new:
        sides = (("missing", set(old) - set(new)), ("new", set(new) - set(old)))
        said = [f"{what} {', '.join(sorted(names)[:5])}" for what, names in sides if names]
        raise UserError(
            f"workdir={path}: the data have other classes than the {len(old)} that were trained on "
            f"({'; '.join(said) or 'the same in another order'}): {hint}"
        )
    for key in ("mean", "std"):
        if (old := getattr(learned, key)) != (new := getattr(info, key)):
            raise UserError(f"workdir={path}: it was trained with {key} = {old}, not {new}: {hint}")


def of_weights(
    directory: epath.PathLike, keys: tuple[str, ...] = tuple(IMAGENET)
) -> dict[str, Any]:
    """What a directory of weights, or the run that `train.weights` names, says about its images.

    For another project's file these are the facts of ImageNet's images;
    `densejax.weights.store.load_for` refuses a file that does not fit them.

    Raises:
      UserError: it is neither, or one of `keys` is missing or does not fit its network.
    """
    if str(directory).startswith("hf-hub:"):
        return IMAGENET
    path = files.path_of("train.weights", directory)
    if learned := read(path):
        return vars(learned)
    if path.is_file():
        return IMAGENET
    if not path.exists():
        raise UserError(f"train.weights = {str(directory)!r}: there is no such file or directory")
    try:
        found = json.loads((path / "model.json").read_text())
        classes, channels = found["num_classes"], found["image_channels"]
        names = list(map(str, range(classes)))
        network = found.get("names"), found["model"]["family"]
    except Exception as error:  # damage leads to errors of many kinds
        raise UserError(f"{path}: no model.json that can be read ({error!r})") from error
    require_rgb(str(path), *network)
    found = (IMAGENET if (classes, channels) == (1000, 3) else {}) | found
    if missing := [key for key in keys if key not in found]:
        raise UserError(f"{path}/model.json: add {', '.join(missing)}; images cannot do without")
    found["class_names"] = found.get("class_names") or names
    numbers, positive = f"{channels} numbers from 0 to 255", f"{channels} above 0"
    for key, is_one, length, allowed in (
        ("image_shape", lambda n: type(n) is int and n > 0, 3, "[height, width, channels]"),
        ("mean", _is_level, channels, numbers),
        ("std", lambda level: _is_level(level) and level > 0, channels, positive),
        ("class_names", lambda name: isinstance(name, str), classes, f"{classes} names"),
    ):
        value = found.get(key)
        fits = isinstance(value, list | tuple) and len(value) == length and all(map(is_one, value))
        fits = fits and (key != "image_shape" or value[-1] == channels)
        if key in (*keys, "class_names") and not fits:
            raise UserError(f"{path}/model.json: {key} = {value!r}: give {allowed}")
    return without_lists(found)


def require_rgb(source: str, project: str, family: str) -> None:
    """Raises UserError where a project's networks read images in another order of colours."""
    if (project, family) == BGR:
        raise UserError(
            f"{source}: Keras' ResNets want images in the order blue, green, red, which are read "
            f"nowhere; a run from them sets data.normalization = 'statistics' or 'scale'"
        )


def without_lists(value: Any) -> Any:
    """Makes tuples of lists: JSON has lists where a configuration and facts have tuples."""
    if isinstance(value, dict):
        return {key: without_lists(item) for key, item in value.items()}
    return tuple(map(without_lists, value)) if isinstance(value, list) else value


def _is_level(number: Any) -> bool:
    return type(number) in (int, float) and 0 <= number <= 255
