"""The cache for delphi against dense activations, and what delphi itself reads of it.

delphi (`pip install eai-delphi`) may live in an environment of its own, whose interpreter
INTEROP_PYTHON names.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load, load_file

from residual_saes.analyze import results
from residual_saes.analyze.outcome import Outcome
from residual_saes.analyze.peers import delphi as package
from residual_saes.analyze.peers.delphi import DEFINITION, cache_of, delphi, inputs
from residual_saes.analyze.studies.catalogue import index, table
from residual_saes.analyze.studies.catalogue import study as catalogue
from residual_saes.analyze.study import Study
from residual_saes.analyze.subject import Subject
from residual_saes.data import digests
from residual_saes.data.errors import SettingError, StopRequest, StoreError
from residual_saes.harvest.model import ModelConfig
from residual_saes.train.sae import SAE
from tests.analyze.browser_site import copied
from tests.analyze.conftest import LAYER, F, Made
from tests.analyze.test_catalogue import UNIT, Truth

CONTEXT, BORDERS = 32, (0, 13, 26, 40)  # of three files of 40 latents
UNITS = [0, 2, 3, 4, 5, 6, 9, 10, 11, 12, 13, 15]  # of 16: rows of the cache are not the store's
HOOK = f"layers.{LAYER}"


class Done(NamedTuple):
    study: Study
    outcome: Outcome
    f: NDArray[np.float64]  # (n, F) dense activations of the catalogue's units
    tokens: NDArray[np.uint32]  # (n,)

    @property
    def folder(self) -> Path:
        return self.study.folder / "latents" / HOOK


def study_of(run: Path, name: str = "delphi", **options: Any) -> Study:
    return Study(
        name, Subject.open(run, None, torch.device("cpu")), options, ModelConfig("nowhere/none")
    )


def catalogued(run: Path, part: str = "held_out") -> Path:
    options = {"rows": 1e6, "part": part, "top": 2, "quantiles": 2, "each": 1, "logits": 0}
    study_of(run, "catalogue", **options).perform(catalogue.DEFINITION)
    return run


@pytest.fixture(scope="module", autouse=True)
def small_blocks() -> Iterator[None]:
    """Row groups of 16 latents, so that 40 are in several, and files begin within one."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (index, table, package):
            patch.setattr(module, "BLOCK", 16)
        yield


@pytest.fixture(scope="module")
def done(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Done:
    run = copied(made.run, tmp_path_factory.mktemp("delphi") / "run", made.sae)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(catalogue, "held_out_units", lambda _: UNITS)
        study = study_of(catalogued(run), splits=3)
    rows = np.concatenate([np.arange(UNIT) + unit * UNIT for unit in UNITS])
    truth = Truth(made)
    return Done(study, study.perform(DEFINITION), truth.f[rows], truth.tokens[rows])


def test_files_are_the_dense_activations(done: Done) -> None:
    names = [f"{first}_{end - 1}.safetensors" for first, end in pairwise(BORDERS)]
    assert sorted(path.name for path in done.folder.iterdir()) == sorted([*names, "config.json"])
    assert done.outcome.figures["pairs"] == (done.f > 0).sum() > 0
    for name, (first, end) in zip(names, pairwise(BORDERS), strict=True):
        found = load_file(done.folder / name)
        np.testing.assert_array_equal(found["tokens"], done.tokens.reshape(-1, CONTEXT))
        locations, activations = found["locations"], found["activations"]
        assert (locations.dtype, activations.dtype) == (np.uint16, np.float16)
        latent, at = np.nonzero(done.f[:, first:end].T)  # by latent, then in the order of the text
        order = np.argsort(locations[:, 2], kind="stable")
        expected = np.stack([at // CONTEXT, at % CONTEXT, latent], axis=1)
        np.testing.assert_array_equal(locations[order], expected)
        np.testing.assert_allclose(activations[order], done.f[at, first + latent], rtol=2e-3)


def test_what_lies_beside(done: Done) -> None:
    counts = torch.load(done.study.folder / "log" / "hookpoint_firing_counts.pt", weights_only=True)
    assert list(counts) == [HOOK] and counts[HOOK].dtype == torch.int64
    np.testing.assert_array_equal(counts[HOOK], (done.f > 0).sum(0))
    near = json.loads(
        (done.study.folder / "neighbours" / f"{HOOK}-decoder_similarity.json").read_text()
    )
    cosines = (done.study.subject.sae.W_dec @ done.study.subject.sae.W_dec.T).fill_diagonal_(-2)
    assert list(near) == [str(latent) for latent in range(F)]
    for latent in range(F):
        best = cosines[latent].sort(descending=True)
        assert [neighbour for _, neighbour in near[str(latent)]] == best.indices[:10].tolist()
        np.testing.assert_allclose(
            [cosine for cosine, _ in near[str(latent)]], best.values[:10], rtol=1e-5
        )
    config = json.loads((done.folder / "config.json").read_text())
    sizes = [config["cache_ctx_len"], config["n_tokens"], config["n_splits"]]
    assert sizes == [CONTEXT, len(done.f), 3]
    assert config["model_name"] == "nowhere/none"


def test_the_next_command(done: Done) -> None:
    """It is delphi's where delphi can load the SAE."""
    lines = " ".join(done.outcome.summary)
    run = done.study.subject.run
    assert "to=sparsify" in lines
    assert f"python -m delphi nowhere/none {run}/export/sparsify" in lines
    sae = done.study.subject.sae
    other = SAE.of(sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec, sae.k, torch.zeros(F))
    study = replace(done.study, subject=replace(done.study.subject, sae=other))
    lines = " ".join(package.summary(study, {**done.outcome.figures, "context": 48}))
    assert "to=sparsify" not in lines and "LatentDataset(" in lines
    assert "--example_ctx_len" in lines


@pytest.mark.parametrize(("factor", "kind"), [(1e5, np.float32), (1e-10, np.float16)])
def test_nothing_is_clipped_or_lost(made: Made, tmp_path: Path, factor: float, kind: type) -> None:
    """Beyond half precision: too large keeps single precision, too small still fires."""
    sae = made.sae
    scaled = SAE.of(sae.W_enc * factor, sae.W_dec, sae.b_enc * factor, sae.b_dec, sae.k)
    study = study_of(catalogued(copied(made.run, tmp_path / "run", scaled), "all"))
    outcome, f = delphi(study), Truth(made).f * factor
    assert outcome.figures["splits"] == 3
    assert outcome.figures["activations"] == np.dtype(kind).name
    dense = np.zeros_like(f)
    for path in (study.folder / "latents" / HOOK).glob("*.safetensors"):
        found = load_file(path)
        row, position, latent = found["locations"].astype(np.int64).T
        assert found["activations"].dtype == kind
        dense[row * CONTEXT + position, latent + int(path.stem.split("_")[0])] = found[
            "activations"
        ]
    assert np.isfinite(dense).all() and np.array_equal(dense > 0, f > 0)
    np.testing.assert_allclose(dense, f, rtol=1e-5, atol=2.0**-24)


def test_many_rows_have_wide_locations(done: Done) -> None:
    cache = cache_of(done.study.subject)
    more = replace(
        cache,
        tokens=np.zeros((2**16 + 1, CONTEXT), np.uint32),
        rows=[row + 2**16 for row in cache.rows],
    )
    few = load(b"".join(package.file_parts(cache, 0, F, StopRequest())))["locations"]
    many = load(b"".join(package.file_parts(more, 0, F, StopRequest())))["locations"]
    assert (few.dtype, many.dtype) == (np.uint16, np.uint32)
    np.testing.assert_array_equal(
        many - few, np.array([2**16, 0, 0])[None].repeat(len(few), axis=0)
    )


def test_a_cache_that_changes_or_is_gone_is_made_anew(made: Made, tmp_path: Path) -> None:
    run = catalogued(copied(made.run, tmp_path / "run", made.sae))
    for splits in (4, 2):
        study = study_of(run, splits=splits)
        study.perform(DEFINITION)
        assert len(list((study.folder / "latents" / HOOK).glob("*.safetensors"))) == splits
    (study.folder / "latents" / HOOK / "config.json").unlink()
    study.perform(DEFINITION)
    assert (study.folder / "latents" / HOOK / "config.json").is_file()
    depends = inputs(study)
    there = run / "studies/catalogue/features.parquet"
    rows = pq.read_table(there)
    counts = (rows.column("count").to_numpy() + 1).tolist()
    pq.write_table(rows.set_column(1, "count", [counts]), there)
    with pytest.raises(StoreError, match="study=catalogue"):  # damaged
        inputs(study)
    about = digests.read(there.parent, "").about
    results.seal(there.parent, about)
    assert inputs(study)["catalogue"] != depends["catalogue"]
    assert inputs(study)["units"] == depends["units"]
    with pytest.raises(StoreError, match=catalogue.FILE):
        study.perform(DEFINITION)
    assert len(list((study.folder / "latents" / HOOK).iterdir())) == 3  # what was there stays


def test_refusals(made: Made, tmp_path: Path) -> None:
    run = copied(made.run, tmp_path / "run", made.sae)
    with pytest.raises(StoreError, match="study=catalogue"):
        inputs(study_of(run))
    catalogued(run)
    for splits in (0, F + 1):
        with pytest.raises(SettingError, match=f"study.splits={splits}"):
            delphi(study_of(run, splits=splits))


# -- delphi itself ---------------------------------------------------------------------------------

PYTHON = os.environ.get("INTEROP_PYTHON", sys.executable)
WINDOW = 16
IS_INSTALLED = """
import importlib.util, sys
sys.exit(not all(map(importlib.util.find_spec, ("delphi", "asyncer", "blobfile"))))
"""
SCRIPT = """
import json, sys, types
for name in ("faiss", "sentence_transformers"):  # imported by delphi for non_activating_source=FAISS alone
    sys.modules[name] = types.ModuleType(name)
sys.modules["sentence_transformers"].SentenceTransformer = object
import torch
from delphi.config import ConstructorConfig, SamplerConfig
from delphi.latents import LatentDataset
raw, hook, window = sys.argv[1], sys.argv[2], int(sys.argv[3])
names = types.SimpleNamespace(batch_decode=lambda tokens: [f"<{int(token)}>" for token in tokens])

def records(latents, **options):
    constructor = ConstructorConfig(example_ctx_len=window, min_examples=1, n_non_activating=4, **options)
    sampler = SamplerConfig(n_examples_train=4, n_examples_test=2, n_quantiles=2)
    given = None if latents is None else {hook: torch.tensor(latents)}
    for record in LatentDataset(raw, sampler, constructor, tokenizer=names, modules=[hook], latents=given):
        yield {
            "latent": record.latent.latent_index, "frequency": record.per_token_frequency,
            "largest": record.max_activation, "train": [example.str_tokens for example in record.train],
            "tokens": [example.tokens.tolist() for example in record.examples],
            "activations": [example.activations.tolist() for example in record.examples],
            "not_active": [example.tokens.tolist() for example in record.not_active],
            "neighbours": [[near.distance, near.latent_index] for near in record.neighbours],
        }

near = {"non_activating_source": "neighbours", "neighbours_type": "decoder_similarity"}
print(json.dumps([list(records(None)), list(records(json.loads(sys.argv[4]))), list(records(None, **near))]))
"""


def test_delphi_reads_the_same_examples(done: Done) -> None:
    if subprocess.run([PYTHON, "-c", IS_INSTALLED], check=False).returncode:
        pytest.skip("eai-delphi is not installed: pip install eai-delphi, or set INTEROP_PYTHON")
    wanted = [39, 0, 12, 13, 14, 25, 26]  # on both sides of the files' borders
    asked = [
        PYTHON,
        "-c",
        SCRIPT,
        done.study.folder / "latents",
        HOOK,
        str(WINDOW),
        json.dumps(wanted),
    ]
    delphis = subprocess.run(
        asked, check=True, capture_output=True, cwd=done.study.folder, text=True
    )
    every, some, near = json.loads(delphis.stdout.splitlines()[-1])
    alive = np.flatnonzero((done.f > 0).any(0)).tolist()
    assert sorted(record["latent"] for record in every) == alive
    assert sorted(record["latent"] for record in some) == sorted(set(wanted) & set(alive))
    windows, texts = done.f.reshape(-1, WINDOW, F), done.tokens.reshape(-1, WINDOW)
    for record in [*every, *some]:
        own = windows[:, :, record["latent"]]
        fires = np.flatnonzero(own.any(1))
        order = fires[np.lexsort(texts[fires].T)]
        tokens, activations = np.array(record["tokens"]), np.array(record["activations"])
        theirs = np.lexsort(tokens.T)
        np.testing.assert_array_equal(tokens[theirs], texts[order])
        np.testing.assert_allclose(activations[theirs], own[order], rtol=2e-3)
        assert (np.diff(activations.max(1)) <= 0).all()
        assert record["largest"] == pytest.approx(own.max(), rel=2e-3)
        assert record["frequency"] == pytest.approx((own > 0).mean())
        silent = {tuple(row) for row in texts[~own.any(1)].tolist()}
        assert {tuple(row) for row in record["not_active"]} <= silent
    saved = json.loads(
        (done.study.folder / "neighbours" / f"{HOOK}-decoder_similarity.json").read_text()
    )
    assert all(record["neighbours"] == saved[str(record["latent"])] for record in near)
    assert any(record["not_active"] for record in near)
