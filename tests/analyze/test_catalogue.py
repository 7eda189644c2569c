"""The catalogue against brute force over dense activations; stops, shared files, other readers."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from residual_saes.analyze.outcome import Outcome
from residual_saes.analyze.studies.catalogue import index as inverted_index
from residual_saes.analyze.studies.catalogue import study
from residual_saes.analyze.studies.catalogue import table as feature_table
from residual_saes.analyze.studies.catalogue.index import Index, Postings
from residual_saes.analyze.studies.catalogue.state import BINS, Largest, State
from residual_saes.analyze.study import Study
from residual_saes.analyze.subject import Subject
from residual_saes.data.errors import (
    Interrupted,
    SettingError,
    StopRequest,
    StoreError,
    TemporaryError,
)
from residual_saes.data.rows.split import Policy, held_out_units
from residual_saes.harvest.model import ModelConfig
from tests.analyze.conftest import Made
from tests.analyze.test_quality import dense
from tests.conftest import BOS

UNIT, EACH, PARTS, TOP = 128, 2, 5, 3
OPTIONS = {"rows": 1e6, "part": "all", "top": TOP, "quantiles": PARTS, "each": EACH, "logits": 0}


class Truth:
    """Every activation of the whole store in the order of the text, by dense float64 arithmetic."""

    def __init__(self, made: Made) -> None:
        store = made.store
        every = range(store.units)
        self.tokens = np.concatenate([store.tokens(unit).ravel() for unit in every])
        self.document = np.concatenate([store.document(unit).ravel() for unit in every])
        self.starts = np.concatenate([store.piece_starts(unit).ravel() for unit in every])
        self.position = np.arange(len(self.tokens)) - np.maximum.accumulate(
            np.where(self.starts, np.arange(len(self.tokens)), 0)
        )
        norms = np.linalg.norm(made.rows, axis=1).reshape(-1, UNIT)
        outlier = (norms > 10 * np.median(norms, axis=1, keepdims=True)).ravel()
        assert outlier.sum() == 3
        self.kept = ~outlier & (self.tokens != BOS)
        self.f = dense(made, made.rows)[1] * self.kept[:, None]


@pytest.fixture(scope="module")
def truth(made: Made) -> Truth:
    return Truth(made)


def study_of(made: Made, run: Path | None = None, **options: Any) -> Study:
    subject = Subject.open(made.run, None, torch.device("cpu"))
    subject = replace(subject, run=run or made.run)
    return Study("catalogue", subject, {**OPTIONS, **options}, ModelConfig("nowhere/none"))


@pytest.fixture(scope="module")
def done(made: Made) -> tuple[Path, Outcome]:
    whole = study_of(made)
    return whole.place, whole.perform(study.DEFINITION)


@pytest.fixture(scope="module")
def table(done: tuple[Path, Outcome]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(done[0] / study.FILE).to_pylist()
    return rows


# -- figures ---------------------------------------------------------------------------------------


def test_counts_and_moments(table: list[dict[str, Any]], truth: Truth) -> None:
    assert [row["feature"] for row in table] == list(range(truth.f.shape[1]))
    for row in table:
        fires = truth.f[:, row["feature"]][truth.f[:, row["feature"]] > 0]
        assert row["count"] == len(fires)
        assert row["density"] == len(fires) / truth.kept.sum()
        if len(fires):
            assert row["mean"] == pytest.approx(fires.mean(), rel=1e-5)
            assert row["std"] == pytest.approx(fires.std(), rel=1e-3, abs=1e-5)
            assert row["max"] == pytest.approx(fires.max(), rel=1e-5)
        else:
            assert (
                row["mean"] is row["std"] is row["max"] is None
                and not row["top"]
                and not row["quantiles"]
            )


def test_histograms(done: tuple[Path, Outcome], table: list[dict[str, Any]], truth: Truth) -> None:
    edges = np.array(done[1].figures["histogram_edges"])
    said = json.loads(pq.read_schema(done[0] / study.FILE).metadata[b"histogram_edges"])
    assert said == edges.tolist() and len(edges) == BINS + 1
    np.testing.assert_allclose(edges[4:] / edges[:-4], 2)
    index = Index.open(done[0] / study.FOLDER)
    for row in table:
        value = index.search(row["feature"]).value
        expected = np.histogram(np.clip(value, edges[0], edges[-2]), edges)[0]
        assert row["histogram"] == expected.tolist()
        assert sum(row["histogram"]) == (truth.f[:, row["feature"]] > 0).sum()


def test_sums_far_beyond_the_edges_are_clipped() -> None:
    state = State(1, scale=1.0, top=1, sample=1)
    found = Postings(
        *(np.array([0, 0, 0], np.uint32) for _ in range(4)),
        np.array([1e-30, 1.0, 1e30], np.float32),
    )
    state.update(0, UNIT, found, 3)
    assert state.histogram[0, [0, -1]].tolist() == [1, 1] and state.histogram.sum() == 3
    assert state.edges[np.flatnonzero(state.histogram[0])[1]] == 1.0


# -- contexts --------------------------------------------------------------------------------------


def check_context(one: dict[str, Any], feature: int, at: int, truth: Truth) -> None:
    """Everything that a context says, token by token."""
    assert one["document"] == truth.document[at]
    assert one["position"] == truth.position[at]
    assert one["value"] == pytest.approx(truth.f[at, feature], rel=1e-5)
    span = [at]
    while not truth.starts[span[0] - 1] and at - span[0] < feature_table.BEFORE:
        span.insert(0, span[0] - 1)
    while (
        span[-1] + 1 < len(truth.tokens)
        and not truth.starts[span[-1] + 1]
        and span[-1] - at < feature_table.AFTER
    ):
        span.append(span[-1] + 1)
    assert one["tokens"] == truth.tokens[span].tolist()
    assert one["peak"] == span.index(at)
    np.testing.assert_allclose(one["activations"], truth.f[span, feature], rtol=1e-4, atol=1e-4)
    assert one["text"] is None


def test_top_contexts(table: list[dict[str, Any]], truth: Truth) -> None:
    checked = 0
    for row in table:
        f = truth.f[:, row["feature"]]
        best: dict[int, int] = {}
        for at in np.argsort(-f, kind="stable"):
            if f[at] > 0:
                best.setdefault(int(truth.document[at]), int(at))
        expected = list(best.values())[:TOP]
        assert len(row["top"]) == len(expected)
        for one, at in zip(row["top"], expected, strict=True):
            check_context(one, row["feature"], at, truth)
            checked += 1
    assert checked > 60


def test_quantile_samples_lie_in_their_quantiles(table: list[dict[str, Any]], truth: Truth) -> None:
    full, seen = 0, set()
    for row in table:
        f = truth.f[:, row["feature"]]
        fires = np.sort(f[f > 0])
        by_part = [
            [one["value"] for one in row["quantiles"] if one["quantile"] == part]
            for part in range(PARTS)
        ]
        for part, values in enumerate(by_part):
            assert len(values) <= EACH
            for value in values:
                rank = np.argmin(np.abs(fires - value))  # its place among the sorted activations
                assert rank * PARTS // len(fires) == part
        full += sum(len(values) == EACH for values in by_part) if len(fires) >= 40 else 0
        for one in row["quantiles"]:
            (at,) = np.flatnonzero(
                (truth.document == one["document"]) & (truth.position == one["position"]) & (f > 0)
            )
            check_context(one, row["feature"], int(at), truth)
            seen.add((row["feature"], int(at)))
    assert len(seen) == sum(len(row["quantiles"]) for row in table)  # none twice
    large = sum((truth.f > 0).sum(0) >= 40)
    assert large > 10 and full > 0.98 * PARTS * large


def test_samples_are_uniform_over_where_a_latent_fires() -> None:
    """Of 2,000 places 200 are kept: each half of the text, and of the values, has its share."""
    features, places = 40, 2000
    state = State(features, 1.0, top=1, sample=200)
    feature = np.repeat(np.arange(features, dtype=np.uint32), places)
    token = np.tile(np.arange(places, dtype=np.uint32), features)
    value = (token + 1).astype(np.float32)
    state.update(5, places, Postings(feature, token, token, token, value), places)
    early = state.sample.settled().token < 5 * places + places // 2
    shares = early.mean(1)
    assert shares.mean() == pytest.approx(0.5, abs=0.02)
    assert 0.01 < shares.std() < 0.06  # binomial: 0.034, and not the same places for every latent


# -- the index -------------------------------------------------------------------------------------


def test_search_finds_every_place(done: tuple[Path, Outcome], truth: Truth) -> None:
    index = Index.open(done[0] / study.FOLDER)
    for feature in range(truth.f.shape[1]):
        found = index.search(feature)
        at = np.flatnonzero(truth.f[:, feature] > 0)
        assert found.token.tolist() == at.tolist()
        assert found.document.tolist() == truth.document[at].tolist()
        assert found.position.tolist() == truth.position[at].tolist()
        np.testing.assert_allclose(found.value, truth.f[at, feature], rtol=1e-4, atol=1e-5)
    for wrong in (-1, truth.f.shape[1]):
        with pytest.raises(SettingError, match=f"feature={wrong}"):
            index.search(wrong)


def test_what_counts_as_firing(made: Made, truth: Truth) -> None:
    """Outliers where the policy keeps them, BOS even then not, and nothing at 0 where TopK finds
    fewer than k.
    """
    subject = Subject.open(made.run, None, torch.device("cpu"))
    few = replace(subject.sae, b_enc=subject.sae.b_enc - 2)
    kept = replace(subject, sae=few, policy=Policy(drop_bos=False, drop_outliers=False))
    found, rows = inverted_index.encode(kept, subject.unit(2))  # which has row 300, an outlier
    span = slice(2 * UNIT, 3 * UNIT)
    f = dense(made._replace(sae=few), made.rows[span])[1] * ~truth.starts[span][:, None]
    feature, token = np.nonzero(f.T)
    assert found.feature.tolist() == feature.tolist() and found.token.tolist() == token.tolist()
    assert rows == (~truth.starts[span]).sum()
    assert 300 - 2 * UNIT in token and (found.value > 0).all()
    assert len(feature) < rows * made.sae.k


def test_row_groups_hold_blocks_of_latents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More latents than a block, some blocks empty, the last one short."""
    monkeypatch.setattr(inverted_index, "BLOCK", 4)
    feature = np.array([0, 3, 3, 9, 9], np.uint32)
    found = Postings(
        feature,
        *(np.arange(5, dtype=np.uint32) for _ in range(3)),
        np.arange(1, 6, dtype=np.float32),
    )
    index = Index(tmp_path, [2], 10, UNIT)
    inverted_index.write(index.path(2), found, "x", rows=7, d_sae=10, unit_tokens=UNIT)
    assert inverted_index.rows_of(index.path(2), "x") == 7
    assert inverted_index.rows_of(index.path(2), "y") is None
    assert [index.search(number).value.tolist() for number in (0, 3, 5, 9)] == [
        [1],
        [2, 3],
        [],
        [4, 5],
    ]
    assert pq.read_table(index.path(2), filters=[("feature", "==", 9)])["token"].to_pylist() == [
        3,
        4,
    ]


def test_no_index_is_said(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=re.escape(str(tmp_path))):
        Index.open(tmp_path / "index")


# -- going on, and order ---------------------------------------------------------------------------


class StopAfter(StopRequest):
    """A signal that comes before check number `number`."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self._left = number

    def check(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise Interrupted(2)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*.parquet"))
    }


def test_a_catalogue_that_was_cut_off_goes_on(
    made: Made, done: tuple[Path, Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, encoded = contents(done[0]), list[int]()
    plain = inverted_index.encode
    monkeypatch.setattr(
        inverted_index,
        "encode",
        lambda subject, unit: encoded.append(unit.number) or plain(subject, unit),
    )
    shutil.copy(made.run / "sae_final.pt", tmp_path)
    cut = study_of(made, tmp_path)
    for number in (0, 3, 5, 11):
        monkeypatch.setattr(study, "StopRequest", lambda number=number: StopAfter(number))
        with pytest.raises(Interrupted):
            cut.perform(study.DEFINITION)
    (damaged,) = cut.subject.run.glob("studies/kept/postings-*/unit_000002.parquet")
    damaged.write_bytes(damaged.read_bytes()[:-3])
    monkeypatch.setattr(study, "StopRequest", lambda: StopAfter(10**6))
    cut.perform(study.DEFINITION)
    assert contents(cut.folder) == expected
    # Each unit is encoded once, and the damaged one again.
    assert sorted(encoded) == sorted([*range(made.store.units), 2])


def test_files_of_another_sae_are_not_taken(made: Made, tmp_path: Path) -> None:
    shutil.copy(made.run / "sae_final.pt", tmp_path)
    first = study_of(made, tmp_path)
    first.perform(study.DEFINITION)
    before = contents(first.folder)
    other = replace(first.subject.sae, b_enc=first.subject.sae.b_enc + 0.3)
    again = replace(
        first, subject=replace(first.subject, sae=other), options={**OPTIONS, "rows": 1}
    )
    again.perform(study.DEFINITION)
    assert len(contents(again.folder)) == 2  # nothing of the former index is there
    assert (
        contents(again.folder)["index/unit_000000.parquet"] != before["index/unit_000000.parquet"]
    )


def test_results_of_other_settings_share_the_encoding(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(made.run / "sae_final.pt", tmp_path)
    study_of(made, tmp_path).perform(study.DEFINITION)
    monkeypatch.delattr(inverted_index, "encode")  # a second encoding would fail
    study_of(made, tmp_path, top=1).perform(study.DEFINITION)
    results = [path.parent for path in tmp_path.glob("studies/catalogue*/catalogue.json")]
    assert len(results) == 2
    (kept,) = tmp_path.glob("studies/kept/postings-*")
    for unit in range(made.store.units):
        name = f"unit_{unit:06d}.parquet"
        for folder in results:
            assert (folder / study.FOLDER / name).samefile(kept / name)


def test_a_file_system_without_links_gets_copies(
    made: Made, done: tuple[Path, Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refused)
    index = Index.open(done[0] / study.FOLDER)
    copy = index.linked(tmp_path)
    for unit in index.units:
        assert copy.path(unit).read_bytes() == index.path(unit).read_bytes()
        assert not copy.path(unit).samefile(index.path(unit))


def test_the_order_of_units_does_not_matter(done: tuple[Path, Outcome]) -> None:
    index = Index.open(done[0] / study.FOLDER)
    states = [State(index.d_sae, 1.0, top=TOP, sample=7) for _ in range(2)]
    for state, units in zip(states, (index.units, index.units[::-1]), strict=True):
        for unit in units:
            state.update(unit, UNIT, index.all_of(unit), 1)
    one, two = states
    np.testing.assert_array_equal(one.histogram, two.histogram)
    np.testing.assert_allclose(one.squares, two.squares, rtol=1e-12)
    for name in ("top", "sample"):
        for a, b in zip(getattr(one, name).settled(), getattr(two, name).settled(), strict=True):
            np.testing.assert_array_equal(a, b)


@st.composite
def units(draw: st.DrawFn) -> list[Postings]:
    """Few latents, documents and keys, so that much is tied and documents come back."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    found = []
    for unit in range(draw(st.integers(1, 4))):
        fires = np.argwhere(rng.random((3, 20)) < 0.5)
        document = unit + fires[:, 1] // 8
        key = rng.integers(1, 6, len(fires))
        columns = [fires[:, 0], fires[:, 1], document, fires[:, 1], key.astype(np.float32)]
        found.append(Postings(*(np.asarray(c, np.uint32) for c in columns[:4]), columns[4]))
    return found


@settings(max_examples=60, deadline=None, derandomize=True)
@given(units(), st.booleans(), st.integers(1, 6), st.randoms())
def test_the_largest_are_those_of_a_sort(
    found: list[Postings], distinct: bool, count: int, random: Any
) -> None:
    kept = Largest(3, count, distinct=distinct)
    every = list(enumerate(found))
    random.shuffle(every)
    for unit, one in every:
        kept.update(one.value.astype(np.uint32), unit * 20, one)
    for feature in range(3):
        rows = [
            (-int(value), unit * 20 + int(token), int(document))
            for unit, one in enumerate(found)
            for latent, token, document, _, value in zip(*one, strict=True)
            if latent == feature
        ]
        best: list[tuple[int, int, int]] = []
        for row in sorted(rows):
            if not distinct or row[2] not in {chosen[2] for chosen in best}:
                best.append(row)
        expected = [(-key, token) for key, token, _ in best[:count]]
        key, token = (column[feature] for column in kept.settled()[:2])
        assert list(zip(key[key > 0].tolist(), token[key > 0].tolist(), strict=True)) == expected


# -- weights ---------------------------------------------------------------------------------------


def test_neighbours(table: list[dict[str, Any]], made: Made) -> None:
    W = made.sae.W_dec.double().numpy()
    cosines = W @ W.T / np.linalg.norm(W, axis=1) / np.linalg.norm(W, axis=1)[:, None]
    np.fill_diagonal(cosines, -2)
    for row in table:
        order = np.argsort(-cosines[row["feature"]])[:10]
        assert [one["feature"] for one in row["neighbours"]] == order.tolist()
        expected = cosines[row["feature"], order]
        assert [one["cosine"] for one in row["neighbours"]] == pytest.approx(expected, abs=1e-6)


# -- the study -------------------------------------------------------------------------------------


def test_other_readers_take_the_table(done: tuple[Path, Outcome], truth: Truth) -> None:
    frame = pd.read_parquet(done[0] / study.FILE)
    alive = frame[frame["count"] > 0]
    assert frame["count"].sum() == (truth.f > 0).sum()
    np.testing.assert_allclose(alive["max"], [one[0]["value"] for one in alive["top"]])
    index = pd.read_parquet(done[0] / study.FOLDER / "unit_000003.parquet")
    assert len(index) == (truth.f[3 * UNIT : 4 * UNIT] > 0).sum()


def test_held_out_rows_by_default(made: Made, tmp_path: Path) -> None:
    part = study_of(made, tmp_path, part="held_out", rows=1)
    figures = study.catalogue(part).figures
    assert figures["units"] == held_out_units(made.store)[:1]
    for rows, expected in ((UNIT, 1), (UNIT + 1, 2)):  # whole units
        assert len(study.units_of(part.subject, study.Options(part="all", rows=rows))) == expected


def test_the_outcome_says_what_is_missing(
    done: tuple[Path, Outcome], made: Made, tmp_path: Path
) -> None:
    figures = done[1].figures
    assert figures["no_logits"] == "study.logits=0"
    assert figures["no_logits"] in " ".join(done[1].summary)
    absent = study.catalogue(study_of(made, tmp_path, logits=2, rows=1))
    assert "model.path=nowhere/none" in absent.figures["no_logits"]
    assert pq.read_table(tmp_path / "studies" / "catalogue" / study.FILE)["raised"].null_count == 40
    assert len(done[1].tables[0].rows) == 20


def test_a_hub_that_cannot_be_reached_costs_the_logits_alone(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: object) -> None:
        raise TemporaryError("model.path=nowhere/none cannot be had")

    monkeypatch.setattr(Study, "lm", property(refuse))
    part = study_of(made, tmp_path)
    there, reason = study.logits(part, part.subject.ports.writes[0], 2, StopRequest())
    assert there is None and "model.path=" in str(reason)


def test_texts_stand_beside_their_tokens(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "names", lambda _: lambda token: f"t{token}")
    study.catalogue(study_of(made, tmp_path))
    rows = pq.read_table(tmp_path / "studies" / "catalogue" / study.FILE).to_pylist()
    contexts = [one for row in rows for one in row["top"] + row["quantiles"]]
    assert len(contexts) > 100
    assert all(one["text"] == [f"t{token}" for token in one["tokens"]] for one in contexts)


@pytest.mark.parametrize("options", [{"part": "some"}, {"rows": 0}, {"quantiles": 0}, {"k": 1}])
def test_wrong_settings(made: Made, options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(SettingError, match=rf"study.*\b{name}\b"):
        study.catalogue(study_of(made, **options))
