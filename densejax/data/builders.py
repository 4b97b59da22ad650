"""Data sets as TFDS builders that need no TensorFlow: official archives in, ArrayRecord out.

An archive is taken from `manual_dir` as it is, or downloaded, checked against its published
SHA-256 and parsed in memory (nothing is extracted, no code in it is run), once.
"""

import contextlib
import functools
import gzip
import hashlib
import io
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from densejax.config import UserError
from densejax.data.official import SETS, Arrays, File, SetInfo

DIGESTS = "SHA256SUMS"  # beside the prepared files, as `sha256sum --check` reads it
VERSION = "1.0.0"  # of how a set is prepared
SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")  # what a JPEG and a PNG begin with
READ_AT_ONCE = 4096  # examples; bounds the memory beside the resulting arrays


class DataError(UserError):
    """A data set, a split or one of their files is unknown, missing or damaged."""


def prepare(name: str, directory: str, manual_dir: str = "") -> Any:
    """Returns the TFDS builder of `name`, after writing `directory/name` if it is not there yet.

    The folder appears by one rename: a preparation that is killed leaves nothing that looks whole.
    A name outside `SETS` is looked up among the sets that TFDS has prepared in `directory`.

    Raises:
      DataError: the name is unknown, or a file is missing, damaged or not the official one.
    """
    directory = epath.Path(directory).expanduser()  # TFDS would make a folder named "~"
    with _quiet():
        tfds = _tfds()
        if name not in SETS:
            try:
                return tfds.core.read_only_builder.builder_from_files(name, data_dir=directory)
            except Exception as error:
                reason = error if isinstance(error, DataError) else type(error).__name__
                raise DataError(
                    f"data.name = {name}: neither one of {', '.join(SETS)} nor a set that TFDS has "
                    f"prepared in {directory} ({reason})"
                ) from error
        builder_class = _builder_class(tfds, name, manual_dir)
        make = functools.partial(builder_class, data_dir=directory, file_format="array_record")
        folder = directory / name / VERSION
        if not folder.exists():
            made = [directory / path for path in (name, "downloads/extracted", "downloads", "")]
            made = [path for path in made if not path.exists()]
            try:
                make().download_and_prepare()
            except OSError as error:
                if not folder.exists():  # else another process was first
                    raise DataError(f"data.name = {name}: {directory}: {_line(error)}") from error
            finally:
                for path in made:  # for nothing: where TFDS left something, it stays
                    with contextlib.suppress(OSError, ValueError):  # epath's, of one not empty
                        path.rmdir()
        _verify(name, folder)  # before TFDS reads any of it
        return make()


def open_folder(folder: str) -> Any:
    """The TFDS builder of a prepared set's own folder, `.../name/1.0.0`; DataError as `prepare`."""
    with _quiet():
        return _tfds().core.read_only_builder.builder_from_directory(folder)


def test_split(builder: Any) -> str:
    """What is measured: "test" where it has labels, else "validation", or "" where neither is.

    ImageNet's test images have none: each is -1.
    """
    splits = builder.info.splits
    with _reading(builder):
        if "test" in splits and splits["test"].num_examples:
            image = {"image": _tfds().decode.SkipDecoding()}
            if builder.as_data_source("test", decoders=image)[0]["label"] >= 0:
                return "test"
    return "validation" if "validation" in splits else ""


def info(name: str, directory: str) -> SetInfo:
    """Returns the facts of a set of `SETS`, or of one in `directory`, without mean and std."""
    if name in SETS:
        return SETS[name]
    found = (builder := prepare(name, directory)).info
    try:
        image, names = found.features["image"], tuple(found.features["label"].names)
        height, width, channels = image.shape
        if image.np_dtype != np.uint8 or None in image.shape:
            raise ValueError("image is not uint8 of one size")
    except Exception as error:
        raise DataError(
            f"data.name = {name}: needs image, uint8 [h, w, c] of one size, and label, a "
            f"ClassLabel; has {_line(found.features)}; data.storage = 'stream' takes any size"
        ) from error
    splits = {split: facts.num_examples for split, facts in found.splits.items()}
    measured = test_split(builder)
    if measured != "test":
        splits.pop("test", None)
        splits |= {"test": splits.pop(measured)} if measured else {}
    return SetInfo((height, width, channels), names, splits, (), (), test_split=measured)


def read(
    name: str, split: str, directory: str, manual_dir: str = ""
) -> tuple[np.ndarray, np.ndarray]:
    """Returns images uint8 [n, h, w, c] and labels int32 [n] of a split, in the official order.

    `split` is a name, or names joined by "+". Prepares the set first if that was not done.

    Raises:
      DataError: as `prepare`, and for an unknown split or labels that are no class.
    """
    builder = prepare(name, directory, manual_dir)
    facts, parts = info(name, directory), split.split("+")
    if unknown := [part for part in parts if part not in facts.splits]:
        raise DataError(
            f"data.name = {name}: no split {unknown[0]!r}; it has {', '.join(facts.splits)}"
        )
    with _reading(builder):
        stored = "+".join(facts.test_split if part == "test" else part for part in parts)
        decode, decoders = lambda image: image, None
        if isinstance(feature := builder.info.features["image"], _tfds().features.Image):
            # Pillow, which TFDS may decode by, knows formats that run programs of the machine.
            decode, decoders = feature.decode_example_np, {"image": _tfds().decode.SkipDecoding()}
        source = builder.as_data_source(stored, decoders=decoders)
        images = np.empty((len(source), *facts.image_shape), np.uint8)
        labels = np.empty(len(source), np.int32)
        for start in range(0, len(source), READ_AT_ONCE):
            stop = min(start + READ_AT_ONCE, len(source))
            for index, example in enumerate(source.__getitems__(range(start, stop)), start):
                if decoders and not example["image"].startswith(SIGNATURES):
                    raise ValueError(f"{stored}: image {index} is neither a JPEG nor a PNG")
                images[index], labels[index] = decode(example["image"]), example["label"]
        _check(facts, stored, len(source), images, labels)
    return images, labels


@contextlib.contextmanager
def _reading(builder: Any) -> Iterator[None]:
    try:
        with _quiet():
            yield
    except Exception as error:
        name, line = builder.name, _line(error)
        raise DataError(f"data.name = {name}: {builder.data_dir}: {line}") from error


@functools.cache
def _tfds() -> Any:
    """TFDS, made to know the classes of features by a table of its own.

    The files of a prepared set name these classes, and TFDS would import what they name.
    """
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    base = tfds.features.FeatureConnector
    kinds = (kind for kind in vars(tfds.features).values() if isinstance(kind, type))
    known = {f"{kind.__module__}.{kind.__name__}": kind for kind in kinds if issubclass(kind, base)}

    def named(_, name):
        if name not in known:
            raise DataError(f"it names {name}, which is code and not of TFDS")
        return known[name]

    base.cls_from_name = classmethod(named)
    return tfds


def _builder_class(tfds: Any, name: str, manual_dir: str) -> type:
    facts = SETS[name]

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version(VERSION)

        def _info(self):
            image = tfds.features.Tensor(shape=facts.image_shape, dtype=np.uint8, encoding="bytes")
            label = tfds.features.ClassLabel(names=facts.class_names)
            features = tfds.features.FeaturesDict({"image": image, "label": label})
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, dl_manager):
            arrays = _load(name, facts, manual_dir, dl_manager.download)
            return {split: self._generate_examples(*pair) for split, pair in arrays.items()}

        def _generate_examples(self, images, labels):
            for index, (image, label) in enumerate(zip(images, labels, strict=True)):
                yield index, {"image": image, "label": int(label)}

        def _download_and_prepare(self, dl_manager, download_config):
            super()._download_and_prepare(dl_manager, download_config)
            # TFDS writes the same metadata once more after this; the digests must cover it.
            self.info.download_size = dl_manager.downloaded_size
            self.info.write_to_directory(self.data_path)
            (self.data_path / DIGESTS).write_text("\n".join(_digests(self.data_path)) + "\n")

    Builder.name = name
    return Builder


def _load(name: str, facts: SetInfo, manual_dir: str, download: Callable[[str], str]) -> Arrays:
    paths, manual = {}, epath.Path(manual_dir).expanduser()
    for alternatives in facts.files:
        given = [file for file in alternatives if manual_dir and (manual / file.name).exists()]
        file = given[0] if given else alternatives[0]
        if manual_dir and not given:
            names = " or ".join(other.name for other in alternatives)
            raise DataError(
                f"data.name = {name}: {names} not found in data.manual_dir = {manual_dir!r}; get "
                f"it from {file.url} and put it there{facts.hint}"
            )
        path = manual / file.name if given else _download(name, facts, file, download)
        try:
            found = _content_sha256(path, file.compressed, facts.most_bytes)
        except (OSError, EOFError, ValueError, zlib.error) as error:
            raise DataError(f"data.name = {name}: {path}: {_line(error)}") from error
        if found != file.sha256:
            raise DataError(
                f"data.name = {name}: {path} has SHA-256 {found}, expected {file.sha256}; "
                f"delete it and get it from {file.url}"
            )
        paths[file.name] = path
    try:
        arrays = facts.parse(paths, facts.most_bytes)
        for split, count in facts.splits.items():
            _check(facts, split, count, *arrays[split])
    except Exception as error:  # whatever a parser trips over, the file is at fault
        where = ", ".join(str(path) for path in paths.values())
        raise DataError(f"data.name = {name}: {where}: {_line(error)}") from error
    return {split: arrays[split] for split in facts.splits}


def _download(name: str, facts: SetInfo, file: File, download: Callable[[str], str]) -> epath.Path:
    try:
        # TFDS retries ten times with growing pauses; one question first, so that a machine
        # without a network is told so within seconds.
        urllib.request.urlopen(file.url, timeout=10).close()
        return epath.Path(download(file.url))
    except Exception as error:
        raise DataError(
            f"data.name = {name}: {file.url} cannot be downloaded ({_line(error)}); get it, and "
            f"name the folder that it is in by data.manual_dir{facts.hint}"
        ) from error


def _check(facts: SetInfo, split: str, count: int, images: np.ndarray, labels: np.ndarray) -> None:
    if images.shape != (count, *facts.image_shape) or images.dtype != np.uint8:
        raise ValueError(
            f"{split} images are {images.dtype}{list(images.shape)}, "
            f"not uint8{[count, *facts.image_shape]}"
        )
    if labels.shape != (count,):
        raise ValueError(f"{split} has {labels.size} labels for {count} images")
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"{split} has labels of type {labels.dtype}, not integers")
    if labels.min() < 0 or labels.max() >= facts.num_classes:
        raise ValueError(
            f"{split} has labels {labels.min()} to {labels.max()}, not 0 to {facts.num_classes - 1}"
        )


@functools.cache  # once in a process; what raises is not kept
def _verify(name: str, folder: epath.Path) -> None:
    try:
        expected, found = (folder / DIGESTS).read_text().splitlines(), _digests(folder)
        damaged = DIGESTS if not expected else ", ".join(set(expected) - set(found))
    except (OSError, ValueError) as error:
        damaged = _line(error)
    if damaged:
        raise DataError(
            f"data.name = {name}: a prepared file is damaged or missing ({damaged}); "
            f"delete the folder {folder} to prepare it again"
        )


def _digests(folder: epath.Path) -> list[str]:
    paths = (path for path in sorted(folder.iterdir()) if path.name != DIGESTS and path.is_file())
    return [f"{_sha256(path)}  {path.name}" for path in paths]


def _sha256(path: epath.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _content_sha256(path: epath.Path, compressed: bool, most_bytes: int) -> str:
    """The digest of an official file; ValueError where it does not end after `most_bytes`."""
    digest, left = hashlib.sha256(), most_bytes
    with path.open("rb") as file:
        content = gzip.GzipFile(fileobj=file) if compressed else file
        while block := content.read(2**20):
            if (left := left - len(block)) < 0:
                raise ValueError(f"it holds more than {most_bytes} bytes, which the set has not")
            digest.update(block)
    return digest.hexdigest()


def _line(error: object) -> str:
    return " ".join(str(error).split())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
