"""The feature browser's folder against the catalogue and brute force."""

from __future__ import annotations

import json
import math
import urllib.request
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.error import HTTPError

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer as Inner
from tokenizers import decoders, models

from residual_saes.analyze import results
from residual_saes.analyze.latents import contexts
from residual_saes.analyze.outcome import Outcome
from residual_saes.analyze.pages.answers import QUESTIONS
from residual_saes.analyze.pages.browser import columns
from residual_saes.analyze.pages.browser.joins import TOP as PARTNERS
from residual_saes.analyze.pages.browser.pages import CHUNK
from residual_saes.analyze.pages.browser.serve import server
from residual_saes.analyze.pages.browser.study import DEFINITION, PAGE, browser, inputs
from residual_saes.analyze.pages.browser.tokens import TOP
from residual_saes.analyze.pages.script import script, short
from residual_saes.analyze.studies.catalogue import coactivation
from residual_saes.analyze.studies.catalogue import study as catalogue
from residual_saes.analyze.study import Study
from residual_saes.analyze.subject import Subject
from residual_saes.data.errors import SettingError, StopRequest, StoreError
from residual_saes.data.rows import summary
from residual_saes.train.sae import SAE, SAEConfig
from tests.analyze.browser_site import (
    HOSTILE,
    Built,
    build,
    copied,
    findings,
    of_run,
    read,
    say,
    served,
    study_of,
)
from tests.analyze.conftest import D, F, make_run, random_rows, write_run
from tests.analyze.test_catalogue import Truth
from tests.conftest import commit


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return build(tmp_path_factory.mktemp("browser"))


# -- data ------------------------------------------------------------------------------------------


def test_pages_are_the_catalogue(built: Built) -> None:
    rows = pq.read_table(built.made.run / "studies/catalogue/features.parquet").to_pylist()
    page = read(built.folder, "features/000")
    figures = read(built.folder, "table")["columns"].values()
    words = page["words"]
    assert len(rows) == F <= CHUNK and len(page["features"]) == F
    checked = 0

    def check(context: list[Any], row: dict[str, Any]) -> None:
        document, position, peak, tokens, pairs = context
        assert (document, position, peak) == (row["document"], row["position"], row["peak"])
        assert [words[number] for number in tokens] == [say(token) for token in row["tokens"]]
        values = dict(zip(pairs[::2], pairs[1::2], strict=True))
        for index, value in enumerate(row["activations"]):
            assert values.get(index, 0) == pytest.approx(value, rel=1e-3)
            assert (index in values) == (value != 0)

    for own, row in zip(page["features"], rows, strict=True):
        assert own["count"] == row["count"]
        assert own["figures"] == [column[row["feature"]] for column in figures]
        for key in ("mean", "std"):
            assert own[key] == (None if row[key] is None else pytest.approx(row[key], rel=1e-3))
        for context, expected in zip(own["top"], row["top"][:3], strict=True):
            check(context, expected)
            checked += 1
        samples: dict[int, list[Any]] = {}
        for sample in row["quantiles"]:
            samples.setdefault(sample["quantile"], []).append(sample)
        quantiles = [quantile for quantile, _ in own["quantiles"]]
        assert quantiles == sorted(samples, reverse=True)
        for quantile, kept in own["quantiles"]:
            for context, expected in zip(kept, samples[quantile][:2], strict=True):
                check(context, expected)
        if own["histogram"]:
            first, *counts = own["histogram"]
            assert [0] * first + counts == row["histogram"][: first + len(counts)]
            assert sum(counts) == row["count"]
        raised = [(words[number], logit) for number, logit in own["raised"]]
        assert [text for text, _ in raised] == [say(token["token"]) for token in row["raised"]]
        logits = [token["logit"] for token in row["raised"]]
        assert [logit for _, logit in raised] == pytest.approx(logits, rel=1e-3)
        neighbours = [neighbour["feature"] for neighbour in row["neighbours"]]
        assert [feature for feature, _ in own["neighbours"]] == neighbours
    assert checked > 90


def test_the_list(built: Built) -> None:
    table = read(built.folder, "table")
    rows = pq.read_table(built.made.run / "studies/catalogue/features.parquet").to_pylist()
    keys = ["density", "max", "interest", "d", "d_q", "stability"]
    described = [column["key"] for column in read(built.folder, "meta")["columns"]]
    assert described == list(table["columns"]) == built.outcome.figures["columns"] == keys
    for row in rows:
        feature = row["feature"]
        figures = {key: column[feature] for key, column in table["columns"].items()}
        assert figures["density"] == pytest.approx(row["density"], rel=1e-3)
        peaks = dict.fromkeys(say(context["tokens"][context["peak"]]) for context in row["top"])
        strongest = [table["words"][number] for number in table["strongest"][feature]]
        assert strongest == list(peaks)[:3]
        assert figures["d"] == {7: 1.5, 3: -0.5}.get(feature)
        stability = None if feature % 2 else pytest.approx(feature / F, rel=1e-3)
        assert figures["stability"] == stability


def test_interest_against_its_formula(built: Built) -> None:
    """Of planted logits of mean 0 and deviation 1/4 over 500 ids."""
    found = read(built.folder, "table")["columns"]["interest"]
    rows = pq.read_table(built.made.run / "studies/catalogue/features.parquet").to_pylist()
    average = sum(row["count"] for row in rows) / F
    chance = math.sqrt(2 * math.log(500))
    for row, score in zip(rows, found, strict=True):
        if not row["count"]:
            assert score is None
            continue
        commonest = 1
        for offset in (-1, 0, 1):
            near = []
            for context in row["top"]:
                at = context["peak"] + offset
                if 0 <= at < len(context["tokens"]):
                    near.append(say(context["tokens"][at]).strip().lower())
            commonest = max([commonest, *map(near.count, near)])
        agreement = (commonest - 1) / (max(len(row["top"]), 5) - 1)
        peaked = min(max(4 * row["raised"][0]["logit"] / chance - 1, 0), 1)
        frequency = min(row["count"] / 20, 1) * min(average / row["count"], 1) ** 0.5
        assert score == pytest.approx(frequency * (agreement + peaked) / 2, rel=1e-3)


def test_tokens_that_are_parts_of_characters() -> None:
    """Of a tokenizer of bytes, and of one of SentencePiece's kind whose decoder strips a space."""
    euro = list("âĤ¬")  # the bytes of a euro sign in GPT-2's alphabet
    of_bytes = Inner(
        models.BPE(vocab={"Ġcat": 0, "ĠâĤ": 1, euro[2]: 2, "ï¿½": 3, "Ċ": 4}, merges=[])
    )
    of_bytes.decoder = decoders.ByteLevel()
    pieces = {"▁cat": 0, "cat": 1, "<0xE2>": 2, "<0x0A>": 3, "▁": 4}
    fallback = Inner(models.BPE(vocab=pieces, merges=[], byte_fallback=True))
    fallback.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Strip(" ", 1, 0)]
    )

    def texts(inner: Inner) -> list[Any]:
        tokenizer: Any = SimpleNamespace(inner=inner, backend=inner)
        return [contexts.parted_text(tokenizer, token) for token in range(5)]

    assert texts(of_bytes) == [" cat", (0x20, 0xE2, 0x82), (0xAC,), "\ufffd", "⏎"]
    assert texts(fallback) == [" cat", "cat", (0xE2,), "⏎", " "]


def test_figures_of_another_sae_are_left_out(built: Built) -> None:
    subject = Subject.open(built.made.run, None, torch.device("cpu"))

    done = columns.studied(subject)
    assert set(done) == {"contrast", "stability", "cross_layer"}
    keys = [column.key for column in columns.of_studies(subject, {"stability": done["stability"]})]
    assert keys == ["stability"]
    other = replace(subject, digest="another")
    assert columns.studied(other) == {}


def test_tokens_against_brute_force(built: Built) -> None:
    truth = Truth(built.made)
    listed = read(built.folder, "tokens")
    shard = read(built.folder, "tokens/000")
    inside = ~truth.starts
    ids, occurrences = np.unique(truth.tokens[inside], return_counts=True)
    assert sorted(listed["ids"]) == ids.tolist()
    assert listed["occurrences"] == sorted(occurrences, reverse=True)
    for position in (0, 1, len(shard) - 1):
        token = listed["ids"][position]
        f = truth.f[inside & (truth.tokens == token)]
        assert listed["occurrences"][position] == len(f)
        assert listed["texts"][position] == say(token)
        flat = np.array(shard[position]).reshape(-1, 4)
        best = np.sort(f.mean(0))[::-1][: min(TOP, (f > 0).any(0).sum())]
        np.testing.assert_allclose(flat[:, 1], best, rtol=2e-3)
        for feature, *figures in flat:
            on_token = f[:, int(feature)]
            share = on_token.sum() / truth.f[:, int(feature)].sum()
            expected = [on_token.mean(), (on_token > 0).mean(), share]
            np.testing.assert_allclose(figures, expected, rtol=2e-3)


def test_another_layer_is_joined_token_by_token(tmp_path: Path) -> None:
    """Layer 4 is layer 3 with dimensions in another order; so is its SAE, with latents too."""
    bits = random_rows()
    made = make_run(tmp_path, bits)
    dims, order = (torch.randperm(n, generator=torch.Generator().manual_seed(2)) for n in (D, F))
    for unit in range(made.store.units):
        commit(made.store, unit, {4: bits[unit * 128 : (unit + 1) * 128, dims.numpy()]})
    summary.write(made.store, 4)
    W_enc, W_dec = made.sae.W_enc[dims][:, order], made.sae.W_dec[order][:, dims]
    above = SAE.of(
        W_enc.contiguous(),
        W_dec.contiguous(),
        made.sae.b_enc[order],
        made.sae.b_dec[dims],
        made.sae.k,
    )
    write_run(
        tmp_path / "above",
        made.store,
        4,
        SAEConfig(d_sae=F, k=made.sae.k, k_aux=4, dead_after=1000),
        above,
    )
    for run in (made.run, tmp_path / "above"):
        study_of(run, "catalogue", part="all", rows=1e6, logits=0).perform(catalogue.DEFINITION)
    study = study_of(made.run, others=[str(tmp_path / "above")])
    study.perform(DEFINITION)
    (other,) = read(study.folder, "meta")["others"]
    assert (other["name"], other["layer"]) == ("above", 4)
    place, checked = {int(latent): at for at, latent in enumerate(order)}, 0
    for number, own in enumerate(read(study.folder, "features/000")["features"]):
        if own["count"]:
            feature, cosine = own["others"][0][0]
            assert feature == place[number] and cosine == pytest.approx(1, abs=1e-3)
            checked += 1
    assert checked > 30


def test_other_runs_against_brute_force(built: Built) -> None:
    f = Truth(built.made).f
    norm = np.linalg.norm(f, axis=0)
    cosine = (f.T @ f) / np.maximum(np.outer(norm, norm), 1e-30)
    place = {int(latent): at for at, latent in enumerate(built.order)}
    checked = 0
    for number, own in enumerate(read(built.folder, "features/000")["features"]):
        (partners,) = own["others"]
        if own["count"]:
            assert partners[0] == [place[number], pytest.approx(1, abs=1e-4)]
            expected = np.sort(cosine[number])[::-1][: len(partners)]
            np.testing.assert_allclose([r for _, r in partners], expected, rtol=2e-3, atol=1e-6)
            checked += len(partners) == PARTNERS
    assert checked > 20
    (other,) = read(built.folder, "meta")["others"]
    page = "../../../ot%27her%20%3Cb%3E%26/studies/browser/index.html"
    assert other == {"name": "ot'her <b>&", "layer": 3, "page": page}


def test_what_fires_together_and_the_map(built: Built) -> None:
    """Figures as the catalogue's index has them; on the map latents of both runs that are the same
    are neighbours.
    """
    subject = study_of(built.made.run).subject
    with StopRequest() as stop:
        expected = coactivation.partners(catalogue.files(subject).places, 250_000, stop)
    for own, others in zip(read(built.folder, "features/000")["features"], expected, strict=True):
        assert [pair[0] for pair in own["together"]] == [other.feature for other in others]
        for pair, other in zip(own["together"], others, strict=True):
            assert pair[1:] == pytest.approx(other[1:], rel=1e-3)
    meta = read(built.folder, "meta")
    data = read(built.folder, "map")
    points = np.array(data["points"]).T
    assert points.shape == (2 * F, 2) and meta["map"]["runs"] == [0]
    density = read(built.folder, "table")["columns"]["density"]
    assert data["density"] == [[density[latent] for latent in built.order.tolist()]]
    distance = np.linalg.norm(points[:F][built.order][:, None] - points[F:], axis=2)
    assert (distance.argmin(1) == np.arange(F)).mean() > 0.9


def test_scripts_are_ascii_and_numbers_short() -> None:
    made = script("a", {"x": [*HOSTILE, 0.1]})
    assert made.isascii() and b"<" not in made and b"\n" not in made[:-1]
    assert json.loads(made[len('loaded("a",') : -3])["x"][:-1] == HOSTILE
    assert short([1 / 3, 2.0, float("nan"), 1234567.0]) == [0.3333, 2, None, 1235000]
    with pytest.raises(ValueError):
        script("a", float("nan"))


def test_done_again_only_if_something_changed(built: Built, tmp_path: Path) -> None:
    run = copied(built.made.run, tmp_path / "run", built.made.sae)
    of_run(run)
    times: list[int] = []

    def counted(study: Study) -> Outcome:
        times.append(1)
        return browser(study)

    def again() -> int:
        study = study_of(run)
        study.perform(replace(DEFINITION, run=counted))
        return len(times)

    assert (again(), again()) == (1, 1)
    assert read(run / "studies/browser", "meta")["as_ids"]  # there is no tokenizer at nowhere/none
    (run / "studies/browser" / PAGE).unlink()
    assert again() == 2
    findings(run)
    assert again() == 3
    stale = run / "studies/browser/data/features/999.js"
    stale.touch()
    (run / "studies/browser/browser.json").unlink()
    assert again() == 4 and not stale.exists()


def test_refusals(built: Built, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = copied(built.made.run, tmp_path / "bare", built.made.sae)
    with pytest.raises(StoreError, match="study=catalogue"):
        inputs(study_of(bare))
    with pytest.raises(StoreError, match="study=catalogue"):
        inputs(study_of(built.made.run, others=[str(bare)]))
    study_of(bare).make_first(DEFINITION)  # as the command does
    assert inputs(study_of(bare))
    made = study_of(bare, "catalogue", **asdict(catalogue.Options()))
    made.show(catalogue.DEFINITION, made.perform(catalogue.DEFINITION))
    assert QUESTIONS["catalogue"] in capsys.readouterr().out  # its plain answer comes first
    for wrong in (
        {"contexts": 0},
        {"samples": -1},
        {"others": "runs/b"},
        {"others": [""]},
        {"rows": 0},
    ):
        with pytest.raises(SettingError, match=f"study.{next(iter(wrong))}"):
            inputs(study_of(built.made.run, **wrong))


def test_files_of_the_catalogue_that_are_gone_or_damaged(built: Built, tmp_path: Path) -> None:
    run = copied(built.made.run, tmp_path / "run", built.made.sae)
    of_run(run)
    whole = catalogue.files(study_of(run).subject)
    assert whole.places.units == list(range(16))
    whole.table.write_bytes(b"x")
    with pytest.raises(StoreError, match="study=catalogue"):
        inputs(study_of(run))
    whole.table.unlink()
    with pytest.raises(StoreError, match="study=catalogue"):
        inputs(study_of(run))
    of_run(run)
    whole.places.path(3).unlink()
    with pytest.raises(StoreError, match="study=catalogue"):
        inputs(study_of(run))
    of_run(run)  # as the message says
    assert inputs(study_of(run))
    with pytest.raises(SettingError, match=str(run)):
        inputs(study_of(run, others=[str(run)]))


def test_what_the_pages_depend_on(
    built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another catalogue of the other run, or a tokenizer that is at hand now, makes them again."""
    runs = [copied(built.made.run, tmp_path / name, built.made.sae) for name in "ab"]
    for run in runs:
        of_run(run)
    study = study_of(runs[0], others=[str(runs[1])])
    seen = [inputs(study)]
    study_of(runs[1], "catalogue", rows=1, part="all", logits=0).perform(catalogue.DEFINITION)
    seen.append(inputs(study))
    monkeypatch.setattr(contexts, "token_names", lambda *_, **__: say)
    seen.append(inputs(study))
    assert len(set(map(str, seen))) == 3
    assert [depends["as_ids"] for depends in seen] == [True, True, False]


def test_serving_is_of_this_machine_alone(built: Built, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="study=browser"):
        server(tmp_path, 0)
    with served(built.folder) as url:
        port = int(url.split(":")[2].split("/")[0])
        with pytest.raises(SettingError, match=f"port {port}"):
            server(built.folder, port)
        with urllib.request.urlopen(url) as page:
            assert b"<title>SAE features</title>" in page.read()
        # The report of the run, which leads back as from its own place on the disk.
        report = url.replace(PAGE, "report.html")
        with pytest.raises(HTTPError, match="404"):
            urllib.request.urlopen(report)
        run = copied(built.made.run, tmp_path / "run", built.made.sae)
        of_run(run)
        study = study_of(run)
        study.perform(DEFINITION)
        results.write_beside(run, "report", {"report.html": b"a report"})
        with served(study.folder) as own:
            with urllib.request.urlopen(own.replace(PAGE, "report.html")) as page:
                assert page.read() == b"a report"
                assert page.headers["Content-Security-Policy"] is None
            with urllib.request.urlopen(own.replace(PAGE, f"studies/browser/{PAGE}")) as page:
                assert b"<title>SAE features</title>" in page.read()
            with urllib.request.urlopen(own.replace(PAGE, "studies/index.js")) as script:
                assert script.read().startswith(results.index(run))
                assert b'"catalogue"' in results.index(run)
                assert script.headers["Content-Type"].startswith("text/javascript")
            # Of other studies what their records name, and nothing that a link leads to.
            of_study = own.replace(PAGE, "studies/catalogue/")
            (run / "studies/catalogue/unnamed.json").write_text("{}")
            (run / "studies/linked").symlink_to("catalogue", target_is_directory=True)
            with urllib.request.urlopen(f"{of_study}catalogue.json") as file:
                assert json.load(file)["study"] == "catalogue"
            for refused in (f"{of_study}unnamed.json", f"{of_study}../linked/catalogue.json"):
                with pytest.raises(HTTPError, match="404"):
                    urllib.request.urlopen(refused.replace("catalogue/../", ""))
            (run / "report.html").write_bytes(b"another")
            with pytest.raises(HTTPError, match="500"):
                urllib.request.urlopen(own.replace(PAGE, "report.html"))
