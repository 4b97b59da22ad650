"""Bounds against figures that were worked out by hand."""

import flax.linen as nn
import pytest

from densejax import models
from densejax.topology import roofline, targets


class Network(nn.Module):
    @nn.compact
    def __call__(self, image):
        x = nn.Conv(4, (3, 3), use_bias=False)(image)
        return nn.Dense(10, use_bias=False)(x.mean((1, 2))), {}


def test_work_of_a_network_by_hand():
    work = roofline.training(Network(), (6, 5, 3), batch_size=7)
    assert work.flops == 6 * 7 * (6 * 5 * 4 * 27 + 4 * 10)
    assert work.bytes == 6 * (7 * 2 * (6 * 5 * 3 + 4) + 4 * (27 * 4 + 40))
    wide = roofline.training(Network(), (6, 5, 3), batch_size=7, dtype="float32")
    assert (wide.flops, wide.bytes - work.bytes) == (work.flops, 6 * 7 * 2 * (6 * 5 * 3 + 4))


def test_a_densenet_is_bound_by_bytes_on_every_device():
    """BC-100 at batch 128 in bfloat16: 221 GFLOP and, summed over its layers by hand, 6.1 GiB."""
    network = models.create(models.fields("densenet_bc_100_12"), 10)
    work = roofline.training(network, (32, 32, 3), batch_size=128)
    assert work.flops == pytest.approx(221e9, rel=0.01)
    dense = [16 * width + 12 * 120 + 16 * 48 for width in (24, 108, 150)]  # 16 layers each
    inputs = sum(size * width for size, width in zip((1024, 256, 64), dense, strict=True))
    inputs += 1024 * (3 + 216) + 256 * 300 + 342  # stem, transitions, classifier
    assert work.bytes == 6 * (2 * 128 * inputs + 4 * 769_162)
    for target in targets.targets().values():
        seconds, limit = work.bound(target)
        assert limit == "bytes" and seconds == work.bytes / target.memory_bytes_per_second


def test_a_matrix_product_is_bound_by_flops():
    seconds, limit = roofline.Cost(bytes=3 * 2 * 8192**2, flops=2 * 8192**3).bound(
        targets.target("v5e")
    )
    assert limit == "flops" and seconds == pytest.approx(2 * 8192**3 / 197e12)


def test_ring_all_reduce_by_hand():
    """Two links an axis of 50 GB/s a way each; an axis below 16 is no ring and has half of them."""
    v5e = targets.target("v5e")
    assert roofline.communication(v5e, (1, 1), 1e9, 9) == 0
    one = roofline.communication(v5e, (2, 2), 1e9, 0)
    assert one == pytest.approx(2 * 3 / 4 * 1e9 / 100e9)
    pod = roofline.communication(v5e, (16, 16), 1e9, 7)
    assert pod == pytest.approx(2 * 255 / 256 * 1e9 / 200e9 + 7 * 32e-6)  # both ways round
    line = roofline.communication(v5e, (4, 4), 0, 1)
    assert line == pytest.approx(12e-6)
    flat = roofline.communication(targets.target("v5p"), (2, 2, 1), 1e9, 0)  # 2 of its 6 links
    assert flat == pytest.approx(2 * 3 / 4 * 1e9 / 200e9)
    box = roofline.communication(targets.target("h100"), (8,), 0, 1)
    assert box == pytest.approx(6.6e-6 + 14 * 0.6e-6)
