"""The table of a network's layers against published totals and layers worked out by hand."""

import functools
import json
import subprocess
import sys

import pytest

from densejax import models, summary
from densejax.models import counts
from tests.test_command_line import ROOT, command, one_line  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


@pytest.fixture
def summarise(command):  # noqa: F811
    return functools.partial(command, main=summary.main, config="optional")


def as_json(answer):
    code, output, error = answer
    assert (code, error) == (0, "")
    return json.loads(output)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("densenet_bc_40_12", {"depth": 10}),
        ("densenet_one_shot_19_43", {"depth": 10}),
        ("preact_resnet164", {"blocks": (2, 1, 1)}),
        ("vovnet27_slim", {"module_depth": 2}),
    ],
)
def test_rows_add_up_to_the_exact_counts(name, changes):
    model, shape = models.create(models.fields(name, **changes), 7), (64, 48, 3)
    expected = counts.of_network(model, shape)
    for depth in (1, 2, 9):
        rows = counts.layers(model, shape, depth)
        totals = tuple(sum(getattr(r, f) for r in rows) for f in ("parameters", "multiply_adds"))
        assert totals == expected
        names = [row.name for row in rows]
        assert len(set(names)) == len(names) and all(names)
        assert all(name.count("/") < depth for name in names)
        for row in rows:  # what multiplies has a place in the network, and weights
            assert not row.multiply_adds or (row.output_shape and row.parameters)


@pytest.mark.slow
def test_rows_of_densenet121_are_those_of_the_paper(summarise):
    found = as_json(summarise("--model=densenet121", "--format=json", "--depth=3"))
    rows = {row.pop("name"): row for row in found["layers"]}
    # torchvision's documentation: "num_params" and "GFLOPS" of the IMAGENET1K weights
    assert (found["parameters"], round(found["multiply_adds"] / 1e9, 2)) == (7_978_856, 2.83)
    assert (found["image_shape"], found["num_classes"]) == ([224, 224, 3], 1000)

    def row(shape, parameters, multiply_adds):
        return {
            "output_shape": shape,
            "parameters": parameters,
            "multiply_adds": multiply_adds,
        }

    # 7x7 at stride 2 of 3 channels; 1x1 from 64 to 4k and 3x3 to k = 32 channels at 56x56.
    assert rows["stem/conv"] == row([112, 112, 64], 49 * 3 * 64, 112 * 112 * 49 * 3 * 64)
    assert rows["stem/norm"] == row([112, 112, 64], 128, 0)
    assert rows["block1/layer1/conv1"] == row([56, 56, 128], 64 * 128, 56 * 56 * 64 * 128)
    assert rows["block1/layer1/conv2"] == row([56, 56, 32], 9 * 128 * 32, 56 * 56 * 9 * 128 * 32)
    assert rows["block4/layer16/norm1"] == row([7, 7, 992], 2 * 992, 0)
    assert rows["transition3/conv"] == row([14, 14, 512], 1024 * 512, 14 * 14 * 1024 * 512)
    assert rows["head/classifier"] == row([1000], 1_025_000, 1_024_000)
    names = [name for name in rows if name.startswith(("block1/layer1/", "transition1"))]
    assert names == [  # as they are computed
        *(f"block1/layer1/{layer}" for layer in ("norm1", "conv1", "norm2", "conv2")),
        *("transition1/norm", "transition1/conv"),
    ]


def test_a_folded_row_is_the_whole_block(summarise):
    found = as_json(summarise("--model=densenet_bc_40_12", "--format=json", "--depth=1"))
    assert [row["name"] for row in found["layers"]] == [
        *("stem", "block1", "transition1", "block2", "transition2", "block3", "norm", "head")
    ]
    assert found["layers"][1]["output_shape"] == [32, 32, 24 + 6 * 12]
    assert (found["num_classes"], found["parameters"]) == (10, 176_122)  # imgclsmob


def test_a_card_brings_its_data(summarise):
    card = "--config=configs/cifar10.py:variant=plain,depth=40"
    found = as_json(summarise(card, "--format=json"))
    assert found["parameters"] == 1_019_722  # the paper's 1.0M
    assert found["image_shape"] == [32, 32, 3]
    d2l = as_json(summarise("--config=configs/d2l_fashion_mnist.py", "--format=json"))
    assert (d2l["image_shape"], d2l["parameters"]) == ([96, 96, 1], 758_226)


def test_the_table_ends_with_the_totals(summarise):
    code, output, _ = summarise("--model=resnet20_cifar", "--depth=1", "--num_classes=0")
    table = output.partition("\n\n")[0]
    lines = [line.split() for line in table.splitlines()]
    assert code == 0
    assert lines[0] == ["layer", "output", "parameters", "share", "multiply-adds", "share"]
    assert lines[-1] == ["total", "269,072", "100.00", "%", "40,550,400", "100.00", "%"]
    assert lines[1][:2] == ["stem", "32x32x16"]
    assert len({len(line) for line in table.splitlines()}) == 1  # aligned


def test_the_list_names_every_network(summarise):
    assert summarise("--list") == (0, "\n".join(models.MODELS) + "\n", "")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "give --model=NAME (--list shows the names) or --config=CARD"),
        (["--model=x"], "model = 'x': allowed are densenet121, "),
        (["--model=resnet18", "--config=configs/digits.py"], "give --model=NAME"),
        (["--config=configs/digits.py", "--num_classes=3"], "--config brings image_shape and"),
        (["--config=configs/cifar10.py:depth=41"], "model.depth = 41: "),
        (["--config=configs/none.py"], "--config=configs/none.py: there is no such file"),
        (["--model=resnet18", "--image_shape=224"], "--image_shape=224: give height,width,"),
        (["--model=resnet18", "--image_shape=a,b,c"], "--image_shape=a,b,c: give height,"),
        (["--model=resnet18", "--image_shape=0,2,3"], "--image_shape=0,2,3: give height,"),
        (["--model=densenet121", "--image_shape=8,8,3"], "feature maps of 1x1 cannot be halved"),
        (["--model=resnet18", "--depth=0"], "flag --depth=0: "),
        (["--model=resnet18", "--num_classes=-1"], "flag --num_classes=-1: "),
        (["--model=resnet18", "stray"], "'stray' is no flag"),
    ],
)
def test_bad_input_is_one_line(summarise, arguments, says):
    assert one_line(summarise(*arguments)).startswith(says)


@pytest.mark.slow
def test_the_real_command_needs_no_card():
    words = [sys.executable, "-m", "densejax.summary", "--model=resnet20_cifar", "--depth=1"]
    answer = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert (answer.returncode, answer.stderr) == (0, "")
    (total,) = (line for line in answer.stdout.splitlines() if line.startswith("total"))
    assert "269,722" in total


def test_connections_are_drawn(summarise, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    code, output, error = summarise(
        "--model=sparsenet_bc_100_24", "--depth=1", "--figure=~/connections.png"
    )
    assert (code, error) == (0, "")
    rows = output.partition("block1, block2, block3: the outputs")[2].splitlines()
    assert rows[5].split() == ["layer5", ".#.##"]
    assert rows[17].split() == [
        "end",
        ".#.......#...#.##",
    ]
    assert "connections: 177; layers on a path from input to output: at most 48" in output
    assert (tmp_path / "connections.png").read_bytes().startswith(b"\x89PNG")
    refused = one_line(summarise("--model=densenet_40_12", f"--figure={tmp_path}"))
    assert refused.startswith(f"--figure={tmp_path}: the name must end in .png, .svg or .pdf")
    refused = one_line(summarise("--model=densenet_40_12", f"--figure={tmp_path}/none/a.svg"))
    assert refused.startswith(f"--figure={tmp_path}/none/a.svg: No such file or directory; name")
