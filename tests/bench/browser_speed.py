"""The feature browser at full size in a real Chromium: `python -m tests.bench.browser_speed`.

32,768 latents and a vocabulary of 262,144 tokens, as of Gemma 4, on random rows; the list has every
column. The pages are made by `study=catalogue` and `study=browser` (with logits by chance: there is
no model) and opened from the disk, whose files lie in the cache, each round in a Chromium that was
started a moment ago and has opened nothing. Milliseconds until what was asked for is painted, from

    list      the address is opened (first paint; the list itself)
    first     the address of a feature is opened, nothing before it
    feature   a link to it is followed, to a file that was not loaded yet; and to one that was
    sort, search, token   a column, a word, a token is asked for in the list that is open
    contexts  a text is searched for in all contexts: until the first hit; until all are read
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from residual_saes.analyze.outcome import Outcome
from residual_saes.analyze.pages.browser import pages, spread
from residual_saes.analyze.pages.browser import study as browser
from residual_saes.analyze.pages.browser.spread import Spread
from residual_saes.analyze.pages.browser.study import PAGE
from residual_saes.analyze.results import FEATURES
from residual_saes.analyze.studies.catalogue import study as catalogue
from residual_saes.analyze.studies.catalogue.table import Ranked
from residual_saes.analyze.studies.stability.study import FILE as MATCHES
from residual_saes.analyze.study import Definition, Study, write_features
from residual_saes.analyze.subject import Subject
from residual_saes.data import durable
from residual_saes.harvest.model import ModelConfig
from residual_saes.train import sae
from residual_saes.train.sae import SAEConfig
from tests.analyze.chromium import EXECUTABLE, Chromium
from tests.analyze.conftest import write_run
from tests.bench.outcome import finish
from tests.conftest import BOS, make_store

VOCABULARY, WIDTH, K, LAYER, CONTEXT = 262_144, 32, 32, 21, 512
LOGITS = 10
SETTLE_S = 1.5  # until Chromium is busy with nothing but the page; its own start takes both cores
FOLLOWED = 12  # features that are opened in a round
# An input or address, then the time at which what it asks for is there and painted.
_ASK = """
(async () => {
  const began = performance.now();
  %s
  while (!(%s)) await new Promise((next) => setTimeout(next, 0));
  await new Promise((next) => requestAnimationFrame(() => setTimeout(next)));
  return performance.now() - began;
})()
"""


def text(token: int) -> str:
    """A word of 2 to 11 letters, with a space before most."""
    letters = "".join(
        "etaoinshrdlucmfwypvbgkqjxz"[(token * 2_654_435_761 >> at) % 26]
        for at in range(2 + token % 10)
    )
    return f" {letters}" if token % 3 else letters


def spreads(d_sae: int) -> Spread:
    """Histograms of normal logits: every page has one."""
    bins = np.exp(-(np.linspace(-4, 4, spread.BINS) ** 2) / 2)
    counts = np.tile((spread.SAMPLE * bins / bins.sum()).astype(np.int32), (d_sae, 1))
    figures = [np.full(d_sae, figure, np.float32) for figure in (-4, 4, 0, 1)]
    return Spread._make([*figures, counts, VOCABULARY])


def built(root: Path, tokens: int, d_sae: int) -> dict[str, Any]:
    """Make the pages; what that took."""
    draw = np.random.default_rng(0)
    bits = (
        torch.from_numpy(draw.standard_normal((tokens, WIDTH), np.float32))
        .bfloat16()
        .view(torch.uint16)
        .numpy()
    )
    zipf = (VOCABULARY ** draw.random(tokens)).astype(np.uint32)  # token r about as often as 1 / r
    rows = np.where(np.arange(tokens) % CONTEXT == 0, BOS, np.maximum(zipf, BOS + 1)).astype(
        np.uint32
    )
    document = np.arange(tokens, dtype=np.uint32) // CONTEXT
    spine = rows.reshape(-1, CONTEXT), document.reshape(-1, CONTEXT)
    store = make_store(
        root / "s.zarr", bits, context=CONTEXT, unit=65_536, chunk=1024, layer=LAYER, spine=spine
    )
    config = SAEConfig(d_sae=d_sae, k=K, k_aux=K, dead_after=1000)
    write_run(root / "run", store, LAYER, config, sae.initial(config, torch.zeros(WIDTH), seed=0))

    def study(name: str, **options: Any) -> Study:
        return Study(
            name,
            Subject.open(root / "run", None, torch.device("cpu")),
            options,
            ModelConfig("nowhere/none"),
        )

    ids = draw.integers(VOCABULARY, size=(2, d_sae, LOGITS))
    scores = -np.sort(-draw.standard_normal((2, d_sae, LOGITS)).astype(np.float32))
    catalogue.logits = lambda *_: ((Ranked(scores[0], ids[0]), Ranked(-scores[1], ids[1])), None)
    catalogue.contexts.token_names = lambda *_, **__: text
    spread.measure = lambda *_: spreads(d_sae)
    catalogue.head_of = lambda *_: (None, None)
    began = time.perf_counter()
    study("catalogue", part="all", rows=tokens).perform(catalogue.DEFINITION)
    catalogued = time.perf_counter() - began
    every = {"feature": np.arange(d_sae)}
    tables = {"contrast": (FEATURES, "d", "q"), "reason_score": (FEATURES, "score", "q")}
    for name, (file, *columns) in {**tables, "stability": (MATCHES, "correlation")}.items():
        table = every | {column: draw.random(d_sae) for column in columns}

        def leave(of: Study, file: str = file, table: dict[str, Any] = table) -> Outcome:
            write_features(of.folder / file, table)
            return Outcome({}, [])

        study(name).perform(Definition(leave))
    shown = study("browser")
    began = time.perf_counter()
    outcome = shown.perform(browser.DEFINITION)
    made = {key: outcome.figures[key] for key in ("files", "bytes", "columns")}
    made["seconds"] = time.perf_counter() - began
    table_bytes = (shown.folder / "data/table.js").stat().st_size
    return {
        "tokens": tokens,
        "d_sae": d_sae,
        "catalogue_s": catalogued,
        **made,
        "tokens_that_occur": outcome.figures["tokens"],
        "table_bytes": table_bytes,
    }


def asked(chrome: Chromium, act: str, there: str) -> float:
    took: float = chrome.js(_ASK % (act, there))
    return took


def opened(chrome: Chromium, url: str) -> dict[str, float]:
    """Milliseconds from the navigation to the first paint, and until the page was there."""
    time.sleep(SETTLE_S)
    chrome.open(url)
    found: dict[str, float] = chrome.js(
        "(async () => {"
        " let paint;"
        " while (!(paint = performance.getEntriesByName('first-contentful-paint')[0]))"
        " await new Promise((next) => setTimeout(next, 5));"
        " const there = Number(document.documentElement.dataset.first);"
        " return {paint: paint.startTime, there}; })()"
    )
    return found


def a_round(folder: Path, features: list[int]) -> dict[str, list[float]]:
    """Every figure once, or once for each feature."""
    url, title = (folder / PAGE).as_uri(), "document.getElementById('feature-title')?.textContent"
    found: dict[str, list[float]] = {}
    with Chromium() as chrome:
        first = opened(chrome, f"{url}#feature={features[0]}")
        found |= {"first_paint": [first["paint"]], "first": [max(first.values())]}
    with Chromium() as chrome:
        shown = opened(chrome, url)
        found |= {"list_paint": [shown["paint"]], "list": [max(shown.values())]}
        new, again = list[float](), list[float]()
        for feature in features[1:]:
            for at, times in (
                (feature, new),
                (feature ^ 1, again),
            ):  # the other one is in the same file
                times.append(
                    asked(chrome, f"location.hash = '#feature={at}'", f"{title} === 'Feature {at}'")
                )
        found |= {"feature": new, "feature_again": again}
        in_list = "document.documentElement.dataset.view === 'list'"
        sort = f"{in_list} && document.querySelector('[aria-sort=descending]')"
        found["sort"] = [asked(chrome, "location.hash = '#sort=-density'", sort)]
        hits = "document.getElementById('found').textContent"
        search = f"const was = {hits}; location.hash = '#q={text(5).strip()[:2]}'"
        found["search"] = [asked(chrome, search, f"{hits} !== was")]
        rows = "document.querySelector('#token tbody tr')"
        found["token"] = [asked(chrome, f"location.hash = '#tokens={text(3).strip()}'", rows)]
        word = text(int(VOCABULARY**0.5)).strip()
        hit = "document.querySelector('#contexts-hits li')"
        found["contexts"] = [asked(chrome, f"location.hash = '#contexts={word}'", hit)]
        every = "document.getElementById('contexts-found').textContent.includes('all of')"
        found["contexts_all"] = [asked(chrome, "location.hash = '#contexts=no such text'", every)]
        assert chrome.troubles == [], chrome.troubles
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=262_144)
    parser.add_argument("--d-sae", type=int, default=32_768)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to make it and keep it")
    parser.add_argument("--out", type=Path)
    asked_for = parser.parse_args()
    assert EXECUTABLE, "no Chromium on this machine's PATH"
    root = asked_for.folder or Path(tempfile.mkdtemp())
    durable.make_directory(root)
    try:
        kept = root / "made.json"
        if not kept.exists():
            made = built(root, asked_for.tokens, asked_for.d_sae)
            kept.write_text(json.dumps(made))
        folder, made = root / "run/studies/browser", json.loads(kept.read_text())
        assert (made["tokens"], made["d_sae"]) == (asked_for.tokens, asked_for.d_sae), (
            f"{root} is of another size"
        )
        draw = np.random.default_rng(1)
        rounds = []
        for _ in range(asked_for.rounds):
            chunks = draw.choice(asked_for.d_sae // pages.CHUNK, FOLLOWED + 1, replace=False)
            features = chunks * pages.CHUNK + draw.integers(pages.CHUNK, size=len(chunks))
            rounds.append(a_round(folder, features.tolist()))
    finally:
        if not asked_for.folder:
            shutil.rmtree(root)
    times = {name: [ms for one in rounds for ms in one[name]] for name in rounds[0]}
    figures = {f"{name}_ms": float(np.median(every)) for name, every in times.items()}
    figures |= {
        f"{name}_ms_range": [round(min(every), 1), round(max(every), 1)]
        for name, every in times.items()
    }
    shape = {"width": WIDTH, "k": K, "vocabulary": VOCABULARY, **made}
    finish(shape | {"rounds": asked_for.rounds}, figures, asked_for.out)


if __name__ == "__main__":
    main()
