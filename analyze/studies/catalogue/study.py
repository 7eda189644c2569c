"""What every latent is: density, moments, contexts, histogram, logits and neighbours.

One pass over stored rows covers all latents, without a language-model pass. Every unit is encoded
once. Its pairs of latent and token become a file of the inverted index (index.py), so a study that
was stopped goes on behind its last unit. The rest follows from the index: a state of 4 kB a latent
(state.py), and the table (table.py). In the study's folder:

    features.parquet            one row per latent
    index/unit_NNNNNN.parquet   where latents fire: `Index.open(folder / "index").search(latent)`

The files of the index lie in studies/kept/postings-DIGEST, where results of other settings find
them. The result's own index/ holds hard links to those of its units.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from residual_saes.analyze import results
from residual_saes.analyze.kept import Growing
from residual_saes.analyze.latents import contexts, directions, nearest, targets
from residual_saes.analyze.memory import Needed, of_pass, of_sae
from residual_saes.analyze.outcome import Outcome
from residual_saes.analyze.results import FEATURES, made
from residual_saes.analyze.studies.catalogue import index as inverted_index
from residual_saes.analyze.studies.catalogue import table as feature_table
from residual_saes.analyze.studies.catalogue import words
from residual_saes.analyze.studies.catalogue.index import Index
from residual_saes.analyze.studies.catalogue.state import SEED, State
from residual_saes.analyze.studies.catalogue.table import Content, Logits, OfTargets, Ranked
from residual_saes.analyze.study import Definition, Study
from residual_saes.analyze.subject import Subject
from residual_saes.data import durable
from residual_saes.data.errors import PipelineError, SettingError, StopRequest, StoreError
from residual_saes.data.journal import Progress, duration, tell
from residual_saes.data.rows.split import held_out_units
from residual_saes.data.settings import build
from residual_saes.data.site import MLP_IN
from residual_saes.train.ports import Port

FILE = FEATURES
FOLDER = "index"
VERSION = 1  # of the files of the index
PARTS = ("held_out", "all")
# Random places kept per place shown. With 10 quantiles of 5 contexts, one quantile in 2,000 is left
# with fewer.
_SAMPLE = 3
_RANGES = {  # of the settings: smallest and largest value
    "top": (1, 1000),
    "quantiles": (1, 100),
    "each": (0, 100),
    "logits": (0, 1000),
}


class Files(NamedTuple):
    """What a finished catalogue left."""

    table: Path
    places: Index
    digest: str  # of the table


def files(subject: Subject) -> Files:
    """The files of the run's catalogue.

    Raises:
        StoreError: the run has no whole catalogue of its present SAE.
    """
    result = results.current(subject.run, subject.digest, "catalogue").get("catalogue")
    if result is None:
        raise StoreError(
            f"{subject.run} has no whole catalogue; "
            f"run `python -m analyze study=catalogue run={subject.run}`"
        )
    index = Index.of(result.folder / FOLDER, result.digests)
    return Files(result.folder / FILE, index, result.digests.files[FILE].xxh3_128)


def read_by(study: Study) -> list[tuple[Path, str]]:
    """The catalogue of a study's run, for `Definition.reads`."""
    return [(study.subject.run, "catalogue")]


@dataclass(frozen=True)
class Options:
    """Settings of conf/study/catalogue.yaml."""

    part: str = "held_out"  # of the store, one of PARTS
    rows: int = 4_000_000  # at most, in whole units
    top: int = 20  # contexts with the largest activations
    quantiles: int = 10  # equal parts of a latent's activations
    each: int = 5  # contexts of every part
    # Token ids raised, and as many lowered. 0: none, and the language model is not loaded.
    logits: int = 10

    def __post_init__(self) -> None:
        if self.part not in PARTS:
            raise SettingError(f"study.part={self.part} must be one of {', '.join(PARTS)}")
        if self.rows < 1:
            raise SettingError(f"study.rows={self.rows} must be at least 1")
        for name, (least, most) in _RANGES.items():
            value = getattr(self, name)
            if not least <= value <= most:
                raise SettingError(f"study.{name}={value} must be from {least} to {most}")


def inputs(study: Study) -> dict[str, Any]:
    """What the catalogue depends on beside its settings, for `Study.perform`."""
    return {"as_ids": names(study) is None}


def catalogue(study: Study) -> Outcome:
    """The catalogue of a run's latents: its files, and their figures."""
    options = build(Options, "study", study.options)
    subject = study.subject
    # Units that were encoded for other settings, or before a stop, are not encoded again.
    folder = study.kept_folder("postings", {"version": VERSION, "follows": _identity(subject)})
    with StopRequest() as stop:
        state, kept_index = read(subject, options, folder, stop)
        if not state.rows:
            raise StoreError(
                f"no row of {subject.store.name} that was read passes the run's policy "
                f"{subject.policy}"
            )
        every = [logits(study, port, options.logits, stop) for port in subject.ports.writes]
        of_targets = targets_of(subject, state, [both for both, _ in every])
        content = Content(
            store=subject.store,
            index=kept_index.linked(made(study.folder / FOLDER)),
            state=state,
            neighbours=neighbours(subject),
            logits=of_targets.strongest if of_targets else every[0][0],
            names=names(study),
            quantiles=options.quantiles,
            each=options.each,
            readers=None if subject.ports.is_autoencoder else neighbours(subject, by_encoder=True),
            targets=of_targets,
        )
        feature_table.write(study.folder / FILE, content, stop)
    figures = {
        "rows": state.rows,
        "units": list(content.index.units),
        **words.figures_of(state),
        **(words.of_targets(of_targets, state) if of_targets else {}),
        "no_logits": "; ".join(dict.fromkeys(reason for _, reason in every if reason)) or None,
        "sample_seed": SEED,
        "files": [FILE, FOLDER],
    }
    chosen = contexts.choose(state.count, words.SHOWN)
    shown = words.table_of(study.folder / FILE, chosen)
    return Outcome(figures, words.summary(figures), [shown], words.pictures(state))


# -- the pass --------------------------------------------------------------------------------------


def units_of(subject: Subject, options: Options) -> list[int]:
    """The units to read: as many as have the rows asked for, and at least one."""
    subject.require_complete()
    if options.part == "all":
        every = list(range(subject.store.units))
    else:
        every = held_out_units(subject.store)
    units = []
    tokens = 0
    for unit in every:
        if tokens >= options.rows:
            break
        units.append(unit)
        tokens += subject.store.rows_of(unit)
    return units


def read(
    subject: Subject, options: Options, folder: Path, stop: StopRequest
) -> tuple[State, Index]:
    """The state after all units, and the index in `folder`.

    Units without a file there are encoded and get one.
    """
    encoded = Growing.open(folder)
    index = Index(folder, units_of(subject, options), subject.sae.d_sae, subject.store.unit_tokens)
    identity = _identity(subject)
    scale = float(np.sqrt(subject.moments.variance.sum()))
    sample = max(_SAMPLE * options.quantiles * options.each, 1)
    state = State(index.d_sae, scale, top=options.top, sample=sample)
    seconds = 0.0
    fresh = 0
    progress = Progress()
    for number, unit in enumerate(index.units, 1):
        stop.check()
        path = index.path(unit)
        rows = None
        if encoded.has(path.name):
            rows = inverted_index.rows_of(path, identity)
        if rows is not None:
            state.update(unit, index.unit_tokens, index.all_of(unit), rows)
        else:
            began = time.perf_counter()
            postings, rows = inverted_index.encode(subject, subject.unit(unit))
            written = inverted_index.write(
                path,
                postings,
                identity,
                rows=rows,
                d_sae=index.d_sae,
                unit_tokens=index.unit_tokens,
            )
            encoded.add(path.name, written)
            state.update(unit, index.unit_tokens, postings, rows)
            seconds += time.perf_counter() - began
            fresh += rows
        left = (len(index.units) - number) * index.unit_tokens * seconds / max(fresh, 1)
        progress.show(
            f"unit {number}/{len(index.units)}, {duration(left)} left",
            last=number == len(index.units),
        )
    if fresh:
        # Not among the figures, which are the same after a stop.
        tell(
            f"{fresh:,} rows read, encoded, indexed and counted at {fresh / seconds:,.0f} tokens/s"
        )
    return state, index


def _identity(subject: Subject) -> str:
    """Digest of everything that the index follows from."""
    weights = []
    for tensor in subject.sae.tensors().values():  # device sync
        weights.append(durable.digest(tensor.cpu().numpy().tobytes()))
    follows = {
        "weights": weights,
        "k": subject.sae.k,
        **subject.recorded,
        "policy": subject.policy.recorded(),
    }
    return durable.digest(json.dumps(follows, sort_keys=True).encode())


# -- weights ---------------------------------------------------------------------------------------


def neighbours(subject: Subject, *, by_encoder: bool = False) -> Ranked:
    """The latents whose directions have the largest cosines with each latent's own."""
    cosines, ids = nearest.neighbours(subject, by_encoder=by_encoder)
    return Ranked(cosines.numpy(), ids.numpy())


def targets_of(subject: Subject, state: State, both: Sequence[Logits | None]) -> OfTargets | None:
    """What a crosscoder's latents write to its targets; None of anything else.

    Args:
        both: the logits of each target.
    """
    ports = subject.ports.writes
    if len(ports) == 1:
        return None
    energy = []
    for port in ports:
        columns = subject.columns(port)
        norms = subject.sae.W_dec[:, columns].square().sum(1).double().cpu().numpy()
        energy.append(norms * state.squares / state.rows / subject.moments.variance[columns].sum())
    names = targets.names_of(subject)
    return OfTargets(names, targets.of(subject), np.stack(energy, axis=1), both)


def head_of(study: Study, port: Port) -> tuple[Any, str | None]:
    """The language model that what is written to a port goes through; or why there is none."""
    if port.point.site == MLP_IN:
        return None, f"{port} is read behind a norm, and is no part of the residual stream"
    try:
        return study.lm if port.store == 0 else study.lm_of(port.store), None
    except PipelineError as error:
        of_port = f"{port}: " if len(study.subject.ports.writes) > 1 else ""
        return None, f"{of_port}{error}"


def identity_of(study: Study, port: Port) -> dict[str, Any]:
    """What the logits of a port follow from."""
    of_port = {"port": port.name} if len(study.subject.ports.writes) > 1 else {}
    return {**study.identity, "device": study.model.device, **of_port}


def logits(
    study: Study, port: Port, count: int, stop: StopRequest
) -> tuple[Logits | None, str | None]:
    """The token ids that each latent raises and lowers most by what it writes to a port.

    None if there are none, and why.
    """
    if not count:
        return None, "study.logits=0"
    lm, reason = head_of(study, port)
    if reason:
        return None, reason
    key = {"version": directions.VERSION, **identity_of(study, port), "count": count}
    W_dec = study.subject.sae.W_dec[:, study.subject.columns(port)]
    both = directions.logits(lm, W_dec, count, stop, study.subject.parts("logits", key))
    raised, lowered = (Ranked(scores.numpy(), ids.numpy()) for scores, ids in both)
    return (raised, lowered), None


def names(study: Study, **how: bool) -> Callable[[int], Any] | None:
    """A function from token id to text; None without the tokenizer. See `contexts.token_names`."""
    try:
        return contexts.token_names(study.subject, study.model.path, **how)
    except PipelineError:
        return None


def memory(study: Study) -> Needed:
    """Beside a pass the state, and what a merge of its places sorts; or copies for the logits."""
    options = build(Options, "study", study.options)
    subject = study.subject
    places = options.top + max(_SAMPLE * options.quantiles * options.each, 1)
    state = 5.5 * 20 * subject.sae.d_sae * places
    of_logits = 2.5 * of_sae(subject) if options.logits else 0
    lower = "study.each or study.top"
    return Needed(max(of_pass(subject, options.rows), of_logits) + state, lower)


DEFINITION = Definition(catalogue, options=Options, inputs=inputs, memory=memory, order=80)
