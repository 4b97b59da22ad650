"""The benchmarks' parts: who is measured, in which order, and what is made of the figures."""

import argparse
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import compare
import jax
import loader
import memory_by_depth
import networks
import pytest
import startup
import traffic
import turns

import densejax
from densejax.config import UserError
from densejax.models import counts
from experiments import script

ROOT = pathlib.Path(densejax.__file__).parents[1]
BENCHMARKS = ROOT / "experiments" / "benchmarks"

DENSE = networks.Work("densenet_bc_40_12", 2, fields={"depth": 10})


def test_implementations_and_their_processes():
    def expand(text, recompute="none"):
        return compare.expand(text, DENSE, recompute)

    assert expand("in_place,flax") == ["in_place", "flax"]
    assert expand("in_place,concat:block", "layer") == ["in_place:layer", "concat:block"]
    assert expand("torchvision") == ["torchvision:nchw", "torchvision:channels_last"]
    assert expand("torch_compile:nchw,keras") == ["torch_compile:nchw", "keras"]
    assert networks.changes("densejax", "resnet50") == {}
    assert networks.changes("concat", "densenet121") == {"block": "concat", "recompute": "none"}


@pytest.mark.parametrize(
    "text, model, message",
    [
        ("fast", "densenet121", "'fast' is unknown; allowed are densejax"),
        ("torchvision:nhwc", "densenet121", "'torchvision:nhwc' is unknown"),
        ("in_place:all", "densenet121", "in_place:all: 'all' is no recompute; allowed are none"),
        ("in_place", "resnet50", "in_place: resnet50 has no dense block"),
        ("flax,flax", "densenet121", "names one twice"),
    ],
)
def test_what_is_no_implementation(text, model, message):
    with pytest.raises(UserError, match=message):
        compare.expand(text, networks.Work(model, 2))


class Fake:
    """A child that takes as long as it is told, and writes down that it was asked."""

    def __init__(self, name, log, seconds):
        self.name, self.log, self.seconds = name, log, iter(seconds)

    def ask(self, steps):
        self.log.append((self.name, steps))
        return {"seconds_per_step": next(self.seconds)}


def test_children_take_turns():
    log = []
    children = {"a": Fake("a", log, [1, 2]), "b": Fake("b", log, [3, 4])}
    answers = turns.alternate(children, rounds=2, steps=5)
    assert log == [("a", 5), ("b", 5), ("a", 5), ("b", 5)]
    assert [answer["seconds_per_step"] for answer in answers["b"]] == [3, 4]


CHILD = """
import itertools, os, sys, time
channel = os.dup(1)
sys.path.insert(0, {path!r})
from turns import Unavailable, serve

def build(spec):
    print("noise of a compiler")
    if spec["what"] == "missing":
        import no_such_module
    if spec["what"] == "refused":
        raise Unavailable("not today")
    if spec["what"] == "dead":
        sys.exit(3)
    if spec["what"] == "noisy":
        os.write(channel, b"hello\\n")
    # Two steps come before the first turn; then each third one is the first of a turn.
    seconds = itertools.cycle([0.05, 0.05, 2.0])
    return {{"device": spec["what"]}}, lambda: time.sleep(next(seconds)) or (lambda: None)

serve(build)
"""


@pytest.fixture
def command(tmp_path):
    script = tmp_path / "child.py"
    script.write_text(CHILD.format(path=str(BENCHMARKS)))
    return [sys.executable, str(script)]


def test_a_process_answers_and_waits_idly_and_the_first_step_of_a_turn_is_not_timed(command):
    child = turns.Process(command, {"what": "works"})
    assert child.facts == {"device": "works"}
    answers = [child.ask(2) for _ in range(2)]
    child.close()
    for answer in answers:
        assert 0.05 <= answer["seconds_per_step"] < 1.0
        assert answer["idle_processor_seconds"] < 0.05 < answer["idle_seconds"]
        assert answer["peak_rss_bytes"] > 2**20


@pytest.mark.parametrize(
    "what, why",
    [
        ("missing", "no_such_module is not installed"),
        ("refused", "not today"),
        ("dead", "its process ended with code 3"),
        ("noisy", "it is no process of a benchmark: it said 'hello"),
    ],
)
def test_a_process_that_cannot_be_measured_says_why(command, what, why):
    with pytest.raises(turns.Unavailable, match=why):
        turns.Process(command, {"what": what})


def answer(seconds, idle=0.0):
    return {
        "seconds_per_step": seconds,
        "peak_rss_bytes": 3 * 2**20,
        "idle_seconds": 2.0,
        "idle_processor_seconds": idle,
    }


def rows():
    facts = {"device": "1 x cpu", "versions": {"jax": "1"}}
    torch = {"device": "1 x cpu", "versions": {"torch": "2"}}
    return [
        compare.row("in_place", facts, [answer(s) for s in (3, 1, 2)], batch_size=8),
        compare.row("flax", facts, [answer(4, idle=9), answer(4), answer(5, idle=1)], 8),
        compare.row("torchvision:nchw", torch, [answer(2.5)], 8),
        compare.row("torchvision:channels_last", torch, [answer(1.6)], 8),
    ]


def test_a_row_is_the_median_of_all_turns(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2}, raising=False)
    ours, flax, *_ = rows()
    assert ours["cores"] == 3  # those that the process may use
    assert (ours["seconds_per_step"], ours["images_per_second"]) == (2, 4)
    assert ours["tries"] == [3, 1, 2]
    assert (ours["compile_seconds"], ours["temp_bytes"]) == (None, None)
    assert flax["idle_cores"] == 0.25  # what was used before the first turn is building


def test_of_torch_the_better_layout_counts():
    *_, torch = compare.best_layouts(rows())
    assert (torch["implementation"], torch["layout"]) == ("torchvision", "channels_last")
    assert torch["layouts"] == {"nchw": 2.5, "channels_last": 1.6}
    assert compare.best_layouts(rows()[::-1])[0]["layout"] == "channels_last"


def test_implementations_must_compute_the_same(capsys):
    ours = {"loss": [2.0], "gradient": [1.0, 3.0]}
    compare.check({"ours": ours, "flax": {"loss": [2.001], "gradient": [1.001, 3.0]}})
    lines = capsys.readouterr().err.splitlines()
    assert lines[2:] == ["flax: loss 5.0e-04 from ours's", "flax: gradient 3.3e-04 from ours's"]
    nan, inf = float("nan"), float("inf")
    for change in (
        *({"loss": [2.01]}, {"loss": [nan]}, {"loss": [inf]}),
        *({"gradient": [1.1, 3.0]}, {"gradient": [1.0]}, {"gradient": [3.0, 1.0]}),
    ):
        message = rf"^flax \({next(iter(change))}\): more than 0.001 from ours"
        with pytest.raises(compare.Different, match=message):
            compare.check({"ours": ours, "same": ours, "flax": ours | change})


def test_a_python_without_torch_says_so():
    if importlib.util.find_spec("torch"):
        pytest.skip("torch is installed")
    command = [sys.executable, BENCHMARKS / "torch_child.py"]
    with pytest.raises(turns.Unavailable, match="^torch is not installed$"):
        turns.Process(command, {})


def test_the_table_compares_with_torch_and_flax():
    lines = compare.text(compare.best_layouts(rows()), "title").splitlines()
    assert lines[1].startswith("1 x cpu") and lines[1].endswith("jax 1, torch 2")
    assert lines[3].split()[:7] == ["in_place", "2", "1", "to", "3", "1.25", "0.50"]
    assert lines[5].split()[:6] == ["torchvision", "(channels_last)", "1.6", "1.6", "to", "1.6"]


def test_plain_variables_keep_every_leaf():
    ours = {"params": {"block1": {"layer1": {"norm1": {"scale": 1}}}, "norm": {"bias": 2}}}
    expected = {"params": {"block1_layer1_norm1": {"scale": 1}, "norm": {"bias": 2}}}
    assert networks.plain_variables(ours) == expected


def test_growth_of_powers():
    for power in (1, 2):
        slope, ratio = memory_by_depth.growth((d, 7 * d**power) for d in (40, 100, 160, 250))
        assert slope == pytest.approx(power) and ratio == pytest.approx(2.5**power)
    assert memory_by_depth.growth([(40, 5)]) == (None, None)


def test_memory_by_depth_goes_on_where_it_stopped(tmp_path, monkeypatch):
    compiled = []

    def compile_one(work, name, target):
        compiled.append((name, work.fields["depth"]))
        if len(compiled) == 3:
            raise KeyboardInterrupt
        return {"temp_bytes": work.fields["depth"] ** 2, "compile_seconds": 0}

    monkeypatch.setattr(memory_by_depth, "compile_one", compile_one)
    options = argparse.Namespace(
        output=str(tmp_path / "memory.json"),
        target="cpu",
        batch_size=4,
        dtype="float32",
        depths=[10, 16],
        implementations="concat,in_place",
    )
    with pytest.raises(KeyboardInterrupt):
        memory_by_depth.measure(options)
    found = memory_by_depth.measure(options)
    assert compiled == [("concat", 10), ("in_place", 10), *2 * [("concat", 16)], ("in_place", 16)]
    assert [row["temp_bytes"] for row in found] == [100, 100, 256, 256]
    assert memory_by_depth.by_name(found)["concat"] == [(10, 100), (16, 256)]
    assert "2.00" in memory_by_depth.text(found, "title")
    options.batch_size = 8
    memory_by_depth.measure(options)
    assert len(compiled) == 9


@pytest.mark.filterwarnings("ignore::DeprecationWarning:matplotlib|pyparsing")
def test_memory_by_depth_draws(tmp_path):
    pytest.importorskip("matplotlib")
    found = [
        {"implementation": name, "depth": depth, "temp_bytes": 2**20 * depth**power}
        for name, power in (("in_place", 1), ("concat", 2))
        for depth in (40, 100)
    ]
    memory_by_depth.draw(found, "title", str(tmp_path / "memory.png"))
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")


def test_recomputed_multiply_adds():
    """One dense layer per block, L = 10: c_in -> 48 by 1x1, 48 -> 12 by 3x3."""
    sizes = ((1024, 24), (256, 18), (64, 15))
    pointwise = sum(size * width * 48 for size, width in sizes)
    everything = sum(size * (width * 48 + 9 * 48 * 12) for size, width in sizes)
    for name, expected in {
        "concat": 0,
        "concat:norm": 0,
        "concat:layer": pointwise,
        "in_place:layer": pointwise,
        "in_place:block": everything,
    }.items():
        assert counts.recomputed(DENSE.network(name), DENSE.image_shape) == expected


def test_what_transitions_leave_out():
    """Widths 24 + 12 -> 18 and 18 + 12 -> 15; three quarters of the pixels at 32x32 and 16x16."""
    left_out = 3 * (256 * 36 * 18 + 64 * 30 * 15)
    in_place = DENSE.network("in_place")
    assert counts.pooled_first(in_place, DENSE.image_shape, True) == left_out
    assert counts.pooled_first(DENSE.network("concat"), DENSE.image_shape, True) == 0
    random = in_place.clone(dropout_rate=0.2)  # of every pixel, before they are averaged
    assert counts.pooled_first(random, DENSE.image_shape, True) == 0
    assert counts.pooled_first(random, DENSE.image_shape, False) == left_out


@pytest.mark.slow
def test_traffic_of_a_small_step():
    work = networks.Work("densenet_bc_40_12", 4, dtype="bfloat16", fields={"depth": 10})
    with jax.numpy_dtype_promotion("standard"):  # as flax' pooling needs it
        for name in ("concat", "flax"):
            row = traffic.analyse(work, name, "cpu")
            assert not row["is_void"] and row["convolutions"] > 0
            if name == "flax":  # no loop is in it, whose body the compiler would count once
                assert row["bytes"] == pytest.approx(row["compiler_bytes"], rel=0.01)
            assert "VOID" not in traffic.text([row], work)
            assert "VOID" in traffic.text([row | {"is_void": True}], work)


def test_a_target_that_is_not_there():
    with pytest.raises(UserError, match="target = 'v9': allowed are"):
        networks.mesh("v9")


def run(script, *flags):
    return subprocess.run(
        [sys.executable, BENCHMARKS / script, *flags], capture_output=True, text=True, cwd=ROOT
    )


TINY = ["--model=densenet_bc_40_12", '--fields={"depth": 10}', "--batch_size=2", "--tries=2"]


@pytest.mark.slow
def test_training_steps_side_by_side():
    done = run("train_step.py", *TINY, "--implementations=in_place,flax", "--format=json")
    assert done.returncode == 0, done.stderr
    ours, flax = json.loads(done.stdout)
    assert (ours["implementation"], flax["implementation"]) == ("in_place", "flax")
    for row in (ours, flax):
        assert len(row["tries"]) == 2 and min(row["tries"]) > 0
        assert row["temp_bytes"] > 0 and row["compile_seconds"] > 0
    for quantity in ("loss", "gradient"):
        assert ours["check"][quantity] == pytest.approx(flax["check"][quantity], rel=1e-3)


@pytest.mark.slow
def test_inference_side_by_side_with_keras():
    done = run("inference.py", *TINY, "--implementations=densejax,keras", "--format=json")
    assert done.returncode == 0, done.stderr
    ours, keras = json.loads(done.stdout)
    assert ours["check"]["logits"] == pytest.approx(keras["check"]["logits"], rel=1e-3)


@pytest.mark.parametrize(
    "module, flags, message",
    [
        (None, ["--implementations=fast"], "--implementations: 'fast'"),
        (None, ["--torch_python=/no/python"], "--torch_python=/no/python: there is no"),
        (None, ["--fields=[1]"], "argument --fields: invalid fields value: '[1]'"),
        (None, ["--tries=0"], "argument --tries: invalid positive value: '0'"),
        (memory_by_depth, ["--output="], "argument --output: name a file or a folder"),
        (
            memory_by_depth,
            ["--output=a", "--depths=4,x"],
            "argument --depths: invalid depths value: '4,x'",
        ),
        (memory_by_depth, [f"--output={__file__}"], f"{__file__} is damaged"),
        (memory_by_depth, [f"--output={BENCHMARKS}"], f"{BENCHMARKS} cannot be read"),
        (
            traffic,
            ["--batch_size=-1"],
            "argument --batch_size: invalid positive value: '-1'",
        ),
        (startup, ["--tries=1", "--model=no"], "model = 'no': allowed are"),
        (loader, ["--images=0"], "argument --images: invalid positive value: '0'"),
    ],
)
def test_bad_input_is_one_line(module, flags, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["script.py", *flags])
    with pytest.raises(SystemExit) as ended:
        script.run(module.main if module else lambda: compare.main("train", "Doc.", {True: "flax"}))
    output = capsys.readouterr()
    assert (ended.value.code, output.out) == (2, "")
    assert output.err.startswith(f"densejax: {message}") and output.err.count("\n") == 1
