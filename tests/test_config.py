"""Every key is checked, is used, and every mistake names the key and the value."""

import ast
import importlib
import pathlib
import re
import sys

import pytest
from ml_collections import config_dict

import densejax
from densejax import command_line, data, main, models, parallel
from densejax import config as schema
from densejax.config import UserError, parse_arg
from tests import photos, runs

KEYS = schema.flatten(schema.default())
OUT_OF_RANGE = {
    "name": ["", "a/b"],
    "seed": [-1, 2**32],
    "data.name": [""],
    "data.storage": ["disk"],
    "data.workers": [-1],
    "data.corrupt_images": ["ignore"],
    "data.validation_size": [-1],
    "data.train_size": [-1],
    "data.normalization": ["none"],
    "data.image_size": [-1],
    "augmentation.shift": [-1],
    "augmentation.crop_area": [0.0, 1.1, float("nan")],
    "augmentation.jitter": [-0.1, 1.0, float("nan")],
    "augmentation.lighting": [-0.1, float("nan")],
    "train.epochs": [0, -1],
    "train.batch_size": [0, -64],
    "train.accumulate_steps": [0, -1],
    "train.label_smoothing": [-0.1, 1.0, float("nan")],
    "train.dtype": ["float16", "int8"],
    "optimizer.learning_rate": [0.0, -0.1, float("nan")],
    "optimizer.reference_batch_size": [-1],
    "optimizer.momentum": [-0.1, 1.0],
    "optimizer.weight_decay": [-1e-4, float("nan")],
    "optimizer.drop_at": [(0.0, 0.5), (0.5, 1.0), (0.75, 0.5)],
    "optimizer.drop_factor": [0.0, 1.1],
    "optimizer.warmup_epochs": [-1.0, float("nan")],
    "evaluate.every_epochs": [-1],
    "evaluate.split": ["train"],
    "evaluate.final_split": ["extra"],
    "evaluate.train_images": [-1],
    "evaluate.resize_size": [0],
    "evaluate.crop_size": [-1],
    "evaluate.batch_size": [0],
    "checkpoint.every_epochs": [0],
    "checkpoint.keep_latest": [0],
    "checkpoint.select": ["first"],
    "parallel.mode": ["jit"],
    "parallel.batch_norm": ["none"],
    "parallel.batch_norm_group_size": [-1],
    "log.every_steps": [0],
    "log.seconds": [0.0, -1.0],
    "profile.steps": [(3,), (0, 3), (4, 3), (1.0, 2), (1, 2, 3)],
}
CHECKED_ELSEWHERE = {
    "data.directory",
    "data.manual_dir",
    "data.train_split",
    "augmentation.flip",
    "optimizer.nesterov",
    "optimizer.decay_all",
    "optimizer.schedule",
    "train.weights",
}


def with_value(key, value):
    """The tiny configuration, whatever the type of the value."""
    config = runs.tiny()
    section = config
    *sections, name = key.split(".")
    for part in sections:
        section = section[part]
    del section[name]  # assigned, a value would be converted to the type that was there
    section[name] = value
    return config


def message(config):
    with pytest.raises(UserError) as caught:
        schema.check(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_defaults_and_the_tiny_configuration_pass():
    schema.check(runs.tiny())


def test_every_key_has_a_range_or_is_checked_elsewhere():
    assert set(OUT_OF_RANGE) | CHECKED_ELSEWHERE == set(KEYS)
    assert not set(OUT_OF_RANGE) & CHECKED_ELSEWHERE


@pytest.mark.parametrize("key", KEYS)
def test_another_type_is_refused(key):
    kind = type(KEYS[key])
    for wrong in (None, [], "text", 1, 1.5, True, b"bytes"):
        if type(wrong) is not kind and not (kind is float and type(wrong) is int):
            text = message(with_value(key, wrong))
            assert text == f"{key} = {wrong!r}: give a value of type {kind.__name__}"


@pytest.mark.parametrize(("key", "value"), [(k, v) for k in OUT_OF_RANGE for v in OUT_OF_RANGE[k]])
def test_a_value_out_of_range_is_refused(key, value):
    assert message(with_value(key, value)).startswith(f"{key} = {value!r}: allowed is ")


@pytest.mark.parametrize("key", [key for key in KEYS if isinstance(KEYS[key], float)])
def test_an_integer_is_a_number_too(key):
    is_fraction = key in ("train.label_smoothing", "optimizer.momentum", "augmentation.jitter")
    config = with_value(key, 0 if is_fraction else 1)
    config.optimizer.nesterov = False
    if key == "augmentation.crop_area":
        config.data.storage, config.data.image_size, config.augmentation.shift = "stream", 224, 0
    schema.check(config)


def test_drops_that_are_no_numbers_are_refused():
    assert "optimizer.drop_at" in message(with_value("optimizer.drop_at", (0.5, "x")))


def test_groups_of_devices_go_with_their_size_and_with_shard_map():
    for changes in ({"batch_norm": "groups"}, {"batch_norm_group_size": 2}):
        config = runs.tiny(**{f"parallel__{key}": value for key, value in changes.items()})
        assert "parallel.batch_norm_group_size" in message(config)
    groups = {"parallel__batch_norm": "groups", "parallel__batch_norm_group_size": 2}
    schema.check(runs.tiny(**groups))
    text = message(runs.tiny(parallel__mode="pmap", **groups))
    assert text.startswith("parallel.mode = 'pmap'") and "'shard_map'" in text


def test_two_drops_at_the_same_place_are_refused():
    assert "optimizer.drop_at" in message(with_value("optimizer.drop_at", (0.5, 0.5)))


def test_an_unknown_key_lists_its_section():
    config = runs.tiny()
    config.train.epoch = 3
    assert message(config).startswith(
        "unknown key train.epoch; allowed here are train.accumulate_steps, "
    )
    config = runs.tiny()
    config.colour = 3
    assert message(config).startswith("unknown key colour; ")


@pytest.mark.parametrize("key", KEYS)
def test_a_missing_key_is_named(key):
    config = runs.tiny()
    section, _, name = key.rpartition(".")
    del (config[section] if section else config)[name]
    assert message(config).startswith(f"missing key {key}; ")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"evaluate__split": "validation"}, "evaluate.split = 'validation'"),
        ({"evaluate__final_split": "validation"}, "evaluate.final_split = 'validation'"),
        ({"checkpoint__select": "best"}, "checkpoint.select = 'best'"),
    ],
)
def test_validation_needs_held_out_images(changes, says):
    assert message(runs.tiny(**changes)) == f"{says}: set data.validation_size above 0"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"optimizer__drop_at": (0.3,)}, "optimizer.drop_at = (0.3,): only"),
        ({"optimizer__drop_factor": 0.5}, "optimizer.drop_factor = 0.5: only"),
    ],
)
def test_drops_belong_to_the_step_schedule(changes, says):
    schema.check(runs.tiny(**changes))
    assert message(runs.tiny(optimizer__schedule="cosine", **changes)).startswith(says)


STREAM = {
    "data__storage": "stream",
    "data__image_size": 224,
    "augmentation__shift": 0,
}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.workers", 2),
        ("data.corrupt_images", "skip"),
        ("augmentation.crop_area", 0.5),
        ("evaluate.resize_size", 232),
    ],
)
def test_some_keys_belong_to_streams(key, value):
    change = {key.replace(".", "__"): value}
    schema.check(runs.tiny(**STREAM, **change))
    says = f"{key} = {value!r}: only data.storage = 'stream' reads it"
    assert message(runs.tiny(**change)) == says


def test_streams_measure_no_training_images():
    schema.check(runs.tiny(evaluate__train_images=100))
    says = "evaluate.train_images = 100: only data.storage = 'memory' reads it"
    assert message(runs.tiny(**STREAM, evaluate__train_images=100)) == says


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"augmentation__shift": 4}, "augmentation.shift: set it to 0"),
        ({"data__image_size": 0}, "data.image_size = 0: data.storage = 'stream' needs a size"),
        ({"data__image_size": 257}, "data.image_size = 257: must be at most evaluate.resize_size"),
        ({"evaluate__crop_size": 257}, "evaluate.crop_size = 257: must be at most evaluate.resize"),
    ],
)
def test_a_stream_needs_sizes_that_fit(change, says):
    assert message(runs.tiny(**STREAM | change)).startswith(says)


def test_nesterov_needs_momentum():
    assert "nesterov = True" in message(runs.tiny(optimizer__momentum=0.0))


@pytest.mark.parametrize(
    "changes", [{}, {"evaluate__split": "validation", "evaluate__every_epochs": 0}]
)
def test_the_best_model_is_never_chosen_on_test_images(changes):
    config = runs.tiny(data__validation_size=100, checkpoint__select="best", **changes)
    assert "test images never choose a model" in message(config)
    config.evaluate.split, config.evaluate.every_epochs = "validation", 2
    schema.check(config)


# --- The part of --config after the colon.


def test_arguments_take_the_types_of_their_defaults():
    defaults = {"depth": 100, "rate": 0.5, "augment": True, "variant": "bc", "width": None}
    assert parse_arg(None, **defaults).to_dict() == defaults
    assert parse_arg("", **defaults).to_dict() == defaults
    given = parse_arg("depth=40,rate=2,augment=False,variant=plain,width=16", **defaults)
    assert given.to_dict() == {
        "depth": 40,
        "rate": 2,
        "augment": False,
        "variant": "plain",
        "width": 16,
    }
    assert parse_arg("width=wide", **defaults).width == "wide"


@pytest.mark.parametrize(
    ("arg", "says"),
    [
        ("dept=40", "'dept=40': give key=value pairs of depth=100, augment=True"),
        ("depth", "'depth': give key=value pairs"),
        ("depth=40,40", "'40': give key=value"),
        ("depth=deep", "depth = deep: give a"),
        ("depth=4.5", "depth = 4.5: give a"),
        ("depth=True", "depth = True: give a"),
        ("depth=", "depth = : give a"),
        ("augment=1", "augment = 1: give a"),
        ("augment=no", "augment = no: give a"),
    ],
)
def test_arguments_that_a_card_does_not_read_are_refused(arg, says):
    with pytest.raises(UserError, match=f"^config argument {re.escape(says)}"):
        parse_arg(arg, depth=100, augment=True)


# --- Every key is read by somebody.


def record_reads(monkeypatch):
    """The keys that code of the package reads as attributes, outside of densejax/config.py."""
    folder = pathlib.Path(densejax.__file__).parent
    sections = {
        section: frozenset(name.rpartition(".")[2] for name in KEYS if name.startswith(section))
        for section in {key.rpartition(".")[0] + "." for key in KEYS if "." in key}
    }
    reads, plain = set(), config_dict.ConfigDict.__getattr__

    def getattr_(self, name):
        caller = pathlib.Path(sys._getframe(1).f_code.co_filename)
        if folder in caller.parents and caller.name != "config.py":
            here = {str(key) for key in self.keys()}
            prefix = [s for s, names in sections.items() if names == here] or [""]
            reads.add(prefix[0] + name)
        return plain(self, name)

    monkeypatch.setattr(config_dict.ConfigDict, "__getattr__", getattr_)
    return reads


def test_every_key_is_read(monkeypatch, tmp_path):
    reads = record_reads(monkeypatch)
    config = runs.tiny(data__validation_size=77, evaluate__split="validation")
    monkeypatch.setattr(command_line, "CONFIG", type("", (), {"value": config}))
    monkeypatch.setattr(main, "WORKDIR", type("", (), {"value": None}))
    monkeypatch.setattr(main, "MODE", type("", (), {"value": "train"}))
    monkeypatch.setattr(main, "RESUME", type("", (), {"value": "same"}))
    for name in ("COORDINATOR", "PROCESSES", "PROCESS"):
        monkeypatch.setattr(main, name, type("", (), {"value": None}))
    monkeypatch.chdir(tmp_path)
    assert main.main() == 0
    assert sorted(path.name[:5] for path in (tmp_path / "runs").iterdir()) == ["tiny-"]
    streamed = {"augmentation.crop_area", "evaluate.resize_size"}
    streamed |= {"data.corrupt_images", "data.workers"}
    assert set(KEYS) - reads == streamed
    photos.make(tmp_path / "photos")
    config = runs.tiny(**STREAM, data__manual_dir="photos", train__batch_size=4)
    data.create(
        config, *[split(parallel.mesh()) for split in (parallel.replicated, parallel.split)]
    )
    assert set(KEYS) <= reads


def test_the_recorder_would_notice_a_key_that_nobody_reads(monkeypatch):
    reads = record_reads(monkeypatch)
    runs.build(runs.tiny())
    assert "train.batch_size" in reads and "log.every_steps" in reads
    assert "log.seconds" not in reads and "checkpoint.keep_latest" not in reads


def test_every_field_of_a_network_is_read_by_its_module():
    for family, module in models.FAMILIES.items():
        tree = ast.parse(
            pathlib.Path(importlib.import_module(module.__module__).__file__).read_text()
        )
        read = {
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "self"
        }
        name = next(name for name in models.MODELS if models.MODELS[name]["family"] == family)
        assert set(models.fields(name)) - {"family"} <= read
