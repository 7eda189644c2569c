"""`residual-saes COMMAND ...`: the console command, from any folder."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from residual_saes.conf import console
from residual_saes.data import spelling

Said = Callable[..., tuple[int, str, str]]


@pytest.fixture
def said(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    unwatched: None,
) -> Said:
    """Run `residual-saes` in this process: exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(spelling.VARIABLE, "")

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["residual-saes", *words])
        code = 0
        try:
            console.main()
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        return code, *capsys.readouterr()

    return run


@pytest.mark.parametrize("words", [[], ["help"], ["--help"], ["-h"]])
def test_alone_it_lists_its_commands(words: list[str], said: Said) -> None:
    code, out, err = said(*words)
    assert (code, err) == (0, "")
    assert all(f"residual-saes {name} " in out for name in console.COMMANDS)
    assert len(out.splitlines()) <= 24


@pytest.mark.parametrize("words", [["help", "train"], ["train", "--help"], ["train", "-h"]])
def test_help_of_a_command_is_its_settings(words: list[str], said: Said) -> None:
    code, out, _ = said(*words)
    assert code == 0 and "checkpoint_every: " in out and "sae=topk_32k" in out
    assert "python -m" not in out


def test_the_version(said: Said) -> None:
    code, out, _ = said("--version")
    assert code == 0 and out.startswith("residual-saes 0.")


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["trian"], "residual-saes train"),
        (["analyse", "study=report"], "residual-saes analyze"),
        (["--store=x", "harvest"], "residual-saes harvest"),
        (["help", "exprot"], "residual-saes export"),
        (["studies"], "harvest, train, analyze, export, publish"),
    ],
)
def test_an_unknown_command_is_one_line(words: list[str], meant: str, said: Said) -> None:
    code, out, err = said(*words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert meant in err


def test_messages_spell_commands_as_they_were_started(said: Said) -> None:
    code, _, err = said("train", "store=nowhere")
    assert code == 2 and "residual-saes harvest" in err and "python -m" not in err


def test_every_spelling_is_known() -> None:
    for text, same in (
        ("`python -m train.export run=x`", "`residual-saes export run=x`"),
        ("python -m residual_saes.train.publish", "residual-saes publish"),
        ("python -m harvest, python -m analyze.", "residual-saes harvest, residual-saes analyze."),
    ):
        assert spelling.spelled(text) == text
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(spelling.VARIABLE, spelling.CONSOLE)
            assert spelling.spelled(text) == same
            other = "python -m train.other, python -m tests.bench.scale"
            assert spelling.spelled(other) == other


def test_ctrl_c_before_a_command_begins_is_quiet(said: Said) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    said("--version")
    assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
