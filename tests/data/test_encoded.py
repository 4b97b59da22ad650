"""Folders and TFDS's records give the same examples; what does not fit is one line."""

import dataclasses
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest

from densejax.data import encoded
from densejax.data.builders import DataError
from densejax.data.official import STREAMED
from tests import photos


def folder(tmp_path, **arguments):
    """The written files and the facts and splits that are found."""
    written = photos.make(tmp_path / "photos", **arguments)
    return written, *encoded.open_splits("photos", "", str(tmp_path / "photos"))


def prepare(tmp_path, written, *tests):
    """Prepares the same images by TFDS as ArrayRecord, in the order of their names."""
    import tensorflow_datasets as tfds

    class Photos(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("5.1.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(encoding_format="jpeg"),
                "label": tfds.features.ClassLabel(names=["n01", "n02"]),
                "file_name": tfds.features.Text(),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
            )

        def _split_generators(self, dl_manager):
            tested = {test: self._generate_examples("val") for test in tests}
            return {"train": self._generate_examples("train")} | tested

        def _generate_examples(self, split):
            names = sorted(name for name in written if name.startswith(split))
            for index, name in enumerate(names):
                path = tmp_path / "photos" / name
                example = {"image": str(path), "label": path.parent.name, "file_name": path.name}
                yield index, example

    Photos.name = "photos"
    Photos(data_dir=tmp_path / "tfds", file_format="array_record").download_and_prepare()


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path):
    written, facts, splits = folder(tmp_path)
    (tmp_path / "photos/train/n01/notes.txt").write_text("no image")
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
    found_facts, found = encoded.open_splits("photos", str(tmp_path / "tfds"), "")
    assert facts.test_split == "val"
    assert found_facts == dataclasses.replace(facts, test_split=tests[-1])
    for split in ("train", "test"):
        assert len(found[split]) == len(splits[split])
        for index in range(len(found[split])):
            content, label, place = found[split][index]
            assert (content, label) == splits[split][index][:2]
            assert f"[{index}]" in place and place.endswith(splits[split][index][2].split("/")[-1])


def test_a_label_that_is_no_class_is_named(tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    written, *_ = folder(tmp_path, train=3, val=2)
    monkeypatch.setattr(tfds.features.ClassLabel, "encode_example", lambda *_: 2)
    prepare(tmp_path, written, "validation")
    _, found = encoded.open_splits("photos", str(tmp_path / "tfds"), "")
    with pytest.raises(DataError, match=r"train\[0\] .*: has label 2, not 0 to 1"):
        found["train"][0]


def test_a_worker_opens_records_without_running_what_their_files_name(tmp_path):
    """The files may be others by then: they are read again where the examples are unpickled."""
    written, *_ = folder(tmp_path, train=1, val=1)
    prepare(tmp_path, written, "validation")
    _, found = encoded.open_splits("photos", str(tmp_path / "tfds"), "")
    (tmp_path / "evil.py").write_text("open('executed', 'w')")
    content = pickle.dumps(found["train"])
    assert pickle.loads(content)[0] == found["train"][0]
    (file,) = (tmp_path / "tfds").rglob("features.json")
    file.write_text('{"pythonClassName": "evil.Image", "text": {}}')
    program = "import pickle, sys; pickle.load(sys.stdin.buffer)"
    answer = subprocess.run(
        [sys.executable, "-c", program],
        input=content,
        capture_output=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert b"names evil.Image, which is code" in answer.stderr
    assert not (tmp_path / "executed").exists()


def test_facts_of_imagenet_need_no_data():
    facts = encoded.info("imagenet2012", "/nowhere", "", 160)
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
    assert encoded.open_splits("tiny", "", root)[0] == dataclasses.replace(facts, test_split="val")
    with pytest.raises(DataError, match="data.name = imagenet2012: found .*'train': 10.* expected"):
        encoded.open_splits("imagenet2012", "", root)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(DataError, match="there is no folder .*/photos/train"):
        encoded.open_splits("photos", "", str(tmp_path / "photos"))
    photos.make(tmp_path / "photos", train=1, val=1)
    (tmp_path / "photos/val/n03").mkdir()
    with pytest.raises(DataError, match="photos/val/n03 is no class of the training set"):
        encoded.open_splits("photos", "", str(tmp_path / "photos"))
    (tmp_path / "empty/train/n01").mkdir(parents=True)
    with pytest.raises(DataError, match=r"empty/train has no class/image.jpg"):
        encoded.open_splits("photos", "", str(tmp_path / "empty"))
    with pytest.raises(DataError, match="data.name = photos: neither one of"):
        encoded.open_splits("photos", str(tmp_path / "nothing"), "")
