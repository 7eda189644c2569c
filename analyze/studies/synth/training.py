"""The arms: every objective at every k on every world, trained by the project's own trainer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from residual_saes.analyze.studies.synth.planted import HELD_OUT, Rows, World
from residual_saes.data.errors import PipelineError
from residual_saes.data.rows.reader import Reader
from residual_saes.data.store import records
from residual_saes.train import objective
from residual_saes.train.arm import Arm
from residual_saes.train.loop import train_together
from residual_saes.train.optim import OptimConfig
from residual_saes.train.stream import Stream
from residual_saes.train.trainer import TrainConfig

BATCH = 512  # rows per optimizer step
# Of .015, .03 and .06, at k 6 on the default world of seed 0: each objective explains at most .002
# less than at its best rate (gated, whose L0 falls with the rate, .010).
LR = 0.03
EVALUATED = 8_192  # held-out rows that training itself looks at, at its end


class Dictionary(NamedTuple):
    """What is trained: an arm, before it has a world."""

    objective: str
    k: int

    @property
    def name(self) -> str:
        return f"{self.objective} k {self.k}"


def config(dictionary: Dictionary, d_model: int, d_sae: int, tokens: int, seed: int) -> TrainConfig:
    """The settings of one arm: conf/sae/rows_32k.yaml with conf/optim/rows.yaml, in small.

    What conf/sae/gated_32k.yaml and hierarchical_32k.yaml change is changed here too.
    """
    name, k = dictionary
    own: dict[str, Any] = {"aux_coef": 1 / 32, "k_aux": min(d_model // 2, d_sae)}
    if name == "gated":
        own["aux_coef"] = 0.0
    if name == "hierarchical":
        own["nested"] = k.bit_length()  # down to one latent
    if name == "matryoshka":
        own["nested"] = min(5, d_sae.bit_length())
    sae = objective.find(name).settings(
        activation=name,
        d_sae=d_sae,
        k=k,
        aux_norm="variance",
        dead_after=None,
        init="rows",
        rotate=True,
        bound_dead=True,
        resample=True,
        **own,
    )
    optim = OptimConfig(lr=LR, lr_floor=0.0, project_every=1, decay="linear", beta1=0.5, beta2=0.99)
    steps = tokens // BATCH
    return TrainConfig(
        layer=0,
        tokens=tokens,
        batch=BATCH,
        seed=seed,
        data_seed=seed,
        log_every=max(1, steps // 10),
        eval_every=steps,
        checkpoint_every=max(1, steps // 2),
        sae=sae,
        optim=optim,
    )


def stream_of(world: World, tokens: int) -> Stream:
    """The world's rows as training reads them."""
    # Training asks of a reader what Rows has; a store's reader has more.
    reader = cast(Reader, Rows(world, tokens, BATCH))
    return Stream(world.identity, reader, partial(_held_out, world))


def _held_out(world: World) -> Iterator[Tensor]:
    yield world.draw(HELD_OUT, 1, EVALUATED).x


def arm_of(dictionary: Dictionary, config: TrainConfig, stream: Stream, folder: Path) -> Arm:
    """The arm in a folder of its own, which is named by all that it follows from."""
    key = records.digest({"stream": stream.identity, **config.recorded()})
    name = f"{dictionary.objective}-k{dictionary.k}-seed{config.seed}-{key[:12]}"
    return Arm(config, stream, folder / name)


def train_all(arms: Sequence[Arm]) -> PipelineError | None:
    """Train the arms of a world on the same batches, or go on; why the first failed, if any."""
    outcomes = train_together(arms, torch.device("cpu"))
    failed = [outcome for outcome in outcomes if isinstance(outcome, PipelineError)]
    return failed[0] if failed else None
