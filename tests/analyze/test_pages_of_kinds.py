"""Catalogue, browser and report of a transcoder and of a crosscoder, against brute force."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple
from urllib.request import urlopen

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from residual_saes.analyze.latents import contexts, directions
from residual_saes.analyze.pages import facts
from residual_saes.analyze.pages.browser import spread
from residual_saes.analyze.pages.browser.spread import BINS, Spread
from residual_saes.analyze.pages.browser.study import DEFINITION as BROWSER
from residual_saes.analyze.pages.report import report
from residual_saes.analyze.results import PAGE
from residual_saes.analyze.studies.catalogue.study import FILE as TABLE
from residual_saes.analyze.study import Study
from residual_saes.analyze.subject import Subject
from residual_saes.train.sae import SAE, SAEConfig
from tests.analyze.accessibility import audit
from tests.analyze.browser_site import of_run, read, served, study_of
from tests.analyze.chromium import NEEDS_CHROMIUM, Chromium
from tests.analyze.conftest import LAYER, add_points, write_run
from tests.analyze.test_diff import (
    OWN_A,
    OWN_B,
    SHARED,
    UNIT,
    D,
    N,
    crosscoder,
    itself,
    rows_of,
    world,
    write,
)
from tests.conftest import make_spine, make_store

IDS = 50


class Built(NamedTuple):
    """A run with its catalogue and browser."""

    run: Path
    pages: Path
    table: list[dict[str, Any]]
    rows: list[Any]  # what is read of all units, beside what fires there


def unembedding() -> Tensor:
    return torch.randn(IDS, D, generator=torch.Generator().manual_seed(9))


def transcoder(folder: Path) -> Path:
    """It reads each planted feature, and writes the next one."""
    made = itself(world())
    sites = {}
    for seed, (name, written) in enumerate(
        {"mlp_in": made.a, "mlp_out": made.a.roll(1, 0)}.items()
    ):
        rows = rows_of(made.codes, written, seed)
        sites[f"{name}_{LAYER}"] = rows.bfloat16().view(torch.uint16).numpy()
    spine = make_spine(N // 32, 32, np.random.default_rng(1))
    size: dict[str, Any] = {"context": 32, "unit": UNIT, "chunk": 32, "layer": LAYER}
    store = add_points(
        make_store(folder / "s.zarr", next(iter(sites.values())), spine=spine, **size), sites
    )
    features = len(made.a)
    sae = SAE.of(
        made.a.T.contiguous(),
        made.a.roll(1, 0),
        torch.zeros(features),
        torch.zeros(D),
        8,
        torch.full((features,), 0.5),
        torch.zeros(D),
    )
    config = SAEConfig(kind="transcoder", d_sae=features, k=8, k_aux=4)
    write_run(folder / "run", store, LAYER, config, sae, site="mlp_in")
    return folder / "run"


def built(run: Path) -> Built:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Study, "lm", None)
        patch.setattr(Study, "lm_of", lambda *_: None)
        patch.setattr(contexts, "token_names", lambda *_, **__: lambda token: f"t{token}")

        def logits(_: None, W_dec: Tensor, count: int, *__: object) -> Any:
            product = W_dec @ unembedding().T
            return product.topk(count), product.topk(count, largest=False)

        patch.setattr(directions, "logits", logits)

        def measured(_: None, W_dec: Tensor, *__: object) -> Spread:
            product = (W_dec @ unembedding().T).numpy()
            figures = (product.min(1), product.max(1), product.mean(1), product.std(1))
            counts = np.ones((len(product), BINS), np.int32)
            return Spread(*figures, counts, IDS)

        patch.setattr(spread, "measure", measured)
        of_run(run)
        study = study_of(run, contexts=2, samples=1)
        study.perform(BROWSER)
    table = pq.read_table(run / "studies" / "catalogue" / TABLE).to_pylist()
    subject = Subject.open(run, None, torch.device("cpu"))
    return Built(run, study.place, table, list(subject.firings(10**6)))


@pytest.fixture(scope="module")
def cross(tmp_path_factory: pytest.TempPathFactory) -> Built:
    made = world()
    a, b = rows_of(made.codes, made.a, 1), rows_of(made.codes, made.b, 2)
    return built(write(tmp_path_factory.mktemp("cross"), a, b, crosscoder(made)))


@pytest.fixture(scope="module")
def trans(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return built(transcoder(tmp_path_factory.mktemp("trans")))


def dense(subject: Subject) -> tuple[Tensor, Tensor, Tensor]:
    """(n, F) float64 activations, (n, d_out) targets and (n,) token ids of all rows that the
    policy keeps.
    """
    activations, written, tokens = [], [], []
    for number in range(subject.store.units):
        unit = subject.unit(number)
        rows = subject.text_rows(unit)
        f = torch.zeros(len(unit.rows), subject.sae.d_sae, dtype=torch.float64)
        kept = subject.encoded(unit)
        f[kept.rows, kept.indices] = kept.values.double()
        activations.append(f[rows])
        written.append(unit.targets[rows].double())
        ids = subject.store.tokens(number).ravel()[unit.local[rows]]
        tokens.append(torch.from_numpy(ids.astype(np.int64)))
    return torch.cat(activations), torch.cat(written), torch.cat(tokens)


def test_a_crosscoder_target_by_target(cross: Built) -> None:
    subject = Subject.open(cross.run, None, torch.device("cpu"))
    f, _, _ = dense(subject)
    truth = [2] * SHARED + [0] * OWN_A + [1] * OWN_B
    assert [row["class"] for row in cross.table] == truth
    for number, port in enumerate(subject.ports.writes):
        W_dec = subject.sae.W_dec[:, subject.columns(port)]
        variance = subject.moments.variance[subject.columns(port)].sum()
        energy = f.square().mean(0) * W_dec.double().square().sum(1) / variance
        raised = (W_dec @ unembedding().T).topk(4)
        for latent, row in enumerate(cross.table):
            target = row["targets"][number]
            share = {2: 0.5, number: 1.0}.get(truth[latent], 0.0)
            assert target["share"] == pytest.approx(share, abs=1e-6)
            assert target["energy"] == pytest.approx(float(energy[latent]), rel=1e-5)
            assert [one["token"] for one in target["raised"]] == raised.indices[latent].tolist()
            if truth[latent] == number:  # the strongest target's are the latent's
                assert row["raised"] == target["raised"]


def test_a_crosscoder_in_the_browser(cross: Built) -> None:
    meta, table = read(cross.pages, "meta"), read(cross.pages, "table")
    assert meta["where"] == f"layer {LAYER} of a and layer {LAYER} of b" and "layer" not in meta
    assert [meta["classes"][number] for number in table["classes"]] == [
        {0: "own of layer 3 of a", 1: "own of layer 3 of b", 2: "shared"}[row["class"]]
        for row in cross.table
    ]
    keys = [column["key"] for column in meta["columns"]]
    assert keys == ["density", "max", "interest", "relative", "cosine"]
    assert table["columns"]["relative"] == pytest.approx(
        [row["targets"][1]["share"] for row in cross.table], abs=1e-3
    )
    page = read(cross.pages, "features/000")
    own = page["features"][SHARED]
    assert own["class"] == 0 and [target[0] for target in own["targets"]] == [1, 0]
    assert page["words"][own["targets"][0][2][0][0]] == own_first(cross, SHARED)


def own_first(cross: Built, latent: int) -> str:
    return str(cross.table[latent]["targets"][0]["raised"][0]["text"])


def test_a_transcoder_reads_and_writes(trans: Built) -> None:
    subject = Subject.open(trans.run, None, torch.device("cpu"))
    f, _, tokens = dense(subject)
    encoder = torch.nn.functional.normalize(subject.sae.encoder, dim=1)
    nearest = (encoder @ encoder.T).fill_diagonal_(-2).amax(1)
    raised = (subject.sae.W_dec @ unembedding().T).topk(4).indices
    page = read(trans.pages, "features/000")
    meta = read(trans.pages, "meta")
    assert (meta["reads"], meta["writes"]) == ("mlp_in of layer 3", "mlp_out of layer 3")
    for latent, row in enumerate(trans.table):
        assert row["readers"][0]["cosine"] == pytest.approx(float(nearest[latent]), abs=1e-5)
        assert [one["token"] for one in row["raised"]] == raised[latent].tolist()
        by_token = torch.zeros(int(tokens.max()) + 1, dtype=torch.float64)
        by_token.index_add_(0, tokens, f[:, latent])
        share, _ = (by_token / by_token.sum()).max(0)
        word, shown = page["features"][latent]["tokens"][0]
        assert shown == pytest.approx(float(share), rel=1e-3)
        assert by_token[int(page["words"][word][1:])] == by_token.max()


def test_the_report_says_what_is_read_and_written(cross: Built, trans: Built) -> None:
    for one, sentence in (
        (
            cross,
            "A crosscoder (topk, 46 features, k = 8 at a time) of layer 3 of a and layer 3 of b",
        ),
        (
            trans,
            "A transcoder (topk, 46 features, k = 8 at a time) that reads mlp_in of layer 3",
        ),
    ):
        subject = Subject.open(one.run, None, torch.device("cpu"))
        run, store = facts.of_run(subject), facts.of_store(subject)
        assert facts.opening(subject, run, store).startswith(sentence)
    assert (store["reads"], store["writes"]) == ("mlp_in of layer 3", "mlp_out of layer 3")
    assert "site" not in store


# -- in a browser ----------------------------------------------------------------------------------


def shown(chrome: Chromium, selector: str) -> list[str]:
    script = f"[...document.querySelectorAll({selector!r})].map((one) => one.innerText)"
    return list(chrome.js(script))


@NEEDS_CHROMIUM
def test_targets_stand_side_by_side(chrome: Chromium, cross: Built) -> None:
    page = (cross.pages / PAGE).as_uri()
    chrome.open(f"{page}#feature={SHARED}")
    assert shown(chrome, ".part > h3") == ["layer 3 of a", "layer 3 of b"]
    boxes = "[...document.querySelectorAll('.part')].map((one) => one.getBoundingClientRect().top)"
    left, right = chrome.js(boxes)
    assert left == right
    assert "own of layer 3 of a" in shown(chrome, ".facts")[0]
    assert audit(chrome) == [] and chrome.troubles == []
    chrome.open(f"{page}#sort=-relative")
    assert shown(chrome, "#features tbody a")[0] == str(SHARED + OWN_A)
    chrome.js("document.getElementById('class').value = '1'")
    chrome.js("document.getElementById('class').dispatchEvent(new Event('change'))")
    chrome.until(f"document.querySelectorAll('#features tbody tr').length === {OWN_B}")
    assert chrome.js("location.hash") == "#sort=-relative&class=1"
    assert audit(chrome) == [] and chrome.troubles == []


@NEEDS_CHROMIUM
def test_what_is_read_stands_beside_what_is_written(chrome: Chromium, trans: Built) -> None:
    chrome.open(f"{(trans.pages / PAGE).as_uri()}#feature=2")
    assert shown(chrome, ".part > h3") == ["Reads mlp_in of layer 3", "Writes mlp_out of layer 3"]
    assert shown(chrome, ".part h3")[1:3] == ["Fires on", "Reads the same"]
    assert chrome.js("document.getElementById('classes').hidden")
    assert audit(chrome) == [] and chrome.troubles == []


@NEEDS_CHROMIUM
@pytest.mark.usefixtures("drawn_once")
def test_the_report_leads_to_the_pages_of_its_features(
    chrome: Chromium, cross: Built, trans: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contexts, "token_names", lambda *_, **__: lambda token: f"t{token}")
    for one in (cross, trans):
        page = report(Subject.open(one.run, None, torch.device("cpu")), 10**6, None)
        chrome.open(page.as_uri(), "document.readyState === 'complete'")
        assert audit(chrome) == [] and chrome.troubles == []
        links = chrome.js("[...document.querySelectorAll('section h3 a')].map((one) => one.href)")
        assert len(links) >= 20
        feature = int(links[0].partition("#feature=")[2])
        assert feature == int(np.nanargmax(np.array(interest_of(one), np.float64)))
        # Tokens, and contexts with their largest activation, as the catalogue has them.
        row = one.table[feature]
        words = shown(chrome, ".cards section:first-of-type .word")
        assert words[:4] == [raised["text"] for raised in row["raised"][:4]]
        peaks = shown(chrome, ".cards section:first-of-type .context:first-of-type .peak")
        peak = row["top"][0]
        assert peaks == [f"t{peak['tokens'][peak['peak']]}"]
        chrome.open(links[0])
        assert shown(chrome, "h2")[0] == f"Feature {feature}"
        with served(one.pages) as address:
            served_page = address.replace(PAGE, "report.html")
            chrome.open(served_page, "document.readyState === 'complete'")
            leads = chrome.js("[...document.links].map((link) => link.href.split('#')[0])")
            assert len(set(leads)) > 3
            for link in set(leads):
                with urlopen(link) as answer:  # an HTTPError where it leads nowhere
                    assert answer.read()


def interest_of(one: Built) -> list[float | None]:
    return list(read(one.pages, "table")["columns"]["interest"])
