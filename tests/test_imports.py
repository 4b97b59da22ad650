"""Imports point one way: each module has a level and reads no module above its own."""

import ast
import graphlib
import pathlib
import subprocess
import sys

import densejax

ROOT = pathlib.Path(densejax.__file__).parent
# The longest prefix decides: "models" holds for models.densenet, and models.layers has its own.
LEVELS = {
    0: [
        "config",
        "files",
        "formats",
        "metrics",
        "hlo",
        "interrupt",
        "data.official",
        "data.augment",
        "data.images",
        "data.crops",
        "models.convolution",
        "models.normalization",
        "models.pooling",
        "models.regularization",
        "models.layers",
        "models.dense_block",
        "weight_files",
        "weight_names",
    ],
    1: [
        "models",
        "data",
        "optimizer",
        "hosts",
        "parallel",
        "checkpoint",
        "goodput",
        "lock",
        "workdir",
        "metric_log",
    ],
    2: ["step", "transfer", "pretrained", "analysis"],
    3: ["experiment", "result", ""],  # the package itself imports when its function is called
    4: [
        "train",
        "command_line",
        "compile",
        "classifier",
        "predict",
        "export",
        "summary",
        "analysis.reuse",
    ],
    5: ["main"],
}
LEVEL = {name: level for level, names in LEVELS.items() for name in names}


def modules():
    """Every module of the package by its name below densejax."""
    paths = {path.relative_to(ROOT).with_suffix("").parts: path for path in ROOT.rglob("*.py")}
    return {".".join(p for p in parts if p != "__init__"): path for parts, path in paths.items()}


def level(name):
    parts = name.split(".")
    prefixes = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    found = next((LEVEL[prefix] for prefix in prefixes if prefix in LEVEL), None)
    assert found is not None, f"{name}: give it a level in LEVELS"
    return found


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
        if name.split(".")[0] == "densejax":
            below = name.removeprefix("densejax").removeprefix(".")
            yield below if below in known else below.rpartition(".")[0]


def test_imports_point_one_way():
    known = modules()
    assert len(known) > 15
    graph = {name: set(internal(path, known)) - {name} for name, path in known.items()}
    for name, reads in graph.items():
        above = {other for other in reads if level(other) > level(name)}
        assert not above, f"{name} (level {level(name)}) imports {above}"
    list(graphlib.TopologicalSorter(graph).static_order())  # a CycleError names the cycle


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
