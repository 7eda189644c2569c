"""Shared small things: one thread per process, tiny random models, small stores."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import closing

from residual_saes.conf import command as command_line

# Offline: a test that reaches for the network is wrong.
os.environ.update({**command_line.ENVIRONMENT, **os.environ, "HF_HUB_OFFLINE": "1"})

from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from residual_saes.data import command_line as typed
from residual_saes.data import stopping
from residual_saes.data.rows import summary
from residual_saes.data.store.store import SpineEnd, Store
from residual_saes.data.store.unit import prepare
from residual_saes.data.text.packing import Cursor
from residual_saes.train import stream
from tests.stand_in_hub import Alone

torch.set_num_threads(1)

# The same examples every time, whatever else loads the machine.
hypothesis.settings.register_profile(
    "ours",
    derandomize=True,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("ours")

BOS = 2


def make_manifest(
    d_model: int, *, tokens: int, context: int, unit: int, chunk: int, codec: str = "blosc"
) -> dict:
    """The part of a manifest that a store itself needs."""
    shape = {"tokens": tokens, "context": context, "unit": unit, "chunk": chunk, "codec": codec}
    model = {
        "d_model": d_model,
        "id": "nobody/none",
        "revision": "main",
        "architecture": "None",
        "n_layers": 5,
    }
    model |= {"dtype": "float32", "weights": "0", "tokenizer": "0"}
    return {"model": model, "text": {"kind": "made up"}, "isolation": "packed", "seed": 7, **shape}


def make_spine(rows: int, context: int, rng: np.random.Generator) -> tuple[NDArray, NDArray]:
    """Random packed rows: a new document, with its BOS, at random places and at every row's
    start.
    """
    starts = rng.random((rows, context)) < 0.1
    starts[:, 0] = True
    tokens = np.where(starts, BOS, rng.integers(3, 200, (rows, context))).astype(np.uint32)
    return tokens, (starts.cumsum().reshape(rows, context) - 1).astype(np.uint32)


def make_store(
    path: Path | str,
    residuals: NDArray[np.uint16],
    *,
    context: int = 16,
    unit: int = 64,
    chunk: int = 16,
    codec: str = "blosc",
    layer: int = 3,
    spine: tuple[NDArray[np.uint32], NDArray[np.uint32]] | None = None,
) -> Store:
    """A complete store whose layer `layer` holds `residuals` ((N, d) bfloat16 bits in spine order).

    Args:
        spine: its tokens and documents, (rows, context) each; by default random ones.
    """
    n, d = residuals.shape
    rng = np.random.default_rng(0)
    tokens, document = spine or make_spine(n // context, context, rng)
    manifest = make_manifest(d, tokens=n, context=context, unit=unit, chunk=chunk, codec=codec)
    store = Store.open_or_create(path, manifest)
    rows = unit // context
    for at in range(0, len(tokens), rows):
        store.commit_spine(
            at // rows, tokens[at : at + rows], document[at : at + rows], Cursor(at, 0, None)
        )
    store.close_spine(SpineEnd(len(tokens), ended_early=False))
    for number in range(store.units):
        commit(store, number, {layer: residuals[number * unit : (number + 1) * unit]})
    summary.write(store, layer)
    store.declare([layer])
    return store


def commit(store: Store, unit: int, layers: dict[int, NDArray[np.uint16]]) -> None:
    """Commit (n, d) bfloat16 bits in spine order."""
    permutation, starts = store.permutation(unit), store.piece_starts(unit).ravel()
    rows = {layer: torch.from_numpy(bits).view(torch.bfloat16) for layer, bits in layers.items()}
    arrays = {layer: store.arrays.rows(layer) for layer in layers}
    store.commit_residuals(
        unit, {i: prepare(rows[i], permutation, starts, arrays[i]) for i in layers}
    )


@pytest.fixture
def random_bits() -> NDArray[np.uint16]:
    """(1000, 24) bfloat16 bits of normal rows."""
    values = torch.randn(1008, 24, generator=torch.Generator().manual_seed(1))
    return values.bfloat16().view(torch.uint16).numpy()


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Alone]:
    """For checks against a hub of this machine; a process imports what they need once."""
    with closing(Alone(tmp_path_factory.mktemp("hub"))) as processes:
        yield processes


_LONGEST = ("test_docs_run.py", "test_house.py", "test_kills.py", "test_faults.py", "test_lm.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first, so that no process waits for another one in the end."""
    items.sort(key=lambda item: item.path.name not in _LONGEST)


def pytest_collection_finish() -> None:
    """Collect rarely, and never look at what every test keeps: that took a twelfth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture
def unwatched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For commands in this process: none may end it when a later test sends itself a signal."""
    monkeypatch.setattr(stopping, "watch", stopping.answer_signals)
    for event in (stopping.told, stopping.expected):
        event.clear()  # an earlier test's command may have been stopped
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    handlers = {signum: signal.getsignal(signum) for signum in signals}
    yield
    for signum, handler in handlers.items():
        signal.signal(signum, handler)
    typed.take("", ())  # a later test types nothing, so no line tells it what to type next


Call = Callable[..., tuple[int, str]]


@pytest.fixture
def call(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    unwatched: None,
) -> Call:
    """Run a command in this process (a new one takes seconds to start), in an empty directory.

    It takes the settings' name, the module and the arguments, and gives exit code and stderr.
    """
    monkeypatch.chdir(tmp_path)

    def called(name: str, module: str, *arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        for opened in (stream.store_at, stream.rows_of):
            opened.cache_clear()  # a new process has seen no store
        code = 0
        try:
            command_line.start(name, module)
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        return code, capsys.readouterr().err

    return called
