"""An SAE as people use it from Python, with its language model on demand.

    sae = SAE.load("runs/demo")
    sae.encode(x)                       (n, F) activations of residuals x (n, d)
    sae.features("Tom has 7 apples")    which latents fire on each token
    with sae.steer(161, 5):             161 pushed by five times its mean activation
        sae.generate("Tom has 7")

What study=features and study=steer show is computed by the same code.

Shapes: n rows, d the width that is read, d_out the width that is written, F latents.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from residual_saes.analyze import given, refusals
from residual_saes.analyze.changes import steered
from residual_saes.analyze.changes.steered import Push, Writer
from residual_saes.analyze.latents import rates, text_features
from residual_saes.analyze.latents.text_features import Reader, TextFeatures
from residual_saes.analyze.peers import imported
from residual_saes.analyze.study import Study
from residual_saes.analyze.subject import Subject
from residual_saes.data.device import torch_device
from residual_saes.data.errors import MismatchError, SettingError, StoreError
from residual_saes.data.foreign import reading
from residual_saes.data.settings import number
from residual_saes.data.site import RESID_POST, HookPoint
from residual_saes.data.text import retry
from residual_saes.data.text.chats import Chat, messages_of
from residual_saes.data.text.documents import Content
from residual_saes.harvest import model as models
from residual_saes.harvest.model import LanguageModel, ModelConfig
from residual_saes.harvest.model_folder import EMBEDDED
from residual_saes.train import sae as weights_of
from residual_saes.train import sae_file
from residual_saes.train.export.readers import ORIGINS, READERS, is_foreign
from residual_saes.train.run import CONFIG

Dtype = Literal["bfloat16", "float32"]
_HUB = "hub:"
_RELEASE = (sae_file.FILE, CONFIG, "digests.json", "golden.safetensors")  # what is downloaded


@dataclass(eq=False)
class SAE:
    """A trained dictionary: an SAE, a transcoder or a crosscoder."""

    name: str  # as it was given to `load`
    weights: weights_of.SAE = field(repr=False)  # W_enc, W_dec, b_enc, b_dec, k, ... on raw rows
    points: tuple[HookPoint, ...]  # that it reads; empty: its files do not say
    model: str | None  # folder or hub id of its language model; None: its files do not say
    revision: str = "main"
    dtype: Dtype = "bfloat16"  # that the model is run in
    context: int = 2**31  # tokens of a text at most
    subject: Subject | None = field(default=None, repr=False)  # with the run's store
    _push: Push | None = field(default=None, init=False, repr=False)  # what `steer` adds

    @classmethod
    def load(
        cls,
        where: str | Path,
        *,
        store: str | None = None,
        layer: int | None = None,
        model: str | None = None,
        device: str | None = None,
    ) -> SAE:
        """The SAE at a place.

        Args:
            where: a run's directory or a release's; hub:OWNER/NAME, a release; or saelens:,
                sparsify:, dictionary_learning:, circuit_tracer:, safetensors: or reference:PATH.
            store: the run's store, if it has moved; with an SAE of another library the store that
                it is measured on, which gives densities and mean activations.
            layer: of an SAE of another library whose files do not say it.
            model: folder or hub id of the language model, where the recorded one is not it.
            device: cpu, cuda or cuda:N; None: the GPU if there is one.

        Raises:
            SettingError: there is no such SAE, or it is not of the store.
            StoreError: a file is missing or damaged.
        """
        name = str(where)
        own = torch_device(device)
        if name.startswith(_HUB):
            return cls._of_files(name, f"reference:{_downloaded(name)}", layer, model, own)
        if is_foreign(name):
            if store is None:
                return cls._of_files(name, name, layer, model, own)
            subject = Subject.open(imported.run_of(name, store, layer), None, own)
            return cls._of_subject(name, subject, model)
        if not Path(name).is_dir():
            known = ", ".join(("hub", *READERS))
            raise SettingError(f"{name} is no run's directory, nor KIND:PATH of {known}")
        if layer is not None:
            raise SettingError(f"layer={layer} is for SAEs of other libraries, and {name} is ours")
        try:
            return cls._of_subject(name, Subject.open(Path(name), store, own), model)
        except (StoreError, MismatchError):
            if store is not None:
                raise
            # Its store is elsewhere, and `encode` does not need it.
            return cls._of_files(name, f"reference:{name}", layer, model, own)

    @classmethod
    def _of_subject(cls, name: str, subject: Subject, model: str | None) -> SAE:
        recorded = subject.store.manifest["model"]
        return cls(
            name=name,
            weights=subject.sae,
            points=subject.points if len(subject.stores) == 1 else (),
            model=model or subject.model_path(None),
            revision="main" if model else recorded["revision"],
            dtype=recorded["dtype"],
            context=subject.store.context,
            subject=subject,
        )

    @classmethod
    def _of_files(
        cls, name: str, named: str, layer: int | None, model: str | None, device: torch.device
    ) -> SAE:
        """Of files alone, without a store.

        Args:
            named: KIND:PATH.
        """
        kind, _, path = named.partition(":")
        with reading(f"{name} cannot be read", f"take files that {kind} wrote"):
            weights = READERS[kind](Path(path)).to(device)
            origin = ORIGINS[kind](Path(path))
        ports = origin.ports()
        reads = ports.reads if ports else ()
        points = tuple(port.point for port in reads if not any(port.store for port in reads))
        if ports is None and layer is not None and origin.site in (None, RESID_POST):
            points = (HookPoint(layer),)
        if layer is not None and any(point.layer != layer for point in points):
            raise SettingError(f"layer={layer}, and {name} says that it is of {points[0]}")
        model = model or (EMBEDDED if origin.model == "tiny" else origin.model)
        dtype: Dtype = "float32" if model == EMBEDDED else "bfloat16"
        return cls(name, weights, points, model, "main", dtype, origin.context or 2**31)

    # -- rows --------------------------------------------------------------------------------------

    @property
    def d_model(self) -> int:
        return self.weights.d_model

    @property
    def d_sae(self) -> int:
        return self.weights.d_sae

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """(n, F) float32 activations of raw rows x (n, d); 0 where a latent is not kept."""
        kept = self.weights.encode(self._rows(x, self.d_model))
        dense = torch.zeros(len(x), self.d_sae, device=kept.values.device)
        dense[kept.rows, kept.indices] = kept.values.float()
        return dense

    @torch.no_grad()
    def decode(self, f: Tensor) -> Tensor:
        """(n, d_out) f @ W_dec + b_dec of activations f (n, F); without a transcoder's skip."""
        return self._rows(f, self.d_sae) @ self.weights.W_dec + self.weights.b_dec

    def _rows(self, x: Tensor, width: int) -> Tensor:
        if x.ndim != 2 or x.shape[1] != width:
            raise SettingError(
                f"rows of shape {tuple(x.shape)} must be (n, {width}); x.reshape(-1, {width}) "
                "makes such of more dimensions"
            )
        return x.to(self.weights.b_dec)

    # -- texts -------------------------------------------------------------------------------------

    @cached_property
    def language_model(self) -> LanguageModel:
        """The model that it is of, with its head; loaded on first use.

        Raises:
            SettingError: its files do not say which, or there is no such model, or its layers are
                not the SAE's.
            MismatchError: it is not the model of the store.
        """
        if self.model is None:
            raise SettingError(f"{self.name} does not say its model; give model= to SAE.load")
        device = str(self.weights.b_dec.device)
        config = ModelConfig(self.model, self.revision, self.dtype, device)
        if self.subject is not None:
            return Study("residual_saes", self.subject, {}, config).lm
        lm = models.load(config, head=True)
        layer = max((point.layer for point in self.points), default=0)
        if layer >= lm.n_layers or self.d_model != lm.d_model * max(len(self.points), 1):
            raise SettingError(
                f"{self!r} is not of model={self.model}, which has {lm.n_layers} layers of width "
                f"{lm.d_model}; give its own model= and layer= to SAE.load"
            )
        return lm

    @cached_property
    def rates(self) -> rates.Rates:
        """How often each latent fires, and how strongly.

        Raises:
            SettingError: the store is not at hand.
        """
        if self.subject is None:
            raise SettingError(
                f"the store of {self.name} is not at hand, and densities and mean activations come "
                "from it; give store= to SAE.load, or activation= to steer"
            )
        return rates.of(self.subject)

    def features(self, text: Content) -> TextFeatures:
        """Which latents fire on each token of a text, or of a chat.

        Args:
            text: a text, or messages `[{"role": "user", "content": ...}]`.

        Raises:
            SettingError: the text is empty or too long, or what the SAE reads is not known.
        """
        if not self.points:
            raise SettingError(
                f"{self.name} does not say which layer of one model it reads; give layer="
            )
        if self.subject is not None and (reason := refusals.two_models(self.subject, {})):
            raise SettingError(reason)
        (ids,) = self._ids("text", text)
        reader = Reader(self.weights, self.points)
        ((found,),) = text_features.read(self.language_model, [reader], [ids])
        return found

    def _ids(self, setting: str, text: Content, *, reply: bool = False) -> list[list[int]]:
        lm = self.language_model
        most = lm.max_context if reply else min(self.context, lm.max_context)
        content = text if isinstance(text, str | Chat) else messages_of(text, setting)
        return given.sequences(setting, [content], lm.tokenizer, most, reply=reply)

    @contextmanager
    def steer(
        self,
        feature: int | Sequence[int],
        scale: float = 1.0,
        *,
        activation: float | None = None,
    ) -> Iterator[SAE]:
        """While open, `generate` adds latents' directions to the layer's output, at all positions.

        Args:
            feature: a latent, or several, which are added together.
            scale: times each latent's mean activation where it fires.
            activation: what scale 1 adds of each latent in place of its mean activation.

        Raises:
            SettingError: there is no such latent, it never fires, or the SAE is not of a layer's
                output.
        """
        asked = list(feature) if isinstance(feature, Sequence) else feature
        features = steered.features_of(asked, self.d_sae)
        if [point.site for point in self.points] != [RESID_POST] or self.weights.b_in is not None:
            raise SettingError(f"{self.name} is no SAE of a layer's output, so it cannot steer it")
        (times,) = steered.scales_of(number("scale", scale))
        if activation is None:
            push = Push.usual(self.weights, features, self.rates)
        else:
            added = (number("activation", activation),) * len(features)
            push = Push(self.weights, tuple(features), added)
        before = self._push
        self._push = push.scaled(times)
        try:
            yield self
        finally:
            self._push = before

    def generate(self, prompt: Content, new_tokens: int = 64) -> str:
        """What the model writes behind a prompt or a chat, the most probable token each time.

        Raises:
            SettingError: the prompt is empty, or too long.
        """
        (ids,) = self._ids("prompt", prompt, reply=True)
        lm = self.language_model
        steered.require_room("new_tokens", new_tokens, ids, lm.max_context)
        layer = self.points[0].layer if self.points else 0
        writer = Writer(lm, layer, ids, new_tokens, given.is_chat(prompt))
        return steered.text_of(lm, writer.written(self._push))

    def __repr__(self) -> str:
        points = " and ".join(map(str, self.points)) or "a layer that its files do not name"
        kind = f"TopK k={self.weights.k}" if self.weights.threshold is None else "thresholds"
        return (
            f"SAE({self.name}: {points} of {self.model or 'a model that they do not name'}, "
            f"{self.d_sae:,} latents, {kind}, d_model {self.d_model})"
        )


def _downloaded(name: str) -> Path:
    """The SAE's file of a release on the Hub, with what the release says of it beside it.

    Raises:
        SettingError: it holds no SAE in our format or the reference's.
    """
    from huggingface_hub import snapshot_download

    repo = name.removeprefix(_HUB)
    folder = Path(
        retry.persistent(name, lambda: snapshot_download(repo, allow_patterns=list(_RELEASE)))
    )
    if not (folder / sae_file.FILE).is_file():
        raise SettingError(
            f"{name} has no {sae_file.FILE}; download the files of another library, and give them "
            "as saelens:PATH, sparsify:PATH or dictionary_learning:PATH"
        )
    return folder / sae_file.FILE
