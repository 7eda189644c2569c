"""The name of the place in a decoder layer whose values a store holds.

harvest/site.py takes them there; manifests and published SAEs carry the name.
"""

from __future__ import annotations

RESID_POST = "resid_post"  # the output of a decoder layer, which the next layer reads


def hook_name(layer: int, site: str = RESID_POST) -> str:
    """The name that TransformerLens has for a site, which SAELens and Neuronpedia use."""
    return f"blocks.{layer}.hook_{site}"
