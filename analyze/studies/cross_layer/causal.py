"""What a later latent loses when an earlier one is ablated in the language model.

Pieces of held-out documents are read with the earlier latent's part taken out of its layer's output
at every token but BOS (`LatentChange`), and the later SAE reads the later layer. With a_j the later
latent's activation, over the rows in which both fire in the unchanged model,

    drop = 1 - sum a_j(changed) / sum a_j

Beside it stands the mean drop by random latents of the earlier SAE that fire on the later latent's
rows nearly as often: what any active latent does.

Shapes: t tokens of a piece, F and G latents, c pieces.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from scipy import sparse, stats
from torch import Tensor

from residual_saes.analyze import pieces
from residual_saes.analyze.changes.intervention import LatentChange, activations
from residual_saes.analyze.language_model import batch_tokens, edited, residuals
from residual_saes.analyze.latents.codes import Codes
from residual_saes.analyze.latents.matched import random_latents
from residual_saes.analyze.latents.matching import NONE
from residual_saes.analyze.latents.targets import ALIKE
from residual_saes.analyze.pieces import Piece
from residual_saes.analyze.stats import Floats, bootstrap_ratio, figure
from residual_saes.analyze.studies.cross_layer.pairs import LEVEL, Found
from residual_saes.analyze.study import Study
from residual_saes.analyze.subject import Subject
from residual_saes.data.errors import StopRequest
from residual_saes.data.journal import Progress, note
from residual_saes.harvest.model import LanguageModel
from residual_saes.train.kernels import Kept

TOKENS = 50_000  # held-out tokens in which firing is looked for
PIECES = 8  # that are read with a latent ablated
CONTROLS = 3  # random latents of a pair
NEAREST = 10  # in how often they fire on the later latent's rows, among which one is drawn
_SEED = 0


def refuses(ours: Subject, theirs: Subject) -> str | None:
    """What an ablation needs and the two lack; None: nothing."""
    if not (ours.is_resid_post and theirs.is_resid_post):
        return "SAEs of layers' outputs (site=resid_post), and these are others"
    if ours.store.identity != theirs.store.identity:
        return "one language model, and the runs are of two stores"
    if ours.layer >= theirs.layer:
        return f"a later layer as study.to=, and {theirs.layer} is not above {ours.layer}"
    return None


def measured(
    study: Study, theirs: Subject, found: Found, cosine: Floats, count: int, stop: StopRequest
) -> dict[str, Any]:
    """Drops of the pairs with the largest correlations, those of one direction and of two.

    Args:
        count: pairs of each kind.
    """
    texts = _Texts.read(study, theirs, stop)
    rng = np.random.default_rng(_SEED)
    alike = cosine[:, 0] >= ALIKE
    figures = {}
    for kind, mine in (("same direction", alike), ("other direction", ~alike)):
        latents = np.flatnonzero((found.q[:, 0] <= LEVEL) & mine)
        latents = latents[np.argsort(-found.r[latents, 0], kind="stable")]
        # Of each partner its best pair: one partner may have many.
        _, first = np.unique(found.partner[latents, 0], return_index=True)
        rows: list[dict[str, Any]] = []
        for latent in latents[np.sort(first)][:count].tolist():
            rows.append(_of_pair(texts, latent, found, rng, stop))
        figures[kind] = {"pairs": rows, **_together(rows)}
    return figures


def _of_pair(
    texts: _Texts, latent: int, found: Found, rng: np.random.Generator, stop: StopRequest
) -> dict[str, Any]:
    """A pair's drop and those by random latents; None where it does not fire in the texts."""
    partner = int(found.partner[latent, 0])
    note(f"latent {partner} ablated")
    density = texts.density_given(latent)
    drop = texts.drop(partner, latent, stop) if density[partner] else None
    controls = []
    never = np.setdiff1d(found.partner[latent], [NONE]).tolist()
    others = np.setdiff1d(np.flatnonzero(density), never)
    if drop and len(others):
        wanted = [partner] * min(CONTROLS, len(others))
        for other in random_latents(density, wanted, rng, never=never, nearest=NEAREST):
            controls.append(texts.drop(int(other), latent, stop)["value"])
    return {"partner": partner, "feature": latent, "drop": drop, "controls": controls}


def _together(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over pairs, and whether ablating the partner does more than ablating another."""
    known = [(row["drop"]["value"], np.mean(row["controls"])) for row in rows if row["controls"]]
    if not known:
        return {"measured": 0, "median": None, "median_controls": None, "p": None}
    own, others = np.array(known).T
    return {
        "measured": len(own),
        "median": float(np.median(own)),
        "median_controls": float(np.median(others)),
        "p": float(stats.wilcoxon(own, others, alternative="greater").pvalue),
    }


@dataclass
class _Texts:
    """Held-out pieces, and what fires in them in the unchanged model."""

    lm: LanguageModel
    ours: Subject
    theirs: Subject
    pieces: list[Piece]
    piece: Any  # (n,) of each row
    our_codes: Codes  # (n, F) by column
    their_codes: Codes  # (n, G) by column

    @classmethod
    def read(cls, study: Study, theirs: Subject, stop: StopRequest) -> _Texts:
        """The first pieces of two tokens or more, of `TOKENS` together."""
        ours = study.subject
        read = 0

        def enough(piece: Piece) -> bool:
            nonlocal read
            read += len(piece.ids)
            return read <= TOKENS or read == len(piece.ids)

        texts = list(takewhile(enough, pieces.held_out(ours)))
        texts = [piece for piece in texts if len(piece.ids) > 1]
        lm = study.lm
        layers = [ours.layer, theirs.layer]
        codes: list[list[Any]] = [[], []]
        piece: list[int] = []
        progress = Progress()
        for number, states in residuals(lm, [piece.ids for piece in texts], layers):
            stop.check()
            progress.show(f"{len(codes[0])} of {len(texts)} pieces read")
            piece += [number] * (len(texts[number].ids) - 1)
            for subject, layer, kept in zip((ours, theirs), layers, codes, strict=True):
                kept.append(_codes(subject, states[layer][1:]))
        both = [sparse.csc_array(sparse.vstack(parts)) for parts in codes]
        return cls(lm, ours, theirs, texts, np.array(piece), *both)

    def _fires(self, codes: Codes, latent: int) -> Any:
        return codes.indices[codes.indptr[latent] : codes.indptr[latent + 1]]

    def density_given(self, latent: int) -> Floats:
        """(F,) share of the rows in which a later latent fires that each earlier one fires in."""
        rows = self._fires(self.their_codes, latent)
        fires = sparse.csr_array(self.our_codes)[rows].astype(bool).sum(0)
        return np.asarray(fires, np.float64).ravel() / max(len(rows), 1)

    def drop(self, ablated: int, latent: int, stop: StopRequest) -> dict[str, Any]:
        """The later latent's loss by an ablation, with its interval over pieces."""
        rows = np.intersect1d(
            self._fires(self.our_codes, ablated), self._fires(self.their_codes, latent)
        )
        chosen = np.unique(self.piece[rows])[:PIECES]
        change = LatentChange(self.ours.sae, "ablate", (ablated,), 0.0, "all")
        delta = change.delta(self.lm)

        def edit(states: Tensor) -> Tensor:
            moved = states + delta(states)
            moved[:, 0] = states[:, 0]
            return moved

        after: dict[int, Floats] = {}
        wanted = torch.tensor([latent], device=self.theirs.device)
        with edited(self.lm.blocks[self.ours.layer], edit):
            texts = [self.pieces[number].ids for number in chosen]
            for number, states in residuals(
                self.lm, texts, [self.theirs.layer], batch_tokens(self.lm)
            ):
                stop.check()
                read = states[self.theirs.layer][1:].to(self.theirs.device).float()
                after[number] = activations(self.theirs.sae, read, wanted)[:, 0].cpu().numpy()
        before = self.their_codes[:, [latent]].toarray()[:, 0]
        sums = []
        for number, of_piece in enumerate(chosen):
            start = int(np.argmax(self.piece == of_piece))
            mine = rows[self.piece[rows] == of_piece]
            sums.append((after[number][mine - start].sum(), before[mine].sum()))
        lost, total = np.array(sums, np.float64).T
        return figure(1 - lost.sum() / total.sum(), bootstrap_ratio(total - lost, total))


def _codes(subject: Subject, states: Tensor) -> Codes:
    """(t, F) activations in some states (t, d)."""
    kept: Kept = subject.sae.encode(states.to(subject.device).float())
    columns = (kept.rows.cpu().numpy(), kept.indices.cpu().numpy())
    shape = (len(states), subject.sae.d_sae)
    codes = sparse.csr_array((kept.values.cpu().numpy(), columns), shape=shape)
    codes.eliminate_zeros()
    return codes
