"""Pages from templates. Whatever is put into one is text, and a picture is an image.

A picture's file lies in a folder that anybody may have written. As markup of the page its scripts,
links and styles would be the page's. As an image it can run, ask for and cover nothing.
"""

from __future__ import annotations

from base64 import b64encode
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from residual_saes.data.neutral import neutral


def rendered(template: str, **values: Any) -> bytes:
    """The page that a template of templates/ makes of `values`.

    In the template, `SVG | address` is what an image's src takes.
    """
    environment = Environment(
        loader=PackageLoader("residual_saes.analyze.pages"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_neutral,
    )
    environment.filters["address"] = _address
    return environment.get_template(template).render(**values).encode()


def _neutral(value: Any) -> Any:
    # Markup is what the template itself made, on several lines.
    return neutral(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _address(svg: str) -> str:
    return f"data:image/svg+xml;base64,{b64encode(svg.encode()).decode()}"
