"""A folder of images: in memory or streamed, measured or predicted, the bits are the same."""

import logging
import os

import numpy as np
import pytest
from etils import epath
from PIL import Image

from densejax import config as schema
from densejax import data
from densejax.config import UserError
from densejax.data import decoded, encoded
from densejax.data.builders import DataError
from densejax.data.memory import MemorySet
from densejax.data.stream import StreamSet
from densejax.inference import prediction
from densejax.training import experiment, parallel
from tests import photos, small
from tests.test_predict import stored_as

COUNTS = {"cat": 20, "dog": 10, "\u00e9tang": 5}
SIZE, RESIZE = 16, 18  # 18 is 256/224 of 16, rounded


def draw(root, counts=COUNTS, suffix="png"):
    """Writes root/class/*.png of many sizes; returns root."""
    for rank, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for index in range(count):
            image = photos.photo(24 + index, 30 - index % 7, seed=100 * rank + index)
            image.save(root / name / f"{index:02}.{suffix}")
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("folder") / "photos")


def test_each_core_that_the_process_may_use_decodes(root, monkeypatch):
    threads, pool = [], decoded.concurrent.futures.ThreadPoolExecutor

    def counted(number):
        threads.append(number)
        return pool(number)

    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2}, raising=False)
    monkeypatch.setattr(decoded.concurrent.futures, "ThreadPoolExecutor", counted)
    examples = encoded.Folder(epath.Path(root))
    assert len(decoded.read(examples, np.arange(3), SIZE, RESIZE, 3)[0]) == 3
    assert threads == [3]


def config(root, **changes):
    defaults = {
        "data__name": "mine",
        "data__storage": "auto",
        "data__manual_dir": str(root),
        "data__image_size": SIZE,
        "train__batch_size": 8,
        "evaluate__batch_size": 4,
    }
    return schema.checked(small.tiny(**defaults | changes))


def create(root, **changes):
    """The data and the facts of a configuration that was checked."""
    built = experiment.build(config(root, **changes))
    mesh = parallel.mesh()
    found = data.create(built.config, parallel.replicated(mesh), parallel.split(mesh))
    return found, built


def evaluated(found, split="test"):
    """Images and labels of a split in the order in which they are evaluated."""
    batches = [{key: np.asarray(b[key]) for key in b} for b in found.evaluation[split].evaluation()]
    whole = {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}
    return whole["image"][whole["mask"]], whole["label"][whole["mask"]]


STREAMED = {"data__memory_gigabytes": 0.0}


@pytest.mark.parametrize(("channels", "crop_size"), [(1, SIZE), (3, 0)])
def test_what_is_measured_is_what_predict_reads_in_memory_and_streamed(root, channels, crop_size):
    changes = {"data__channels": channels, "evaluate__crop_size": crop_size}
    memory, built = create(root, **changes)
    streamed, other = create(root, **changes | STREAMED)
    assert isinstance(memory.train, MemorySet) and isinstance(streamed.train, StreamSet)
    assert built.task.preparation.shift == 1 and other.task.preparation.shift == 0
    assert (built.info.mean, built.info.std) == (other.info.mean, other.info.std)
    assert len(built.info.mean) == channels
    pixels, labels = evaluated(memory)
    np.testing.assert_array_equal(evaluated(streamed)[0], pixels)
    np.testing.assert_array_equal(evaluated(streamed)[1], labels)
    split = encoded.open_splits("mine", built.config.data.directory, str(root), 0.2)[1]["test"]
    size = RESIZE if crop_size else SIZE
    network = stored_as((size, size, channels), resize_size=RESIZE)
    files = [split[index][2] for index in range(len(split))]
    read = np.stack([prediction.read(file, network) for file in files])
    np.testing.assert_array_equal(pixels, read)
    names = [built.info.class_names[label] for label in labels]
    assert names == [os.path.basename(os.path.dirname(file)) for file in files]
    batch = np.asarray(streamed.train.batch(0)["image"])
    streamed.close()
    assert batch.shape == (8, SIZE, SIZE, channels)
    if channels == 1:  # the luminance of colour, ITU-R 601-2
        colour = np.stack([prediction.read(f, stored_as((size, size, 3), RESIZE)) for f in files])
        assert np.abs(pixels[..., 0] - colour @ [0.299, 0.587, 0.114]).max() <= 1


def test_images_in_memory_and_streamed_are_looked_up_with_their_files(root):
    (memory, built), (streamed, _) = create(root), create(root, **STREAMED)
    pixels, labels = evaluated(memory)
    places = [3, 0, len(labels) - 1]
    for split in (memory.evaluation["test"], streamed.evaluation["test"]):
        for place, (image, label, file) in zip(places, split.examples(places), strict=True):
            np.testing.assert_array_equal(image, pixels[place])
            assert label == labels[place]
            assert os.path.basename(os.path.dirname(file)) == built.info.class_names[labels[place]]
            read = prediction.read(file, stored_as((SIZE, SIZE, 3), resize_size=RESIZE))
            np.testing.assert_array_equal(image, read)
    streamed.close()


def test_images_lie_in_memory_as_long_as_they_fit(root):
    bytes_of_all = 35 * SIZE * SIZE * 3
    for share, fits in ((1, True), (0.999, False)):
        changed = config(root, data__memory_gigabytes=bytes_of_all / 2**30 * share)
        assert data.in_memory(changed) is fits


def test_mean_and_std_are_of_the_training_images(root):
    found, built = create(root)
    images = np.asarray(found.train._arrays["image"], np.float64)
    assert len(images) == 28
    np.testing.assert_allclose(built.info.mean, images.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(built.info.std, images.std((0, 1, 2)), rtol=1e-12)
    assert found.notes["mean, std"].endswith("of 28 training images")


def test_mean_and_std_of_many_images_are_of_some_spread_over_all(root, monkeypatch):
    monkeypatch.setattr(decoded, "MOST_MEASURED", 10)
    decoded.statistics.cache_clear()
    found, built = create(root)
    images = np.asarray(found.train._arrays["image"], np.float64)[::3]
    np.testing.assert_allclose(built.info.mean, images.mean((0, 1, 2)), rtol=1e-12)
    assert found.notes["mean, std"].endswith("of 10 training images")
    decoded.statistics.cache_clear()


def test_mean_and_std_are_given(root):
    given = {"data__mean": (124.0, 116.0, 104.0), "data__std": (58.0, 57.0, 57.4)}
    info = data.info(config(root, **given))
    assert (info.mean, info.std) == tuple(given.values())
    info = data.info(small.tiny(data__mean=(3.0,), data__std=(5.0,)))  # of digits, too
    assert (info.mean, info.std) == ((3.0,), (5.0,))
    with pytest.raises(UserError, match=r"data.mean = \(1.0, 2.0\), .*: give 3 numbers each"):
        data.info(config(root, data__mean=(1.0, 2.0), data__std=(3.0, 4.0)))


def test_images_of_one_value_have_no_std(tmp_path):
    for index in range(18):
        path = tmp_path / "ab"[index % 2] / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (20, 20), (index, 7, index)).save(path)
    with pytest.raises(UserError, match="channel 1 of these images has one value everywhere"):
        data.info(config(tmp_path))


# --- Which images are held out.


def classes_of(labels):
    return np.bincount(labels, minlength=3).tolist()


def test_every_class_is_held_out_in_proportion(root):
    for seed in (0, 1):
        found, _ = create(root, data__validation_size=7, evaluate__split="validation", seed=seed)
        assert classes_of(evaluated(found)[1]) == [4, 2, 1]
        assert classes_of(evaluated(found, "validation")[1]) == [4, 2, 1]
        assert classes_of(found.train._arrays["label"]) == [12, 6, 3]
    small, _ = create(root, data__train_size=14)
    assert classes_of(small.train._arrays["label"]) == [8, 4, 2]


def test_no_image_trains_and_is_measured(root):
    found, _ = create(root, data__validation_size=7, evaluate__split="validation")
    trains = {image.tobytes() for image in np.asarray(found.train._arrays["image"])}
    parts = [{image.tobytes() for image in evaluated(found, name)[0]} for name in found.evaluation]
    assert len(set.union(trains, *parts)) == len(trains) + sum(map(len, parts)) == 35


def test_a_folders_own_images_for_validation_are_taken(root, tmp_path):
    for split, count in (("train", 9), ("val", 3), ("test", 2)):
        draw(tmp_path / split, {"a": count, "b": count})
    found, _ = create(tmp_path, evaluate__split="validation", checkpoint__select="best")
    sizes = {name: part.size for name, part in found.evaluation.items()}
    assert (found.train.size, sizes) == (18, {"test": 4, "validation": 6})
    assert found.test_split == "test" and "test" not in found.notes
    assert set(create(tmp_path)[0].evaluation) == {"test"}  # val is read where it is measured
    found, _ = create(tmp_path, evaluate__split="validation", **STREAMED)
    assert found.evaluation["validation"].size == 6
    with pytest.raises(UserError, match="data.validation_size = 4: set it to 0, the folder has"):
        experiment.build(config(tmp_path, data__validation_size=4))
    with pytest.raises(UserError, match="evaluate.final_split = 'validation': set data.valid"):
        experiment.build(config(root, evaluate__final_split="validation"))
    with pytest.raises(UserError, match="data.train_split = 'train.validation': name train once"):
        experiment.build(config(tmp_path, data__train_split="train+validation"))


# --- Files of every kind.


def odd_folder(root):
    """A folder whose class `odd` has files that are not what most are; returns their paths."""
    draw(root, {"plain": 9})
    folder, photo = root / "odd", photos.photo(40, 30)
    folder.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    photo.convert("CMYK").save(folder / "cmyk.jpg")
    photo.quantize(16).save(folder / "palette.png", transparency=3)
    photo.save(folder / "turned.jpg", exif=exif)
    photo.save(folder / "UPPER.JPG")
    photo.convert("LA").save(folder / "\u732b \u00e9.png")
    photo.save(folder / "animated.gif", save_all=True, append_images=[photo.rotate(180)])
    Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50).save(folder / "deep.png")
    photo.save(root.parent / "elsewhere.png")
    (folder / "link.png").symlink_to(root.parent / "elsewhere.png")
    files = sorted(folder.iterdir())
    for path in (root / ".DS_Store", folder / ".DS_Store", folder / "Thumbs.db", root / "notes.md"):
        path.write_text("no image")
    return files


def test_odd_files_are_read_as_predict_reads_them_and_what_is_none_is_said(tmp_path):
    files = odd_folder(tmp_path / "root")
    found, built = create(tmp_path / "root", data__test_share=0.01)
    assert built.info.class_names == ("odd", "plain") and built.info.splits["test"] == 1
    splits = encoded.open_splits("mine", built.config.data.directory, str(tmp_path / "root"), 0.01)
    network, read = stored_as((SIZE, SIZE, 3), resize_size=RESIZE), set()
    for part, pixels in (
        ("train", np.asarray(found.train._arrays["image"])),
        ("test", evaluated(found)[0]),
    ):
        for index, image in enumerate(pixels):
            file = splits[1][part][index][2]
            np.testing.assert_array_equal(image, prediction.read(file, network), err_msg=file)
            read.add(file)
    assert set(map(str, files)) < read and len(read) == 17
    assert found.notes["left out"].endswith(": 1 outside any class, 1 .db")
    name = built.info.class_names[1 - evaluated(found)[1][0]]
    assert found.notes["untested"] == f"there is no test image of {name}"


def test_an_image_that_is_not_whole_is_named_or_skipped(tmp_path, caplog):
    root = draw(tmp_path / "root", {"a": 20, "b": 20}, "jpg")
    given = {"data__normalization": "scale", "train__batch_size": 32}
    splits = encoded.open_splits("mine", small.tiny().data.directory, str(root), 0.2)[1]
    names = [splits["train"][index][2] for index in (3, 30)]
    for name in names:
        os.truncate(name, 500)
    with pytest.raises(DataError, match="no image that can be read .*; replace or remove") as error:
        create(root, **given)[0].train.batch(0)
    assert str(error.value).startswith(tuple(names)) and "\n" not in str(error.value)
    with caplog.at_level(logging.WARNING):
        found, _ = create(root, data__corrupt_images="skip", **given)
        batch = found.train.batch(0)
        found.close()
    assert found.train.size == 32 and len(batch["label"]) == 32
    pixels = np.asarray(found.train._arrays["image"])
    for index in (3, 30):  # the next one stands in
        assert names[index // 30] in caplog.text
        np.testing.assert_array_equal(pixels[index], pixels[index + 1])
    os.truncate(splits["test"][2][2], 500)
    with pytest.raises(DataError, match="no image that can be read"):
        evaluated(create(root, data__corrupt_images="skip", **given)[0])
