"""One study of a run: what it needs, where its results go, and what was done already.

Results of study NAME lie in RUN/studies/NAME: NAME.json (every figure, with seeds, settings and
ids), NAME.md, a .svg per picture, and what the study itself leaves there. The same command again
finds them and does nothing.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from analyze.subject import Subject
from data import durable
from data.errors import MismatchError, SettingError
from data.journal import tell
from harvest import model as language_model
from harvest.model import LanguageModel, ModelConfig

FOLDER = "studies"  # in a run's directory
FEATURES = "features.parquet"  # of a study that has something to say of every latent


class Table(NamedTuple):
    """A table as people read it."""

    caption: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


class Picture(NamedTuple):
    """An SVG with what it shows."""

    caption: str
    svg: str


@dataclass(frozen=True)
class Outcome:
    """What a study found."""

    figures: dict[str, Any]  # plain JSON; NaN becomes null
    summary: list[str]  # sentences: the verdict first, each figure with its null or interval
    tables: list[Table] = field(default_factory=list)
    pictures: dict[str, Picture] = field(default_factory=dict)  # by file name without .svg
    files: list[str] = field(
        default_factory=list
    )  # of the study's folder, without which it is not done


@dataclass(frozen=True)
class Study:
    """A study's name and settings, and the run that it is about."""

    name: str
    subject: Subject
    options: Mapping[str, Any]  # of conf/study/NAME.yaml, without its name
    model: ModelConfig
    problems: str | None = None  # see analyze.problems.read
    answers: Mapping[str, Any] = field(
        default_factory=dict
    )  # how problems are answered: see analyze.gsm8k

    @property
    def folder(self) -> Path:
        """Where this study's files go; made on first use."""
        return made(self.subject.run / FOLDER / self.name)

    @cached_property
    def lm(self) -> LanguageModel:
        """The whole language model that the store was harvested with, its head too, loaded on first
        use.

        Raises:
            MismatchError: model= is another one.
        """
        tell(f"loading {self.model.path}")
        loaded = language_model.load(self.model, head=True)
        recorded = self.subject.store.manifest["model"]
        same = ("weights", "config", "tokenizer")
        if unequal := {
            key: (recorded[key], loaded.identity[key])
            for key in same
            if recorded[key] != loaded.identity[key]
        }:
            raise MismatchError(
                f"store {self.subject.store.name}",
                unequal,
                "Give the model that it was harvested with, as model.path=",
            )
        return loaded

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What results depend on beside the study's own settings: the SAE, the model and how it is
        run.
        """
        recorded = self.subject.store.manifest["model"]
        return {
            "sae": self.subject.digest,
            "layer": self.subject.layer,
            "store": self.subject.store.identity,
            "weights": recorded["weights"],
            "dtype": self.model.dtype,
        }

    def locked(self) -> AbstractContextManager[None]:
        """Keeps other processes from writing the study's files meanwhile."""
        busy = f"{self.folder} is being written by another process; wait for it, or stop it"
        return durable.locked(self.folder, busy)

    def perform(self, study: Callable[[Study], Outcome], inputs: Mapping[str, Any]) -> Outcome:
        """What `study` finds; from its files if it was done with the same settings on the same
        `inputs`.
        """
        settings = json.loads(dumped({**self.identity, **inputs, "options": dict(self.options)}))
        path = self.folder / f"{self.name}.json"
        if (done := _read(path, settings)) is not None:
            tell(f"{path} is there already; delete it to do the study again")
            return done
        outcome = study(self)
        _write(self.folder, self.name, settings, outcome)
        return outcome


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A new folder that takes the place of `folder` when all went well; until then the old one
    stays.
    """
    fresh = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)  # of one that was killed
    try:
        yield made(fresh)
        shutil.rmtree(folder, ignore_errors=True)
        fresh.rename(folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def write_features(path: Path, columns: Mapping[str, Any]) -> None:
    """A Parquet file of one row per latent; `feature` says which."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(dict(columns)), sink, compression="zstd")
    durable.write(path, [memoryview(sink.getvalue())])


def made(folder: Path) -> Path:
    """`folder`, which exists afterwards.

    Raises:
        SettingError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingError(f"{folder} cannot be made: {error.strerror}") from error
    return folder


def dumped(value: Any) -> str:
    """JSON of plain values and numpy's; NaN and infinity become null."""
    return json.dumps(_plain(value), indent=1, ensure_ascii=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value


def done(subject: Subject) -> dict[str, Outcome]:
    """Studies of the run by name that were done with its present SAE; others are told and left
    out.
    """
    found = {}
    for path in sorted((subject.run / FOLDER).glob("*/*.json")):
        if path.stem != path.parent.name or (read := read_outcome(path)) is None:
            continue
        settings, outcome = read
        if settings.get("sae") == subject.digest:
            found[path.stem] = outcome
        else:
            tell(
                f"{path} is of another SAE than the run's and is left out; do study={path.stem} again"
            )
    return found


def read_outcome(path: Path) -> tuple[dict[str, Any], Outcome] | None:
    """A study's settings and its outcome from NAME.json and the pictures beside it; None if they
    are not whole.
    """
    try:
        found = json.loads(path.read_bytes())
        drawn = {
            name: Picture(caption, (path.parent / f"{name}.svg").read_text())
            for name, caption in found["pictures"].items()
        }
        tables = [
            Table(caption, tuple(header), [tuple(row) for row in rows])
            for caption, header, rows in found["tables"]
        ]
        files = list(found.get("files", []))
        return found["settings"], Outcome(found["figures"], found["summary"], tables, drawn, files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _read(path: Path, settings: dict[str, Any]) -> Outcome | None:
    found = read_outcome(path)
    if found is None or found[0] != settings:
        return None
    return found[1] if all((path.parent / name).is_file() for name in found[1].files) else None


def _write(folder: Path, name: str, settings: dict[str, Any], outcome: Outcome) -> None:
    """Everything durably, the JSON last: it is what says that the study is done."""
    for stem, picture in outcome.pictures.items():
        durable.write(folder / f"{stem}.svg", [picture.svg.encode()])
    durable.write(folder / f"{name}.md", ["\n".join(markdown(name, outcome)).encode(), b"\n"])
    said = {
        "study": name,
        "settings": settings,
        "summary": outcome.summary,
        "tables": outcome.tables,
        "pictures": {stem: picture.caption for stem, picture in outcome.pictures.items()},
        "files": outcome.files,
        "figures": outcome.figures,
    }
    durable.write(folder / f"{name}.json", [dumped(said).encode()])


def markdown(name: str, outcome: Outcome) -> list[str]:
    """The outcome as lines of Markdown: summary, then tables."""
    lines = [f"# {name}", "", *outcome.summary]
    for table in outcome.tables:
        lines += [
            "",
            table.caption,
            "",
            _row(table.header),
            _row(["---"] * len(table.header)),
            *map(_row, table.rows),
        ]
    return lines


def _row(cells: Any) -> str:
    return (
        "| " + " | ".join(cell.replace("\\", "\\\\").replace("|", "\\|") for cell in cells) + " |"
    )
