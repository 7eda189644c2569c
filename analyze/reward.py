"""A dense reward from SAE features: what each token of a completion, and the whole of it, is worth.

    r_t = sum_i w_i f_i(h_t)        R = mean over the completion's tokens of r_t

f_i(h_t) are the SAE's latents of the residual h_t that the model has at token t. w_i is 1 for
features of right answers and -1 for those of wrong ones (the lists that `study=contrast` leaves).
The model that reads is frozen and none of the policy's. It reads prompt and completion once, up to
the SAE's layer.

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
                f"the SAE is of residuals {self.sae.d_model} wide, the model's are "
                f"{self.lm.d_model}; give the model that the SAE was trained on"
            )
        last = len(self.lm.blocks) - 1
        if not 0 <= self.layer <= last:
            raise SettingError(f"layer {self.layer} is not among the model's layers 0 to {last}")
        if self.weights.shape != (self.sae.d_sae,):
            raise SettingError(
                f"weights have the shape {tuple(self.weights.shape)}, the SAE {self.sae.d_sae} "
                "latents"
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
        sae = sae_file.load(run / sae_file.FILE, model.device)
        path = features or run / FOLDER / "contrast" / f"contrastive_features_L{layer}.json"
        weights = _weights(path, layer, sae.d_sae)
        lm = language_model.load(model, deepest=layer)
        _require_same_model(path, lm)
        return cls(lm, sae, layer, weights)

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
        ignored = end_tokens(self.lm) | {self.lm.tokenizer.inner.pad_token_id}
        own = [_without_end(ids, ignored) for ids in completion_ids]
        prompt_ids = [self._prompt_ids(prompt) for prompt in prompts]
        rewards = self.token_rewards(prompt_ids, own)
        return [float(values.mean()) if len(values) else 0.0 for values in rewards]

    def _rewards(self, prompt: list[int], completion: list[int]) -> Tensor:
        """(t,) of one completion."""
        if not completion:
            return torch.zeros(0)
        length = len(prompt) + len(completion)
        if length > self.lm.max_context:
            raise SettingError(
                f"a prompt and its completion have {length} tokens, the model's context "
                f"{self.lm.max_context}; lower max_completion_length"
            )
        ((_, states),) = residuals(self.lm, [prompt + completion], [self.layer])
        rows = states[self.layer][len(prompt) :].float()
        if not bool(torch.isfinite(rows).all()):
            raise NonFiniteError("a residual is NaN or infinite; run the model with dtype float32")
        # On the CPU: a GPU adds in an order that is never the same twice.
        firings = self.sae.encode(rows)
        worth = firings.values.cpu() * self.weights[firings.indices.cpu()]
        return torch.zeros(len(rows)).index_add_(0, firings.rows.cpu(), worth)

    def _prompt_ids(self, prompt: Content) -> list[int]:
        tokenizer = self.lm.tokenizer
        if isinstance(prompt, str):
            ids: list[int] = tokenizer.inner(prompt, add_special_tokens=False)["input_ids"]
        else:
            ids = tokenizer.encode([prompt], reply=True)[0]
        return ids if ids[:1] == [tokenizer.bos] else [tokenizer.bos, *ids]


def _without_end(ids: Sequence[int], ignored: set[int]) -> list[int]:
    """`ids` without those that end the text, and without padding behind it."""
    own = [int(token) for token in ids]
    while own and own[-1] in ignored:
        own.pop()
    return own


# -- the features ----------------------------------------------------------------------------------


def _weights(path: Path, layer: int, d_sae: int) -> Tensor:
    """(F,) 1 for helpful features, -1 for harmful ones."""
    try:
        content = json.loads(path.read_bytes())
        helpful = [int(feature["feature"]) for feature in content["helpful"]]
        harmful = [int(feature["feature"]) for feature in content["harmful"]]
        chosen_at = int(content.get("layer", layer))
    except FileNotFoundError as error:
        run = path.parent.parent.parent
        raise StoreError(
            f"no features at {path}; `python -m analyze study=contrast run={run}` writes them"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(
            f"{path} does not hold features as {{helpful: [{{feature}}], harmful: [...]}}"
        ) from error
    if chosen_at != layer:
        unequal = {"layer": (chosen_at, layer)}
        raise MismatchError(f"features {path}", unequal, "Give those of the run's own layer.")
    if not helpful and not harmful:
        raise StoreError(
            f"{path} names no feature, so nothing is rewarded; run `study=contrast` with more "
            "answers"
        )
    for feature in helpful + harmful:
        if not 0 <= feature < d_sae:
            raise StoreError(
                f"{path} names feature {feature}, the SAE has {d_sae} latents; choose them again"
            )
    weights = torch.zeros(d_sae)
    weights[helpful] += 1
    weights[harmful] -= 1
    return weights


def _require_same_model(path: Path, lm: LanguageModel) -> None:
    """Raise MismatchError if the study that left the features records another model."""
    contrast = outcomes.read(path.parent / "contrast.json")
    if contrast is None:
        return
    settings, _ = contrast
    unequal = {"weights": (settings["weights"], lm.identity["weights"])}
    if settings["weights"] != lm.identity["weights"]:
        raise MismatchError(
            f"features {path}", unequal, "Give the model that they were chosen with."
        )
