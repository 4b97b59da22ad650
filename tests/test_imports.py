"""Imports point one way: a room reads itself and the rooms before it, a command reads all rooms."""

import ast
import graphlib
import pathlib
import subprocess
import sys

import densejax

ROOT = pathlib.Path(densejax.__file__).parent
# Each room, or module at the top, imports only what stands before it.
ORDER = ["config", "models", "runs", "data", "weights", "training", "inference", "analysis"]
ORDER += ["topology", "command_line"]
COMMANDS = ["__main__", "assess", "compile", "cut", "export", "main", "predict", "pretrained"]
COMMANDS += ["reuse", "summary"]


def modules():
    """Every module of the package by its name below densejax; "" is the package itself."""
    paths = {path.relative_to(ROOT).with_suffix("").parts: path for path in ROOT.rglob("*.py")}
    return {".".join(p for p in parts if p != "__init__"): path for parts, path in paths.items()}


def imported(path):
    """Full names that a module imports, at its top or inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def internal(path, known):
    """The modules of the package that a module imports."""
    for name in imported(path):
        if name.startswith("densejax."):
            below = name.removeprefix("densejax.")
            yield below if below in known else below.rpartition(".")[0]


def test_imports_point_one_way():
    known = modules()
    graph = {name: set(internal(path, known)) - {name, ""} for name, path in known.items()}
    places = {room: place for place, room in enumerate(ORDER)} | dict.fromkeys(COMMANDS, len(ORDER))
    assert {name.partition(".")[0] for name in known} == {"", *places}
    for name, reads in graph.items():
        room = name.partition(".")[0]
        for other in reads if name else ():  # the package's own functions import when called
            before = other.partition(".")[0]
            assert before == room or places[before] < places[room], f"{name} imports {other}"
    del graph[""]
    list(graphlib.TopologicalSorter(graph).static_order())  # a CycleError names the cycle


def test_only_commands_define_flags():
    for name, path in modules().items():
        defines = "flags.DEFINE" in path.read_text()
        assert not defines or name in [*COMMANDS, "command_line"], name


def test_prediction_does_not_import_the_training_loop():
    known = modules()
    reads, left = set(), ["predict", "export", "reuse", "cut"]
    while left:
        reads.add(name := left.pop())
        left += set(internal(known[name], known)) - reads
    assert "training.step" in reads and "training.loop" not in reads


def test_nothing_imports_tensorflow_or_torch():
    for path in modules().values():
        roots = {name.split(".")[0] for name in imported(path)}
        assert not roots & {"tensorflow", "torch", "torchvision", "keras"}, path


def test_import_is_light():
    heavy = "{'jax', 'flax', 'optax', 'tensorflow_datasets', 'orbax', 'tensorflow', 'torch'}"
    slow = "{'tensorflow_datasets', 'tensorflow', 'torch'}"
    program = (
        f"import sys, densejax; assert not {heavy} & set(sys.modules);"
        f"import densejax.main; print({slow} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "set()\n"
