"""Which latents fire on each token of a text that a user gives.

A text is read as a store has it: alone, behind one BOS, its rows rounded to bfloat16. So the values
are those of the same document's stored rows, up to the rounding of a batch. BOS is not encoded, as
in every study.

Shapes: t tokens of a text, BOS included; p pairs of a token and a latent; F latents.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from residual_saes.analyze.language_model import residuals
from residual_saes.analyze.latents.contexts import visible
from residual_saes.analyze.latents.encoding import positive
from residual_saes.analyze.pages.template import rendered
from residual_saes.analyze.subject import Subject
from residual_saes.data.journal import note
from residual_saes.data.site import HookPoint
from residual_saes.harvest.model import LanguageModel
from residual_saes.train.sae import SAE

_SHOWN = 10  # latents of a text in its `repr`
_WORDS = 6  # tokens that a line names


class Reader(NamedTuple):
    """A dictionary, and what it reads."""

    sae: SAE
    points: tuple[HookPoint, ...]  # of one model, side by side in its rows

    @classmethod
    def of(cls, subject: Subject) -> Reader:
        """A run's own."""
        return cls(subject.sae, subject.points)


class Strong(NamedTuple):
    """A latent in a text."""

    feature: int
    max: float
    mean: float  # where it fires
    tokens: tuple[int, ...]  # on which it fires, by position


@dataclass(frozen=True, eq=False)
class TextFeatures:
    """What fires on each token of a text."""

    ids: tuple[int, ...]  # (t,) the first is BOS
    tokens: tuple[str, ...]  # (t,) their texts; what is not to be seen as marks
    d_sae: int
    token: NDArray[np.int64]  # (p,) position in the text, ascending; 0 is BOS, and never here
    feature: NDArray[np.int64]  # (p,) latent
    activation: NDArray[np.float32]  # (p,) above 0
    labels: Mapping[int, str] = field(default_factory=dict)  # of latents: tokens of a catalogue

    @property
    def dense(self) -> NDArray[np.float32]:
        """(t, F) activations; 0 where a latent does not fire, and at BOS."""
        values = np.zeros((len(self.ids), self.d_sae), np.float32)
        values[self.token, self.feature] = self.activation
        return values

    def of(self, feature: int) -> NDArray[np.float32]:
        """(t,) activations of one latent."""
        own = self.feature == feature
        values = np.zeros(len(self.ids), np.float32)
        values[self.token[own]] = self.activation[own]
        return values

    def at(self, token: int, count: int = 5) -> list[tuple[int, float]]:
        """The strongest latents of a token, by position, each with its activation."""
        own = self.token == token
        best = np.lexsort((self.feature[own], -self.activation[own]))[:count]
        return list(
            zip(self.feature[own][best].tolist(), self.activation[own][best].tolist(), strict=True)
        )

    def top(self, count: int = 10) -> list[Strong]:
        """The latents with the largest activations in the text."""
        latents = np.unique(self.feature)
        largest = np.zeros(len(latents), np.float32)
        np.maximum.at(largest, np.searchsorted(latents, self.feature), self.activation)
        strong = []
        for index in np.lexsort((latents, -largest))[:count]:
            own = self.feature == latents[index]
            tokens = tuple(self.token[own].tolist())
            mean = float(self.activation[own].mean())
            strong.append(Strong(int(latents[index]), float(largest[index]), mean, tokens))
        return strong

    def words(self, tokens: Sequence[int]) -> str:
        """Some of the text's tokens in a line."""
        named = " ".join(map(word, map(self.tokens.__getitem__, tokens[:_WORDS])))
        more = len(tokens) - _WORDS
        return f"{named} and {more} more" if more > 0 else named

    def __repr__(self) -> str:
        head = f"{len(self.ids)} tokens with BOS, {len(np.unique(self.feature))} latents fire"
        lines = [head, f"{'feature':>8} {'max':>8} {'mean':>8}  tokens"]
        for strong in self.top(_SHOWN):
            figures = f"{strong.feature:>8} {strong.max:>8.4g} {strong.mean:>8.4g}"
            label = self.labels.get(strong.feature)
            elsewhere = f"; elsewhere {label}" if label else ""
            lines.append(f"{figures}  {self.words(strong.tokens)}{elsewhere}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """For notebooks: the text, each token shaded by its largest activation, and a table."""
        strongest = [self.at(position) for position in range(len(self.ids))]
        peaks = [best[0][1] if best else 0.0 for best in strongest]
        return rendered(
            "text_features.html",
            tokens=list(zip(self.tokens, peaks, strongest, strict=True)),
            largest=max(peaks) or 1.0,
            latents=[(strong, self.words(strong.tokens)) for strong in self.top(_SHOWN)],
            labels=self.labels,
        ).decode()


def word(token: str) -> str:
    """A token's text in a list of several; spaces alone as a mark."""
    return token.strip() or "␣"


def read(
    lm: LanguageModel, readers: Sequence[Reader], sequences: Sequence[Sequence[int]]
) -> Iterator[list[TextFeatures]]:
    """What fires in each text, by each reader; one forward pass a text for all of them.

    Args:
        sequences: token ids of each text, BOS first: see `given.sequences`.
    """
    points = list(dict.fromkeys(point for reader in readers for point in reader.points))
    decode = lm.tokenizer.inner.decode
    for number, ids in enumerate(sequences, 1):
        note(f"text {number} of {len(sequences)}: {len(ids)} tokens through the model")
        tokens = tuple(visible(decode([token])) for token in ids)
        ((_, states),) = residuals(lm, [ids], points)
        found = []
        for reader in readers:
            rows = torch.cat([states[point] for point in reader.points], 1)
            found.append(_encoded(reader.sae, rows, tuple(ids), tokens))
        yield found


def _encoded(
    sae: SAE, rows: torch.Tensor, ids: tuple[int, ...], tokens: tuple[str, ...]
) -> TextFeatures:
    """What fires in rows (t, d) of a text."""
    stored = rows[1:].bfloat16().to(sae.b_dec.device).float()
    with torch.inference_mode():
        pairs = positive(sae.encode(stored))
    row = pairs.row.cpu().numpy()
    latent = pairs.latent.cpu().numpy()
    order = np.lexsort((latent, row))
    value = pairs.value.cpu().numpy()[order]
    return TextFeatures(ids, tokens, sae.d_sae, row[order] + 1, latent[order], value)
