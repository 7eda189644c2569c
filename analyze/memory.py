"""The memory that a study takes at most, counted beforehand, on the device of the SAE.

Counted are the SAE, rows, latents, and what the study keeps of them. What comes on top is the
program, half a GB, and the language model, whose weights stay in their files where a CPU runs it as
it is stored.

Shapes: n rows of a unit, d d_model, F latents, k active ones of a row.
"""

from __future__ import annotations

from typing import NamedTuple

from residual_saes.analyze.subject import Subject
from residual_saes.data.device import free_bytes
from residual_saes.data.journal import size, tell
from residual_saes.data.rows.split import held_out_units

TOLD_BYTES = 2e9  # from here on


class Needed(NamedTuple):
    """What a study takes."""

    bytes: float
    lower: str  # the setting by which it takes less


def tell_needed(name: str, subject: Subject, needed: Needed) -> None:
    """Say what study NAME takes, if that is much; and what to do where it is more than is free."""
    if needed.bytes <= TOLD_BYTES:
        return
    line = f"study={name} needs about {size(needed.bytes)}"
    free = free_bytes(subject.device)
    if free is not None and needed.bytes > free:
        line += f", and {size(free)} of {subject.device} are free: lower {needed.lower}"
    tell(line)


def of_sae(subject: Subject) -> float:
    """Both of its matrices, float32, and the skip if there is one."""
    sae = subject.sae
    skip = 0 if sae.W_skip is None else sae.W_skip.numel()
    return 4.0 * (sae.d_sae * (sae.d_model + sae.d_out) + skip)


def width_of(subject: Subject) -> int:
    """Numbers that are read and written of a token."""
    sae = subject.sae
    return sae.d_model if subject.ports.is_autoencoder else sae.d_model + sae.d_out


def rows_read(subject: Subject, limit: int) -> int:
    """How many rows `Subject.rows(limit)` yields at most."""
    unit = subject.store.unit_tokens
    return unit * min(-(-limit // unit), len(held_out_units(subject.store)))


def of_pass(subject: Subject, limit: int) -> float:
    """The SAE, a unit of rows and its latents, and of a second unit the next ones.

    A unit is read as bfloat16 (2 n d bytes) beside its float32 rows (4 n d). Its latents are 20
    bytes each, twice while batches are joined.
    """
    n = subject.store.unit_tokens
    more = min(rows_read(subject, limit) // n, 2) - 1
    rows = (6 + 4 * more) * n * width_of(subject)
    latents = (40 + 20 * more) * n * subject.sae.k
    return of_sae(subject) + rows + latents
