"""Every key is checked, is used, and every mistake names the key and the value."""

import functools
import itertools
import math
import pathlib
import re
import sys

import hypothesis
import hypothesis.strategies as st
import jax
import pytest
from ml_collections import config_dict

import densejax
from densejax import command_line, data, main, models
from densejax import config as schema
from densejax.config import UserError, parse_arg
from densejax.training import experiment, optimizer, parallel
from tests import photos, small
from tests.test_golden import NETWORKS

KEYS = schema.flatten(schema.default())
OUT_OF_RANGE = {
    "name": ["", "a/b", "a\nb", "a\0b", "n" * 101],
    "seed": [-1, 2**32],
    "data.name": [""],
    "data.storage": ["disk"],
    "data.memory_gigabytes": [-1.0],
    "data.test_share": [0.0, 1.0, float("nan")],
    "data.channels": [0, 2, 4],
    "data.mean": [(-1.0,), (256.0,), ("a",), (float("nan"),), ((1.0,),)],
    "data.std": [(0.0,), (0.226, 0.229, 0.225), (256.0,), (None,)],
    "data.directory": [""],
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
    "augmentation.policy": ["autoaugment"],
    "augmentation.operations": [0, 15],
    "augmentation.magnitude": [-0.1, 10.1, float("nan")],
    "augmentation.cutout": [-1, 15],
    "augmentation.erasing": [-0.1, 1.1, float("nan")],
    "augmentation.erasing_area": [(), (0.1,), (0.4, 0.02), (0.1, 0.2, 0.3), (0.0, 0.5)],
    "augmentation.mixup": [-0.1, float("nan")],
    "augmentation.cutmix": [-0.1, float("nan")],
    "train.epochs": [0, -1],
    "train.max_steps": [-1],
    "train.batch_size": [0, -64],
    "train.accumulate_steps": [0, -1],
    "train.average_decay": [-0.1, 1.0],
    "train.class_weights": ["equal"],
    "train.label_smoothing": [-0.1, 1.0, float("nan")],
    "train.frozen": [(1,), ("stem", None)],
    "train.head_epochs": [-1],
    "train.patience": [-1],
    "train.max_skipped_steps": [0],
    "train.dtype": ["float16", "int8"],
    "train.matmul_precision": ["float16", "highest"],
    "optimizer.learning_rate": [0.0, -0.1, float("nan")],
    "optimizer.reference_batch_size": [-1],
    "optimizer.momentum": [-0.1, 1.0],
    "optimizer.weight_decay": [-1e-4, float("nan")],
    "optimizer.drop_at": [(0.0, 0.5), (0.5, 1.0), (0.75, 0.5), (0.5, 0.5), (0.5, "x")],
    "optimizer.beta2": [-0.1, 1.0],
    "optimizer.epsilon": [0.0, -1e-8],
    "optimizer.clip_norm": [-1.0],
    "optimizer.rates": [("stem",), (("stem",),), (("stem", -1.0),), ((1, 0.1),)],
    "optimizer.drop_factor": [0.0, 1.1],
    "optimizer.warmup_epochs": [-1.0, float("nan")],
    "evaluate.every_epochs": [-1],
    "evaluate.split": ["train"],
    "evaluate.final_split": ["extra"],
    "evaluate.train_images": [-1],
    "evaluate.resize_size": [-1],
    "evaluate.crop_size": [-1],
    "evaluate.shift": [-1, 100],
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
NUMBERS = [key for key in KEYS if type(KEYS[key]) in (int, float)]
CHECKED_ELSEWHERE = {  # and why
    "data.manual_dir": "read where a set is prepared, and a prepared set does not need it",
    "data.train_split": "data.train_size knows the set's splits",
    "augmentation.flip": "a switch",
    "augmentation.alternate_flip": "a switch",
    "evaluate.assess": "a switch",
    "evaluate.mirror": "a switch",
    "train.loss": "losses.create has the table of names",
    "optimizer.name": "optimizer.create has the table of names",
    "optimizer.nesterov": "a switch",
    "optimizer.decay_all": "a switch",
    "optimizer.schedule": "optimizer.schedule has the table of names",
    "train.weights": "pretrained.load opens the directory",
    "train.new_classifier": "a switch",
}


def with_value(key, value):
    """The tiny configuration, whatever the type of the value."""
    config = small.tiny()
    put(config, key, value)
    return config


def put(config, key, value):
    """Sets a key to a value of whatever type."""
    section, _, name = key.rpartition(".")
    section = config[section] if section else config
    del section[name]  # assigned, a value would be converted to the type that was there
    with section.ignore_type():
        section[name] = value


def message(config):
    with pytest.raises(UserError) as caught:
        schema.checked(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_defaults_and_the_tiny_configuration_pass():
    schema.checked(small.tiny())


@pytest.mark.parametrize(("size", "resize"), [(224, 256), (64, 73), (192, 219), (299, 342)])
def test_evaluation_resizes_in_the_usual_ratio_to_the_images_size(size, resize):
    config = small.tiny(**STREAM | {"data__image_size": size})
    completed = schema.checked(config)
    assert completed.evaluate.resize_size == resize
    assert schema.checked(completed) == completed  # when a run is opened again
    assert config.evaluate.resize_size == 0  # another data.image_size may follow
    config.evaluate.resize_size = 400
    assert schema.checked(config).evaluate.resize_size == 400


def test_runs_that_stored_the_resize_of_before_are_still_of_the_same_configuration():
    for changes in ({}, {"data__image_size": 14}, STREAM | {"data__image_size": 224}):
        stored = schema.checked(small.tiny(evaluate__resize_size=256, **changes))
        assert stored == schema.checked(small.tiny(**changes))


def test_every_key_has_a_range_or_is_checked_elsewhere():
    assert set(OUT_OF_RANGE) | set(CHECKED_ELSEWHERE) == set(KEYS)
    assert not set(OUT_OF_RANGE) & set(CHECKED_ELSEWHERE)


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


@pytest.mark.parametrize(
    "key",
    [
        key  # no integer is a share that leaves images to train on
        for key in KEYS
        if isinstance(KEYS[key], float) and key != "data.test_share"
    ],
)
def test_an_integer_is_a_number_too(key):
    fractions = (
        "train.average_decay",
        "train.label_smoothing",
        "optimizer.momentum",
        "optimizer.beta2",
    )
    config = with_value(key, 0 if key in (*fractions, "augmentation.jitter") else 1)
    config.optimizer.nesterov = False
    if key in ("optimizer.beta2", "optimizer.epsilon"):
        config.optimizer.name = "adamw"
    if key == "augmentation.magnitude":
        config.augmentation.policy = "randaugment"
    if key == "augmentation.crop_area":
        config.data.storage, config.data.image_size, config.augmentation.shift = "stream", 224, 0
    schema.checked(config)


@pytest.mark.parametrize("key", NUMBERS)
def test_every_number_is_finite_and_fits_the_devices(key):
    for value in (10**30, -(10**30)) if type(KEYS[key]) is int else (float("inf"), float("nan")):
        assert message(with_value(key, value)).startswith(f"{key} = {value!r}: allowed is ")


def test_an_unknown_key_lists_its_section():
    config = small.tiny()
    config.train.epoch = 3
    assert message(config).startswith(
        "unknown key train.epoch (did you mean train.epochs?); allowed are train.epochs, train.max"
    )
    config = small.tiny()
    config.colour = 3
    assert message(config).startswith("unknown key colour; allowed are augmentation, checkpoint, ")
    config = small.tiny()
    config.trian = {"epochs": 3}
    assert message(config).startswith(
        "unknown key trian.epochs (did you mean train.epochs?); allowed are augmentation, "
    )


@pytest.mark.parametrize("key", KEYS)
def test_a_missing_key_is_named(key):
    config = small.tiny()
    section, _, name = key.rpartition(".")
    del (config[section] if section else config)[name]
    assert message(config).startswith(f"missing key {key}; ")


# --- Keys that stand against each other.

STREAM = {"data__storage": "stream", "data__image_size": 224, "augmentation__shift": 0}
HELD_OUT = {"data__validation_size": 77}
BEST = HELD_OUT | {"checkpoint__select": "best"}
COSINE = {"optimizer__schedule": "cosine"}
GROUPS = {"parallel__batch_norm": "groups", "parallel__batch_norm_group_size": 2}
NOT_STREAMED = "only data.storage = 'stream' or 'auto' reads it"
AUTO = {"data__storage": "auto", "data__image_size": 224, "data__manual_dir": "somewhere"}
GIVEN = {"data__mean": (1.0,), "data__std": (2.0,)}
RANDAUGMENT = {"augmentation__policy": "randaugment"}
NO_OPERATIONS = "only augmentation.policy = 'randaugment' reads it"
NOT_CHOSEN = (
    "set evaluate.split = 'validation' and evaluate.every_epochs above 0; test images never choose "
    "a model"
)
CONFLICTS = [  # changes, the line, and a further change that settles it
    (
        COSINE | {"optimizer__drop_at": (0.3,)},
        "optimizer.drop_at = (0.3,): only optimizer.schedule = 'step' reads it",
        {"optimizer__schedule": "step"},
    ),
    (
        COSINE | {"optimizer__drop_factor": 0.5},
        "optimizer.drop_factor = 0.5: only optimizer.schedule = 'step' reads it",
        {"optimizer__schedule": "step"},
    ),
    ({"data__workers": 2}, f"data.workers = 2: {NOT_STREAMED}", STREAM),
    ({"data__corrupt_images": "skip"}, f"data.corrupt_images = 'skip': {NOT_STREAMED}", STREAM),
    ({"augmentation__crop_area": 0.5}, f"augmentation.crop_area = 0.5: {NOT_STREAMED}", STREAM),
    ({"data__test_share": 0.5}, f"data.test_share = 0.5: {NOT_STREAMED}", STREAM),
    ({"data__channels": 1}, f"data.channels = 1: {NOT_STREAMED}", STREAM),
    (
        {"data__memory_gigabytes": 2.0},
        "data.memory_gigabytes = 2.0: only data.storage = 'auto' reads it",
        AUTO,
    ),
    (
        AUTO | {"data__manual_dir": ""},
        "data.manual_dir = '': data.storage = 'auto' needs the folder with your images",
        AUTO,
    ),
    (
        {"data__mean": (1.0,)},
        "data.mean = (1.0,): give data.mean and data.std, or neither",
        GIVEN,
    ),
    (
        {"data__std": (2.0,)},
        "data.mean = (): give data.mean and data.std, or neither",
        GIVEN,
    ),
    (
        GIVEN | {"data__normalization": "scale"},
        "data.mean = (1.0,): only data.normalization = 'statistics' reads it",
        {"data__normalization": "statistics"},
    ),
    (
        {"data__std": (2.0,), "data__normalization": "scale"},
        "data.std = (2.0,): only data.normalization = 'statistics' reads it",
        GIVEN | {"data__normalization": "statistics"},
    ),
    ({"evaluate__resize_size": 232}, f"evaluate.resize_size = 232: {NOT_STREAMED}", STREAM),
    (
        {"augmentation__alternate_flip": True, "augmentation__flip": False},
        "augmentation.alternate_flip = True: only augmentation.flip = True reads it",
        {"augmentation__flip": True},
    ),
    ({"augmentation__operations": 3}, f"augmentation.operations = 3: {NO_OPERATIONS}", RANDAUGMENT),
    (
        {"augmentation__magnitude": 5.0},
        f"augmentation.magnitude = 5.0: {NO_OPERATIONS}",
        RANDAUGMENT,
    ),
    (
        {"augmentation__erasing_area": (0.1, 0.2)},
        "augmentation.erasing_area = (0.1, 0.2): only augmentation.erasing above 0 reads it",
        {"augmentation__erasing": 0.25},
    ),
    (
        {"evaluate__mirror": True, "evaluate__crop_size": 6},
        "evaluate.mirror = True: only evaluate.crop_size = 0 reads it",
        {"evaluate__crop_size": 0},
    ),
    (
        {"evaluate__shift": 1, "evaluate__crop_size": 6},
        "evaluate.shift = 1: only evaluate.crop_size = 0 reads it",
        {"evaluate__crop_size": 0},
    ),
    (
        STREAM | {"evaluate__train_images": 100},
        "evaluate.train_images = 100: only data.storage = 'memory' reads it",
        {"data__storage": "memory"},
    ),
    (
        STREAM | {"augmentation__shift": 4},
        "augmentation.shift = 4: set it to 0, data.storage = 'stream' crops otherwise",
        {"augmentation__shift": 0},
    ),
    (
        STREAM | {"data__image_size": 0},
        "data.image_size = 0: data.storage = 'stream' or 'auto' needs a size, such as 224",
        {"data__image_size": 256},
    ),
    (
        STREAM | {"data__image_size": 257, "evaluate__resize_size": 256},
        "data.image_size = 257: must be at most evaluate.resize_size = 256",
        {"evaluate__resize_size": 257},
    ),
    (
        STREAM | {"evaluate__crop_size": 257},
        "evaluate.crop_size = 257: must be at most evaluate.resize_size = 256",
        {"evaluate__crop_size": 256},
    ),
    (
        {"data__normalization": "weights"},
        "data.normalization = 'weights': needs train.weights; set 'statistics' or 'scale'",
        {"train__weights": "somewhere"},
    ),
    (
        {"optimizer__momentum": 0.0},
        "optimizer.nesterov = True: set it to False, or optimizer.momentum above 0",
        {"optimizer__nesterov": False},
    ),
    (
        {"parallel__batch_norm": "groups"},
        "parallel.batch_norm_group_size = 0: parallel.batch_norm = 'groups', and no other, reads "
        "it and needs it above 0",
        GROUPS,
    ),
    (
        {"parallel__batch_norm_group_size": 2},
        "parallel.batch_norm_group_size = 2: parallel.batch_norm = 'groups', and no other, reads "
        "it and needs it above 0",
        GROUPS,
    ),
    (
        GROUPS | {"parallel__mode": "pmap"},
        "parallel.mode = 'pmap': has no groups of devices; with parallel.batch_norm = 'groups' "
        "set 'shard_map'",
        {"parallel__mode": "shard_map"},
    ),
    (
        {"optimizer__beta2": 0.95},
        "optimizer.beta2 = 0.95: only optimizer.name = 'adamw' reads it",
        {"optimizer__name": "adamw"},
    ),
    (
        {"optimizer__epsilon": 1e-6},
        "optimizer.epsilon = 1e-06: only optimizer.name = 'adamw' reads it",
        {"optimizer__name": "adamw"},
    ),
    (
        {"evaluate__split": "validation"},
        "evaluate.split = 'validation': set data.validation_size above 0",
        HELD_OUT,
    ),
    (
        {"evaluate__final_split": "validation"},
        "evaluate.final_split = 'validation': set data.validation_size above 0",
        HELD_OUT,
    ),
    (
        {"checkpoint__select": "best"},
        "checkpoint.select = 'best': set data.validation_size above 0",
        HELD_OUT | {"evaluate__split": "validation"},
    ),
    (BEST, f"checkpoint.select = 'best': {NOT_CHOSEN}", {"evaluate__split": "validation"}),
    (
        BEST | {"evaluate__split": "validation", "evaluate__every_epochs": 0},
        f"checkpoint.select = 'best': {NOT_CHOSEN}",
        {"evaluate__every_epochs": 2},
    ),
    (
        HELD_OUT | {"train__patience": 3},
        f"train.patience = 3: {NOT_CHOSEN}",
        {"evaluate__split": "validation"},
    ),
    (
        {"train__head_epochs": 1, "train__frozen": ("stem", "head")},
        "train.head_epochs = 1: the head is in train.frozen, and would not learn",
        {"train__frozen": ("stem",)},
    ),
    (
        {"train__head_epochs": 3},
        "train.head_epochs = 3: must be at most train.epochs = 2",
        {"train__head_epochs": 2},
    ),
    (
        {"train__dtype": "bfloat16", "train__matmul_precision": "bfloat16"},
        "train.matmul_precision = 'bfloat16': only train.dtype = 'float32' reads it",
        {"train__dtype": "float32"},
    ),
    (
        {"train__new_classifier": True},
        "train.new_classifier = True: only a run with train.weights reads it",
        {"train__weights": "somewhere"},
    ),
    (
        STREAM | {"train__class_weights": "balanced"},
        "train.class_weights = 'balanced': only a set in memory, or a folder, reads it",
        {"data__manual_dir": "photographs"},
    ),
]


@pytest.mark.parametrize(("changes", "says", "settled"), CONFLICTS)
def test_a_conflict_is_found_and_can_be_settled(changes, says, settled):
    assert message(small.tiny(**changes)) == says
    schema.checked(small.tiny(**changes | settled))


def test_one_conflict_does_not_hide_another():
    keys = tuple(line.partition(" = ")[0] for _, line, _ in CONFLICTS)
    for pair in itertools.combinations(CONFLICTS, 2):
        both = pair[0][0] | pair[1][0]
        stands = [
            changes.items() <= both.items() and not settled.items() <= both.items()
            for changes, _, settled in pair
        ]
        if any(stands):
            assert message(small.tiny(**both)).startswith(keys)


def test_every_conflict_has_its_example():
    lines = [line for _, line, _ in CONFLICTS]
    config = schema.checked(small.tiny())
    for key, _, remedy in schema._conflicts(config, set()):
        assert any(line.startswith(f"{key} = ") and line.endswith(remedy) for line in lines), key


# --- Whatever a key is given.

ODD_NUMBERS = st.one_of(
    st.integers(), st.floats(), st.sampled_from([-1, 0, 1, 2**31 - 1, 2**31, 2**32, 10**30])
)
WORDS = st.one_of(
    st.text(max_size=10),
    st.sampled_from(["stream", "groups", "best", "validation", "cosine", "train+train", "../x"]),
)
ANYTHING = st.recursive(
    st.one_of(st.none(), st.booleans(), st.binary(max_size=3), ODD_NUMBERS, WORDS),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.sampled_from(["a", "1", " "]), inner, max_size=2),
    ),
    max_leaves=4,
)
FIELDS = [f"model.{name}" for name in small.tiny().model]


@hypothesis.settings(max_examples=200)
@hypothesis.given(
    st.dictionaries(st.sampled_from([*KEYS, *FIELDS]), ANYTHING, min_size=1, max_size=3)
)
def test_any_values_are_a_run_or_one_line_that_names_a_key(changes):
    config = small.tiny()
    for key, value in changes.items():
        put(config, key, value)
    try:
        steps = experiment.build(config).steps
    except UserError as error:
        line = str(error)
        assert line.isprintable() and line.startswith(tuple(named(changes))), line
        return
    assert 0 < steps < 2**31
    for key, value in changes.items():  # what was taken is of the type, finite and not emptied
        kind = type(KEYS.get(key)) if key in KEYS else type(value)
        assert type(value) is kind or (kind is float and type(value) is int), (key, value)
        assert not isinstance(value, float) or math.isfinite(value), (key, value)


def named(changes):
    """How a line may start: with a key that was changed, or one that it stands against."""
    against = {line.partition(" = ")[0] for _, line, _ in CONFLICTS}
    against |= {"model.", "train.batch_size", "data.", "optimizer.", "augmentation."}
    return {*changes, *(f"unknown key {key}" for key in changes), "missing key", *against}


@hypothesis.given(st.one_of(st.text(), st.from_regex(r"(depth|augment|width)=.{0,9}(,.*)?")))
def test_any_argument_is_read_or_refused_in_one_line(text):
    defaults = {"depth": 100, "augment": True, "rate": 0.5, "width": None}
    try:
        given = parse_arg(text, **defaults)
    except UserError as error:
        assert str(error).isprintable() and str(error).startswith("config argument ")
    else:
        assert set(given) == set(defaults) and type(given.depth) is int
        assert type(given.augment) is bool and type(given.rate) in (int, float)
        assert type(given.width) in (type(None), int, float, str)


# --- The part of --config after the colon.


def test_arguments_take_the_types_of_their_defaults():
    defaults = {"depth": 100, "rate": 0.5, "augment": True, "variant": "bc", "width": None}
    assert parse_arg(None, **defaults).to_dict() == defaults
    assert parse_arg("", **defaults).to_dict() == defaults
    given = parse_arg("depth=40,rate=2,augment=False,variant=plain,width=16", **defaults)
    changed = {"depth": 40, "rate": 2, "augment": False, "variant": "plain", "width": 16}
    assert given.to_dict() == changed
    assert parse_arg("width=wide", **defaults).width == "wide"


@pytest.mark.parametrize(
    ("arg", "says"),
    [
        ("dept=40", "'dept=40' (did you mean depth?): give key=value pairs of depth=100, augm"),
        ("depth", "'depth': give key=value pairs"),
        ("depth=40,40", "'40': give key=value"),
        ("depth=40,depth=46", "'depth=46': give key=value pairs of depth=100, augment=True, each"),
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
    config = small.tiny(data__validation_size=77, evaluate__split="validation")
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
    streamed |= {"data.corrupt_images", "data.workers", "data.channels", "data.std"}
    streamed |= {"data.memory_gigabytes", "data.test_share"}
    optimizer.create(small.tiny(optimizer__name="adamw").optimizer, 0.1)
    _ = experiment.build(small.tiny(train__weights=str(small.trained()))).weights
    assert set(KEYS) - reads == streamed
    photos.make(tmp_path / "photos")
    config = small.tiny(**AUTO | {"data__manual_dir": "photos", "data__memory_gigabytes": 0.0})
    config.data.update(mean=(1.0, 2.0, 3.0), std=(4.0, 5.0, 6.0))
    config.train.batch_size = 4
    data.create(
        config, *[split(parallel.mesh()) for split in (parallel.replicated, parallel.split)]
    )
    assert set(KEYS) <= reads


def test_the_recorder_would_notice_a_key_that_nobody_reads(monkeypatch):
    reads = record_reads(monkeypatch)
    small.build(small.tiny())
    assert "train.batch_size" in reads and "log.every_steps" in reads
    assert "log.seconds" not in reads and "checkpoint.keep_latest" not in reads


@pytest.mark.parametrize("family", models.FAMILIES)
def test_every_field_of_a_network_is_read_by_its_module(family, monkeypatch):
    fields = next(made for make in NETWORKS.values() if (made := make()).family == family)
    model = models.create(fields, 10)
    folder, reads = pathlib.Path(models.__file__).parent, set()

    def getattribute(self, field):
        if folder in pathlib.Path(sys._getframe(1).f_code.co_filename).parents:
            reads.add(field)
        return object.__getattribute__(self, field)

    monkeypatch.setattr(type(model), "__getattribute__", getattribute)
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), "float32")
    init = functools.partial(model.init, train=True, keys=jax.random.split(jax.random.key(1), 1))
    jax.eval_shape(init, jax.random.key(0), image)
    assert set(fields) - {"family"} <= reads
