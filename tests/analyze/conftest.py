"""A finished run on a store whose text the tests choose, without training: the SAE is made by
hand.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray

from residual_saes.analyze import drawing
from residual_saes.analyze.pages.browser import study as browser
from residual_saes.analyze.studies.catalogue import study as catalogue
from residual_saes.analyze.study import Study
from residual_saes.analyze.subject import Subject
from residual_saes.data import durable
from residual_saes.data.model_path import EMBEDDED
from residual_saes.data.rows import summary
from residual_saes.data.site import MLP_IN, MLP_OUT
from residual_saes.data.store.store import Store
from residual_saes.data.text.sources import TinyText
from residual_saes.harvest.config import HarvestConfig
from residual_saes.harvest.loop import harvest
from residual_saes.harvest.model import LanguageModel, ModelConfig, load
from residual_saes.train import sae, sae_file
from residual_saes.train.optim import OptimConfig
from residual_saes.train.run import CONFIG, source_of
from tests.analyze.chromium import Chromium
from tests.conftest import commit, make_store

N, D, F, K, LAYER = 2048, 12, 40, 4, 3


class Made(NamedTuple):
    """A run and what it was made of."""

    run: Path
    store: Store
    rows: NDArray[np.float64]  # (N, D) residuals in spine order, as stored
    sae: sae.SAE  # on raw rows


def make_run(root: Path, bits: NDArray[np.uint16]) -> Made:
    store = make_store(root / "s.zarr", bits, context=32, unit=128, chunk=32, layer=LAYER)
    rows = torch.from_numpy(bits).view(torch.bfloat16).double().numpy()
    config = sae.SAEConfig(d_sae=F, k=K, k_aux=4, dead_after=1000)
    made = sae.initial(config, torch.from_numpy(rows.mean(0)).float(), seed=0)
    made.b_enc.uniform_(-0.5, 0.5, generator=torch.Generator().manual_seed(0))
    write_run(root / "run", store, LAYER, config, made)
    return Made(root / "run", store, rows, made)


def write_run(
    run: Path,
    store: Store,
    layer: int | list[int],
    config: sae.SAEConfig,
    made: sae.SAE,
    scales: dict[str, float] | None = None,
    **more: object,
) -> None:
    """The files of a finished run, as training leaves them.

    Args:
        scales: of a crosscoder, by the name of its ports.
        more: settings that are recorded where they differ from what runs had before.
    """
    run.mkdir(parents=True)
    sae_file.write_final(made, 1.0, run)
    settings = {
        "store": {"identity": store.identity},
        "layer": layer,
        **more,
        "tokens": 1024,
        "batch": 64,
        "seed": 0,
        "data_seed": 0,
        "matmul": "fp32",
        "policy": {"drop_bos": True, "drop_outliers": True},
        "sae": config.recorded(),
        "optim": {**vars(OptimConfig(lr=1e-3, lr_floor=1e-4))},
    }
    whole = {
        "settings": settings,
        "store_path": store.name,
        "sae_name": "made",
        "scale": 1.0,
        "steps": 16,
    }
    if scales:
        whole["scales"] = scales
    whole |= {"lr": 1e-3, "dead_after": 1000, "source": source_of(store)}
    durable.write(run / CONFIG, [yaml.safe_dump({**whole, "environment": {"torch": "x"}}).encode()])
    figures = {"variance_explained": 0.5, "mse": 1.0, "dead": 1, "dead_share": 0.025, "lr": 1e-3}
    lines = [
        {"split": split, "step": 16, "tokens": 1024, **figures} for split in ("train", "held_out")
    ]
    durable.write(run / "metrics.jsonl", [json.dumps(line).encode() + b"\n" for line in lines])


def add_points(store: Store, bits: dict[str, NDArray[np.uint16]]) -> Store:
    """The store with the rows (N, d) of further hook points, bfloat16 bits in spine order."""
    size = store.unit_tokens
    for unit in range(store.units):
        part = slice(unit * size, (unit + 1) * size)
        commit(store, unit, {name: rows[part] for name, rows in bits.items()})
    for name in bits:
        summary.write(store, name)
    store.declare([*store.points, *bits])
    return Store.open(store.name)


def random_rows() -> NDArray[np.uint16]:
    """Rows with a large mean and an outlier, as residuals have."""
    values = (
        torch.randn(N, D, generator=torch.Generator().manual_seed(4)) * torch.linspace(0.5, 3, D)
        + 5
    )
    values[[300, 900, 1500]] *= 100
    return values.bfloat16().view(torch.uint16).numpy()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_run(tmp_path_factory.mktemp("analyze"), random_rows())


@pytest.fixture
def subject(made: Made) -> Subject:
    return Subject.open(made.run, None, torch.device("cpu"))


# -- the embedded model ----------------------------------------------------------------------------

TINY_LAYER = 5


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on layer 5 of the embedded model, 16,384 tokens of its problems; its latents are 256 of
    their rows.
    """
    return make_tiny_run(tmp_path_factory.mktemp("tiny"))


def make_tiny_run(root: Path) -> Path:
    config = HarvestConfig(
        root / "s.zarr", (TINY_LAYER,), 16_384, context=128, unit=2048, chunk=128
    )
    store = harvest(config, load(ModelConfig(EMBEDDED, dtype="float32")), TinyText())
    bits = torch.from_numpy(
        np.concatenate([store.residuals(TINY_LAYER, unit) for unit in range(store.units)])
    )
    rows = bits.view(torch.bfloat16).float()
    mean = rows.mean(0)
    chosen = (
        rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:256]] - mean
    )
    unit = chosen / chosen.norm(dim=1, keepdim=True)
    shape = sae.SAEConfig(d_sae=256, k=8, k_aux=16, dead_after=1000)
    made = sae.SAE.of(unit.T.contiguous(), unit, torch.zeros(256), mean, 8)
    guess = made(rows[:2048]) - mean
    made.W_enc.mul_(
        ((rows[:2048] - mean) * guess).sum() / guess.square().sum()
    )  # as well as one scale can do
    write_run(root / "run", store, TINY_LAYER, shape, made)
    return root / "run"


@pytest.fixture(scope="session")
def tiny_browser(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """The browser of a copy of that run, made."""
    run = tmp_path_factory.mktemp("tiny_browser") / "run"
    shutil.copytree(tiny_run, run, ignore=shutil.ignore_patterns("studies"))
    subject = Subject.open(run, None, torch.device("cpu"))
    model = ModelConfig(EMBEDDED, dtype="float32")
    options = {"rows": 4096, "top": 2, "quantiles": 1, "each": 1, "logits": 0}
    Study("catalogue", subject, options, model).perform(catalogue.DEFINITION)
    made = Study("browser", subject, {"contexts": 2, "samples": 1}, model)
    made.perform(browser.DEFINITION)
    return made


class Loaded(dict[ModelConfig, LanguageModel]):
    """The models that a study asked for. The embedded one is read once a session, in 0.3 s."""

    _read: ClassVar[dict[ModelConfig, LanguageModel]] = {}

    def __contains__(self, model: object) -> bool:
        if model in self._read:
            super().__setitem__(model, self._read[model])
        return super().__contains__(model)

    def __setitem__(self, model: ModelConfig, lm: LanguageModel) -> None:
        super().__setitem__(model, lm)
        if model.path == EMBEDDED:
            self._read[model] = lm


@pytest.fixture
def tiny_study(tiny_run: Path):
    """Makes a study of that run: `tiny_study(name, **options)`, with 64 tiny problems unless told
    otherwise.
    """

    def of(
        name: str, problems: str = "tiny", answers: dict | None = None, **options: object
    ) -> Study:
        subject = Subject.open(tiny_run, None, torch.device("cpu"))
        asked = {"questions": 64, "new_tokens": 64, "batch": 64, **(answers or {})}
        model = ModelConfig(EMBEDDED, dtype="float32")
        return Study(name, subject, options, model, problems, asked, loaded=Loaded())

    return of


_DRAWN: dict[bytes, str] = {}


@pytest.fixture
def drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws each of the report's pictures once a session, in 0.15 s.

    The same figures give the same picture: see test_pictures.py.
    """

    def once(draw: Callable[..., str]) -> Callable[..., str]:
        def drawn(*figures: Any, **how: Any) -> str:
            key = pickle.dumps((draw.__name__, figures, how))
            if key not in _DRAWN:
                _DRAWN[key] = draw(*figures, **how)
            return _DRAWN[key]

        return drawn

    for draw in (drawing.curves, drawing.histogram, drawing.bars):
        monkeypatch.setattr(drawing, draw.__name__, once(draw))


# -- pages -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chrome() -> Iterator[Chromium]:
    """A browser; not of the session, because asyncio does not run beside it."""
    with Chromium() as running:
        yield running


MLP_LAYERS = (0, 5)


@pytest.fixture(scope="session")
def tiny_mlps(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """2,048 tokens of the embedded model: what the MLPs of two layers read and write."""
    config = HarvestConfig(
        tmp_path_factory.mktemp("mlps") / "s.zarr",
        MLP_LAYERS,
        2048,
        context=128,
        unit=512,
        chunk=128,
        sites=(MLP_IN, MLP_OUT),
    )
    return harvest(config, load(ModelConfig(EMBEDDED, dtype="float32")), TinyText())


def mlp_run(run: Path, store: Store, layer: int, made: sae.SAE) -> Subject:
    """A finished run of a transcoder of one of those MLPs."""
    shape = {"d_sae": made.d_sae, "k": made.k, "k_aux": 4, "dead_after": 1000}
    config = sae.SAEConfig(kind="transcoder", skip=made.W_skip is not None, **shape)
    write_run(run, store, layer, config, made, site=MLP_IN)
    return Subject.open(run, None, torch.device("cpu"))


def random_transcoder(layer: int) -> sae.SAE:
    """Directions that nobody trained."""
    generator = torch.Generator().manual_seed(layer)
    W_dec = torch.nn.functional.normalize(torch.randn(96, 64, generator=generator), dim=1)
    W_enc = torch.randn(64, 96, generator=generator)
    zeros = torch.zeros(64)
    return sae.SAE.of(W_enc, W_dec, torch.zeros(96), zeros, 8, b_in=zeros)
