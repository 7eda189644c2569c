"""Results lie side by side, none is taken for another, and what is kept is whole or made again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from residual_saes.analyze import results
from residual_saes.analyze.kept import grow, read_lines
from residual_saes.analyze.outcome import Outcome, Picture, Table
from residual_saes.analyze.parts import Parts
from residual_saes.analyze.study import Definition, Study, find, modules
from residual_saes.analyze.subject import Subject
from residual_saes.data.errors import Interrupted, SettingError, StoreError, TemporaryError
from residual_saes.harvest.model import ModelConfig
from residual_saes.train import blocks, product
from residual_saes.train.run import CONFIG
from tests.analyze.conftest import Made


class Counted:
    """A study that counts how often it was done."""

    def __init__(self, fails_with: BaseException | None = None) -> None:
        self.times = 0
        self._fails_with = fails_with

    def __call__(self, study: Study) -> Outcome:
        self.times += 1
        if study.folder != study.place:
            (study.folder / "figures.txt").write_text(str(study.options))
        if self._fails_with:
            raise self._fails_with
        table = Table("c", ("a|b", "\\"), [("1|2", "x")])
        pictures = {"drawn": Picture("shown", "<svg/>")}
        figures = {"options": dict(study.options), "nan": float("nan")}
        return Outcome(figures, ["found"], [table], pictures)


@pytest.fixture
def asked(made: Made, tmp_path: Path) -> Callable[..., Study]:
    """A study of a run of its own, with some options."""
    shutil.copytree(made.run, tmp_path / "run")
    subject = Subject.open(tmp_path / "run", None, torch.device("cpu"))
    return lambda **options: Study("shape", subject, options, ModelConfig("nobody/none"))


def names(study: Study) -> list[str]:
    folder = study.subject.run / "studies"
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("shape"))


def test_the_same_settings_are_done_once(asked: Callable[..., Study]) -> None:
    run = Counted()
    first = asked(top=3).perform(Definition(run))
    again = asked(top=3).perform(Definition(run))
    assert run.times == 1
    assert again.summary == first.summary and again.tables == first.tables
    assert again.pictures == first.pictures and again.figures["nan"] is None


def test_results_of_other_settings_lie_side_by_side(asked: Callable[..., Study]) -> None:
    run = Counted()
    for top in (3, 5, 3, 7):
        assert asked(top=top).perform(Definition(run)).figures["options"] == {"top": top}
        current = json.loads((asked().folder / "shape.json").read_bytes())
        assert current["settings"]["options"] == {"top": top}  # what was asked for last
        assert (asked().folder / "figures.txt").read_text() == str({"top": top})
    assert run.times == 3
    tried = results.of_study(asked().subject.run, "shape")
    assert [result.settings["options"]["top"] for result in tried[:1]] == [7]
    assert sorted(result.settings["options"]["top"] for result in tried) == [3, 5, 7]


def test_another_version_does_it_again(asked: Callable[..., Study]) -> None:
    run = Counted()
    for version in (1, 2, 2):
        asked().perform(Definition(run, version=version))
    assert run.times == 2 and len(names(asked())) == 2


def test_a_result_without_a_version_is_not_taken(asked: Callable[..., Study]) -> None:
    """As results of before there were versions."""
    run = Counted()
    asked().perform(Definition(run))
    path = asked().folder / "shape.json"
    record = json.loads(path.read_bytes())
    del record["settings"]["version"]
    path.write_text(json.dumps(record))
    asked().perform(Definition(run))
    assert run.times == 2


@pytest.mark.parametrize("lost", ["figures.txt", "drawn.svg", "shape.json"])
def test_what_is_not_whole_is_done_again(asked: Callable[..., Study], lost: str) -> None:
    run = Counted()
    asked().perform(Definition(run))
    (asked().folder / lost).unlink()
    asked().perform(Definition(run))
    assert run.times == 2 and (asked().folder / lost).is_file()
    assert names(asked()) == ["shape"]


@pytest.mark.parametrize("error", [StoreError("no"), Interrupted(15)])
def test_a_study_that_fails_leaves_the_former_result(
    asked: Callable[..., Study], error: BaseException
) -> None:
    asked(top=3).perform(Definition(Counted()))
    before = (asked().folder / "shape.json").read_bytes()
    with pytest.raises(type(error)):
        asked(top=5).perform(Definition(Counted(error)))
    assert (asked().folder / "shape.json").read_bytes() == before
    assert names(asked()) == ["shape"]


def test_a_killed_study_is_never_taken_for_done(asked: Callable[..., Study]) -> None:
    """Killed ahead of its record, then asked for with the former settings."""
    run = Counted()
    asked(top=3).perform(Definition(run))
    new = results.begin(asked().subject.run, "shape")
    for file in asked().place.iterdir():  # all but the record
        if file.name != "digests.json":
            (new / file.name).write_text("of other settings")
    outcome = asked(top=3).perform(Definition(run))
    assert run.times == 1 and outcome.figures["options"] == {"top": 3}
    assert (asked().folder / "figures.txt").read_text() == str({"top": 3})


def test_a_result_that_was_killed_before_its_renaming_is_taken(asked: Callable[..., Study]) -> None:
    run = Counted()
    asked(top=3).perform(Definition(run))
    asked(top=5).perform(Definition(run))
    place = asked().place
    place.rename(place.with_name(".shape.new"))
    assert results.current(asked().subject.run, asked().subject.digest) == {}
    assert asked(top=5).perform(Definition(run)).figures["options"] == {"top": 5}
    assert run.times == 2 and sorted(names(asked()))[0] == "shape"


def test_a_result_of_an_earlier_version_is_set_aside(
    asked: Callable[..., Study], capsys: pytest.CaptureFixture[str]
) -> None:
    """It has no record, and is not counted."""
    run = Counted()
    asked(top=3).perform(Definition(run))
    (asked().place / "digests.json").unlink()
    before = (asked().place / "shape.json").read_bytes()
    subject = asked().subject
    assert results.current(subject.run, subject.digest) == {}
    for top in (5, 3):
        asked(top=top).perform(Definition(run))
    assert run.times == 3 and "digests.json" in capsys.readouterr().err
    whole = results.of_study(subject.run, "shape")
    assert [result.settings["options"]["top"] for result in whole] == [3, 5]
    unrecorded = [
        path
        for path in (subject.run / "studies").glob("shape.*")
        if path not in [result.folder for result in whole]
    ]
    assert [(path / "shape.json").read_bytes() for path in unrecorded] == [before]


def test_a_damaged_result_gives_way_to_the_one_that_is_made_again(
    asked: Callable[..., Study], capsys: pytest.CaptureFixture[str]
) -> None:
    run = Counted()
    for top in (3, 5):
        asked(top=top).perform(Definition(run))
    (aside,) = (asked().subject.run / "studies").glob("shape.*")
    (aside / "drawn.svg").write_text("<svg>other</svg>")
    outcome = asked(top=3).perform(Definition(run))
    assert run.times == 3 and outcome.pictures["drawn"].svg == "<svg/>"
    assert "drawn.svg" in capsys.readouterr().err
    assert len(results.of_study(asked().subject.run, "shape")) == len(names(asked())) == 2


def test_what_is_read_may_not_change_meanwhile(asked: Callable[..., Study]) -> None:
    files = iter("aabc")
    definition = Definition(Counted(), inputs=lambda _: {"file": next(files)})
    asked().perform(definition)
    with pytest.raises(TemporaryError, match="study=shape"):
        asked().perform(definition)
    assert len(results.of_study(asked().subject.run, "shape")) == 1


def test_results_of_another_sae_are_left_out(
    asked: Callable[..., Study], capsys: pytest.CaptureFixture[str]
) -> None:
    study = asked()
    study.perform(Definition(Counted()))
    run = study.subject.run
    assert list(results.current(run, study.subject.digest)) == ["shape"]
    assert results.current(run, "another") == {}
    assert "study=shape" in capsys.readouterr().err


# -- what is kept ----------------------------------------------------------------------------------


def test_kept_is_made_once_and_again_where_damaged(asked: Callable[..., Study]) -> None:
    made: list[str] = []

    def make(folder: Path) -> None:
        made.append(folder.name)
        for name in ("a", "b"):
            (folder / name).write_text(name)

    key: dict[str, Any] = {"version": 1, "of": [1, 2]}
    folder = asked().kept("rows", key, make)
    assert asked().kept("rows", dict(reversed(key.items())), make) == folder and len(made) == 1
    assert asked().kept("rows", {**key, "version": 2}, make) != folder and len(made) == 2
    for damage in (lambda: (folder / "a").write_text("x"), (folder / "b").unlink):
        damage()
        assert asked().kept("rows", key, make) == folder
        assert ((folder / "a").read_text(), (folder / "b").read_text()) == ("a", "b")
    assert len(made) == 4


def test_a_damaged_part_is_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A flipped bit in the headers of an .npz is silent, or an error of any kind."""
    parts = Parts(tmp_path / "parts")
    made = {"a": np.arange(5)}
    parts.of(0, lambda: made)
    (path,) = parts.folder.iterdir() if parts.folder else ()
    whole = path.read_bytes()
    for at in range(0, len(whole), 7):
        flipped = bytearray(whole)
        flipped[at] ^= 4
        path.write_bytes(flipped)
        assert parts.of(0, lambda: made) is made and path.read_bytes() == whole
        assert path.name in capsys.readouterr().err
    np.testing.assert_array_equal(parts.of(0, lambda: {})["a"], made["a"])


def test_a_file_of_lines_goes_on_behind_its_last_batch(tmp_path: Path) -> None:
    path, asked = tmp_path / "lines.jsonl", list[slice]()

    def make(part: slice) -> list[dict[str, int]]:
        asked.append(part)
        if len(asked) == 2:
            raise StoreError("stopped")
        return [{"n": n} for n in range(7)[part]]

    with pytest.raises(StoreError):
        grow(path, 7, 3, make)
    assert [line["n"] for line in read_lines(path)] == [0, 1, 2]
    grow(path, 7, 3, make)
    assert [line["n"] for line in read_lines(path)] == list(range(7))
    assert [part.start for part in asked] == [0, 3, 3, 6]


# -- definitions -----------------------------------------------------------------------------------


def test_every_study_has_a_definition_and_a_page_of_settings() -> None:
    conf = Path(__file__).parents[2] / "conf" / "study"
    for path in conf.glob("*.yaml"):
        definition = find(path.stem)
        assert (definition.run is None) != (definition.compare is None)
    keys = [column.key for path in conf.glob("*.yaml") for column in find(path.stem).columns]
    assert keys and len(keys) == len(set(keys))
    assert {path.stem for path in conf.glob("*.yaml")} <= modules().keys()


@pytest.mark.parametrize("name", ["none", "saebench_metrics", "../study"])
def test_an_unknown_study_is_refused(name: str) -> None:
    with pytest.raises(SettingError, match="study="):
        find(name)


def test_the_report_is_made_anew_each_time(asked: Callable[..., Study]) -> None:
    run = Counted()
    for _ in range(2):
        asked().perform(replace(Definition(run), fresh=True))
    assert run.times == 2 and not (asked().folder / "shape.json").exists()


@pytest.mark.parametrize(
    ("recorded", "wanted"), [(None, "torch"), ("openblas", "openblas"), ("abacus", "torch")]
)
def test_rows_are_encoded_as_the_run_recorded_and_nothing_is_measured(
    made: Made,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    recorded: str | None,
    wanted: str,
) -> None:
    """Otherwise a study that is stopped and goes on could come out in other bits."""
    run = tmp_path / "run"
    shutil.copytree(made.run, run)
    whole = yaml.safe_load((run / CONFIG).read_text())
    if recorded:
        whole["environment"]["ways"] = {"product": recorded}
    (run / CONFIG).write_text(yaml.safe_dump(whole))
    monkeypatch.setattr(product, "ways", lambda kind: ["torch", "openblas"])
    monkeypatch.setattr(product, "SMALL", 0)
    monkeypatch.setattr(product, "_tried", None)
    monkeypatch.setattr(blocks, "openblas_product_", lambda out, x, W: torch.mm(x, W.T, out=out))
    subject = Subject.open(run, None, torch.device("cpu"))
    assert subject.sae.by == wanted
    next(subject.firings(1))
