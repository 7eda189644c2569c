"""The files for Neuronpedia against the catalogue, dense activations, its importer, PostgreSQL."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from residual_saes.analyze import results
from residual_saes.analyze.outcome import Outcome
from residual_saes.analyze.peers import neuronpedia as package
from residual_saes.analyze.peers.neuronpedia import (
    BINS,
    DEFINITION,
    INTERVALS,
    histograms,
    inputs,
    neuronpedia,
    storable,
)
from residual_saes.analyze.studies.catalogue import index, table
from residual_saes.analyze.studies.catalogue import study as catalogue
from residual_saes.analyze.study import Study
from residual_saes.analyze.subject import Subject
from residual_saes.data import digests
from residual_saes.data.errors import SettingError, StopRequest, StoreError
from residual_saes.data.model_path import EMBEDDED
from residual_saes.harvest.hub_model import described
from residual_saes.harvest.model import ModelConfig
from residual_saes.harvest.tokens import Tokenizer
from tests.analyze import browser_site
from tests.analyze.conftest import LAYER, F, Made, make_run, random_rows
from tests.analyze.test_catalogue import Truth

BATCH, DEAD = 16, range(16, 32)  # latents of a file; those of the second never fire
# Its tables' columns as its prisma/schema.prisma has them, as far as they are written, with their
# types in PostgreSQL.
NEURON = {
    "modelId": "text", "layer": "text", "index": "text", "sourceSetName": "text", "creatorId": "text",
    "maxActApprox": "double precision", "hasVector": "boolean", "vector": "double precision[]", "hookName": "text",
    "vectorDefaultSteerStrength": "double precision", "topkCosSimIndices": "integer[]",
    "topkCosSimValues": "double precision[]", "frac_nonzero": "double precision",
    "freq_hist_data_bar_values": "double precision[]", "freq_hist_data_bar_heights": "double precision[]",
    "pos_str": "text[]", "pos_values": "double precision[]", "neg_str": "text[]", "neg_values": "double precision[]",
}  # fmt: skip
ACTIVATION = {
    "id": "text", "modelId": "text", "layer": "text", "index": "text", "creatorId": "text", "tokens": "text[]",
    "values": "double precision[]", "maxValue": "double precision", "maxValueTokenIndex": "integer",
    "minValue": "double precision", "qualifyingTokenIndex": "integer", "dataIndex": "text",
    "binMin": "double precision", "binMax": "double precision", "binContains": "double precision",
}  # fmt: skip


def say(token: int) -> str:
    """Hostile texts. Some spell NUL's escape behind a backslash or two, which must be left alone."""
    return ("", "\\u0000", "\\\\u0000\n", "\0")[token % 4] + browser_site.say(token)


class Done(NamedTuple):
    made: Made
    study: Study
    outcome: Outcome
    table: list[dict[str, Any]]  # the catalogue's
    features: list[dict[str, Any]]
    activations: list[dict[str, Any]]
    folder: Path


def study_of(run: Path, **options: Any) -> Study:
    subject = Subject.open(run, None, torch.device("cpu"))
    return Study("neuronpedia", subject, options, ModelConfig("nowhere/none"))


def read(path: Path) -> list[dict[str, Any]]:
    """The lines as the importer reads them: it replaces what looks like an escaped NUL, and splits
    at line feeds.
    """
    text = gzip.decompress(path.read_bytes()).decode()
    return [json.loads(line) for line in text.replace("\\u0000", " ").strip().split("\n")]


def batches(folder: Path) -> list[dict[str, Any]]:
    return [row for path in sorted(folder.glob("batch-*.jsonl.gz")) for row in read(path)]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    made = make_run(tmp_path_factory.mktemp("neuronpedia"), random_rows())
    made.sae.b_enc[list(DEAD)] = -1e9
    run = browser_site.copied(made.run, made.run.parent / "A Run_L3", made.sae)
    with pytest.MonkeyPatch.context() as patch:
        # Row groups of 16 latents, so that 40 are in several.
        for module in (index, table, package):
            patch.setattr(module, "BLOCK", 16)
        browser_site.with_logits(patch)
        browser_site.of_run(run)
        patch.setattr(catalogue, "names", lambda *_, **__: say)
        study = study_of(run)
        outcome = study.perform(replace(DEFINITION, run=partial(neuronpedia, batch=BATCH)))
    folder = study.folder / "v1/none" / f"{LAYER}-a-run-l3-res-40"
    rows = pq.read_table(run / "studies/catalogue/features.parquet").to_pylist()
    return Done(
        made,
        study,
        outcome,
        rows,
        batches(folder / "features"),
        batches(folder / "activations"),
        folder,
    )


def close(values: Any) -> Any:
    return pytest.approx(values, rel=1e-5)


def test_features_are_the_catalogue(done: Done) -> None:
    assert [row["index"] for row in done.features] == [str(latent) for latent in range(F)]
    for own, row in zip(done.features, done.table, strict=True):
        assert list(own) == list(done.features[0]) and set(own) == set(NEURON)
        assert (own["modelId"], own["layer"], own["sourceSetName"]) == (
            "none",
            "3-a-run-l3-res-40",
            "a-run-l3-res-40",
        )
        assert own["frac_nonzero"] == row["density"]
        assert own["maxActApprox"] == own["vectorDefaultSteerStrength"] == close(row["max"] or 0)
        for name, column in (("pos", "raised"), ("neg", "lowered")):
            assert (
                own[f"{name}_str"] == [storable(say(logit["token"])) for logit in row[column]] != []
            )
            assert own[f"{name}_values"] == close([logit["logit"] for logit in row[column]])
        near = row["neighbours"]
        assert own["topkCosSimIndices"] == [row["feature"], *(other["feature"] for other in near)]
        assert own["topkCosSimValues"] == close([1, *(other["cosine"] for other in near)])
        assert own["hasVector"] and own["hookName"] == f"blocks.{LAYER}.hook_resid_post"
        assert own["vector"] == close(done.made.sae.W_dec[row["feature"]].tolist())


def test_histograms_are_of_dense_activations(done: Done) -> None:
    f = Truth(done.made).f
    for own in done.features:
        fires = f[:, int(own["index"])][f[:, int(own["index"])] > 0]
        heights, edges = (
            np.histogram(fires, BINS, (0, fires.max()))
            if len(fires)
            else (np.empty(0), np.empty(1))
        )
        assert own["freq_hist_data_bar_heights"] == heights.tolist()
        assert own["freq_hist_data_bar_values"] == close(((edges[1:] + edges[:-1]) / 2).tolist())
    # Places of latents that never fire, as the table has it, are counted, so that the difference is
    # found.
    unknown = histograms(
        catalogue.files(done.study.subject).places,
        0,
        np.full(16, np.nan, np.float32),
        StopRequest(),
    )
    assert unknown.sum(1).tolist() == (f[:, :16] > 0).sum(0).tolist()


def test_activations_are_the_contexts(done: Done) -> None:
    truth, given = Truth(done.made), iter(done.activations)
    for row in done.table:
        f = truth.f[truth.kept, row["feature"]]
        for part, contexts in (("top", row["top"]), ("quantiles", row["quantiles"])):
            for context in contexts:
                own = next(given)
                assert list(own) == list(done.activations[0]) and set(own) == set(ACTIVATION)
                assert (own["index"], own["layer"]) == (str(row["feature"]), "3-a-run-l3-res-40")
                assert own["tokens"] == [storable(say(token)) for token in context["tokens"]]
                assert own["values"] == close(context["activations"])
                assert own["qualifyingTokenIndex"] == context["peak"]
                assert own["values"][context["peak"]] == close(context["value"])
                assert own["dataIndex"] == f"{context['document']}:{context['position']}"
                assert (own["maxValue"], own["minValue"]) == (
                    max(own["values"]),
                    min(own["values"]),
                )
                assert own["maxValueTokenIndex"] == own["values"].index(own["maxValue"])
                low, high, share = own["binMin"], own["binMax"], own["binContains"]
                if part == "top":
                    assert (low, high, share) == (-1, close(row["max"]), -1)
                    continue
                number = round(low / row["max"] * INTERVALS)
                edges = np.linspace(0, row["max"], INTERVALS + 1)
                assert (low, high) == (close(edges[number]), close(edges[number + 1]))
                assert low <= context["value"] <= high * (1 + 1e-5)
                inside = (f >= edges[number]) & (
                    (f < edges[number + 1]) | (number == INTERVALS - 1)
                )
                assert share == close(inside.mean())
    assert next(given, None) is None
    numbers = [row["binMin"] for row in done.activations if row["binMin"] >= 0]
    assert 0 in numbers and len(set(numbers)) > 20
    assert (
        len({row["id"] for row in done.activations})
        == len(done.activations)
        == done.outcome.figures["activations"]
    )


def test_files_without_activations_are_not_written_and_all_are_the_same_again(done: Done) -> None:
    """The importer fails on an empty file. DEAD are the latents of the second batch."""
    assert sorted(path.name for path in (done.folder / "features").iterdir()) == [
        f"batch-{n}.jsonl.gz" for n in range(3)
    ]
    assert sorted(path.name for path in (done.folder / "activations").iterdir()) == [
        "batch-0.jsonl.gz",
        "batch-2.jsonl.gz",
    ]
    first = {path: path.read_bytes() for path in done.folder.rglob("*") if path.is_file()}
    assert all(
        found[4:8] == b"\0\0\0\0" for path, found in first.items() if path.suffix == ".gz"
    )  # no time of day
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(catalogue, "names", lambda *_, **__: say)
        patch.setattr(package, "BLOCK", 16)
        neuronpedia(done.study, BATCH)
    assert {path: path.read_bytes() for path in done.folder.rglob("*") if path.is_file()} == first


def test_the_importer_loses_no_text(done: Done) -> None:
    raw = b"".join(
        gzip.decompress(path.read_bytes()) for path in done.folder.rglob("*.gz")
    ).decode()
    assert "\\u0000" not in raw and "\0" not in raw and "u005cu0000" in raw
    shown = {text for row in done.activations for text in row["tokens"]}
    expected = set()
    for row in done.table:
        for context in row["top"] + row["quantiles"]:
            expected |= {storable(say(token)) for token in context["tokens"]}
    assert shown == expected
    assert any("\\\\u0000" in text for text in shown) and any("\ufffd" in text for text in shown)


def test_lines_belong_together(done: Done) -> None:
    release, model, sourceset, source = (
        json.loads((done.folder / f"{name}.jsonl").read_bytes())
        for name in ("release", "model", "sourceset", "source")
    )
    assert (
        sourceset["releaseName"] == release["name"]
        and source["modelId"] == sourceset["modelId"] == model["id"]
    )
    assert (
        source["setName"] == sourceset["name"]
        and source["id"] == f"{LAYER}-{sourceset['name']}" == done.folder.name
    )
    assert (source["num_prompts"], source["num_tokens_in_prompt"]) == (64, 32)
    owners = {
        row["creatorId"]
        for row in (release, model, sourceset, source, *done.features, *done.activations)
    }
    assert len(owners) == 1 and f"modelId=none&sourceId={source['id']}" in " ".join(
        done.outcome.summary
    )


def test_settings(done: Done, tmp_path: Path) -> None:
    """Files under former names go; files that are gone are made again."""
    asked = {
        "model": "gemma-4-e4b",
        "set": "ours_res-32k",
        "release": "ours",
        "author": "A. N.",
        "vectors": False,
    }
    run = browser_site.copied(done.study.subject.run, tmp_path / "run", done.made.sae)
    browser_site.of_run(run)
    first, study = study_of(run), study_of(run, **asked)
    first.perform(DEFINITION)
    assert (study.folder / "v1/none").is_dir()
    summary = study.perform(DEFINITION).summary
    assert [path.name for path in (study.folder / "v1").iterdir()] == ["gemma-4-e4b"]
    folder = study.folder / "v1/gemma-4-e4b" / "3-ours_res-32k"
    features = batches(folder / "features")
    vectors = {(row["hasVector"], row["hookName"], len(row["vector"])) for row in features}
    assert vectors == {(False, None, 0)}
    first_token = batches(folder / "activations")[0]["tokens"][0]
    assert first_token.startswith("#")  # no tokenizer: their ids
    release = json.loads((folder / "release.jsonl").read_bytes())
    sourceset = json.loads((folder / "sourceset.jsonl").read_bytes())
    assert release["name"] == sourceset["releaseName"] == "ours"
    assert "model.path=" in summary[-1]
    (folder / "source.jsonl").unlink()
    study.perform(DEFINITION)
    assert (folder / "source.jsonl").is_file()
    depends = inputs(study)
    assert depends["names"] != inputs(first)["names"]
    there = run / "studies/catalogue/features.parquet"
    rows = pq.read_table(there)
    more = (rows.column("count").to_numpy() + 1).tolist()
    pq.write_table(rows.set_column(1, "count", [more]), there)
    results.seal(there.parent, digests.read(there.parent, "").about)
    assert inputs(study)["catalogue"] != depends["catalogue"]
    assert inputs(study)["units"] == depends["units"]
    with pytest.raises(StoreError, match=r"features\.parquet"):
        neuronpedia(study)


def test_refusals(done: Done) -> None:
    for name, wrong in {
        "model": "google/gemma", "set": "a__b", "release": "a_b", "author": " ", "creator": "", "set ": 7,
    }.items():  # fmt: skip
        with pytest.raises(SettingError, match=re.escape(f"study.{name.strip()}={wrong}")):
            neuronpedia(study_of(done.study.subject.run, **{name.strip(): wrong}))
    with pytest.raises(StoreError, match="study=catalogue"):
        inputs(study_of(done.made.run))


def test_texts_are_the_tokenizers(done: Done) -> None:
    tokenizer = Tokenizer.load(described(EMBEDDED, "main"))
    for digest in (tokenizer.digest, "another"):
        store = SimpleNamespace(
            manifest={"model": {"tokenizer": digest, "revision": "main"}}, name="s"
        )
        subject = SimpleNamespace(store=store, model_path=lambda asked: asked)
        found = catalogue.names(
            replace(done.study, model=ModelConfig(EMBEDDED), subject=subject), raw=True
        )
        assert (found is None) == (digest == "another")
        assert found is None or found(tokenizer.inner("a\n")["input_ids"][-1]) == "\n"


def _key(row: dict[str, Any]) -> str:
    return str(row.get("id", row["index"]))


# -- PostgreSQL ------------------------------------------------------------------------------------


def test_postgresql_takes_all(done: Done) -> None:
    """The importer's statement, in tables of the columns' types: what comes out is what went in."""
    if not (shutil.which("initdb") and shutil.which("postgres")):
        pytest.skip("PostgreSQL is not installed: no initdb and postgres in PATH")
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        statements = []
        for table, columns, rows in (
            ("Neuron", NEURON, done.features),
            ("Activation", ACTIVATION, done.activations),
        ):
            (root / f"{table}.json").write_text(json.dumps(rows, ensure_ascii=False))
            typed = ", ".join(f'"{name}" {kind}' for name, kind in columns.items())
            names = ", ".join(map('"{}"'.format, columns))
            key = '"id"' if table == "Activation" else '"modelId", "layer", "index"'
            statements += [
                f'CREATE TABLE "{table}" ({typed}, PRIMARY KEY ({key}))',
                f'INSERT INTO "{table}" ({names}) SELECT {names} FROM jsonb_to_recordset('
                f"pg_read_file('{root}/{table}.json')::jsonb) AS t({typed}) ON CONFLICT DO NOTHING",
                f"COPY (SELECT encode(convert_to(jsonb_agg(to_jsonb(t))::text, 'UTF8'), 'hex') FROM \"{table}\" t) "
                f"TO '{root}/{table}.hex'",
            ]
        # PostgreSQL refuses to run as root.
        other: dict[str, Any] = (
            {"user": "nobody", "group": "nogroup", "extra_groups": []} if not os.getuid() else {}
        )
        if other:
            shutil.chown(root, "nobody", "nogroup")
        options = {"check": True, "capture_output": True, "cwd": root, **other}
        made = [
            "initdb",
            "-D",
            root / "data",
            "-E",
            "UTF8",
            "--locale=C",
            "-A",
            "trust",
            "--no-sync",
        ]
        subprocess.run(made, **options)
        asked = ["postgres", "--single", "-F", "-D", root / "data", "postgres"]
        subprocess.run(asked, input="\n".join(statements).encode(), **options)
        for table, rows in (("Neuron", done.features), ("Activation", done.activations)):
            kept = json.loads(bytes.fromhex((root / f"{table}.hex").read_text()))
            assert sorted(kept, key=_key) == sorted(rows, key=_key)
