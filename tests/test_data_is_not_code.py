"""No line of the package can execute what a file of data says; cards are code, and alone so."""

import ast

import pytest

from tests.test_imports import imported, modules

# What turns bytes into code or objects of any class. The exceptions say why they are harmless.
MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml", "code", "runpy"}
CALLS = {"eval", "exec", "compile", "__import__", "extract", "extractall", "system", "popen"}
ALLOWED = {
    "__main__": {"runpy"},  # runs a command that its own table names
    "data.official": {"pickle"},  # its Unpickler finds arrays, and no other class
}


def dangers(tree, names):
    """Modules of MODULES that are imported, and calls that could execute data, as text."""
    yield from MODULES & {name.partition(".")[0] for name in names}
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = getattr(call.func, "attr", getattr(call.func, "id", ""))
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        whose = ast.unparse(getattr(call.func, "value", call.func))
        # A method called `compile` is XLA's; the built-in is a name.
        if name in CALLS and not (name == "compile" and isinstance(call.func, ast.Attribute)):
            yield f"{name}()"
        if keywords.get("allow_pickle", "False") != "False" and whose in ("np", "numpy"):
            yield "allow_pickle"
        if keywords.get("shell", "False") != "False":
            yield "shell"
        if (whose, name) == ("torch", "load"):
            yield "torch.load"
        if (whose, name) == ("Image", "open") and keywords.get("formats") != "FORMATS":
            yield "Image.open of any format"
        if whose == "pickle" and name in ("load", "loads"):
            yield "pickle.load"


@pytest.mark.parametrize("name", sorted(modules()))
def test_data_is_never_executed(name):
    path = modules()[name]
    found = set(dangers(ast.parse(path.read_text()), imported(path)))
    assert found == ALLOWED.get(name, set())


@pytest.mark.parametrize(
    "line",
    [
        "pickle.load(file)",
        "eval(text)",
        "tar.extractall(path)",
        "np.load(path, allow_pickle=True)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "Image.open(path)",
        "subprocess.run(line, shell=True)",
    ],
)
def test_the_search_would_find(line):
    assert list(dangers(ast.parse(line), []))
    assert list(dangers(ast.parse(""), ["pickle"]))
