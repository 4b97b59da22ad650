"""The configuration: every key with its default, its meaning and the values that it takes."""

import ast
import difflib
import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

from ml_collections import config_dict


class UserError(ValueError):
    """Bad input, said in one line: the field, the value, what is allowed and what to do."""

    exit_code = 2  # of a command that it ends

    def __init__(self, text: str):
        """Escapes what would break the line or steer a terminal: names come from files, too."""
        super().__init__(printable(text))


def printable(text: str) -> str:
    """Escapes what would break a line or steer a terminal, in a name that comes from a file."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def did_you_mean(word: str, known: Collection[str]) -> str:
    """' (did you mean train.epochs?)' where a known name is much like an unknown one, else ''.

    A name that ends alike is one: `epochs` means `train.epochs`.
    """
    name = word.rpartition(".")[2]
    alike = [other for other in known if other.rpartition(".")[2] == name]
    if not alike and (close := difflib.get_close_matches(word, known, n=5, cutoff=0.7)):
        alike = [max(close, key=lambda other: len(os.path.commonprefix([word, other])))]
    return f" (did you mean {' or '.join(alike)}?)" if alike and word not in known else ""


def unknown_key(key: str, known: Collection[str]) -> str:
    """What is said of a key that is not among the known ones: which of them are beside it."""
    section = key.rpartition(".")[0]
    beside = [name for name in known if section and name.rpartition(".")[0] == section]
    sections = sorted({"model"} | {name.partition(".")[0] for name in known})
    hint = did_you_mean(key, [*known, *sections])
    return f"unknown key {key}{hint}; allowed are {', '.join(beside or sections)}"


class _Range(NamedTuple):
    """Which values a key takes: a test, and the same in words."""

    contains: Callable[[Any], bool]
    words: str


def _one_of(*names: str) -> _Range:
    return _Range(lambda value: value in names, " or ".join(repr(name) for name in names))


# No bound lets infinity or what is not a number through; counts are int32 on the devices.
_POSITIVE = _Range(lambda value: 0 < value < 2**31, "a number above 0 and below 2**31")
_NOT_NEGATIVE = _Range(lambda value: 0 <= value < 2**31, "0 or more, and below 2**31")
_EVEN = _Range(
    lambda value: value in range(0, 2**31, 2), "an even number, 0 or more, and below 2**31"
)
_FEW = _Range(lambda value: 0 < value <= 14, "1 to 14")
_FRACTION = _Range(lambda value: 0 <= value < 1, "a number in [0, 1)")
_PROBABILITY = _Range(lambda value: 0 <= value <= 1, "a number in [0, 1]")
_SHARE = _Range(lambda value: 0 < value <= 1, "a number in (0, 1]")
_SPLIT = _one_of("test", "validation")
_RISING_FRACTIONS = _Range(
    lambda value: all(
        type(x) is float and low < x < 1 for low, x in zip((0, *value), value, strict=False)
    ),
    "rising fractions in (0, 1)",
)
_TWO_FRACTIONS = _Range(
    lambda value: len(value) == 2 and _RISING_FRACTIONS.contains(value),
    "two rising fractions in (0, 1)",
)
_RATES = _Range(
    lambda value: all(
        type(pair) is tuple
        and [type(part) for part in pair] in ([str, float], [str, int])
        and 0 <= pair[1] < 2**31
        for pair in value
    ),
    "pairs of a part's name and a number that is 0 or more",
)
_STEPS = _Range(
    lambda value: value == ()
    or ([type(step) for step in value] == [int, int] and 0 < value[0] <= value[1]),
    "() or (first, last), steps from 1",
)
_LEVELS = _Range(
    lambda value: all(type(x) in (int, float) and 0 <= x <= 255 for x in value),
    "() or a number from 0 to 255 for each channel",
)
_SPREADS = _Range(
    lambda value: all(type(x) in (int, float) and 1 <= x <= 255 for x in value),
    "() or a number from 1 to 255 for each channel, as images are stored",
)
_NAME = _Range(
    lambda value: 0 < len(value) <= 100 and value.isprintable() and "/" not in value,
    "a name of at most 100 printable characters without '/'",
)


class Key(NamedTuple):
    """One key of the configuration: its default, what it means, and which values it takes.

    A value has the default's type; an integer is a float, too. Without `allowed` any value of that
    type passes here: a table of names or the data set itself decides.
    """

    default: Any
    meaning: str
    allowed: _Range | None = None


# Every key but those of `config.model`, which `densejax.models.fields(name)` fills in.
KEYS = {
    "name": Key("", "The card's name; the default run directory is named after it.", _NAME),
    "seed": Key(
        0,
        "The random seed of the initial parameters, the order of examples, augmentation and "
        "dropout.",
        _Range(lambda value: 0 <= value < 2**32, "an integer in [0, 2**32)"),
    ),
    "data.name": Key(
        "",
        "The data set: a name in densejax.data.official.SETS, a set of densejax.data.add, or "
        "any set that TFDS has prepared.",
        _Range(bool, "the name of a data set"),
    ),
    "data.storage": Key(
        "memory",
        "Where the images lie. 'memory': the whole set lies on every device. 'stream': images "
        "lie on disk, and each is decoded when it is needed. 'auto', for a folder: in memory if "
        "they fit, otherwise on disk.",
        _one_of("memory", "stream", "auto"),
    ),
    "data.memory_gigabytes": Key(
        1.0,
        "With data.storage = 'auto': how much memory the images may take, in units of 2**30 bytes.",
        _NOT_NEGATIVE,
    ),
    "data.directory": Key(
        "~/.cache/densejax/data",
        "The folder in which sets are prepared, once.",
        _Range(bool, "a folder"),
    ),
    "data.manual_dir": Key(
        "",
        "A folder with the original files; '' downloads them. With data.storage = 'stream' or "
        "'auto' it is a folder of images: class/image.jpg, or train/class/image.jpg and the "
        "same in val and test; '' streams what TFDS has prepared.",
    ),
    "data.test_share": Key(
        0.2,
        "For a folder without val and test: the share of each class's images that is held out "
        "and tested on. They are the same images for every seed.",
        _Range(lambda value: 0 < value < 1, "a number above 0 and below 1"),
    ),
    "data.channels": Key(
        3,
        "For streams and folders: the number of channels with which every image is read, 3 for "
        "colour or 1 for grey.",
        _Range(lambda value: value in (1, 3), "1 or 3"),
    ),
    "data.workers": Key(
        0,
        "For streams: the number of processes that decode images on each host. 0: the run decodes "
        "them itself.",
        _NOT_NEGATIVE,
    ),
    "data.corrupt_images": Key(
        "fail",
        "For streams and folders: what happens at a training image that cannot be read. 'fail' "
        "ends the run, 'skip' trains on the next image. A test image that cannot be read always "
        "ends the run.",
        _one_of("fail", "skip"),
    ),
    "data.train_split": Key(
        "train", "The splits with the training images, such as 'train+extra' for SVHN."
    ),
    "data.validation_size": Key(
        0,
        "The number of training images that are held out. They are the same images for every "
        "seed; with data.storage = 'auto' each class gives its share.",
        _NOT_NEGATIVE,
    ),
    "data.train_size": Key(
        0,
        "The number of training images that are used. 0: all. They are the first ones of one "
        "fixed random order, so a larger number contains every smaller one. With data.storage = "
        "'auto' each class gives its share.",
        _NOT_NEGATIVE,
    ),
    "data.normalization": Key(
        "statistics",
        "How pixels become numbers. 'statistics' takes the set's mean and standard deviation, "
        "'scale' divides by 255, 'weights' takes the mean and standard deviation that "
        "train.weights were trained with.",
        _one_of("statistics", "scale", "weights"),
    ),
    "data.mean": Key(
        (),
        "With data.normalization = 'statistics': the mean of each channel, from 0 to 255; (): "
        "it is computed or known.",
        _LEVELS,
    ),
    "data.std": Key(
        (),
        "With data.normalization = 'statistics': the standard deviation of each channel, given "
        "together with data.mean.",
        _SPREADS,
    ),
    "data.image_size": Key(
        0,
        "The height and width in pixels that images are resized to; 0: they stay as they are "
        "stored.",
        _NOT_NEGATIVE,
    ),
    "augmentation.shift": Key(
        4,
        "For images in memory: each side is padded with this number of zero pixels, and a random "
        "crop of the old size is taken. 0: no crop.",
        _NOT_NEGATIVE,
    ),
    "augmentation.flip": Key(True, "Half of the images are mirrored."),
    "augmentation.alternate_flip": Key(
        False,
        "Each image is mirrored in every second epoch. Whether it is mirrored in the first one is "
        "random. Without this key, every epoch draws anew.",
    ),
    "augmentation.crop_area": Key(
        0.08, "For streams: a random crop shows at least this share of the image's area.", _SHARE
    ),
    "augmentation.jitter": Key(
        0.0, "Brightness, contrast and saturation change by at most this factor.", _FRACTION
    ),
    "augmentation.lighting": Key(
        0.0,
        "The standard deviation of random changes along the principal colours of ImageNet.",
        _NOT_NEGATIVE,
    ),
    "augmentation.policy": Key(
        "none",
        "Random operations such as rotation or contrast. 'randaugment' applies several, all of "
        "one magnitude; 'trivialaugment' applies one of a random magnitude.",
        _one_of("none", "randaugment", "trivialaugment"),
    ),
    "augmentation.operations": Key(
        2, "With 'randaugment': the number of operations that are applied to each image.", _FEW
    ),
    "augmentation.magnitude": Key(
        9.0,
        "With 'randaugment': how strong the operations are. 10 is the strongest, as in the paper.",
        _Range(lambda value: 0 <= value <= 10, "a number in [0, 10]"),
    ),
    "augmentation.cutout": Key(
        0,
        "A square with sides of this number of pixels is set to the mean colour. 0: none.",
        _EVEN,
    ),
    "augmentation.erasing": Key(
        0.0, "The probability that a rectangle of an image is set to the mean colour.", _PROBABILITY
    ),
    "augmentation.erasing_area": Key(
        (0.02, 0.4),
        "The smallest and the largest share of the image that such a rectangle takes.",
        _TWO_FRACTIONS,
    ),
    "augmentation.mixup": Key(
        0.0,
        "The alpha of mixup, such as 0.2: an image and its label become a weighted mean of two; "
        "0: off.",
        _NOT_NEGATIVE,
    ),
    "augmentation.cutmix": Key(
        0.0,
        "The alpha of cutmix, such as 1.0: a rectangle of the image shows another image; 0: "
        "off. If augmentation.mixup is on as well, one of the two is drawn for each image.",
        _NOT_NEGATIVE,
    ),
    "train.epochs": Key(300, "How often the network sees every training image.", _POSITIVE),
    "train.max_steps": Key(
        0,
        "Training ends after this number of steps, even if train.epochs asks for more. The "
        "schedule of the learning rate then ends there, too. 0: no limit.",
        _NOT_NEGATIVE,
    ),
    "train.batch_size": Key(
        64,
        "The number of images of a step, over all devices. It is a multiple of the number of "
        "devices.",
        _POSITIVE,
    ),
    "train.accumulate_steps": Key(
        1,
        "Each device computes its batch in this number of parts, one after another, to save "
        "memory.",
        _POSITIVE,
    ),
    "train.max_skipped_steps": Key(
        10,
        "A step whose loss or gradient is not finite is skipped. This number of skipped steps in a "
        "row ends the run.",
        _POSITIVE,
    ),
    "train.loss": Key("cross_entropy", "The loss: a name in densejax.training.losses.LOSSES."),
    "train.class_weights": Key(
        "none",
        "'balanced': rare classes count more. The loss of an example is multiplied by n / "
        "(classes x examples of its class), where n is the number of training examples.",
        _one_of("none", "balanced"),
    ),
    "train.label_smoothing": Key(
        0.0, "This share of the label's probability is spread evenly over all classes.", _FRACTION
    ),
    "train.average_decay": Key(
        0.0,
        "The decay of a moving average of weights and running statistics, such as 0.999. The "
        "average is evaluated in place of the weights; 0: none.",
        _FRACTION,
    ),
    "train.weights": Key(
        "",
        "The weights to start from: a directory that densejax.pretrained or a run wrote, or a "
        "file that densejax.pretrained can read; '': random weights.",
    ),
    "train.new_classifier": Key(
        False,
        "A new classifier is drawn in place of that of train.weights. If the weights have another "
        "number of image channels than the run, the kernels of the first convolution are converted "
        "to the run's number.",
    ),
    "train.frozen": Key(
        (),
        "These parts keep their parameters and run as in evaluation, such as ('stem', "
        "'block1'); 'batch_norm' means every BatchNorm.",
        _Range(lambda value: all(type(part) is str for part in value), "names of parts"),
    ),
    "train.head_epochs": Key(
        0,
        "The number of epochs at the start in which only the classifier learns. After them, "
        "everything learns.",
        _NOT_NEGATIVE,
    ),
    "train.patience": Key(
        0,
        "Training ends after this number of evaluations in a row without a lower error on held-out "
        "images. 0: it never ends early.",
        _NOT_NEGATIVE,
    ),
    "train.dtype": Key(
        "float32",
        "The precision of the computation. Parameters and statistics are float32 at least. A "
        "CPU is slower in bfloat16, so it computes in float32 instead.",
        _one_of("float32", "bfloat16", "float64"),
    ),
    "train.matmul_precision": Key(
        "float32",
        "The precision of products and convolutions when train.dtype is float32. "
        "'tensorfloat32' and 'bfloat16' are faster on a GPU or TPU; 'default' is JAX's choice, "
        "TF32 on an H100 and bfloat16 on a TPU. A CPU computes in float32 with each of them.",
        _one_of("float32", "tensorfloat32", "bfloat16", "default"),
    ),
    "optimizer.name": Key(
        "sgd", "The optimizer: a name in densejax.training.optimizer.OPTIMIZERS."
    ),
    "optimizer.learning_rate": Key(
        0.1,
        "The highest rate of the schedule.",
        _Range(lambda value: 0 < value < float("inf"), "a finite number above 0"),
    ),
    "optimizer.reference_batch_size": Key(
        0,
        "If it is above 0, the learning rate is multiplied by train.batch_size / "
        "optimizer.reference_batch_size.",
        _NOT_NEGATIVE,
    ),
    "optimizer.momentum": Key(
        0.9, "The momentum of SGD (without dampening) and of Muon, or beta 1 of AdamW.", _FRACTION
    ),
    "optimizer.nesterov": Key(True, "Whether the momentum is Nesterov's."),
    "optimizer.beta2": Key(
        0.999, "With 'adamw': the decay of the mean squared gradient.", _FRACTION
    ),
    "optimizer.epsilon": Key(
        1e-8, "With 'adamw': what is added to the root of the mean squared gradient.", _POSITIVE
    ),
    "optimizer.weight_decay": Key(
        1e-4,
        "The weight decay. 'sgd' adds this share of each weight to its gradient. 'adamw' subtracts "
        "the learning rate times this share of the weight; 'muon' does the same for kernels of "
        "convolutions, at a tenth of the rate.",
        _NOT_NEGATIVE,
    ),
    "optimizer.decay_all": Key(
        True,
        "Every parameter decays, as in the paper. Without it only kernels decay, and biases and "
        "norms do not.",
    ),
    "optimizer.clip_norm": Key(
        0.0,
        "The largest Euclidean norm that the gradient of all parameters together may have; 0: any.",
        _NOT_NEGATIVE,
    ),
    "optimizer.rates": Key(
        (),
        "Factors of the learning rate for parts of the network, such as (('stem', 0.0), "
        "('block1', 0.1)). A part with 0.0 does not learn, but its running statistics move; "
        "train.frozen keeps these as well.",
        _RATES,
    ),
    "optimizer.schedule": Key(
        "step",
        "The schedule of the learning rate: a name in densejax.training.optimizer.SCHEDULES.",
    ),
    "optimizer.drop_at": Key(
        (0.5, 0.75),
        "With 'step': the learning rate drops after these fractions of the training.",
        _RISING_FRACTIONS,
    ),
    "optimizer.drop_factor": Key(
        0.1, "With 'step': each drop multiplies the learning rate by this factor.", _SHARE
    ),
    "optimizer.warmup_epochs": Key(
        0.0,
        "The number of epochs at the start in which the learning rate rises linearly from zero.",
        _NOT_NEGATIVE,
    ),
    "evaluate.every_epochs": Key(
        1,
        "The number of epochs between two evaluations. 0: there is only one, at the end.",
        _NOT_NEGATIVE,
    ),
    "evaluate.split": Key(
        "test",
        "The images that are measured during training: the 'test' images, or the held-out "
        "'validation' images.",
        _SPLIT,
    ),
    "evaluate.final_split": Key(
        "test",
        "The images that the run's result is measured on. Take 'validation' to tune a setting.",
        _SPLIT,
    ),
    "evaluate.train_images": Key(
        0,
        "The number of training images that are measured at the end as well, without "
        "augmentation. 0: none.",
        _NOT_NEGATIVE,
    ),
    "evaluate.resize_size": Key(
        0,
        "For streams and folders: the image is resized until its shorter side has this number of "
        "pixels; then the middle is cropped. 0: data.image_size x 256/224.",
        _NOT_NEGATIVE,
    ),
    "evaluate.crop_size": Key(
        0,
        "If it is above 0, the logits are the mean over ten crops, whose sides have this number of "
        "pixels.",
        _NOT_NEGATIVE,
    ),
    "evaluate.mirror": Key(False, "The logits are the mean over the image and its mirror image."),
    "evaluate.shift": Key(
        0,
        "If it is above 0, the logits are the mean over the image and two copies that are "
        "shifted by this number of pixels along a diagonal. With evaluate.mirror, each of them is "
        "mirrored as well.",
        _Range(lambda value: 0 <= value < 100, "0 to 99"),
    ),
    "evaluate.batch_size": Key(
        512,
        "The number of images of an evaluation step, over all devices. It is a multiple of the "
        "number of devices.",
        _POSITIVE,
    ),
    "evaluate.assess": Key(
        False,
        "At the end, the run writes into its folder assessment which classes it confuses, how "
        "well its probabilities are calibrated, and its most confident mistakes. This needs "
        "matplotlib.",
    ),
    "checkpoint.every_epochs": Key(
        1,
        "The number of epochs between two checkpoints. There is always one of the last step.",
        _POSITIVE,
    ),
    "checkpoint.keep_latest": Key(
        2, "The number of checkpoints that are kept: the newest ones.", _POSITIVE
    ),
    "checkpoint.select": Key(
        "last",
        "The network that the result is measured with: the 'last', or the 'best' on held-out "
        "images.",
        _one_of("last", "best"),
    ),
    "parallel.mode": Key(
        "shard_map", "How a step is mapped over devices.", _one_of("shard_map", "pmap")
    ),
    "parallel.batch_norm": Key(
        "global",
        "The images over which the statistics of BatchNorm are taken: 'global', those of all "
        "devices; 'replica', those of each device; 'groups', those of a group of devices.",
        _one_of("global", "replica", "groups"),
    ),
    "parallel.batch_norm_group_size": Key(
        0, "With 'groups': the number of devices that form a group.", _NOT_NEGATIVE
    ),
    "log.every_steps": Key(
        50, "The number of steps between two records in metrics.jsonl.", _POSITIVE
    ),
    "log.seconds": Key(
        10.0,
        "The number of seconds between two lines of progress, if the output is not a terminal.",
        _POSITIVE,
    ),
    "profile.steps": Key(
        (), "The first and the last step that process 0 traces, such as (10, 15); (): none.", _STEPS
    ),
}


def default() -> config_dict.ConfigDict:
    """Every key of `KEYS` with its default, and an empty section `model`."""
    config = {"name": "", "seed": 0, "model": {}}  # the order of cards and of config.json
    for key, field in KEYS.items():
        section, _, name = key.rpartition(".")
        values = config.setdefault(section, {}) if section else config
        values[name] = field.default
    return config_dict.ConfigDict(config)


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of a nested config by their dotted key."""
    leaves = {}
    for key, value in config.items():
        if isinstance(value, Mapping | config_dict.ConfigDict):
            leaves |= flatten(value, f"{prefix}{key}.")
        else:
            leaves[prefix + key] = value
    return leaves


def checked(config: config_dict.ConfigDict) -> config_dict.ConfigDict:
    """A copy, in which `evaluate.resize_size` of 0 is replaced by the pixels that it stands for.

    Keys of `config.model` are checked by `densejax.models.create`, which knows the families.

    Raises:
      UserError: the first key that is unknown, missing, mistyped or out of range.
    """
    config = config.copy_and_resolve_references()
    values = {k: value for k, value in flatten(config).items() if not k.startswith("model.")}
    for key in sorted(set(KEYS) ^ set(values)):
        missing = f"missing key {key}; a card starts with densejax.config.default()"
        raise UserError(missing if key in KEYS else unknown_key(key, KEYS))
    for key, value in values.items():
        kind, allowed = type(KEYS[key].default), KEYS[key].allowed
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise UserError(f"{key} = {value!r}: give a value of type {kind.__name__}")
        if allowed and not allowed.contains(value):
            raise UserError(f"{key} = {value!r}: allowed is {allowed.words}")
    # Where nothing reads it, it is 256, which runs have always stored.
    size = config.data.image_size if config.data.storage != "memory" else 224
    usual = {"evaluate.resize_size": round(size * 256 / 224)}
    values["evaluate.resize_size"] = values["evaluate.resize_size"] or usual["evaluate.resize_size"]
    config.evaluate.resize_size = values["evaluate.resize_size"]
    changed = {key for key in values if values[key] != usual.get(key, KEYS[key].default)}
    for key, conflicts, remedy in _conflicts(config, changed):
        if conflicts:
            raise UserError(f"{key} = {values[key]!r}: {remedy}")
    return config


def _conflicts(
    config: config_dict.ConfigDict, changed: set[str]
) -> Iterator[tuple[str, bool, str]]:
    """(key, whether its value stands against another key's, what to do), of a config in its ranges.

    What one value of another key alone reads stays at its default elsewhere.
    """
    data, evaluate, parallel = config.data, config.evaluate, config.parallel
    augmentation = config.augmentation
    are_files, files = data.storage != "memory", "data.storage = 'stream' or 'auto'"
    by_statistics = data.normalization == "statistics"
    # An added optimizer or schedule may read these, too.
    is_adaptive = config.optimizer.name not in ("sgd", "muon")
    drops = config.optimizer.schedule not in ("cosine", "linear", "constant")
    knows_labels = data.storage != "stream" or bool(data.manual_dir)
    draws = augmentation.policy == "randaugment"
    operations = "augmentation.operations", "augmentation.magnitude"
    for reader, is_read, *keys in (
        ("augmentation.flip = True", augmentation.flip, "augmentation.alternate_flip"),
        ("augmentation.policy = 'randaugment'", draws, *operations),
        ("augmentation.erasing above 0", augmentation.erasing > 0, "augmentation.erasing_area"),
        ("evaluate.crop_size = 0", not evaluate.crop_size, "evaluate.mirror", "evaluate.shift"),
        ("optimizer.name = 'adamw'", is_adaptive, "optimizer.beta2", "optimizer.epsilon"),
        ("optimizer.schedule = 'step'", drops, "optimizer.drop_at", "optimizer.drop_factor"),
        (files, are_files, "data.workers", "data.corrupt_images", "data.test_share"),
        (files, are_files, "data.channels", "augmentation.crop_area", "evaluate.resize_size"),
        ("data.storage = 'auto'", data.storage == "auto", "data.memory_gigabytes"),
        ("data.storage = 'memory'", not are_files, "evaluate.train_images"),
        ("data.normalization = 'statistics'", by_statistics, "data.mean", "data.std"),
        ("a set in memory, or a folder,", knows_labels, "train.class_weights"),
        ("a run with train.weights", bool(config.train.weights), "train.new_classifier"),
        ("train.dtype = 'float32'", config.train.dtype == "float32", "train.matmul_precision"),
    ):
        for key in keys:
            yield key, key in changed and not is_read, f"only {reader} reads it"
    folderless = data.storage == "auto" and not data.manual_dir
    yield "data.manual_dir", folderless, "data.storage = 'auto' needs the folder with your images"
    yield "data.mean", bool(data.mean) != bool(data.std), "give data.mean and data.std, or neither"
    cropped = data.storage == "stream" and config.augmentation.shift > 0
    yield "augmentation.shift", cropped, "set it to 0, data.storage = 'stream' crops otherwise"
    sizeless = are_files and data.image_size == 0
    yield "data.image_size", sizeless, f"{files} needs a size, such as 224"
    largest = evaluate.resize_size
    sizes = {"data.image_size": data.image_size, "evaluate.crop_size": evaluate.crop_size}
    for key, size in sizes.items():
        yield key, are_files and size > largest, f"must be at most evaluate.resize_size = {largest}"
    nameless = data.normalization == "weights" and not config.train.weights
    yield "data.normalization", nameless, "needs train.weights; set 'statistics' or 'scale'"
    still = config.optimizer.nesterov and not config.optimizer.momentum
    yield "optimizer.nesterov", still, "set it to False, or optimizer.momentum above 0"
    grouped = parallel.batch_norm == "groups"
    is_odd = grouped != (parallel.batch_norm_group_size > 0)
    remedy = "parallel.batch_norm = 'groups', and no other, reads it and needs it above 0"
    yield "parallel.batch_norm_group_size", is_odd, remedy
    remedy = "has no groups of devices; with parallel.batch_norm = 'groups' set 'shard_map'"
    yield "parallel.mode", grouped and parallel.mode == "pmap", remedy
    idle = config.train.head_epochs > 0 and "head" in config.train.frozen
    yield "train.head_epochs", idle, "the head is in train.frozen, and would not learn"
    endless = config.train.head_epochs > config.train.epochs
    yield "train.head_epochs", endless, f"must be at most train.epochs = {config.train.epochs}"
    # Whether a folder has images for validation, densejax.data finds out.
    may_validate = data.validation_size > 0 or (are_files and data.manual_dir != "")
    best = config.checkpoint.select == "best"
    for key, reads in (
        ("evaluate.split", evaluate.split == "validation"),
        ("evaluate.final_split", evaluate.final_split == "validation"),
        ("checkpoint.select", best),
    ):
        yield key, reads and not may_validate, "set data.validation_size above 0"
    waits = config.train.patience > 0
    for key, chooses in (("checkpoint.select", best), ("train.patience", waits)):
        yield (
            key,
            chooses and (evaluate.split == "test" or not evaluate.every_epochs),
            "set evaluate.split = 'validation' and evaluate.every_epochs above 0; test images "
            "never choose a model",
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
    given = parse_pairs(arg or "", ",", defaults, "config argument")
    return config_dict.ConfigDict(defaults | given)


def parse_pairs(text: str, separator: str, defaults: Mapping[str, Any], what: str) -> dict:
    """The values of `key=value` pairs, as `parse_arg` reads them; `what` begins a message."""
    values = {}
    for pair in filter(None, text.split(separator)):
        key, equals, literal = pair.partition("=")
        if key not in defaults or not equals or key in values:
            allowed = ", ".join(f"{name}={value}" for name, value in defaults.items())
            wanted = f"give key=value pairs of {allowed or 'nothing'}, each at most once"
            raise UserError(f"{what} {pair!r}{did_you_mean(key, defaults)}: {wanted}")
        try:
            value = ast.literal_eval(literal)
        except (ValueError, SyntaxError):
            value = literal
        default_type = type(defaults[key])
        kinds = {type(None): (int, float, str), float: (float, int)}.get(
            default_type, (default_type,)
        )
        if type(value) not in kinds or (type(value) is float and not math.isfinite(value)):
            wanted = " or ".join(kind.__name__ for kind in kinds)
            raise UserError(f"{what} {key} = {literal}: give a value of type {wanted}")
        values[key] = value
    return values
