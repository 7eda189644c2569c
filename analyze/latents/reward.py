"""A dense reward from SAE features: what each token of a completion, and the whole of it, is worth.

    r_t = sum_i w_i f_i(h_t)        R = mean over the completion's tokens of r_t

f_i(h_t) are the SAE's latents of the residual h_t that the model has at token t. w_i is 1 for
features of right answers and -1 for those of wrong ones, as `study=stage_gate` chose them. The
model that reads is frozen and none of the policy's. It reads prompt and completion once, up to the
SAE's layer.

Each sequence is read alone. In a batch, matrix products of other shapes round differently. TopK may
then keep another of two nearly equal latents, and a completion's reward would depend on its
neighbours. A completion of 500 tokens keeps a GPU busy anyway (2.7 TFLOP in Gemma 4 E4B to layer
27).

    from trl import GRPOTrainer
    reward = DenseReward.from_run(Path("runs/demo"), ModelConfig("embedded", dtype="float32"))
    GRPOTrainer(model=..., reward_funcs=reward, ...)

Shapes: t tokens of a completion, F latents.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from residual_saes.analyze.language_model import end_tokens, residuals
from residual_saes.analyze.latents.chosen import GATE, ChosenFeatures
from residual_saes.analyze.questions import problems
from residual_saes.analyze.questions.answering import Asking
from residual_saes.analyze.questions.problems import Solution
from residual_saes.analyze.results import FOLDER
from residual_saes.data.errors import NonFiniteError, SettingError
from residual_saes.data.site import RESID_POST
from residual_saes.data.text.documents import Content
from residual_saes.harvest import model as language_model
from residual_saes.harvest.model import LanguageModel, ModelConfig
from residual_saes.train import sae_file
from residual_saes.train.ports import recorded_ports
from residual_saes.train.run import read_config
from residual_saes.train.sae import SAE

_ALL = 1 << 30  # problems of a file; the embedded ones have no end


class ResidualReward(ABC):
    """A reward function as TRL's GRPOTrainer takes them, of the residuals of a frozen model.

    Every sequence is read alone, see above.
    """

    lm: LanguageModel  # at least up to `layer`
    layer: int

    @abstractmethod
    def worth(self, rows: Tensor) -> Tensor:
        """(t,) float32 on the CPU: what tokens with the residuals `rows` (t, d) are worth each."""

    def token_rewards(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
    ) -> list[Tensor]:
        """Each completion's rewards of its tokens, (t,) float32 on the CPU.

        Args:
            prompts: ids with BOS.
            completions: ids.

        Raises:
            SettingError: prompt and completion do not fit in the model's context.
            NonFiniteError: a residual is NaN or infinite.
        """
        pairs = zip(prompts, completions, strict=True)
        return [self._rewards(list(prompt), list(completion)) for prompt, completion in pairs]

    def __call__(
        self,
        prompts: Sequence[Content],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        **_: Any,
    ) -> list[float]:
        """R of each completion, 0 of one without a token of its own.

        Tokens that end a text, and padding, count for nothing, as in the means by which the
        features were chosen.

        Args:
            prompts: texts or chats. Special tokens in a text are parsed. BOS is added where it is
                missing.
            completions: as text; not used, for texts may not encode to the ids that were sampled.
            completion_ids: of the model's own tokenizer.
        """
        in_turns = any(not isinstance(prompt, str) for prompt in prompts)
        ignored = end_tokens(self.lm, in_turns=in_turns) | {self.lm.tokenizer.inner.pad_token_id}
        own = [_without_end(ids, ignored) for ids in completion_ids]
        prompt_ids = [self._prompt_ids(prompt) for prompt in prompts]
        rewards = self.token_rewards(prompt_ids, own)
        return [float(values.mean()) if len(values) else 0.0 for values in rewards]

    def _rewards(self, prompt: list[int], completion: list[int]) -> Tensor:
        """(t,) of one completion."""
        if not completion:
            return torch.zeros(0)
        return self.worth(read_alone(self.lm, self.layer, prompt, completion))

    def _prompt_ids(self, prompt: Content) -> list[int]:
        tokenizer = self.lm.tokenizer
        if isinstance(prompt, str):
            ids: list[int] = tokenizer.inner(prompt, add_special_tokens=False)["input_ids"]
        else:
            ids = tokenizer.encode([prompt], reply=True)[0]
        return ids if ids[:1] == [tokenizer.bos] else [tokenizer.bos, *ids]


def read_alone(
    lm: LanguageModel, layer: int, prompt: Sequence[int], completion: Sequence[int]
) -> Tensor:
    """(t, d) float32 residuals of a completion's tokens behind its prompt, read without others.

    Raises:
        SettingError: prompt and completion do not fit in the model's context.
        NonFiniteError: a residual is NaN or infinite.
    """
    length = len(prompt) + len(completion)
    if length > lm.max_context:
        raise SettingError(
            f"a prompt and its completion have {length} tokens, the model's context "
            f"{lm.max_context}; lower max_completion_length"
        )
    ((_, states),) = residuals(lm, [[*prompt, *completion]], [layer])
    rows = states[layer][len(prompt) :].float()
    if not bool(torch.isfinite(rows).all()):
        raise NonFiniteError("a residual is NaN or infinite; run the model with dtype float32")
    return rows


@dataclass(frozen=True)
class DenseReward(ResidualReward):
    """The reward of SAE features."""

    __name__ = "dense_reward"  # what TRL logs it as; no field

    lm: LanguageModel  # at least up to `layer`
    sae: SAE
    layer: int
    weights: Tensor  # (F,) on the CPU

    def __post_init__(self) -> None:
        if self.sae.d_model != self.lm.d_model:
            raise SettingError(
                f"the SAE is of residuals {self.sae.d_model} wide, the model's are "
                f"{self.lm.d_model}; give the model that the SAE was trained on"
            )
        _require_layer(self.lm, self.layer)
        if self.weights.shape != (self.sae.d_sae,):
            raise SettingError(
                f"weights have the shape {tuple(self.weights.shape)}, the SAE {self.sae.d_sae} "
                "latents"
            )

    @classmethod
    def from_run(
        cls,
        run: Path,
        model: ModelConfig,
        features: Path | None = None,
        *,
        judged_on: Path | str | Sequence[str] = (),
        even_if_failed: bool = False,
    ) -> DenseReward:
        """The reward of a run's SAE and the features that its `study=stage_gate` chose.

        Args:
            model: the one that the run's store was harvested with, anywhere.
            features: by default the run's own studies/stage_gate/stage_gate.json. Or a file of
                {helpful: [{feature}, ...], harmful: [{feature}, ...]}, as `study=contrast` leaves.
            judged_on: the questions by which a policy with this reward will be judged: a file of
                problems, or their texts.
            even_if_failed: take the features of a stage gate that did not pass.

        Raises:
            StoreError: the run is not finished, or the features are not there or no such file.
            MismatchError: the features were chosen with another model, layer or SAE.
            SettingError: the stage gate did not pass, the features were chosen on questions of
                `judged_on`, or the model does not fit the SAE.
        """
        ports = recorded_ports(read_config(run)["settings"])
        ((_, point), *others) = ports.reads
        if others or not ports.is_autoencoder or point.site != RESID_POST:
            raise SettingError(
                f"the features of {run} are no SAE's of resid_post, which a reward reads; give the "
                "run of one"
            )
        layer = point.layer
        path = features or run / FOLDER / GATE / f"{GATE}.json"
        chosen = ChosenFeatures.read(path)
        chosen.require_layer(layer)
        chosen.require_sae(run)
        if not even_if_failed:
            chosen.require_pass()
        chosen.require_other_questions(_ids(judged_on))
        sae = sae_file.load(run / sae_file.FILE, model.device)
        weights = chosen.weights(sae.d_sae)
        lm = language_model.load(model, deepest=layer)
        chosen.require_model(lm)
        return cls(lm, sae, layer, weights)

    def worth(self, rows: Tensor) -> Tensor:
        """(t,) sum over the features of weight times activation, of rows (t, d)."""
        # On the CPU: a GPU adds in an order that is never the same twice.
        firings = self.sae.encode(rows)
        products = firings.values.cpu() * self.weights[firings.indices.cpu()]
        return torch.zeros(len(rows)).index_add_(0, firings.rows.cpu(), products)


@dataclass(frozen=True)
class DirectionReward(ResidualReward):
    """The reward of a raw direction: r_t = h_t . v, or its cosine. It needs no SAE."""

    __name__ = "direction_reward"

    lm: LanguageModel
    layer: int
    direction: Tensor  # (d,) on the CPU
    cosine: bool = False  # divide r_t by |h_t| |v|

    def __post_init__(self) -> None:
        _require_layer(self.lm, self.layer)
        if self.direction.shape != (self.lm.d_model,):
            raise SettingError(
                f"the direction has the shape {tuple(self.direction.shape)}, the model's residuals "
                f"are {self.lm.d_model} wide; give a direction of this model"
            )

    def worth(self, rows: Tensor) -> Tensor:
        """(t,) h . v of rows (t, d), or its cosine."""
        rows = rows.cpu()
        along: Tensor = rows @ self.direction
        if self.cosine:
            along /= (rows.norm(dim=1) * self.direction.norm()).clamp_min(1e-30)
        return along


def _require_layer(lm: LanguageModel, layer: int) -> None:
    last = len(lm.blocks) - 1
    if not 0 <= layer <= last:
        raise SettingError(f"layer {layer} is not among the model's layers 0 to {last}")


def _without_end(ids: Sequence[int], ignored: set[int]) -> list[int]:
    """`ids` without those that end the text, and without padding behind it."""
    own = [int(token) for token in ids]
    while own and own[-1] in ignored:
        own.pop()
    return own


def _ids(judged_on: Path | str | Sequence[str]) -> set[str]:
    """Ids of questions that are given as a source of problems, or as texts."""
    if isinstance(judged_on, Path | str):
        limit = Asking.questions if judged_on == problems.TINY else _ALL
        read = problems.read(str(judged_on), limit)
        return {item.problem.id if isinstance(item, Solution) else item.id for item in read}
    return {problems.problem(text, "0").id for text in judged_on}
