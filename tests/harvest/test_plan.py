"""A plan, and every refusal, before any weight is read."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from residual_saes.data.errors import MismatchError, SettingError, StoreError
from residual_saes.data.store import codec
from residual_saes.data.tiny.embedded import MODEL_DIR
from residual_saes.harvest import command as commands
from residual_saes.harvest.command import command
from residual_saes.harvest.headers import stored
from residual_saes.harvest.plan import require_fit
from residual_saes.harvest.weight_files import INDEX, SINGLE
from tests.harvest.test_command import plan_of, tiny

WEIGHTS = load_file(MODEL_DIR / SINGLE)
NUMBERS = sum(weight.numel() for weight in WEIGHTS.values())


@pytest.fixture
def no_weight_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "load", lambda *_, **__: pytest.fail("weights were loaded"))


def folder_with(folder: Path, weights: dict[str, torch.Tensor]) -> Path:
    """The embedded model with other weights."""
    shutil.copytree(MODEL_DIR, folder)
    save_file(weights, folder / SINGLE, {"format": "pt"})
    return folder


@pytest.mark.usefixtures("no_weight_is_read")
def test_a_plan_names_disk_memory_and_hours_before_it_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(StoreError, match=r"disk .*force=true"):
        command(tiny(tmp_path / "s.zarr", "tokens=1e15", "action=plan"))
    printed = capsys.readouterr().out
    for fact in ("\ndisk ", "\nmemory ", "\nhours ", "GFLOP a token", *codec.NAMES):
        assert fact in printed, fact
    raw = 10**15 * 64 * 2
    for ratio in codec.EXPECTED_RATIO.values():
        assert f"{raw / ratio / 1e12:.3g} TB" in printed


@pytest.mark.usefixtures("no_weight_is_read")
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["layer=12"], "layer=12 .* 0 to 11"),
        (["context=2048"], "context=2048 .* 1024 "),
        (["text.path={folder}/chats.jsonl", "text.messages=messages"], "chat template"),
        (["model.path={folder}/dumb"], "tokenizer"),
        (["model.path={folder}/lost"], f"{SINGLE}.*{INDEX}"),
        (["model.path={folder}/half"], "incomplete"),
        (["model.path={folder}/quantised"], "I8.*quantization_config"),
        (["model.path={folder}/damaged"], f"{SINGLE} is damaged"),
        (["force=perhaps"], "force=perhaps "),
        (["probe=1"], "probe=1 "),
    ],
)
def test_what_cannot_be_is_refused_before(
    tmp_path: Path, overrides: list[str], message: str
) -> None:
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": []}) + "\n")
    for name in ("dumb", "lost", "plain"):
        shutil.copytree(MODEL_DIR, tmp_path / name)
    (tmp_path / "dumb" / "tokenizer.json").unlink()
    (tmp_path / "lost" / SINGLE).unlink()
    (tmp_path / "plain" / "chat_template.jinja").unlink()
    folder_with(tmp_path / "half", dict(list(WEIGHTS.items())[:20]))
    small = {name: weight.to(torch.int8) for name, weight in WEIGHTS.items()}
    folder_with(tmp_path / "quantised", small)
    damaged = shutil.copytree(MODEL_DIR, tmp_path / "damaged") / SINGLE
    damaged.write_bytes(damaged.read_bytes()[:100])
    given = [override.format(folder=tmp_path) for override in overrides]
    if "text.messages=messages" in given:
        given.append(f"model.path={tmp_path}/plain")
    for action in ("plan", "run"):
        with pytest.raises(SettingError, match=message) as error:
            command(tiny(tmp_path / "s.zarr", *given, f"action={action}"))
        assert "\n" not in str(error.value)
    assert not (tmp_path / "s.zarr").exists()


def test_a_store_of_other_settings_is_refused_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command(tiny(tmp_path / "s.zarr", "tokens=640"))
    monkeypatch.setattr(commands, "load", lambda *_, **__: pytest.fail("weights were loaded"))
    for other in ("seed=1", "tokens=700", "codec=none", "model.dtype=bfloat16"):
        with pytest.raises(MismatchError):
            command(tiny(tmp_path / "s.zarr", "tokens=640", other))
    command(tiny(tmp_path / "s.zarr", "tokens=640", "action=plan"))


def test_force_turns_refusals_into_warnings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    planned = replace(plan_of(tiny(tmp_path / "s.zarr")), device_bytes=10**6, free_bytes=10)
    with pytest.raises(StoreError):
        require_fit(planned, "s.zarr")
    with pytest.raises(SettingError):
        require_fit(replace(planned, free_bytes=None), "s.zarr")
    require_fit(planned, "s.zarr", force=True)
    warnings = capsys.readouterr().err.splitlines()
    assert [line.startswith("warning: ") for line in warnings] == [True, True]
    command(tiny(tmp_path / "s.zarr", "tokens=1e15", "action=plan", "force=true"))


def test_the_probe_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command(tiny(tmp_path / "s.zarr", "action=plan", "probe=true"))
    captured = capsys.readouterr()
    assert "loading embedded" in captured.err and "batch 1 of 3" in captured.err
    assert captured.out.count("\nhours ") == 2
    assert not (tmp_path / "s.zarr").exists()


def test_weights_of_the_files_type_are_no_memory_on_a_cpu(tmp_path: Path) -> None:
    files = stored("embedded", MODEL_DIR)
    assert files.numbers == {"F32": NUMBERS}
    assert (files.other_share("float32"), files.other_share("bfloat16")) == (0, 1)
    plans = [
        plan_of(tiny(tmp_path / "s.zarr", f"model.dtype={dtype}"))
        for dtype in ("float32", "bfloat16")
    ]
    mapped, copied = (planned.memory for planned in plans)
    assert mapped.weights == 0 and mapped.mapped == plans[0].model.kept_bytes
    assert copied.mapped == 0 and copied.weights == plans[1].model.kept_bytes
