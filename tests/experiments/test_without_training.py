"""Figures that need no training: their numbers on networks small enough to count by hand."""

import numpy as np
import without_training


def test_feature_maps_of_two_blocks():
    fields = {"depth": None, "blocks": (2, 3), "growth_rate": 4}
    model = without_training.network("densenet_bc_40_12", fields)
    # Stem 8 and half of 16: the layers read 8, 12 and 8, 12, 16; 16 and 20 leave the blocks.
    assert without_training.feature_maps(model) == (16 + 20, 8 + 12 + 8 + 12 + 16, 3 + 6)


def test_gradients_are_geometric_means_over_seeds(monkeypatch):
    asked = []

    def norms(model, images, labels, seed):
        asked.append((type(model).__name__, images.shape, seed))
        return {"stem": 1.0, "classifier": 10.0**seed}

    monkeypatch.setattr(without_training.gradients, "kernel_norms", norms)
    panels = without_training.draw_gradients(seeds=3, batch_size=2).axes
    assert len(asked) == 2 * 3 * 3 and {shape for _, shape, _ in asked} == {(2, 32, 32, 3)}
    for axes in panels:
        assert len(axes.lines) == 3
        for line in axes.lines:
            np.testing.assert_allclose(line.get_ydata(), [1, 10])
