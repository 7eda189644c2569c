"""Settings of a harvest that nobody gave: from the store that is there, the model, and the text.

A command line's own settings are never changed. If the store was made with others, it is refused
later, with both values.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from residual_saes.data.errors import SettingError
from residual_saes.data.journal import heartbeat
from residual_saes.data.model_path import EMBEDDED
from residual_saes.data.site import RESID_POST, HookPoint
from residual_saes.data.store import manifest, model_folder, retention
from residual_saes.data.store.place import Place
from residual_saes.data.store.store import Store
from residual_saes.data.text.documents import Document, State, TextSource, characters
from residual_saes.data.text.mix import Mix, Part
from residual_saes.data.text.packing import Cursor, pack
from residual_saes.data.text.sources import KINDS, FileText
from residual_saes.harvest.description import Description
from residual_saes.harvest.encoder import Encoder

CONTEXT = 1024  # tokens per row, at most
ENDLESS = 10**9  # tokens of a text whose end is not known
_RECORDED = ("tokens", "context", "seed", "batch", "unit", "chunk")
_COUNTED = 8_000_000  # characters of a text that are tokenised to the last one
_SHARE = 64  # of a longer text one part in so many is
_ROOM = 1.25  # times the tokens that such a part promises
_CPU_DTYPE = "float32"  # CPUs run it four times as fast as bfloat16


# -- from a store ----------------------------------------------------------------------------------


def recalled(
    settings: dict[str, Any], given: Collection[str], place: Place
) -> tuple[dict[str, Any], str]:
    """Settings with those of the store's manifest where the command line has none; and a line.

    Args:
        given: names of the settings and groups on the command line.

    Raises:
        SettingError: the store's model was in a folder, and that is not here.
        StoreError: the store is of another format.
    """
    recorded = manifest.read(place)
    own: dict[str, Any] = {name: recorded[name] for name in _RECORDED if name not in given}
    if "codec" not in given:
        own["codec"] = {"name": recorded["codec"]}
    if not {"model", "model.path"}.intersection(given):
        own["model"] = _recalled_model(settings["model"], recorded, place)
    elif not {"model", "model.dtype"}.intersection(given):
        own["model"] = {**settings["model"], "dtype": recorded["model"]["dtype"]}
    if "text.max_tokens" not in given:
        own["text"] = {**settings["text"], "max_tokens": recorded["text"].get("max_tokens")}
    points = retention.read(place).points or Store.open(place).points
    if "site" not in given and points:
        sites = {point.site for point in points}
        own["site"] = [RESID_POST] if RESID_POST in sites else sorted(sites)
    filled = {**settings, **own}
    if "layer" not in given and (layers := _layers_with(filled["site"], points)):
        own["layer"] = filled["layer"] = layers
    own["model"] = recorded["model"]["id"]
    words = [f"{name}={own[name]}" for name in ("model", "layer", *_RECORDED) if name in own]
    return filled, f"from store={place.name}: {' '.join(words)}"


def _recalled_model(
    group: Mapping[str, Any], manifest: dict[str, Any], place: Place
) -> dict[str, Any]:
    """The `model` settings that a manifest's entry came from."""
    recorded = manifest["model"]
    path = EMBEDDED if recorded["id"] == "tiny" else model_folder.recalled(place, manifest)
    if path != EMBEDDED and "/" not in path and not Path(path).is_dir():
        raise SettingError(
            f"store={place.name} was made with a model in a folder named {path}, and no such "
            "folder is here; give it as model.path="
        )
    layers = group["layers"] if path == group["path"] else None
    own = {name: recorded[name] for name in ("revision", "dtype")}
    return {**group, **own, "path": path, "layers": layers}


def _layers_with(sites: Any, points: Collection[HookPoint]) -> list[int]:
    """The layers of a store that have every one of some sites."""
    wanted = {*sites} if isinstance(sites, list) else {sites}
    layers = sorted({point.layer for point in points})
    return [
        layer
        for layer in layers
        if wanted <= {point.site for point in points if point.layer == layer}
    ]


@dataclass(frozen=True)
class KeptText:
    """The text of a store that has all its tokens already: nobody reads it again."""

    recorded: Mapping[str, Any]  # its entry in the manifest
    chats: bool

    def identity(self) -> dict[str, Any]:
        return dict(self.recorded)

    def documents(self, state: State) -> Iterator[Document]:
        raise AssertionError("the spine is complete")


def recalled_text(place: Place) -> TextSource:
    """The text that a store was made of.

    Raises:
        SettingError: the store has not all its tokens, and its text was in files.
    """
    recorded = manifest.read(place)
    text = {name: value for name, value in recorded["text"].items() if name != "max_tokens"}
    if Store.open(place).spine_complete:
        return KeptText(text, chats="chat_template" in recorded["model"])
    return _source(text, place.name)


def _source(text: Mapping[str, Any], store: str) -> TextSource:
    """The source that a manifest's entry came from."""
    if text["kind"] == "mix":
        parts = {}
        for name, entry in text["sources"].items():
            parts[name] = Part(entry["weight"], _source(entry, store))
        return Mix(parts, text["seed"])
    if text["kind"] == FileText.kind:
        files = ", ".join([*text["files"]][:3])
        raise SettingError(
            f"store={store} lacks some of its text, which is of the files {files}; give their file "
            "or folder as text.path="
        )
    kind = KINDS[text["kind"]]
    known = {field.name for field in fields(kind)}
    source: TextSource = kind(**{name: value for name, value in text.items() if name in known})
    return source


# -- from the model and the text -------------------------------------------------------------------


def own_model(group: Mapping[str, Any], given: Collection[str], device: str) -> dict[str, Any]:
    """The `model` settings of another model than the group's own: its layers are no default."""
    own: dict[str, Any] = {"layers": None}
    if "model.dtype" not in given and device == "cpu":
        own["dtype"] = _CPU_DTYPE
    return {**group, **own}


def provisional(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that can be checked before the model and the text are looked at."""
    open_layer = settings["layer"] is None and settings["model"]["layers"] is None
    own: dict[str, Any] = {"layer": 0} if open_layer else {}
    if settings["context"] is None:
        own |= {"context": CONTEXT, "unit": None}
    if settings["tokens"] is None:
        own["tokens"] = ENDLESS
    return {**settings, **own}


def filled(
    settings: Mapping[str, Any], described: Description, source: TextSource
) -> tuple[dict[str, Any], list[str]]:
    """Settings with a layer, a context and a number of tokens; and why these, in lines.

    Raises:
        SettingError: the text is less than one row.
        DocumentError: a document cannot be stored, and text.bad=stop.
    """
    own = dict(settings)
    lines: list[str] = []
    if own["layer"] is None and own["model"]["layers"] is None:
        layers = int(described.text.num_hidden_layers)
        own["layer"] = layers // 2
        lines.append(f"layer={own['layer']}: the middle of {layers}")
    if own["context"] is None:
        own["context"] = CONTEXT
        if described.max_context is not None and described.max_context < CONTEXT:
            own["context"] = described.max_context
            lines.append(f"context={own['context']}: all positions that the model has")
    if own["tokens"] is None:
        own["tokens"], why = _tokens(own, described, source)
        lines.append(f"tokens={own['tokens']}: {why}")
    return own, lines


def _tokens(
    settings: Mapping[str, Any], described: Description, source: TextSource
) -> tuple[int, str]:
    """How many tokens are asked for where nobody says, and why."""
    if not isinstance(source, FileText):
        return ENDLESS, "the default for a text that is streamed; give tokens= for another number"
    context = int(settings["context"])
    if source.chats:
        described.require_template()
    text = settings["text"]
    encoder = Encoder(described.tokenizer, text.get("bad", "stop"), text.get("max_tokens"))
    with heartbeat("counting the tokens of the text"):
        tokens, whole = measured(source, encoder, context, described.tokenizer.bos)
    if tokens == 0:
        raise SettingError(
            f"text.path={source.path} has less than one row of context={context} tokens; give more "
            "text, or a smaller context="
        )
    if whole:
        return tokens, "all of the text"
    about = f"{float(f'{tokens:.2g}'):,.0f}"
    return round(tokens * _ROOM), f"more than all of the text, which has about {about}"


def measured(
    source: TextSource, encoder: Encoder, context: int, bos: int, counted: int = _COUNTED
) -> tuple[int, bool]:
    """Tokens of a text in packed rows of `context`; and whether they are all counted.

    Args:
        counted: characters that are tokenised, and a share of those behind them.
    """
    sample = _Sample(source, counted)
    packed = pack(encoder.ids(sample, None), Cursor(0, 0, None), context, bos)
    tokens = context * sum(1 for _ in packed)
    if sample.read == sample.characters:
        return tokens, True
    return round(tokens * sample.characters / sample.read), False


class _Sample:
    """A text's first documents, then some of the others. All are counted."""

    def __init__(self, source: TextSource, counted: int) -> None:
        self._source = source
        self._counted = counted
        self.chats = source.chats
        self.characters = 0  # of all documents
        self.read = 0  # of those that it gives

    def identity(self) -> dict[str, Any]:
        return self._source.identity()

    def documents(self, state: State) -> Iterator[Document]:
        for document in self._source.documents(state):
            length = characters(document.content)
            self.characters += length
            if self.read < max(self._counted, self.characters / _SHARE):
                self.read += length
                yield document
