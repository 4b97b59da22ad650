"""Sweeps as data: each turns a card's DenseNet into the runs that answer one question.

A run has a name, a place on the sweep's axes, and the overrides of the card that make it. The
card's own network is the dense one in every comparison. Networks that must be equal to it are found
by a search over widths with `densejax.models.counts`. They have the same number of convolutions: a
residual block has two basic 3x3 where a bottleneck layer has a 1x1 and a 3x3. `seed` is an axis of
every sweep, and `parse_axes` makes axes of other keys of the card.
"""

import ast
import bisect
import dataclasses
import functools
import inspect
import itertools
import json
import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from densejax import data, models
from densejax.config import UserError, flatten
from densejax.models import connections, counts
from densejax.runs import workdir
from densejax.training import experiment

TOLERANCE = 0.02  # the largest relative difference of counts that are called equal
KINDS = ("plain", "residual", "dense", "one_shot")
ADDING = {"add": "residual", "chain": "plain"}  # the kinds of these patterns that add
# Pairs of kinds, written down before the runs: a report tests whether the first is better.
COMPARISONS = {
    "patterns": (
        *(("dense", other) for other in ("residual", "exponential", "one_shot")),
        ("weighted", "residual"),
    )
}


@dataclasses.dataclass(frozen=True)
class Run:
    """One training of a sweep.

    Attributes:
      name: unique in the sweep; also the name of its directory.
      axes: what the sweep varies, by name.
      overrides: of the card, by dotted key.
      model: what the card takes as its argument `model`; "": its own network.
      mismatch: relative difference, from the card's network, of the count that should be equal;
        None: no count should be.
    """

    name: str
    axes: dict[str, Any]
    overrides: dict[str, Any]
    model: str = ""
    mismatch: float | None = None


@dataclasses.dataclass(frozen=True)
class Network:
    """A named network, "" for the card's, and the fields that are changed in it."""

    model: str
    fields: dict[str, Any]

    @property
    def overrides(self) -> dict[str, Any]:
        """The fields by dotted key."""
        return {f"model.{field}": value for field, value in self.fields.items()}

    def run(self, name: str, axes: dict[str, Any], mismatch: float | None = None, **more) -> Run:
        """The run of this network; `more` has overrides by key, with `__` for each dot."""
        more = {key.replace("__", "."): value for key, value in more.items()}
        return Run(name, axes, self.overrides | more, self.model, mismatch)


class Base:
    """A card's configuration, and what the sweeps ask of its DenseNet.

    Raises:
      UserError: a configuration that is wrong, or of another network than a DenseNet.
    """

    def __init__(self, config: ConfigDict):
        """Reads the facts of the data set, but none of its images."""
        built = experiment.build(config)
        info, model, self.steps = built.info, built.task.model, built.steps
        if config.model.family != "densenet":
            raise UserError(
                f"model.family = {config.model.family!r}: a sweep starts from a DenseNet"
            )
        self.config, self.num_classes = built.config, info.num_classes
        self.image_shape = built.task.network_shape
        self.train_images = data.train_size(config, info)
        self.layers, self.growth_rates = model.block_depths(), model.growth_rates()
        # Convolutions of each block: all kinds of networks have the same number of them.
        self.convolutions = tuple(n * (2 if model.bottleneck else 1) for n in self.layers)
        self.blocks = tuple(math.ceil(n / 2) for n in self.convolutions)
        self.equal = functools.cache(self._equal)

    def dense(
        self, layers: Sequence[int] = (), growth_rates: Sequence[int] = (), **fields
    ) -> Network:
        """The card's network with other layers or growth rates of its blocks, or other fields."""
        if layers and tuple(layers) != self.layers:
            fields |= {"depth": None} if self.config.model.depth is not None else {}
            fields["blocks"] = tuple(layers)
        if growth_rates and tuple(growth_rates) != self.growth_rates:
            one = len(set(growth_rates)) == 1
            fields["growth_rate"] = growth_rates[0] if one else tuple(growth_rates)
        return Network("", fields)

    def network(self, kind: str, widths: Sequence[int], blocks: Sequence[int]) -> Network:
        """A network of a kind, with these widths and numbers of blocks or bottleneck layers."""
        blocks = tuple(blocks)
        if kind == "dense":
            bottleneck = self.config.model.bottleneck
            return self.dense(blocks if bottleneck else tuple(2 * n for n in blocks), widths)
        if kind == "one_shot":  # without bottlenecks, as its paper has it: twice the layers
            layers = tuple(2 * n for n in blocks)
            return self.dense(layers, widths, connect="one_shot", bottleneck=False)
        if kind == "vovnet":
            first, second, third = widths
            return Network(
                "vovnet39",
                {
                    "modules": (1, 1, 1),
                    "widths": (first, second, third),
                    "output_widths": (2 * first, 3 * second, 4 * third),
                    "stem_widths": (math.ceil(first / 2), math.ceil(first / 2), first),
                },
            )
        fields = {"blocks": blocks, "widths": tuple(widths)}
        if self.config.model.stem != "cifar":
            fields["stem"] = self.config.model.stem
        return Network({"plain": "plain20_cifar", "residual": "resnet20_cifar"}[kind], fields)

    def of(self, network: Network) -> dict[str, int]:
        """Parameters and multiply-adds of a network on the card's images."""
        found = _counts(self._built(network), self.image_shape)
        return dict(zip(("parameters", "multiply_adds"), found, strict=True))

    def depth(self, network: Network) -> int:
        """Layers with weights on a network's longest path."""
        return models.depth(self._built(network))

    def _built(self, network):
        if network.model:
            section = models.fields(network.model, **network.fields)
        else:
            section = _changed(self.config, network.overrides).model
        return models.create(section, self.num_classes)

    def _equal(
        self, kind: str, what: str = "parameters", blocks: tuple[int, ...] | None = None
    ) -> tuple[Network, float]:
        """(network of a kind whose count comes near the card's, its relative difference).

        Args:
          kind: "vovnet" or one of KINDS.
          what: "parameters" or "multiply_adds".
          blocks: as `network` takes them; None: those of the card.

        Raises:
          UserError: no widths come within `TOLERANCE`.
        """
        ratios = {"dense": self.growth_rates, "one_shot": self.growth_rates, "vovnet": (4, 5, 6)}
        doubling = tuple(2**stage for stage in range(len(self.blocks)))  # as He et al. have it
        blocks = blocks or self.blocks
        return self.search(
            lambda widths: self.network(kind, widths, blocks), ratios.get(kind, doubling), what
        )

    def search(
        self,
        make: Callable[[tuple[int, ...]], Network],
        ratios: Sequence[int],
        what: str,
        tolerance: float = TOLERANCE,
    ) -> tuple[Network, float]:
        """As `equal`, for what `make` builds from widths: whole numbers in about these ratios.

        All widths grow together until the count is met; then each may change by one or two.
        """
        target = self.of(Network("", {}))[what]

        def mismatch(widths):
            return self.of(make(widths))[what] / target - 1

        def scaled(by):
            return tuple(max(1, round(by * ratio)) for ratio in ratios)

        scale, seen = sum(self.growth_rates) / sum(ratios), set()
        while (widths := scaled(scale)) not in seen:
            seen.add(widths)
            if abs(mismatch(widths)) < TOLERANCE / 2:
                return make(widths), mismatch(widths)
            scale /= math.sqrt(1 + mismatch(widths))  # it grows about as the square of the widths

        def moved(step):
            return tuple(max(1, width + by) for width, by in zip(widths, step, strict=True))

        units = [tuple(int(i == j) for j in range(len(ratios))) for i in range(len(ratios))]
        slopes = [mismatch(moved(unit)) - mismatch(widths) for unit in units]

        def promise(step):  # first the fewest changes that should be enough, then the nearest
            left = abs(mismatch(widths) + sum(map(operator.mul, slopes, step)))
            return (0, sum(map(abs, step))) if left < TOLERANCE / 4 else (1, left)

        steps = sorted(itertools.product(range(-2, 3), repeat=len(ratios)), key=promise)[:32]
        near = [moved(step) for step in steps]
        good = (widths for widths in near if abs(mismatch(widths)) < TOLERANCE / 2)
        best = next(good, None) or min(near, key=lambda widths: abs(mismatch(widths)))
        if abs(mismatch(best)) > tolerance:
            raise UserError(
                f"{make(best)}: no widths near these come within {tolerance:.0%} of the card's "
                f"{target} {what}; take a larger network"
            )
        return make(best), mismatch(best)


_counts = functools.cache(counts.of_network)  # many points of a sweep have the same network


def growth_rate(base: Base, values: Sequence[int] = (1, 4, 8, 12, 16, 24, 32)) -> Iterator[Run]:
    """Feature maps that a layer adds: k of the paper, section 3; all else as in the card."""
    for k in values:
        yield base.dense(growth_rate=k).run(f"k{k}", {"growth_rate": k})


def growth_rate_equal_multiply_adds(
    base: Base, values: Sequence[int] = (6, 12, 18, 24, 32)
) -> Iterator[Run]:
    """Few wide layers or many narrow ones: blocks grow or shrink together as k changes.

    Layers are whole, so that few of them come less near to the card's count than widths do.
    """
    target = base.of(base.dense())["multiply_adds"]

    def mismatch(network):
        return base.of(network)["multiply_adds"] / target - 1

    factors = (1.01**power for power in range(-280, 280))  # 1/16 to 16
    shapes = [tuple(max(1, round(factor * n)) for n in base.layers) for factor in factors]
    for k in values:
        networks = [base.dense(layers, [k] * len(layers)) for layers in dict.fromkeys(shapes)]
        above = bisect.bisect(networks, 0, key=mismatch)
        near = networks[max(0, above - 1) : above + 1]
        network = min(near, key=lambda network: abs(mismatch(network)))
        if abs(mismatch(network)) > 0.2:
            raise UserError(
                f"growth rate {k}: no number of layers comes within 20% of the card's {target} "
                f"multiply-adds; take a larger network, or other --values"
            )
        axes = {"growth_rate": k, "depth": base.depth(network)}
        yield network.run(f"k{k}", axes, mismatch(network))


def depth_width(base: Base) -> Iterator[Run]:
    """Deep and narrow, or shallow and wide, at equal parameters; a ResNet and a VoVNet beside."""
    factors = (1 / 3, 2 / 3, 1, 2, 4)
    depths = [tuple(max(1, round(factor * n)) for n in base.blocks) for factor in factors]
    for blocks in dict.fromkeys(depths):  # with few layers, two factors may give the same depth
        network, mismatch = base.equal("dense", blocks=blocks)
        depth = base.depth(network)
        yield network.run(f"dense{depth}", {"kind": "dense", "depth": depth}, mismatch)
    for kind in ("residual", "vovnet"):
        network, mismatch = base.equal(kind)
        yield network.run(kind, {"kind": kind, "depth": base.depth(network)}, mismatch)


def degradation(base: Base) -> Iterator[Run]:
    """Is the *training* error worse if a network is deeper (He et al. 2015, section 4.2)?

    n = 3, 5 and 9 residual blocks, or bottleneck layers, in each block of the network. Of three
    blocks, that is 20, 32 and 56 layers with weights, and 22, 34 and 58 in a DenseNet, whose
    transitions have weights too. Widths stay those at which the shallowest networks have the
    parameters of the shallowest DenseNet, of the card's growth rate.
    """
    stages = len(base.blocks)
    fewest = base.network("dense", base.growth_rates, (3,) * stages)
    shallow = Base(_changed(base.config, fewest.overrides))
    widths = shallow.equal("residual")[0].fields["widths"]
    for n, kind in itertools.product((3, 5, 9), KINDS[:3]):
        network = base.network(
            kind, base.growth_rates if kind == "dense" else widths, (n,) * stages
        )
        depth = base.depth(network)
        yield network.run(f"{kind}{depth}", {"kind": kind, "depth": depth})


def connectivity(base: Base) -> Iterator[Run]:
    """How layers are joined, at equal parameters and at equal multiply-adds."""
    yield base.dense().run("dense", {"kind": "dense", "equal": "both"}, 0.0)
    for what, kind in itertools.product(("parameters", "multiply_adds"), KINDS):
        if kind != "dense":
            network, mismatch = base.equal(kind, what)
            yield network.run(f"{kind}_equal_{what}", {"kind": kind, "equal": what}, mismatch)


def patterns(base: Base, what: str = "multiply_adds") -> Iterator[Run]:
    """Every connection pattern of the package, at equal multiply-adds.

    Those that concatenate are DenseNets; those that add are ResNets with pre-activation, of two 3x3
    convolutions a block: "residual" is their pattern `add`, and "plain" their `chain`.
    """
    for connect in connections.CONCATENATING:
        # HarDNet's widths are even. So its growth rates go in steps of two and come less near.
        unit, tolerance = (2, 0.1) if connect == "hardnet" else (1, TOLERANCE)
        make = functools.partial(_connected, base, connect, unit)
        network, mismatch = base.search(make, base.growth_rates, what, tolerance)
        yield network.run(connect, {"kind": connect}, mismatch)
    for connect in connections.ADDING:
        kind, network, mismatch = _equal_preactivated(base, connect, what)
        yield network.run(kind, {"kind": kind}, mismatch)


def patterns_equal_parameters(base: Base) -> Iterator[Run]:
    """Every connection pattern of the package, at equal parameters."""
    return patterns(base, "parameters")


def patterns_equal_time(base: Base) -> Iterator[Run]:
    """The card's network, and residual and learned patterns, for run.py --equal_time.

    A width is the multiple of eight that is nearest to that of equal multiply-adds: on a CPU, XLA's
    3x3 convolution of 7 channels takes twice as long as that of 8.
    """
    yield base.dense().run("dense", {"kind": "dense"}, 0.0)
    for connect in ("add", "laurel", "hyper", "weighted"):
        kind, equal, _ = _equal_preactivated(base, connect, "multiply_adds")
        widths = [max(1, round(width / 8)) * 8 for width in equal.fields["widths"]]
        yield _preactivated(base, connect, widths).run(kind, {"kind": kind})


def _connected(base: Base, connect: str, unit: int, widths: Sequence[int]) -> Network:
    changed = {} if connect == base.config.model.connect else {"connect": connect}
    return base.dense((), [unit * width for width in widths], **changed)


def _equal_preactivated(base: Base, connect: str, what: str) -> tuple[str, Network, float]:
    """(kind, network whose count comes near the card's, its relative difference)."""
    doubling = tuple(2**stage for stage in range(len(base.blocks)))
    make = functools.partial(_preactivated, base, connect)
    return ADDING.get(connect, connect), *base.search(make, doubling, what)


def _preactivated(base: Base, connect: str, widths: Sequence[int]) -> Network:
    fields = {"block": "basic", "stride_on": "3x3", "stem": base.config.model.stem}
    fields |= {"blocks": base.blocks, "widths": tuple(widths), "connect": connect}
    return Network("preact_resnet164", fields)


def variants(base: Base) -> Iterator[Run]:
    """DenseNet, -B, -C and -BC of one growth rate and one number of convolutions."""
    for variant, fields in models.VARIANTS.items():
        layers = base.blocks if fields["bottleneck"] else base.convolutions
        yield base.dense(layers, **fields).run(variant, {"variant": variant})


def growth_schedule(base: Base) -> Iterator[Run]:
    """One growth rate, or twice the rate in each block, at equal parameters or multiply-adds.

    They differ since later blocks have smaller feature maps, where a wide layer needs many
    parameters and few multiply-adds.
    """
    points = (
        ("constant", 1, "parameters"),
        ("doubling", 2, "parameters"),
        ("doubling", 2, "multiply_adds"),
    )
    for name, factor, what in points:
        ratios = tuple(factor**block for block in range(len(base.layers)))
        network, mismatch = base.search(lambda k: base.dense((), k), ratios, what)
        axes = {"schedule": name, "equal": what}
        yield network.run(f"{name}_equal_{what}", axes, mismatch)


def train_size(base: Base) -> Iterator[Run]:
    """Few images, with and without augmentation, at equal parameters: who over-fits?

    All take about as many steps as the card asks for, so few images are seen more often: epochs,
    and the cadences that count in epochs, grow as the set shrinks.
    """
    config, batch_size = base.config, base.config.train.batch_size
    sizes = [size for size in (500, 2000, 8000) if batch_size <= size < base.train_images]
    for size, kind, augmented in itertools.product((*sizes, 0), KINDS[:3], (True, False)):
        network, mismatch = base.equal(kind)
        changes = {} if augmented else {"augmentation__shift": 0, "augmentation__flip": False}
        if size:
            per_epoch = size // batch_size
            epochs = round(base.steps / per_epoch)
            factor = epochs / (base.steps / (base.train_images // batch_size))
            changes |= {"data__train_size": size, "train__epochs": epochs}
            for section, key in (("checkpoint", "every_epochs"), ("evaluate", "every_epochs")):
                if every := config[section][key]:
                    changes[f"{section}__{key}"] = max(1, round(factor * every))
            if config.evaluate.train_images > size:
                changes["evaluate__train_images"] = size
            if warmup := config.optimizer.warmup_epochs:
                changes["optimizer__warmup_epochs"] = round(factor * warmup, 3)
        images = size or base.train_images
        name = f"{kind}_n{size or 'all'}_{'augmented' if augmented else 'plain_images'}"
        axes = {"kind": kind, "train_size": images, "augmented": augmented}
        yield network.run(name, axes, mismatch, **changes)


def compression(base: Base, values: Sequence[float] = (0.25, 0.5, 0.75, 1.0)) -> Iterator[Run]:
    """Share of the channels that a transition keeps: theta of the paper, section 3."""
    for theta in values:
        yield base.dense(compression=theta).run(f"theta{theta}", {"compression": theta})


def dropout(base: Base, values: Sequence[float] = (0.0, 0.1, 0.2)) -> Iterator[Run]:
    """Dropout after every convolution, with and without augmentation (paper: 0.2 without)."""
    for rate, augmented in itertools.product(values, (True, False)):
        changes = {} if augmented else {"augmentation__shift": 0, "augmentation__flip": False}
        name = f"dropout{rate}_{'augmented' if augmented else 'plain_images'}"
        axes = {"dropout_rate": rate, "augmented": augmented}
        yield base.dense(dropout_rate=rate).run(name, axes, **changes)


def recipe(base: Base) -> Iterator[Run]:
    """Each part of a newer recipe alone, beside the card's own recipe, and most of them together.

    Rates are those of the parts' papers or of common use; none is tuned. Cutout's square has a
    quarter of the image's height where images are stored at twice the height that is read.
    """
    adamw = {"name": "adamw", "learning_rate": 3e-3, "weight_decay": 0.05, "nesterov": False}
    adamw |= {"decay_all": False}
    parts = {
        "card": {},
        "label_smoothing": {"train__label_smoothing": 0.1},
        "average": {"train__average_decay": 0.999},
        "adamw": {f"optimizer__{key}": value for key, value in adamw.items()},
        "clip": {"optimizer__clip_norm": 1.0},
        "mixup": {"augmentation__mixup": 0.2},
        "cutmix": {"augmentation__cutmix": 1.0},
        "cutout": {"augmentation__cutout": base.image_shape[0] // 4 * 2},
        "erasing": {"augmentation__erasing": 0.25},
        "randaugment": {"augmentation__policy": "randaugment"},
        "trivialaugment": {"augmentation__policy": "trivialaugment"},
        "alternate_flip": {"augmentation__alternate_flip": True},
        "views": {"evaluate__mirror": True, "evaluate__shift": 1},
        "stochastic_depth": {"model__survival": 0.8},
    }
    together = ("label_smoothing", "average", "adamw", "clip", "mixup", "erasing", "views")
    parts["together"] = {key: value for part in together for key, value in parts[part].items()}
    for part, changes in parts.items():
        yield base.dense().run(part, {"recipe": part}, **changes)


def learning_rate(base: Base, values: Sequence[float] = ()) -> Iterator[Run]:
    """The peak for each kind of network at equal parameters, measured on held-out images.

    By default, a quarter of the card's peak to twice it. A twelfth of an epoch's images is held out
    where the card holds out none; test images are not read.
    """
    config, peak = base.config, base.config.optimizer.learning_rate
    changes = {"evaluate__split": "validation", "evaluate__final_split": "validation"}
    if not config.data.validation_size:
        batch_size = config.train.batch_size
        epoch = base.train_images // batch_size * batch_size
        changes["data__validation_size"] = epoch // 12
    values = values or [peak * factor for factor in (0.25, 0.5, 1, 2)]
    for kind, rate in itertools.product(KINDS, values):
        network, mismatch = base.equal(kind)
        yield network.run(
            f"{kind}_rate{rate:g}",
            {"kind": kind, "learning_rate": rate},
            mismatch,
            optimizer__learning_rate=rate,
            **changes,
        )


SWEEPS = {
    sweep.__name__: sweep
    for sweep in (
        *(growth_rate, growth_rate_equal_multiply_adds, depth_width, degradation),
        *(connectivity, variants, growth_schedule, patterns, patterns_equal_parameters),
        *(patterns_equal_time, train_size, compression, dropout, recipe, learning_rate),
    )
}


def parse_values(text: str) -> list[Any]:
    """Values with commas between them: literals ("6,12"), or else text ("dense,window:size=2")."""
    try:
        values = ast.literal_eval(f"[{text}]")
    except (ValueError, SyntaxError):
        values = text.split(",")
    return list({str(value): value for value in values}.values())


def parse_axes(words: Sequence[str]) -> dict[str, list[Any]]:
    """The values by key of axes such as "model.depth=22,40" (raises UserError)."""
    axes = {}
    for word in words:
        key, _, text = word.partition("=")
        axes.setdefault(key, parse_values(text))
    if len(axes) < len(words) or not all(axes.values()) or "seed" in axes:
        given = " ".join(f"--axis={word}" for word in words)
        raise UserError(
            f"{given}: give each key once, with values, as in --axis=model.depth=22,40; "
            f"--seeds is for seeds"
        )
    return axes


def axis_names(keys: Sequence[str]) -> list[str]:
    """The names of keys of the card as axes: without their section, if that is unique."""
    short = [key.rpartition(".")[2] for key in keys]
    return [name if short.count(name) == 1 else key for key, name in zip(keys, short, strict=True)]


def runs(
    sweep: str | None,
    config: ConfigDict,
    seeds: int = 3,
    values: Sequence[Any] = (),
    axes: Mapping[str, Sequence[Any]] | None = None,
) -> list[Run]:
    """All runs of a sweep of a card: first every point with the first seed, then with the next.

    Args:
      sweep: a name in `SWEEPS`; None: the card's own network alone.
      config: the card's.
      seeds: runs of each point.
      values: what the sweep varies, in place of its own values.
      axes: values by key: the sweep is made of the card with each combination of them.

    Raises:
      UserError: a card that the sweep cannot start from, or values or axes that it does not take.
    """
    axes, known = axes or {}, flatten(config)
    for key in axes.keys() - known.keys():
        section, _, last = key.rpartition(".")
        beside = [name for name in known if name.endswith(f".{last}")]
        beside = beside or [name for name in known if name.startswith(f"{section}.")]
        allowed = ", ".join(beside or known)
        raise UserError(f"--axis={key}: unknown key; allowed are {allowed}")
    able = [name for name in SWEEPS if "values" in inspect.signature(SWEEPS[name]).parameters]
    if values and sweep not in able:
        raise UserError(f"--values: for --sweep={' or '.join(able)}; --axis varies any key")
    options = {"values": values} if values else {}
    points = []
    for combination in itertools.product(*axes.values()):
        changes = dict(zip(axes, combination, strict=True))
        changed = _changed(config, changes)
        made = SWEEPS[sweep](Base(changed), **options) if sweep else [Run("", {}, {})]
        points += [_placed(run, changes) for run in made]
    return [
        dataclasses.replace(
            run,
            name=f"{run.name}_seed{seed}",
            axes=run.axes | {"seed": seed},
            overrides=run.overrides | {"seed": seed},
        )
        for seed in range(config.seed, config.seed + seeds)
        for run in points
    ]


def _placed(run: Run, changes: Mapping[str, Any]) -> Run:
    """The run of a sweep of a changed card; the changes become axes of the run."""
    names = axis_names(list(changes))
    if twice := run.axes.keys() & set(names):
        raise UserError(f"--axis: the sweep varies {twice.pop()} itself; --values sets its values")
    place = {
        name: value if isinstance(value, str | int | float) else str(value)
        for name, value in zip(names, changes.values(), strict=True)
    }
    words = [f"{name}={re.sub(r'[^a-zA-Z0-9.+-]+', '-', str(place[name]))}" for name in names]
    # Changes of the card's network do not fit another network.
    kept = {k: v for k, v in changes.items() if not (run.model and k.startswith("model."))}
    return dataclasses.replace(
        run,
        name="_".join(filter(None, [run.name, *words])),
        axes=run.axes | place,
        overrides=kept | run.overrides,
    )


def origin(run: str, summary: Mapping[str, Any]) -> dict[str, str]:
    """All that a run's result depends on, except its seed; the runs of one mean have it in common.

    Args:
      run: its name. If an old run did not record its code, no other run has the same code.
      summary: its result.
    """
    changes = "; ".join(filter(_matters, summary.get("changes", []))) or "none"
    config = {key: json.dumps(value) for key, value in flatten(summary["config"]).items()}
    config = {f"config.{key}": config[key] for key in config if key != "seed" and _matters(key)}
    return {"code": f"not recorded by {run}", "changes": changes} | summary["versions"] | config


def _matters(key: str) -> bool:
    """Whether a key of the configuration may change a result."""
    return key.startswith(workdir.LENGTH) or not key.startswith(workdir.RESUMABLE)


def differences(origins: Mapping[str, Mapping[str, str]]) -> str:
    """What differs between named origins: "a, b (code 1) against c (code 2)", or ""."""
    keys, names = sorted(set().union(*origins.values())), {}
    keys = [key for key in keys if len({of.get(key) for of in origins.values()}) > 1]
    for name, of in origins.items():
        said = "; ".join(f"{key} {of.get(key, 'not recorded')}" for key in keys)
        names.setdefault(said, []).append(name)
    parts = (f"{', '.join(alike)} ({said})" for said, alike in names.items())
    return " against ".join(parts) if keys else ""


def _changed(config: ConfigDict, changes: Mapping[str, Any]) -> ConfigDict:
    """A card's configuration with other values of dotted keys."""
    changed = config.copy_and_resolve_references()
    with changed.ignore_type():
        changed.update_from_flattened_dict(changes)
    return changed
