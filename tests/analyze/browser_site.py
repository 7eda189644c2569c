"""A feature browser of a small run whose tokens' texts are hostile, for tests of data and page."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pytest
import torch

from residual_saes.analyze.latents import contexts, directions
from residual_saes.analyze.outcome import Outcome
from residual_saes.analyze.pages.browser import spread
from residual_saes.analyze.pages.browser.live import Live
from residual_saes.analyze.pages.browser.serve import server
from residual_saes.analyze.pages.browser.spread import Spread
from residual_saes.analyze.pages.browser.study import DEFINITION, PAGE
from residual_saes.analyze.results import FEATURES
from residual_saes.analyze.results import made as made_folder
from residual_saes.analyze.studies.catalogue import study as catalogue
from residual_saes.analyze.studies.cross_layer.study import PAIRS
from residual_saes.analyze.study import Definition, Study, write_features
from residual_saes.analyze.subject import Subject
from residual_saes.harvest.model import ModelConfig
from residual_saes.train import sae_file
from residual_saes.train.sae import SAE
from tests.analyze.conftest import F, Made, make_run, random_rows

HOSTILE = [
    "<script>document.title='caught'</script>",
    "</script><script>document.title='caught'</script>",
    "<img src=x onerror=\"document.title='caught'\">",
    "\u2028\u2029", "\u202egnp.exe\u2066", "\0\x1b[31m\x7f",
    "\N{WOMAN}\u200d\N{PERSONAL COMPUTER}", " مرحبا", " שלום",
    '"\');//', "__proto__", "constructor", "\ud800",
    "&lt;b&gt;", "${7*7}", "a\nb\r\tc", "%3Cb%3E", "", "  ",
    "z\u0337\u0321a\u0334l\u0336g\u0337o", "#feature=1",
    "javascript:document.title='caught'",
]  # fmt: skip


class Built(NamedTuple):
    """A browser and what it was made from."""

    folder: Path
    outcome: Outcome
    made: Made
    order: torch.Tensor  # (F,) of our latents in the other run


def say(token: int) -> str:
    """A hostile text of every token id, each another. It is not escaped: the page must cope."""
    return f"{HOSTILE[token % len(HOSTILE)]}{token}"


def build(root: Path) -> Built:
    """The folder, with figures of two studies and another run.

    The other run has the same latents in another order.
    """
    with pytest.MonkeyPatch.context() as patch:
        with_logits(patch)
        made = make_run(root, random_rows())
        of_run(made.run)
        order = torch.randperm(F, generator=torch.Generator().manual_seed(1))
        same = made.sae
        shuffled = SAE.of(
            same.W_enc[:, order], same.W_dec[order], same.b_enc[order], same.b_dec, same.k
        )
        other = copied(made.run, root / "ot'her <b>&", shuffled)
        of_run(other)
        # So that there is something to lead to.
        made_folder(study_of(other).folder).joinpath(PAGE).touch()
        findings(made.run)
        crossings(made.run, other)
        patch.setattr(contexts, "token_names", lambda *_, **__: say)
        study = study_of(made.run, others=[str(other)], contexts=3, samples=2)
        return Built(study.folder, study.perform(DEFINITION), made, order)


def with_logits(patch: pytest.MonkeyPatch) -> None:
    """Give catalogues logits without a language model."""
    ids = torch.arange(F * 4).view(F, 4) % 50
    scores = torch.linspace(2, 1, F * 4).view(F, 4)
    patch.setattr(Study, "lm", None)
    patch.setattr(directions, "logits", lambda *_: ((scores, ids), (-scores, ids.flip(0))))
    counts = np.full((F, spread.BINS), 3, np.int32)
    figures = [np.full(F, figure, np.float32) for figure in (-1, 1, 0, 0.25)]
    patch.setattr(spread, "measure", lambda *_: Spread._make([*figures, counts, 500]))


def study_of(run: Path, name: str = "browser", **options: Any) -> Study:
    return Study(
        name, Subject.open(run, None, torch.device("cpu")), options, ModelConfig("nowhere/none")
    )


def of_run(run: Path) -> None:
    """Make the run's catalogue."""
    options = {"rows": 1e6, "part": "all", "top": 4, "quantiles": 5, "each": 3, "logits": 4}
    study_of(run, "catalogue", **options).perform(catalogue.DEFINITION)


def copied(run: Path, to: Path, weights: SAE) -> Path:
    """The same run with other weights, and no studies."""
    to.mkdir()
    for file in run.iterdir():
        if file.is_file():
            (to / file.name).write_bytes(file.read_bytes())
    sae_file.write_final(weights, 1.0, to)
    return to


def findings(run: Path) -> None:
    """The tables of contrast and stability, as those studies leave them."""

    def leave(name: str, file: str, columns: dict[str, Any], **figures: Any) -> None:
        def run_study(study: Study) -> Outcome:
            write_features(study.folder / file, columns)
            return Outcome(figures, [])

        study_of(run, name).perform(Definition(run_study))

    tested = {"feature": np.array([7, 3]), "d": np.array([1.5, -0.5]), "q": np.array([0.01, 0.2])}
    leave("contrast", FEATURES, tested)
    r = pa.array([None if at % 2 else at / F for at in range(F)], pa.float64())
    matches = {"feature": np.arange(F), "correlation": r}
    leave("stability", "matches.parquet", matches, other="runs/<i>b")


# Pairs of a latent that predicts and one that is predicted, with r and q.
CROSSED = [(7, 3, 0.9, 0.01), (7, 5, 0.95, 0.02), (7, 6, 0.5, 0.2), (3, 7, 0.8, 0.03)]


def crossings(run: Path, other: Path) -> None:
    """study=cross_layer in both directions, with the pairs `CROSSED` in each."""
    partner, feature, r, q = map(np.array, zip(*CROSSED, strict=True))
    table = {
        **{"feature": feature, "partner": partner, "r": r, "q": q},
        "class": pa.array(["partly", "new", "combined", "same direction"]),
        **{"given_partner": r / 2, "given_latent": r / 4, "cosine": -r},
    }
    for earlier, later in ((run, other), (other, run)):
        where = [f"<i>layer</i> of {folder.name}" for folder in (earlier, later)]
        to = study_of(later).subject

        def leave(study: Study, to: Subject = to, where: list[str] = where) -> Outcome:
            write_features(study.folder / PAIRS, table)
            return Outcome({"to": str(to.run), "where": where}, [])

        inputs = {"to_sae": to.digest}
        study_of(earlier, "cross_layer").perform(Definition(leave, inputs=lambda _, i=inputs: i))


def read(folder: Path, name: str) -> Any:
    """What a data file hands to the page."""
    text = (folder / "data" / f"{name}.js").read_bytes().decode("ascii")
    found = re.fullmatch(r'loaded\("([\w/]+)",(.*)\);\n', text)
    assert found and found[1] == name
    return json.loads(found[2])


@contextmanager
def served(folder: Path, live: Live | None = None) -> Iterator[str]:
    """The page's address on a server that runs meanwhile."""
    with server(folder, 0, live) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            assert running.server_address[0] == "127.0.0.1"
            yield f"http://127.0.0.1:{running.server_port}/{PAGE}"
        finally:
            running.shutdown()
            thread.join()
