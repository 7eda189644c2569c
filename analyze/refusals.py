"""What a study cannot be of: a reason with its way out, before a model is loaded; None if it can.

A study names one of these in its `Definition`; it is given the subject and the study's settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from residual_saes.analyze.subject import Subject
from residual_saes.data.site import MLP_IN

_OF_ROWS = "quality, stability, catalogue"  # studies that read stored rows alone


def nothing(_: Subject, __: Mapping[str, Any]) -> str | None:
    """Of a study of any dictionary."""
    return None


def two_models(subject: Subject, _: Mapping[str, Any]) -> str | None:
    """Of a study that runs the language model: two stores are of two models, or of one twice."""
    if len(subject.stores) == 1:
        return None
    return (
        f"it runs one language model, and the crosscoder of {subject.run} reads two stores; take a "
        f"crosscoder of one store as run=, or a study of stored rows: {_OF_ROWS}"
    )


def no_layer(subject: Subject, options: Mapping[str, Any]) -> str | None:
    """Of a study of one layer, study.layer=, which by default is that of the hook points."""
    if reason := two_models(subject, options):
        return reason
    if subject.only_layer is not None or options.get("layer") is not None:
        return None
    return f"the crosscoder of {subject.run} is of {subject.where}; give one layer as study.layer="


def all_but_saes(subject: Subject, _: Mapping[str, Any]) -> str | None:
    """Of a study whose figures are defined for what reconstructs the one hook point it reads."""
    if subject.is_sae:
        return None
    return (
        f"its figures are of SAEs, and {subject.run} is a {subject.noun} of {subject.where}; "
        "study=quality and study=splice have its figures"
    )


def all_but_of_streams(subject: Subject, _: Mapping[str, Any]) -> str | None:
    """Of a study that changes latents in a layer's output: the SAE is of that, resid_post."""
    if subject.is_resid_post:
        return None
    return (
        f"it changes latents in a layer's output, and {subject.run} is a {subject.noun} of "
        f"{subject.where}; take the run of an SAE of resid_post as run="
    )


def beside_the_stream(subject: Subject, _: Mapping[str, Any]) -> str | None:
    """Of what directions say to the head: mlp_in is behind a norm, and adds nothing to the stream.

    A transcoder is fit by what it writes, a crosscoder if all that it writes is in the stream.
    """
    apart = [port for port in subject.ports.writes if port.point.site == MLP_IN]
    if not apart:
        return None
    return (
        f"{apart[0]}, which {subject.run} writes, is not in the residual stream, so its directions "
        "say nothing to the head"
    )
