"""A study of a run: its definition, what it is given, and where its results go.

`python -m analyze study=NAME` finds the module NAME.py, or NAME/study.py, in one of `FOLDERS` and
performs its `DEFINITION`. A new study is such a module and conf/study/NAME.yaml.
"""

from __future__ import annotations

import json
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch

from residual_saes.analyze import kept, refusals, results
from residual_saes.analyze import outcome as outcomes
from residual_saes.analyze.memory import Needed, tell_needed
from residual_saes.analyze.outcome import Outcome, dumped
from residual_saes.analyze.pages import answers
from residual_saes.analyze.results import FEATURES, FOLDER, made
from residual_saes.analyze.subject import Subject
from residual_saes.data import durable
from residual_saes.data.errors import MismatchError, SettingError, TemporaryError, first_line
from residual_saes.data.journal import note, show, tell
from residual_saes.data.store.store import Store
from residual_saes.harvest import model as models
from residual_saes.harvest.description import Description
from residual_saes.harvest.model import LanguageModel, ModelConfig

FOLDERS = (
    "residual_saes.analyze.studies",
    "residual_saes.analyze.peers",
    "residual_saes.analyze.pages",
)
ASKED = ("text", "prompt", "feature", "scale")  # settings at the top of conf/analyze.yaml


class Column(NamedTuple):
    """A figure of every latent that a study leaves, for the feature browser."""

    name: str  # in the study's table
    key: str  # in the browser; unique among all studies
    label: str
    about: str  # what it is, in a sentence


def nothing(_: Study) -> Mapping[str, Any]:
    """The inputs of a study that depends on the run and its own settings alone."""
    return {}


def no_study(_: Study) -> Iterable[tuple[Path, str]]:
    """What a study reads that reads no other's files."""
    return ()


@dataclass(frozen=True)
class Definition:
    """What a study is: of one run (`run`), or of several (`compare`)."""

    run: Callable[[Study], Outcome] | None = None
    # Of several runs, or of what cannot be opened: does all that the command's settings ask for.
    compare: Callable[[Mapping[str, Any]], None] | None = None
    # Raise it when the same settings give another result: earlier results are then done again.
    version: int = 1
    # Answers to each question unless answers.samples= says otherwise; several are drawn.
    samples: int = 1
    options: type[Any] | None = None  # dataclass of conf/study/NAME.yaml; None: no settings
    # What the result depends on beside the run, the model and the settings.
    inputs: Callable[[Study], Mapping[str, Any]] = nothing
    # Why it cannot be of a dictionary, with the way out; None: it can. See analyze/refusals.py.
    refuses: Callable[[Subject, Mapping[str, Any]], str | None] = refusals.nothing
    # Other studies whose files it reads, by run and name: nobody does them again meanwhile.
    reads: Callable[[Study], Iterable[tuple[Path, str]]] = no_study
    # Studies that are done before it, with their default settings, where the run has none.
    first: tuple[str, ...] = ()
    memory: Callable[[Study], Needed] | None = None  # None: less than anybody asks about
    order: int = 100  # place in the report: ascending
    fresh: bool = False  # made anew each time, from what other studies left; not kept
    takes: tuple[str, ...] = ()  # which of ASKED it reads
    # Files in the run's own directory that repeat what was found.
    beside: Callable[[Study, Outcome], Mapping[str, bytes]] | None = None
    finds: bool = True  # False: it makes files for elsewhere, and has no verdict
    columns: tuple[Column, ...] = ()  # in `table`, which has a row per latent
    table: str = FEATURES


def modules() -> dict[str, str]:
    """The module of every study, by its name."""
    found = {}
    for folder in FOLDERS:
        for module in pkgutil.iter_modules(import_module(folder).__path__):
            inner = ".study" if module.ispkg else ""
            found[module.name] = f"{folder}.{module.name}{inner}"
    return found


def find(name: str) -> Definition:
    """The definition of study NAME.

    Raises:
        SettingError: there is no such study.
    """
    module = modules().get(name)
    definition = getattr(import_module(module), "DEFINITION", None) if module else None
    if not isinstance(definition, Definition):
        raise SettingError(f"study={name} is not known; conf/study lists the studies")
    return definition


def model_of(subject: Subject, asked: Mapping[str, Any], device: torch.device) -> ModelConfig:
    """The language model that the settings `model` name; by default the store's own."""
    recorded = subject.store.manifest["model"]
    return ModelConfig(
        path=subject.model_path(asked["path"]),
        revision=asked["revision"] if asked["path"] else recorded["revision"],
        dtype=asked["dtype"] or recorded["dtype"],
        device=str(device),
    )


@dataclass
class Study:
    """A study while it is performed: its name and settings, and the run that it is about."""

    name: str
    subject: Subject
    options: Mapping[str, Any]  # of conf/study/NAME.yaml, without its name
    model: ModelConfig
    problems: str | None = None  # see analyze.questions.problems.read
    answers: Mapping[str, Any] = field(default_factory=dict)  # see analyze.answers
    asked: Mapping[str, Any] = field(default_factory=dict)  # of ASKED, those that are given
    # Language models that are in memory; studies that share this share them.
    loaded: dict[ModelConfig, LanguageModel] = field(default_factory=dict)

    # Where the result's files are while it is made.
    _making: Path | None = field(default=None, init=False)

    @property
    def place(self) -> Path:
        """Where the result lies once it is made: RUN/studies/NAME."""
        return self.subject.run / FOLDER / self.name

    @property
    def folder(self) -> Path:
        """Where the result's files are: beside `place` while it is made."""
        return self._making or made(self.place)

    @property
    def lm(self) -> LanguageModel:
        """The whole language model that the store was harvested with, its head too.

        It is loaded on first use.

        Raises:
            MismatchError: model= is another one.
        """
        return self._loaded(self.model, 0)

    def lm_of(self, store: int) -> LanguageModel:
        """The whole language model that the run's store of this number was harvested with.

        model= names that of the first.
        """
        recorded = self.subject.stores[store].manifest["model"]
        if recorded["weights"] == self.subject.store.manifest["model"]["weights"]:
            return self.lm
        path = self.subject.model_path(None, store)
        return self._loaded(replace(self.model, path=path, revision=recorded["revision"]), store)

    def _loaded(self, model: ModelConfig, store: int) -> LanguageModel:
        if model not in self.loaded:
            self.loaded[model] = self._load(model, self.subject.stores[store])
        return self.loaded[model]

    def _load(self, model: ModelConfig, store: Store) -> LanguageModel:
        tell(f"loading {model.path}")
        loaded = load_recorded(model, store)
        note(f"study={self.name}")
        return loaded

    @cached_property
    def description(self) -> Description:
        """The model's tokenizer and configuration, for which the model itself is not loaded."""
        return Description.of(self.model)

    @property
    def n_layers(self) -> int:
        """Layers of the whole model. It is loaded only if the store's record does not say."""
        recorded = self.subject.store.manifest["model"].get("n_layers")
        return int(recorded or self.lm.n_layers)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What results depend on beside the study's own settings: SAE, rows, model, its dtype."""
        recorded = self.subject.store.manifest["model"]
        return {
            "sae": self.subject.digest,
            **self.subject.recorded,
            "weights": recorded["weights"],
            "dtype": self.model.dtype,
        }

    def perform(self, definition: Definition) -> Outcome:
        """What the study finds. A result of the same settings that is there is not made again.

        Results of other settings are kept beside it: see analyze/results.py.

        Raises:
            SettingError: the study is not for this kind of dictionary.
            TemporaryError: another process does the study, or what it reads changed meanwhile.
        """
        assert definition.run is not None
        if reason := definition.refuses(self.subject, self.options):
            raise SettingError(f"study={self.name} is not for this run: {reason}")
        run = self.subject.run
        settings = {} if definition.fresh else self.settings(definition)
        with results.locked(run, self.name):
            outcome = definition.run(self) if definition.fresh else self._done(definition, settings)
            if definition.beside:
                results.write_beside(run, self.name, definition.beside(self, outcome))
            if not definition.fresh:
                results.write_index(run)
        return outcome

    def make_first(self, definition: Definition) -> None:
        """Do the studies `definition.first` that the run has no whole result of.

        Raises:
            PipelineError: what those studies raise.
        """
        for name in definition.first:
            if name not in results.current(self.subject.run, self.subject.digest, name):
                tell(f"study={name} first: study={self.name} is made from it")
                other = find(name)
                options = asdict(other.options()) if other.options else {}
                replace(self, name=name, options=options).perform(other)

    def _done(self, definition: Definition, settings: Mapping[str, Any]) -> Outcome:
        """The result of these settings: as it is there, or made now."""
        assert definition.run is not None
        run = self.subject.run
        if result := results.find(run, self.name, settings):
            result = results.bring_back(result, run)
            path = result.folder / f"{self.name}.json"
            tell(f"{path} is there already; delete it to do the study again")
            return result.outcome
        if definition.memory:
            tell_needed(self.name, self.subject, definition.memory(self))
        self._making = results.begin(run, self.name)
        try:
            with ExitStack() as held:
                for other, name in definition.reads(self):
                    held.enter_context(results.locked(other, name, shared=True))
                outcome = definition.run(self)
            outcomes.write(self.folder, self.name, settings, outcome, finds=definition.finds)
            if self.settings(definition) != settings:
                raise TemporaryError(
                    f"what study={self.name} of {run} reads changed while it was made; the same "
                    "command makes it again"
                )
            results.publish(run, self.name, settings)
        except BaseException:
            results.discard(run, self.name)
            raise
        finally:
            self._making = None
        return outcome

    def settings(self, definition: Definition) -> dict[str, Any]:
        """All that the result follows from, as it is recorded.

        Raises:
            TemporaryError: another process moved what the study reads.
        """
        options = {"options": dict(self.options), "version": definition.version}
        try:
            follows = {**self.identity, **definition.inputs(self), **options}
        except FileNotFoundError as error:
            raise TemporaryError(
                f"what study={self.name} of {self.subject.run} reads changed meanwhile "
                f"({first_line(error)}); the same command again reads it anew"
            ) from error
        return dict(json.loads(dumped(follows)))

    def show(self, definition: Definition, outcome: Outcome) -> None:
        """Print what the study found, and where its files are."""
        if definition.fresh and not outcome.tables:
            tell(*outcome.summary)
            return
        answer = answers.answer(self.name, outcome.figures)
        plain = [f"{answers.QUESTIONS[self.name]} {answer}", ""] if answer else []
        show(f"# {self.name}", "", *plain, *outcomes.printed(outcome))
        if not definition.fresh:
            tell("", f"results are in {self.place}")

    def kept_folder(self, name: str, key: Mapping[str, Any]) -> Path:
        """The folder RUN/studies/kept/NAME-DIGEST, for files that are recorded one by one."""
        return made(kept.folder_of(self.subject.run, name, key))

    def kept(self, name: str, key: Mapping[str, Any], make: Callable[[Path], None]) -> Path:
        """A folder of intermediate results, filled once: see `kept.filled`.

        Args:
            key: everything that they follow from, with the version of the code that makes them.
        """
        return kept.filled(kept.folder_of(self.subject.run, name, key), key, make)


def at_least(name: str, value: int, least: int) -> None:
    """Raise SettingError unless the setting `name` is a usable whole number from `least` on."""
    if not least <= value < 2**62:
        raise SettingError(f"{name}={value} must be at least {least}")


def write_features(path: Path, columns: Mapping[str, Any]) -> None:
    """Write a Parquet file of one row per latent; the column `feature` says which."""
    write_table(path, columns)


def write_table(path: Path, columns: Mapping[str, Any]) -> None:
    """Write a Parquet file of columns by name."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(dict(columns)), sink, compression="zstd")
    durable.write(path, [memoryview(sink.getvalue())])


def load_recorded(model: ModelConfig, store: Store) -> LanguageModel:
    """The whole language model that a store was harvested with.

    Raises:
        MismatchError: `model` is another one.
    """
    loaded = models.load(model, head=True)
    recorded = store.manifest["model"]
    unequal = {}
    for key in ("weights", "config", "tokenizer"):
        if recorded[key] != loaded.identity[key]:
            unequal[key] = (recorded[key], loaded.identity[key])
    if unequal:
        way_out = "Give the model that it was harvested with, as model.path="
        raise MismatchError(f"store {store.name}", unequal, way_out)
    return loaded
