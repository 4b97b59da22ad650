"""Directories of weights: complete or refused, and what runs make of them."""

import functools
import hashlib
import json
import os
import pathlib
import shutil
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from densejax import models, pretrained
from densejax.analysis import gradients, reuse
from densejax.config import UserError
from densejax.data import facts
from densejax.inference import classifier, portable
from densejax.models import counts
from densejax.runs import files
from densejax.topology import compiled
from densejax.training import loop, result
from densejax.weights import conversion, store
from densejax.weights.names import LAYOUTS
from tests import small
from tests.models import oracle
from tests.programs import shared_programs  # noqa: F401

SMALL = {
    **{"family": "densenet", "stem": "imagenet", "blocks": (2, 1), "growth_rate": 4},
    "stem_width": 8,
}


def variables_of(model, channels=3, seed=0):
    image = jax.ShapeDtypeStruct((1, 64, 64, channels), np.float32)
    return oracle.random_variables(model, image, seed=seed)


ABSTRACT = functools.cache(conversion.abstract)


@pytest.fixture(autouse=True, scope="module")
def traced_once():
    """The shapes of a network's variables are found once: networks are values, and hashable."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conversion, "abstract", ABSTRACT)
        yield


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A state_dict of a few layers, and where its file and its directory are: to be copied."""
    path = tmp_path_factory.mktemp("small")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.MODELS, "small", SMALL)
        model = models.create(models.fields("small"), 7)
        state_dict = pretrained.to_torch(model, variables_of(model))
        (path / "small.safetensors").write_bytes(safetensors.numpy.save(state_dict))
        store.convert_file("small", str(path / "small.safetensors"), str(path / "folder"))
    return state_dict, path


@pytest.fixture
def state_dict(converted, monkeypatch):
    """A preset of a few layers, "small", and a state_dict of it."""
    monkeypatch.setitem(models.MODELS, "small", SMALL)
    return dict(converted[0])


@pytest.fixture
def file(state_dict, converted, tmp_path):
    """The state_dict in a file."""
    return pathlib.Path(shutil.copy(converted[1] / "small.safetensors", tmp_path))


@pytest.fixture
def folder(state_dict, converted, tmp_path):
    """A directory of the small network."""
    return shutil.copytree(converted[1] / "folder", tmp_path / "folder")


# Directories that are not what was written.


def rewritten(folder, **changes):
    path = folder / "model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_kill_before_the_end_leaves_nothing_that_loads(file, tmp_path, monkeypatch):
    def killed(path, text):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(files, "write", killed)
        store.convert_file("small", str(file), str(tmp_path / "half"))
    assert [path.name for path in (tmp_path / "half").iterdir()] == ["weights.safetensors"]
    with pytest.raises(UserError, match="not a directory of densejax.pretrained"):
        store.load(str(tmp_path / "half"))


def damage_weights(folder):
    data = bytearray((folder / "weights.safetensors").read_bytes())
    data[-5] ^= 1
    (folder / "weights.safetensors").write_bytes(data)


def linked(folder, target, name="weights.safetensors"):
    (folder / name).unlink()
    (folder / name).symlink_to(target)
    return folder / name


DAMAGES = {
    "no directory": lambda folder: shutil.rmtree(folder),
    "no weights": lambda folder: (folder / "weights.safetensors").unlink(),
    "a flipped bit": damage_weights,
    "half a description": lambda folder: (folder / "model.json").write_text('{"model": '),
    "a list": lambda folder: (folder / "model.json").write_text("[]"),
    "no model": lambda folder: rewritten(folder, model=None),
    "another family": lambda folder: rewritten(folder, model={"family": "vgg"}),
    "an unknown field": lambda folder: rewritten(folder, model=SMALL | {"depth_wise": True}),
    "another depth": lambda folder: rewritten(folder, model=SMALL | {"blocks": [2, 2]}),
    "other classes": lambda folder: rewritten(folder, num_classes=10),
    "classes in words": lambda folder: rewritten(folder, num_classes="ten"),
    "classes below zero": lambda folder: rewritten(folder, num_classes=-1),
    "no channels": lambda folder: rewritten(folder, image_channels=0),
    "blocks that would take gigabytes": lambda folder: rewritten(
        folder, model=SMALL | {"blocks": [10**9, 1]}
    ),
    "blocks that would take hours": lambda folder: rewritten(
        folder, model=SMALL | {"blocks": [10**5, 1]}
    ),
    "many blocks": lambda folder: rewritten(folder, model=SMALL | {"blocks": [1] * 10**5}),
    "a depth without end": lambda folder: rewritten(
        folder, model=SMALL | {"blocks": None, "depth": 3 * 10**9 + 1}
    ),
    "modules without end": lambda folder: rewritten(
        folder, model={"family": "vovnet", "modules": [1] * 4, "module_depth": 10**9}
    ),
    "wide layers": lambda folder: rewritten(folder, model=SMALL | {"growth_rate": 10**9}),
    "weights of a device": lambda folder: linked(folder, "/dev/zero"),
    "weights of a directory": lambda folder: linked(folder, "/"),
    "weights of a pipe": lambda folder: os.mkfifo(linked(folder, "nowhere").parent / "nowhere"),
    "a description of a device": lambda folder: linked(folder, "/dev/zero", "model.json"),
    "brackets without end": lambda folder: (folder / "model.json").write_text("[" * 10**5),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_directory_is_refused_in_one_line(damage, folder):
    DAMAGES[damage](folder)
    with pytest.raises(UserError) as caught:
        store.load(str(folder))
    assert str(caught.value).startswith(str(folder)) and "\n" not in str(caught.value)
    assert "`adapt`" not in str(caught.value)  # which a directory is past


def test_a_field_that_is_newer_than_the_directory_has_its_default(folder):
    description = json.loads((folder / "model.json").read_text())
    del description["model"]["connect"]
    (folder / "model.json").write_text(json.dumps(description))
    assert store.load(str(folder))[0]["model"]["connect"] == "dense"


def test_a_digest_is_told_without_reading_an_array(folder, tmp_path):
    data = (folder / "weights.safetensors").read_bytes()
    (folder / "weights.safetensors").unlink()
    assert store.digest(str(folder)) == hashlib.sha256(data).hexdigest()
    run, copy = small.trained(), tmp_path / "copy"
    assert len(store.digest(str(run))) == 64
    for name in ("config.json", "checkpoints/5/MANIFEST"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(run / name, copy / name)
    assert store.digest(str(copy)) == store.digest(str(run))
    for damage in ("checkpoints/5/MANIFEST", "checkpoints/5", "config.json"):
        (copy / damage).rmdir() if (copy / damage).is_dir() else (copy / damage).unlink()
        with pytest.raises(UserError):
            store.digest(str(copy))


# Runs that start from a directory.


def start_from(path, seed=1, num_classes=10, **changes):
    """A directory with the tiny run's network, and the configuration of a run from it."""
    fields = small.tiny(**changes).model
    variables = variables_of(models.create(fields, num_classes), channels=1, seed=seed)
    description = {"model": fields.to_dict(), "num_classes": num_classes, "image_channels": 1}
    store.save(str(path), description, variables)
    return variables, small.tiny(train__weights=str(path))


def evaluated(config, path, capsys):
    """What the command prints of a configuration in mode "eval"."""
    capsys.readouterr()
    assert loop.run(config, str(path), "eval") == 0
    return json.loads(capsys.readouterr().out)


def test_a_run_normalises_as_its_weights_say(tmp_path):
    _, config = start_from(tmp_path / "weights")
    config.data.normalization = "weights"
    with pytest.raises(UserError, match="model.json: add mean, std;"):
        small.build(config)
    rewritten(tmp_path / "weights", mean=[102.0], std=[51.0])  # of 255
    preparation = small.build(config).task.preparation
    np.testing.assert_allclose((*preparation.mean, *preparation.std), (6.4, 3.2))  # of 16
    rewritten(tmp_path / "weights", mean=[3.0] * 3, std=[2.0] * 3, image_channels=3)
    with pytest.raises(UserError, match="for images of 3 channels, and these have 1"):
        small.build(config)


def test_a_run_starts_from_its_weights(tmp_path):
    variables, config = start_from(tmp_path / "weights", model__dropout_rate=0.0)
    experiment = small.build(config)  # its dropout may differ from that of the weights
    state, drawn = experiment.start(), experiment.init()
    small.assert_same_bits({"params": state.params, "batch_stats": state.batch_stats}, variables)
    small.assert_same_bits(
        state.replace(params=0, batch_stats=0), drawn.replace(params=0, batch_stats=0)
    )
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == jax.tree.map(
        lambda leaf: leaf.sharding, experiment.abstract_state
    )


def shifted(state, by):
    return jax.tree.map(lambda leaf: leaf + leaf.dtype.type(by), state)


@pytest.mark.parametrize(
    "select, step", [("last", 3), pytest.param("best", 2, marks=pytest.mark.slow)]
)
def test_a_run_starts_from_the_checkpoint_of_another_runs_result(tmp_path, select, step):
    config = small.tiny(
        checkpoint__select=select, data__validation_size=200, evaluate__split="validation"
    )
    state, errors = small.build(config).init(), {1: 0.3, 2: 0.1, 3: 0.2}
    states = [(n, shifted(state, n), {"validation_error": error}) for n, error in errors.items()]
    first = small.saved(tmp_path / "first", config, *states)
    config.train.weights = str(first)
    started = small.build(config).start()
    small.assert_same_bits(started.params, shifted(state.params, step))
    small.assert_same_bits(started.batch_stats, shifted(state.batch_stats, step))
    description, _ = store.load(str(first))  # without data.json, as runs of earlier versions are
    assert (description["num_classes"], description["image_channels"]) == (10, 1)
    (first / "checkpoints").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="first: the run has no checkpoint to start from yet"):
        loop.run(config, str(tmp_path / "second"), "train")


def test_evaluation_alone_needs_no_run(tmp_path, capsys):
    _, config = start_from(tmp_path / "weights")
    printed = evaluated(config, tmp_path / "run", capsys)
    experiment = small.build(config)
    assert printed["steps"] == 0 and not (tmp_path / "run").exists()
    assert printed["test_loss"] == experiment.evaluate(experiment.start(), "test")["loss"]
    other = start_from(tmp_path / "other", seed=2)[1]
    assert evaluated(other, tmp_path / "run", capsys)["test_loss"] != printed["test_loss"]


def test_a_run_reads_them_once_and_then_its_own_checkpoints(tmp_path):
    _, config = start_from(tmp_path / "weights")
    config.train.epochs = 1
    for _ in range(2):  # the second time it is finished
        assert loop.run(config, str(tmp_path / "run"), "train") == 0
    first, drawn = (
        json.loads((path / "metrics.jsonl").read_text().splitlines()[0])
        for path in (tmp_path / "run", small.trained())
    )
    assert first["step"] == drawn["step"] and first["train_loss"] != drawn["train_loss"]
    shutil.rmtree(tmp_path / "weights")
    start_from(tmp_path / "weights", seed=2)
    with pytest.raises(UserError, match="measured with other versions .*versions.weights: "):
        loop.run(config, str(tmp_path / "run"), "train")
    shutil.rmtree(tmp_path / "weights")
    config.train.epochs = 2
    assert loop.run(config, str(tmp_path / "run"), "train") == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 10


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"num_classes": 7}, "params/head/classifier/bias (7,), not (10,)"),
        ({"model__blocks": (1, 2)}, "unexpected: "),
        ({"model__batch_norm_epsilon": 1e-3}, "model.batch_norm_epsilon = 0.001, not 1e-05"),
        (None, "nowhere: not a directory of densejax.pretrained"),
    ],
)
def test_weights_that_do_not_fit_are_refused_before_anything_is_written(tmp_path, changes, said):
    config = small.tiny(train__weights=str(tmp_path / "nowhere"))
    if changes is not None:
        _, config = start_from(tmp_path / "weights", **changes)
    for mode in ("train", "eval"):
        with pytest.raises(UserError) as caught:
            loop.run(config, str(tmp_path / "run"), mode)
        assert said in str(caught.value) and "\n" not in str(caught.value)
    if changes is not None:
        assert str(caught.value).startswith(f"train.weights = '{tmp_path / 'weights'}': ")
    assert not (tmp_path / "run").exists()


def test_a_network_that_halves_elsewhere_is_another(tmp_path):
    """A max-pooling has no variables that would show where it is."""
    small_hardnet = {"family": "hardnet", "stem_widths": (4, 4), "blocks": (1, 1)}
    small_hardnet |= {"growth_rates": (2, 2), "output_widths": (4, 4)}
    first, second = (
        models.completed(small_hardnet | {"downsampling": blocks}) for blocks in ((1,), (2,))
    )
    variables = variables_of(models.create(first, 7))
    description = {"model": first, "num_classes": 7, "image_channels": 3}
    store.save(str(tmp_path / "weights"), description, variables)
    load = functools.partial(store.load_for, str(tmp_path / "weights"), expected=variables)
    small.assert_same_bits(load(first), variables)
    with pytest.raises(UserError, match=r"model.downsampling = \(1,\), not \(2,\)$"):
        load(second)


# Runs that start from another project's file.


def from_file(path, **changes):
    """A configuration of the network "small" for ten classes of grey images."""
    changes = {"train__weights": str(path), "train__new_classifier": True} | changes
    config = small.tiny(**changes)
    config.model = models.fields("small")
    return config


def test_a_run_starts_from_a_file_with_another_classifier(file, state_dict, tmp_path):
    config = from_file(file)
    built = small.build(config)
    state, drawn = jax.device_get((built.start(), built.init()))
    assert drawn.params["head"]["classifier"]["kernel"].shape[-1] == 10
    small.assert_same_bits(state.params["head"], drawn.params["head"])
    found = pretrained.to_torch(built.task.model, {
        "params": state.params, "batch_stats": state.batch_stats})  # fmt: skip
    assert found.keys() == state_dict.keys()
    for name, array in state_dict.items():
        if name == "features.conv0.weight":  # grey images are the same in all three channels
            array = array.sum(1, keepdims=True)
        if not name.startswith("classifier"):
            np.testing.assert_array_equal(found[name], array, err_msg=name)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert result.versions(config)["weights"] == store.digest(str(file)) == digest
    store.convert_file("small", str(file), str(tmp_path / "folder"))  # the same from a directory
    other = small.build(from_file(tmp_path / "folder")).start()
    small.assert_same_bits(jax.device_get(other), state)


def test_a_file_that_does_not_fit_is_refused_in_one_line(file, tmp_path, monkeypatch):
    def refused(said, path=file, fields=(), **changes):
        config = from_file(path, **changes)
        config.model = models.fields("small", **dict(fields))
        with pytest.raises(UserError, match=said) as caught:
            loop.run(config, str(tmp_path / "run"), "train")
        assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()

    hint = "; train.new_classifier = True fits the classifier and the image channels$"
    refused(f"^train.weights = '{file}': do not fit .*{hint}", train__new_classifier=False)
    refused("the weights, by torchvision names, do not fit", fields={"blocks": (1, 2)})
    refused(
        "^train.weights=.*nowhere.safetensors: cannot be read", tmp_path / "nowhere.safetensors"
    )
    refused("for images of 3 channels, and these have 1", data__normalization="weights")
    refused("train.new_classifier = True: only a run with train.weights reads it", "")
    names = names_of_keras()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "read", lambda *_: (names, ""))
        refused("batch_norm_epsilon = 1e-05: a network of keras has 1.001e-05; set it")


def names_of_keras():
    """The weights of the network "small" by the names of Keras Applications."""
    keras = next(layout for layout in LAYOUTS["densenet"] if not layout.is_torch)
    model = models.create(models.fields("small", batch_norm_epsilon=1.001e-5), 7)
    flat = conversion.flatten(variables_of(model))
    return {keras.name(path): array for path, array in flat.items()}


@pytest.mark.parametrize("classes, fits", [(1000, True), (7, False)])
def test_a_file_of_a_thousand_classes_is_of_imagenet(tmp_path, monkeypatch, classes, fits):
    monkeypatch.setitem(models.MODELS, "small", SMALL)
    model = models.create(models.fields("small"), classes)
    path, variables = tmp_path / "weights.safetensors", variables_of(model)
    path.write_bytes(safetensors.numpy.save(pretrained.to_torch(model, variables)))
    assert facts.of_weights(path)["mean"] == (123.675, 116.28, 103.53)
    load = functools.partial(store.load_for, str(path), models.fields("small"), variables)
    assert load()["params"].keys() == variables["params"].keys()
    if fits:
        assert load(of_imagenet=True)
        monkeypatch.setattr(facts, "BGR", ("torchvision", "densenet"))
        store.convert_file("small", str(path), str(tmp_path / "folder"))
        assert "mean" not in json.loads((tmp_path / "folder" / "model.json").read_text())
        with pytest.raises(UserError, match="^train.weights = .* the order blue, green, red, "):
            load(of_imagenet=True)
    else:
        with pytest.raises(UserError, match="data.normalization = 'weights': nothing says how"):
            load(of_imagenet=True)


def test_a_new_classifier_leaves_out_that_of_a_run():
    expected = small.build(small.tiny()).abstract_state
    expected = {"params": expected.params, "batch_stats": expected.batch_stats}
    shapes = conversion.flatten(expected)
    kernel = conversion.CLASSIFIER[0]
    other = shapes | {kernel: jax.ShapeDtypeStruct((shapes[kernel].shape[0], 3), np.float32)}
    other[conversion.CLASSIFIER[1]] = jax.ShapeDtypeStruct((3,), np.float32)
    load = functools.partial(store.load_for, str(small.trained()), small.tiny().model)
    for network in conversion.unflatten(other), expected:  # as many classes may be other ones
        found = load(network, new_classifier=True)
        assert "head" not in found["params"] and found["batch_stats"].keys() == {
            *("block1", "block2", "norm", "transition1")
        }
    with pytest.raises(UserError, match="train.new_classifier = True fits the classifier"):
        load(conversion.unflatten(other))
    del expected["params"]["stem"]  # as in a network of another family
    with pytest.raises(UserError, match="unexpected: params/stem/conv/kernel"):
        load(expected, new_classifier=True)


def test_a_run_that_is_older_than_a_key_is_taken_all_the_same(tmp_path):
    path = shutil.copytree(small.trained(), tmp_path / "run")
    config = json.loads((path / "config.json").read_text())
    del config["checkpoint"]["select"], config["train"]["weights"], config["optimizer"]["drop_at"]
    (path / "config.json").write_text(json.dumps(config))
    assert pretrained.digest(str(path)) == pretrained.digest(str(small.trained()))
    portable.write(classifier.load(path), path, "timm", str(tmp_path / "out"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "from random weights" in card and "drop_at" not in card  # it has the default


def test_a_run_that_is_said_to_be_of_another_network_is_named(tmp_path):
    path = shutil.copytree(small.trained(), tmp_path / "run")
    config = json.loads((path / "config.json").read_text())
    config["model"]["growth_rate"] += 1
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"^{path}: the weights do not fit the network: "):
        store.load(str(path))


# A network without BatchNorm, whose layers have names of their own.


class Patches(nn.Module):
    num_classes: int
    width: int = 4
    dtype: Any = jnp.float32

    def check(self):
        pass

    @nn.compact
    def __call__(self, image, train=False, keys=None):
        x = nn.Conv(self.width, (2, 2), 2, name="patches")(image).mean((1, 2))
        return nn.Dense(self.num_classes, name="classifier")(x), {"pooled": x}


def test_a_network_without_batch_norm(tmp_path, monkeypatch):
    monkeypatch.setitem(models.FAMILIES, "patches", Patches)
    monkeypatch.setitem(models.MODELS, "patches", {"family": "patches"})
    config = small.tiny(train__epochs=1)
    config.model = models.fields("patches")
    run, folder = str(tmp_path / "run"), str(tmp_path / "folder")
    assert loop.run(config, run, "train") == 0
    of_run = classifier.load(run)
    assert len(of_run.class_names) == 10 and len(of_run.serialised(("cpu",))) > 1000

    description, variables = store.load(run)
    assert list(variables) == ["params"] and variables["params"].keys() == {"patches", "classifier"}
    assert (description["num_classes"], description["image_channels"]) == (10, 1)
    facts = {"image_shape": [8, 8, 1], "mean": [4.0], "std": [6.0]}
    store.save(folder, description | facts, variables | {"batch_stats": {}})
    small.assert_same_bits(store.load(folder)[1], variables)
    assert len(store.digest(run)) == len(store.digest(folder)) == 64
    config.train.weights = folder
    state = small.build(config).start()
    small.assert_same_bits(state.params, variables["params"])
    assert not state.batch_stats

    images = np.random.default_rng(0).integers(0, 17, (3, 8, 8, 1)).astype(np.uint8)
    expected, _ = Patches(10).apply(variables, (images - np.float32(4)) / np.float32(6))
    opened = classifier.load(folder)
    np.testing.assert_allclose(opened.logits(opened.variables, images), expected, atol=1e-5)
    assert len(classifier.load(run).class_names) == 10
    assert len(opened.serialised(("cpu",))) > 1000
    network, _ = classifier.network(run)
    with pytest.raises(UserError, match="Patches: its layers read only one source"):
        reuse.heat_maps(network, variables["params"])
    rows = counts.layers(network, (8, 8, 1))
    assert [(row.name, row.parameters) for row in rows] == [("patches", 20), ("classifier", 50)]
    norms = gradients.kernel_norms(network, jnp.asarray(images, jnp.float32), jnp.arange(3))
    assert list(norms) == ["patches", "classifier"] and min(norms.values()) > 0
    config.train.weights = ""
    report = compiled.report(config, "cpu:4")
    assert (report["parameter_bytes"], report["statistics_bytes"]) == (4 * 70, 0)
    assert "BatchNorm" in compiled.table(report)
    with pytest.raises(UserError, match="the weights have none of the known names"):
        pretrained.from_torch(network, {"patches.weight": np.ones((4, 1, 2, 2), "f")})
