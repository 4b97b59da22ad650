"""The configuration: one schema with every key, its default, its unit and its check."""

import ast
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import config_dict


class UserError(ValueError):
    """Bad input, said in one line: the field, the value, what is allowed and what to do."""

    def __init__(self, text: str):
        """Escapes what would break the line or steer a terminal: names come from files, too."""
        super().__init__(printable(text))


def printable(text: str) -> str:
    """Escapes what would break a line or steer a terminal, in a name that comes from a file."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def default() -> config_dict.ConfigDict:
    """Every key with its default; `config.model` is filled by `densejax.models.fields(name)`."""
    config = config_dict.ConfigDict()
    config.name = ""  # the card's name; the default run directory is called after it
    config.seed = 0  # of the parameters, the order of examples, augmentation and dropout
    config.model = config_dict.ConfigDict()  # a network family and its fields

    config.data = data = config_dict.ConfigDict()
    data.name = ""  # a set in densejax.data.builders.SETS, or any set prepared by TFDS
    data.storage = "memory"  # the whole set on every device; "stream": decoded as it is needed
    data.directory = "~/.cache/densejax/data"  # where sets are prepared, once
    data.manual_dir = ""  # folder with the original files, "" downloads them; "stream": a folder
    # with train/class/image.jpg and val/class/image.jpg, "" reads what TFDS has prepared
    data.workers = 0  # "stream": processes that decode on each host; 0: none, the run itself does
    data.corrupt_images = "fail"  # "stream": or "skip": trains on the next one, never tests
    data.train_split = "train"  # e.g. "train+extra" for SVHN
    data.validation_size = 0  # training images held out, drawn once whatever the seed
    data.train_size = 0  # images that train: the first of an order drawn once whatever the seed,
    # classes as they fall, so that a larger set holds every smaller one; 0: all
    data.normalization = "statistics"  # the set's mean and std; "scale": / 255;
    # "weights": mean and std of the images that `train.weights` were trained on
    data.image_size = 0  # pixels, height and width that images are resized to; 0: as stored

    config.augmentation = augmentation = config_dict.ConfigDict()
    augmentation.shift = 4  # pixels of zero padding before the random crop; 0: no shift
    augmentation.flip = True  # mirror half of the images
    augmentation.crop_area = 0.08  # "stream": the random crop's least share of the image's area
    augmentation.jitter = 0.0  # brightness, contrast, saturation change by up to this factor
    augmentation.lighting = 0.0  # standard deviation along the principal colours of ImageNet

    config.train = train = config_dict.ConfigDict()
    train.epochs = 300
    train.batch_size = 64  # images per step over all devices; a multiple of their number
    train.accumulate_steps = 1  # parts of each device's share that are computed one after another
    train.max_skipped_steps = 10  # in a row, skipped as they were not finite, that end the run
    train.loss = "cross_entropy"  # a name in densejax.training.losses.LOSSES
    train.label_smoothing = 0.0  # probability mass spread evenly over all classes
    train.weights = ""  # a directory of densejax.pretrained or of a run to start from; "": drawn
    train.dtype = "float32"  # of the computation; parameters and statistics stay float32

    config.optimizer = optimizer = config_dict.ConfigDict()
    optimizer.name = "sgd"  # a name in densejax.training.optimizer.OPTIMIZERS
    optimizer.learning_rate = 0.1  # the peak
    optimizer.reference_batch_size = 0  # above 0: the peak is times train.batch_size / this
    optimizer.momentum = 0.9
    optimizer.nesterov = True  # without dampening
    optimizer.weight_decay = 1e-4
    optimizer.decay_all = True  # as the paper; False: kernels only, no biases and no norms
    optimizer.schedule = "step"  # a name in densejax.training.optimizer.SCHEDULES
    optimizer.drop_at = (0.5, 0.75)  # "step": fractions of training after which the rate drops
    optimizer.drop_factor = 0.1  # "step": what each drop multiplies the rate by
    optimizer.warmup_epochs = 0.0  # the rate rises linearly from zero

    config.evaluate = evaluate = config_dict.ConfigDict()
    evaluate.every_epochs = 1  # 0: only at the end
    evaluate.split = "test"  # read during training; "validation" where images are held out
    evaluate.final_split = "test"  # what the run's result is measured on; "validation" to tune
    evaluate.train_images = 0  # training images, not augmented, that are measured at the end too
    evaluate.resize_size = 0  # "stream": pixels, the shorter side before the middle is taken; 0:
    # 256/224 of data.image_size, as is usual
    evaluate.crop_size = 0  # pixels; above 0: the logits' mean over ten crops of this size
    evaluate.batch_size = 512  # images per step over all devices; a multiple of their number

    config.checkpoint = checkpoint = config_dict.ConfigDict()
    checkpoint.every_epochs = 1  # and at the last step
    checkpoint.keep_latest = 2
    checkpoint.select = "last"  # the model of the result: "last", or "best" on held-out images

    config.parallel = parallel = config_dict.ConfigDict()
    parallel.mode = "shard_map"  # or "pmap"; the numbers are the same
    parallel.batch_norm = "global"  # statistics over the whole batch; "replica": each device's
    parallel.batch_norm_group_size = 0  # devices; "groups": each group of so many devices' own

    config.log = log = config_dict.ConfigDict()
    log.every_steps = 50  # between records in metrics.jsonl
    log.seconds = 10.0  # between lines on the screen where it is no terminal

    config.profile = profile = config_dict.ConfigDict()
    profile.steps = ()  # (first, last) to trace on process 0, such as (10, 15); (): none
    return config


# key: (test, what is allowed). A type that differs from the default's is reported before this.
# Counts are int32 on the devices; no bound lets infinity or what is not a number through.
_POSITIVE = (lambda value: 0 < value < 2**31, "a number above 0 and below 2**31")
_NOT_NEGATIVE = (lambda value: 0 <= value < 2**31, "0 or more, and below 2**31")
_FRACTION = (lambda value: 0 <= value < 1, "a number in [0, 1)")


def _one_of(*names: str):
    return lambda value: value in names, " or ".join(repr(name) for name in names)


_CHECKS = {
    "name": (
        lambda value: 0 < len(value) <= 100 and value.isprintable() and "/" not in value,
        "a name of at most 100 printable characters without '/'",
    ),
    "seed": (lambda value: 0 <= value < 2**32, "an integer in [0, 2**32)"),
    "data.name": (bool, "the name of a data set"),
    "data.storage": _one_of("memory", "stream"),
    "data.directory": (bool, "a folder"),
    "data.workers": _NOT_NEGATIVE,
    "data.corrupt_images": _one_of("fail", "skip"),
    "data.validation_size": _NOT_NEGATIVE,
    "data.train_size": _NOT_NEGATIVE,
    "data.normalization": _one_of("statistics", "scale", "weights"),
    "data.image_size": _NOT_NEGATIVE,
    "augmentation.shift": _NOT_NEGATIVE,
    "augmentation.crop_area": (lambda value: 0 < value <= 1, "a number in (0, 1]"),
    "augmentation.jitter": _FRACTION,
    "augmentation.lighting": _NOT_NEGATIVE,
    "train.epochs": _POSITIVE,
    "train.batch_size": _POSITIVE,
    "train.accumulate_steps": _POSITIVE,
    "train.max_skipped_steps": _POSITIVE,
    "train.label_smoothing": _FRACTION,
    "train.dtype": _one_of("float32", "bfloat16", "float64"),
    "optimizer.learning_rate": (lambda value: 0 < value < float("inf"), "a finite number above 0"),
    "optimizer.reference_batch_size": _NOT_NEGATIVE,
    "optimizer.momentum": _FRACTION,
    "optimizer.weight_decay": _NOT_NEGATIVE,
    "optimizer.drop_at": (
        lambda value: all(
            type(x) is float and low < x < 1 for low, x in zip((0, *value), value, strict=False)
        ),
        "rising fractions in (0, 1)",
    ),
    "optimizer.drop_factor": (lambda value: 0 < value <= 1, "a number in (0, 1]"),
    "optimizer.warmup_epochs": _NOT_NEGATIVE,
    "evaluate.every_epochs": _NOT_NEGATIVE,
    "evaluate.split": _one_of("test", "validation"),
    "evaluate.final_split": _one_of("test", "validation"),
    "evaluate.train_images": _NOT_NEGATIVE,
    "evaluate.resize_size": _NOT_NEGATIVE,
    "evaluate.crop_size": _NOT_NEGATIVE,
    "evaluate.batch_size": _POSITIVE,
    "checkpoint.every_epochs": _POSITIVE,
    "checkpoint.keep_latest": _POSITIVE,
    "checkpoint.select": _one_of("last", "best"),
    "parallel.mode": _one_of("shard_map", "pmap"),
    "parallel.batch_norm": _one_of("global", "replica", "groups"),
    "parallel.batch_norm_group_size": _NOT_NEGATIVE,
    "log.every_steps": _POSITIVE,
    "log.seconds": _POSITIVE,
    "profile.steps": (
        lambda value: value == ()
        or ([type(step) for step in value] == [int, int] and 0 < value[0] <= value[1]),
        "() or (first, last), steps from 1",
    ),
}


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of a nested config by their dotted key."""
    leaves = {}
    for key, value in config.items():
        if isinstance(value, Mapping | config_dict.ConfigDict):
            leaves |= flatten(value, f"{prefix}{key}.")
        else:
            leaves[prefix + key] = value
    return leaves


def check(config: config_dict.ConfigDict) -> None:
    """Raises UserError for the first key that is unknown, missing, mistyped or out of range.

    `evaluate.resize_size` of 0 is set to the pixels that it stands for. Keys of `config.model` are
    checked by `densejax.models.create`, which knows the families.
    """
    schema, values = flatten(default()), flatten(config)
    values = {key: value for key, value in values.items() if not key.startswith("model.")}
    for key in sorted(set(schema) ^ set(values)):
        what = "missing" if key in schema else "unknown"
        section = [name for name in schema if name.startswith(key.rpartition(".")[0])]
        raise UserError(f"{what} key {key}; allowed here are {', '.join(section)}")
    for key, value in values.items():
        kind = type(schema[key])
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise UserError(f"{key} = {value!r}: give a value of type {kind.__name__}")
        test, allowed = _CHECKS.get(key, (None, None))
        if test and not test(value):
            raise UserError(f"{key} = {value!r}: allowed is {allowed}")
    # Where nothing reads it, it is 256, which runs have always stored.
    size = config.data.image_size if config.data.storage == "stream" else 224
    schema["evaluate.resize_size"] = round(size * 256 / 224)
    config.evaluate.resize_size = config.evaluate.resize_size or schema["evaluate.resize_size"]
    values["evaluate.resize_size"] = config.evaluate.resize_size
    for key, conflicts, remedy in _conflicts(config, {k for k in values if values[k] != schema[k]}):
        if conflicts:
            raise UserError(f"{key} = {values[key]!r}: {remedy}")


def _conflicts(
    config: config_dict.ConfigDict, changed: set[str]
) -> Iterator[tuple[str, bool, str]]:
    """(key, whether its value stands against another key's, what to do), of a config in its ranges.

    What one value of another key alone reads stays at its default elsewhere.
    """
    data, evaluate, parallel = config.data, config.evaluate, config.parallel
    streams, steps = data.storage == "stream", config.optimizer.schedule == "step"
    for key, is_read, reader in (
        ("optimizer.drop_at", steps, "optimizer.schedule = 'step'"),
        ("optimizer.drop_factor", steps, "optimizer.schedule = 'step'"),
        ("data.workers", streams, "data.storage = 'stream'"),
        ("data.corrupt_images", streams, "data.storage = 'stream'"),
        ("augmentation.crop_area", streams, "data.storage = 'stream'"),
        ("evaluate.resize_size", streams, "data.storage = 'stream'"),
        ("evaluate.train_images", not streams, "data.storage = 'memory'"),
    ):
        yield key, key in changed and not is_read, f"only {reader} reads it"
    cropped = streams and config.augmentation.shift > 0
    yield "augmentation.shift", cropped, "set it to 0, data.storage = 'stream' crops otherwise"
    sizeless = streams and data.image_size == 0
    yield "data.image_size", sizeless, "data.storage = 'stream' needs a size, such as 224"
    largest = evaluate.resize_size
    for key, size in (
        ("data.image_size", data.image_size),
        ("evaluate.crop_size", evaluate.crop_size),
    ):
        yield key, streams and size > largest, f"must be at most evaluate.resize_size = {largest}"
    nameless = data.normalization == "weights" and not config.train.weights
    yield "data.normalization", nameless, "needs train.weights; set 'statistics' or 'scale'"
    still = config.optimizer.nesterov and not config.optimizer.momentum
    yield "optimizer.nesterov", still, "set optimizer.momentum above 0"
    grouped = parallel.batch_norm == "groups"
    yield (
        "parallel.batch_norm_group_size",
        grouped != (parallel.batch_norm_group_size > 0),
        "parallel.batch_norm = 'groups', and no other, reads it and needs it above 0",
    )
    yield (
        "parallel.mode",
        grouped and parallel.mode == "pmap",
        "has no groups of devices; with parallel.batch_norm = 'groups' set 'shard_map'",
    )
    best = config.checkpoint.select == "best"
    for key, reads in (
        ("evaluate.split", evaluate.split == "validation"),
        ("evaluate.final_split", evaluate.final_split == "validation"),
        ("checkpoint.select", best),
    ):
        yield key, reads and not data.validation_size, "set data.validation_size above 0"
    yield (
        "checkpoint.select",
        best and (evaluate.split == "test" or not evaluate.every_epochs),
        "set evaluate.split = 'validation' and evaluate.every_epochs above 0; test images never "
        "choose a model",
    )


def parse_arg(arg: str | None, **defaults: Any) -> config_dict.ConfigDict:
    """Reads what follows the colon of `--config=configs/cifar10.py:depth=40,growth_rate=12`.

    Args:
      arg: `key=value` pairs with commas between them; None or "": the defaults.
      **defaults: every key that the card reads; a value takes its default's type, and a default
        of None takes any number or name.

    Raises:
      UserError: an unknown key, a pair without "=", or a value of another type.
    """
    values, given = config_dict.ConfigDict(defaults), set()
    for pair in filter(None, (arg or "").split(",")):
        key, equals, text = pair.partition("=")
        if key not in defaults or not equals or key in given:
            allowed = ", ".join(f"{name}={value}" for name, value in defaults.items())
            raise UserError(
                f"config argument {pair!r}: give key=value pairs of {allowed}, each at most once"
            )
        given.add(key)
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        default_type = type(defaults[key])
        kinds = {type(None): (int, float, str), float: (float, int)}.get(
            default_type, (default_type,)
        )
        if type(value) not in kinds:
            wanted = " or ".join(kind.__name__ for kind in kinds)
            raise UserError(f"config argument {key} = {text}: give a value of type {wanted}")
        with values.ignore_type():
            values[key] = value
    return values
