"""Folders of real JPEGs, as ImageNet has them: many sizes, and the odd ones."""

import functools
import io

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_image


@functools.cache
def whole(name):
    """One of scikit-learn's two photographs; scikit-learn reads both at every call."""
    return Image.fromarray(load_sample_image(name))


def photo(width, height, seed=0):
    """A piece of one of scikit-learn's two photographs, RGB."""
    random, image = np.random.default_rng(seed), whole(("china.jpg", "flower.jpg")[seed % 2])
    if width > image.width or height > image.height:
        return image.resize((width, height), Image.Resampling.BICUBIC)
    left = int(random.integers(image.width - width + 1))
    top = int(random.integers(image.height - height + 1))
    return image.crop((left, top, left + width, top + height))


def encode(image, kind="JPEG", **options):
    """The bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"quality": 90} if kind == "JPEG" else {}) | options)
    return buffer.getvalue()


def odd():
    """Files that ImageNet has under .JPEG: each a name and its content."""
    return {
        "cmyk": encode(photo(50, 40, 1).convert("CMYK")),
        "grey": encode(photo(50, 40, 2).convert("L")),
        "png": encode(photo(50, 40, 3), "PNG"),
        "progressive": encode(photo(60, 40, 4), progressive=True),
    }


def make(root, train=12, val=5, classes=("n01", "n02")):
    """Writes root/train/class/*.JPEG and root/val/class/*.JPEG; the images by relative path."""
    random, written = np.random.default_rng(0), {}
    for split, number in (("train", train), ("val", val)):
        for class_name in classes:
            (root / split / class_name).mkdir(parents=True)
            for index in range(number):
                width, height = random.integers(70, 120, 2).tolist()
                seed = len(written)
                written[f"{split}/{class_name}/{index:02}.JPEG"] = encode(
                    photo(width, height, seed)
                )
    for name, content in odd().items():
        written[f"train/{classes[0]}/{name}.JPEG"] = content
    for path, content in written.items():
        (root / path).write_bytes(content)
    return written
