"""What a run's computations go by: chosen once, recorded, and then the run's own.

No clock decides here: what a measurement finds is given.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from residual_saes.data.errors import Interrupted, SettingError
from residual_saes.data.journal import read_metrics
from residual_saes.data.tuning import Choice, Trial
from residual_saes.train import blocks, gpu, product, ways
from residual_saes.train.arm import Arm
from residual_saes.train.loop import train, train_together
from residual_saes.train.run import TIMINGS
from residual_saes.train.ways import Shape
from tests.train.killing import CPU, bits, config, planted, run
from tests.train.planted import planted_stream
from tests.train.test_parallel import together

Find = Callable[[str | None], None]


@pytest.fixture
def find(monkeypatch: pytest.MonkeyPatch) -> Find:
    """Says what this machine finds fastest from now on; None: nobody may measure. OpenBLAS rounds
    otherwise here, whatever library numpy has.
    """

    def inexact(out: Tensor, x: Tensor, encoder: Tensor) -> Tensor:
        return torch.mm(x, encoder.T, out=out).mul_(1.001)

    def set_to(name: str | None) -> None:
        def tried(d: int, d_sae: int, *_: Any) -> Choice:
            assert name is not None, "measured, and it was recorded"
            return Choice(f"product {d} x {d_sae}", name, (Trial(name, 1.5, None),))

        monkeypatch.setattr(product, "_chosen", {})
        monkeypatch.setattr(product, "_tried", tried)

    monkeypatch.setattr(product, "SMALL", 0)
    monkeypatch.setattr(product, "_pinned", {})
    monkeypatch.setattr(product, "ways", lambda kind: ["torch", "openblas"])
    monkeypatch.setattr(blocks, "openblas_product_", inexact)
    return set_to


def environment(folder: Path) -> dict[str, Any]:
    recorded: dict[str, Any] = yaml.safe_load((folder / "config.yaml").read_text())
    return dict(recorded["environment"])


def stopped(folder: Path) -> None:
    """The small run, stopped at step 10."""
    with pytest.raises(Interrupted):
        run(folder, planted(spoil=lambda at, _: stop() if at == 9 else None))


def stop() -> None:
    os.kill(os.getpid(), signal.SIGUSR1)


def test_a_run_that_goes_on_takes_the_way_that_it_recorded(
    tmp_path: Path, find: Find, capsys: pytest.CaptureFixture[str]
) -> None:
    find("openblas")
    run(tmp_path / "whole")
    stopped(tmp_path / "run")
    assert environment(tmp_path / "run")["ways"] == {"product": "openblas"}
    first, *_ = read_metrics(tmp_path / "run" / TIMINGS)
    assert first["ways"]["product 8 x 48"]["ms"] == {"openblas": 1.5}
    assert "product 8 x 48: openblas" in capsys.readouterr().err
    find(None)
    run(tmp_path / "run")
    assert bits(tmp_path / "run") == bits(tmp_path / "whole")
    assert "way" not in capsys.readouterr().err
    find("torch")
    run(tmp_path / "new")
    assert bits(tmp_path / "new") != bits(tmp_path / "whole"), "the way decides bits"


def test_a_run_of_an_earlier_version_goes_the_first_way(
    tmp_path: Path, find: Find, monkeypatch: pytest.MonkeyPatch
) -> None:
    find("torch")
    run(tmp_path / "whole")
    monkeypatch.setattr(product, "SMALL", 1 << 22)
    stopped(tmp_path / "run")
    assert "ways" not in environment(tmp_path / "run"), "too small to matter"
    monkeypatch.setattr(product, "SMALL", 0)
    find(None)
    run(tmp_path / "run")
    assert bits(tmp_path / "run") == bits(tmp_path / "whole")


def test_a_way_that_is_gone_is_told_and_another_chosen(
    tmp_path: Path,
    find: Find,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    find("openblas")
    stopped(tmp_path)
    monkeypatch.setattr(product, "ways", lambda kind: ["torch", "abacus"])
    find("torch")
    capsys.readouterr()
    run(tmp_path)
    lines = capsys.readouterr().err.splitlines()
    assert any("'openblas' of product" in line for line in lines)
    assert any(line.startswith("ways.product was 'openblas' and is now 'torch'") for line in lines)


def test_arms_in_one_process_share_a_way_and_each_is_as_alone(tmp_path: Path, find: Find) -> None:
    find("openblas")
    run(tmp_path / "alone")
    stopped(tmp_path / "b")
    arms = [Arm(config(), planted_stream(planted()), tmp_path / name) for name in "ab"]
    find("openblas")
    train_together(arms, CPU)
    for name in "ab":
        assert bits(tmp_path / name) == bits(tmp_path / "alone")


def test_pins_end_with_the_training(tmp_path: Path, find: Find) -> None:
    find("torch")
    arm = Arm(config(), planted_stream(planted()), tmp_path, ways={"product": "openblas"})
    train(arm, CPU)
    assert environment(tmp_path)["ways"] == {"product": "openblas"}
    assert product.way(8, 48, CPU) == "torch"


def test_all_processes_take_what_the_first_has_found(
    tmp_path: Path, find: Find, monkeypatch: pytest.MonkeyPatch
) -> None:
    find("openblas")
    found = product._tried

    def tried(*shape: Any) -> Choice:
        assert os.environ["RANK"] == "0"
        return found(*shape)

    monkeypatch.setattr(product, "_tried", tried)
    assert together(tmp_path) == [0, 0]  # type: ignore[no-untyped-call]
    assert environment(tmp_path)["ways"] == {"product": "openblas"}


def test_what_is_asked_for_is_checked(find: Find) -> None:
    assert ways.asked(None, CPU) is None
    assert ways.asked({}, CPU) == {}
    assert ways.asked({"product": "openblas"}, CPU) == {"product": "openblas"}
    cuda = torch.device("cuda")
    assert ways.asked({"topk": "sort"}, cuda) == {"topk": "sort"}
    for wrong in ("torch", ["torch"], {"product": "abacus"}, {"topk": "sort"}):
        with pytest.raises(SettingError, match=r"train\.ways"):
            ways.asked(wrong, CPU)


# -- the sparse kernels, whose ways are all of a CPU here ------------------------------------------

SHAPE = Shape(d=6, d_out=5, d_sae=40, k=4, batch=30)


def on_a_cpu(kernel: str) -> dict[str, gpu.Way]:
    return {name: way for name, way in gpu.WAYS[kernel].items() if "triton" not in name}


@pytest.mark.parametrize("kernel", gpu.WAYS)
def test_a_kernel_that_agrees_with_float64_is_right_and_no_other(kernel: str) -> None:
    right = on_a_cpu(kernel)
    calls = []

    def spoiled(way: gpu.Way, *given: Any) -> Any:
        found = way(*given)
        one = found[0] if isinstance(found, tuple) else found
        one[0] += 1e-3 * one.abs().max()
        return found

    def restless(way: gpu.Way, *given: Any) -> Any:
        calls.append(way)
        found = way(*given)
        if isinstance(found, tuple):
            return tuple(one.flip(1) if len(calls) % 2 else one for one in found)
        return found * (1 + 1e-7 * (len(calls) % 2))

    def absent(*given: Any) -> Any:
        raise ImportError("No module named 'triton'")

    way = right["torch"]
    wrong: dict[str, gpu.Way] = {
        "triton": absent,
        "a": partial(spoiled, way),
        "b": partial(restless, way),
    }
    choice = ways.measure_kernel(kernel, {**wrong, **right}, SHAPE, CPU)
    faults = {trial.name: trial.fault for trial in choice.trials}
    assert all(faults.pop(name) for name in wrong)
    assert set(faults.values()) == {None}
    assert choice.chosen in right


def test_each_kernel_goes_its_own_way_where_that_is_recorded(
    find: Find, monkeypatch: pytest.MonkeyPatch
) -> None:
    find("torch")
    usual = ways._there(torch.device("cuda"))
    monkeypatch.setattr(ways, "_there", lambda device: usual)
    monkeypatch.setattr(ways, "_measured", {})
    monkeypatch.setattr(gpu, "_pinned", {})
    known = {"topk": "sort", "decode": "gone", "latent_sums": "torch"}
    settled = ways.settle(SHAPE, CPU, "tf32", known)
    assert settled.taken["topk"] == "sort"
    assert settled.taken["decode"] in on_a_cpu("decode")
    assert "values_gradient" not in settled.taken, "of an earlier version: the first way"
    assert "product" not in settled.taken, "TF32 has one way"
    assert [choice.what.split()[0] for choice in settled.choices] == ["decode"]
    assert gpu._pinned["topk", 40] == "sort"
    # Another arm of the process, which records another way, shares this one.
    assert ways.settle(SHAPE, CPU, "tf32", {"topk": "torch"}).taken["topk"] == "sort"
    ways.forget()
    text = ways.written(settled)
    assert ways.take(text, SHAPE, CPU).taken == settled.taken
    assert gpu._pinned["topk", 40] == "sort"
