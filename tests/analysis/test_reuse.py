"""Heat maps of kernels made by hand, whose mean |weight| is known for every source."""

# ruff: noqa: F401, F811 (a fixture is imported)

import dataclasses
import functools
import runpy
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import flagsaver
from matplotlib.patches import Rectangle

from densejax import models
from densejax import reuse as command_of_reuse
from densejax.analysis import plots, reuse
from densejax.config import UserError
from densejax.inference import classifier
from tests.test_command_line import command, one_line

pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
VARIANT = {"depth": None, "blocks": (2, 3), "growth_rate": 4}
VOVNET = {
    "modules": (1, 2),
    "widths": (3, 4),
    "output_widths": (5, 6),
    "module_depth": 2,
    "stem_widths": (2, 2, 7),
}
# Feature maps of each source, worked out by hand.
BC = {"block1": (8, 4, 4), "block2": (8, 4, 4, 4)}  # stem 2k, half of 16 after the transition
PLAIN = {"block1": (16, 4, 4), "block2": (24, 4, 4, 4)}  # stem 16, no compression
MODULES = {"stage1_module1": (7, 3, 3), "stage2_module1": (5, 4, 4), "stage2_module2": (6, 4, 4)}


def network(name, **fields):
    """A network and parameters of ones."""
    model = models.create(models.fields(name, **fields), 10)
    draw = functools.partial(model.init, jax.random.key(0))
    shapes = jax.eval_shape(draw, jnp.zeros((1, 32, 32, 3)))["params"]
    return model, jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), shapes)


def known_kernels(params, widths):
    """Makes the mean |weight| s + 1 for source s in every kernel that reads several sources."""
    for block, sizes in widths.items():
        by_channel = np.repeat(np.arange(len(sizes)) + 1.0, sizes)
        ends = set(np.cumsum(sizes))
        readers = [params[block], params.get(block.replace("block", "transition"), {})]
        readers += [params["head"]] if block == list(widths)[-1] else []
        for path, leaf in jax.tree_util.tree_leaves_with_path(readers):
            if path[-1].key == "kernel" and leaf.shape[-2] in ends:
                signs = (-1.0) ** np.arange(leaf.shape[-1])
                leaf[...] = by_channel[: leaf.shape[-2], None] * signs


def test_mean_weights():
    kernel = np.zeros((3, 3, 5, 2))
    kernel[:, :, :2] = -0.5
    kernel[:, :, 2:, 0], kernel[:, :, 2:, 1] = 3, -1
    np.testing.assert_allclose(reuse.mean_weights(kernel, (2, 3)), [0.5, 2])
    np.testing.assert_allclose(reuse.mean_weights(kernel[0, 0], (2, 3)), [0.5, 2])  # a classifier
    with pytest.raises(ValueError, match="5 channels does not read 6"):
        reuse.mean_weights(kernel, (2, 4))


@pytest.mark.parametrize(
    ("name", "fields", "widths"),
    [
        ("densenet_bc_40_12", VARIANT, BC),
        ("densenet_40_12", VARIANT, PLAIN),
        ("densenet_one_shot_40_20", VARIANT, PLAIN),
        ("vovnet39", VOVNET, MODULES),
        ("ese_vovnet19b_dw", VOVNET, MODULES),
    ],
)
def test_known_kernels_give_the_known_heat_map(name, fields, widths):
    model, params = network(name, **fields)
    known_kernels(params, widths)
    maps = reuse.heat_maps(model, params)
    assert [one.block for one in maps] == list(widths)
    for one, sizes in zip(maps, widths.values(), strict=True):
        assert one.sources == ("input", *(f"layer{n + 1}" for n in range(len(sizes) - 1)))
        first = len(sizes) if len(one.targets) == 1 else 1  # sources of the first target
        expected = np.repeat(np.arange(len(sizes))[:, None] + 1.0, len(one.targets), axis=1)
        reads = np.arange(len(sizes))[:, None] < np.arange(len(one.targets)) + first
        np.testing.assert_allclose(one.weights, np.where(reads, expected, np.nan))


def test_targets_and_what_stands_behind_a_block():
    def targets(*arguments, **fields):
        return [one.targets for one in reuse.heat_maps(*network(*arguments, **fields))]

    layers = [("layer1", "layer2"), ("layer1", "layer2", "layer3")]
    ends = [("transition1",), ("classifier",)]
    assert targets("densenet_bc_40_12", **VARIANT) == [layers[0] + ends[0], layers[1] + ends[1]]
    assert targets("densenet_one_shot_40_20", **VARIANT) == ends
    assert targets("vovnet39", **VOVNET) == [("aggregation",)] * 3
    model, params = network("densenet_bc_40_12", **VARIANT)
    maps = reuse.heat_maps(model.clone(num_classes=0), params)
    assert maps[-1].targets == layers[-1]
    with pytest.raises(UserError, match="ResNet: its layers read only one source, or sums without"):
        reuse.heat_maps(*network("resnet20_cifar"))


def test_the_picture_marks_the_ends_and_scales_by_column():
    model, params = network("densenet_bc_40_12", **VARIANT)
    known_kernels(params, BC)
    first, second, _ = plots.heat_maps(reuse.heat_maps(model, params)).axes
    for axes, column in ((first, 2), (second, 3)):
        (box,) = (patch for patch in axes.patches if isinstance(patch, Rectangle))
        assert (box.get_x(), box.get_width()) == (column - 0.5, 1)
        assert box.get_height() == column + 1
    shares = first.images[0].get_array()
    np.testing.assert_allclose(shares[:, 2], [1 / 3, 2 / 3, 1])
    np.testing.assert_allclose(shares[0], [1, 1 / 2, 1 / 3])
    assert np.ma.getmaskarray(shares).tolist() == [
        [False] * 3,
        [True, False, False],
        [True, True, False],
    ]


def test_damages_are_drawn_below_with_their_sign():
    maps = reuse.heat_maps(*network("densenet_bc_40_12", **VARIANT))
    damages = [dataclasses.replace(one, weights=-2 * one.weights) for one in maps]
    first, _, below, _, *bars = plots.heat_maps(maps, damages).axes
    assert np.nanmin(first.images[0].get_array()) == 1
    assert np.nanmax(below.images[0].get_array()) == -1
    assert [bar.get_ylabel().partition("\n")[0] for bar in bars] == [
        "mean |weight|",
        "increase of loss by a cut",
    ]


@pytest.fixture
def known_network(monkeypatch):
    """What is opened from any directory; the fixture is the list of these directories."""
    model, params = network("densenet_bc_40_12", **VARIANT)
    known_kernels(params, BC)
    opened = []

    def load(path):
        opened.append(path)
        return model, {"params": params}

    monkeypatch.setattr(classifier, "network", load)
    return opened


def test_command(command, tmp_path, known_network):
    say = functools.partial(command, main=command_of_reuse.main, config="unused")
    code, output, error = say("--workdir=runs/mine", f"--output={tmp_path}")
    assert (code, error, known_network) == (0, "", ["runs/mine"])
    assert f"{tmp_path}/reuse.png shows 2 blocks" in output
    assert (tmp_path / "reuse.png").read_bytes().startswith(b"\x89PNG")
    with np.load(tmp_path / "reuse.npz") as arrays:
        assert arrays["block2/targets"].tolist() == ["layer1", "layer2", "layer3", "classifier"]
        np.testing.assert_allclose(arrays["block2/weights"][:, -1], [1, 2, 3, 4])
    assert one_line(say()).startswith("--workdir: give a value")
    assert say("--workdir=runs/mine", f"--output={tmp_path}/new/folder")[0] == 0
    assert (tmp_path / "new" / "folder" / "reuse.npz").exists()
    (tmp_path / "file").touch()
    answer = one_line(say("--workdir=runs/mine", f"--output={tmp_path}/file"))
    assert answer == f"--output={tmp_path}/file: File exists; name another folder\n"


def test_a_graph_of_one_s_own_is_drawn_as_it_reads():
    own = ((0,), (1, 0), (2, 0))  # of two layers; the second reads the first, then the input
    model, params = network("densenet_bc_40_12", depth=None, blocks=(2,), connect=own)
    kernel = params["block1"]["layer2"]["conv1"]["kernel"]
    kernel[..., :12, :], kernel[..., 12:, :] = 2, -3  # growth rate 12
    (found,) = reuse.heat_maps(model, params)
    nan = np.nan
    assert found.targets == ("layer1", "layer2", "classifier")
    np.testing.assert_array_equal(found.weights, [[1, 3, 1], [nan, 2, nan], [nan, nan, 1]])


HARDNET = {"stem_widths": (2, 4), "growth_rates": (4, 6), "blocks": (2, 4)}
HARDNET |= {"output_widths": (8, 10), "downsampling": (1,)}
HARDNET_READS = ((0,), (1, 0), (2,), (3, 2, 0), (1, 3, 4))  # of the second block, in order


@pytest.mark.parametrize(
    ("name", "fields", "layer", "widths", "reads", "end"),
    [
        # Two outputs read: 6 * 1.7 maps, three: 6 * 1.7^2; made even as the authors' code does.
        ("hardnet68", HARDNET, "block2/{}", (8, 6, 10, 6, 18), HARDNET_READS, "transition2"),
        ("hardnet68ds", HARDNET, "block2/{}_pointwise", (8, 6, 10, 6, 18), HARDNET_READS, None),
        (
            *("rdnet_cifar", {"growth_rates": (8, 16), "stem_width": 4, "downsampling": (2,)}),
            *("stage2_{}/expand", (8, 16, 16, 16)),  # an input of (4 + 3 * 8) / 2, a multiple of 8
            *(((0,), (0, 1), (0, 1, 2), (0, 1, 2, 3)), "classifier"),
        ),
    ],
)
def test_other_families_say_what_their_layers_read(name, fields, layer, widths, reads, end):
    model, params = network(name, **fields)
    end = end or "transition2"
    for number, read in enumerate(reads, 1):
        place = layer.format(f"layer{number}").split("/") if number < len(reads) else [end]
        place = ["head", end] if end == "classifier" and number == len(reads) else place
        tree = functools.reduce(lambda tree, part: tree[part], place, params)
        kernel = tree.get("conv", tree)["kernel"]
        kernel[...] = np.concatenate([np.full(widths[n], n + 1.0) for n in read])[:, None]
    found = reuse.heat_maps(model, params)[-1]
    targets = (*(f"layer{number}" for number in range(1, len(reads))), end)
    assert (found.targets, found.sources[0]) == (targets, "input")
    expected = np.full((len(widths), len(reads)), np.nan)
    for column, read in enumerate(reads):
        expected[list(read), column] = [n + 1 for n in read]
    np.testing.assert_allclose(found.weights, expected)


def test_learned_weights_are_drawn_as_what_they_amount_to():
    """DenseFormer's averages: what an output's part is in a later one, by hand."""
    fields = {"blocks": (2,), "widths": (16,), "block": "basic", "stride_on": "3x3"}
    model, params = network("preact_resnet164", **fields, connect="weighted")
    params["stage1"] = {"weights1": np.array([2.0, 3.0]), "weights2": np.array([0.5, 0.0, 4.0])}
    (found,) = reuse.heat_maps(model, params)
    # X_1 = x + f_1; Y_1 = 2 x + 3 X_1; X_2 = Y_1 + f_2; Y_2 = 0.5 x + 4 X_2.
    assert (found.sources, found.targets) == (
        ("input", "layer1", "layer2"),
        ("layer1", "layer2", "end"),
    )
    nan = np.nan
    np.testing.assert_allclose(found.weights, [[1, 5, 20.5], [nan, 3, 12], [nan, nan, 4]])
