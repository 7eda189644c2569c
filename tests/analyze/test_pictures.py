"""Pictures as text: many fit into one page, and their labels are left as they are."""

from __future__ import annotations

import re

from analyze import drawing


def parts(svg: str) -> tuple[list[str], list[str]]:
    """The ids in a picture, and the ids that it refers to."""
    return re.findall(r' id="([^"]+)"', svg), re.findall(r'(?:href="|url\()#([\w.-]+)', svg)


def test_ids_are_a_pictures_own_and_lead_somewhere() -> None:
    curves = [
        drawing.curves({"a": [(x, x * scale) for x in range(5)], "b": [(0, 1), (4, 2)]}, "x", "y")
        for scale in (1, 2)
    ]
    (ids, used), (others, _) = parts(curves[0]), parts(curves[1])
    assert "clip-path" in curves[0] and len(used) > 5
    assert set(used) == set(ids) and len(ids) == len(set(ids))
    assert not set(ids) & set(others)
    assert curves[0] == drawing.curves(
        {"a": [(x, x) for x in range(5)], "b": [(0, 1), (4, 2)]}, "x", "y"
    )


def test_labels_are_left_as_they_are() -> None:
    label = 'href="#a url(#b) id="c"'
    svg = drawing.curves({label: [(0, 0), (1, 1)], "other": [(0, 1), (1, 0)]}, "x", label)
    assert svg.replace("&quot;", '"').count(f">{label}<") == 2
