"""The command line: settings become a configuration; a wrong one is one clear line."""

from __future__ import annotations

import json
import re
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from residual_saes.conf.command import run_command
from residual_saes.data.errors import MismatchError, SettingError, StoreError
from residual_saes.data.journal import duration, size
from residual_saes.data.store import default
from residual_saes.data.store.store import Store
from residual_saes.data.store.unit import prepare
from residual_saes.harvest.command import (
    command,
    default_store,
    harvest_config,
    model_config,
    planned_for,
    standing,
    tell_standing,
)
from residual_saes.harvest.config import HarvestConfig
from residual_saes.harvest.description import Description
from residual_saes.harvest.headers import Stored
from residual_saes.harvest.plan import Plan, require_fit
from tests.forked import run_forked


def settings(*overrides: str) -> dict[str, Any]:
    with initialize_config_module("residual_saes.conf", version_base="1.3"):
        plain = OmegaConf.to_container(compose("harvest", list(overrides)), resolve=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def tiny(store: Path, *overrides: str) -> dict[str, Any]:
    return settings(
        "model=tiny",
        "text=tiny",
        "tokens=3000",
        "context=64",
        "layer=5",
        f"store={store}",
        *overrides,
    )


def plan_of(asked: dict[str, Any]) -> Plan:
    described = Description.of(model_config(asked["model"], "cpu"))
    return planned_for(harvest_config(asked), described, Stored({"F32": 1}, 99))


@pytest.fixture(scope="module")
def harvested(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("command") / "s.zarr"
    command(tiny(store))
    return store


def test_settings_become_the_configuration() -> None:
    config = harvest_config(settings("layer=[27,21]", "tokens=1e9"))
    assert (config.layers, config.tokens, config.context) == ((21, 27), 10**9, 1024)
    assert (config.unit_tokens, config.chunk_rows) == (65_536, 1024)
    assert harvest_config(settings("layer=3")).layers == (3,)
    assert harvest_config(settings("layer=3", "text.bad=skip")).faults.bad == "skip"
    assert harvest_config(settings("model=tiny")).layers == (5, 8)
    assert harvest_config(settings()).store == "activations/gemma-4-E4B_fineweb_edu.zarr"
    assert harvest_config(settings()).store == default.HARVESTED  # which training looks for
    assert (
        default_store({"path": "."}, {"path": "a.txt"})
        == f"activations/{Path().resolve().name}_a.zarr"
    )
    assert default_store({"path": "embedded"}, {"path": "books/a.txt"}) == "activations/tiny_a.zarr"


def test_ranks_are_set_by_hand_or_by_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    alone, third = harvest_config(settings()), harvest_config(settings("rank=2", "world=3"))
    assert (alone.rank, alone.world, third.rank, third.world) == (0, 1, 2, 3)
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("WORLD_SIZE", "8")
    launched = harvest_config(settings())
    assert (launched.rank, launched.world) == (5, 8)
    with pytest.raises(SettingError, match=r"rank=8 .*world=8"):
        harvest_config(settings("rank=8", "world=8"))
    monkeypatch.setenv("RANK", "x")
    with pytest.raises(SettingError, match="RANK=x"):
        harvest_config(settings())


def test_a_rank_says_by_what_it_is_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setenv("SLURM_NTASKS", "2")
    tell_standing(standing(settings()), "cpu")
    assert capsys.readouterr().err == "rank 1 of 2 by SLURM_PROCID=1 of 2, device cpu\n"
    tell_standing(standing(settings("rank=0", "world=1")), "cpu")
    assert capsys.readouterr().err == ""


def test_small_stores_get_small_units() -> None:
    for tokens in (1, 5000, 200_000, 10**7, 10**9):
        config = HarvestConfig(Path("s"), (1,), tokens, context=100)
        assert config.unit_tokens % 100 == 0
        assert config.unit_tokens % config.chunk_rows == 0
        if tokens >= 5000:
            assert config.units >= (32 if tokens >= 32_768 else 16)  # a share is held out


def test_status_plan_verify_and_repair(harvested: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for action, expected in {
        "status": "layer 5: 24 of 24 units",
        "plan": "3,008 in 47 rows and 24 units",
        "verify": ", recomputed,",
        "repair": "0 ",
    }.items():
        command(tiny(harvested, f"action={action}"))
        assert expected in capsys.readouterr().out


def test_verify_names_what_is_damaged(
    harvested: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = shutil.copytree(harvested, tmp_path / "s.zarr")
    path = store / "norm_5" / "c.3"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(SystemExit) as exit_code:
        run_command(lambda: command(tiny(store, "action=verify")))
    assert exit_code.value.code == 2
    assert str(path) in capsys.readouterr().err
    record = store / "commits" / "spine" / "00000003.json"
    record.write_bytes(record.read_bytes()[:-2])
    with pytest.raises(StoreError) as error:
        command(tiny(store, "action=verify"))
    assert f"{record} " in capsys.readouterr().err + str(error.value)
    assert str(error.value).count("action=repair") == 1
    with pytest.raises(StoreError, match=f"{record} .*action=repair store={store}`"):
        Store.open(store)
    command(tiny(store, "action=repair"))
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("2 ") and "`python -m harvest`" in last
    command(tiny(store))
    (store / "zarr.json").write_text("{")
    command(tiny(store, "action=repair"))
    written, left = capsys.readouterr().out.splitlines()
    assert written.endswith(" zarr.json") and left.startswith("0 ")
    command(tiny(store, "action=verify"))


def test_a_missing_store_is_named_before_the_model_is_loaded(tmp_path: Path) -> None:
    for action in ("status", "verify", "repair"):
        with pytest.raises(StoreError, match=f"^[^\n]*{tmp_path}/none[^\n]*$"):
            command(tiny(tmp_path / "none", f"action={action}", "model.path=/no/such/folder"))
    assert not (tmp_path / "none").exists()


def test_what_was_made_here_is_told_from_what_was_there(
    harvested: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = shutil.copytree(harvested, tmp_path / "s.zarr")
    for unit in (3, 9):
        (store / "commits" / "residuals" / f"{unit:08d}.5.json").unlink()
    command(tiny(store))
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r" 3,008 tokens, 256 .* \d+s, [\d,]+ tokens/s$", last), last
    command(tiny(tmp_path / "whole.zarr"))
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r" 3,008 tokens in \d+s, [\d,]+ tokens/s$", last), last


def test_verify_catches_rows_of_another_model(harvested: Path, tmp_path: Path) -> None:
    """Digests alone would agree: the record is made anew for other rows."""
    path = shutil.copytree(harvested, tmp_path / "s.zarr")
    store = Store.open(path)
    for record in (path / "commits" / "residuals").iterdir():
        record.unlink()
    again = Store.open(path)
    for unit in range(store.units):
        permutation, starts = store.permutation(unit), store.piece_starts(unit).ravel()
        rows = torch.from_numpy(store.residuals(5, unit)[permutation.argsort()] ^ 1).view(
            torch.bfloat16
        )
        again.commit_residuals(unit, {5: prepare(rows, permutation, starts, store.arrays.rows(5))})
    with pytest.raises(StoreError, match="128 of 128 rows"):
        command(tiny(path, "action=verify"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["tokens=0"], "tokens=0 .* 1"),
        (["tokens=-3"], "tokens=-3 .* 1"),
        (["tokens=1e9.5"], r"tokens=1e9\.5 "),
        (["tokens=2.5"], r"tokens=2\.5 "),
        (["tokens=1B"], "tokens=1B "),
        (["layer=12"], "layer=12 .* 0 to 11"),
        (["layer=-1"], r"layer=\[-1\] "),
        (["layer=[5,5]"], r"layer=\[5, 5\] "),
        (["layer=[]"], r"layer=\[\] "),
        (["layer=top"], "layer=top "),
        (["context=1"], "context=1 .* 2"),
        (["context=2048"], "context=2048 .* 1024 "),
        (["unit=100"], "unit=100 .* context=64"),
        (["batch=0"], "batch=0 .* 1"),
        (["codec.name=zip"], "codec='zip' .* blosc, none, int8"),
        (["action=dance"], "action=dance .* run, plan, status, verify, repair"),
        (["model.path=/no/such/folder"], "model.path=/no/such/folder "),
        (["model.path=nobody/nothing"], "model.path=nobody/nothing .*model=tiny text=tiny"),
        (["model.dtype=float8"], "model.dtype=float8 .*bfloat16 or float32"),
        (["text.path=/no/such/file"], "text.path=/no/such/file "),
        (["device=cuda"], "device=cuda "),
        (["oom=shrug"], "oom=shrug .*stop or halve"),
        (["text.bad=shrug"], "text.bad=shrug .*stop or skip"),
        (["text.max_tokens=1"], "text.max_tokens=1 .* 2"),
        (["text.max_tokens=few"], "text.max_tokens=few "),
        (["non_finite=-1"], "non_finite=-1 .* 0"),
        (["store=ftp://x/y"], "store=ftp://x/y "),
    ],
)
def test_bad_settings_are_one_line(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises((SettingError, StoreError), match=message) as error:
        command(tiny(tmp_path / "s.zarr", *overrides))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "s.zarr").exists()


def test_documents_are_cut_at_max_tokens(harvested: Path, tmp_path: Path) -> None:
    """The setting stands in the store, and another value is another store."""
    cut = tmp_path / "s.zarr"
    command(tiny(cut, "text.max_tokens=20"))
    longest = [np.bincount(Store.open(path).document(0).ravel()).max() for path in (harvested, cut)]
    # A document that a row's end divides has a second BOS.
    assert longest[0] > 21 and longest[1] in (20, 21)
    assert "max_tokens" not in Store.open(harvested).manifest["text"]
    with pytest.raises(MismatchError) as refused:
        command(tiny(cut, "text.max_tokens=21"))
    assert refused.value.differences == {"text.max_tokens": (20, 21)}


def test_a_store_of_another_model_is_not_verified(harvested: Path) -> None:
    with pytest.raises(StoreError, match=r"dtype .*'float32'.*'bfloat16'"):
        command(tiny(harvested, "model.dtype=bfloat16", "action=verify"))


def test_a_file_in_the_stores_place_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for action in ("run", "plan", "status", "verify", "repair"):
        with pytest.raises(StoreError, match=str(tmp_path / "file")):
            command(tiny(tmp_path / "file", f"action={action}"))
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("argument", "facts"),
    [
        ("codec=zip", ["codec=zip", "blosc, int8, none"]),
        ("lyer=3", ["lyer=3", "layer=3"]),
        ("oom=a=b", ["quotes"]),
    ],
)
def test_the_parsers_refusals_are_one_line_too(argument: str, facts: list[str]) -> None:
    done = run_forked("-m", "harvest", argument)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    for fact in facts:
        assert fact in done.stderr


def test_a_changed_setting_loses_nothing(harvested: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in harvested.rglob("*") if path.is_file()}
    for override, values in {
        "seed=1": "seed .* 0 .* 1 ",
        "context=128": "context .* 64 .* 128 ",
    }.items():
        with pytest.raises(StoreError, match=values):
            command(tiny(harvested, override))
    assert {
        path: path.stat().st_mtime_ns for path in harvested.rglob("*") if path.is_file()
    } == before


def test_empty_text_is_refused_and_leaves_the_place_free(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    with pytest.raises(StoreError, match="context=64 "):
        command(tiny(tmp_path / "s.zarr", f"text.path={tmp_path / 'empty.txt'}"))
    command(tiny(tmp_path / "s.zarr"))
    assert Store.open(tmp_path / "s.zarr").complete(5)


def test_text_that_ends_early_closes_the_store_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [json.dumps({"body": f"line {number} of a short text"}) for number in range(100)]
    (tmp_path / "short.jsonl").write_text("\n".join(lines))
    overrides = [f"text.path={tmp_path / 'short.jsonl'}", "text.field=body", "unit=320"]
    command(tiny(tmp_path / "s.zarr", "tokens=1e6", *overrides))
    store = Store.open(tmp_path / "s.zarr")
    assert f" {store.rows:,} of 1,000,000 tokens" in capsys.readouterr().err
    assert 0 < store.rows < 5000
    assert store.rows % 320  # the last unit is ragged
    assert store.complete(5)
    command(tiny(tmp_path / "s.zarr", "tokens=1e6", *overrides))
    assert "is complete" in capsys.readouterr().err


def test_what_cannot_fit_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(10**9, 10**9 - 10**5, 10**5))
    with pytest.raises(StoreError, match=r" \d+ kB .* 100 kB "):
        command(tiny(tmp_path / "deep" / "s.zarr"))
    assert not (tmp_path / "deep").exists()


def test_the_plan_is_what_a_store_takes(harvested: Path) -> None:
    asked = tiny(harvested)
    planned = plan_of(asked)
    store = Store.open(harvested)
    assert (planned.rows, planned.units) == (store.spine_rows, store.units)
    taken = sum(path.stat().st_size for path in harvested.glob("layer_5/c.*"))
    assert taken == pytest.approx(planned.raw_bytes / 1.45, rel=0.25)
    assert planned.expected_bytes == 0  # it is all there
    require_fit(planned, harvested)
    larger = tiny(
        harvested, "unit=128"
    )  # of another unit, the store has more units than are asked for
    planned = plan_of(larger)
    assert (planned.expected_bytes, planned.disk_bytes) == (0, 0)


def test_a_model_that_does_not_fit_in_memory_is_refused(harvested: Path) -> None:
    asked = tiny(harvested)
    planned = plan_of(asked)
    with pytest.raises(SettingError, match=r" 1 MB .*batch="):
        require_fit(replace(planned, device_bytes=10**6), harvested)


def test_sizes_are_printed_in_powers_of_ten() -> None:
    assert [size(n) for n in (0, 999, 1000, 5.12e12)] == ["0 B", "999 B", "1 kB", "5.12 TB"]


def test_spans_of_time_are_printed_in_two_units() -> None:
    spans = (48, 187, 18_120, 359_999, 1_000_000)
    assert [duration(span) for span in spans] == ["48s", "3m07s", "5h02m", "99h59m", "11d13h"]
