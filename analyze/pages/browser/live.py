"""What the served page asks the language model: which latents fire on a text, what steering writes.

The answers are those of study=features and study=steer: the same code computes them. One question
is answered at a time. The model is loaded at the first.

An answer is a sequence of JSON objects: {note} while the model loads, then {text} of a text, or
{untouched} and a {dose} of each scale, or {error} in a line.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from residual_saes.analyze import refusals
from residual_saes.analyze.changes.steered import text_of
from residual_saes.analyze.latents import rates
from residual_saes.analyze.latents.text_features import TextFeatures
from residual_saes.analyze.pages.script import short
from residual_saes.analyze.studies import features, steer
from residual_saes.analyze.study import Study
from residual_saes.data.errors import PipelineError, SettingError, first_line
from residual_saes.data.neutral import neutral
from residual_saes.data.settings import whole
from residual_saes.harvest.model import LanguageModel

NEW_TOKENS = 256  # of a continuation, at most
SCALES = 8  # at a time, at most

Request = Mapping[str, Any]
Lines = Generator[dict[str, Any], None, None]


class _Gone(Exception):
    """Nobody waits for the answer any more."""


class Live:
    """The model of a study of the browser."""

    def __init__(self, study: Study) -> None:
        self._study = study
        self._free = threading.Lock()
        self._answers = {"features": self._features, "steer": self._steer}
        # One for each kind of question: a tokenizer is read once.
        self._studies = {name: replace(study, name=name) for name in self._answers}

    def about(self) -> dict[str, Any]:
        """What the page may ask, or why not."""
        return {
            "model": neutral(str(self._study.model.path)),
            "new_tokens": NEW_TOKENS,
            "no_features": refusals.two_models(self._study.subject, {}),
            "no_steer": refusals.all_but_of_streams(self._study.subject, {}),
        }

    def answer(self, name: str, request: Request, is_gone: Callable[[], bool]) -> Lines:
        """The answer to a question, an object after the other; whatever is wrong becomes {error}.

        Args:
            is_gone: whether who asked has left. It is looked at in every layer of every pass.
        """
        if name not in self._answers:
            yield {"error": f"{neutral(name)} is not known; it is {' or '.join(self._answers)}"}
            return
        if not self._free.acquire(blocking=False):
            yield {"error": "the model answers another question; wait, and ask again"}
            return
        try:
            yield from self._answers[name](request, is_gone)
        except _Gone:
            pass
        except PipelineError as error:
            yield {"error": neutral(first_line(error))}
        except Exception as error:  # out of memory, a model's own: the page shows it, in a line
            yield {"error": neutral(f"{type(error).__name__}: {first_line(error)}")}
        finally:
            self._free.release()

    def _features(self, request: Request, is_gone: Callable[[], bool]) -> Lines:
        study = self._studies["features"]
        study.asked = {"text": _typed(request, "text")}
        _require(refusals.two_models(study.subject, {}))
        asked = features.asked_of(study)
        if len(asked.texts) > 1:
            raise SettingError(f"text= has {len(asked.texts)} texts; give one at a time")
        yield from self._loading()
        with _left_by(study.lm, is_gone):
            block, found = next(features.found(study, [study.subject], asked, features.Options()))
        yield {"text": block, "fires": _fires(found)}

    def _steer(self, request: Request, is_gone: Callable[[], bool]) -> Lines:
        study = self._studies["steer"]
        given = {name: request.get(name) for name in ("feature", "scale")}
        study.asked = {"prompt": _typed(request, "prompt"), **given}
        _require(refusals.all_but_of_streams(study.subject, {}))
        options = steer.Options(whole("new_tokens", request.get("new_tokens")))
        wanted = steer.asked_of(study, options)
        if options.new_tokens > NEW_TOKENS or len(wanted.scales) > SCALES:
            raise SettingError(
                f"new_tokens={options.new_tokens} and {len(wanted.scales)} scales: a page may ask "
                f"for {NEW_TOKENS} and {SCALES}; study=steer takes more"
            )
        known = rates.of(study.subject, options.rows)
        pushes = steer.pushes_of(study.subject, options, wanted, known)
        yield from self._loading()
        with _left_by(study.lm, is_gone):
            writer = steer.writer_of(study, options, wanted)
            plain = writer.written(None)
            random = list(pushes["random"].features)
            yield {"untouched": text_of(study.lm, plain), "random": random}
            for name, dose in steer.doses(writer, plain, pushes, wanted.scales):
                yield {"dose": dose, "of": name}

    def _loading(self) -> Lines:
        if not self._study.loaded:
            yield {"note": "loading the model, which takes a while once"}


def _typed(request: Request, name: str) -> str:
    """A text of the request, as the command takes it: `@` begins no file's name here."""
    text = request.get(name)
    if not isinstance(text, str):
        raise SettingError(f"{name}= must be a text")
    return f"@{text}" if text.startswith("@") else text


def _require(reason: str | None) -> None:
    if reason:
        raise SettingError(reason)


def _fires(found: TextFeatures) -> list[list[float | None]]:
    """Of each token [latent, activation, the next latent, its activation, ...]."""
    values = short(found.activation)
    fires: list[list[float | None]] = [[] for _ in found.ids]
    for token, latent, value in zip(found.token, found.feature.tolist(), values, strict=True):
        fires[token] += (latent, value)
    return fires


@contextmanager
def _left_by(lm: LanguageModel, is_gone: Callable[[], bool]) -> Iterator[None]:
    """While open, a pass ends with _Gone as soon as nobody waits for it."""

    def look(*_: Any) -> None:
        if is_gone():
            raise _Gone

    handles = [block.register_forward_pre_hook(look) for block in lm.blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
