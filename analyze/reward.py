"""A dense reward from SAE features: what each token of a completion, and the completion as a whole,
is worth.

    r_t = sum_i w_i f_i(h_t)        R = mean over the completion's tokens of r_t

f_i(h_t) are the SAE's latents of the residual h_t that the model has at token t, w_i is 1 for
features of right answers and -1 for those of wrong ones (the lists that `study=contrast` leaves).
The model that reads is frozen and none of the policy's: it reads prompt and completion once, up to
the SAE's layer. Each sequence is read alone. In a batch other matrix shapes round otherwise, TopK
makes a jump of that where two latents are nearly equal, and a completion's reward would depend on
its neighbours; and one of 500 tokens keeps a GPU busy anyway (2.7 TFLOP in Gemma 4 E4B to layer
27).

    from trl import GRPOTrainer
    reward = DenseReward.from_run(Path("runs/demo"), ModelConfig("embedded", dtype="float32"))
    GRPOTrainer(model=..., reward_funcs=reward, ...)
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from analyze import outcome as outcomes
from analyze.language_model import end_tokens, residuals
from analyze.results import FOLDER
from data.errors import MismatchError, NonFiniteError, SettingError, StoreError
from data.text.documents import Content
from harvest import model as language_model
from harvest.model import LanguageModel, ModelConfig
from train import sae_file
from train.run import CONFIG, read_config
from train.sae import SAE
from train.sae_file import load


@dataclass(frozen=True)
class DenseReward:
    """A reward function as TRL's GRPOTrainer takes them."""

    __name__ = "dense_reward"  # what TRL logs it as; no field

    lm: LanguageModel  # at least up to `layer`
    sae: SAE
    layer: int
    weights: Tensor  # (F,) on the CPU

    def __post_init__(self) -> None:
        if self.sae.d_model != self.lm.d_model:
            raise SettingError(
                f"the SAE is of residuals {self.sae.d_model} wide, the model's are {self.lm.d_model}; give the model "
                "that the SAE was trained on"
            )
        if not 0 <= self.layer < len(self.lm.blocks):
            raise SettingError(
                f"layer {self.layer} is not among the model's layers 0 to {len(self.lm.blocks) - 1}"
            )
        if self.weights.shape != (self.sae.d_sae,):
            raise SettingError(
                f"weights have the shape {tuple(self.weights.shape)}, the SAE {self.sae.d_sae} latents"
            )

    @classmethod
    def from_run(cls, run: Path, model: ModelConfig, features: Path | None = None) -> DenseReward:
        """The reward of a run's SAE and the features that its `study=contrast` chose.

        Args:
            model: the one that the run's store was harvested with, anywhere.
            features: {helpful: [{feature}, ...], harmful: [{feature}, ...]}; by default the run's
                own studies/contrast/contrastive_features_L{layer}.json.

        Raises:
            StoreError: the run is not finished, or the features are not there or no such file.
            MismatchError: the features were chosen with another model or another layer.
            SettingError: the model does not fit the SAE.
        """
        if not (run / CONFIG).is_file():
            raise StoreError(
                f"no run at {run}; train one with `python -m train store=... run={run}`"
            )
        layer = int(read_config(run)["settings"]["layer"])
        sae = load(run / sae_file.FILE, model.device)
        path = features or run / FOLDER / "contrast" / f"contrastive_features_L{layer}.json"
        weights = _weights(path, layer, sae.d_sae)
        lm = language_model.load(model)
        contrast = outcomes.read(path.parent / "contrast.json")
        if contrast and (chosen := contrast[0]["weights"]) != lm.identity["weights"]:
            unequal = {"weights": (chosen, lm.identity["weights"])}
            raise MismatchError(
                f"features {path}", unequal, "Give the model that they were chosen with."
            )
        lm.truncate_(layer)
        return cls(lm, sae, layer, weights)

    def token_rewards(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
    ) -> list[Tensor]:
        """Of each completion its tokens' rewards (t,) float32.

        Args:
            prompts: ids with BOS.
            completions: ids.

        Raises:
            SettingError: prompt and completion do not fit in the model's context.
            NonFiniteError: a residual is NaN or infinite.
        """
        return [
            self._of_one([*prompt], [*ids])
            for prompt, ids in zip(prompts, completions, strict=True)
        ]

    def __call__(
        self,
        prompts: Sequence[Content],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        **_: Any,
    ) -> list[float]:
        """R of each completion, 0 of one without a token of its own. Tokens that end a text, and
        padding, count for nothing, as in the means by which the features were chosen.

        Args:
            prompts: texts, in which spelled special tokens are such, or chats; BOS is put before
                either if it is not there.
            completions: as text; not used, for texts may not encode to the ids that were sampled.
            completion_ids: of the model's own tokenizer.
        """
        padding = self.lm.tokenizer.inner.pad_token_id
        ignored = end_tokens(self.lm) | {padding}
        own = [_own(ids, ignored) for ids in completion_ids]
        found = self.token_rewards([self._prompt_ids(prompt) for prompt in prompts], own)
        return [float(rewards.mean()) if len(rewards) else 0.0 for rewards in found]

    def _of_one(self, prompt: list[int], completion: list[int]) -> Tensor:
        if not completion:
            return torch.zeros(0)
        if (length := len(prompt) + len(completion)) > self.lm.max_context:
            raise SettingError(
                f"a prompt and its completion have {length} tokens, the model's context {self.lm.max_context}; lower "
                "max_completion_length"
            )
        ((_, states),) = residuals(self.lm, [prompt + completion], [self.layer])
        rows = states[self.layer][len(prompt) :].float()
        if not bool(torch.isfinite(rows).all()):
            raise NonFiniteError("a residual is NaN or infinite; run the model with dtype float32")
        # On the CPU: a GPU adds in an order that is never the same twice.
        values, indices, row = (tensor.cpu() for tensor in self.sae.encode(rows)[:3])
        return torch.zeros(len(rows)).index_add_(0, row, values * self.weights[indices])

    def _prompt_ids(self, prompt: Content) -> list[int]:
        tokenizer = self.lm.tokenizer
        if isinstance(prompt, str):
            ids: list[int] = tokenizer.inner(prompt, add_special_tokens=False)["input_ids"]
        else:
            ids = tokenizer.encode([prompt], reply=True)[0]
        return ids if ids[:1] == [tokenizer.bos] else [tokenizer.bos, *ids]


def _own(ids: Sequence[int], ends: set[int]) -> list[int]:
    """`ids` without those that end the text, and without padding behind it."""
    own = [int(token) for token in ids]
    while own and own[-1] in ends:
        own.pop()
    return own


def _weights(path: Path, layer: int, d_sae: int) -> Tensor:
    """(F,) 1 for helpful features, -1 for harmful ones."""
    try:
        found = json.loads(path.read_bytes())
        signed = {
            sign: [int(one["feature"]) for one in found[key]]
            for key, sign in (("helpful", 1), ("harmful", -1))
        }
        at = int(found.get("layer", layer))
    except FileNotFoundError as error:
        run = path.parent.parent.parent
        raise StoreError(
            f"no features at {path}; `python -m analyze study=contrast run={run}` writes them"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(
            f"{path} does not hold features as {{helpful: [{{feature}}], harmful: [...]}}"
        ) from error
    if at != layer:
        raise MismatchError(
            f"features {path}", {"layer": (at, layer)}, "Give those of the run's own layer."
        )
    if not any(signed.values()):
        raise StoreError(
            f"{path} names no feature, so nothing is rewarded; run `study=contrast` with more answers"
        )
    weights = torch.zeros(d_sae)
    for sign, features in signed.items():
        if wrong := [one for one in features if not 0 <= one < d_sae]:
            raise StoreError(
                f"{path} names feature {wrong[0]}, the SAE has {d_sae} latents; choose them again"
            )
        weights[features] += sign
    return weights
