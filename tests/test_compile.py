"""Figures of compiled steps against closed forms; programs that do not fit; bad input."""

import functools
import importlib.util
import json
import math
import os
import subprocess
import sys
import types

import jax
import pytest

from densejax import compile, models
from densejax.models import counts
from densejax.topology import compiled as steps
from densejax.topology import targets
from densejax.training import experiment
from tests import small
from tests.test_command_line import ROOT, command, one_line  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
DEVICES = 4
TINY = {"train__batch_size": 30 * DEVICES, "evaluate__batch_size": 32 * DEVICES}


def compiled(folder, topology, *flags):
    """What the real command says of the tiny network, in a process that starts JAX anew."""
    card = small.card(folder, **TINY)
    words = [sys.executable, "-m", "densejax.compile", f"--config={card}", "--format=json"]
    words += [f"--topology={topology}", *flags]
    environment = os.environ | small.ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
    answer = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    return json.loads(answer.stdout)


@pytest.fixture(scope="module")
def found():
    return steps.report(small.tiny(**TINY), f"cpu:{DEVICES}")


@pytest.fixture(scope="module")
def state():
    return experiment.build(small.tiny()).abstract_state


def size_of(tree):
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


# Channels whose statistics are taken: each block's input, its bottlenecks and its new maps.
CHANNELS = (8 + 16 + 4) + (6 + 16 + 4)
# Both moments forward, both sums backward; the gradient; pixels of each block; three metric sums
# and the number of images.
REDUCED = 4 * (2 * CHANNELS + 2 * CHANNELS + 2 + 3 + 1)


def test_what_is_reduced_is_the_gradient_and_the_statistics(found, state):
    assert found["collective_bytes"] == {"all-reduce": size_of(state.params) + REDUCED}
    assert found["evaluation"]["collective_bytes"] == {"all-reduce": 4 * 4}
    assert found["parameter_bytes"] == size_of(state.params)
    assert found["statistics_bytes"] == size_of(state.batch_stats)
    # Mean and variance wait for each other, as each layer does for the one before.
    forward, backward = 2 * 6, 6
    assert forward + backward < found["collectives"] <= forward + backward + 4


def test_arguments_are_the_state_and_a_share_of_the_batch(found, state):
    image = 8 * 8 + 4  # uint8 pixels and an int32 label
    assert found["argument_bytes"] == size_of(state) + 30 * image
    read = size_of((state.params, state.batch_stats))
    assert found["evaluation"]["argument_bytes"] == read + 32 * (image + 1)


def test_flops_are_six_per_multiply_add(found):
    network = models.create(small.tiny().model, 10)
    once = counts.of_network(network, (8, 8, 1))[1]
    assert found["network_flops"] == 30 * 6 * once
    pooled = 3 * 4 * 4 * 12 * 6  # evaluated without dropout, a transition pools before it is done
    assert found["evaluation"]["network_flops"] == 32 * 2 * (once - pooled)
    for step in (found, found["evaluation"]):
        assert not step["program_flops_are_void"]
        assert step["flops"] == pytest.approx(step["network_flops"], rel=0.1)


def test_every_figure_is_of_one_device(found):
    assert (found["devices"], found["global_batch"], found["images"]) == (4, 120, 30)
    for step in (found, found["evaluation"]):
        assert step["fits"] and step["unknown_loops"] == 0
        assert step["hbm_bytes"] >= step["argument_bytes"] + step["temp_bytes"] > 0
        assert step["bytes_accessed"] > step["argument_bytes"]
    table = steps.table(found)
    assert "global batch 120" in table and "wrong" not in table


class Fake:
    """A step that takes `fixed` bytes and `slope` more for each image; over `limit` it has none."""

    def __init__(self, fixed, slope, limit):
        self.fixed, self.slope, self.limit, self.tried = fixed, slope, limit, []

    def lower(self, state, batch):
        images = batch["label"].shape[0] // 4
        self.tried.append(images)
        self.bytes = self.fixed + self.slope * images
        return self

    def compile(self):
        if self.bytes > self.limit:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory in hbm")
        return types.SimpleNamespace(memory_analysis=lambda: self)

    temp_size_in_bytes = property(lambda self: self.bytes)
    argument_size_in_bytes = output_size_in_bytes = alias_size_in_bytes = 0
    generated_code_size_in_bytes = 0


@pytest.fixture
def fake(monkeypatch):
    step = Fake(fixed=1000, slope=10, limit=5000)
    monkeypatch.setattr(experiment.Experiment, "map", lambda *arguments, **options: step)
    return step


@pytest.mark.parametrize(
    "images, largest, tried",
    [(64, 384, [128, 384]), (1600, 400, [800, 400, 192])],
    ids=["fits", "too many"],
)
def test_the_largest_batch_is_on_the_line_through_two(fake, images, largest, tried):
    built = experiment.build(small.tiny())
    used = 1000 + 10 * images
    found = steps.largest_batch(built, 5000, images, used if used <= 5000 else math.inf)
    assert (found, fake.tried) == ((largest, True), tried)
    fake.limit = 3000  # the compiler's own idea of the memory is smaller than what is published
    assert steps.largest_batch(built, 5000, 64, 1640) == (384, False)


@pytest.mark.parametrize("refuses", [False, True])
def test_the_largest_batch_is_far_below_the_known_one(fake, refuses):
    fake.limit = 1500 if refuses else 5000
    for images, accumulate, largest, tried in ((128, 1, 32, [64, 32]), (96, 3, 48, [48])):
        built = experiment.build(
            small.tiny(train__batch_size=240, train__accumulate_steps=accumulate)
        )
        used, fake.tried = math.inf if refuses else 1000 + 10 * images, []
        assert steps.largest_batch(built, 1500, images, used) == (largest, True)
        assert fake.tried == tried


def test_the_largest_batch_where_there_is_no_line(fake):
    built = experiment.build(small.tiny())
    assert steps.largest_batch(built, 5000, 1, 1010) == (400, True)  # half an image is none
    fake.limit = 1010
    assert steps.largest_batch(built, 5000, 1, 1010) == (1, True)
    fake.limit, fake.slope = 5000, 0
    assert steps.largest_batch(built, 5000, 64, 1000) == (128, True)


def test_out_of_memory_is_an_answer(fake, command, monkeypatch, tmp_path):  # noqa: F811
    fake.limit = 0
    monkeypatch.setattr(targets.Target, "devices", lambda *_: jax.devices())
    card = small.card(tmp_path)
    run = functools.partial(command, f"--config={card}", "--topology=h100:4", main=compile.main)
    code, output, error = run("--largest_batch")
    assert (code, error) == (0, "")
    assert "64 DO NOT FIT" in output and "0 images: does not fit" in output
    found = json.loads(run("--format=json")[1])
    assert not found["fits"] and not found["evaluation"]["fits"]


@pytest.mark.parametrize(
    "flags, says",
    [
        ([], "topology '': give a device and a shape of cpu:1, h100:1, v5e:2x2"),
        (["--topology=v9:4"], "topology 'v9:4': give a device and a shape of cpu:1, h100:1, v5e"),
        (["--topology=cpu:3"], "train.batch_size = 256: must be a multiple of 3"),
        (
            ["--topology=cpu:2", "--largest_batch"],
            "--largest_batch: the memory of a cpu is not known",
        ),
        (["--topology=cpu:2", "--config.parallel.mode=pmap"], "parallel.mode = 'pmap': only"),
        (["--topology=cpu:2", "--config.train.epochs=0"], "train.epochs = 0: allowed is"),
    ],
)
def test_bad_input_is_one_line(command, tmp_path, flags, says):  # noqa: F811
    card = f"--config={small.card(tmp_path)}"
    assert one_line(command(card, *flags, main=compile.main)).startswith(says)


@pytest.mark.slow
def test_the_real_command_forces_the_devices_of_a_cpu(tmp_path, found):
    others = compiled(tmp_path, "cpu:8", "--config.train.batch_size=240")
    assert others["collective_bytes"] == found["collective_bytes"]
    assert (others["devices"], others["images"]) == (8, 30)


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:2x4", "h100:8"])
def test_accelerators_reduce_the_same_and_take_their_own_branch(topology, tmp_path, state):
    extra = targets.target(topology.partition(":")[0]).compiler["platform"]
    if importlib.util.find_spec(targets.COMPILERS[extra]) is None:
        pytest.skip(f"needs the extra {extra!r}: pip install 'densejax-lab[{extra}]'")
    found = compiled(tmp_path, topology, "--config.train.dtype=bfloat16")
    assert found["collective_bytes"] == {"all-reduce": size_of(state.params) + REDUCED}
    assert found["convolutions"] >= 2 * 3  # in a CPU's branch, these 3x3 ones are products
    assert not found["program_flops_are_void"]
    assert 0 < found["efficiency"] < 1 and found["fits"]
