"""A trained SAE as people use it from Python.

    sae = SAE.load("runs/demo")
    sae.encode(x)                       (..., F) activations of rows x (..., d)
    sae.features("Tom has 7 apples")    which latents fire on each token
    with sae.steer(model, 161, 5):      161 pushed by five times its mean activation
        model.generate(...)

What study=features and study=steer show is computed by the same code.

Shapes: d the width that is read, d_out the width that is written, F latents; "..." is any number of
dimensions, also none.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NoReturn, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag

from residual_saes.analyze import given, refusals
from residual_saes.analyze.changes import steered
from residual_saes.analyze.changes.intervention import CHANGES, LatentChange
from residual_saes.analyze.language_model import edited, generate
from residual_saes.analyze.latents import rates, text_features
from residual_saes.analyze.latents.text_features import Reader, TextFeatures
from residual_saes.analyze.peers import imported
from residual_saes.analyze.study import load_recorded
from residual_saes.analyze.subject import Subject
from residual_saes.data.device import torch_device
from residual_saes.data.errors import MismatchError, SettingError, StoreError
from residual_saes.data.foreign import reading
from residual_saes.data.model_path import EMBEDDED
from residual_saes.data.settings import number
from residual_saes.data.site import RESID_POST, RESID_PRE, HookPoint
from residual_saes.data.text.chats import Chat, messages_of
from residual_saes.data.text.documents import Content
from residual_saes.harvest import model as models
from residual_saes.harvest.decoder import find_blocks
from residual_saes.harvest.model import LanguageModel, ModelConfig
from residual_saes.train import kernels, sae_file
from residual_saes.train import sae as weights_of
from residual_saes.train.export.hub import FORMS, HUB, downloaded
from residual_saes.train.export.readers import ORIGINS, READERS, is_foreign, kind_of
from residual_saes.train.kernels import Kept

Rows = Tensor | NDArray[np.floating[Any]]
Dtype = Literal["bfloat16", "float32"]
Change = Literal["add", "clamp", "ablate"]
_LABELLED = 20  # latents of a text that get labels


class Sparse(NamedTuple):
    """The m latents that fire in each row, the strongest first."""

    values: Tensor  # (..., m) float32 activations; 0 where fewer than m fire
    indices: Tensor  # (..., m) int64 latents; 0 where the value is 0


class _Loads(type):
    """Says how an SAE is loaded, to who asks for what other libraries have for it."""

    if not TYPE_CHECKING:  # a type checker shall find that they are missing

        def __getattr__(cls, name: str) -> NoReturn:
            is_way = name.startswith(("from_", "load_"))
            way = f'; SAE.load("runs/demo") and SAE.load("{HUB}OWNER/NAME/FOLDER") load one'
            raise AttributeError(f"SAE has no {name!r}{way if is_way else ''}")


@dataclass(eq=False)
class SAE(metaclass=_Loads):
    """A trained dictionary: an SAE, a transcoder or a crosscoder."""

    name: str  # as it was given to `load`
    weights: weights_of.SAE = field(repr=False)  # W_enc, W_dec, b_enc, b_dec, k, ... on raw rows
    points: tuple[HookPoint, ...]  # that it reads; empty: its files do not say
    model: str | None  # folder or hub id of its language model; None: its files do not say
    revision: str = "main"
    dtype: Dtype = "bfloat16"  # that the model is run in
    context: int = 2**31  # tokens of a text at most
    subject: Subject | None = field(default=None, repr=False)  # with the run's store
    _given: tuple[Any, Any, LanguageModel] | None = field(default=None, init=False, repr=False)

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

        >>> SAE.load("runs/demo")
        SAE(runs/demo: layer 5 of embedded, 256 latents, TopK k=8, d_model 64)

        Args:
            where: a run's directory, or a folder of ours or of another library;
                hub:OWNER/NAME[/FOLDER][@REVISION], the same on the Hugging Face Hub; or saelens:,
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
        if name.startswith(HUB):
            return cls._of_files(name, downloaded(name), layer, model, own)
        if not is_foreign(name):
            place = Path(name).expanduser()
            place = place.parent if place.name == sae_file.FILE else place
            if not place.is_dir():
                raise SettingError(f"{name} is no SAE; give {FORMS}")
            kind = kind_of(place)
            inside = [str(path) for path in sorted(place.iterdir()) if kind_of(path)]
            if kind is None and inside:
                raise SettingError(
                    f"{name} has SAEs in its folders; give one: {', '.join(inside[:5])}"
                )
            name = str(place) if kind in (None, "reference") else f"{kind}:{place}"
        if is_foreign(name):
            if store is None:
                return cls._of_files(name, name, layer, model, own)
            subject = Subject.open(imported.run_of(name, store, layer), None, own)
            return cls._of_subject(name, subject, model)
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
        """Width of the rows that it reads."""
        return self.weights.d_model

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.weights.d_sae

    @property
    def W_enc(self) -> Tensor:
        """(d, F) float32 directions that latents read."""
        return self.weights.W_enc

    @property
    def W_dec(self) -> Tensor:
        """(F, d_out) float32 directions that latents write."""
        return self.weights.W_dec

    def encode(self, x: Rows) -> Tensor:
        """Activations of rows, 0 where a latent does not fire.

        Computed in float32 on the SAE's device. Gradients flow to x, not to the weights.

        >>> sae = SAE.load("runs/demo")
        >>> f = sae.encode(torch.randn(2, 3, sae.d_model))
        >>> f.shape
        torch.Size([2, 3, 256])

        Args:
            x: (..., d) tensor of any device and floating-point dtype, or NumPy array.

        Returns:
            (..., F) float32 on the device of x.

        Raises:
            SettingError: x has another width, or is no tensor of floating-point numbers.
        """
        kept, shape, device = self._kept(x)
        dense = kept.values.new_zeros(len(kept.starts), self.d_sae)
        dense[kept.rows, kept.indices] = kept.values
        return dense.reshape(*shape, self.d_sae).to(device)

    def topk(self, x: Rows) -> Sparse:
        """The same as `encode` gives, sparse: `decode` takes it, and never makes (..., F).

        >>> sae = SAE.load("runs/demo")
        >>> values, indices = sae.topk(torch.randn(3, sae.d_model))
        >>> values.shape, indices.shape
        (torch.Size([3, 8]), torch.Size([3, 8]))

        Returns:
            m is k for a TopK SAE, else the largest number of latents that fire in a row.

        Raises:
            SettingError: as `encode`.
        """
        kept, shape, device = self._kept(x)
        column = torch.arange(len(kept.rows), device=kept.rows.device) - kept.starts[kept.rows]
        m = self.weights.k
        if self.weights.threshold is not None:  # device sync: the result's size
            m = int(column.max()) + 1 if len(column) else 1
        values = kept.values.new_zeros(len(kept.starts), m)
        values[kept.rows, column] = kept.values
        indices = kept.indices.new_zeros(values.shape)
        indices[kept.rows, column] = kept.indices
        values, order = values.sort(dim=1, descending=True, stable=True)
        indices = indices.gather(1, order).masked_fill(values == 0, 0)
        return Sparse(*(part.reshape(*shape, m).to(device) for part in (values, indices)))

    def decode(self, f: Rows | Sparse) -> Tensor:
        """What activations stand for: f @ W_dec + b_dec, without a transcoder's skip.

        Gradients flow to f, or to its values.

        >>> sae = SAE.load("runs/demo")
        >>> x = torch.randn(3, sae.d_model)
        >>> sae.decode(sae.topk(x)).shape
        torch.Size([3, 64])

        Args:
            f: (..., F) activations, or what `topk` gives.

        Returns:
            (..., d_out) float32 on the device of f.

        Raises:
            SettingError: f has another width.
        """
        weights = self.weights
        if not isinstance(f, Sparse):
            rows, device = self._rows("f", f, self.d_sae)
            return (rows @ weights.W_dec + weights.b_dec).to(device)
        *shape, m = f.values.shape
        values = f.values.reshape(math.prod(shape), m).to(weights.W_dec)
        indices = f.indices.reshape(values.shape).to(values.device)
        added = embedding_bag(indices, weights.W_dec, mode="sum", per_sample_weights=values)
        return (added + weights.b_dec).reshape(*shape, weights.d_out).to(f.values.device)

    def reconstruct(self, x: Rows) -> Tensor:
        """(..., d_out) float32: what the SAE gives for rows x (..., d), with a transcoder's skip.

        Of an SAE x - reconstruct(x) is its error. Gradients flow to x.

        >>> sae = SAE.load("runs/demo")
        >>> x = torch.randn(3, sae.d_model, dtype=torch.bfloat16)
        >>> sae.reconstruct(x).shape
        torch.Size([3, 64])

        Raises:
            SettingError: as `encode`.
        """
        decoded = self.decode(self.topk(x))
        if self.weights.W_skip is None:
            return decoded
        rows, device = self._rows("x", x, self.d_model)
        return decoded + (self.weights.centred(rows) @ self.weights.W_skip).to(device)

    def _kept(self, x: Rows) -> tuple[Kept, tuple[int, ...], torch.device]:
        """The kept latents of rows, the rows' leading shape, and where they were."""
        rows, device = self._rows("x", x, self.d_model)
        flat = rows.reshape(-1, self.d_model)
        kept = Kept(*_Encode.apply(flat, self.weights))  # type: ignore[no-untyped-call]
        return kept, tuple(rows.shape[:-1]), device

    def _rows(self, name: str, x: Rows, width: int) -> tuple[Tensor, torch.device]:
        """Rows in the weights' dtype on their device, and where they were."""
        if isinstance(x, np.ndarray) and x.dtype.kind == "f":
            x = torch.tensor(x)
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = getattr(x, "dtype", type(x).__name__)
            raise SettingError(
                f"{name} of {got} must be a tensor or NumPy array of floating-point numbers; "
                "for a text there is features(text)"
            )
        if x.ndim == 0 or x.shape[-1] != width:
            raise SettingError(f"{name} of shape {tuple(x.shape)} must be (..., {width})")
        return x.to(self.weights.b_dec), x.device

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
        is_named = Path(self.model).is_dir() or self.model == EMBEDDED or "/" in self.model
        if not is_named:
            raise SettingError(
                f"{self.name} is of a model that it calls {self.model}; give its folder or hub id "
                "as model= to SAE.load, or a loaded model to features and steer"
            )
        device = str(self.weights.b_dec.device)
        config = ModelConfig(self.model, self.revision, self.dtype, device)
        if self.subject is not None:
            return load_recorded(config, self.subject.store)
        return self._of(models.load(config, head=True))

    def _of(self, lm: LanguageModel) -> LanguageModel:
        """`lm`, if it may be the SAE's."""
        layer = max((point.layer for point in self.points), default=0)
        if layer >= lm.n_layers or self.d_model != lm.d_model * max(len(self.points), 1):
            raise SettingError(
                f"{self!r} is not of model={lm.config.path}, which has {lm.n_layers} layers of "
                f"width {lm.d_model}; give its own model= and layer= to SAE.load"
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

    def features(self, text: Content, model: Any = None, tokenizer: Any = None) -> TextFeatures:
        """Which latents fire on each token of a text, or of a chat.

        The text is read as a store has it: alone, behind one BOS; a chat in the model's own
        template. BOS is not encoded. Special tokens that the text spells stay text.

        >>> found = SAE.load("runs/demo").features("Tom has 7 apples.")
        >>> found.tokens
        ('<bos>', 'T', 'o', 'm', ' has', ' ', '7', ' apples', '.')
        >>> found.dense.shape
        (9, 256)

        Args:
            text: a text, or messages `[{"role": "user", "content": ...}]`.
            model: of transformers, loaded, to run in place of the recorded one.
            tokenizer: of that model; None: the one in the folder that it was loaded from.

        Raises:
            SettingError: the text is empty or too long, or what the SAE reads is not known, or it
                is not of that model.
        """
        if not self.points:
            raise SettingError(
                f"{self.name} does not say which layer of one model it reads; give layer="
            )
        if self.subject is not None and (reason := refusals.two_models(self.subject, {})):
            raise SettingError(reason)
        lm = self.language_model if model is None else self._loaded(model, tokenizer)
        (ids,) = self._ids(lm, "text", text)
        reader = Reader(self.weights, self.points)
        ((found,),) = text_features.read(lm, [reader], [ids])
        known = self.subject and rates.of_catalogue(self.subject)
        if not known:
            return found
        examples = known.examples([latent.feature for latent in found.top(_LABELLED)])
        labels = {latent: " ".join(its["peaks"]) for latent, its in examples.items()}
        return replace(found, labels=labels)

    def _loaded(self, model: Any, tokenizer: Any) -> LanguageModel:
        """A loaded model with its parts, which are found once."""
        if self._given is None or self._given[0] is not model or self._given[1] is not tokenizer:
            self._given = (model, tokenizer, self._of(models.of_loaded(model, tokenizer)))
        if model.training:
            raise SettingError("model= is in training mode, where dropout is on; call model.eval()")
        return self._given[2]

    def _ids(
        self, lm: LanguageModel, setting: str, text: Content, *, reply: bool = False
    ) -> list[list[int]]:
        most = lm.max_context if reply else min(self.context, lm.max_context)
        is_list = isinstance(text, list) and all(isinstance(message, dict) for message in text)
        if not is_list and not isinstance(text, str | Chat):
            got = f"a {type(text).__name__}"
            raise SettingError(f"{setting} is {got}, and must be one text, or a list of messages")
        content = messages_of(text, setting) if isinstance(text, list) else text
        return given.sequences(setting, [content], lm.tokenizer, most, reply=reply)

    @overload
    def steer(
        self,
        model: nn.Module,
        feature: int | Sequence[int],
        scale: float | Sequence[float] = 1.0,
        *,
        change: Change = "add",
        activation: float | None = None,
    ) -> AbstractContextManager[SAE]: ...

    @overload
    def steer(
        self,
        feature: int | Sequence[int],
        scale: float | Sequence[float] = 1.0,
        *,
        change: Change = "add",
        activation: float | None = None,
    ) -> AbstractContextManager[SAE]: ...

    @contextmanager  # type: ignore[misc]
    def steer(
        self,
        model: Any = None,
        feature: Any = None,
        scale: Any = None,
        *,
        change: str = "add",
        activation: float | None = None,
    ) -> Iterator[SAE]:
        """While open, latents are changed in the layer's output, at all positions.

            with sae.steer(model, 161, 4.0):
                model.generate(**inputs)
            with sae.steer([161, 7], [4.0, -2.0]):      the recorded model, which `generate` runs
                sae.generate("Tom has 7")

        The direction of a latent is a row of W_dec. The SAE's error and all other latents stay.
        Blocks may be nested: the inner one changes what the outer one left. Gradients pass as if
        what is added were constant.

        Args:
            model: any loaded decoder; its layers are found as harvesting finds them.
            feature: a latent, or several, which are changed together.
            scale: times each latent's mean activation where it fires; one for all, or one each.
            change: add to the latents' activations, clamp them, or ablate them (set them to 0).
            activation: what scale 1 means in place of the mean activation.

        Raises:
            SettingError: there is no such latent, it never fires, the model is not the SAE's, or
                the SAE is not of a layer's output.
        """
        if model is not None and not isinstance(model, nn.Module):
            if feature is not None and scale is not None:
                raise SettingError(f"steer takes a torch model first, not {type(model).__name__}")
            scale = feature if scale is None else scale
            model, feature = None, model
        layer = self._layer()
        changed = self._change(feature, 1.0 if scale is None else scale, change, activation)

        def edit(states: Tensor) -> Tensor:
            if states.shape[-1] != self.d_model:
                raise SettingError(f"{self!r} cannot steer states of width {states.shape[-1]}")
            with torch.no_grad():
                added = changed.delta_in(states.device, states.dtype)(states.detach())
            return states + added

        blocks = self.language_model.blocks if model is None else find_blocks(model)
        if layer >= len(blocks):
            raise SettingError(f"{self!r} cannot steer a model of {len(blocks)} layers")
        with edited(blocks[layer], edit):
            yield self

    def _layer(self) -> int:
        """The layer whose output it reads. Raises SettingError: it is no SAE of one."""
        for layer, site in self.points if len(self.points) == 1 else ():
            is_stream = site == RESID_POST or (site == RESID_PRE and layer > 0)
            if is_stream and self.weights.b_in is None:
                return layer if site == RESID_POST else layer - 1
        raise SettingError(f"{self.name} is no SAE of a layer's output, so it cannot steer it")

    def _change(
        self, feature: Any, scale: Any, change: str, activation: float | None
    ) -> LatentChange:
        """What `steer` does. Raises SettingError: it cannot be meant."""
        features = steered.features_of(_plain(feature), self.d_sae)
        if change not in CHANGES:
            raise SettingError(f"change={change} must be one of {', '.join(CHANGES)}")
        scales = _plain(scale)
        scales = scales if isinstance(scales, list) else [scales] * len(features)
        if len(scales) != len(features):
            raise SettingError(f"{len(scales)} scales for {len(features)} features; give one each")
        values = [number("scale", value) for value in scales]
        if not all(map(math.isfinite, [*values, number("activation", activation or 0)])):
            raise SettingError(f"scale={scale} and activation={activation} must be finite numbers")
        if activation is not None:
            values = [value * number("activation", activation) for value in values]
        elif change != "ablate":
            means = map(self.rates.mean_of, features)
            values = [value * mean for value, mean in zip(values, means, strict=True)]
        return LatentChange(self.weights, change, tuple(features), tuple(values), "all")

    def generate(self, prompt: Content, new_tokens: int = 64) -> str:
        """What the model writes behind a prompt or a chat, the most probable token each time.

        >>> SAE.load("runs/demo").generate("Question: Tom has 7 apples.", new_tokens=4)
        ' Leo has 1'

        Raises:
            SettingError: the prompt is empty, or too long.
        """
        lm = self.language_model
        (ids,) = self._ids(lm, "prompt", prompt, reply=True)
        steered.require_room("new_tokens", new_tokens, ids, lm.max_context)
        (written,) = generate(lm, [ids], new_tokens, in_turns=given.is_chat(prompt))
        return steered.text_of(lm, written)

    def __repr__(self) -> str:
        points = " and ".join(map(str, self.points)) or "a layer that its files do not name"
        kind = f"TopK k={self.weights.k}" if self.weights.threshold is None else "thresholds"
        return (
            f"SAE({self.name}: {points} of {self.model or 'a model that they do not name'}, "
            f"{self.d_sae:,} latents, {kind}, d_model {self.d_model})"
        )


class _Encode(Function):
    """Kept latents of rows. Where one fires, the gradient of its value is its encoder direction."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sae: weights_of.SAE) -> Any:
        kept = sae.encode(x) if len(x) else Kept.even(x.new_empty(0, 1), x.new_empty(0, 1).long())
        ctx.save_for_backward(*kept)
        ctx.encoder = sae.encoder
        ctx.mark_non_differentiable(kept.indices, kept.rows, kept.starts)
        ctx.set_materialize_grads(False)
        return tuple(kept)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: None) -> Any:
        kept = Kept(*ctx.saved_tensors)
        weights = torch.where(kept.values > 0, upstream, 0.0)
        return kernels.decode(kept._replace(values=weights), ctx.encoder.contiguous()), None


def _plain(value: Any) -> Any:
    """A number or a list, also of a range, an array or a tensor."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [item.tolist() if hasattr(item, "tolist") else item for item in value]
    return value
