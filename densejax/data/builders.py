"""Data sets as arrays: prepared once from the official archives, or by TFDS, or added by the user.

A set of `official` is written in the format of TFDS (ArrayRecord, without TensorFlow), with digests
beside it. Any other set that TFDS has prepared is read as it is.
"""

import contextlib
import functools
import hashlib
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath

from densejax.data import official
from densejax.data.added import ADDED
from densejax.data.official import SETS, DataError, SetInfo, check_arrays, one_line

DIGESTS = "SHA256SUMS"  # beside the prepared files, as `sha256sum --check` reads it
VERSION = "1.0.0"  # of how a set is prepared
SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")  # the first bytes of a JPEG and of a PNG
READ_AT_ONCE = 4096  # examples; bounds the memory beside the resulting arrays


def prepare(name: str, directory: str, manual_dir: str = "") -> Any:
    """Returns the TFDS builder of `name`, after writing `directory/name` if it is not there yet.

    The folder appears by one rename: a preparation that is killed leaves nothing that looks whole.
    A name that is not official is looked up among the sets that TFDS has prepared in `directory`.

    Raises:
      DataError: the name is unknown, or a file is missing, damaged or not the official one.
    """
    directory = epath.Path(directory).expanduser()  # TFDS would make a folder named "~"
    with _quiet():
        if name in SETS:
            return _prepare_official(name, directory, manual_dir)
        try:
            read_only = load_tfds().core.read_only_builder
            return read_only.builder_from_files(name, data_dir=directory)
        except Exception as error:
            reason = error if isinstance(error, DataError) else type(error).__name__
            raise DataError(
                f"data.name = {name}: neither one of {', '.join(SETS)} nor a set that TFDS has "
                f"prepared in {directory} ({reason}); arrays of densejax.data.add are known only "
                f"to the process that added them, with data.storage = 'memory'"
            ) from error


def _prepare_official(name, directory, manual_dir):
    builder_class = _builder_class(name, manual_dir)
    make = functools.partial(builder_class, data_dir=directory, file_format="array_record")
    folder = directory / name / VERSION
    if not folder.exists():
        new = [directory / path for path in (name, "downloads/extracted", "downloads", "")]
        new = [path for path in new if not path.exists()]
        try:
            make().download_and_prepare()
        except OSError as error:
            if not folder.exists():  # another process may have been faster
                raise DataError(f"data.name = {name}: {directory}: {one_line(error)}") from error
        finally:
            for path in new:
                # Empty folders of TFDS are removed, the others (epath: ValueError) stay.
                with contextlib.suppress(OSError, ValueError):
                    path.rmdir()
    _verify(name, folder)  # before TFDS reads any of it
    return make()


def open_folder(folder: str) -> Any:
    """The TFDS builder of a prepared set's folder, `.../name/1.0.0`; DataError as in `prepare`."""
    with _quiet():
        return load_tfds().core.read_only_builder.builder_from_directory(folder)


def test_split(builder: Any) -> str:
    """The split to measure on: "test" where it has labels, else "validation"; "": there is none.

    The labels of ImageNet's test images are not published: each is -1.
    """
    splits = builder.info.splits
    with _reading(builder):
        if "test" in splits and splits["test"].num_examples:
            image = {"image": load_tfds().decode.SkipDecoding()}
            if builder.as_data_source("test", decoders=image)[0]["label"] >= 0:
                return "test"
    return "validation" if "validation" in splits else ""


def info(name: str, directory: str) -> SetInfo:
    """The facts of a set; a set that TFDS has prepared in `directory` has no mean and std.

    Raises:
      DataError: as in `prepare`, and for a set without images of one size or without classes.
    """
    if name in ADDED:
        return ADDED[name][0]
    if name in SETS:
        return SETS[name]
    builder = prepare(name, directory)
    features = builder.info.features
    try:
        image, class_names = features["image"], tuple(features["label"].names)
        height, width, channels = image.shape
        if image.np_dtype != np.uint8 or None in image.shape:
            raise ValueError("image is not uint8 of one size")
    except Exception as error:
        raise DataError(
            f"data.name = {name}: needs image, uint8 [h, w, c] of one size, and label, a "
            f"ClassLabel; has {one_line(features)}; data.storage = 'stream' takes any size"
        ) from error
    splits = {split: facts.num_examples for split, facts in builder.info.splits.items()}
    measured = test_split(builder)
    if measured != "test":
        splits.pop("test", None)
        splits |= {"test": splits.pop(measured)} if measured else {}
    return SetInfo((height, width, channels), class_names, splits, (), (), test_split=measured)


def read(
    name: str, split: str, directory: str, manual_dir: str = ""
) -> tuple[np.ndarray, np.ndarray]:
    """Returns images uint8 [n, h, w, c] and labels int32 [n] of a split, in the official order.

    A set that is not prepared yet is prepared first.

    Raises:
      DataError: as in `prepare`, and for an unknown split or labels that are no class.
    """
    facts = info(name, directory)
    if split not in facts.splits:
        raise DataError(f"data.name = {name}: no split {split!r}; it has {', '.join(facts.splits)}")
    if name in ADDED:
        images, labels = ADDED[name][1][split]
        return images, labels.astype(np.int32)
    builder, tfds = prepare(name, directory, manual_dir), load_tfds()
    with _reading(builder):
        stored = facts.test_split if split == "test" else split
        decode, decoders = lambda image: image, None
        if isinstance(feature := builder.info.features["image"], tfds.features.Image):
            # TFDS may decode with Pillow, which knows formats that start programs on the machine.
            decode, decoders = feature.decode_example_np, {"image": tfds.decode.SkipDecoding()}
        source = builder.as_data_source(stored, decoders=decoders)
        images = np.empty((len(source), *facts.image_shape), np.uint8)
        labels = np.empty(len(source), np.int32)
        for start in range(0, len(source), READ_AT_ONCE):
            stop = min(start + READ_AT_ONCE, len(source))
            for index, example in enumerate(source.__getitems__(range(start, stop)), start):
                if decoders and not example["image"].startswith(SIGNATURES):
                    raise ValueError(f"{stored}: image {index} is neither a JPEG nor a PNG")
                images[index], labels[index] = decode(example["image"]), example["label"]
        check_arrays(facts, stored, len(source), images, labels)
    return images, labels


@contextlib.contextmanager
def _reading(builder: Any) -> Iterator[None]:
    """Whatever TFDS raises for damaged files becomes a DataError."""
    try:
        with _quiet():
            yield
    except Exception as error:
        place = f"data.name = {builder.name}: {builder.data_dir}"
        raise DataError(f"{place}: {one_line(error)}") from error


@functools.cache
def load_tfds() -> Any:
    """TFDS, changed so that it imports no module that the files of a prepared set name.

    These files name the classes of their features, and TFDS would import any module to find them.
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
    # TFDS would make a folder in /tmp for facts from a server, never ask the server, and leave the
    # folder there.
    tfds.core.DatasetInfo.initialize_from_bucket = lambda _: None
    return tfds


def _builder_class(name: str, manual_dir: str) -> type:
    tfds, facts = load_tfds(), SETS[name]

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version(VERSION)

        def _info(self):
            image = tfds.features.Tensor(shape=facts.image_shape, dtype=np.uint8, encoding="bytes")
            label = tfds.features.ClassLabel(names=facts.class_names)
            features = tfds.features.FeaturesDict({"image": image, "label": label})
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, dl_manager):
            arrays = official.load(name, facts, manual_dir, dl_manager.download)
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


@functools.cache  # once in a process; errors are not kept
def _verify(name: str, folder: epath.Path) -> None:
    try:
        expected, found = (folder / DIGESTS).read_text().splitlines(), _digests(folder)
        damaged = DIGESTS if not expected else ", ".join(set(expected) - set(found))
    except (OSError, ValueError) as error:
        damaged = one_line(error)
    if damaged:
        raise DataError(
            f"data.name = {name}: a prepared file is damaged or missing ({damaged}); "
            f"delete the folder {folder} to prepare it again"
        )


def _digests(folder: epath.Path) -> list[str]:
    lines = []
    for path in sorted(folder.iterdir()):
        if path.name != DIGESTS and path.is_file():
            with path.open("rb") as file:
                lines.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.name}")
    return lines


def _quiet() -> contextlib.AbstractContextManager:
    """Hides what TFDS prints."""
    return contextlib.redirect_stdout(io.StringIO())
