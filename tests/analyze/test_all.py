"""study=all: the order, one load, what is left out, what is refused, and what goes on."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module

from residual_saes.analyze import results
from residual_saes.analyze.command import command
from residual_saes.analyze.studies import gsm8k
from residual_saes.analyze.studies.all import DEFINITION, ORDER
from residual_saes.analyze.study import Study
from residual_saes.analyze.subject import Subject
from residual_saes.conf.command import plain
from residual_saes.data.errors import Interrupted, SettingError, TemporaryError
from residual_saes.harvest import model
from tests.analyze.conftest import tiny_run  # noqa: F401 (a fixture)

SMALL: dict[str, dict[str, Any]] = {
    "quality": {"rows": 2048},
    "gsm8k": {},
    "contrast": {"permutations": 19},
    "steering": {"scales": [2], "n_random": 1, "n_shuffled": 1, "train": 0.8, "dev": 0.1},
    "stage_gate": {"draws": 20},
    "logit_lens": {"prompts": 2, "tokens": 8, "target": "digit"},
    "reason_score": {"rows": 2048, "words": ["more", "left"], "draws": 50},
    "splice": {"tokens": 100},
    "saebench": {"rows": 2048},
    "catalogue": {"rows": 2048, "logits": 3},
    "report": {"rows": 2048},
}
OF_PROBLEMS = ("gsm8k", "contrast", "steering", "stage_gate")


class Calls:
    """What was called, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        self._monkeypatch = monkeypatch

    def count(self, owner: Any, name: str) -> None:
        called = getattr(owner, name)

        def counted(*arguments: Any, **named: Any) -> Any:
            self.names.append(arguments[0].name if name == "perform" else name)
            return called(*arguments, **named)

        self._monkeypatch.setattr(owner, name, counted)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    calls = Calls(monkeypatch)
    calls.count(model, "load")
    calls.count(model, "weights_digest")
    calls.count(Study, "perform")
    return calls


@pytest.fixture(scope="module")
def runs(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """A copy of the run without results, for all tests here; answers are kept in it."""
    run = tmp_path_factory.mktemp("all") / "run"
    shutil.copytree(tiny_run, run, ignore=shutil.ignore_patterns(results.FOLDER))
    return run


@pytest.fixture
def every(runs: Path, tiny_study: Callable[..., Study]) -> Callable[..., Study]:
    """Makes study=all with the settings of some studies: `every("quality", "splice")`."""

    def of(*names: str, problems: str | None = "tiny", **options: Any) -> Study:
        chosen = {name: SMALL[name] for name in names or ORDER} | options
        answers = {"questions": 40, "new_tokens": 24, "samples": 1, "batch": 40}
        study = tiny_study("all", "tiny", answers, **chosen)
        study.problems, study.loaded = problems, {}  # loads are counted
        study.subject = Subject.open(runs, None, study.subject.device)
        return study

    return of


def test_all_studies_with_one_load_and_one_digest(
    every: Callable[..., Study], calls: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    study = every()
    outcome = study.perform(DEFINITION)
    assert calls.names.count("load") == calls.names.count("weights_digest") == 1
    performed = [name for name in calls.names if name in ORDER]
    assert performed == list(ORDER)
    done = results.current(study.subject.run, study.subject.digest)
    assert done.keys() == {*ORDER} - {"report"}
    assert (study.subject.run / "report.html").exists()
    assert [f"# {name}" in capsys.readouterr().out for name in ORDER[:1]] == [True]
    assert outcome.summary == ["11 studies are done"]

    # The same command again finds everything, and loads nothing.
    calls.names.clear()
    every(*ORDER[:-1]).perform(DEFINITION)
    assert "load" not in calls.names
    assert capsys.readouterr().err.count("is there already") == len(ORDER) - 1


def test_without_problems_what_needs_them_is_left_out(every: Callable[..., Study]) -> None:
    study = every("quality", *OF_PROBLEMS, problems=None)
    study.subject.store.manifest["model"]["id"] = "me/model"  # the embedded one has problems
    *left_out, done = study.perform(DEFINITION).summary
    assert [line.split()[0] for line in left_out] == [f"study={name}" for name in OF_PROBLEMS]
    assert all("problems=" in line for line in left_out) and done.startswith("1 ")


def test_a_refused_study_stops_no_other(
    every: Callable[..., Study], capsys: pytest.CaptureFixture[str]
) -> None:
    study = every("contrast", "reason_score", "quality", reason_score={"words": ["zzzzqq", "qqqz"]})
    shutil.rmtree(study.subject.run / results.FOLDER / "quality", ignore_errors=True)
    with pytest.raises(SettingError, match=r"reason_score: .*zzzzqq") as refused:
        study.perform(DEFINITION)
    assert refused.value.exit_code == 2
    assert "study=reason_score cannot be done" in capsys.readouterr().err
    assert "quality" in results.current(study.subject.run, study.subject.digest)


def test_what_may_pass_is_exit_75_and_goes_on(
    every: Callable[..., Study], monkeypatch: pytest.MonkeyPatch, calls: Calls
) -> None:
    failing = every("splice", "quality", splice={"tokens": 201})
    with monkeypatch.context() as patched:
        patched.setattr(model, "load", lambda *_, **__: (_ for _ in ()).throw(TimeoutError("slow")))
        with pytest.raises(TemporaryError, match="splice") as passing:
            failing.perform(DEFINITION)
    assert passing.value.exit_code == 75
    again = every("splice", "quality", splice={"tokens": 201}).perform(DEFINITION)
    assert again.summary == ["2 studies are done"]


def test_a_signal_stops_at_once(
    every: Callable[..., Study], monkeypatch: pytest.MonkeyPatch, calls: Calls
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise Interrupted(2)

    monkeypatch.setattr(gsm8k, "answers", interrupted)
    study = every("quality", "gsm8k", "splice")
    shutil.rmtree(study.subject.run / results.FOLDER / "gsm8k", ignore_errors=True)
    with pytest.raises(Interrupted):
        study.perform(DEFINITION)
    assert [name for name in calls.names if name in ORDER] == ["quality", "gsm8k"]


@pytest.mark.parametrize("options", [{"quality": None}, {"sweep": {}}, {"tokens": 5}])
def test_settings_of_no_study_are_refused(every: Callable[..., Study], options: Any) -> None:
    (name,) = options
    with pytest.raises(SettingError, match=rf"study\.{name}="):
        every("quality", **options).perform(DEFINITION)


def test_its_command_line(runs: Path, calls: Calls) -> None:
    """Each study's own settings are under its name, and `~` leaves a study out."""
    without = [f"~study.{name}" for name in ORDER if name not in ("quality", "splice")]
    given = ["study=all", f"run={runs}", "device=cpu", "study.quality.rows=1024", *without]
    with initialize_config_module("residual_saes.conf", version_base="1.3"):
        settings = plain(compose("analyze", given))
        whole = plain(compose("analyze", ["study=all"]))["study"]
    assert [name for name in whole if name != "name"] == list(ORDER)
    settings["study"]["splice"]["tokens"] = 100
    command(settings)
    assert [name for name in calls.names if name in ORDER] == ["quality", "splice"]
    (newest, *_) = results.of_study(runs, "quality")
    assert newest.settings["options"] == {"rows": 1024}
