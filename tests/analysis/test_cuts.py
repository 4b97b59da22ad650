"""Cuts against a forward pass in NumPy, where the source is overwritten before concatenation."""

import jax
import numpy as np
import pytest

from densejax import models
from densejax.analysis import cuts, reuse
from densejax.config import UserError
from densejax.data.augment import Preparation
from densejax.inference.classifier import Classifier
from densejax.models import vovnet
from densejax.training import losses

GENERATOR = np.random.default_rng(0)
IMAGES = GENERATOR.integers(0, 256, (5, 8, 8, 1)).astype(np.uint8)
LABELS = np.array([0, 1, 2, 1, 0], np.int32)
BATCH = 2  # the last one is padded
# What the layers of a block, and at last what follows it, read.
DENSE = ((0,), (0, 1), (0, 1, 2))
HARDNET = ((0,), (1, 0), (2,), (3, 2, 0), (1, 3, 4))


def trained(model, size=8, **preparation):
    """A classifier with random statistics and parameters, which are far from their initial ones."""
    shape = (1, size, size, 1)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct(shape, "float32"))

    def draw(path, leaf):
        noise = GENERATOR.normal(size=leaf.shape).astype(np.float32)
        kernel = path[-1].key == "kernel"
        return noise * 2 / np.sqrt(leaf.size / leaf.shape[-1]) if kernel else 1 + 0.2 * noise

    variables = jax.tree.map(
        lambda leaf: leaf.astype(np.float32), jax.tree_util.tree_map_with_path(draw, shapes)
    )
    settings = Preparation((100.0,), (70.0,), **preparation)
    return Classifier(model, variables, settings, (8, 8, 1), ("a", "b", "c"))


def measured(network):
    return cuts.measure(network, losses.cross_entropy, IMAGES, LABELS, BATCH)


class Recomputed:
    """A DenseNet in NumPy; `cut` is (block, reader, source), by numbers, or None."""

    def __init__(self, network, reads, cut):
        self.params, self.stats = network.variables["params"], network.variables["batch_stats"]
        self.reads, self.cut = reads, cut

    def read(self, outputs, block, reader):
        parts = [outputs[source] for source in self.reads[reader - 1]]
        if self.cut and self.cut[:2] == (block, reader):
            place = self.reads[reader - 1].index(self.cut[2])
            parts[place] = np.broadcast_to(parts[place].mean((0, 1, 2)), parts[place].shape)
        return np.concatenate(parts, -1)

    def norm_relu(self, x, params, stats):
        scale = params["scale"] / np.sqrt(stats["var"] + 1e-5)
        return np.maximum((x - stats["mean"]) * scale + params["bias"], 0)

    def conv(self, x, params):
        kernel = params["kernel"]
        (edge, _), (_, height, width, _) = (side // 2 for side in kernel.shape[:2]), x.shape
        x = np.pad(x, ((0, 0), (edge, edge), (edge, edge), (0, 0)))
        return sum(
            x[:, row : row + height, column : column + width] @ kernel[row, column]
            for row in range(len(kernel))
            for column in range(len(kernel))
        )

    def logits(self, x, blocks=2):
        params, stats = self.params, self.stats
        x, after = self.conv(x, params["stem"]["conv"]), len(self.reads)
        for block in range(1, blocks + 1):
            outputs = [x]
            for layer in range(1, after):
                p, s = (tree[f"block{block}"][f"layer{layer}"] for tree in (params, stats))
                x = self.norm_relu(self.read(outputs, block, layer), p["norm1"], s["norm1"])
                x = self.norm_relu(self.conv(x, p["conv1"]), p["norm2"], s["norm2"])
                outputs.append(self.conv(x, p["conv2"]))
            x, name = self.read(outputs, block, after), f"transition{block}"
            if block < blocks:
                x = self.norm_relu(x, params[name]["norm"], stats[name]["norm"])
                x = self.conv(x, params[name]["conv"])
                x = (x[:, ::2] + x[:, 1::2])[:, :, ::2] / 4 + (x[:, ::2] + x[:, 1::2])[
                    :, :, 1::2
                ] / 4
        x = self.norm_relu(x, params["norm"], stats["norm"]).mean((1, 2))
        return x @ params["head"]["classifier"]["kernel"] + params["head"]["classifier"]["bias"]


def crops(x, size):
    """The ten crops of x [batch, height, width, channels], one after the other."""
    end = x.shape[1] - size
    starts = ((0, 0), (0, end), (end, 0), (end, end), (end // 2, end // 2))
    found = np.concatenate(
        [x[:, row : row + size, column : column + size] for row, column in starts]
    )
    return np.concatenate([found, found[:, :, ::-1]])


@pytest.mark.parametrize(
    ("connect", "reads", "crop"),
    [("dense", DENSE, 0), ("hardnet", HARDNET, 0), ("dense", DENSE, 6)],
)
def test_a_cut_overwrites_the_source_in_one_reader(connect, reads, crop):
    depth = len(reads) - 1
    fields = {"depth": None, "blocks": (depth, depth), "growth_rate": 3, "connect": connect}
    network = trained(
        models.create(models.fields("densenet_bc_40_12", **fields), 3), crop_size=crop
    )
    connections = [
        (block, reader, source)
        for block in (1, 2)
        for reader, read in enumerate(reads, 1)
        for source in read
    ]
    found = cuts.connections(network.model, network.variables["params"])
    assert [(one.block, one.source) for one in found] == [
        (f"block{b}", s) for b, _, s in connections
    ]
    uncut, results = measured(network)
    x = (IMAGES.astype(np.float64) - 100) / 70
    x = crops(x, crop) if crop else x
    for cut, result in zip([None, *connections], [uncut, *results], strict=True):
        logits = Recomputed(network, reads, cut).logits(x).reshape(-1, 5, 3).mean(0)
        probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        loss = -np.log(probabilities[np.arange(5), LABELS]).mean()
        accuracy = (logits.argmax(-1) == LABELS).mean()
        assert result["loss"] == pytest.approx(loss, rel=1e-4), cut
        assert result["accuracy"] == pytest.approx(accuracy), cut
    assert len({round(result["loss"], 5) for result in results}) > len(results) / 2


def test_a_source_whose_weights_are_zero_does_no_harm():
    fields = {"depth": None, "blocks": (2,), "growth_rate": 3, "connect": "dense"}
    network = trained(models.create(models.fields("densenet_bc_40_12", **fields), 3))
    params = network.variables["params"]
    connections = cuts.connections(network.model, params)
    # The stem has 6 maps, and then layer1 has 3.
    params["block1"]["layer2"]["conv1"]["kernel"][:, :, 6:9] = 0
    params["head"]["classifier"]["kernel"][:6] = 0
    uncut, results = measured(network)
    for one, result in zip(connections, results, strict=True):
        unread = (one.target, one.source) in (("layer2", 1), ("classifier", 0))
        damage = abs(result["loss"] - uncut["loss"])
        assert damage < 1e-6 if unread else damage > 1e-4, (one.target, one.source)


def test_a_cut_of_vovnet_is_a_kernel_without_the_source_and_a_shifted_norm():
    network = trained(vovnet.VoVNet(3, (2,), (3,), (5,), 2, True, (2, 2, 7)))
    uncut, results = measured(network)
    assert len(results) == 6
    params, stats = network.variables["params"], network.variables["batch_stats"]
    x = network.preparation.evaluation(IMAGES)
    (_, features), block = jax.jit(network.model.apply)(network.variables, x), "stage1_module1"
    kernel = params[block]["aggregation"]["conv"]["kernel"]
    mean = np.asarray(features["stem"]).mean((0, 1, 2))
    stats[block]["aggregation"]["norm"]["mean"] -= mean @ kernel[0, 0, :7]
    kernel[:, :, :7] = 0
    logits = jax.jit(network.logits)(network.variables, IMAGES)
    expected = float(losses.cross_entropy(logits, LABELS).mean())
    assert results[0]["loss"] == pytest.approx(expected, rel=1e-5)  # of the module's input
    assert abs(uncut["loss"] - expected) > 1e-3


def test_cuts_of_other_families():
    """In HarDNet a source that no kernel reads does no harm, and all others do; RDNet's all do."""
    fields = {"stem_widths": (2, 4), "growth_rates": (4,), "blocks": (4,), "output_widths": (8,)}
    network = trained(models.create(models.fields("hardnet68", **fields, downsampling=()), 3), 16)
    # Layer 4 reads outputs 3, 2 and 0; output 3 has 4 maps. Afterwards, 2 has 6 maps, 0 has 4.
    network.variables["params"]["block1"]["layer4"]["conv"]["kernel"][:, :, 4:10] = 0
    found = cuts.connections(network.model, network.variables["params"])
    uncut, results = measured(network)
    assert len(found) == 1 + 2 + 1 + 3 + 3
    for one, result in zip(found, results, strict=True):
        is_unread = (one.target, one.source) == ("layer4", 2)
        damage = abs(result["loss"] - uncut["loss"])
        assert damage < 1e-6 if is_unread else damage > 1e-5, (one.target, one.source)
    fields = {"growth_rates": (8, 16), "stem_width": 4, "downsampling": (2,), "stage_depth": 2}
    network = trained(models.create(models.fields("rdnet_cifar", **fields), 3))
    uncut, results = measured(network)
    assert len(results) == 2 * (1 + 2 + 3)
    assert all(abs(result["loss"] - uncut["loss"]) > 1e-6 for result in results)


def test_rank_correlation():
    def correlation(*targets):
        """Of each target: its weights and damages."""
        found = [
            (cuts.Connection("block1", str(number), 0, weight, "", None), damage)
            for number, pairs in enumerate(targets)
            for weight, damage in zip(*pairs, strict=True)
        ]
        return cuts.rank_correlation(*zip(*found, strict=True))

    same, swapped = ((1, 5, 9), (0.1, 0.2, 4)), ((1, 2, 3), (-1, 7, 6))
    assert correlation(same) == {"mean": pytest.approx(1), "interval": None, "targets": 1}
    assert correlation(swapped)["mean"] == pytest.approx(0.5)  # 1 - 6 * 2 / (3 * 8)
    ignored = ((1, 2), (2, 1)), ((1, 2, 3), (4, 4, 4))
    found = correlation(same, *ignored, swapped)
    assert (found["mean"], found["targets"]) == (pytest.approx(0.75), 2)
    assert found["interval"] == pytest.approx([0.5, 1])  # means of two draws from 0.5 and 1
    assert correlation(*ignored) == {"mean": None, "interval": None, "targets": 0}


def test_damages_stand_where_the_weights_stand():
    fields = {"depth": None, "blocks": (4,), "growth_rate": 3, "connect": "hardnet"}
    network = trained(models.create(models.fields("densenet_bc_40_12", **fields), 3))
    params = network.variables["params"]
    maps, found = reuse.heat_maps(network.model, params), cuts.connections(network.model, params)
    (drawn,) = cuts.heat_maps(maps, found, [one.weight for one in found])
    np.testing.assert_allclose(drawn.weights, maps[0].weights)
    assert np.isfinite(drawn.weights).sum() == len(found) == 10


@pytest.mark.parametrize(
    ("name", "fields", "said"),
    [
        ("resnet20_cifar", {}, "ResNet: connections are cut where layers read concatenations"),
        ("densenet_bc_40_12", {"connect": "chain"}, "DenseNet: its layers read only one source"),
    ],
)
def test_a_network_without_connections_is_refused(name, fields, said):
    network = trained(models.create(models.fields(name, **fields), 3))
    with pytest.raises(UserError, match=said):
        measured(network)
