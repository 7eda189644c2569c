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

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from analyze import problems
from analyze.answering import Asking
from analyze.language_model import end_tokens, residuals
from analyze.problems import Solution
from analyze.results import FOLDER
from data import digests
from data.errors import MismatchError, NonFiniteError, SettingError, StoreError
from data.site import RESID_POST
from data.text.documents import Content
from harvest import model as language_model
from harvest.model import LanguageModel, ModelConfig
from train import sae_file
from train.ports import recorded_ports
from train.run import read_config, sae_digest
from train.sae import SAE

_GATE = "stage_gate"
_AGAIN = "do the study that chooses the features again"
_HOW = "`python -m analyze study=stage_gate answers.samples=8 answers.temperature=1`"
_ALL = 1 << 30  # problems of a file; the embedded ones have no end


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
        path = features or run / FOLDER / _GATE / f"{_GATE}.json"
        chosen = Chosen.read(path)
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


class Chosen(NamedTuple):
    """Features with what is known of their choice; None where the file does not say."""

    path: Path
    helpful: list[int]
    harmful: list[int]
    layer: int | None
    questions: set[str]  # ids of those that chose
    verdict: str | None  # the stage gate's
    missing: list[str]  # what keeps it from a pass
    settings: dict[str, Any]  # of the study that chose

    @classmethod
    def read(cls, path: Path) -> Chosen:
        """The features in a stage gate's result, or in a file of two lists.

        Raises:
            StoreError: there is no such file, or it holds no such thing.
        """
        try:
            data, settings = _content(path)
            content = json.loads(data)
            is_gate = content.get("study") == _GATE
            figures = content["figures"] if is_gate else content
            if is_gate and "within" not in figures:
                raise StoreError(f"{path} is of an earlier version; do {_HOW} again")
            layer = figures.get("layer_of_features" if is_gate else "layer")
            chose = figures["discovery"]["ids"] if is_gate else figures.get("ids", [])
            chosen = cls(
                path=path,
                helpful=[int(feature["feature"]) for feature in figures["helpful"]],
                harmful=[int(feature["feature"]) for feature in figures["harmful"]],
                layer=None if layer is None else int(layer),
                questions={str(name) for name in chose},
                verdict=figures["verdict"] if is_gate else None,
                missing=[*figures["missing"], *figures["notes"]] if is_gate else [],
                settings=settings or dict(content.get("settings", {})),
            )
        except FileNotFoundError as error:
            raise StoreError(
                f"no features at {path}; {_HOW} with run={path.parent.parent.parent} chooses them"
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreError(
                f"{path} is no stage gate's result, and does not hold features as "
                "{helpful: [{feature}], harmful: [...]}"
            ) from error
        if not chosen.helpful and not chosen.harmful:
            raise StoreError(f"{path} names no feature, so nothing is rewarded; give more answers")
        return chosen

    def require_layer(self, layer: int) -> None:
        """Raise MismatchError unless the features are of this layer."""
        if self.layer not in (None, layer):
            unequal = {"layer": (self.layer, layer)}
            way_out = "Give those of the run's own layer."
            raise MismatchError(f"features {self.path}", unequal, way_out)

    def require_sae(self, run: Path) -> None:
        """Raise MismatchError if the study that chose the features was of another SAE."""
        own = sae_digest(run)
        recorded = self.settings.get("sae", own)
        if recorded != own:
            way_out = f"Do {_HOW} again."
            raise MismatchError(f"features {self.path}", {"sae": (recorded, own)}, way_out)

    def require_model(self, lm: LanguageModel) -> None:
        """Raise MismatchError if the study that chose the features was of another model."""
        own = lm.identity["weights"]
        recorded = self.settings.get("weights", own)
        if recorded != own:
            way_out = "Give the model that they were chosen with."
            raise MismatchError(f"features {self.path}", {"weights": (recorded, own)}, way_out)

    def require_pass(self) -> None:
        """Raise SettingError if a stage gate chose the features and did not pass."""
        if self.verdict not in (None, "pass"):
            why = f" ({'; '.join(self.missing)})" if self.missing else ""
            raise SettingError(
                f"the verdict of {self.path} is {self.verdict}{why}; even_if_failed=True takes "
                "its features all the same"
            )

    def require_other_questions(self, judged: set[str]) -> None:
        """Raise SettingError if any of `judged` (ids) chose the features."""
        shared = len(judged & self.questions)
        if shared:
            raise SettingError(
                f"{shared} of the {len(judged)} questions of judged_on= are among the "
                f"{len(self.questions)} that chose the features of {self.path}; judge on others, "
                "or choose on a train.jsonl with problems=FOLDER"
            )

    def weights(self, d_sae: int) -> Tensor:
        """(F,) 1 for helpful features, -1 for harmful ones.

        Raises:
            StoreError: a feature is none of the SAE's.
        """
        for feature in self.helpful + self.harmful:
            if not 0 <= feature < d_sae:
                raise StoreError(
                    f"{self.path} names feature {feature}, the SAE has {d_sae} latents; choose "
                    "them again"
                )
        weights = torch.zeros(d_sae)
        weights[self.helpful] += 1
        weights[self.harmful] -= 1
        return weights


def _content(path: Path) -> tuple[bytes, dict[str, Any]]:
    """A file of features, and what the study that left it follows from.

    A study's record, or a release's, says what the file must hold. Of another file nothing says it.

    Raises:
        StoreError: it is damaged, or of a study that did not come to its end.
    """
    for folder in (path.parent, path.parent.parent.parent):
        recorded = digests.read(folder, _AGAIN)
        name = path.relative_to(folder).as_posix()
        if recorded and name in recorded.files:
            if folder == path.parent:
                recorded.require(None, _AGAIN)
            return recorded.content(name, _AGAIN), dict(recorded.about.get("settings", {}))
    if path.exists() and path.parent.parent.name == FOLDER:
        raise StoreError(f"nothing records {path}, so it may not be whole; {_AGAIN}")
    return path.read_bytes(), {}


def _ids(judged_on: Path | str | Sequence[str]) -> set[str]:
    """Ids of questions that are given as a source of problems, or as texts."""
    if isinstance(judged_on, Path | str):
        limit = Asking.questions if judged_on == problems.TINY else _ALL
        read = problems.read(str(judged_on), limit)
        return {item.problem.id if isinstance(item, Solution) else item.id for item in read}
    return {problems.problem(text, "0").id for text in judged_on}
