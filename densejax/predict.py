"""Classifies image files: python -m densejax.predict --workdir=runs/digits-... image.png."""

import json
import sys
from typing import Any

import jax
import numpy as np
from absl import flags
from etils import epath
from PIL import Image, ImageOps

from densejax import classifier, command_line, formats, parallel
from densejax.config import UserError, printable
from densejax.data import facts, images

# An override lets the tests import several commands into one process.
WORKDIR = flags.DEFINE_string(
    "workdir", None, "A run's directory, or one of weights.", allow_override=True
)
TOP = flags.DEFINE_integer("top", 5, "Classes to name for each image.", lower_bound=1)
FORMAT = flags.DEFINE_enum(
    "format", "table", ["table", "json"], "How to print.", allow_override=True
)
BATCH_SIZE = 64  # images at once, however many there are: one program, little memory


def read(path: epath.PathLike, network: classifier.Classifier) -> np.ndarray:
    """An image file as the network's images are stored, uint8 [height, width, channels].

    It is turned as its camera says, made grey or RGB, and then what an evaluation makes of a file.
    Where an evaluation reads images of one size as they are, the largest middle of their aspect
    ratio is taken and resized bilinearly.

    Raises:
      UserError: there is no such file, or it holds no intact image, or the network's are no files'.
    """
    height, width, channels = network.image_shape
    if channels not in (1, 3):
        raise UserError(
            f"{path}: the network reads images of {channels} channels; of files, only grey (1) and "
            f"RGB (3) ones are read"
        )
    try:
        encoded = epath.Path(path).read_bytes()
        if network.resize_size and height == width:
            pixels = images.evaluation_crop(encoded, height, resize=network.resize_size)
        else:
            image = Image.fromarray(images.Picture(encoded).decode())
            pixels = np.asarray(ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR))
    except Exception as error:  # Pillow's decoders raise whatever damage leads to
        line = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: no image that can be read ({line})") from error
    if channels == 1:
        pixels = np.asarray(Image.fromarray(pixels).convert("L"))[..., None]
    return np.rint(pixels * (network.white / 255)).astype(np.uint8)


def unlike(network: classifier.Classifier, image: np.ndarray) -> list[str]:
    """How a stored image differs from those that the network was trained on, as far as is known."""
    return [
        f"{name} {value:.3g} (of {network.white}), usual is {max(low, 0):.3g} to {high:.3g}"
        for name, (value,) in facts.brightness(image[None]).items()
        for low, high in [network.usual.get(name, (0, 255))]
        if not low <= value <= high
    ]


def predict(
    network: classifier.Classifier, paths: tuple[epath.PathLike, ...], top: int = 5
) -> list[dict[str, Any]]:
    """The `top` most probable classes of each image file, most probable first.

    Returns:
      For each file {"image": path, "classes": [{"index", "name", "probability"}, ...], "unlike":
      [what is unlike the training images, ...]}.

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
        stored = np.zeros((size, *network.image_shape), np.uint8)  # what is left over stays black
        stored[: len(batch)] = [read(path, network) for path in batch]
        found = jax.device_get(classify(variables, stored))
        for path, image, probabilities, indices in zip(batch, stored, *found, strict=False):
            classes = [
                {"index": int(i), "name": network.class_names[i], "probability": float(p)}
                for p, i in zip(probabilities, indices, strict=True)
            ]
            result = {"image": str(path), "classes": classes, "unlike": unlike(network, image)}
            results.append(result)
    return results


def main(*paths: str) -> int:
    """Does what the flags say; returns the exit code."""
    if not WORKDIR.value:
        raise UserError("--workdir: name a run's directory, or one of weights")
    if not paths:
        raise UserError("name at least one image file")
    parallel.start()
    results = predict(classifier.load(WORKDIR.value), paths, TOP.value)
    for result in results:
        for difference in result["unlike"]:
            text = f"{result['image']} is unlike the training images, its class may be wrong"
            print(f"densejax: {printable(text)}: {difference}", file=sys.stderr)
    if FORMAT.value == "json":
        print(json.dumps(results, indent=2))
        return 0
    for result in results:
        rows = [
            ("", formats.percent(found["probability"]), printable(found["name"]))
            for found in result["classes"]
        ]
        print(printable(result["image"]), formats.table(rows), sep="\n")
    return 0


if __name__ == "__main__":
    command_line.run(main, config="unused", arguments=True)
