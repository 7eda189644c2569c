"""Pictures as text: the same figures give the same bytes, and labels are left as they are."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from residual_saes.analyze import drawing


def test_the_same_figures_give_the_same_bytes() -> None:
    series = {"a": [(x, x) for x in range(5)], "b": [(0, 1), (4, 2)]}
    assert drawing.curves(series, "x", "y") == drawing.curves(dict(series), "x", "y")


def test_labels_are_left_as_they_are() -> None:
    label = 'href="#a url(#b) id="c" <script>'
    svg = drawing.curves({label: [(0, 0), (1, 1)], "other": [(0, 1), (1, 0)]}, "x", label)
    texts = [element.text for element in ElementTree.fromstring(svg).iter()]
    assert texts.count(label) == 2


def test_controls_in_a_label_are_shown() -> None:
    """XML has no place for most of them, so the whole picture would not open."""
    with pytest.warns(UserWarning, match="Glyph"):
        svg = drawing.bars(["a\x1b[31m\u202eb\0", "c"], [1, 2], "x", "y")
    texts = [element.text for element in ElementTree.fromstring(svg).iter()]
    assert r"a\x1b[31m\u202eb\x00" in texts
