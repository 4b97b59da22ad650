"""Intervals and tests against published numbers, and what a report says of the comparisons."""

import math
import types

import comparisons
import pytest
import sweep_runs

# Darwin's pairs of maize, crossed less self-fertilised, in eighths of an inch.
MAIZE = (49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48)


def test_fishers_tests_of_darwins_maize():
    """The Design of Experiments, sections 17 and 21: t = 2.148, and 1,726 of 32,768 signs."""
    zeros = [0] * len(MAIZE)
    assert comparisons.sign_flips(MAIZE, zeros) == pytest.approx(1726 / 32768, abs=1e-12)
    assert comparisons.t_test(MAIZE, zeros) == pytest.approx(0.0497, abs=5e-5)
    # The mean is 20.93 with a standard error of 9.746; Student's t of 14 degrees is 2.145.
    assert sweep_runs.half_width(MAIZE) == pytest.approx(2.145 * 9.746, rel=1e-3)


def test_holms_correction():
    """By hand: times 3, 1, 2 and 4, the smallest p times 4, and none below the one before it."""
    assert comparisons.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert comparisons.holm([0.9, 0.8]) == [1.0, 1.0]
    assert comparisons.holm([]) == []


def test_without_variance_there_is_no_test():
    assert comparisons.t_test([0.5, 0.6], [0.4, 0.5]) == 1.0
    assert math.isnan(sweep_runs.half_width([0.5]))


def group(kind, accuracies, **versions):
    """A group of runs with seeds from 0, as far as `compare` looks at it."""
    result = {"versions": {"code": "a"} | versions, "config": {"optimizer": {"momentum": 0.9}}}
    runs = [
        types.SimpleNamespace(
            name=f"{kind}{seed}", sweep={"seed": seed}, measures={"accuracy": value}, result=result
        )
        for seed, value in enumerate(accuracies)
    ]
    return types.SimpleNamespace(runs=runs, axes={"kind": kind}, label=lambda without: "")


def test_better_is_said_of_what_eight_seeds_show():
    noise = [0.001 * (-1) ** n * (n % 3) for n in range(8)]
    groups = [group("dense", [0.9 + one for one in noise])]
    groups += [group("residual", [0.8 - one for one in noise])]
    groups += [group("exponential", [0.9 - one for one in noise])]
    groups += [group("one_shot", [0.95 - one for one in noise])]
    groups += [group("weighted", [0.5 - one for one in noise], code="b")]
    found = comparisons.compare("patterns", groups)
    said = {one.name: one.conclusion for one in found}
    assert said["dense − residual"] == "better" and said["dense − one-shot"] == "worse"
    assert said["dense − exponential"] == "no difference shown"
    refused = "not compared: weighted (code b) against residual (code a)"
    assert said["weighted − residual"] == refused
    first = found[0]
    assert (first.n, first.difference) == (8, pytest.approx(100 * (0.1 + 2 * sum(noise) / 8)))
    # Four were written down: the smallest p, of whichever, is multiplied by all of them.
    smallest = min((one for one in found if one.n == 8 and one.t == one.t), key=lambda one: one.t)
    assert smallest.corrected == pytest.approx(4 * smallest.t)
    assert comparisons.compare("train_size", groups) == []
    few = [group("dense", [0.9, 0.8]), group("exponential", [0.7, 0.5])]
    said = {one.name: one.conclusion for one in comparisons.compare("patterns", few)}
    assert said["dense − exponential"] == "open: n < 8"
    assert said["dense − one-shot"] == "open: n = 0"
