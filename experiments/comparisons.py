"""How certain a mean and a difference of two are: intervals, paired tests, Holm's correction."""

import dataclasses
import math
import statistics
from collections.abc import Sequence

import numpy as np
from scipy import stats
from sweep_runs import Group, half_width, say
from sweeps import COMPARISONS, differences, origin

LEVEL, FEWEST = 0.01, 8  # "better" needs a p below this, and at least so many seeds
# What two kinds of networks may differ in: the network, and its own best learning rate.
OWN = ("config.model.", "config.optimizer.learning_rate")


def t_test(first: Sequence[float], second: Sequence[float]) -> float:
    """Two-sided p of the paired t test; 1 if all differences are equal and have no variance."""
    equal = np.ptp(np.subtract(first, second)) < 1e-12
    return 1.0 if equal else float(stats.ttest_rel(first, second).pvalue)


def sign_flips(first: Sequence[float], second: Sequence[float]) -> float:
    """Exact two-sided p: the share of sign flips of the pairs whose mean is at least as far from 0.

    Fisher, The Design of Experiments, 1935, section 21.
    """
    test = stats.permutation_test(
        (np.subtract(first, second),),
        lambda sample, axis: np.mean(sample, axis=axis),
        permutation_type="samples",
        n_resamples=np.inf,
        vectorized=True,
        batch=10000,
    )
    return float(test.pvalue)


def holm(p: Sequence[float]) -> list[float]:
    """p values corrected for their number (Holm, Scandinavian Journal of Statistics 6, 1979)."""
    order = np.argsort(p)
    ordered = np.arange(len(p), 0, -1) * np.asarray(p)[order]
    corrected = np.minimum(1, np.maximum.accumulate(ordered))
    return corrected[np.argsort(order)].tolist()


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Whether one kind of network is better than another; NaN where nothing could be computed.

    Attributes:
      name: the two kinds, and the place on the other axes of the sweep.
      n: seeds that both have.
      difference: accuracy of the first minus that of the second, in points: the mean over pairs.
      interval: half the width of its 95 % interval.
      t: p of the paired t test, which decides.
      flips: p of the exact sign-flip test.
      corrected: `t` corrected for the number of comparisons that were written down.
      conclusion: in words.
    """

    name: str
    n: int
    difference: float = math.nan
    interval: float = math.nan
    t: float = math.nan
    flips: float = math.nan
    corrected: float = math.nan
    conclusion: str = ""


def compare(sweep: str, groups: Sequence[Group]) -> list[Comparison]:
    """The comparisons that were written down for a sweep; [] if there are none with two seeds.

    Pairs are runs of the same seed. Comparisons that have not been run count in the correction.
    """
    places = {}
    for group in groups:
        place = tuple(value for key, value in group.axes.items() if key != "kind")
        places.setdefault(place, {})[group.axes.get("kind")] = group
    pairs = COMPARISONS.get(sweep.partition("_x_")[0], ())
    found = [_compared(place, *pair) for place in places.values() for pair in pairs]
    corrected = holm([1.0 if math.isnan(one.t) else one.t for one in found])
    for number, (one, p) in enumerate(zip(found, corrected, strict=True)):
        if not math.isnan(one.t):
            conclusion = "no difference shown" if one.n >= FEWEST else f"open: n < {FEWEST}"
            if one.n >= FEWEST and p < LEVEL:
                conclusion = "better" if one.difference > 0 else "worse"
            found[number] = dataclasses.replace(one, corrected=p, conclusion=conclusion)
    return found if any(one.n > 1 for one in found) else []


def _compared(groups, first, second) -> Comparison:
    """One comparison, before the correction; `groups` are those of one place by kind."""
    place = next(iter(groups.values())).label("kind")
    name = f"{say(first)} − {say(second)}" + (f", {place}" if place else "")
    by_seed = [{run.sweep["seed"]: run for run in groups[kind].runs} for kind in (first, second)
               if kind in groups]  # fmt: skip
    seeds = sorted(by_seed[0].keys() & by_seed[1].keys()) if len(by_seed) == 2 else []
    pairs = [[runs[seed] for runs in by_seed] for seed in seeds]
    for pair in pairs:
        of = [origin(run.name, run.result) for run in pair]
        alike = [{k: v for k, v in one.items() if not k.startswith(OWN)} for one in of]
        if others := differences(dict(zip((first, second), alike, strict=True))):
            return Comparison(name, len(seeds), conclusion=f"not compared: {others}")
    if len(pairs) < 2:
        return Comparison(name, len(pairs), conclusion=f"open: n = {len(pairs)}")
    values = [[run.measures["accuracy"] for run in runs] for runs in zip(*pairs, strict=True)]
    points = (100 * np.subtract(*values)).tolist()
    spread = statistics.fmean(points), half_width(points)
    return Comparison(name, len(pairs), *spread, t_test(*values), sign_flips(*values))
