"""From image files to their most probable classes."""

from typing import Any

import jax
import numpy as np
from etils import epath
from PIL import Image, ImageOps

from densejax.config import UserError
from densejax.data import facts, images
from densejax.inference import classifier

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
