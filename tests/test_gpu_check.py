"""`make gpu-check` on a CPU, in toy sizes: each part works, and finds what is wrong."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import embedding_bag

# What the commands of a forked child import anyway.
from residual_saes.train import command, kernels, run  # noqa: F401
from tests.bench import kernel_speed, train_phases
from tests.bench.gpu_check import __main__ as gpu_check
from tests.bench.gpu_check import arithmetic, harvesting, sameness
from tests.bench.gpu_check.notes import Notes
from tests.conftest import make_store
from tests.device.card import Card
from tests.forked import start_forked

CPU = torch.device("cpu")
TINY = ["--tiny", "--device", "cpu"]


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Run parts in this process; the exit code, and the results by part."""
    monkeypatch.setattr(sameness, "start", start_forked)
    monkeypatch.setattr(sameness, "harvested", stored)
    one = {"whole": replace(harvesting.TOY, layers=(2,))}
    monkeypatch.setitem(harvesting.TINY, "part", one)
    # The limits of this CPU take seconds, and are of no use.
    monkeypatch.setattr(train_phases, "limits", lambda *_: {"copy": 1.0, "fp32": 1.0})
    setting = torch.are_deterministic_algorithms_enabled()

    def checked(*parts: str) -> tuple[int, dict[str, Any]]:
        out = tmp_path / "results.json"
        given = [*TINY, "--out", str(out), *(["--parts", *parts] if parts else [])]
        code = gpu_check.main(given, gpu_check.here)
        return code, json.loads(out.read_text())["parts"]

    yield checked
    torch.use_deterministic_algorithms(setting)


def stored(folder: Path, device: torch.device) -> Path:
    """Random rows in the place of a harvest's."""
    rows = torch.randn(8192, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    make_store(folder / "store.zarr", rows.view(torch.uint16).numpy(), unit=1024)
    return folder / "store.zarr"


def failed(part: dict[str, Any]) -> list[str]:
    return [found["what"] for found in part["check"] if not found["held"]]


def test_every_part_works_on_a_cpu(
    check: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    took = dict.fromkeys(["units_s", "harvest_s", "forward_s"], 0.5)
    monkeypatch.setattr(harvesting, "one_round", lambda *_: took)  # the next test has a whole one
    monkeypatch.setattr(harvesting, "cost", lambda *_: SimpleNamespace(flop=1e6))
    code, parts = check()
    assert [*parts] == [*gpu_check.PARTS]
    assert code == 0, {name: failed(part) for name, part in parts.items()}
    checks = {name: len(part["check"]) for name, part in parts.items()}
    assert checks["kernels"] >= 9 and checks["bits"] >= 9 and checks["resume"] == 2
    figures = {figure["what"]: figure for part in parts.values() for figure in part["figure"]}
    assert figures["harvest to L2, once begun"]["value"] == 2 * harvesting.TOY.tokens
    for what in ("MFU of the harvest to L2, of the large product", "training, d 16, fp32: speed"):
        assert figures[what]["value"] > 0
    assert "all checks hold" in capsys.readouterr().out


@pytest.mark.long
def test_a_whole_harvest(check: Callable[..., Any]) -> None:
    code, parts = check("harvest")
    assert code == 0 and parts["harvest"]["table"]


def test_a_wrong_kernel_is_found(
    check: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = kernels.decode
    monkeypatch.setattr(kernels, "decode", lambda *given: right(*given) * 1.0001)
    code, parts = check("kernels")
    assert code == 1 and failed(parts["kernels"]) == ["decode"]


def test_a_kernel_that_raises_or_changes_its_bits_is_found(
    check: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = kernels.latent_sums

    def other(*given: Any) -> torch.Tensor:
        return right(*given) + 1e-9 * torch.rand(())

    def raises(*given: Any) -> torch.Tensor:
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(kernels, "latent_sums", other)
    monkeypatch.setattr(kernels, "topk", raises)
    code, parts = check("kernels")
    assert code == 1 and failed(parts["kernels"])[0] == "topk"
    assert "decode" not in failed(parts["kernels"])
    monkeypatch.undo()
    monkeypatch.setattr(kernels, "latent_sums", other)
    found = sameness.differing(sameness._kernel_results, arithmetic.TOY, CPU)
    assert found == "latent_sums"


def test_a_part_that_raises_stops_no_other(
    check: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(arithmetic, "part", lambda *_, size: {}[size])
    monkeypatch.setattr(harvesting, "part", lambda device, notes, whole: notes.check("so", None))
    code, parts = check("kernels", "harvest")
    assert code == 1 and failed(parts["kernels"]) == ["kernels runs to its end"]
    assert len(parts["harvest"]["check"]) == 2 and not failed(parts["harvest"])
    assert "FAILED  kernels runs to its end: KeyError" in capsys.readouterr().out


def test_a_run_that_ends_otherwise_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = """if True:
        import os, pathlib, sys, time
        run = pathlib.Path(next(a for a in sys.argv if a.startswith("run="))[4:])
        again = run.exists()
        (run / "checkpoint").mkdir(parents=True, exist_ok=True)
        for step in "12":
            (run / "checkpoint" / f"step_{step}.json").touch()
        if "killed" in run.name and not again:
            time.sleep(60)
        (run / "sae_final.pt").write_text(run.name)
        (run / "metrics.jsonl").write_text("the same")
    """
    monkeypatch.setattr(sameness, "harvested", lambda *_: tmp_path / "s.zarr")
    monkeypatch.setattr(
        sameness, "start", lambda *given, files: start_forked("-c", code, *given[2:], files=files)
    )
    notes = Notes(tmp_path / "notes")
    sameness.resumed(CPU, notes)
    (found,) = notes.read()["check"]
    assert not found["held"] and found["said"] == "sae_final.pt"


def test_a_part_in_a_process_of_its_own(tmp_path: Path) -> None:
    def ended(code: str, limit_s: float = 60.0) -> str | None:
        return gpu_check.watched([sys.executable, "-c", code], limit_s, tmp_path)

    assert ended("import tempfile, sys; sys.exit(tempfile.gettempdir() != sys.argv[-1])") == (
        "ended with 1"
    )
    assert ended("import os; os.abort()") == "ended with -6"
    assert ended("import time; time.sleep(60)", 0.2) == "stopped at its limit of 0 s"
    assert ended("pass") is None


def test_without_a_gpu_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main([]) == 2
    assert gpu_check.main(["--device", "cpu"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "CUDA GPU" in lines[0] and "--tiny" in lines[1]


def test_the_parts_take_eight_minutes_together() -> None:
    assert sum(share for _, share in gpu_check.PARTS.values()) <= gpu_check.TOTAL_S <= 480


def test_a_harvest_fits_time_and_disk() -> None:
    shape = harvesting.E4B
    assert harvesting.sized(shape, 5e5, 1e12).tokens == 7 * shape.unit
    assert harvesting.sized(shape, 1e9, 1e12).tokens == shape.tokens
    full = harvesting.sized(shape, 5e5, 4e9)
    assert full.tokens * 2560 * 2 * len(full.layers) < 4e9


def test_kernels_on_a_card_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ways that a CPU has not: TF32, and bfloat16 products that are sums in float32."""
    monkeypatch.setattr(kernel_speed, "measure", lambda *_, **__: {"topk_ms": 1.0})
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    notes = Notes(tmp_path / "notes")
    with Card(0) as card:
        arithmetic.part(torch.device("cuda"), notes, arithmetic.TOY)
    found = {check["what"]: check["held"] for check in notes.read()["check"]}
    assert all(found.values()) and {"encode, tf32", "encode, exact"} <= {*found}
    assert {"topk", "decode", "weight_gradient"} <= {*card.kernels}


def test_the_bench_of_kernels_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """It measures Triton's kernels: the CPU's stand in for them."""

    def decode(values: Any, indices: Any, starts: Any, W_dec: Any) -> Any:
        k = {"mode": "sum", "per_sample_weights": values.to(W_dec.dtype)}
        return embedding_bag(indices, W_dec, starts, **k).float()

    def weight_gradient(x: Any, weights: Any, order: Any, source: Any, starts: Any, _: int) -> Any:
        return decode(weights[order], source, starts, x)

    ours = {"topk": kernels.topk, "decode": decode, "weight_gradient": weight_gradient}
    ours |= dict.fromkeys(("values_gradient", "latent_sums"), lambda *given: given[0])
    stand_in = SimpleNamespace(**ours)
    monkeypatch.setattr("residual_saes.train.triton_kernels", stand_in, raising=False)
    monkeypatch.setitem(sys.modules, "residual_saes.train.triton_kernels", stand_in)
    found = kernel_speed.measure(CPU, *arithmetic.TOY, repeats=1)
    assert found["weight_gradient_ms"] > 0 and found["decode_of_limit"] > 0
