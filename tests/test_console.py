"""`residual-saes COMMAND ...`: the console command, from any folder."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from residual_saes.conf import completion, console
from residual_saes.data import child, spelling
from tests.test_house import ROOT

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
    code, _, err = said("analyze", "run=nowhere", "device=cpu")
    assert code == 2 and "residual-saes train" in err and "python -m" not in err


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


# -- in a user's folder ----------------------------------------------------------------------------


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """A folder whose modules have the names of ours and of Python's own."""
    for name in ("data", "conf", "harvest"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit(7)")
    for name in ("train", "json", "re", "torch", "residual_saes_data", "csv"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(7)")
    return tmp_path


CONSOLE = ("-P", "-c", "from residual_saes.conf.console import main; main()")


def in_folder(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """`python COMMAND` there, as an installed package would run."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    "command",
    [(*CONSOLE, "train"), ("-m", "residual_saes.train"), ("-m", "residual_saes", "train")],
)
def test_modules_of_the_user_change_nothing(command: tuple[str, ...], theirs: Path) -> None:
    ended = in_folder(theirs, *command, "k=3")
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1), ended.stderr
    assert "sae.k=3" in ended.stderr
    ended = in_folder(theirs, *child.command("residual_saes.train", "--help")[1:])
    assert ended.returncode == 0 and "checkpoint_every" in ended.stdout


def test_no_module_of_the_machine_learning_kind_is_loaded_for_help(theirs: Path) -> None:
    code = f"{CONSOLE[2]}; assert not {{'torch', 'numpy', 'hydra', 'omegaconf'}} & {{*sys.modules}}"
    for words in (["help"], ["train", "--help"], ["complete", "residual-saes train sae="]):
        ended = in_folder(theirs, "-P", "-c", f"import sys; {code}", *words)
        assert ended.returncode == 0 and ended.stdout and not ended.stderr, ended.stderr


# -- completion ------------------------------------------------------------------------------------


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("activations/a.zarr", "activations/b", "runs/one", "texts"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "texts/x.txt").write_text("")
    monkeypatch.chdir(tmp_path)
    return tmp_path


COMPLETED = {
    "tr": ["train"],
    "train sae=topk_": ["sae=topk_32k"],
    "train optim.lr_": ["optim.lr_floor="],
    "train store=": ["store=activations/a.zarr", "store=activations/b/"],
    "train store=activations/a": ["store=activations/a.zarr"],
    "train run=": ["run=runs/one/"],
    "analyze study=stee": ["study=steer", "study=steering"],
    "analyze study=browser study.con": ["study.contexts="],
    "analyze run=runs/one st": ["store=", "study="],
    "harvest text.path=te": ["text.path=texts/"],
    "harvest text.path=texts/": ["text.path=texts/x.txt"],
    "harvest force=": ["force=false", "force=true"],
    "help ex": ["export"],
    "completion z": ["zsh"],
}


@pytest.mark.parametrize("line", COMPLETED)
def test_words_are_completed(line: str, places: Path) -> None:
    found = completion.complete(f"residual-saes {line}", [*console.COMMANDS])
    assert {*COMPLETED[line]} <= {*found} and len(found) <= len(COMPLETED[line]) + 2


def test_what_is_given_is_not_offered_again() -> None:
    found = completion.complete("residual-saes train store=x layer=3 ", [*console.COMMANDS])
    assert "run=" in found and not {"store=", "layer="} & {*found}


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_shells_take_their_scripts(shell: str, said: Said, tmp_path: Path) -> None:
    if not shutil.which(shell):
        pytest.skip(f"no {shell}")
    code, script, _ = said("completion", shell)
    assert code == 0
    (tmp_path / "script").write_text(script)
    checked = subprocess.run([shell, "-n", tmp_path / "script"], capture_output=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, b"")


def test_bash_completes(places: Path, said: Said) -> None:
    """bash asks the command, and replaces what stands behind its last word break alone."""
    command = f'{shlex.join([sys.executable, *CONSOLE])} "$@"'
    asked = "\n".join(
        f"COMP_LINE={shlex.quote(f'residual-saes {line}')} COMP_POINT=${{#COMP_LINE}}\n"
        '_residual_saes; printf "%s|" "${COMPREPLY[@]}"; echo'
        for line in ("train sae=topk_", "tr", "harvest text.path=texts/")
    )
    _, script, _ = said("completion", "bash")
    answered = subprocess.run(
        ["bash", "--norc", "-c", f"residual-saes() {{ {command}; }}\n{script}\n{asked}"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert answered.stdout.splitlines() == ["topk_32k |", "train |", "texts/x.txt |"]
