"""Pages from templates. Whatever is put into one is text, and a picture is an image.

A picture's file lies in a folder that anybody may have written. As markup of the page its scripts,
links and styles would be the page's. As an image it can run, ask for and cover nothing.
"""

from __future__ import annotations

import hashlib
import re
from base64 import b64encode
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from residual_saes.analyze.stats import number, percent
from residual_saes.data.neutral import neutral

_WIDE_PT = 620


def rendered(template: str, **values: Any) -> bytes:
    """The page that a template of templates/ makes of `values`.

    In the template, `SVG | address` is what an image's src takes, and figures are written by
    `| number` and `| percent`.
    """
    environment = Environment(
        loader=PackageLoader("residual_saes.analyze.pages"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_neutral,
    )
    environment.tests["wide"] = _is_wide
    environment.filters |= {"address": _address, "number": number, "percent": percent}
    return environment.get_template(template).render(**values).encode()


def sha256_of(script: str) -> str:
    """What a page's policy calls a script that stands in it."""
    return f"sha256-{b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


def _neutral(value: Any) -> Any:
    # Markup is what the template itself made, on several lines.
    return neutral(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _address(svg: str) -> str:
    return f"data:image/svg+xml;base64,{b64encode(svg.encode()).decode()}"


def _is_wide(svg: str) -> bool:
    """Whether a picture's letters would be too small on a phone if it were shrunk to fit."""
    width = re.search(r'<svg[^>]* width="([\d.]+)', svg)
    return width is not None and float(width[1]) > _WIDE_PT
