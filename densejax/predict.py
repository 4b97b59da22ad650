"""Classifies image files: python -m densejax.predict --workdir=runs/digits-... image.png."""

import json
from typing import Any

import jax
import numpy as np
from absl import flags
from etils import epath
from PIL import Image, ImageOps

from densejax import classifier, command_line, formats, parallel
from densejax.config import UserError

# An override lets the tests import several commands into one process.
WORKDIR = flags.DEFINE_string(
    "workdir", None, "A run's directory, or one of weights.", allow_override=True
)
TOP = flags.DEFINE_integer("top", 5, "Classes to name for each image.", lower_bound=1)
FORMAT = flags.DEFINE_enum(
    "format", "table", ["table", "json"], "How to print.", allow_override=True
)
# Pillow knows more formats, of which some run programs of the machine.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
BATCH_SIZE = 64  # images at once, however many there are: one program, little memory


def read(path: epath.PathLike, image_shape: tuple[int, int, int]) -> np.ndarray:
    """An image file as uint8 [height, width, channels] of the given shape, grey or RGB.

    Another aspect ratio is cropped to its middle, then another size is resized bilinearly.

    Raises:
      UserError: there is no such file, or it holds no intact image.
    """
    height, width, channels = image_shape
    try:
        with epath.Path(path).open("rb") as file, Image.open(file, formats=FORMATS) as image:
            if image.mode.startswith(("I", "F")):  # converted, it would be white without a word
                raise ValueError("its pixels have more than 8 bits")
            image = ImageOps.exif_transpose(image).convert("L" if channels == 1 else "RGB")
            image = ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)
    except Exception as error:  # Pillow's decoders raise whatever damage leads to
        line = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: no image that can be read ({line})") from error
    return np.asarray(image).reshape(image_shape)


def predict(
    network: classifier.Classifier, paths: tuple[epath.PathLike, ...], top: int = 5
) -> list[dict[str, Any]]:
    """The `top` most probable classes of each image file, most probable first.

    Returns:
      For each file {"image": path, "classes": [{"index", "name", "probability"}, ...]}.

    Raises:
      UserError: an image that cannot be read.
    """
    top, size = min(top, len(network.class_names)), min(BATCH_SIZE, len(paths))

    @jax.jit
    def classify(variables, images):
        return jax.lax.top_k(jax.nn.softmax(network.logits(variables, images)), top)

    variables, results = jax.device_put(network.variables), []
    for start in range(0, len(paths), size):
        batch = paths[start : start + size]
        images = np.zeros((size, *network.image_shape), np.uint8)  # what is left over stays black
        images[: len(batch)] = [read(path, network.image_shape) for path in batch]
        found = jax.device_get(classify(variables, images))
        for path, probabilities, indices in zip(batch, *found, strict=False):
            classes = [
                {"index": int(i), "name": network.class_names[i], "probability": float(p)}
                for p, i in zip(probabilities, indices, strict=True)
            ]
            results.append({"image": str(path), "classes": classes})
    return results


def main(*paths: str) -> int:
    """Does what the flags say; returns the exit code."""
    if not WORKDIR.value:
        raise UserError("--workdir: name a run's directory, or one of weights")
    if not paths:
        raise UserError("name at least one image file")
    parallel.start()
    results = predict(classifier.load(WORKDIR.value), paths, TOP.value)
    if FORMAT.value == "json":
        print(json.dumps(results, indent=2))
        return 0
    for result in results:
        rows = [("", formats.percent(c["probability"]), c["name"]) for c in result["classes"]]
        print(result["image"], formats.table(rows), sep="\n")
    return 0


if __name__ == "__main__":
    command_line.run(main, config="unused", arguments=True)
