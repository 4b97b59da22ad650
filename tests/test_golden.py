"""A hundred steps of each family, pinned: numbers move only when somebody means to move them.

In float64, rounding stays far below `TOLERANCE` for all hundred steps, whatever the processor and
the version of XLA: what differs by more is another computation. Bits are compared on one machine,
in float64 and float32:

    python -m tests.test_golden record before.json    # at the commit before
    python -m tests.test_golden compare before.json   # at the commit after

Numbers that are meant to move: python -m tests.test_golden record tests/golden.json, with a line in
CHANGELOG.md that says which change moved them and why.
"""

import hashlib
import json
import pathlib
import sys

import jax
import numpy as np
import pytest

from densejax import models
from densejax.runs import workdir
from densejax.training import metrics
from densejax.training.step import train_step
from tests import small

FILE = pathlib.Path(__file__).parent / "golden.json"
STEPS = 100
DTYPES = ("float64", "float32")
TOLERANCE = 1e-10  # of each loss; 4 devices, or AVX2 for AVX-512, move it by less than 1e-15
NETWORKS = {
    "dense, in place": lambda: models.fields(
        "densenet_bc_40_12", depth=None, blocks=(2, 1), growth_rate=4, dropout_rate=0.2
    ),
    "dense, one shot": lambda: models.fields(
        "densenet_one_shot_40_20", depth=None, blocks=(2, 1), growth_rate=4, survival=0.8
    ),
    "residual": lambda: models.fields("resnet20_cifar", blocks=(1, 1), widths=(4, 8)),
    "plain": lambda: models.fields("plain20_cifar", blocks=(1, 1), widths=(4, 8)),
    "vovnet": lambda: models.fields(
        "vovnet39",
        **{"modules": (1, 1), "widths": (4, 4), "output_widths": (8, 8)},
        **{"stem_widths": (4, 4, 4), "module_depth": 2},
    ),
    "rdnet": lambda: models.fields(
        "rdnet_cifar",
        **{"stem_width": 8, "stem_stride": 2, "growth_rates": (8, 8), "stage_depth": 1},
        **{"downsampling": (2,), "kernel_size": 3, "squeeze_excite_from": 2},
        **{"layer_scale": 1.0, "drop_path": 0.2},
    ),
    "hardnet": lambda: models.fields(
        "hardnet68",
        **{"stem_widths": (4, 4), "blocks": (4, 2), "growth_rates": (4, 4), "downsampling": ()},
        **{"output_widths": (8, 8), "dropout_rate": 0.1},
    ),
}


def run(name, dtype, devices=1):
    """The loss of each step, and the digest of every bit of the last state."""
    config = small.tiny(
        model=NETWORKS[name](),
        augmentation__shift=1,
        train__dtype=dtype,
        train__batch_size=32,
        train__epochs=3,  # of 44 steps; the rate drops at steps 66 and 99
        optimizer__warmup_epochs=0.5,
        log__every_steps=1,
    )
    with jax.enable_x64(dtype == "float64"), jax.numpy_dtype_promotion("standard"):
        experiment = small.build(config, devices)
        step, state = experiment.map(train_step, donate=True), experiment.init()
        losses = []
        for number in range(STEPS):
            state, sums = step(state, experiment.data.train.batch(number))
            losses.append(sums)
        losses = [metrics.means(sums)["loss"] for sums in losses]
    bits = b"".join(array.tobytes() for _, array in sorted(small.named(state).items()))
    return {"losses": losses, "state_sha256": hashlib.sha256(bits).hexdigest()}


def machine():
    """What bits depend on."""
    cpu = pathlib.Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    names = {line.partition(": ")[2] for line in lines if line.startswith("model name")}
    return {"processor": ", ".join(names), **workdir.versions()}


def record():
    """Everything that is pinned."""
    found = {f"{name}, {dtype}": run(name, dtype) for name in NETWORKS for dtype in DTYPES}
    return {"machine": machine(), "runs": found}


SLOW = ("dense, one shot", "plain")  # others have the same code: "dense, in place", "residual"


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in NETWORKS]
)
def test_a_hundred_steps_are_as_they_were(name):
    then = json.loads(FILE.read_text())["runs"][f"{name}, float64"]["losses"]
    np.testing.assert_allclose(
        run(name, "float64")["losses"],
        then,
        rtol=TOLERANCE,
        atol=0,
        err_msg="Numbers have moved. If the change is meant to move them, say why in CHANGELOG.md "
        "and run: .venv/bin/python -m tests.test_golden record tests/golden.json",
    )
    assert then[-1] < 0.9 * then[0]  # it has learned, with every part at work


def test_what_is_pinned_is_every_network_in_full():
    pinned = json.loads(FILE.read_text())["runs"]
    assert pinned.keys() == {f"{name}, {dtype}" for name in NETWORKS for dtype in DTYPES}
    families = {NETWORKS[name]().family for name in NETWORKS}
    assert families == set(models.FAMILIES)
    assert all(len(set(one["losses"])) == STEPS for one in pinned.values())


def main(action, file):
    """Writes or compares every bit; returns the exit code."""
    now = record()
    if action == "record":
        pathlib.Path(file).write_text(json.dumps(now, indent=1) + "\n")
        return 0
    then = json.loads(pathlib.Path(file).read_text())
    moved = workdir.difference(then["machine"], now["machine"])
    print("machine and versions:", "; ".join(moved) or "the same")
    for name, old in then["runs"].items():
        new = now["runs"][name]
        pairs = zip(old["losses"], new["losses"], strict=True)
        steps = [number for number, (a, b) in enumerate(pairs, 1) if a != b]
        same = "every bit is the same" if old == new else "the states differ"
        print(f"{name}: {f'losses differ from step {steps[0]} on' if steps else same}")
    return int(then["runs"] != now["runs"])


if __name__ == "__main__":
    import tests.conftest  # noqa: F401  (the session's devices)

    sys.exit(main(*sys.argv[1:]))
