"""A warm start: from a run or another library's files, on other rows, with other settings."""

from __future__ import annotations

import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from residual_saes.data.errors import Interrupted, SettingError, StoreError
from residual_saes.data.journal import read_metrics
from residual_saes.train import run, sae_file
from residual_saes.train.arm import Arm
from residual_saes.train.evaluate import evaluate
from residual_saes.train.export import bundle, golden
from residual_saes.train.export.format import About
from residual_saes.train.loop import train
from residual_saes.train.objectives.gated import GatedConfig
from residual_saes.train.optim import OptimConfig
from residual_saes.train.ports import ports_of
from residual_saes.train.sae import SAEConfig
from residual_saes.train.trainer import Trainer
from residual_saes.train.warm import Start
from tests.conftest import Call
from tests.train.killing import CPU, bits, config
from tests.train.planted import Drawn, Planted, leave, planted_stream
from tests.train.test_command import SMALL, make_store

STEPS = 400  # of the runs to start from: few enough to be quick, enough to learn the rows
BATCH = 64
K = 3  # directions in a row, and latents that are kept of it
D = 16
LONG = pytest.mark.long
KINDS = ["topk", "batchtopk", "jumprelu", pytest.param("gated", marks=LONG)]


def settings(activation: str = "topk", **changes: Any) -> SAEConfig:
    kind = GatedConfig if activation == "gated" else SAEConfig
    own: dict[str, Any] = {}
    if activation == "gated":
        own = {"l1_coef": 0.1}
    if activation == "jumprelu":  # so that it learns in so few steps
        own = {"l0_coef": 0.01, "bandwidth": 0.3}
    small = {"d_sae": 48, "k": K, "aux_coef": 0.0, "nested": 2, **own, **changes}
    return kind(activation=activation, **small)


class Moved(Planted):
    """The planted rows times a factor, about another mean."""

    def __init__(self, factor: float = 1.0, shift: float = 0.0, **planted: Any) -> None:
        self.factor = factor
        self.shift = shift
        super().__init__(**{"d": D, "latents": 24, "batch": BATCH, "rows": 50_000, **planted})

    def draw(self, number: int, n: int) -> Tensor:
        rows = super().draw(number, n).float() * self.factor
        return (rows + self.shift * torch.arange(self.d_model)).bfloat16()


def arm(folder: Path, sae: SAEConfig, start: str | None = None, **changes: Any) -> Arm:
    reader = changes.pop("reader", None) or Moved()
    begun = Start.of(start, folder) if start else None
    small: dict[str, Any] = {
        "tokens": changes.pop("steps", STEPS) * BATCH,
        "batch": BATCH,
        "start": begun.digest if begun else None,
        "checkpoint_every": 10**6,
        "eval_every": 10**6,
        "log_every": 10**6,
    }
    return Arm(config(sae=sae, **{**small, **changes}), planted_stream(reader), folder, start=begun)


def begun(
    sae: SAEConfig, start: Path | str, reader: Drawn | None = None, **changes: Any
) -> dict[str, Any]:
    """The held-out record before the first step."""
    made = arm(Path("unused"), sae, str(start), reader=reader, **changes)
    trainer = Trainer(made.config, made.stream.reader, CPU)
    assert made.start is not None
    with torch.no_grad():
        trainer.begin_from_(made.start.sae(), made.stream.first(trainer.rows_to_begin))
        now, as_is = trainer.evaluation(), trainer.evaluation_as_is()
        assert as_is is not None
        evaluate([now, as_is], made.stream.held_out())
    return trainer.held_out_record(now, as_is)


def first_record(folder: Path) -> dict[str, Any]:
    return read_metrics(folder / run.METRICS)[0]


class Bases(dict[str, Path]):
    """A finished run of each activation, trained when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __missing__(self, kind: str) -> Path:
        train(arm(self._folder / kind, settings(kind)), CPU)
        self[kind] = self._folder / kind
        return self[kind]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    return Bases(tmp_path_factory.mktemp("bases"))


# -- the same rows ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_on_the_same_rows_it_is_the_run_itself(kind: str, bases: Bases) -> None:
    now, end = begun(settings(kind), bases[kind]), run.metrics_of(bases[kind])[-1]
    assert (now["split"], now["step"], now["rows"]) == ("held_out", 0, end["rows"])
    for name in ("variance_explained", "variance_explained_as_is"):
        assert now[name] == pytest.approx(end["variance_explained"], abs=1e-6)
    assert now["l0"] == pytest.approx(end["l0"], abs=1e-2)


def test_in_principal_axes_too(bases: Bases) -> None:
    now, end = begun(settings(rotate=True), bases["topk"]), run.metrics_of(bases["topk"])[-1]
    assert now["variance_explained"] == pytest.approx(end["variance_explained"], abs=1e-5)


@pytest.mark.parametrize(
    "name",
    [
        "saelens",
        *(pytest.param(n, marks=LONG) for n in ("sparsify", "dictionary_learning", "reference")),
    ],
)
def test_another_librarys_files_are_the_same_start(name: str, bases: Bases, tmp_path: Path) -> None:
    sae, _ = run.sae_of(bases["topk"])
    if name != "reference":
        bundle.write(tmp_path, golden.files(name, sae, ABOUT))
    path = bases["topk"] if name == "reference" else tmp_path
    own, foreign = begun(settings(), bases["topk"]), begun(settings(), f"{name}:{path}")
    assert foreign["variance_explained"] == pytest.approx(own["variance_explained"], abs=1e-6)
    start = Start.of(f"{name}:{path}", tmp_path)
    assert start.digest == Start.of(str(bases["topk"]), tmp_path).digest


# -- other rows, other settings --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "factor", "shift"),
    [
        ("topk", 0.02, 0.0),
        ("batchtopk", 1.0, 0.5),
        pytest.param("topk", 30.0, 7.0, marks=LONG),
        pytest.param("jumprelu", 30.0, 7.0, marks=LONG),
    ],
)
def test_a_factor_and_a_mean_that_moved_are_found(
    kind: str, factor: float, shift: float, bases: Bases
) -> None:
    """Rows that are the old ones but for a factor and a shift: what was explained is again."""
    now = begun(settings(kind), bases[kind], Moved(factor, shift))
    lost = 1 - run.metrics_of(bases[kind])[-1]["variance_explained"]
    assert 1 - now["variance_explained"] < 1.1 * lost
    assert now["variance_explained_as_is"] < now["variance_explained"] - 0.1


@pytest.mark.parametrize(
    ("kind", "into"),
    [
        *(("topk", "batchtopk"), ("topk", "jumprelu"), ("topk", "gated")),
        *(("batchtopk", "hierarchical"), ("jumprelu", "matryoshka")),
    ],
)
def test_any_activation_from_any_other(kind: str, into: str, bases: Bases) -> None:
    now = begun(settings(into), bases[kind])
    assert now["variance_explained"] > 0.8
    assert now["l0"] == pytest.approx(K, rel=0.5)


def test_thresholds_stay_with_the_function(bases: Bases, tmp_path: Path) -> None:
    """Of JumpReLU in Gated, and of decoder rows of any norm: the same function."""
    sae, _ = run.sae_of(bases["jumprelu"])
    norms = torch.linspace(0.5, 2, sae.d_sae)
    assert sae.threshold is not None
    scaled = replace(
        sae,
        encoder=sae.encoder / norms[:, None],
        W_dec=sae.W_dec * norms[:, None],
        b_enc=sae.b_enc / norms,
        threshold=sae.threshold / norms,
    )
    sae_file.write_final(scaled, 1.0, tmp_path)
    end = run.metrics_of(bases["jumprelu"])[-1]["variance_explained"]
    for kind in ("jumprelu", "gated"):
        now = begun(settings(kind), f"reference:{tmp_path}")
        assert now["variance_explained"] == pytest.approx(end, abs=1e-5)


def test_a_start_that_knows_nothing_is_said_to(
    bases: Bases, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Directions to read and to write that were drawn apart from each other."""
    sae, _ = run.sae_of(bases["topk"])
    draw = torch.Generator().manual_seed(0)
    encoder, W_dec = (torch.randn(sae.encoder.shape, generator=draw) for _ in range(2))
    worthless = replace(sae, encoder=encoder, W_dec=W_dec, b_dec=torch.zeros_like(sae.b_dec))
    sae_file.write_final(worthless, 1.0, tmp_path)
    train(arm(tmp_path / "r", settings(), f"reference:{tmp_path}", steps=2), CPU)
    now = first_record(tmp_path / "r")
    assert now["variance_explained_as_is"] < 0
    assert now["variance_explained"] < 0.1
    said = capsys.readouterr().err
    assert "decoder norms" in said and "explains nothing" in said


def test_training_goes_on_from_there(bases: Bases, tmp_path: Path) -> None:
    """Rows of twice the size about another mean: it explains more with the same few steps."""
    rates = OptimConfig(lr=2e-3, lr_floor=1e-3)
    few: dict[str, Any] = {"reader": Moved(2.0, 0.5), "steps": 60, "optim": rates}
    warm = train(arm(tmp_path / "warm", settings(), str(bases["topk"]), **few), CPU)
    fresh = train(arm(tmp_path / "fresh", settings(), **few), CPU)
    end = run.metrics_of(bases["topk"])[-1]["variance_explained"]
    assert warm["variance_explained"] > max(end - 0.01, fresh["variance_explained"] + 0.1)


# -- several hook points ---------------------------------------------------------------------------


class Aligned(Drawn):
    """Rows of two hook points side by side: the second is a turned first, of another size."""

    def __init__(self, factors: tuple[float, float] = (1.0, 5.0), shift: float = 0.0) -> None:
        self._factors = factors
        self._rows = Moved(1.0, shift)
        drawn = torch.randn(D, D, generator=torch.Generator().manual_seed(5))
        self._turn = torch.linalg.qr(drawn).Q
        super().__init__([D, D], self._rows.rows, BATCH, leave)

    def draw(self, number: int, n: int) -> Tensor:
        rows = self._rows.draw(number, n).float()
        first, second = self._factors
        return torch.cat([first * rows, second * rows @ self._turn], dim=1).bfloat16()


@pytest.mark.parametrize("kind", ["transcoder", pytest.param("crosscoder", marks=LONG)])
def test_transcoders_and_crosscoders_start_too(kind: str, tmp_path: Path) -> None:
    layers = {"transcoder": 0, "crosscoder": (0, 1)}[kind]
    more: dict[str, Any] = {"layer": layers, "reader": Aligned()}
    if kind == "transcoder":
        more["site"] = "mlp_in"
    sae = settings(kind=kind)
    train(arm(tmp_path / "base", sae, **more), CPU)
    end = run.metrics_of(tmp_path / "base")[-1]["variance_explained"]
    now = begun(sae, tmp_path / "base", **more)
    assert now["variance_explained"] == pytest.approx(end, abs=1e-5)
    more["reader"] = Aligned((2.0, 4.0), 0.1)
    now = begun(sae, tmp_path / "base", **more)
    assert 1 - now["variance_explained"] < 1.2 * (1 - end)
    assert now["variance_explained_as_is"] < now["variance_explained"] - 0.1
    start = Start.of(str(tmp_path / "base"), tmp_path)
    with pytest.raises(SettingError, match=f"kind {kind}, and sae.kind=sae"):
        start.require_fit(settings(), (D, D), "rows")


# -- what is refused -------------------------------------------------------------------------------

ABOUT = About("nobody/none", ports_of("sae", [0], ["resid_post"], None), 16, "made up")


def test_what_does_not_fit_is_refused(bases: Bases, tmp_path: Path) -> None:
    start = Start.of(str(bases["topk"]), tmp_path)
    start.require_fit(settings(), (D, D), "rows")
    with pytest.raises(SettingError, match=r"48 latents, and sae.d_sae=64; give sae.d_sae=48"):
        start.require_fit(settings(d_sae=64), (D, D), "rows")
    with pytest.raises(SettingError, match=r"width 16 .* 32"):
        start.require_fit(settings(), (32, 32), "the rows of s.zarr")
    with pytest.raises(SettingError, match=r"kind sae, and sae.kind=transcoder"):
        start.require_fit(settings(kind="transcoder"), (D, D), "rows")


def test_what_is_no_start_is_refused_in_one_line(bases: Bases, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    sae, _ = run.sae_of(bases["topk"])
    spoiled = replace(sae, b_enc=sae.b_enc.clone().fill_(float("nan")))
    sae_file.write_final(spoiled, 1.0, tmp_path)
    unfinished = tmp_path / "unfinished"
    shutil.copytree(bases["topk"], unfinished)
    (unfinished / sae_file.FILE).write_bytes(b"x")
    file = bases["topk"] / sae_file.FILE
    for named, kind in {
        str(tmp_path / "nowhere"): SettingError,
        f"sealens:{bases['topk']}": SettingError,
        str(file): SettingError,
        str(tmp_path / "empty"): SettingError,
        str(unfinished): StoreError,
        f"saelens:{tmp_path / 'empty'}": StoreError,
        f"reference:{tmp_path / sae_file.FILE}": StoreError,
    }.items():
        with pytest.raises(kind) as refused:
            Start.of(named, tmp_path / "r")
        assert "\n" not in str(refused.value) and Path(named).name in str(refused.value)


def test_a_start_that_changes_meanwhile_is_refused(bases: Bases, tmp_path: Path) -> None:
    sae, _ = run.sae_of(bases["topk"])
    sae_file.write_final(sae, 1.0, tmp_path)
    start = Start.of(f"reference:{tmp_path}", tmp_path / "r")
    assert start.sae().d_sae == sae.d_sae
    sae_file.write_final(replace(sae, b_dec=sae.b_dec + 1), 1.0, tmp_path)
    with pytest.raises(StoreError, match=r"start=reference"):
        start.sae()


# -- going on, and the command ---------------------------------------------------------------------


def test_a_run_goes_on_when_its_start_is_gone(bases: Bases, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(bases["batchtopk"], base)
    small = settings("batchtopk")
    train(arm(tmp_path / "whole", small, str(base), steps=20), CPU)

    drawn: list[int] = []

    def stop(number: int, _: Tensor) -> None:
        drawn.append(number)
        if drawn.count(9) == 2:  # the first rows have been read before, to begin with
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        train(arm(tmp_path / "r", small, str(base), steps=20, reader=Moved(spoil=stop)), CPU)
    shutil.rmtree(base)
    with pytest.raises(SettingError):
        arm(tmp_path / "new", small, str(base))
    train(arm(tmp_path / "r", small, str(base), steps=20), CPU)
    assert bits(tmp_path / "r") == bits(tmp_path / "whole")


def test_the_command(tmp_path: Path, call: Call) -> None:
    make_store(tmp_path / "s.zarr", units=4)
    small = ("store=s.zarr", *SMALL)
    assert call("train", "residual_saes.train.command", *small, "run=base", "layer=3")[0] == 0
    line = (
        "train",
        "residual_saes.train.command",
        "store=s.zarr",
        "batch=64",
        "device=cpu",
        "tokens=640",
    )
    warm = (*line, "start=base", "layer=5", "optim=tiny")
    code, err = call(*warm, "run=warm")
    assert code == 0, err
    assert "sae.d_sae=32 sae.k=2" in err  # the default dictionary has 32,768
    recorded = run.read_config(tmp_path / "warm")
    assert recorded["started_from"] == "base"
    (tmp_path / "base").rename(tmp_path / "moved")
    assert call(*line, "start=moved", "layer=5", "optim=tiny", "run=warm")[0] == 0
    code, err = call(*line, "layer=5", "optim=tiny", "sae.d_sae=32", "sae.k=2", "run=warm")
    assert (code, "start is" in err) == (2, True)
    code, err = call(*line, "start=warm", "layer=5", "optim=tiny", "sae.k=2", "run=warm")
    assert (code, "start is" in err) == (2, True)
    for wrong, said in {
        "sae.d_sae=64 sae.k=2": "give sae.d_sae=32",
        "start=nowhere": "start=nowhere",
        "start=saelens:nowhere": "nowhere",
    }.items():
        code, err = call(*line, "start=moved", "run=other", *wrong.split())
        assert (code, said in err, err.count("\n")) == (2, True, 1), err
    assert not (tmp_path / "other").exists()
