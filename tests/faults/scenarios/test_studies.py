"""Every study: killed and without power at any moment, each of its files damaged, and read while
another process does it again.

What is asked each time: the former settings, the interrupted ones, and what readers take for done.
"""

from __future__ import annotations

import io
import shutil
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from residual_saes.analyze import results
from residual_saes.analyze.peers import saebench
from residual_saes.analyze.study import Definition, Study, find
from residual_saes.analyze.subject import Subject
from residual_saes.data import durable
from residual_saes.data.errors import TemporaryError
from residual_saes.data.model_path import EMBEDDED
from residual_saes.harvest.model import LanguageModel, ModelConfig, load
from residual_saes.train import sae_file
from tests.analyze.conftest import make_run, make_tiny_run, random_rows
from tests.faults import tree
from tests.faults.child import Answer, ask, in_child, outcome
from tests.faults.flips import Damage, damages
from tests.faults.kills import killed
from tests.faults.power import EVERY, images
from tests.faults.report import Outcome, Tally, judged
from tests.faults.trace import traced
from tests.faults.tree import Tree

FLIPPED = (
    *("a/studies/*", "a/quality.*", "a/report.html"),  # of every study below
)
MODEL = ModelConfig(EMBEDDED, dtype="float32")
ANSWERS = {"questions": 64, "new_tokens": 24, "batch": 32}
CATALOGUE = {"rows": 2048, "part": "all", "top": 2, "quantiles": 2, "each": 1, "logits": 0}
STEERING = {"scales": [2], "n_random": 1, "n_shuffled": 1}
INTERVENE = {"changes": ["ablate"], "n_random": 1}


@dataclass(frozen=True)
class Case:
    """A study with two settings: of the result that is there, and of the one that is made."""

    there: Mapping[str, Any]
    made: Mapping[str, Any]
    needs: tuple[str, ...] = ()  # studies that come first


CASES = {
    "quality": Case({"rows": 512}, {"rows": 2048}),
    "catalogue": Case({**CATALOGUE, "top": 3}, CATALOGUE),
    "browser": Case({"contexts": 2}, {"contexts": 1}, ("catalogue",)),
    "delphi": Case({"splits": 1}, {"splits": 2}, ("catalogue",)),
    "neuronpedia": Case({"vectors": False}, {}, ("catalogue",)),
    "saebench": Case({"rows": 512}, {"rows": 1024}),
    "stability": Case({"rows": 512}, {"rows": 1024}),
    "logit_lens": Case({"prompts": 2, "target": "digit"}, {"prompts": 3, "target": "digit"}),
    "splice": Case({"tokens": 100}, {"tokens": 200}),
    "reason_score": Case({"words": ["more", "left"]}, {"words": ["more", "has"]}),
    "gsm8k": Case({}, {}),
    "contrast": Case({"permutations": 19, "min_firing": 1}, {"permutations": 29, "min_firing": 1}),
    "stage_gate": Case({"draws": 20, "min_firing": 1}, {"draws": 30, "min_firing": 1}),
    "rollouts": Case({"draws": 20, "min_firing": 1}, {"draws": 30, "min_firing": 1}),
    "steering": Case(STEERING, {**STEERING, "scales": [3]}),
    "intervene": Case({**INTERVENE, "features": [3]}, {**INTERVENE, "features": [40]}),
}
FLIPS = 80  # of each kind of file


class Runs:
    """A run and, beside it, another one; the language model is loaded once."""

    def __init__(self, run: Path, lm: LanguageModel | None = None) -> None:
        self.run = run
        self._lm = lm

    def do(self, name: str, which: str) -> None:
        """Perform the study with one of its settings."""
        study, definition = self._study(name, which)
        study.perform(definition)

    def _study(self, name: str, which: str) -> tuple[Study, Definition]:
        subject = Subject.open(self.run, None, torch.device("cpu"))
        options = getattr(CASES[name], which)
        if name == "stability":
            options = {**options, "other": str(self.run.with_name("b"))}
        # gsm8k has no settings of its own.
        few = {"questions": 32} if name == "gsm8k" and which == "there" else {}
        loaded = {MODEL: self._lm} if self._lm else {}
        study = Study(name, subject, options, MODEL, "tiny", {**ANSWERS, **few}, loaded)
        return study, find(name)

    def result(self, name: str, which: str) -> Tree:
        """What the study's command leaves."""
        self.do(name, which)
        beside = [self.run / "quality.json", self.run / "quality.md"] if name == "quality" else []
        files = tree.files(self.run / "studies" / name)
        return {**files, **{path.name: path.read_bytes() for path in beside}}

    def settings(self, name: str) -> dict[str, Any]:
        """The former settings, as the result has them."""
        study, definition = self._study(name, "there")
        return study.settings(definition)

    def found(self, name: str, settings: Mapping[str, Any]) -> Any:
        """What the command with these settings takes for done."""
        return results.find(self.run, name, settings)

    def taken(self, name: str) -> tuple[Any, Any] | None:
        """What a reader takes for the study's result: its settings and figures."""
        digest = durable.digest_file(self.run / sae_file.FILE).xxh3_128
        found = results.current(self.run, digest, name)
        return (found[name].settings, found[name].outcome.figures) if found else None


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    root = tmp_path_factory.mktemp("studies")
    made = make_tiny_run(root)
    for name in ("a", "b"):
        shutil.copytree(made, root / name)
    return Runs(root / "a", load(MODEL, head=True))


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """SAEBench's format wants a time in its file."""
    monkeypatch.setattr(saebench, "time", SimpleNamespace(time=lambda: 0.0))


class Tried:
    """The study with its former result, and what is right."""

    def __init__(self, runs: Runs, name: str, tally: Tally) -> None:
        self.run, self.name = runs.run, name
        self._runs, self._tally = runs, tally
        for needed in CASES[name].needs:
            runs.do(needed, "there")  # in this process: what it imports is there in every child
        runs.do(name, "there")
        self._settings = runs.settings(name)
        self.before = tree.read(runs.run)
        self.right = self._right()
        self.readers = [None]
        for which in ("there", "made"):
            runs.do(name, which)
            self.readers.append(runs.taken(name))
        tree.put(runs.run, self.before)

    def begin(self) -> None:
        tree.put(self.run, self.before)

    def work(self) -> None:
        self._runs.do(self.name, "made")

    def _right(self) -> tuple[Tree, Tree]:
        return self._runs.result(self.name, "there"), self._runs.result(self.name, "made")

    def check(self, kind: str, told: str) -> None:
        """Whatever was left: no reader takes it for another result, and each command is right."""
        answer = ask(self._answer)
        said = answer.refusal or answer.broken or answer.said
        self._tally.add(f"{kind}: {self.name}", judged(answer, True), f"{told}: {said}")

    def check_damage(self, kind: str, name: str, told: str) -> None:
        """A damaged result is taken by nobody, and each says so by the file's name."""
        with redirect_stderr(io.StringIO()) as said:
            answer = self._left_out()
        found = judged(answer, (None, None))
        lines = [line for line in said.getvalue().splitlines() if Path(name).name in line]
        if found is Outcome.SAME:
            found = Outcome.REFUSED if len(lines) == 2 else Outcome.SILENT
        self._tally.add(kind, found, f"{name}, {told}: {answer.broken or lines}")

    def check_beside(self, kind: str, name: str, data: bytes) -> None:
        """The study's command says that a file beside its result was damaged, and mends it."""
        with redirect_stderr(io.StringIO()) as said:
            self._runs.do(self.name, "there")
        is_mended = (self.run / name).read_bytes() == data and name in said.getvalue()
        found = Outcome.REPAIRED if is_mended else Outcome.SILENT
        self._tally.add(kind, found, said.getvalue())

    def _left_out(self) -> Answer:
        """What a reader takes, and the study's own command."""
        value = broken = None
        try:
            value = self._runs.taken(self.name), self._runs.found(self.name, self._settings)
        except Exception:
            broken = traceback.format_exc()
        return Answer(value, None, broken, "")

    def _answer(self) -> bool:
        taken = self._runs.taken(self.name)
        return taken in self.readers and self._right() == self.right


@pytest.fixture
def tried(request: pytest.FixtureRequest, runs: Runs, tally: Tally) -> Iterator[Tried]:
    empty = tree.read(runs.run)
    yield Tried(runs, request.param, tally)
    tree.put(runs.run, empty)


every = pytest.mark.parametrize("tried", CASES, indirect=True)


# -- kills and power losses ------------------------------------------------------------------------


@pytest.mark.long
@every
def test_kills(tried: Tried, tally: Tally) -> None:
    kills(tried, 2 * EVERY - 1)
    assert tally.cases(Outcome.SAME) == tally.cases() >= 1


@pytest.mark.long
@every
def test_power_losses(tried: Tried, tally: Tally) -> None:
    power_losses(tried, EVERY)
    assert tally.cases(Outcome.SAME) == tally.cases() >= 1


def kills(tried: Tried, stride: int) -> None:
    for moment in killed(tried.begin, tried.work, stride):
        tried.check("kill", f"moment {moment}")


def power_losses(tried: Tried, part: int) -> None:
    tried.begin()
    trace = traced(tried.run, tried.work)
    assert trace.code == 0
    for number, image in enumerate(images(trace)):
        if number % part == 0:
            image.put()
            tried.check("power loss", str(image))


# -- damage ----------------------------------------------------------------------------------------


@pytest.mark.long
@every
def test_damage(tried: Tried, tally: Tally) -> None:
    damage(tried, FLIPS)
    damage_kept(tried, max(FLIPS // 8, 1))
    damage_beside(tried, FLIPS)
    assert tally.cases(Outcome.REFUSED) >= 10


def damage(tried: Tried, flips: int) -> None:
    """Damage every file of the result in turn; the commands mend the last damage of each kind.

    Args:
        flips: of each kind, the ending of a file's name, at least.
    """
    folder = tried.run / "studies" / tried.name
    tried.begin()
    kinds = {Path(name).suffix: name for name in tree.files(folder)}
    count = Counter(Path(name).suffix for name in tree.files(folder))
    for name, data in tree.files(folder).items():
        for damage in damages(data, -(-flips // count[Path(name).suffix])):
            put(folder / name, damage)
            kind = f"{tried.name} {Path(name).suffix}"
            tried.check_damage(f"{damage.kind}: {kind}", name, damage.told)
        if name in kinds.values():
            tried.check(f"mended: {Path(name).suffix} of", name)
            tried.begin()
        (folder / name).write_bytes(data)


def damage_kept(tried: Tried, flips: int) -> None:
    """Damage the kept files from which the result is made once more."""
    whole = tree.files(tried.run)
    for name in [name for name in whole if name.startswith("studies/kept/")]:
        for damage in damages(whole[name], flips):
            tried.begin()
            shutil.rmtree(tried.run / "studies" / tried.name)
            put(tried.run / name, damage)
            tried.check(f"{damage.kind}: kept {Path(name).suffix} of", f"{name}, {damage.told}")


def damage_beside(tried: Tried, flips: int) -> None:
    """Damage quality.json and quality.md in the run's own directory: the command mends them."""
    for name in ("quality.json", "quality.md") if tried.name == "quality" else ():
        tried.begin()
        data = (tried.run / name).read_bytes()
        for damage in damages(data, flips):
            put(tried.run / name, damage)
            tried.check_beside(f"{damage.kind}: {name}", name, data)


def put(path: Path, damage: Damage) -> None:
    if damage.data is None:
        path.unlink()
    else:
        path.write_bytes(damage.data)


# -- without a language model ----------------------------------------------------------------------


def test_some_faults(tmp_path: Path, tally: Tally) -> None:
    """A few of each of the faults above."""
    runs = Runs(make_run(tmp_path, random_rows()).run)
    quality = Tried(runs, "quality", tally)
    kills(quality, 25)
    power_losses(quality, 23)
    damage(quality, 4)
    damage_beside(quality, 2)
    catalogue = Tried(runs, "catalogue", tally)
    kills(catalogue, 61)
    assert tally.cases() > 30 and tally.cases(Outcome.REFUSED) > 20


# -- two processes ---------------------------------------------------------------------------------


@pytest.mark.long
def test_a_browser_beside_a_catalogue_that_is_done_again(runs: Runs, tally: Tally) -> None:
    """Its pages are of one of the catalogues, or it is refused."""
    empty = tree.read(runs.run)
    pages = []
    for which in ("there", "made"):
        runs.do("catalogue", which)
        pages.append(runs.result("browser", "there"))
    catalogued = tree.read(runs.run)
    for _ in range(20):
        tree.put(runs.run, catalogued)
        shutil.rmtree(runs.run / "studies" / "browser")
        writer = in_child(partial(switch, runs, 8))
        answer = ask(partial(runs.result, "browser", "there"))
        assert outcome(writer) == 0
        found = Outcome.SAME if answer.value in pages else judged(answer, None)
        tally.add("two processes: browser", found, f"{answer.refusal or answer.broken}")
    tree.put(runs.run, empty)


def switch(runs: Runs, times: int) -> None:
    """Do one catalogue and the other in turn."""
    for number in range(times):
        with suppress(TemporaryError):
            runs.do("catalogue", ("there", "made")[number % 2])
