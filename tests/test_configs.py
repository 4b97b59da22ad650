"""Every card builds; the papers' recipes are literal; each runs on tiny archives of its format."""

import ast
import importlib
import json
import pathlib
import shutil

import numpy as np
import pytest
from PIL import Image

import densejax
from densejax import config as schema
from densejax import data
from densejax.config import UserError
from densejax.data import builders, decoded, encoded
from densejax.inference import classifier, prediction
from densejax.training import experiment, loop, parallel
from tests import archives, small
from tests.programs import shared_programs  # noqa: F401

FOLDER = pathlib.Path(densejax.__file__).parents[1] / "configs"
CARDS = sorted(path.stem for path in FOLDER.glob("*.py"))
ARGUMENTS = {
    "cifar10": [
        "variant=plain,depth=40",
        "variant=b",
        "variant=c,depth=40",
        "augment=False",
        "model=resnet20_cifar,augment=False",
        "model=rdnet_cifar",
    ],
    "cifar100": ["variant=plain,depth=40", "depth=40,growth_rate=24", "augment=False"],
    "svhn": ["variant=plain,depth=100,growth_rate=24"],
    "fashion_mnist": ["growth_rate=8", "tune=True"],
    "digits": ["depth=10,growth_rate=4"],
    "folder": ["model=densenet_bc_40_12,image_size=32"],
    "imagenet": [
        *(f"model=densenet{depth}" for depth in (161, 169, 201, 264)),
        *(f"model=resnet{depth},recipe=modern" for depth in (18, 34, 50, 101, 152)),
        "model=rdnet_tiny,recipe=rdnet",
    ],
}


def card(name, arg=None):
    """The configuration of a card."""
    return importlib.import_module(f"configs.{name}").get_config(arg)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """FOLDER/class/image.png: three classes of 40, 20 and 10 plain images with noise."""
    path, random = tmp_path_factory.mktemp("folder"), np.random.default_rng(0)
    for rank, (name, count) in enumerate({"blue": 40, "green": 20, "red": 10}.items()):
        (path / name).mkdir()
        for index in range(count):
            pixels = random.integers(0, 100, (20 + index % 5, 24, 3)).astype(np.uint8)
            pixels[..., 2 - rank] += 150
            Image.fromarray(pixels).save(path / name / f"{index}.png")
    return path


@pytest.mark.parametrize(
    ("name", "arg"), [(name, arg) for name in CARDS for arg in (None, *ARGUMENTS.get(name, []))]
)
def test_every_card_describes_an_experiment(name, arg, folder):
    config = card(name, arg)
    if name == "folder":
        config.data.manual_dir = str(folder)
    built = experiment.build(config)
    info, model = built.info, built.task.model
    assert config.name == name and model.num_classes == info.num_classes


@pytest.mark.parametrize("name", CARDS)
def test_every_card_is_short_and_its_docstring_is_a_run_card(name):
    text = (FOLDER / f"{name}.py").read_text()
    assert len(text.splitlines()) <= 60
    docstring = ast.get_docstring(ast.parse(text))
    for word in ("Command:", "Data:", "Expected:", f"--config=configs/{name}.py"):
        assert word in docstring, word


@pytest.mark.parametrize("name", CARDS)
def test_no_card_takes_an_argument_that_it_does_not_know(name):
    with pytest.raises(UserError, match="config argument 'colour=red'"):
        card(name, "colour=red")


CIFAR_RECIPE = {
    "train.epochs": 300,
    "train.batch_size": 64,
    "train.label_smoothing": 0.0,
    "train.dtype": "float32",
    "optimizer.learning_rate": 0.1,
    "optimizer.schedule": "step",
    "optimizer.drop_at": (0.5, 0.75),
    "optimizer.drop_factor": 0.1,
    "optimizer.warmup_epochs": 0.0,
    "optimizer.momentum": 0.9,
    "optimizer.nesterov": True,
    "optimizer.weight_decay": 1e-4,
    "optimizer.decay_all": True,
    "augmentation.shift": 4,
    "augmentation.flip": True,
    "data.normalization": "statistics",
    "data.train_split": "train",
    "data.validation_size": 0,
    "data.image_size": 0,
    "evaluate.split": "test",
    "evaluate.final_split": "test",
    "evaluate.every_epochs": 0,
    "checkpoint.select": "last",
    "model.bottleneck": True,
    "model.bottleneck_width": 4,
    "model.compression": 0.5,
    "model.depth": 100,
    "model.growth_rate": 12,
    "model.stem": "cifar",
    "model.stem_width": None,
    "model.dropout_rate": 0.0,
    "model.convolution_bias": False,
}
NO_AUGMENTATION = {"augmentation.shift": 0, "augmentation.flip": False, "model.dropout_rate": 0.2}
PLAIN_40 = {"model.bottleneck": False, "model.compression": 1.0, "model.depth": 40}
SVHN_RECIPE = NO_AUGMENTATION | {
    "train.epochs": 40,
    "data.normalization": "scale",
    "data.train_split": "train+extra",
    "data.validation_size": 6000,
    "evaluate.split": "validation",
    "evaluate.every_epochs": 1,
    "checkpoint.select": "best",
}


@pytest.mark.parametrize(
    ("name", "arg", "changes"),
    [
        ("cifar10", None, {}),
        ("cifar10", "augment=False", NO_AUGMENTATION),
        ("cifar10", "variant=plain,depth=40", PLAIN_40),
        ("cifar100", None, {}),
        ("cifar100", "augment=False", NO_AUGMENTATION),
        ("svhn", None, SVHN_RECIPE),
    ],
)
def test_recipes_are_the_papers(name, arg, changes):
    found = schema.flatten(card(name, arg))
    expected = CIFAR_RECIPE | changes
    assert {key: found[key] for key in expected} == expected
    assert found["data.name"] == name


IMAGENET_RECIPE = {
    "data.name": "imagenet2012",
    "data.storage": "stream",
    "data.image_size": 224,
    "data.normalization": "statistics",
    "augmentation.flip": True,
    "augmentation.crop_area": 0.08,
    "augmentation.jitter": 0.4,
    "augmentation.lighting": 0.1,
    "evaluate.resize_size": 0,  # 256 for these images
    "train.epochs": 90,
    "train.batch_size": 256,
    "train.dtype": "float32",
    "train.label_smoothing": 0.0,
    "optimizer.learning_rate": 0.1,
    "optimizer.reference_batch_size": 0,
    "optimizer.momentum": 0.9,
    "optimizer.nesterov": True,
    "optimizer.weight_decay": 1e-4,
    "optimizer.decay_all": True,
    "optimizer.schedule": "step",
    "optimizer.drop_factor": 0.1,
    "model.blocks": (6, 12, 24, 16),
    "model.growth_rate": 32,
    "model.compression": 0.5,
}
MODERN_RECIPE = {
    "augmentation.jitter": 0.0,
    "augmentation.lighting": 0.0,
    "train.batch_size": 1024,
    "train.dtype": "bfloat16",
    "train.label_smoothing": 0.1,
    "optimizer.reference_batch_size": 256,
    "optimizer.decay_all": False,
    "optimizer.schedule": "cosine",
    "optimizer.warmup_epochs": 5.0,
}

RDNET_RECIPE = {  # train_configs/rdnet.yaml, and of RDNet-B in TRAINING.md: 4 x 64 x 2 images
    "model.drop_path": 0.4,
    "train.epochs": 300,
    "train.batch_size": 512,
    "train.label_smoothing": 0.1,
    "optimizer.name": "adamw",
    "optimizer.learning_rate": 1e-3,
    "optimizer.nesterov": False,
    "optimizer.weight_decay": 0.05,
    "optimizer.decay_all": False,
    "optimizer.schedule": "cosine",
    "optimizer.warmup_epochs": 20.0,
    "augmentation.policy": "randaugment",
    "augmentation.magnitude": 9.0,
    "augmentation.erasing": 0.25,
    "augmentation.mixup": 0.8,
    "augmentation.cutmix": 1.0,
}


@pytest.mark.parametrize(
    ("arg", "changes"), [(None, {}), ("recipe=paper", {}), ("recipe=modern", MODERN_RECIPE)]
)
def test_the_recipes_of_imagenet(arg, changes):
    found = schema.flatten(card("imagenet", arg))
    expected = IMAGENET_RECIPE | changes
    assert {key: found[key] for key in expected} == expected


def test_the_recipe_of_rdnets():
    found = schema.flatten(card("imagenet", "model=rdnet_base,recipe=rdnet"))
    assert {key: found[key] for key in RDNET_RECIPE} == RDNET_RECIPE
    for arg in ("recipe=old", "recipe=rdnet"):  # the latter of a DenseNet
        with pytest.raises(UserError, match="allowed are paper, modern, and rdnet for rdnet_tiny"):
            card("imagenet", arg)


def test_rates_of_imagenet():
    built = experiment.build(card("imagenet"))
    rate, steps = built.task.learning_rate, built.steps
    epoch = 1281167 // 256
    assert steps == 90 * epoch
    found = [float(rate(n * epoch + late)) for n in (30, 60) for late in (-1, 0)]
    np.testing.assert_allclose(found, [0.1, 0.01, 0.01, 0.001], rtol=1e-6)
    built = experiment.build(card("imagenet", "recipe=modern"))
    rate, steps = built.task.learning_rate, built.steps
    epoch = 1281167 // 1024
    found = [float(rate(n)) for n in (0, 5 * epoch - 1, steps - 1)]
    np.testing.assert_allclose(found, [0.4 / (5 * epoch), 0.4, 0.0], rtol=1e-5, atol=1e-8)


def test_pixels_of_svhn_are_divided_by_255_and_cifars_by_their_statistics():
    images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, -1)
    prepared = data.preparation(card("svhn")).evaluation(images)
    np.testing.assert_allclose(prepared, images / 255, rtol=1e-6)
    prepared = data.preparation(card("cifar10")).evaluation(images)
    mean, std = np.array([125.3, 123.0, 113.9]), np.array([63.0, 62.1, 66.7])
    np.testing.assert_allclose(prepared, (images - mean) / std, atol=1e-5)


# --- Whole runs on tiny archives.

SPLITS = {
    "cifar10": {"train": 40, "test": 10},
    "cifar100": {"train": 40, "test": 10},
    "svhn": {"train": 30, "test": 10, "extra": 20},
    "fashion_mnist": {"train": 30, "test": 10},
}


def tiny_card(tmp_path, monkeypatch, name, set_name, python=False):
    """A card with a network of two layers and tiny archives; and the arrays in them."""
    facts, arrays = archives.make(set_name, tmp_path / "manual", SPLITS[set_name], python)
    monkeypatch.setitem(builders.SETS, set_name, facts)
    config = card(name)
    config.model.depth = None
    config.model.blocks = (1,)
    config.model.growth_rate = 4
    config.data.directory, config.data.manual_dir = str(tmp_path / "data"), str(tmp_path / "manual")
    config.data.validation_size = min(config.data.validation_size, 6)
    config.train.epochs = 2
    config.train.batch_size = config.evaluate.batch_size = 8
    config.optimizer.warmup_epochs = min(config.optimizer.warmup_epochs, 0.5)
    return config, arrays


@pytest.mark.parametrize(
    ("name", "set_name", "python", "steps"),
    [
        pytest.param("cifar10", "cifar10", False, 10, marks=pytest.mark.slow),
        pytest.param("cifar10", "cifar10", True, 10, marks=pytest.mark.slow),
        pytest.param("cifar100", "cifar100", False, 10, marks=pytest.mark.slow),
        ("svhn", "svhn", False, 10),  # 30 - 6 + 20 images: five batches of 8, and 4 left
        pytest.param("fashion_mnist", "fashion_mnist", False, 6, marks=pytest.mark.slow),
        ("d2l_fashion_mnist", "fashion_mnist", False, 6),
    ],
)
def test_a_card_runs_from_the_archive_to_the_result(
    tmp_path, monkeypatch, name, set_name, python, steps
):
    config, _ = tiny_card(tmp_path, monkeypatch, name, set_name, python)
    if name == "d2l_fashion_mnist":
        config.data.image_size = 32
    read, splits = builders.read, []
    monkeypatch.setattr(
        builders,
        "read",
        lambda name, split, *rest: splits.append(split) or read(name, split, *rest),
    )
    assert loop.run(config, str(tmp_path / "run"), "train") == 0
    result = json.loads((tmp_path / "run/summary.json").read_text())
    assert result["test_examples"] == 10 and 0 <= result["test_accuracy"] <= 1
    assert set(splits) == set(SPLITS[set_name])
    if name == "svhn":
        assert result["steps"] in (5, 10)  # the better of two epochs
    else:
        assert result["steps"] == steps


def test_the_card_of_a_folder_runs_and_predicts_without_it(tmp_path, folder, capsys):
    root = shutil.copytree(folder, tmp_path / "root")
    config = card("folder", "model=densenet_bc_40_12,image_size=16")
    config.model.update(depth=None, blocks=(1,), growth_rate=4)
    config.data.manual_dir = str(root)
    config.train.update(epochs=2, batch_size=16)
    config.evaluate.batch_size = 16
    assert loop.run(config, str(tmp_path / "run"), "train") == 0
    lines = capsys.readouterr().out.splitlines()
    for words in (
        "data        folder, 56 images train, 14 test",
        "classes     3: blue (32), green (16), red (8)",
        "images      16x16 RGB, in memory: 0.0513 MiB, up to 1024 fit",
        "test        0.2 of each class, held out whatever the seed",
    ):
        assert [" ".join(line.split()) for line in lines].count(" ".join(words.split())) == 1, words
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["test_split"] == "held out" and "in memory" in summary["notes"]["images"]
    test = encoded.open_splits("folder", config.data.directory, str(root), 0.2)[1]["test"]
    measured, _ = decoded.read(test, np.arange(14), 16, resize=18, channels=3)
    files = [pathlib.Path(test[index][2]) for index in range(14)]
    files = [
        shutil.copy(file, tmp_path / f"{i}.{file.parent.name}") for i, file in enumerate(files)
    ]
    shutil.rmtree(root)
    encoded.open_splits.cache_clear()
    network = classifier.load(tmp_path / "run")
    read = [prediction.read(file, network) for file in files]
    np.testing.assert_array_equal(np.stack(read), measured)
    found = prediction.predict(network, tuple(files), top=1)
    right = [
        file.suffix[1:] == r["classes"][0]["name"] for file, r in zip(files, found, strict=True)
    ]
    assert np.mean(right) == pytest.approx(summary["test_accuracy"], abs=1e-9)


def created(config):
    """The data of a configuration."""
    mesh = parallel.mesh()
    return data.create(config, parallel.replicated(mesh), parallel.split(mesh))


def images_of(array):
    """The images as a set of bytes."""
    return {image.tobytes() for image in np.asarray(array)}


def test_held_out_images_of_svhn_are_of_its_first_part_whatever_the_seed(tmp_path, monkeypatch):
    """And labels stay with their images."""
    config, arrays = tiny_card(tmp_path, monkeypatch, "svhn", "svhn")
    label_of = {
        image.tobytes(): label
        for images, labels in arrays.values()
        for image, label in zip(images, labels, strict=True)
    }
    first, more = images_of(arrays["train"][0]), images_of(arrays["extra"][0])
    trained_on, kept = data.hold_out(30, 6, 0, None)
    assert sorted([*trained_on, *kept]) == list(range(30))
    for seed in (0, 1):
        config.seed = seed
        found = created(config)
        held_out = images_of(found.evaluation["validation"]._arrays["image"])
        trains = images_of(found.train._arrays["image"])
        assert (len(held_out), len(trains)) == (6, 44)
        assert held_out < first and trains == (first - held_out) | more
        assert held_out == images_of(arrays["train"][0][kept])
        assert images_of(found.evaluation["test"]._arrays["image"]) == images_of(arrays["test"][0])
        for part in (found.train, *found.evaluation.values()):
            pairs = (np.asarray(part._arrays[name]) for name in ("image", "label"))
            assert all(label_of[i.tobytes()] == label for i, label in zip(*pairs, strict=True))


def digits(seed=0, **changes):
    """(training images of a tiny run, its evaluation sets) as bytes and arrays."""
    found = created(small.tiny(seed=seed, **changes))
    return found.train, found.evaluation


def test_a_larger_training_set_holds_every_smaller_one_whatever_the_seed():
    small, evaluation = digits(data__train_size=300, evaluate__train_images=100)
    large, _ = digits(data__train_size=600, seed=1)
    every, _ = digits()
    assert (small.size, large.size, every.size) == (300, 600, 1437)
    sets = [
        [image.tobytes() for image in np.asarray(part._arrays["image"])]
        for part in (small, large, every)
    ]
    assert set(sets[0]) < set(sets[1]) < set(sets[2])
    first, *_ = sorted(np.flatnonzero([image == sets[0][0] for image in sets[2]]))
    assert np.asarray(small._arrays["label"])[0] == np.asarray(every._arrays["label"])[first]
    measured = images_of(evaluation["train"]._arrays["image"])
    assert len(measured) == 100 and measured < set(sets[0])


def test_held_out_images_train_in_no_smaller_set():
    small, evaluation = digits(
        data__train_size=1337, data__validation_size=100, evaluate__final_split="validation"
    )
    assert not images_of(small._arrays["image"]) & images_of(
        evaluation["validation"]._arrays["image"]
    )


def test_the_training_set_has_a_size_that_is_there():
    assert experiment.build(small.tiny(data__train_size=600)).steps == 2 * 2
    for changes, says in (
        ({"data__train_size": 1338}, "data.train_size = 1338: must be at most the 1337 training"),
        ({"data__train_size": 200}, "train.batch_size = 256: must be at most the 200 training"),
        (
            {"evaluate__train_images": 1338},
            "evaluate.train_images = 1338: must be at most the 1337 training",
        ),
    ):
        with pytest.raises(UserError, match=says):
            experiment.build(small.tiny(data__validation_size=100, **changes))


def test_no_split_is_named_twice():
    for split in ("train+train", "test", "train+test"):
        config = small.tiny(data__train_split=split, data__validation_size=100)
        with pytest.raises(UserError, match=r"data.train_split = '[a-z+]*': name train once each"):
            experiment.build(config)


def test_a_damaged_archive_is_one_line(tmp_path, monkeypatch):
    config, _ = tiny_card(tmp_path, monkeypatch, "cifar10", "cifar10")
    archive = tmp_path / "manual" / "cifar-10-binary.tar.gz"
    archive.write_bytes(archive.read_bytes()[:-50])
    with pytest.raises(UserError, match="cifar-10-binary.tar.gz has SHA-256") as caught:
        loop.run(config, str(tmp_path / "run"), "train")
    assert "\n" not in str(caught.value)
    facts = archives.with_digests(builders.SETS["cifar10"], tmp_path / "manual")
    monkeypatch.setitem(builders.SETS, "cifar10", facts)
    with pytest.raises(UserError, match="cifar-10-binary.tar.gz: ") as caught:
        loop.run(config, str(tmp_path / "run"), "train")
    assert "\n" not in str(caught.value)
