"""Images per second that a host decodes, and what a pod would need.

Command: python experiments/benchmarks/loader.py [--step_seconds=0.05] [--format=json]

Decoders: one thread, images per second of processor time, from bytes in memory to a random crop of
224x224. Loader: images per second on the clock, from files to batches on the device, after the
workers have started. The images are gradients with noise, 500x375, JPEG of quality 90, about as
large as ImageNet's are on average. The pod: chips x images per chip / seconds per step.
"""

import contextlib
import functools
import io
import json
import pathlib
import sys
import tempfile
import time

import numpy as np
from PIL import Image

from densejax.models.convolution import cores
from experiments import script

SIZE = 224


def photograph(seed: int) -> Image.Image:
    """A smooth picture with grain: RGB, 500x375."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC), np.float32)
    noisy = smooth + random.normal(0, 18, smooth.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def write(root: pathlib.Path, number: int) -> None:
    """Writes a folder of images, and the same as ArrayRecord."""
    from densejax.data import builders

    tfds = builders.load_tfds()
    for split, count in (("train", number), ("val", 1)):
        (root / "folder" / split / "class").mkdir(parents=True)
        for index in range(count):
            path = root / "folder" / split / "class" / f"{index:06}.JPEG"
            photograph(index).save(path, "JPEG", quality=90)

    class Photos(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            image = tfds.features.Image(encoding_format="jpeg")
            features = {"image": image, "label": tfds.features.ClassLabel(names=["class"])}
            features = tfds.features.FeaturesDict(features)
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, dl_manager):
            return {
                name: self._generate_examples(folder)
                for name, folder in (("train", "train"), ("validation", "val"))
            }

        def _generate_examples(self, folder):
            for index, path in enumerate(sorted((root / "folder" / folder / "class").iterdir())):
                yield index, {"image": str(path), "label": 0}

    Photos.name = "photos"
    with contextlib.redirect_stdout(sys.stderr):  # it reports on both
        Photos(data_dir=root / "records", file_format="array_record").download_and_prepare()


def decoders() -> dict:
    """Functions from (bytes, bit generator) to a crop, by name."""
    import cv2

    from densejax.data import crops

    def crop(height, width, bits):
        return crops.crop_box(height, width, 0.08, bits)

    def by_cv2(encoded, bits):
        image = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR_RGB)
        top, left, height, width = crop(*image.shape[:2], bits)
        return cv2.resize(image[top : top + height, left : left + width], (SIZE, SIZE))

    def by_pillow(encoded, bits):
        image = Image.open(io.BytesIO(encoded)).convert("RGB")
        top, left, height, width = crop(image.height, image.width, bits)
        box = (left, top, left + width, top + height)
        return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BILINEAR, box))

    kept = functools.partial(crops.training_crop, min_area=0.08)
    return {
        "simplejpeg + cv2": lambda encoded, bits: kept(encoded, SIZE, bits),
        "cv2": by_cv2,
        "pillow": by_pillow,
    }


def decoder_rates(paths: list[pathlib.Path], seconds: float) -> dict[str, float]:
    """Images per second of processor time, by decoder."""
    encoded, rates = [path.read_bytes() for path in paths], {}
    for name, decode in decoders().items():
        decode(encoded[0], np.random.Philox(key=[0, 0]))
        done, start = 0, time.process_time()
        while time.process_time() - start < seconds:
            decode(encoded[done % len(encoded)], np.random.Philox(key=[done, 0]))
            done += 1
        rates[name] = done / (time.process_time() - start)
    return rates


def loader_rate(root: pathlib.Path, kind: str, workers: int, batch: int, seconds: float) -> float:
    """Images per second on the clock, from files to a device."""
    import jax

    from configs import imagenet
    from densejax import data
    from densejax.training import parallel

    config = imagenet.get_config()
    config.data.name, config.data.normalization = "photos", "scale"
    config.data.directory = str(root / "records")
    config.data.manual_dir = str(root / "folder") if kind == "folder" else ""
    config.data.workers, config.train.batch_size = workers, batch
    mesh = parallel.mesh()
    streams = data.create(config, parallel.replicated(mesh), parallel.split(mesh))
    start, warm, step = 0.0, 4 + workers, 0
    # What was decoded while the workers started is not counted.
    while step <= warm or time.perf_counter() - start < seconds:
        jax.block_until_ready(streams.train.batch(step))
        start = time.perf_counter() if step == warm else start
        step += 1
    rate = (step - 1 - warm) * batch / (time.perf_counter() - start)
    streams.close()
    return rate


def main() -> None:
    """Prints the rates and the need."""
    parser = script.Parser(__doc__)
    parser.add_argument("--images", type=script.positive, default=512, help="number of images")
    parser.add_argument("--batch_size", type=script.positive, default=64, help="images of a batch")
    parser.add_argument("--seconds", type=float, default=10.0, help="seconds of each measurement")
    parser.add_argument(
        "--workers", type=int, nargs="*", default=[0, 1, 2], help="numbers of processes that decode"
    )
    parser.add_argument(
        "--step_seconds", type=float, default=None, help="seconds of a step of the pod"
    )
    parser.add_argument("--chips", type=int, default=256, help="chips of the pod")
    parser.add_argument("--chips_per_host", type=int, default=4, help="chips of a host")
    parser.add_argument(
        "--images_per_chip", type=int, default=64, help="images of a chip in a step"
    )
    parser.add_argument("--format", choices=["text", "json"], default="text", help="how to print")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        write(root, options.images)
        paths = sorted((root / "folder" / "train" / "class").iterdir())
        bytes_per_image = sum(path.stat().st_size for path in paths) / len(paths)
        rates = decoder_rates(paths, options.seconds)
        loader = {
            kind: {
                workers: loader_rate(root, kind, workers, options.batch_size, options.seconds)
                for workers in options.workers
            }
            for kind in ("folder", "array_record")
        }
    result = {
        "cores": cores(),
        "bytes_per_image": bytes_per_image,
        "decoder_images_per_core_second": rates,
        "loader_images_per_second_by_workers": loader,
    }
    if options.step_seconds:
        need = options.chips * options.images_per_chip / options.step_seconds
        per_host = need * options.chips_per_host / options.chips
        result["pod"] = {
            "images_per_second": need,
            "images_per_second_per_host": per_host,
            "bytes_per_second_per_host": per_host * bytes_per_image,
            "decoding_cores_per_host": per_host / rates["simplejpeg + cv2"],
        }
    if options.format == "json":
        print(json.dumps(result, indent=2))
        return
    for name, value in result.items():
        print(f"{name}: {json.dumps(value)}")


if __name__ == "__main__":
    script.run(main)
