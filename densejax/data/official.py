"""The official data sets: their facts, their archives, and the parsers of the archives' formats.

Archives are parsed in memory after their digests have been checked: nothing is extracted, and no
code in them is run.
"""

import gzip
import hashlib
import io
import pickle
import tarfile
import urllib.request
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from etils import epath

from densejax.config import UserError

Arrays = dict[str, tuple[np.ndarray, np.ndarray]]  # split -> images [n, h, w, c], labels [n]


class DataError(UserError):
    """A data set, a split or one of their files is unknown, missing or damaged."""


@dataclass(frozen=True)
class File:
    """An official file; `sha256` is of the decompressed content where `compressed` is set."""

    name: str
    url: str
    sha256: str
    compressed: bool = False


@dataclass(frozen=True)
class SetInfo:
    """The facts of a set; `mean` and `std` are per channel, in units of the stored uint8 values.

    `files` has one entry per file needed: its alternatives, of which the first is downloaded.
    `white_level` is the stored value that stands for 255 in an image file. `usual_brightness` has,
    for each measure of `densejax.data.facts.brightness`, the range in which most images lie.
    """

    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    splits: dict[str, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    files: tuple[tuple[File, ...], ...] = ()
    parse: Callable[[dict[str, epath.Path]], Arrays] | None = None
    hint: str = ""  # where else to get the files
    test_split: str = "test"  # what the set itself calls the split that is called "test" here
    white_level: int = 255
    usual_brightness: dict[str, tuple[float, float]] = field(default_factory=dict)  # {}: not known

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.class_names)


def check_arrays(
    info: SetInfo, split: str, count: int, images: np.ndarray, labels: np.ndarray
) -> None:
    """Raises ValueError where arrays are not `count` images of the set and their labels."""
    if images.shape != (count, *info.image_shape) or images.dtype != np.uint8:
        raise ValueError(
            f"{split} images are {images.dtype}{list(images.shape)}, "
            f"not uint8{[count, *info.image_shape]}"
        )
    if labels.shape != (count,):
        raise ValueError(f"{split} has labels of the shape {list(labels.shape)} for {count} images")
    if labels.min() < 0 or labels.max() >= info.num_classes:
        raise ValueError(
            f"{split} has labels {labels.min()} to {labels.max()}, not 0 to {info.num_classes - 1}"
        )


def load(name: str, facts: SetInfo, manual_dir: str, download: Callable[[str], str]) -> Arrays:
    """Checks the digests of a set's archives, then reads the archives into memory.

    Args:
      name: of the set.
      facts: of the set.
      manual_dir: folder with the files; "": `download(url)` gets them and says where they are.

    Raises:
      DataError: a file is missing, is not the official one, or does not hold what it should.
    """
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
            found = _content_sha256(path, file.compressed)
        except (OSError, EOFError, ValueError, zlib.error) as error:
            raise DataError(f"data.name = {name}: {path}: {one_line(error)}") from error
        if found != file.sha256:
            raise DataError(
                f"data.name = {name}: {path} has SHA-256 {found}, expected {file.sha256}; "
                f"delete it and get it from {file.url}"
            )
        paths[file.name] = path
    try:
        arrays = facts.parse(paths)
        for split, count in facts.splits.items():
            check_arrays(facts, split, count, *arrays[split])
    except Exception as error:  # parsers raise errors of many kinds
        where = ", ".join(str(path) for path in paths.values())
        raise DataError(f"data.name = {name}: {where}: {one_line(error)}") from error
    return {split: arrays[split] for split in facts.splits}


def _download(name: str, facts: SetInfo, file: File, download: Callable[[str], str]) -> epath.Path:
    try:
        # TFDS tries ten times with growing pauses. One request of our own comes first, so that a
        # machine without a network says so within seconds.
        urllib.request.urlopen(file.url, timeout=10).close()
        return epath.Path(download(file.url))
    except Exception as error:
        raise DataError(
            f"data.name = {name}: {file.url} cannot be downloaded ({one_line(error)}); get it, and "
            f"name the folder that it is in by data.manual_dir{facts.hint}"
        ) from error


def _content_sha256(path: epath.Path, compressed: bool) -> str:
    """The digest of a file, or of what it holds compressed."""
    with path.open("rb") as file:
        content = gzip.GzipFile(fileobj=file) if compressed else file
        return hashlib.file_digest(content, "sha256").hexdigest()


def one_line(error: object) -> str:
    """What an error says, on one line; its kind where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def _parse_idx(paths: dict[str, epath.Path]) -> Arrays:
    """The format: http://yann.lecun.com/exdb/mnist (magic 0, 0, uint8 = 8, number of axes)."""
    arrays = []
    for name, path in paths.items():
        content = gzip.decompress(path.read_bytes())
        axes = 3 if "images" in name else 1
        shape = np.frombuffer(content, ">i4", axes, offset=4)
        arrays.append(np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape))
    return {
        split: (images[..., None], labels)
        for split, images, labels in zip(("train", "test"), arrays[::2], arrays[1::2], strict=True)
    }


_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6)), ("test_batch",)
_CIFAR_LAYOUTS = {  # folder, suffix, training and test members, label bytes or key of the label
    "cifar-10-binary.tar.gz": ("cifar-10-batches-bin", ".bin", *_BATCHES, 1),
    "cifar-10-python.tar.gz": ("cifar-10-batches-py", "", *_BATCHES, b"labels"),
    "cifar-100-binary.tar.gz": ("cifar-100-binary", ".bin", ("train",), ("test",), 2),
    "cifar-100-python.tar.gz": ("cifar-100-python", "", ("train",), ("test",), b"fine_labels"),
}


def _parse_cifar(paths: dict[str, epath.Path]) -> Arrays:
    """The two formats: https://www.cs.toronto.edu/~kriz/cifar.html."""
    ((name, path),) = paths.items()
    with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:gz") as archive:
        members = (member for member in archive if member.isfile())
        files = {member.name: archive.extractfile(member).read() for member in members}
    folder, suffix, train, test, label = _CIFAR_LAYOUTS[name]
    arrays = {}
    for split, members in (("train", train), ("test", test)):
        parts = [files[f"{folder}/{member}{suffix}"] for member in members]
        if suffix == ".bin":  # a record: one label, or the coarse and the fine one, then pixels
            records = np.frombuffer(b"".join(parts), np.uint8).reshape(-1, 3072 + label)
            images, labels = records[:, label:], records[:, label - 1]
        else:
            batches = [
                _NumbersUnpickler(io.BytesIO(part), encoding="bytes").load() for part in parts
            ]
            images = np.concatenate([batch[b"data"] for batch in batches])
            labels = np.concatenate([batch[label] for batch in batches])
        arrays[split] = images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels
    return arrays


class _NumbersUnpickler(pickle.Unpickler):
    """Loads arrays, lists, dictionaries, bytes and numbers; a pickle that asks for more fails."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = {
            ("numpy.core.multiarray", "_reconstruct"): lambda *_: np.empty(0, np.uint8),
            ("numpy", "ndarray"): None,  # the argument of _reconstruct
            ("numpy", "dtype"): lambda code, *_: np.dtype(code),
        }
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"its pickle asks for {module}.{name}, which is not data")
        return allowed[module, name]


def _parse_svhn(paths: dict[str, epath.Path]) -> Arrays:
    """The format: http://ufldl.stanford.edu/housenumbers, cropped digits; label 10 is digit 0."""
    from scipy.io import loadmat

    arrays = {}
    for name, path in paths.items():
        with path.open("rb") as file:
            content = loadmat(file, variable_names=("X", "y"))
        labels = content["y"].ravel().astype(np.int32) % 10
        arrays[name.removesuffix("_32x32.mat")] = content["X"].transpose(3, 0, 1, 2), labels
    return arrays


def _parse_digits(paths: dict[str, epath.Path]) -> Arrays:
    """The split: the first 360 of a fixed permutation are the test set."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images, labels = digits.images.astype(np.uint8)[..., None], digits.target
    order = np.random.default_rng(0).permutation(len(labels))
    split = {"train": order[360:], "test": order[:360]}
    return {name: (images[index], labels[index]) for name, index in split.items()}


def _files(base: str, table: str, compressed: bool = False) -> tuple[File, ...]:
    pairs = [line.split() for line in table.strip().splitlines()]
    return tuple(File(name, base + name, digest, compressed) for name, digest in pairs)


_FASHION_MNIST = _files(
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    """
    train-images-idx3-ubyte.gz c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888
    train-labels-idx1-ubyte.gz bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9
    t10k-images-idx3-ubyte.gz 5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b
    t10k-labels-idx1-ubyte.gz 0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34
    """,
    compressed=True,
)
_CIFAR = _files(
    "https://www.cs.toronto.edu/~kriz/",
    """
    cifar-10-binary.tar.gz c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd
    cifar-10-python.tar.gz 6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce
    cifar-100-binary.tar.gz 58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec
    cifar-100-python.tar.gz 85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7
    """,
)
_SVHN = _files(
    "http://ufldl.stanford.edu/housenumbers/",
    """
    train_32x32.mat 435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8
    test_32x32.mat cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b
    extra_32x32.mat a133a4beb38a00fcdda90c9489e0c04f900b660ce8a316a5e854838379a71eb3
    """,
)
_CIFAR_100_NAMES = """apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy
    bridge bus butterfly camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach
    couch crab crocodile cup dinosaur dolphin elephant flatfish forest fox girl hamster house
    kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain
    mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate
    poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper
    snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television
    tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm"""

# Mean and std of Fashion-MNIST and of digits are computed from the training split; CIFAR's are the
# usual ones; SVHN's images are only divided by 255, as in the paper (section 4.1).
SETS = {
    "fashion_mnist": SetInfo(
        image_shape=(28, 28, 1),
        class_names=tuple(
            "T-shirt/top Trouser Pullover Dress Coat Sandal Shirt Sneaker Bag Ankle_boot".split()
        ),
        splits={"train": 60000, "test": 10000},
        mean=(72.9404,),
        std=(90.0212,),
        files=tuple((file,) for file in _FASHION_MNIST),
        parse=_parse_idx,
        hint=", or apt-get install dataset-fashion-mnist and set data.manual_dir to its folder",
    ),
    "cifar10": SetInfo(
        image_shape=(32, 32, 3),
        class_names=tuple("airplane automobile bird cat deer dog frog horse ship truck".split()),
        splits={"train": 50000, "test": 10000},
        mean=(125.3, 123.0, 113.9),
        std=(63.0, 62.1, 66.7),
        files=(_CIFAR[:2],),
        parse=_parse_cifar,
    ),
    "cifar100": SetInfo(
        image_shape=(32, 32, 3),
        class_names=tuple(_CIFAR_100_NAMES.split()),
        splits={"train": 50000, "test": 10000},
        mean=(129.3, 124.1, 112.4),
        std=(68.2, 65.4, 70.4),
        files=(_CIFAR[2:],),
        parse=_parse_cifar,
    ),
    "svhn": SetInfo(
        image_shape=(32, 32, 3),
        class_names=tuple("0123456789"),
        splits={"train": 73257, "test": 26032, "extra": 531131},
        mean=(0.0, 0.0, 0.0),
        std=(255.0, 255.0, 255.0),
        files=tuple((file,) for file in _SVHN),
        parse=_parse_svhn,
    ),
    "digits": SetInfo(
        image_shape=(8, 8, 1),
        class_names=tuple("0123456789"),
        splits={"train": 1437, "test": 360},
        mean=(4.8781,),
        std=(6.0140,),
        white_level=16,
        parse=_parse_digits,
    ),
}

STREAMED = {  # sets of images of many sizes; mean and std are the usual ones
    "imagenet2012": SetInfo(
        image_shape=(224, 224, 3),
        class_names=tuple(map(str, range(1000))),  # by rank of their WordNet ids
        splits={"train": 1281167, "test": 50000},
        mean=(123.675, 116.28, 103.53),
        std=(58.395, 57.12, 57.375),
    )
}
