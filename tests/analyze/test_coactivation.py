"""Latents that fire together: planted pairs, and a dense latent that must not win."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from residual_saes.analyze.studies.catalogue import coactivation
from residual_saes.analyze.studies.catalogue.index import Index, Postings, write
from residual_saes.data.errors import StopRequest

TOKENS, F = 2000, 8
ALWAYS, NEVER, DENSE, RARE, SILENT = (0, 1), (2, 3), 4, (5, 6), 7


def index_of(folder: Path, fires: np.ndarray, rows: int = TOKENS) -> Index:
    """The index of what fires (F, tokens), in units of TOKENS."""
    folder.mkdir()
    units = fires.shape[1] // TOKENS
    for unit in range(units):
        feature, token = np.nonzero(fires[:, unit * TOKENS : (unit + 1) * TOKENS])
        none = np.zeros(len(token), np.uint32)
        columns = feature.astype(np.uint32), token.astype(np.uint32), none, none
        postings = Postings(*columns, np.ones(len(token), np.float32))
        path = folder / f"unit_{unit:06d}.parquet"
        write(path, postings, "x", rows=rows, d_sae=len(fires), unit_tokens=TOKENS)
    return Index(folder, range(units), len(fires), TOKENS)


@pytest.fixture
def fires() -> np.ndarray:
    rng = np.random.default_rng(0)
    made = rng.random((F, 2 * TOKENS)) < 0.05
    made[ALWAYS[1]] = made[ALWAYS[0]]
    made[NEVER[1]] &= ~made[NEVER[0]]
    made[DENSE] = rng.random(2 * TOKENS) < 0.9
    made[list(RARE)] = False
    made[list(RARE), :5] = True  # five times, always together: too few to say
    made[SILENT] = False
    return made


def test_pairs_that_were_planted(tmp_path: Path, fires: np.ndarray) -> None:
    """Pairs, figures by NumPy's own correlation, and units that are left out."""
    index = index_of(tmp_path / "index", fires)
    with StopRequest() as stop:
        found = coactivation.partners(index, 10**6, stop)
        first = coactivation.partners(index, 1, stop)
    best = found[ALWAYS[0]][0]
    assert best.feature == ALWAYS[1] and best.phi == pytest.approx(1)
    count = int(fires[ALWAYS[0]].sum())
    assert best.rows == count and best.expected == pytest.approx(count**2 / (2 * TOKENS))
    assert NEVER[1] not in [other.feature for other in found[NEVER[0]]]
    assert found[RARE[0]] == found[SILENT] == []
    correlation = np.corrcoef(fires[:5])
    for latent, others in enumerate(found[:5]):
        assert latent not in [other.feature for other in others]
        assert [other.phi for other in others] == sorted((o.phi for o in others), reverse=True)
        for other in others:
            assert 0 < other.phi == pytest.approx(correlation[latent, other.feature])
            # The dense latent is there nearly always, and is no partner of anybody's.
            assert other.feature != DENSE or other.phi < 0.1
    assert first[ALWAYS[0]][0].rows == int(fires[ALWAYS[0], :TOKENS].sum())


def test_one_that_fires_everywhere(tmp_path: Path, fires: np.ndarray) -> None:
    """phi of a constant is not defined; warnings are errors here."""
    fires[DENSE] = True
    with StopRequest() as stop:
        found = coactivation.partners(index_of(tmp_path / "index", fires), 10**6, stop)
    assert found[DENSE] == []
    assert all(other.feature != DENSE for others in found for other in others)
