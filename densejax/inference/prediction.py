"""Finds the most probable classes of image files."""

import glob
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from PIL import Image, ImageOps

from densejax.config import UserError
from densejax.data import facts, images
from densejax.data.encoded import SUFFIXES
from densejax.data.official import one_line
from densejax.inference import classifier

BATCH_SIZE = 64  # a constant: any number of files needs one program and little memory


def read(path: epath.PathLike, network: classifier.Classifier) -> np.ndarray:
    """Reads an image file as the network's images are stored, uint8 [height, width, channels].

    The image is turned upright and made grey or RGB. Then it is resized and cropped as in an
    evaluation. If the network's images were arrays of one size, the largest middle part of their
    shape is cut out and resized (bilinear).

    Raises:
      UserError: the file is missing or has no intact image, or the network's images have a number
        of channels that files do not have.
    """
    height, width, channels = network.image_shape
    if channels not in (1, 3):
        raise UserError(
            f"{path}: the network reads images of {channels} channels; files are read only as grey "
            f"(1) or RGB (3)"
        )
    try:
        encoded = epath.Path(path).read_bytes()
        if network.resize_size:
            pixels = images.evaluation_crop(encoded, height, resize=network.resize_size)
        else:
            image = Image.fromarray(images.Picture(encoded).decode())
            pixels = np.asarray(ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR))
    except Exception as error:  # damage can raise any class in Pillow's decoders
        raise UserError(f"{path}: no image that can be read ({one_line(error)})") from error
    pixels = images.in_channels(pixels, channels)
    return np.rint(pixels * (network.white_level / 255)).astype(np.uint8)


def unusual_brightness(network: classifier.Classifier, image: np.ndarray) -> list[str]:
    """Says which measures of a stored image's brightness are unusual for training images."""
    unusual = []
    for name, (value,) in facts.brightness(image[None]).items():
        low, high = network.usual_brightness.get(name, (0, 255))
        if not low <= value <= high:
            usual = f"usual is {max(low, 0):.3g} to {high:.3g}"
            unusual.append(f"{name} {value:.3g} (of {network.white_level}), {usual}")
    return unusual


def image_files(paths: Sequence[str]) -> list[str]:
    """The files among the paths, and the images anywhere below the folders, in sorted order.

    What is called `.something` is left out of a folder.

    Raises:
      UserError: a folder without an image.
    """
    found = []
    for path in paths:
        if not os.path.isdir(path):
            found.append(path)
            continue
        names = sorted(glob.glob("**", root_dir=path, recursive=True))
        below = [os.path.join(path, n) for n in names if n.lower().endswith(SUFFIXES)]
        below = [name for name in below if not os.path.isdir(name)]
        if not below:
            raise UserError(f"{path}: there is no image in this folder ({', '.join(SUFFIXES)})")
        found += below
    return found


def predict(
    network: classifier.Classifier,
    paths: Sequence[epath.PathLike],
    top: int = 5,
    show: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """Finds the `top` most probable classes of each image file, most probable first.

    Probabilities are the softmax of the logits, whatever the loss was that trained the network.

    Args:
      network: that classifies.
      paths: of the files.
      top: how many classes.
      show: is told how far it is.

    Returns:
      For each file {"image": path, "classes": [{"index", "name", "probability"}, ...], "unlike":
      the texts of `unusual_brightness`}; for a file that cannot be read, it has no class, and
      "error" says why.

    Raises:
      UserError: none of the files can be read; the first error.
    """
    top, size = min(top, len(network.class_names)), min(BATCH_SIZE, max(1, len(paths)))

    @jax.jit
    def classify(variables, images):
        return jax.lax.top_k(jax.nn.softmax(network.logits(variables, images)), top)

    variables, results = jax.device_put(network.variables), []
    for start in range(0, len(paths), size):
        show(f"{start:,} of {len(paths):,} images")
        batch = paths[start : start + size]
        stored = np.zeros((size, *network.image_shape), np.uint8)  # the last ends in black images
        errors = {}
        for image, path in zip(stored, batch, strict=False):
            try:
                image[:] = read(path, network)
            except UserError as error:
                errors[path] = error
        found = jax.device_get(classify(variables, stored))
        for path, image, probabilities, indices in zip(batch, stored, *found, strict=False):
            if path in errors:
                nothing = {"classes": [], "unlike": [], "error": str(errors[path])}
                results.append({"image": str(path)} | nothing)
                continue
            classes = [
                {"index": int(i), "name": network.class_names[i], "probability": float(p)}
                for p, i in zip(probabilities, indices, strict=True)
            ]
            unlike = unusual_brightness(network, image)
            results.append({"image": str(path), "classes": classes, "unlike": unlike})
    if results and all("error" in result for result in results):
        raise UserError(results[0]["error"])
    return results
