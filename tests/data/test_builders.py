"""The builders read the official formats exactly, and refuse whatever is not official."""

import dataclasses
import functools
import gzip
import hashlib
import http.server
import io
import json
import os
import subprocess
import sys
import tarfile
import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from densejax.data import builders, official
from tests import archives

CASES = [
    ("fashion_mnist", False),
    ("cifar10", False),
    ("cifar10", True),
    ("cifar100", False),
    ("cifar100", True),
    ("svhn", False),
]


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Makes a tiny set official; returns its arrays."""

    def make(name, **arguments):
        facts, arrays = archives.make(name, tmp_path / "manual", **arguments)
        monkeypatch.setitem(builders.SETS, name, facts)
        return arrays

    return make


@pytest.fixture
def read(tmp_path):
    def read(name, split="train"):
        builders._verify.cache_clear()  # as another run would
        return builders.read(name, split, str(tmp_path / "data"), str(tmp_path / "manual"))

    return read


def damage(path, position=-1):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(("name", "python"), CASES)
def test_reads_what_the_archive_holds_in_its_order(
    tiny, read, monkeypatch, name, python, recwarn, capfd
):
    monkeypatch.setattr(builders, "READ_AT_ONCE", 4)  # of ten images
    arrays = tiny(name, python=python)
    for split, (images, labels) in arrays.items():
        got_images, got_labels = read(name, split)
        assert got_images.dtype == np.uint8 and got_labels.dtype == np.int32
        np.testing.assert_array_equal(got_images, images)
        np.testing.assert_array_equal(got_labels, labels)
    assert not recwarn.list
    assert capfd.readouterr() == ("", "")


def test_a_tilde_is_the_home_folder(tiny, tmp_path, monkeypatch):
    arrays = tiny("svhn")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    np.testing.assert_array_equal(
        builders.read("svhn", "test", "~/data", "~/manual")[0], arrays["test"][0]
    )
    assert (tmp_path / "data/svhn").exists() and not (tmp_path / "~").exists()


def test_digits_are_scikit_learns_split_by_a_fixed_permutation(read, tmp_path):
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(1797)
    digest = hashlib.sha256(order[:360].astype("<i8").tobytes()).hexdigest()
    assert digest == "7a74f43813d21918cef7ebb898f80368ac22be66bb36552900ad7de67e7593bd"
    for split, index in (("train", order[360:]), ("test", order[:360])):
        images, labels = read("digits", split)
        assert len(images) == {"train": 1437, "test": 360}[split]
        np.testing.assert_array_equal(images[..., 0], digits.images[index])
        np.testing.assert_array_equal(labels, digits.target[index])
    facts = builders.info("digits", str(tmp_path))
    np.testing.assert_allclose(facts.mean, read("digits")[0].mean(), atol=1e-4)
    np.testing.assert_allclose(facts.std, read("digits")[0].std(), atol=1e-4)


def test_a_second_call_reads_what_the_first_wrote(tiny, read, tmp_path):
    arrays = tiny("cifar10")
    read("cifar10")
    for path in (tmp_path / "manual").iterdir():
        path.unlink()
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "data").rglob("*")}
    np.testing.assert_array_equal(read("cifar10", "test")[0], arrays["test"][0])
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "data").rglob("*")} == before


def test_digests_cover_every_prepared_file(tiny, read, tmp_path):
    tiny("cifar10")
    read("cifar10")
    (folder,) = (tmp_path / "data/cifar10").iterdir()
    files = {path.name for path in folder.iterdir()} - {builders.DIGESTS}
    assert len(files) >= 4
    for name in files:
        original = (folder / name).read_bytes()
        damage(folder / name, len(original) // 2)
        with pytest.raises(builders.DataError, match=f"damaged.*{name}.*delete the folder"):
            read("cifar10")
        (folder / name).write_bytes(original)
    read("cifar10")
    (folder / builders.DIGESTS).unlink()
    with pytest.raises(builders.DataError, match=builders.DIGESTS):
        read("cifar10")


@pytest.mark.parametrize(("name", "python"), CASES)
def test_a_changed_file_is_refused(tiny, read, tmp_path, name, python):
    tiny(name, python=python)
    file = builders.SETS[name].files[0][int(python)]
    path = tmp_path / "manual" / file.name
    damage(path, path.stat().st_size // 2)
    says = f"{path} has SHA-256 {hashlib.sha256(path.read_bytes()).hexdigest()}, expected "
    if file.compressed:  # of which the content is measured
        says = f"{path}"
    with pytest.raises(builders.DataError, match=says) as error:
        read(name)
    assert "\n" not in str(error.value) and (file.compressed or file.sha256 in str(error.value))
    assert not (tmp_path / "data" / name).exists() or not any((tmp_path / "data" / name).iterdir())


def test_a_recompressed_idx_file_is_as_good(tiny, read, tmp_path):
    arrays = tiny("fashion_mnist")
    path = tmp_path / "manual/train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()), compresslevel=1))
    np.testing.assert_array_equal(read("fashion_mnist")[0], arrays["train"][0])


def test_a_cut_gzip_stream_is_one_line(tiny, read, tmp_path):
    tiny("fashion_mnist")
    path = tmp_path / "manual/train-labels-idx1-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(builders.DataError, match="train-labels.*ended"):
        read("fashion_mnist")


def test_wrong_counts_and_labels_are_refused(tiny, read, monkeypatch):
    arrays = tiny("cifar10")
    facts = builders.SETS["cifar10"]
    monkeypatch.setitem(
        builders.SETS, "cifar10", dataclasses.replace(facts, splits={"train": 10, "test": 11})
    )
    with pytest.raises(builders.DataError, match=r"test images are uint8\[10, 32, 32, 3\], not"):
        read("cifar10")
    arrays["test"][1][3] = 10
    tiny("cifar10", arrays=arrays)
    with pytest.raises(builders.DataError, match="test has labels 0 to 10, not 0 to 9"):
        read("cifar10")


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_cannot_run_code(read, tmp_path, monkeypatch):
    manual, marker = tmp_path / "manual", tmp_path / "executed"
    manual.mkdir()
    evil = archives.python2_pickle({b"data": Evil(marker), b"labels": []})
    members = {f"cifar-10-batches-py/data_batch_{number}": evil for number in range(1, 6)}
    members["cifar-10-batches-py/test_batch"] = evil
    archives.write_tar(manual / "cifar-10-python.tar.gz", members)
    facts = archives.with_digests(builders.SETS["cifar10"], manual)
    monkeypatch.setitem(builders.SETS, "cifar10", facts)
    with pytest.raises(builders.DataError, match="pickle asks for posix.mkdir, which is not data"):
        read("cifar10")
    assert not marker.exists()


def test_a_tar_is_never_extracted(tiny, read, tmp_path, monkeypatch):
    arrays = tiny("cifar100")
    path = tmp_path / "manual/cifar-100-binary.tar.gz"
    with tarfile.open(path) as archive:
        members = {m.name: archive.extractfile(m).read() for m in archive}
    archives.write_tar(path, {"../../escaped": b"x", "/tmp/../escaped": b"x", **members})
    facts = archives.with_digests(builders.SETS["cifar100"], tmp_path / "manual")
    monkeypatch.setitem(builders.SETS, "cifar100", facts)
    np.testing.assert_array_equal(read("cifar100")[0], arrays["train"][0])
    assert not list(tmp_path.rglob("escaped")) and not (tmp_path.parent / "escaped").exists()
    members.pop("cifar-100-binary/test.bin")
    archives.write_tar(path, {"../cifar-100-binary/test.bin": b"x", **members})
    facts = archives.with_digests(facts, tmp_path / "manual")
    monkeypatch.setitem(builders.SETS, "cifar100", facts)
    with pytest.raises(builders.DataError, match="cifar-100-binary/test.bin"):
        builders.read("cifar100", "train", str(tmp_path / "other"), str(tmp_path / "manual"))


def test_an_archive_that_would_fill_the_memory_is_not_unpacked(tiny, read, tmp_path):
    tiny("fashion_mnist")
    path = tmp_path / "manual/t10k-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(bytes(20_000_000)))  # 20 kB
    tracemalloc.start()
    try:
        with pytest.raises(builders.DataError, match="t10k-labels-idx1-ubyte.gz has SHA-256"):
            read("fashion_mnist")
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["fashion_mnist", "cifar10", "cifar100", "svhn"])
def test_a_missing_file_without_a_network_is_one_line_within_seconds(tiny, read, tmp_path, name):
    tiny(name)
    for path in (tmp_path / "manual").iterdir():
        path.unlink()
    start, file = time.monotonic(), builders.SETS[name].files[0][0]
    said = (f"data.name = {name}", file.name, file.url, f"data.manual_dir = '{tmp_path / 'manual'}")
    with pytest.raises(builders.DataError, match="not found in data.manual_dir") as named:
        read(name)
    with pytest.raises(builders.DataError, match="cannot be downloaded .*refused") as downloaded:
        builders.read(name, "train", str(tmp_path / "data"))
    assert time.monotonic() - start < 60  # it would try again for minutes
    assert all(part in str(named.value) for part in said)
    assert file.url in str(downloaded.value) and "data.manual_dir" in str(downloaded.value)
    for error in (named, downloaded):
        assert "\n" not in str(error.value)
        assert ("apt-get install dataset-fashion-mnist" in str(error.value)) == (
            name == "fashion_mnist"
        )


def test_downloads_from_the_official_address(tiny, tmp_path, monkeypatch):
    arrays = tiny("cifar10")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Quiet, directory=tmp_path / "manual")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        facts = builders.SETS["cifar10"]
        url = f"http://127.0.0.1:{server.server_port}/cifar-10-binary.tar.gz"
        file = dataclasses.replace(facts.files[0][0], url=url)
        facts = dataclasses.replace(facts, files=((file, *facts.files[0][1:]),))
        monkeypatch.setitem(builders.SETS, "cifar10", facts)
        images, _ = builders.read("cifar10", "train", str(tmp_path / "data"))
        server.shutdown()
    np.testing.assert_array_equal(images, arrays["train"][0])


def test_unknown_names_and_splits_list_what_there_is(tiny, read):
    with pytest.raises(builders.DataError, match="data.name = mnist.*fashion_mnist, cifar10,"):
        read("mnist")
    tiny("cifar10")
    with pytest.raises(builders.DataError, match="no split 'validation'.*train, test"):
        read("cifar10", "validation")


EVIL, TFDS_DICT = "evil_features.Image", "tensorflow_datasets.core.features.features_dict."
TEXT = {"pythonClassName": "tensorflow_datasets.core.features.text_feature.Text", "text": {}}
LEGACY = {"type": TFDS_DICT + "FeaturesDict", "proto_cls": "tensorflow_datasets.FeaturesDict"}
NESTED = {"features": {"x": {"pythonClassName": EVIL, "jsonFeature": {"json": "{}"}}}}
NAMES_CODE = {  # what features.json may be, and what dataset_info.json has beside it
    "now": ({"pythonClassName": EVIL, "jsonFeature": {"json": "{}"}}, {}),
    "now, another spelling": ({"python_class_name": EVIL, "text": {}}, {}),
    "formerly": ({"type": EVIL, "content": {}}, {}),
    "formerly, within a text": (LEGACY | {"content": json.dumps(NESTED)}, {}),
    "formerly, within": (LEGACY | {"content": NESTED}, {}),
    "formerly, without protobuf": (
        {"type": TFDS_DICT + "FeaturesDict", "content": {"x": {"type": EVIL, "content": {}}}},
        {},
    ),
    "in the other file": (TEXT, {"features": {"pythonClassName": EVIL, "text": {}}}),
    "a module of TFDS": (TEXT | {"pythonClassName": "tensorflow_datasets.x.y"}, {}),
}


def write_set(folder, features, info):
    folder.mkdir(parents=True)
    info = {"name": "evil", "version": "1.0.0", "fileFormat": "array_record"} | info
    (folder / "dataset_info.json").write_text(json.dumps(info))
    (folder / "features.json").write_text(json.dumps(features))


@pytest.mark.parametrize("case", NAMES_CODE)
def test_a_prepared_set_cannot_name_code(tmp_path, monkeypatch, case):
    data, marker = tmp_path / "data [x]", tmp_path / "executed"
    named = "tensorflow_datasets.x.y" if case == "a module of TFDS" else EVIL
    write_set(data / "evil/1.0.0", *NAMES_CODE[case])
    (tmp_path / "evil_features.py").write_text(f"open({str(marker)!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    for read in (builders.prepare, builders.info):
        with pytest.raises(
            builders.DataError, match=f"data.name = evil: .*names {named}, which is"
        ):
            read("evil", str(data))
    assert not marker.exists()


def leaves(dtype=np.uint8):
    """Features of a small set."""
    import tensorflow_datasets as tfds

    return {
        "image": tfds.features.Tensor(shape=(5, 4, 3), dtype=dtype),
        "label": tfds.features.ClassLabel(names=["a", "b", "c"]),
    }


def examples(labels, dtype=np.uint8):
    random = np.random.default_rng(len(labels))
    return [
        {"image": random.integers(0, 256, (5, 4, 3)).astype(dtype), "label": label}
        for label in labels
    ]


def test_a_set_that_tfds_has_prepared_can_be_named(tmp_path):
    train = examples([0, 1, 2, 0, 1, 2])
    archives.store(tmp_path, "leaves", leaves(), {"train": train})
    facts = builders.info("leaves", str(tmp_path))
    assert facts.image_shape == (5, 4, 3) and facts.splits == {"train": 6}
    assert facts.class_names == ("a", "b", "c") and facts.num_classes == 3
    assert facts.mean == facts.std == ()  # none are known: normalization "scale" asks for none
    images, labels = builders.read("leaves", "train", str(tmp_path))
    np.testing.assert_array_equal(images, [example["image"] for example in train])
    np.testing.assert_array_equal(labels, [0, 1, 2, 0, 1, 2])

    archives.store(tmp_path, "floats", leaves(np.float32), {"train": examples([0], np.float32)})
    with pytest.raises(builders.DataError, match="needs image, uint8"):
        builders.read("floats", "train", str(tmp_path))


@pytest.mark.parametrize(
    ("labels", "measured", "sizes"),
    [
        ({"train": [0, 1], "validation": [2], "test": [1, 0, 2]}, "test", (2, 1, 3)),
        ({"train": [0, 1], "validation": [2], "test": [-1, -1]}, "validation", (2, None, 1)),
        ({"train": [0, 1], "validation": [2]}, "validation", (2, None, 1)),
        ({"train": [0, 1], "test": [-1]}, "", (2, None, None)),
    ],
)
def test_test_images_are_those_that_have_labels(tmp_path, labels, measured, sizes):
    splits = {split: examples(values) for split, values in labels.items()}
    archives.store(tmp_path, "leaves", leaves(), splits)
    facts = builders.info("leaves", str(tmp_path))
    assert facts.test_split == measured
    assert tuple(map(facts.splits.get, ("train", "validation", "test"))) == sizes
    if measured:
        images, found = builders.read("leaves", "test", str(tmp_path))
        np.testing.assert_array_equal(found, labels[measured])
        np.testing.assert_array_equal(images, [e["image"] for e in splits[measured]])
    else:
        with pytest.raises(builders.DataError, match="no split 'test'; it has train"):
            builders.read("leaves", "test", str(tmp_path))


def test_labels_that_are_no_class_are_refused(tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    monkeypatch.setattr(tfds.features.ClassLabel, "encode_example", lambda _, label: label)
    archives.store(
        tmp_path, "leaves", leaves(), {"train": examples([0, 1, 7]), "test": examples([0, -1])}
    )
    for split, found in (("train", "0 to 7"), ("test", "-1 to 0")):
        with pytest.raises(builders.DataError, match=f"{split} has labels {found}, not 0 to 2"):
            builders.read("leaves", split, str(tmp_path))


def test_only_jpegs_and_pngs_are_decoded(tmp_path):
    """Pillow, where TFDS decodes by it, would run Ghostscript for another kind of image."""
    import tensorflow_datasets as tfds

    pixels, kinds = np.full((2, 2, 3), 7, np.uint8), {}
    for kind in ("PNG", "JPEG", "EPS"):
        Image.fromarray(pixels).save(file := io.BytesIO(), kind)
        kinds[kind] = io.BytesIO(file.getvalue())
    label = tfds.features.ClassLabel(names=["a"])
    features = {"image": tfds.features.Image(shape=(2, 2, 3)), "label": label}
    splits = {kind.lower(): [{"image": file, "label": 0}] for kind, file in kinds.items()}
    archives.store(tmp_path, "kinds", features, splits)
    for split in ("png", "jpeg"):
        np.testing.assert_array_equal(builders.read("kinds", split, str(tmp_path))[0], pixels[None])
    with pytest.raises(builders.DataError, match="eps: image 0 is neither a JPEG nor a PNG"):
        builders.read("kinds", "eps", str(tmp_path))


def test_a_killed_preparation_leaves_nothing_that_looks_whole(tiny, read, tmp_path):
    arrays = tiny("cifar10")
    program = """
import dataclasses, os, sys
from densejax.data import builders
from tests import archives
facts = archives.with_digests(builders.SETS["cifar10"], sys.argv[1])
facts = dataclasses.replace(facts, splits={"train": 10, "test": 10})
builders.SETS["cifar10"] = facts
builders._digests = lambda folder: os.kill(os.getpid(), 9)
builders.prepare("cifar10", sys.argv[2], sys.argv[1])
"""
    command = [sys.executable, "-c", program, str(tmp_path / "manual"), str(tmp_path / "data")]
    assert subprocess.run(command, capture_output=True).returncode == -9
    assert list((tmp_path / "data").rglob("*.array_record*"))
    np.testing.assert_array_equal(read("cifar10")[0], arrays["train"][0])


def official_fashion_mnist():
    for folder in (os.environ.get("DENSEJAX_FASHION_MNIST"), "/usr/share/datasets/fashion-mnist"):
        if folder and all(
            (Path(folder) / file.name).exists() for (file,) in builders.SETS["fashion_mnist"].files
        ):
            return folder
    return None


@pytest.mark.skipif(official_fashion_mnist() is None, reason="the four files are not here")
def test_fashion_mnist_itself():
    facts, manual = builders.SETS["fashion_mnist"], official_fashion_mnist()
    arrays = official.load("fashion_mnist", facts, manual, download=None)
    (images, labels), (test_images, test_labels) = arrays["train"], arrays["test"]
    assert images.shape == (60000, 28, 28, 1) and test_images.shape == (10000, 28, 28, 1)
    assert (np.bincount(labels) == 6000).all() and (np.bincount(test_labels) == 1000).all()
    np.testing.assert_allclose(facts.mean, images.mean(), atol=1e-4)
    np.testing.assert_allclose(facts.std, images.std(), atol=1e-4)


def test_the_facts_are_complete():
    for name, facts in builders.SETS.items():
        assert len(set(facts.class_names)) == facts.num_classes, name
        assert len(facts.mean) == len(facts.std) == facts.image_shape[2], name
        for entry in facts.files:
            for file in entry:
                assert len(file.sha256) == 64 and file.url.endswith(file.name)
    assert builders.SETS["cifar100"].num_classes == 100
    assert list(builders.SETS["cifar100"].class_names) == sorted(
        builders.SETS["cifar100"].class_names
    )
