"""The look of figures: contrast by WCAG's formula, and elements that take a page's colours."""

import re

import pytest

from densejax.analysis import plots


def luminance(color):
    """Relative luminance of "#rrggbb" (WCAG 2.2)."""
    parts = [int(color[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("page", ["#ffffff", "#14171c"])
@pytest.mark.parametrize("color", plots.COLORS)
def test_contrast(color, page):
    low, high = sorted([luminance(color), luminance(page)])
    assert (high + 0.05) / (low + 0.05) >= 3


def test_lines_differ():
    styles = [tuple(plots.style(number).values()) for number in range(24)]
    assert len(set(styles)) == 24


def drawn():
    figure, (axes,) = plots.figure()
    axes.plot([1, 2], [1, 1000], label="a & b", **plots.style(0))
    axes.set_title("x < y")
    plots.logarithmic(axes.yaxis, "{:g}".format)
    plots.legend(axes)
    return plots.svg(figure, "title")


def test_an_element_takes_the_color_and_font_of_its_page():
    text = drawn()
    assert text.startswith('<svg role="img" aria-label="title"')
    assert plots.INK not in text and "currentColor" in text and "#ffffff" not in text
    assert "x &lt; y" in text and "a &amp; b" in text
    assert not re.search(r' id="(figure|axes|text|line2d|patch)_\d', text)
    assert text == drawn()  # a report of the same runs is the same file
