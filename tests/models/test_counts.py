"""Counts of hand-made functions whose multiply-adds are known."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from densejax import models
from densejax.models import connections, counts


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def convolve(x, kernel, strides=(1, 1), groups=1):
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        strides,
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


@pytest.mark.parametrize(
    "function, shapes, expected",
    [
        (jnp.add, [(3, 4), (3, 4)], 0),
        (jnp.matmul, [(2, 3), (3, 5)], 2 * 3 * 5),
        (jnp.matmul, [(7, 2, 3), (7, 3, 5)], 7 * 2 * 3 * 5),
        (lambda a, b: jnp.einsum("ij,ij->", a, b), [(4, 6), (4, 6)], 24),
        (convolve, [(2, 8, 8, 3), (3, 3, 3, 5)], 2 * 8 * 8 * 5 * 3 * 3 * 3),
        (lambda x, k: convolve(x, k, (2, 2)), [(1, 8, 8, 3), (7, 7, 3, 5)], 16 * 5 * 49 * 3),
        (lambda x, k: convolve(x, k, groups=3), [(1, 8, 8, 6), (3, 3, 2, 9)], 64 * 9 * 9 * 2),
        (jax.jit(jnp.matmul), [(2, 3), (3, 5)], 30),
        (jax.checkpoint(lambda a, b: jnp.tanh(a @ b)), [(2, 3), (3, 5)], 30),
        (jax.vmap(jnp.matmul, (0, None)), [(7, 2, 3), (3, 5)], 7 * 30),
    ],
)
def test_multiply_adds(function, shapes, expected):
    assert counts.multiply_adds(function, *(shape(*sizes) for sizes in shapes)) == expected


def test_layout_does_not_matter():
    def transposed(x, kernel):
        numbers = ("NCHW", "OIHW", "NCHW")
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers)

    found = counts.multiply_adds(transposed, shape(2, 3, 8, 6), shape(5, 3, 3, 1))
    assert found == 2 * 8 * 6 * 5 * 3 * 3


def test_a_loop_counts_each_of_its_turns():
    def loop(x, kernels):
        return jax.lax.scan(lambda x, kernel: (jnp.dot(x, kernel), None), x, kernels)[0]

    assert counts.multiply_adds(loop, shape(2, 4), shape(6, 4, 4)) == 6 * 2 * 4 * 4


def test_custom_derivatives_count():
    function = jax.custom_jvp(lambda a, b: jnp.dot(a, b))
    function.defjvp(lambda primals, tangents: (function(*primals), primals[0] @ tangents[1]))
    assert counts.multiply_adds(function, shape(2, 3), shape(3, 5)) == 30


def test_parameters_leave_out_statistics():
    variables = {
        "params": {"conv": {"kernel": shape(3, 3, 2, 5), "bias": shape(5)}, "scale": shape()},
        "batch_stats": {"mean": shape(5)},
    }
    assert counts.parameters(variables) == 3 * 3 * 2 * 5 + 5 + 1


def test_of_network_counts_one_image():
    class Network(nn.Module):
        @nn.compact
        def __call__(self, image):
            x = nn.relu(nn.Conv(4, (3, 3))(image))
            x = nn.BatchNorm(use_running_average=True)(x).mean((1, 2))
            return nn.Dense(10)(x), {"pooled": x}

    parameters, multiply_adds = counts.of_network(Network(), (6, 5, 3))
    assert parameters == (27 * 4 + 4) + 2 * 4 + (4 * 10 + 10)
    assert multiply_adds == 6 * 5 * 4 * 27 + 4 * 10


def test_memory_access_cost_of_the_papers_densenet_40_and_with_one_shot_aggregation():
    """The VoVNet paper prints 3.7M for DenseNet-40; the closed form gives 3,679,504."""
    found = {
        name: counts.memory_access_cost(models.create(models.fields(name), 10), (32, 32, 3))
        for name in ("densenet_40_12", "densenet_one_shot_40_20", "densenet_one_shot_19_43")
    }
    assert found["densenet_40_12"] == 3_679_504
    assert round(found["densenet_one_shot_40_20"] / 1e6, 2) == 2.10
    assert round(found["densenet_one_shot_19_43"] / 1e6, 2) == 2.07


def test_memory_access_cost_counts_what_is_read_and_written_without_the_classifier():
    class Network(nn.Module):
        num_classes: int

        @nn.compact
        def __call__(self, image):
            x = nn.Conv(4, (3, 3), strides=2, use_bias=False)(image)
            x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
            x = nn.Conv(5, (1, 1), use_bias=False)(x)
            return nn.Dense(self.num_classes)(x) if self.num_classes else None, {"final": x}

    expected = (8 * 6 * 3 + 9 * 3 * 4 + 4 * 3 * 4) + (4 * 3 * 4 + 4 * 5 + 4 * 3 * 5)
    assert counts.memory_access_cost(Network(10), (8, 6, 3)) == expected


@pytest.mark.parametrize(
    ("connect", "edges", "longest", "mean"),
    [
        ("dense", 4 * 5 / 2 + 5, 4, 2.0),  # each layer is on half of the 2^4 paths
        ("chain", 5, 4, 4.0),
        ("one_shot", 4 + 5, 4, 2.0),  # paths of 0, 1, ..., 4 layers, one of each
        (((0,), (0, 1), (2,), (3, 1), (4,)), 7, 4, (4 + 2 + 3) / 3),
    ],
    ids=str,
)
def test_connections_are_counted_as_by_hand(connect, edges, longest, mean):
    graph = connections.graph(connect, 4, 12)
    assert counts.connections([graph]) == counts.Connections(edges, longest, mean)
    twice = counts.connections([graph, graph])  # one block after the other
    assert twice == counts.Connections(2 * edges, 2 * longest, 2 * mean)


def test_paths_of_a_deep_block_are_counted_exactly():
    """C(n, m) paths of a dense block of n layers pass m of them: n / 2 in the mean, of 2^70."""
    assert counts.connections([connections.graph("dense", 70, 12)]).mean_path == 35.0


def test_a_residual_network_is_connected_as_a_dense_one():
    """Written as sums of outputs, a layer reads all before it (Veit et al., arXiv:1605.06431)."""
    residual = models.create(models.fields("resnet20_cifar", blocks=(6,), widths=(16,)), 10)
    dense = connections.graph("dense", 6, 16)
    (graph,) = residual.graphs().values()
    assert graph == dense
    plain = models.create(models.fields("plain20_cifar"), 10)
    assert counts.connections(plain.graphs().values()) == counts.Connections(9 + 5, 9, 9.0)
