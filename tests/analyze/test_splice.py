"""Splicing against a plain loop with its own hook, and SAEs whose losses are known beforehand."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch.nn.functional import cross_entropy

from residual_saes.analyze import pieces
from residual_saes.analyze.losses import choose
from residual_saes.analyze.pieces import Piece
from residual_saes.analyze.studies import splice
from residual_saes.analyze.studies.splice import ALL, TRAINED, Losses, Options, Replacement, Splice
from residual_saes.analyze.subject import Subject
from residual_saes.data.errors import SettingError
from residual_saes.data.model_path import EMBEDDED
from residual_saes.data.settings import build
from residual_saes.data.site import HookPoint
from residual_saes.data.store.kinds import BOS, NON_FINITE, ORDINARY, OUTLIER
from residual_saes.harvest.model import LanguageModel, ModelConfig, load
from residual_saes.train.sae import SAE
from tests.analyze.conftest import TINY_LAYER


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return load(ModelConfig(EMBEDDED, dtype="float32"), head=True)


@pytest.fixture
def subject(tiny_run: Path) -> Subject:
    return Subject.open(tiny_run, None, torch.device("cpu"))


@pytest.fixture
def read(subject: Subject) -> list[Piece]:
    """Some pieces of different documents, in which a row is an outlier."""
    chosen = {piece.document: piece for (piece,) in choose([subject], 300)}
    read = list(chosen.values())
    read[1].kind[5] = OUTLIER
    return read


def measure(lm: LanguageModel, read: list[Piece], how: list[Replacement]) -> Losses:
    here = HookPoint(TINY_LAYER)
    return splice.measure(lm, Splice((here,), here), read, (ORDINARY,), how)


def replacements(subject: Subject) -> list[Replacement]:
    (port,) = subject.ports.writes
    return splice.replacements(subject, port)


def naive(
    lm: LanguageModel, ids: list[int], change: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """(t, V) logits of one sequence alone, layer TINY_LAYER giving what `change` makes of its (t,
    d).
    """

    def hook(_module: object, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        return change(output[0])[None]

    handle = lm.blocks[TINY_LAYER].register_forward_hook(hook)
    with torch.inference_mode():
        logits = lm.causal(torch.tensor([ids]), use_cache=False).logits[0].double()
    handle.remove()
    return logits


def each(losses: Losses, read: list[Piece], values: np.ndarray) -> list[np.ndarray]:
    """`values` (n,) piece by piece."""
    return [values[losses.document == piece.document] for piece in read]


# -- losses ----------------------------------------------------------------------------------------


def test_losses_are_those_of_a_plain_loop(
    lm: LanguageModel, subject: Subject, read: list[Piece]
) -> None:
    losses = measure(
        lm,
        read,
        [Replacement("sae", where, lambda x, _: subject.sae(x)) for where in (ALL, TRAINED)],
    )
    assert sorted(losses.document) == sorted(
        document for piece in read for document in [piece.document] * (len(piece.ids) - 1)
    )
    kept = [torch.from_numpy(piece.kind == ORDINARY)[:, None] for piece in read]
    assert any(not mask[1:].all() for mask in kept)
    for number, piece in enumerate(read):

        def masked(x: torch.Tensor, mask: torch.Tensor = kept[number]) -> torch.Tensor:
            return torch.where(mask, subject.sae(x), x)

        targets = torch.tensor(piece.ids[1:])
        clean = naive(lm, piece.ids, lambda x: x)
        for row, change in enumerate((lambda x: x, subject.sae, masked)):
            logits = naive(lm, piece.ids, change)
            ce = cross_entropy(logits[:-1], targets, reduction="none")
            np.testing.assert_allclose(each(losses, read, losses.ce[row])[number], ce, atol=1e-4)
            p, q = clean[:-1].log_softmax(1), logits[:-1].log_softmax(1)
            np.testing.assert_allclose(
                each(losses, read, losses.kl[row])[number], (p.exp() * (p - q)).sum(1), atol=1e-4
            )
        assert each(losses, read, losses.position)[number].tolist() == list(
            range(1, len(piece.ids))
        )
    assert abs(losses.ce[1] - losses.ce[0]).max() > 0.01
    assert abs(losses.ce[1] - losses.ce[2]).max() > 0.001


def test_identity_is_exact_and_ablations_are_what_they_are_called(
    lm: LanguageModel, subject: Subject, read: list[Piece]
) -> None:
    how = replacements(subject)
    losses = measure(lm, read, how)
    row = {(one.name, one.where): at for at, one in enumerate(how, 1)}
    assert (losses.ce[row["identity", ALL]] == losses.ce[0]).all()
    assert (losses.kl[row["identity", ALL]] == 0).all() and (losses.kl[0] == 0).all()
    mean = torch.from_numpy(subject.moments.mean).float()
    targets = torch.tensor(read[0].ids[1:])
    for name, value in (("zero", torch.zeros(64)), ("mean", mean)):
        ce = cross_entropy(naive(lm, read[0].ids, value.expand_as)[:-1], targets, reduction="none")
        np.testing.assert_allclose(each(losses, read, losses.ce[row[name, ALL]])[0], ce, atol=1e-4)
        at_bos = losses.ce[row[name, TRAINED]][losses.position == 1]
        np.testing.assert_array_equal(
            at_bos, losses.ce[0][losses.position == 1]
        )  # BOS is left as it is
        assert losses.ce[row[name, ALL]].mean() > losses.ce[0].mean() + 1


def perfect() -> SAE:
    """x = relu(x) - relu(-x)."""
    eye = torch.eye(64)
    weight = torch.cat([eye, -eye])
    return SAE.of(weight.T.contiguous(), weight, torch.zeros(128), torch.zeros(64), 128)


def test_a_perfect_sae_recovers_all_and_the_mean_recovers_none(
    lm: LanguageModel, subject: Subject, read: list[Piece]
) -> None:
    made = perfect()
    constant = SAE.of(
        made.W_enc,
        made.W_dec,
        torch.full((128,), -1e6),
        torch.from_numpy(subject.moments.mean).float(),
        128,
    )
    for one, recovered in ((made, 1), (constant, 0)):
        how = replacements(replace(subject, sae=one))
        losses = measure(lm, read, how)
        rows = {(row["name"], row["where"]): row for row in splice.figures_of(losses, how)}
        for where in (ALL, TRAINED):
            assert rows["sae", where]["loss_recovered_of_mean"]["value"] == pytest.approx(
                recovered, abs=1e-4
            )
    at = {(one.name, one.where): number for number, one in enumerate(how, 1)}
    np.testing.assert_array_equal(losses.ce[at["sae", ALL]], losses.ce[at["mean", ALL]])


def test_random_errors_have_the_length_of_the_saes(subject: Subject) -> None:
    rows = torch.randn(50, 64, generator=torch.Generator().manual_seed(1)) * 3
    noisy = splice.random_error(lambda x, _: subject.sae(x))
    first, again = (noisy(rows, rows) for _ in range(2))
    assert torch.equal(first, again)
    error, length = first - rows, (subject.sae(rows) - rows).norm(dim=1)
    torch.testing.assert_close(error.norm(dim=1), length)
    cosine = (error * (subject.sae(rows) - rows)).sum(1) / length.square()
    assert cosine.abs().mean() < 0.3 and cosine.std() > 0.05
    assert (error / length[:, None]).mean(0).norm() < 0.3  # every row has a direction of its own


# -- figures ---------------------------------------------------------------------------------------


def made_losses(documents: int = 40, each_: int = 10) -> tuple[Losses, list[Replacement]]:
    """Documents that differ much, where the SAE costs 0.4 +- 0.01 of the 4 that zero ablation
    costs.
    """
    rng = np.random.default_rng(0)
    document = np.repeat(np.arange(documents), each_)
    clean = np.repeat(rng.uniform(0, 6, documents), each_)
    how = [
        Replacement(name, ALL, lambda _, rows: rows)
        for name in ("identity", "sae", "random", "mean", "zero")
    ]
    costs = np.array([0, 0, 0.4, 0.2, 2, 4])[:, None] + np.zeros(len(document))
    costs[2] += rng.normal(0, 0.01, len(document))
    position = np.tile(np.arange(1, each_ + 1), documents)
    return Losses(document, position, clean + costs, costs / 2), how


def test_figures_of_known_losses() -> None:
    losses, how = made_losses()
    rows = {row["name"]: row for row in splice.figures_of(losses, how)}
    sae = rows["sae"]
    assert rows["clean"]["ce"]["value"] == pytest.approx(losses.ce[0].mean())
    assert sae["difference"]["value"] == pytest.approx(0.4, abs=0.002)
    assert sae["loss_recovered"]["value"] == pytest.approx(0.9, abs=0.001)
    assert sae["loss_recovered_of_mean"]["value"] == pytest.approx(0.8, abs=0.001)
    assert sae["kl_score"]["value"] == pytest.approx(0.9, abs=0.001)
    assert sae["kl_of_random"]["value"] == pytest.approx(2, abs=0.01)
    assert rows["identity"]["largest_difference"] == 0
    assert rows["identity"]["difference"] == {"value": 0.0, "interval": (0, 0)}
    assert (
        rows["identity"]["loss_recovered"]["value"] == 1
        and rows["zero"]["loss_recovered"]["value"] == 0
    )


def test_differences_are_paired() -> None:
    rows = {row["name"]: row for row in splice.figures_of(*made_losses())}

    def width(name: str, figure: str) -> float:
        low, high = rows[name][figure]["interval"]
        return high - low

    assert width("sae", "ce") > 0.5 and width("clean", "ce") > 0.5  # documents differ
    assert 0 < width("sae", "difference") < 0.01  # what the SAE costs them does not
    assert 0 < width("sae", "loss_recovered") < 0.01
    low, high = rows["sae"]["difference"]["interval"]
    assert low < 0.4 < high


def test_an_ablation_that_costs_nothing_makes_no_ratio() -> None:
    losses, how = made_losses()
    losses.ce[5] = losses.ce[0]
    rows = {row["name"]: row for row in splice.figures_of(losses, how)}
    assert math.isnan(rows["sae"]["loss_recovered"]["value"])
    assert rows["sae"]["loss_recovered_of_mean"]["value"] == pytest.approx(0.8, abs=0.001)


def test_one_document_has_figures_without_intervals() -> None:
    losses, how = made_losses()
    rows = splice.figures_of(losses._replace(document=np.zeros_like(losses.document)), how)
    assert {row["ce"]["interval"] for row in rows} == {None}
    assert rows[2]["difference"]["value"] == pytest.approx(0.4, abs=0.002)
    spans = splice.by_position(losses, 2)
    spans[0]["difference"]["interval"] = None  # one document alone reaches this far
    svg = splice._pictures({"rows": rows, "by_position": {"sae": spans}})["splice_position"].svg
    assert "nan" not in svg.lower()


def test_spans_of_positions_hold_every_token_once() -> None:
    losses, _ = made_losses()
    spans = splice.by_position(losses, 2)
    assert [(span["from"], span["to"]) for span in spans] == [(1, 1), (2, 3), (4, 7), (8, 10)]
    assert sum(span["tokens"] for span in spans) == len(losses.document)
    inside = (losses.position >= 4) & (losses.position <= 7)
    cost = (losses.ce[2] - losses.ce[0])[inside]
    assert spans[2]["difference"]["value"] == pytest.approx(cost.mean())


# -- the study -------------------------------------------------------------------------------------


def test_pieces_are_the_held_out_text_with_its_kinds(subject: Subject, lm: LanguageModel) -> None:
    found = list(pieces.held_out(subject))
    units = list(subject.rows(10**9))
    assert sum(len(piece.ids) for piece in found) == sum(len(unit.rows) for unit in units)
    assert all(
        piece.ids[0] == lm.tokenizer.bos and lm.tokenizer.bos not in piece.ids[1:]
        for piece in found
    )
    assert all(piece.kind[0] == BOS and BOS not in piece.kind[1:] for piece in found)
    kinds = np.concatenate([piece.kind for piece in found])
    in_order = np.concatenate([unit.kind[np.argsort(unit.local)] for unit in units])
    assert (kinds == in_order).all()


def test_choice_of_pieces(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    def piece(length: int, kind: int = ORDINARY) -> Piece:
        return Piece([2] * length, 0, np.array([BOS, *[kind] * (length - 1)], np.uint8))

    given = [piece(1), piece(4), piece(5, NON_FINITE), piece(6, OUTLIER), piece(7)]
    monkeypatch.setattr(pieces, "held_out", lambda _subject: iter(given))
    for tokens, lengths in ((100, [4, 6, 7]), (16, [4, 6]), (2, [4])):
        assert [len(one.ids) for (one,) in choose([subject], tokens)] == lengths


def test_the_study_of_the_embedded_model(tiny_study: Callable) -> None:
    study = tiny_study("splice", tokens=700)
    outcome = study.perform(splice.DEFINITION)
    rows = {(row["name"], row["where"]): row for row in outcome.figures["rows"]}
    sae, zero = rows["sae", ALL], rows["zero", ALL]
    assert 0 < sae["difference"]["value"] < zero["difference"]["value"]
    assert (
        sae["loss_recovered"]["interval"][0]
        <= sae["loss_recovered"]["value"]
        <= sae["loss_recovered"]["interval"][1]
    )
    assert outcome.figures["replaced"][ALL] > outcome.figures["replaced"][TRAINED] > 500
    assert rows["identity", ALL]["largest_difference"] == 0
    assert len(outcome.tables[0].rows) == 10
    for name in outcome.pictures:
        ElementTree.fromstring((study.folder / f"{name}.svg").read_text())


def test_options() -> None:
    settings = dict(OmegaConf.load("conf/study/splice.yaml"))
    assert settings.pop("name") == "splice"
    assert build(Options, "study", settings) == Options()
    with pytest.raises(SettingError, match=r"study\.tokens=1"):
        build(Options, "study", {"tokens": 1})
