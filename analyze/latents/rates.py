"""How often each latent fires, and how strongly: what a single text's activations stand beside.

Of the catalogue where the run has one; else counted once, on a sample of held-out rows, and kept.

Shapes: F latents.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from residual_saes.analyze import kept
from residual_saes.analyze.latents.contexts import visible
from residual_saes.analyze.latents.encoding import positive
from residual_saes.analyze.latents.text_features import word
from residual_saes.analyze.results import FEATURES, FOLDER
from residual_saes.analyze.subject import Subject
from residual_saes.data import digests, durable
from residual_saes.data.errors import SettingError
from residual_saes.data.journal import note
from residual_saes.data.store.kinds import BOS

VERSION = 1  # of the counts that are kept
ROWS = 65_536  # held-out rows that are counted, where there is no catalogue
_FILE = "rates.npz"
_EXAMPLES = 5  # tokens of the catalogue that tell what a latent is
_BATCH_ROWS = 4096  # encoded at a time


@dataclass(frozen=True)
class Rates:
    """Of the rows that training counts in, without BOS."""

    rows: int
    count: NDArray[np.int64]  # (F,) rows in which each latent fires
    mean: NDArray[np.float64]  # (F,) of its activations where it fires; 0 where it never does
    catalogue: Path | None = None  # the table that has them; None: they were counted

    @property
    def density(self) -> NDArray[np.float64]:
        """(F,) share of the rows in which each latent fires."""
        return self.count / max(self.rows, 1)

    def examples(self, latents: Sequence[int]) -> dict[int, dict[str, list[str]]]:
        """By latent what the catalogue says of it: tokens at its peaks, tokens that it raises."""
        if self.catalogue is None:
            return {}
        columns = ["feature", "top", "raised"]
        chosen = pc.field("feature").isin(list(latents))
        found = {}
        for row in pq.read_table(self.catalogue, columns=columns, filters=chosen).to_pylist():
            peaks = [_token(context, context["peak"]) for context in row["top"]]
            raised = [_named(item["text"], item["token"]) for item in row["raised"] or ()]
            found[row["feature"]] = {
                "peaks": list(dict.fromkeys(peaks))[:_EXAMPLES],
                "raised": raised[:_EXAMPLES],
            }
        return found

    def mean_of(self, feature: int) -> float:
        """The mean activation of a latent where it fires.

        Raises:
            SettingError: it never fires.
        """
        if not self.count[feature]:
            where = "of the catalogue" if self.catalogue else "that were counted"
            raise SettingError(
                f"feature={feature} fires on none of the {self.rows:,} rows {where}, so it has no "
                "mean activation to scale by; choose another one, or count more rows with "
                "study=catalogue study.part=all"
            )
        return float(self.mean[feature])


def _token(context: Mapping[str, Any], index: int) -> str:
    text = context["text"][index] if context["text"] else None
    return _named(text, context["tokens"][index])


def _named(text: str | None, token: int) -> str:
    return f"#{token}" if text is None else word(visible(text))


def of(subject: Subject, rows: int = ROWS) -> Rates:
    """The rates of a run's latents.

    Args:
        rows: to count at most, where there is no catalogue.
    """
    return of_catalogue(subject) or _counted(subject, rows)


def catalogue_digest(subject: Subject) -> str | None:
    """Digest of the run's table of latents; None: it has none."""
    recorded = _catalogue(subject)
    return recorded.files[FEATURES].xxh3_128 if recorded else None


def _catalogue(subject: Subject) -> digests.Digests | None:
    """The record of the run's catalogue, if it has a whole one of its present SAE.

    Its index is not looked at: of a billion tokens that would take longer than all else.
    """
    folder = subject.run / FOLDER / "catalogue"
    recorded = digests.sound(folder, "it is left out; do study=catalogue again")
    if recorded is None or recorded.about["settings"].get("sae") != subject.digest:
        return None
    return None if recorded.fault(FEATURES) else recorded


def of_catalogue(subject: Subject) -> Rates | None:
    """The rates of a run's latents, if it has a catalogue of its present SAE."""
    recorded = _catalogue(subject)
    if recorded is None:
        return None
    path = recorded.path(FEATURES)
    table = pq.read_table(path, columns=["count", "mean"])
    count = table.column("count").to_numpy()
    mean = np.nan_to_num(table.column("mean").to_numpy().astype(np.float64))
    rows = int(pq.read_schema(path).metadata[b"rows"])
    return Rates(rows, count, mean, path)


def _counted(subject: Subject, rows: int) -> Rates:
    key = {
        "version": VERSION,
        "sae": subject.digest,
        **subject.recorded,
        "policy": subject.policy.recorded(),
        "rows": rows,
    }

    def make(folder: Path) -> None:
        content = io.BytesIO()
        np.savez(content, allow_pickle=False, **_count(subject, rows))
        durable.write(folder / _FILE, [content.getbuffer()])

    folder = kept.filled(kept.folder_of(subject.run, "rates", key), key, make)
    with np.load(folder / _FILE) as file:
        return Rates(int(file["rows"]), file["count"], file["mean"])


def _count(subject: Subject, limit: int) -> dict[str, Any]:
    """Sums over `limit` held-out rows at most. Rows are stored in random order, so the first ones
    of a unit are a sample of it.
    """
    count = np.zeros(subject.sae.d_sae, np.int64)
    total = np.zeros(subject.sae.d_sae)
    read = 0
    for unit in subject.rows(limit):
        chosen = unit.of_kinds(subject.policy.kinds) & (unit.kind != BOS)
        own = unit.rows[np.flatnonzero(chosen)[: limit - read]]
        for start in range(0, len(own), _BATCH_ROWS):
            note(f"how often latents fire: {read + start:,} of {limit:,} rows")
            pairs = positive(subject.sae.encode(own[start : start + _BATCH_ROWS]))
            latent = pairs.latent.cpu().numpy()
            count += np.bincount(latent, minlength=len(count))
            total += np.bincount(latent, pairs.value.double().cpu().numpy(), len(total))
        read += len(own)
    return {"rows": read, "count": count, "mean": total / np.maximum(count, 1)}
