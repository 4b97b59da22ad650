"""Every sweep names runs once, of configurations that build; what is called equal is."""

import ast
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import pytest
import run as runner
import sweeps

import densejax
from densejax import models
from densejax.config import UserError
from densejax.models import connections, counts
from densejax.runs import files, lock, workdir
from densejax.training import experiment
from tests import small

ROOT = pathlib.Path(densejax.__file__).parents[1]

# How ml_collections loads a card.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
SLOW = ("depth_width", "degradation", "patterns_equal_parameters")
# Few layers, which a trace takes long for, and many widths, which it does not.
CHANGES = {"model__blocks": (1, 1), "model__growth_rate": 48, "model__dropout_rate": 0.0}


@pytest.fixture(scope="module")
def base():
    return sweeps.Base(small.tiny(**CHANGES))


@pytest.fixture
def card(tmp_path):
    """A card that takes another network by its argument, as those of configs/ do."""
    path = tmp_path / "card.py"
    path.write_text(
        "from densejax import models\nfrom tests import small\n\n\n"
        "def get_config(arg=None):\n"
        f"    config = small.tiny(**{CHANGES!r})\n"
        "    if arg:\n"
        "        config.model = models.fields(arg.removeprefix('model='))\n"
        "    return config\n"
    )
    return path


def read(run, card):
    """The configuration of a run, as its command line has it."""
    model = f":model={run.model}" if run.model else ""
    overrides = [f"--config.{key}={value}" for key, value in run.overrides.items()]
    return runner.Work(run, None, (f"--config={card}{model}", *overrides)).config


@pytest.mark.parametrize(
    "sweep",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW))
        for name in sweeps.SWEEPS
        if name != "growth_rate_equal_multiply_adds"  # too small a network: tested below
    ],
)
def test_runs_of_a_sweep(sweep, base, card):
    found = list(sweeps.SWEEPS[sweep](base))
    assert len({run.name for run in found}) == len(found) > 1
    assert len({json.dumps(run.axes) for run in found}) == len(found)
    assert len({tuple(run.axes) for run in found}) == 1  # the columns of one table
    wanted = base.of(base.dense())
    for run in found:
        built = experiment.build(read(run, card))
        if run.mismatch is None:
            continue
        # What is called equal is, in the network that a run builds.
        counted = sweeps._counts(built.task.model, (8, 8, 1))
        shares = [found / wanted[what] - 1 for found, what in zip(counted, wanted, strict=True)]
        which = sweep == "patterns" or run.axes.get("equal") == "multiply_adds"
        allowed = 0.1 if run.name == "hardnet" else 0.02  # its widths are even
        assert run.mismatch == pytest.approx(shares[which]) and abs(run.mismatch) <= allowed


def test_widths_that_are_fast_on_a_cpu_are_the_nearest_to_those_of_equal_multiply_adds(base):
    equal = {run.axes["kind"]: run for run in sweeps.patterns(base) if run.model}
    found = {run.axes["kind"]: run for run in sweeps.patterns_equal_time(base)}
    assert found.keys() == {"dense", "residual", "laurel", "hyper", "weighted"}
    assert found.pop("dense").overrides == {}
    for kind, run in found.items():
        widths = (one.overrides["model.widths"] for one in (run, equal[kind]))
        assert all(
            new % 8 == 0 and (abs(new - old) <= 4 or new == 8)
            for new, old in zip(*widths, strict=True)
        )


def test_layers_make_up_for_the_growth_rate():
    sweep = sweeps.SWEEPS["growth_rate_equal_multiply_adds"]
    plain = CHANGES | {"model__growth_rate": 12, "model__bottleneck": False}
    base = sweeps.Base(small.tiny(**plain))
    narrow, same = sweep(base, values=(6, 12))
    assert same.mismatch == 0 and same.overrides == {}
    layers = narrow.overrides["model.blocks"]
    assert narrow.overrides["model.growth_rate"] == 6 and len(set(layers)) == 1

    def multiply_adds(layers, k):
        config = small.tiny(**plain | {"model__blocks": layers, "model__growth_rate": k})
        return counts.of_network(experiment.build(config).task.model, (8, 8, 1))[1]

    wanted = multiply_adds((1, 1), 12)
    off = {n: multiply_adds((n,) * 2, 6) / wanted - 1 for n in range(layers[0] - 1, layers[0] + 2)}
    assert narrow.mismatch == pytest.approx(off[layers[0]]) == min(off.values(), key=abs)
    with pytest.raises(UserError, match="growth rate 64: no number of layers comes within 20%"):
        list(sweep(base, values=(64,)))


def test_what_is_compared_is_a_pattern(base):
    adding = {sweeps.ADDING.get(name, name) for name in connections.ADDING}
    kinds = connections.CONCATENATING.keys() | adding
    assert len(kinds) == len(connections.CONCATENATING) + len(connections.ADDING)
    assert {kind for pair in sweeps.COMPARISONS["patterns"] for kind in pair} <= kinds


def test_values_of_a_sweep_and_axes_of_the_card():
    config = small.tiny(**CHANGES)
    found = sweeps.runs("growth_rate", config, seeds=1, values=sweeps.parse_values("6,18"))
    named = {run.name: run.axes["growth_rate"] for run in found}
    assert named == {"k6_seed0": 6, "k18_seed0": 18}
    axes = sweeps.parse_axes(["model.growth_rate=6,6,9", "model.connect=dense,window:size=2"])
    found = sweeps.runs(None, config, seeds=2, axes=axes)
    assert len({run.name for run in found}) == len(found) == 8
    assert found[7].name == "growth_rate=9_connect=window-size-2_seed1"
    assert found[7].axes == {"growth_rate": 9, "connect": "window:size=2", "seed": 1}
    changed = {"model.growth_rate": 9, "model.connect": "window:size=2", "seed": 1}
    assert found[7].overrides == changed
    assert sweeps.parse_axes(["model.blocks=(1,3),(2,2)"]) == {"model.blocks": [(1, 3), (2, 2)]}


def test_a_sweep_at_each_value_of_an_axis_is_equal_to_the_card_with_that_value():
    config = small.tiny(**CHANGES)
    axes = {"model.growth_rate": [32, 48], "train.batch_size": [128]}
    for run in sweeps.runs("growth_schedule", config, seeds=1, axes=axes):
        with config.ignore_type():
            config.model.growth_rate = run.overrides["model.growth_rate"]
        found = counts.of_network(experiment.build(config).task.model, (8, 8, 1))
        with config.ignore_type():
            config.model.growth_rate = run.axes["growth_rate"]
        wanted = counts.of_network(experiment.build(config).task.model, (8, 8, 1))
        which = ("parameters", "multiply_adds").index(run.axes["equal"])
        assert found[which] / wanted[which] - 1 == pytest.approx(run.mismatch, abs=1e-12)
        assert abs(run.mismatch) <= 0.02 and run.overrides["train.batch_size"] == 128
        point = f"{run.axes['schedule']}_equal_{run.axes['equal']}"
        assert run.name.startswith(f"{point}_growth_rate={run.axes['growth_rate']}_")


@pytest.mark.parametrize(
    "sweep, values, words, message",
    [
        ("variants", "6", [], "--values: for --sweep=growth_rate or .* or compression or dropout"),
        (None, "6", [], "--values: for --sweep="),
        (None, "", ["model.growht=6"], "--axis=model.growht: unknown key; allowed are model.b"),
        (None, "", ["depth=6"], "--axis=depth: unknown key; allowed are model.depth$"),
        (None, "", ["seed=1,2"], "--axis=seed=1,2: give each key once, .* --seeds is for seeds"),
        (None, "", ["train.epochs="], "--axis=train.epochs=: give each key once, with values"),
        (None, "", ["train.epochs=1", "train.epochs=2"], "give each key once"),
        ("growth_rate", "", ["model.growth_rate=6"], "--axis: the sweep varies growth_rate itself"),
        ("growth_rate", "", ["model.compression=2.0"], "model.compression = 2.0: "),
    ],
)
def test_axes_that_cannot_be(sweep, values, words, message):
    with pytest.raises(UserError, match=message):
        values, axes = sweeps.parse_values(values), sweeps.parse_axes(words)
        sweeps.runs(sweep, small.tiny(**CHANGES), 1, values, axes)


@pytest.mark.slow
def test_depths_are_those_of_networks_as_they_are_built(monkeypatch):
    """Three blocks of n: 6n + 2 layers with weights, in a DenseNet-BC 6n + 4."""

    def equal(base, kind):  # the search for widths, which depths do not depend on
        return base.network(kind, (4, 8, 16), (3, 3, 3)), 0.0

    monkeypatch.setattr(sweeps.Base, "_equal", equal)
    config = small.tiny(**CHANGES | {"model__blocks": (1, 1, 1), "model__growth_rate": 12})
    found = sweeps.degradation(sweeps.Base(config))
    depths = {"plain": (20, 32, 56), "residual": (20, 32, 56), "dense": (22, 34, 58)}
    names = {f"{kind}{depth}" for kind in depths for depth in depths[kind]}
    assert {run.name for run in found} == names


def test_the_kinds_differ_in_how_they_are_joined(base, card):
    networks = {
        run.axes["kind"]: experiment.build(read(run, card)).task.model
        for run in sweeps.connectivity(base)
        if run.axes["equal"] != "multiply_adds"
    }
    joins = {kind: network.connect for kind, network in networks.items()}
    assert joins == {"plain": "chain", "residual": "add", "dense": "dense", "one_shot": "one_shot"}
    assert networks["plain"].widths == networks["residual"].widths
    # Two layers of two convolutions each, in every kind.
    assert networks["dense"].block_depths() == networks["plain"].blocks == (1, 1)
    assert networks["one_shot"].block_depths() == (2, 2)


def test_few_images_are_seen_as_often(base, card, monkeypatch):
    monkeypatch.setattr(base, "steps", 100)  # 20 epochs
    monkeypatch.setattr(base, "train_images", 1437)
    monkeypatch.setattr(base.config.evaluate, "train_images", 1000)
    found = {run.axes["train_size"]: read(run, card) for run in sweeps.train_size(base)}
    assert sorted(found) == [500, 1437]
    assert found[500].train.epochs == 100  # one batch of 256 in each
    assert experiment.build(found[500]).steps == 100
    # As many steps of warm-up and between two checkpoints as the card has, whose epoch has five.
    assert (found[500].optimizer.warmup_epochs, found[500].checkpoint.every_epochs) == (2.5, 5)
    assert found[500].data.train_size == 500 and found[1437].data.train_size == 0
    assert found[500].evaluate.train_images == 500


def test_no_set_is_smaller_than_a_batch():
    base = sweeps.Base(small.tiny(**CHANGES, train__batch_size=600))
    assert {run.axes["train_size"] for run in sweeps.train_size(base)} == {base.train_images}


def test_a_cutout_of_about_half_a_side_is_even(base, monkeypatch):
    monkeypatch.setattr(base, "image_shape", (14, 14, 1))
    cutouts = [run.overrides.get("augmentation.cutout") for run in sweeps.recipe(base)]
    assert [size for size in cutouts if size] == [6]


def test_test_images_choose_no_learning_rate(base, card):
    for run in sweeps.learning_rate(base):
        config = read(run, card)
        assert (config.evaluate.split, config.evaluate.final_split) == ("validation",) * 2
        assert config.data.validation_size == 106
        assert config.optimizer.learning_rate == run.axes["learning_rate"]


def test_a_sweep_starts_from_a_densenet():
    config = small.tiny()
    config.model = models.fields("resnet20_cifar")
    with pytest.raises(UserError, match="model.family = 'resnet': a sweep starts from a DenseNet"):
        sweeps.Base(config)


def test_what_cannot_be_equal_is_said(base):
    def doubled(widths):  # one width, of which each changes the count by much
        return base.dense(growth_rate=100 * widths[0])

    with pytest.raises(UserError, match="no widths near these come within 2%"):
        base.search(doubled, (1,), "parameters")


STUB = """
import json, pathlib, sys, time
path, log = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
with log.open("a") as file:
    file.write(path.name + "\\n")
time.sleep(0.2)
latest = time.monotonic() + 10
together = (path.parent / "all at once").exists()
if path.name in sys.argv[4:]:
    while together and len(list(path.parent.glob("*/summary.json"))) < 5:  # it fails last
        if time.monotonic() > latest:
            sys.exit("it is alone")
        time.sleep(0.05)
    sys.exit("the disk is on fire")
if (path.parent / f"{path.name} diverges").exists():
    sys.exit(3)
while together and len(log.read_text().split()) < 6:
    if time.monotonic() > latest:
        sys.exit("it is alone")
    time.sleep(0.05)
summary = {"config": json.loads(sys.argv[3]), "test_accuracy": 0.5, "test_examples": 360}
summary["versions"] = {"code": pathlib.Path(sys.argv[2] + ".code").read_text(), "data": "d"}
summary["changes"] = []
(path / "summary.json").write_text(json.dumps(summary))
"""


@pytest.fixture
def sweep(tmp_path, card, monkeypatch):
    """(six runs of a sweep, the file where each start is noted, names that are to fail).

    Their command is a stub: what is tested is who starts what.
    """
    log, failing = tmp_path / "log", []
    (tmp_path / "log.code").write_text(workdir.code_digest())
    monkeypatch.setattr(runner, "data_version", lambda config: "d")

    def command(work):
        facts = (str(work.path), str(log), work.config.to_json())
        return [sys.executable, "-S", "-c", STUB, *facts, *failing]

    monkeypatch.setattr(runner.Work, "command", property(command))
    monkeypatch.setattr(runner, "POLL", 0.05)
    works = [
        runner.Work(
            sweeps.Run(f"n{n}_seed0", {"n": n, "seed": 0}, {}),
            runner.epath.Path(tmp_path / "variants" / f"n{n}_seed0"),
            (f"--config={card}",),
        )
        for n in range(6)
    ]
    return works, log, failing


def test_workers_share_a_sweep(sweep, capsys):
    works, log, _ = sweep
    codes = []
    threads = [
        threading.Thread(target=lambda: codes.append(runner.Worker(works).work())) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == [0, 0, 0]
    assert sorted(log.read_text().split()) == [f"n{n}_seed0" for n in range(6)]
    assert "variants: 6 of 6 runs are finished" in capsys.readouterr().out
    facts = json.loads((works[3].path / "sweep.json").read_text())
    assert (facts["sweep"], facts["run"], facts["seed"]) == ("variants", "n3_seed0", 0)
    assert facts["axes"] == {"n": 3, "seed": 0} and str(works[3].path) in facts["command"]
    runner.Worker(works).work()  # what is finished is skipped, also what was just finished
    assert runner.Worker(works).attempt(works[0])
    assert len(log.read_text().split()) == 6
    assert {work.path.stat().mode & 0o777 for work in works} == {0o700}
    assert not list(works[0].path.parent.glob("*/claim"))


def test_workers_of_one_process_run_at_the_same_time(sweep, capsys, monkeypatch):
    works, log, failing = sweep
    failing.append("n4_seed0")
    works[0].path.parent.mkdir()
    (works[0].path.parent / "all at once").touch()
    handlers = {}
    monkeypatch.setattr(runner.signal, "signal", handlers.__setitem__)
    assert runner.work_together(works, 6) == 1
    assert len(handlers) == 2
    assert sorted(log.read_text().split()) == [f"n{n}_seed0" for n in range(6)]
    out, err = capsys.readouterr()
    assert out.count("5 of 6 runs are finished; n4_seed0: failed") == 1
    assert err.count("failed: n4_seed0: exit code 1, the disk is on fire") == 1


def test_a_run_that_diverges_is_not_tried_again(sweep, capsys):
    works, log, _ = sweep
    works[2].path.parent.mkdir()
    (works[2].path.parent / "n2_seed0 diverges").touch()
    assert runner.Worker(works).work() == 0
    assert "n2_seed0: diverged" in capsys.readouterr().out
    assert runner.Worker(works).work() == 0
    assert len(log.read_text().split()) == 6
    (log.parent / "log.code").write_text("newer")
    facts = json.loads((works[2].path / "sweep.json").read_text())
    (works[2].path / "sweep.json").write_text(json.dumps(facts | {"diverged": "older"}))
    assert [work.run.name for work in runner.Worker(works).left()] == ["n2_seed0"]


def test_a_result_of_other_code_is_refused_until_it_is_measured_again(sweep, capsys):
    works, log, _ = sweep
    code = log.parent / "log.code"
    code.write_text("older")
    path = works[0].path
    assert runner.Worker(works[:1]).work() == 1  # what it has just written is not of today's code
    assert not works[0].is_finished() and works[0].state() == "waiting"
    summary = json.loads((path / "summary.json").read_text())
    capsys.readouterr()
    assert runner.Worker(works[:2]).work() == 1
    output = capsys.readouterr()
    (line, _) = output.err.splitlines()
    assert line.startswith(f"failed: n0_seed0: {path}: its result is of other code, data ")
    assert "versions.code" in line and "--resume=force" in line and "--workdir" not in line
    assert log.read_text().split() == ["n0_seed0", "n1_seed0"]  # it was not started again
    code.write_text(workdir.code_digest())
    forced = [dataclasses.replace(work, force=True) for work in works[:2]]
    assert forced[0].arguments == works[0].arguments
    assert runner.Worker(forced).work() == 0
    assert "--resume=force" not in json.loads((path / "sweep.json").read_text())["command"]
    # Measured again with today's code, and trained with the older: no mean with others.
    summary = json.loads((path / "summary.json").read_text())
    summary["changes"] = ['versions.code: "older" -> "e76c"', "log.every_steps: 1 -> 2"]
    (path / "summary.json").write_text(json.dumps(summary))
    (path / "summary.json").rename(path / "kept")
    twins = [dataclasses.replace(work, run=sweeps.Run(f"n_seed{n}", {}, {}))
             for n, work in enumerate(works[:2])]  # fmt: skip
    assert "50.00 %" in runner.table_of_results(twins[1:])
    (path / "kept").rename(path / "summary.json")
    assert "of different code, data or versions: no mean" in runner.table_of_results(twins)


def test_data_that_are_not_there_are_refused_once_before_the_first_run(sweep, monkeypatch):
    prepared, works = [], sweep[0]
    monkeypatch.setattr(runner.data, "prepare", lambda config: prepared.append(config.seed))
    runner.prepare_data(works)
    assert len(prepared) == 1
    monkeypatch.undo()
    words = ("--config.data.name=svhn", f"--config.data.manual_dir={works[0].path}")
    wrong = [dataclasses.replace(work, arguments=work.arguments + words) for work in works]
    with pytest.raises(UserError, match="data.name = svhn: .*train_32x32.mat") as caught:
        runner.prepare_data(wrong)
    assert "\n" not in str(caught.value)


def test_force_is_handed_on():
    work = runner.Work(sweeps.Run("a", {}, {}), pathlib.Path("b"), ("--config=c",), force=True)
    words = ["-m", "densejax.main", "--config=c", "--workdir=b", "--resume=force"]
    assert work.command[1:] == words


def test_damage_and_a_full_disk_cost_one_run(sweep, monkeypatch, capsys):
    works, log, _ = sweep
    for work in works[:4]:
        work.path.mkdir(parents=True)
    (works[0].path / "summary.json").write_text('{"config": {"na')
    (works[1].path / "metrics.jsonl").write_text('{"step": 1, "epoch": 0.5}\n{"step": 2, "ep')
    works[2].path.rmdir()
    works[2].path.write_text("a file in its place")
    write, full = files.write_json, works[3].path / "sweep.json"

    def refuse(path, value):
        if path == full:
            raise OSError(28, "No space left on device", str(path))
        write(path, value)

    monkeypatch.setattr(files, "write_json", refuse)
    (works[1].path / "claim").mkdir()
    with lock.locked(works[1].path / "claim"):
        assert works[1].state() == "running, 25%"  # of two epochs
    assert runner.Worker(works).work() == 1
    said = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[1] for line in said] == ["n0_seed0", "n2_seed0", "n3_seed0"]
    assert f"{works[0].path}/summary.json is damaged" in said[0]
    assert str(works[2].path) in said[1] and "No space left on device" in said[2]
    assert sorted(log.read_text().split()) == ["n1_seed0", "n4_seed0", "n5_seed0"]


def test_a_failure_is_its_own(sweep, capsys):
    works, log, failing = sweep
    failing.append("n1_seed0")
    assert runner.Worker(works).work() == 1
    assert len(log.read_text().split()) == 6
    said = capsys.readouterr().err.strip()
    assert said.startswith("failed: n1_seed0: exit code 1, the disk is on fire (")
    assert [bool(work.result()) for work in works] == [True, False, *[True] * 4]
    failing.clear()
    assert runner.Worker(works).work() == 0


def test_a_dead_workers_run_is_taken_over(sweep):
    works, log, _ = sweep
    program = (
        "import os, sys; from densejax.runs import lock; held = lock.locked(sys.argv[1]); "
        "held.__enter__(); os._exit(9)"
    )
    claim = works[0].path / "claim"
    claim.mkdir(parents=True)
    subprocess.run([sys.executable, "-c", program, claim], cwd=ROOT, check=False)
    assert (claim / "lock").exists()
    assert runner.Worker(works[:1]).work() == 0
    assert log.read_text().split() == ["n0_seed0"] and not claim.exists()
    claim.mkdir()  # of a worker that died after its run had ended
    subprocess.run([sys.executable, "-c", program, claim], cwd=ROOT, check=False)
    assert runner.Worker(works[:1]).work() == 0
    assert log.read_text().split() == ["n0_seed0"] and not claim.exists()


@pytest.mark.parametrize("held", ["claim", "."])
def test_what_lives_is_left_alone(sweep, held):
    """A claimed run, and one whose worker is dead while it goes on."""
    works, log, _ = sweep
    (works[0].path / "claim").mkdir(parents=True)
    worker = runner.Worker(works[:1])
    with lock.locked(works[0].path / held):
        assert not worker.attempt(works[0]) and not log.exists()
        assert (works[0].state() == "running, 0%") is (held == "claim")
    assert worker.attempt(works[0]) and log.exists()


def test_a_signal_ends_the_run_and_the_worker(sweep, monkeypatch):
    works, *_ = sweep
    endless = [sys.executable, "-S", "-c", "import time; time.sleep(600)"]
    monkeypatch.setattr(runner.Work, "command", property(lambda work: endless))
    worker, codes = runner.Worker(works), []
    thread = threading.Thread(target=lambda: codes.append(worker.work()))
    thread.start()
    while not worker.child:
        time.sleep(0.01)
    worker.stop(runner.signal.SIGTERM, None)
    thread.join(timeout=300)
    assert codes == [0] and not worker.failed


def test_runs_of_equal_time_take_as_many_steps_as_fit_into_it(sweep, monkeypatch):
    short, long, *_ = sweep[0]
    with pytest.raises(
        UserError, match="--equal_time=n0: .*training_time.json has no n0 and no n1"
    ):
        runner.of_equal_time(long, "n0")

    def two_steps(programs, calls):
        losses = [float(program()["loss"]) for program in (programs["n0"],) * 2]
        assert losses[0] != losses[1]  # it trains
        return {"n0": 0.1}

    monkeypatch.setattr(runner, "in_turns", two_steps)
    runner.training_time([short])
    file = short.path.parent / "training_time.json"
    measured = json.loads(file.read_text())
    assert measured["seconds"] == {"n0": 0.1} and measured["device"]
    file.write_text(json.dumps({"seconds": {"n0": 0.1, "n1": 0.3}}))
    for work, point, steps in ((short, "n0", 10), (long, "n0", 3), (short, "n1", 30)):
        config = runner.of_equal_time(work, point).config
        assert config.train.max_steps == steps == experiment.build(config).steps


def test_latency_times_what_predict_computes(sweep, monkeypatch):
    first, second, *_ = sweep[0]
    words = (*second.arguments, "--config.train.dtype=bfloat16")  # float32 on a CPU
    apply, traced = models.FAMILIES["densenet"].apply, []

    def noted(model, *arguments):
        traced.append((model.dtype, jax.config.jax_default_matmul_precision))
        return apply(model, *arguments)

    monkeypatch.setattr(models.FAMILIES["densenet"], "apply", noted)
    monkeypatch.setattr(runner, "in_turns", lambda programs, calls: dict.fromkeys(programs, 0.1))
    runner.latency([first, dataclasses.replace(second, arguments=words)])
    assert traced == [(jnp.float32, "float32")] * 2 + [(jnp.float32, "default")] * 2
    measured = json.loads((first.path.parent / "latency.json").read_text())
    assert measured["seconds"] == {name: {"1": 0.1, "64": 0.1} for name in ("n0", "n1")}


def test_programs_are_timed_in_turns(monkeypatch):
    now, order = [0.0], []

    def program(name, seconds):
        order.append(name)
        now[0] += seconds + 100 * (len(order) <= 4)  # the first round compiles

    monkeypatch.setattr(runner.time, "perf_counter", lambda: now[0])
    programs = {name: lambda name=name: program(name, ord(name)) for name in "ab"}
    assert runner.in_turns(programs, 2) == {"a": 97.0, "b": 98.0}
    assert "".join(order) == 11 * "aabb"


@pytest.mark.parametrize("form", ["shell", "slurm"])
def test_commands_of_the_runs_that_are_left(sweep, monkeypatch, tmp_path, form):
    works, _, _ = sweep
    runner.Worker(works[:2]).work()
    words = ["--sweep=variants", "--root", "a folder", "--print", form, "--only=n*"]
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "run.py"), *words])
    (tmp_path / "run.py").write_text("import sys; print(sys.argv[1:])")
    script, found = runner.commands(works, form), ""
    for task in range(4) if form == "slurm" else (0,):
        environment = os.environ | {"SLURM_ARRAY_TASK_ID": str(task)}
        found += subprocess.check_output(["bash", "-c", script], text=True, env=environment)
    expected = [["--sweep=variants", "--root=a folder", f"--only=n{n}_seed0"] for n in range(2, 6)]
    assert [ast.literal_eval(line) for line in found.splitlines()] == expected
    assert (form == "slurm") is ("#SBATCH --array=0-3\n" in script)
    runner.Worker(works).work()
    with pytest.raises(UserError, match="every run is finished"):
        runner.commands(works, form)


def test_the_best_rate_of_each_kind(tmp_path):
    def write(folder, split="validation", accuracy=0.5, code="a"):
        summary = {f"{split}_accuracy": accuracy, f"{split}_examples": 9, "changes": []}
        summary |= {"versions": {"code": code}, "config": {"evaluate": {"final_split": split}}}
        (folder / "summary.json").write_text(json.dumps(summary))

    for kind, rate, seed, accuracy in (
        *(("dense", 0.1, seed, accuracy) for seed, accuracy in enumerate((0.7, 0.9))),
        *(("dense", 0.2, seed, accuracy) for seed, accuracy in enumerate((0.75, 0.75))),
        ("one_shot", 0.2, 0, 0.5),
    ):
        folder = tmp_path / f"{kind}_rate{rate}_seed{seed}"
        folder.mkdir()
        axes = {"kind": kind, "learning_rate": rate, "seed": seed}
        (folder / "sweep.json").write_text(json.dumps({"axes": axes}))
        write(folder, accuracy=accuracy)
    root = runner.epath.Path(tmp_path)
    with pytest.raises(UserError, match="--learning_rates=.*/none: there is no such folder; name"):
        runner.best_rates(root / "none")
    found = {"dense": 0.1, "one_shot": 0.2, "vovnet": 0.2}  # a VoVNet's layers are joined alike
    assert runner.best_rates(root) == found
    write(folder, "test")
    with pytest.raises(UserError, match="was not measured on held-out images"):
        runner.best_rates(root)
    (folder / "summary.json").unlink()
    with pytest.raises(UserError, match="one_shot_rate0.2_seed0 is not finished"):
        runner.best_rates(root)
    diverged = {"axes": {"kind": "one_shot", "learning_rate": 0.8, "seed": 0}, "diverged": "a"}
    (tmp_path / "one_shot_rate0.8_seed0").mkdir()
    (tmp_path / "one_shot_rate0.8_seed0" / "sweep.json").write_text(json.dumps(diverged))
    other = tmp_path / "one_shot_rate0.8_seed1"  # whatever another seed reaches at that rate
    other.mkdir()
    axes = {"kind": "one_shot", "learning_rate": 0.8, "seed": 1}
    (other / "sweep.json").write_text(json.dumps({"axes": axes}))
    write(other, accuracy=0.99)
    write(folder)
    assert runner.best_rates(root) == found
    write(tmp_path / "dense_rate0.1_seed1", code="b")
    message = (
        r"no mean is taken over dense_rate0.1_seed0 \(code a\) against dense_rate0.1_seed1 \(code b"
    )
    with pytest.raises(UserError, match=message):
        runner.best_rates(root)
    write(tmp_path / "dense_rate0.1_seed1")
    for text, message in (('{"axes": {', "is damaged"), ('{"axes": {"k": 4}}', "no run of that")):
        (folder / "sweep.json").write_text(text)
        with pytest.raises(UserError, match=message):
            runner.best_rates(root)


def call(*words):
    environment = os.environ | small.ENVIRONMENT
    return subprocess.run(
        [sys.executable, ROOT / "experiments" / "run.py", *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
    )


def test_a_sweep_from_the_command_line(tmp_path):
    card, root = small.card(tmp_path, train__epochs=1), tmp_path / "root"
    words = ("--sweep=growth_rate", f"--config={card}", f"--root={root}", "--seeds=1")
    words += ("--values=5,7", "--axis", "optimizer.momentum=0.8,0.9", "--config.seed=3")
    done = call(*words, "--only=k5_momentum=0.8*", "--config.evaluate.train_images=100")
    assert done.returncode == 0, done.stderr
    assert "k5_momentum=0.8" in done.stdout.splitlines()[-1]
    path = root / "growth_rate_x_momentum" / "k5_momentum=0.8_seed3"
    summary = json.loads((path / "summary.json").read_text())
    assert summary["config"]["seed"] == 3 and summary["config"]["model"]["growth_rate"] == 5
    assert summary["config"]["optimizer"]["momentum"] == 0.8
    assert (summary["train_examples"], summary["test_examples"]) == (100, 360)
    assert "growth_rate=5" in json.loads((path / "sweep.json").read_text())["command"]


@pytest.mark.slow
def test_bad_input_is_one_line(tmp_path):
    words = ("--sweep=growth_rate", f"--config={small.card(tmp_path)}", f"--root={tmp_path}")
    done = call(*words, "--only=k5_*")
    assert (done.returncode, done.stdout) == (2, "")
    says = "densejax: --only=k5_*: no run of growth_rate has such a name\n"
    assert done.stderr == says
    (tmp_path / "file").touch()
    done = call(*words[:2], f"--root={tmp_path}/file")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith(f"densejax: --root={tmp_path}/file: give a folder")
    done = call(*words, "--learning_rates=~/none")
    says = f"densejax: --learning_rates={pathlib.Path.home()}/none: there is no such folder"
    assert done.returncode == 2 and done.stderr.startswith(says)
    words = ("--sweep=connectivity", "--config=configs/d2l_fashion_mnist.py", f"--root={tmp_path}")
    done = call(*words, "--dry_run")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "plain_equal_parameters_seed0: config argument 'model=plain20_cifar'" in done.stderr
