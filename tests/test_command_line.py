"""Bad input is one line that says what is wrong, and exit code 2; the real `main`, in process."""

import os
import pathlib
import stat
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import jax
import pytest
from absl import flags, logging
from absl.testing import flagsaver

from densejax import command_line, export, main, summary
from densejax import config as schema
from densejax.data import builders
from densejax.runs import workdir
from densejax.training import experiment, parallel
from tests import archives, small

# ml_collections loads cards in a way that Python will drop.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
ROOT = pathlib.Path(main.__file__).parents[1]
DIGITS = "--config=configs/digits.py"
CIFAR = "--config=configs/cifar10.py"


@pytest.fixture(scope="module", autouse=True)
def prepared():
    """Grain defines flags when it first reads, which flagsaver would take away again."""
    small.build(small.tiny())


@pytest.fixture
def command(monkeypatch, capfd, tmp_path):
    """Runs a command line; returns (exit code, standard output, standard error).

    Of densejax.main, unless another module's `main` is given with its options.
    """
    monkeypatch.chdir(ROOT)
    verbosity = logging.get_verbosity()
    seconds = jax.config.jax_persistent_cache_min_compile_time_secs

    def run(*arguments, main=main.main, **options):
        sys.modules.pop("config_config", None)  # the card before
        monkeypatch.setattr(sys, "argv", ["densejax", *arguments])
        capfd.readouterr()
        with flagsaver.flagsaver(), pytest.raises(SystemExit) as caught:
            try:
                command_line.run(main, **options)
            finally:
                flags.FLAGS["config"].value = None
        return caught.value.code, *capfd.readouterr()

    yield run
    logging.set_verbosity(verbosity)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)


def data(path):
    return f"--config.data.directory={path}"


READY = data(small.SESSION / "data")
NEW = "--workdir={tmp}/run"
CASES = {
    "wrong key": (
        [DIGITS, "--config.train.epoch=3"],
        "unknown key train.epoch (did you mean train.epochs?); allowed are train.accumulate_steps",
    ),
    "wrong field": (
        [DIGITS, "--config.model.growthrate=3"],
        "unknown key model.growthrate (did you mean model.growth_rate?); allowed are ",
    ),
    "wrong section": (
        [DIGITS, "--config.trian.epochs=3"],
        "unknown key trian.epochs (did you mean train.epochs?); allowed are augmentation, "
        "checkpoint, ",
    ),
    "an override without its card": (
        ["--config.train.epochs=3"],
        "--config.train.epochs: give the card, too, such as --config=configs/digits.py",
    ),
    "a network that is nearly one": (
        [f"{CIFAR}:model=densenet_bc_100"],
        "model = 'densenet_bc_100' (did you mean densenet_bc_100_12?): allowed are densenet121, ",
    ),
    "a pattern that is nearly one": (
        [DIGITS, "--config.model.connect=exponentail"],
        "model.connect = 'exponentail' (did you mean exponential?): allowed are dense, chain, ",
    ),
    "text for a number": (
        [DIGITS, "--config.train.epochs=three"],
        "train.epochs = three: give a value of type int",
    ),
    "fraction for an integer": (
        [DIGITS, "--config.train.epochs=1.5"],
        "train.epochs = 1.5: give a value of type int",
    ),
    "number for a switch": ([DIGITS, "--config.augmentation.flip=7"], "augmentation.flip = 7: "),
    "infinity": (
        [DIGITS, "--config.optimizer.warmup_epochs=inf"],
        "optimizer.warmup_epochs = inf: allowed is 0 or more, and below 2**31",
    ),
    "more steps than are counted": (
        [DIGITS, "--config.train.epochs=1000000000"],
        "train.epochs = 1000000000: 22000000000 steps; at most 2**31 - 1",
    ),
    "a section": (
        [DIGITS, "--config.train=3"],
        "train is a section; set one of its keys: train.accumulate_steps, ",
    ),
    "a name that is none": (
        [DIGITS, "--config.name=a\nb"],
        "name = 'a\\nb': allowed is a name of at most 100 printable characters without '/'",
    ),
    "no value": (
        [DIGITS, "--config.train.epochs"],
        "train.epochs = : give a value of type int",
    ),
    "depth 41": ([CIFAR + ":depth=41"], "model.depth = 41: "),
    "an argument twice": (
        [CIFAR + ":depth=40,depth=46"],
        "config argument 'depth=46': give key=value pairs of model=densenet_bc_100_12, augment=",
    ),
    "a list for an argument": (
        [CIFAR + ":variant=[]"],
        "config argument variant = []: give a value of type int or float or str",
    ),
    "an argument that is nearly one": (
        [CIFAR + ":growthrate=3"],
        "config argument 'growthrate=3' (did you mean growth_rate?): give key=value pairs",
    ),
    "argument of another type": ([CIFAR + ":depth=deep"], "model.depth = 'deep': give a value of"),
    "missing card": ([f"{DIGITS}x"], "--config=configs/digits.pyx: there is no such file"),
    "no card": ([], "--config: name a card, such as"),
    "a file that is no card": (
        ["--config=densejax/__init__.py"],
        "--config: the file is no card, ",
    ),
    "an empty value": ([DIGITS, "--workdir="], "--workdir=: give a value, or leave the flag out"),
    "an empty card": (["--config="], "--config=: there is no such file"),
    "blocks in place of the depth": (
        [
            *(DIGITS, "--config.model.depth=None", "--config.model.blocks=(1,1)"),
            "--config.train.epochs=0",
        ],
        "train.epochs = 0: ",
    ),
    "drops that are no numbers": (
        [CIFAR, "--config.optimizer.drop_at=(0.5,'x')"],
        "optimizer.drop_at = (0.5, 'x'): ",
    ),
    "blocks and depth": (
        [DIGITS, "--config.model.blocks=(2,2)"],
        "model.depth = 22 and model.blocks = (2, 2): give exactly one",
    ),
    "growth rates of two blocks": (
        [DIGITS, "--config.model.growth_rate=(4,4)"],
        "model.growth_rate = (4, 4): give one positive integer, or one for each of the 3 blocks",
    ),
    "epsilon is no number": (
        [CIFAR + ":model=vovnet39", "--config.model.batch_norm_epsilon=nan"],
        "model.batch_norm_epsilon = nan: give a finite number",
    ),
    "batch that does not divide": (
        [DIGITS, READY, "--config.train.batch_size=30"],
        "train.batch_size = 30: must be a multiple of 4, for the 4 devices, such as 32",
    ),
    "everything held out": (
        [DIGITS, READY, "--config.data.validation_size=1437"],
        "data.validation_size = 1437: must be below the 1437 training images",
    ),
    "crops larger than the images": (
        [DIGITS, "--config.evaluate.crop_size=9"],
        "evaluate.crop_size = 9: must be at most the images' 8; data.image_size enlarges them",
    ),
    "colours of grey images": (
        [DIGITS, "--config.augmentation.jitter=0.2"],
        "augmentation.jitter and augmentation.lighting: these images are not RGB",
    ),
    "unknown data set": (
        [DIGITS, READY, "--config.data.name=mnist"],
        "data.name = mnist: neither one of fashion_mnist, cifar10, cifar100, svhn, digits",
    ),
    "missing data": (
        [CIFAR + ":depth=10", data("{tmp}/data")],
        "data.name = cifar10: http://127.0.0.1:9/cifar-10-binary.tar.gz cannot be downloaded (",
    ),
    "missing archive": (
        [CIFAR + ":depth=10", data("{tmp}/data"), "--config.data.manual_dir={tmp}/nowhere"],
        "data.name = cifar10: cifar-10-binary.tar.gz or cifar-10-python.tar.gz not found in "
        "data.manual_dir = '{tmp}/nowhere'; get it from",
    ),
    "archive of other content": (
        [CIFAR + ":depth=10", data("{tmp}/data"), "--config.data.manual_dir={tmp}/other"],
        "data.name = cifar10: {tmp}/other/cifar-10-binary.tar.gz has SHA-256 ",
    ),
    "a file in the way of the data": ([DIGITS, data("{tmp}/file")], "data.name = digits: "),
    "a file in the way": (
        [DIGITS, READY, "--workdir={tmp}/file"],
        "workdir={tmp}/file: [Errno 17] File exists: '{tmp}/file'. Choose a --workdir",
    ),
    "a path that is too long": (
        [DIGITS, READY, "--workdir={tmp}/" + 300 * "x"],
        "{tmp}/xxx",
    ),
    "a path of two lines": (
        [DIGITS, READY, "--mode=eval", "--workdir={tmp}/a\nb"],
        "workdir={tmp}/a\\nb: not a run directory",
    ),
    "nothing to evaluate": (
        [DIGITS, READY, "--mode=eval", "--workdir={tmp}/none"],
        "workdir={tmp}/none: not a run directory (it has no config.json).",
    ),
    "a key for a flag": (
        [DIGITS, "--epochs=3"],
        "unknown flag --epochs (did you mean --config.train.epochs?)",
    ),
    "unknown flag": ([DIGITS, "--nothing=3"], "Unknown command line flag 'nothing'"),
    "weights at an address": (
        [DIGITS, READY, "--config.train.weights=https://example.com/w.npz"],
        "train.weights=https://example.com/w.npz: 'https://' is no known kind of storage",
    ),
    "workdir of another storage": (
        [DIGITS, READY, "--workdir=foo://bar"],
        "--workdir=foo://bar: 'foo://' is no known kind of storage",
    ),
    "no run to go on with": (
        [DIGITS, READY, "--workdir=latest"],
        "--workdir=latest: there is no run in the folder runs here; name one",
    ),
    "unknown mode": ([DIGITS, "--mode=test"], "flag --mode=test: value should be one of"),
    "unknown resume": ([DIGITS, "--resume=yes"], "flag --resume=yes: value should be one of"),
    "stray argument": ([DIGITS, "stray"], "'stray' is no flag; flags look like --config="),
    "the second override": (
        [DIGITS, "--config.seed=1", "--config.train.epochs=x"],
        "train.epochs = x: give",
    ),
}


# What is known only with the devices or the data at hand; all else is said before.
NEED_DEVICES = {
    "batch that does not divide",
    "missing data",
    "missing archive",
    "archive of other content",
    "a file in the way of the data",
    "a file in the way",
    "a path that is too long",
}


def contents(folder):
    """Every path below a folder, with the bytes of files."""
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def one_line(answer):
    code, output, error = answer
    assert (code, output) == (2, "")
    assert error.startswith("densejax: ") and error.endswith("\n") and error.count("\n") == 1
    return error.removeprefix("densejax: ")


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_line(command, tmp_path, monkeypatch, case):
    arguments, says = CASES[case]
    if case == "missing data":  # an address that nobody answers
        (tmp_path / "tiny").mkdir()
        facts = archives.with_digests(builders.SETS["cifar10"], tmp_path / "tiny")
        monkeypatch.setitem(builders.SETS, "cifar10", facts)
    (tmp_path / "file").write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "cifar-10-binary.tar.gz").write_text("no archive")
    if not any(argument.startswith("--workdir") for argument in arguments):
        arguments = [*arguments, NEW]
    arguments = [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]
    for name in ("configs", "densejax"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    if case not in NEED_DEVICES:
        monkeypatch.setattr(parallel, "mesh", lambda *_: pytest.fail("devices were started"))
    before = contents(tmp_path)
    assert one_line(command(*arguments)).startswith(says.replace("{tmp}", str(tmp_path)))
    assert contents(tmp_path) == before


@hypothesis.settings(
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture], max_examples=40
)
@hypothesis.given(
    key=st.sampled_from([*schema.flatten(schema.default()), "model.blocks", "train", "data.x", ""]),
    text=st.one_of(
        st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])),
        st.from_regex(r"\A[-+\d.e()\[\],'x{}:]{1,8}\Z"),
    ),
)
def test_any_override_is_taken_or_refused_in_one_line(command, key, text):
    def describe():
        experiment.build(command_line.CONFIG.value)
        return 0

    answer = command(DIGITS, f"--config.{key}={text}", main=describe)
    assert answer == (0, "", "") or one_line(answer)


CARDS = {  # what a card's get_config does, and what is said of it
    "assert False": "--config: the card raises AssertionError",
    "raise KeyboardInterrupt": "--config: the card raises KeyboardInterrupt",
    "raise type('Out', (SystemExit,), {})('bye')": "--config: the card raises Out bye",
    "1 / 0": "--config: the card raises ZeroDivisionError division by zero",
    "raise ValueError('a\\nb')": "b\n",
    "open('/nowhere/x')": "--config={card}: [Errno 2] No such file or directory: '/nowhere/x'",
    "return 5": "--config={card}: get_config returns no ConfigDict",
    "return None": "--config={card}: get_config returns no ConfigDict",
    "c.data.me = c.data; return c": "--config: the card raises RecursionError",
}


@pytest.mark.parametrize("body", CARDS)
def test_what_a_card_raises_is_one_line(command, tmp_path, body):
    card = tmp_path / "card.py"
    card.write_text(
        "from densejax.config import default\n\n\n"
        f"def get_config():\n    c = default()\n    {body}\n"
    )
    assert one_line(command(f"--config={card}")).startswith(CARDS[body].format(card=card))


@pytest.mark.parametrize("flag", ["-h", "--help", "--helpfull"])
@pytest.mark.parametrize(
    ("module", "config", "own"),
    [
        (main, "required", "--num_processes"),
        (summary, "optional", "--image_shape"),
        (export, "unused", "--platforms"),
    ],
)
def test_help_shows_an_example_and_every_flag(command, flag, module, config, own):
    code, output, error = command(flag, main=module.main, config=config)
    assert (code, error) == (None, "")
    assert f"python -m {module.__name__} --" in output and f"  {own}" in output
    assert ("  --config: " in output) == (config != "unused")


def test_help_beside_a_card_lists_its_keys(command):
    words = ["--help", f"{CIFAR}:depth=40,growth_rate=24", "--config.seed=7"]
    code, output, error = command(*words)
    assert (code, error) == (None, "")
    lines = output.partition("keys of this card:\n")[2].splitlines()
    shown = {
        line.strip().partition("=")[0]: number
        for number, line in enumerate(lines)
        if "--config." in line
    }
    config = schema.flatten(schema.default()) | {"model.depth": 40}
    assert {f"--config.{key}" for key in config} <= shown.keys()
    for key, value, meaning in (
        ("model.growth_rate", "24", "k in the paper: feature maps that a layer adds"),
        (
            "model.blocks",
            "None",
            "instead of `depth`: the number of dense layers in each",
        ),
        ("seed", "7", "The random seed of the initial parameters, the order of examples,"),
        (
            "optimizer.drop_at",
            "'(0.5, 0.75)'",
            "With 'step': the learning rate drops after these",
        ),
        ("augmentation.flip", "True", "Half of the images are mirrored. Allowed: True or False."),
    ):
        number = shown[f"--config.{key}"]
        assert lines[number] == f"  --config.{key}={value}"
        assert lines[number + 1].startswith(f"    {meaning}")
    assert "unknown key seeds" in one_line(command("--help", DIGITS, "--config.seeds=7"))


def test_latest_is_the_run_that_was_started_last(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for age, name in enumerate(["old", "sweeps/growth_rate/k12_seed0", "new/checkpoints/5"]):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / "history.jsonl").write_text("")
        os.utime(folder / "history.jsonl", (age, 100 if "sweeps" in name else age))
    options = {"main": export.main, "config": "unused"}
    code, output, error = command("--workdir=latest", "--output=x", **options)
    said = "densejax: --workdir=latest is runs/sweeps/growth_rate/k12_seed0\n"
    assert (code, output) == (2, "") and error.startswith(said)
    assert error.count("\n") == 2 and "k12_seed0: neither a run's directory nor" in error


def test_another_configuration_is_one_line(command, tmp_path):
    with workdir.open_run(tmp_path, small.tiny(seed=7)):
        pass
    card = f"--config={small.card(tmp_path)}"
    assert "seed: 7 -> 0" in one_line(command(card, f"--workdir={tmp_path}"))


def test_a_good_command_trains_and_writes_into_its_run_alone(command, tmp_path, monkeypatch):
    card = f"--config={small.card(tmp_path, train__epochs=1)}"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    before = contents(tmp_path)
    code, output, _ = command(card, f"--workdir={tmp_path}/run", "--config.seed=0")
    assert code == 0 and "test accuracy" in output.splitlines()[-2]
    assert f"{tmp_path}/run/summary.json" in output
    written = {path.relative_to(tmp_path).parts[0] for path in contents(tmp_path).keys() - before}
    assert written - {"__pycache__"} == {"run"}  # Python compiles the card
    assert stat.S_IMODE((tmp_path / "run").stat().st_mode) == 0o700


def test_training_that_diverges_has_an_exit_code_of_its_own(command, tmp_path):
    card = small.card(tmp_path, optimizer__learning_rate=2e9, train__max_skipped_steps=3)
    code, _, error = command(f"--config={card}", f"--workdir={tmp_path}/run")
    last = error.splitlines()[-1]
    assert code == 3 and "up to 4, " in last and "optimizer.learning_rate" in last
    assert last.startswith("densejax: train.max_skipped_steps = 3: 3 steps in a row")
    assert not any((tmp_path / "run" / name).exists() for name in ("summary.json", "lock"))


def test_closed_outputs_are_no_place_for_files(tmp_path):
    code = (
        "import os, sys; from densejax import command_line\n"
        "command_line.run(lambda: sys.stdout.isatty() + sys.stderr.isatty() + "
        "(os.open('/dev/null', os.O_RDONLY) < 3), config='unused')"
    )
    command = ["sh", "-c", 'exec "$0" -c "$1" <&- >&- 2>&-', sys.executable, code]
    assert subprocess.run(command, cwd=tmp_path).returncode == 0
