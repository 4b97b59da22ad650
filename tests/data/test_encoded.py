"""Folders and TFDS's records give the same examples; what does not fit is one line."""

import dataclasses
import os
import pickle
import shutil
import types
import unicodedata

import numpy as np
import pytest

from densejax import data
from densejax.config import UserError
from densejax.data import encoded
from densejax.data.added import ADDED
from densejax.data.builders import DataError
from densejax.data.official import STREAMED
from tests import archives, photos
from tests.small import tiny


def folder(tmp_path, **arguments):
    """The written files and the facts and splits that are found."""
    written = photos.make(tmp_path / "photos", **arguments)
    return written, *encoded.open_splits("photos", "", str(tmp_path / "photos"), 0.2)


def prepare(tmp_path, written, *tests):
    """Prepares the same images by TFDS as ArrayRecord, in the order of their names."""
    import tensorflow_datasets as tfds

    features = {
        "image": tfds.features.Image(),  # which keeps the bytes of a file
        "label": tfds.features.ClassLabel(names=["n01", "n02"]),
        "file_name": tfds.features.Text(),
    }

    def examples(split):
        for name in sorted(name for name in written if name.startswith(split)):
            path = tmp_path / "photos" / name
            yield {"image": str(path), "label": path.parent.name, "file_name": path.name}

    splits = {"train": examples("train")} | {test: examples("val") for test in tests}
    archives.store(tmp_path / "tfds", "photos", features, splits)


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path):
    written, facts, splits = folder(tmp_path)
    assert facts.class_names == ("n01", "n02") and facts.mean == ()
    assert facts.splits == {"train": 28, "test": 10}
    for split, name in (("train", "train"), ("test", "val")):
        paths = sorted(path for path in written if path.startswith(name))
        assert len(splits[split]) == len(paths)
        for index, path in enumerate(paths):
            content, label, place = splits[split][index]
            assert content == written[path] and place.endswith(path)
            assert label == ["n01", "n02"].index(path.split("/")[1])


@pytest.mark.parametrize("tests", [("validation",), ("test",), ("validation", "test")])
def test_records_of_tfds_hold_the_same_examples_undecoded(tmp_path, tests):
    written, facts, splits = folder(tmp_path, train=3, val=2)
    prepare(tmp_path, written, *tests)
    found_facts, found = encoded.open_splits("photos", str(tmp_path / "tfds"), "", 0.2)
    assert facts.test_split == "val"
    assert found_facts == dataclasses.replace(facts, test_split=tests[-1])
    for split in ("train", "test"):
        assert len(found[split]) == len(splits[split])
        for index in range(len(found[split])):
            content, label, place = found[split][index]
            assert (content, label) == splits[split][index][:2]
            assert f"[{index}]" in place and place.endswith(splits[split][index][2].split("/")[-1])


def test_a_set_of_arrays_cannot_be_streamed(tmp_path):
    import tensorflow_datasets as tfds

    features = {
        "image": tfds.features.Tensor(shape=(2, 2, 1), dtype=np.uint8),
        "label": tfds.features.ClassLabel(names=["n01", "n02"]),
    }
    examples = [{"image": np.zeros((2, 2, 1), np.uint8), "label": 0}]
    archives.store(tmp_path, "arrays", features, {"train": examples, "test": examples})
    with pytest.raises(DataError, match="data.name = arrays: its images are arrays; set"):
        encoded.open_splits("arrays", str(tmp_path), "", 0.2)


@pytest.mark.parametrize("name", ["cifar10", "mine"])
def test_a_set_of_arrays_is_refused_before_it_is_downloaded(name, monkeypatch):
    monkeypatch.setitem(ADDED, "mine", None)
    monkeypatch.setattr(encoded.builders, "prepare", lambda *arguments: pytest.fail("downloaded"))
    changes = {"data__name": name, "data__storage": "stream", "data__image_size": 32}
    with pytest.raises(UserError, match=f"data.name = {name}: its images are arrays; set data.st"):
        data.info(tiny(**changes))


@pytest.mark.parametrize(
    "names", [("val", "validation"), ("train", "training"), ("Train", "train")]
)
def test_two_folders_of_one_split_are_refused(tmp_path, names):
    written, *_ = folder(tmp_path, train=3, val=2)
    for name in names:
        (tmp_path / "photos" / name).mkdir(exist_ok=True)
    with pytest.raises(DataError, match=f"has {' and '.join(names)}, which mean the same"):
        encoded.open_splits("folder", "", str(tmp_path / "photos"), 0.25)


def test_a_label_that_is_no_class_is_named(tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    written, *_ = folder(tmp_path, train=3, val=2)
    monkeypatch.setattr(tfds.features.ClassLabel, "encode_example", lambda *_: 2)
    prepare(tmp_path, written, "validation")
    _, found = encoded.open_splits("photos", str(tmp_path / "tfds"), "", 0.2)
    with pytest.raises(DataError, match=r"train\[0\] .*: has label 2, not 0 to 1") as caught:
        found["train"][0]
    assert not isinstance(caught.value, encoded.ImageError)  # which are skipped


def test_a_worker_opens_records_without_running_what_their_files_name(tmp_path, monkeypatch):
    """The files may be others by then: they are read again where the examples are unpickled."""
    written, *_ = folder(tmp_path, train=1, val=1)
    prepare(tmp_path, written, "validation")
    _, found = encoded.open_splits("photos", str(tmp_path / "tfds"), "", 0.2)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    content = pickle.dumps(found["train"])
    assert pickle.loads(content)[0] == found["train"][0]
    (file,) = (tmp_path / "tfds").rglob("features.json")
    file.write_text('{"pythonClassName": "evil.Image", "text": {}}')
    with pytest.raises(DataError, match="names evil.Image, which is code"):
        pickle.loads(content)
    assert not (tmp_path / "executed").exists()


def test_facts_of_imagenet_need_no_data():
    config = tiny(data__name="imagenet2012", data__storage="stream", data__image_size=160)
    config.augmentation.shift, config.data.directory = 0, "/nowhere"
    facts = data.info(config)
    assert facts.image_shape == (160, 160, 3) and facts.num_classes == 1000
    assert facts.splits == {"train": 1281167, "test": 50000}
    np.testing.assert_allclose(np.array(facts.mean) / 255, (0.485, 0.456, 0.406), rtol=1e-9)
    np.testing.assert_allclose(np.array(facts.std) / 255, (0.229, 0.224, 0.225), rtol=1e-9)


def test_an_official_set_has_its_official_size(tmp_path, monkeypatch):
    root = str(tmp_path / "photos")
    photos.make(tmp_path / "photos", train=3, val=2)
    facts = dataclasses.replace(
        STREAMED["imagenet2012"], class_names=("0", "1"), splits={"train": 10, "test": 4}
    )
    monkeypatch.setitem(STREAMED, "tiny", facts)
    assert encoded.open_splits("tiny", "", root, 0.2)[0] == dataclasses.replace(
        facts, test_split="val"
    )
    with pytest.raises(DataError, match="data.name = imagenet2012: found .*'train': 10.* expected"):
        encoded.open_splits("imagenet2012", "", root, 0.2)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(DataError, match="folder .*/photos cannot be read .No such file"):
        encoded.open_splits("photos", "", str(tmp_path / "photos"), 0.2)
    photos.make(tmp_path / "photos", train=1, val=1)
    (tmp_path / "photos/val/n03").mkdir()
    with pytest.raises(DataError, match="photos/val/n03 is no class of the training set"):
        encoded.open_splits("photos", "", str(tmp_path / "photos"), 0.2)
    (tmp_path / "empty/train").mkdir(parents=True)
    with pytest.raises(DataError, match=r"empty/train has no class/image.jpg"):
        encoded.open_splits("photos", "", str(tmp_path / "empty"), 0.2)
    with pytest.raises(DataError, match="data.name = photos: neither one of"):
        encoded.open_splits("photos", str(tmp_path / "nothing"), "", 0.2)


def small(tmp_path):
    """train/cat, train/dog and val/cat with an image each."""
    for path in ("train/cat/0.jpg", "train/dog/0.jpg", "val/cat/0.jpg"):
        put(tmp_path / path)
    return tmp_path


def put(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(photos.encode(photos.photo(20, 20)))


def test_images_lie_at_any_depth_and_what_is_hidden_is_left_out(tmp_path):
    """The order is that of `sorted(os.walk(folder, followlinks=True))`, then of the names."""
    put(tmp_path / "elsewhere/7.png")
    root = small(tmp_path / "root")
    for path in ("b/x/1.JPEG", "b-c/2.webp", "b/9.jpg", "a.jpg/3.TIF"):
        put(root / "train/dog" / path)
    for path in (".ipynb_checkpoints/0.jpg", "dog/.ipynb_checkpoints/0.jpg", "dog/._0.jpg"):
        put(root / "train" / path)
    put(root / "train/0.jpg")  # of no class
    (root / "train/owl").symlink_to(tmp_path / "elsewhere")
    (root / "train/dog/.#0.jpg").symlink_to("an editor's lock")
    facts, splits = encoded.open_splits("photos", "", str(root), 0.2)
    assert facts.class_names == ("cat", "dog", "owl")
    found = [(label, place) for _, label, place in map(splits["train"].__getitem__, range(7))]
    dog = ["0.jpg", "a.jpg/3.TIF", "b/9.jpg", "b-c/2.webp", "b/x/1.JPEG"]
    expected = [(0, "cat/0.jpg"), *((1, f"dog/{name}") for name in dog), (2, "owl/7.png")]
    assert found == [(label, str(root / "train" / place)) for label, place in expected]
    assert facts.splits == {"train": 7, "test": 1}


@pytest.mark.parametrize(
    ("folders", "splits", "test"),
    [
        (("train", "val"), ("train", "test"), "val"),
        (("train", "test"), ("train", "test"), "test"),
        (("train", "val", "test"), ("train", "validation", "test"), "test"),
        (("Training", "Valid", "TESTING", "other"), ("train", "validation", "test"), "TESTING"),
    ],
)
def test_splits_have_folders(tmp_path, folders, splits, test):
    for number, split in enumerate(folders, 1):
        for index in range(number):
            put(tmp_path / split / f"cat/{index}.jpg")
    facts, found = encoded.open_splits("photos", "", str(tmp_path), 0.2)
    assert (tuple(facts.splits), facts.test_split) == (splits, test)
    for split in found:
        folder = test if split == "test" else folders[splits.index(split)]
        assert all(place.startswith(f"{tmp_path / folder}/") for _, _, place in found[split])
    assert sum(facts.splits.values()) == {2: 3, 3: 6, 4: 6}[len(folders)]


def test_a_folder_without_splits_is_divided_by_class(tmp_path):
    for name, count in (("cat", 20), ("dog", 10), ("owl", 5)):
        for index in range(count):
            put(tmp_path / name / f"{index}.jpg")
    facts, splits = encoded.open_splits("photos", "", str(tmp_path), 0.2)
    assert (facts.splits, facts.test_split) == ({"train": 28, "test": 7}, "held out")
    assert np.bincount(splits["train"].labels).tolist() == [16, 8, 4]
    assert np.bincount(splits["test"].labels).tolist() == [4, 2, 1]
    places = [{place for _, _, place in split} for split in splits.values()]
    assert not places[0] & places[1] and len(places[0] | places[1]) == 35
    # The same below train/, on another path, and nearly the same with an image more.
    (tmp_path / "new").mkdir()
    (tmp_path / "new/train").mkdir()
    for name in facts.class_names:
        (tmp_path / name).rename(tmp_path / "new/train" / name)
    moved = encoded.open_splits("photos", "", str(tmp_path / "new"), 0.2)[1]
    assert moved["test"].names.tolist() == splits["test"].names.tolist()
    put(tmp_path / "new/train/dog/more.jpg")
    encoded.open_splits.cache_clear()
    more = encoded.open_splits("photos", "", str(tmp_path / "new"), 0.2)[1]["test"]
    assert len(set(more.names.tolist()) ^ set(moved["test"].names.tolist())) <= 2


def test_places_are_given_by_the_method_of_sainte_lague():
    """The example of 7 seats in Wikipedia's article on it: 53, 24 and 23 votes have 3, 2 and 2."""
    labels = np.repeat([0, 1, 2], [53, 24, 23])
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(100)
        found = encoded.in_proportion(order, labels)
        assert sorted(found) == list(range(100))
        assert np.bincount(labels[found[:7]]).tolist() == [3, 2, 2]
        assert found[labels[found] == 1].tolist() == order[labels[order] == 1].tolist()


def test_what_is_called_as_a_split_is_one(tmp_path):
    put(tmp_path / "test/0.jpg")
    put(tmp_path / "bus/0.jpg")
    assert f"{tmp_path}/test is called as a split is, and there is no" in refused(tmp_path)
    put(tmp_path / "train/0.jpg")
    assert f"{tmp_path}/train has no class/image.jpg; images lie in" in refused(tmp_path)
    put(tmp_path / "train/bus/0.jpg")
    encoded.open_splits.cache_clear()
    assert f"{tmp_path}/test has no class/image.jpg" in refused(tmp_path)


def test_a_test_set_without_labels_is_no_part_of_imagenet(tmp_path, monkeypatch):
    small(tmp_path)
    put(tmp_path / "test/0.jpg")
    facts = dataclasses.replace(
        STREAMED["imagenet2012"], class_names=("0", "1"), splits={"train": 2, "test": 1}
    )
    monkeypatch.setitem(STREAMED, "tiny", facts)
    assert encoded.open_splits("tiny", "", str(tmp_path), 0.2)[0].test_split == "val"


def test_files_that_are_no_images_by_their_name_are_counted(tmp_path):
    root = small(tmp_path)
    for name in ("train/cat/1.heic", "train/cat/2.HEIC", "train/notes.txt", "train/dog/.hidden"):
        (root / name).write_text("something")
    train = encoded.open_splits("photos", "", str(root), 0.2)[1]["train"]
    assert train.left_out == {".heic": 1, ".HEIC": 1, "outside any class": 1}


def refused(root):
    with pytest.raises(DataError) as caught:
        encoded.open_splits("photos", "", str(root), 0.2)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_one_class_alone_is_refused(tmp_path):
    for path in ("photos/cat/1.png", "photos/dog/2.png"):  # the folder above the one that is meant
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    config = tiny(data__storage="auto", data__manual_dir=str(tmp_path), data__image_size=8)
    with pytest.raises(UserError, match="all images are of one class, 'photos'; name the folder"):
        data.info(config)


def test_a_share_for_test_leaves_images_that_train(tmp_path):
    root = small(tmp_path)
    shutil.rmtree(root / "val", ignore_errors=True)
    with pytest.raises(DataError, match="data.test_share = 1.0: no image is left that trains"):
        encoded.open_splits("photos", "", str(root), 1.0)


def test_a_class_without_an_image_is_named(tmp_path):
    root = small(tmp_path)
    (root / "train/owl/2020").mkdir(parents=True)
    (root / "train/owl/2020/notes.txt").write_text("no image")
    assert f"{root}/train/owl has no image (.jpg, " in refused(root)


def test_a_link_that_leads_nowhere_or_round_is_named(tmp_path):
    for name, target in (("nowhere", "gone"), ("round", ".")):
        root = small(tmp_path / name)
        (root / "train/dog" / name).symlink_to(target)
        assert f"train/dog/{name}" in refused(root) and "leads nowhere" in refused(root)
    root = small(tmp_path / "class")
    (root / "train/owl").symlink_to("gone")
    assert f"the link {root}/train/owl leads nowhere" in refused(root)
    root = small(tmp_path / "file")
    (root / "val").rename(root / "other")
    (root / "val").write_text("no folder")
    assert f"{root}/val cannot be read (Not a directory)" in refused(root)


def test_a_name_is_bytes_and_shown_in_one_line(tmp_path):
    root = small(tmp_path)
    latin = os.fsdecode(os.fsencode(root) + b"/train/cat/caf\xe9\n\x1b[31m.jpg")
    content = photos.encode(photos.photo(30, 20))
    with open(latin, "wb") as file:
        file.write(content)
    train = encoded.open_splits("photos", "", str(root), 0.2)[1]["train"]
    assert train[1] == (content, 0, latin)
    os.remove(latin)
    with pytest.raises(encoded.ImageError, match=r"cat/caf\\udce9\\n\\x1b\[31m.jpg: No such file"):
        train[1]


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC"), ("NFD", "NFD")])
def test_an_accent_is_the_same_however_a_file_system_spells_it(tmp_path, forms):
    for split, form in zip(("train", "val"), forms, strict=True):
        put(tmp_path / split / unicodedata.normalize(form, "\u00e9tang") / "0.jpg")
        put(tmp_path / split / "zoo/0.jpg")
    facts, splits = encoded.open_splits("photos", "", str(tmp_path), 0.2)
    for split in splits.values():
        labels = {os.path.basename(os.path.dirname(place)): label for _, label, place in split}
        assert labels.pop("zoo") == facts.class_names.index("zoo")
        assert list(labels.values()) == [facts.class_names.index("\u00e9tang")]


def test_what_is_no_file_is_an_image_that_cannot_be_read(tmp_path):
    root = small(tmp_path)
    (root / "train/cat/1.jpg").symlink_to("gone")
    os.mkfifo(root / "train/cat/2.jpg")
    train = encoded.open_splits("photos", "", str(root), 0.2)[1]["train"]
    for index, problem in ((1, "1.jpg: No such file"), (2, "2.jpg: it is no regular file")):
        with pytest.raises(encoded.ImageError, match=f"{root}/train/cat/{problem}"):
            train[index]


def test_a_set_of_other_features_is_named(monkeypatch):
    builder = types.SimpleNamespace(info=types.SimpleNamespace(features={"text": "bytes"}))
    monkeypatch.setattr(encoded.builders, "prepare", lambda *_: builder)
    with pytest.raises(DataError, match="words: needs image and label, a ClassLabel; has .*text"):
        encoded.open_splits("words", "", "", 0.2)


def test_a_damaged_record_is_an_image_that_cannot_be_read(tmp_path):
    written = photos.make(tmp_path / "photos", train=3, val=2)
    prepare(tmp_path, written, "test")
    (path,) = (tmp_path / "tfds").rglob("*train*.array_record*")
    content = bytearray(path.read_bytes())
    content[1000:3000] = bytes(2000)
    path.write_bytes(content)
    train = encoded.open_splits("photos", str(tmp_path / "tfds"), "", 0.2)[1]["train"]
    with pytest.raises(encoded.ImageError, match=r"train\[0\]: "):
        train[0]
