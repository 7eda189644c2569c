"""The language model as a source of residuals: load, truncate, tap, and keep documents apart.

Shapes: B rows, T context, d d_model; residuals are `resid_post`, the output of a decoder layer (the value that the
next layer reads), so layer 0 is the first block's output and never the embedding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from data import durable
from data.errors import PipelineError, SettingError
from data.tiny import MODEL_DIR

Isolation = Literal["packed", "padded"]
EMBEDDED = "embedded"  # model.path of the model that ships with the package
# bf16 keeps 8 bits: one rounding is 2^-9 relative, and truncation changes no kernel, so this is generous.
_ROUNDING = 2.0**-7
# A packed piece against the same piece alone: 3 % of bf16 noise was seen on random networks, ignored masks give > 30 %.
_SAME_PIECE = 0.15


@dataclass(frozen=True)
class ModelConfig:
    """Which language model, and how it is run."""

    path: str  # folder, hub id, or `embedded`
    revision: str = "main"  # of a hub id
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.dtype not in ("bfloat16", "float32"):
            raise SettingError(f"model.dtype={self.dtype} must be bfloat16 or float32")


class Inputs(NamedTuple):
    """One forward pass."""

    ids: torch.Tensor  # (b, t) int64
    positions: torch.Tensor | None  # (b, t) int64, starting anew at every piece; None where rows are single pieces
    source: torch.Tensor  # (b, t) int64: flat index of each token in its (B, T) batch, -1 for padding


@dataclass
class LanguageModel:
    """A decoder without its head."""

    config: ModelConfig
    decoder: nn.Module
    blocks: nn.ModuleList  # its layers, as long as it has not been truncated all of them
    tokenizer: Any
    bos: int
    d_model: int
    vocabulary: int  # token ids
    n_layers: int  # of the whole model
    max_context: int  # tokens
    identity: dict[str, Any]  # what the manifest records of it
    isolation: Isolation = "packed"

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids without special tokens; text that spells one (`<bos>`) stays text."""
        ids = self.tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        assert not any(self.bos in document for document in ids), "text must not encode to BOS"
        return [list(document) for document in ids]

    def truncate_(self, deepest: int) -> None:
        """Drop every layer above `deepest`. The configuration stays: KV sharing and PLE are laid out by it."""
        del self.blocks[deepest + 1 :]


def resolve(path: str, revision: str) -> Path:
    """The local folder of a model, downloaded from the hub if `path` is an id there.

    Raises:
        SettingError: there is no such folder, or the hub does not give the model out.
    """
    if path == EMBEDDED:
        return MODEL_DIR
    if Path(path).is_dir():
        return Path(path)
    if Path(path).is_absolute() or path.startswith(".") or path.count("/") != 1:
        raise SettingError(f"model.path={path} is no folder; give a Hugging Face model folder or a hub id (owner/name)")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=["*.json", "*.safetensors", "*.model"]))
    except Exception as error:  # network, gate, unknown name: the hub's client has a dozen kinds
        raise SettingError(
            f"model.path={path} cannot be had from the Hugging Face hub ({type(error).__name__}). If it is gated, "
            "accept its terms on its page and set HF_TOKEN; without network give a local folder; "
            "`model=tiny text=tiny` runs offline"
        ) from error


def load(config: ModelConfig) -> LanguageModel:
    """Load the whole model in its own dtype onto its device.

    Raises:
        SettingError: the folder holds no complete causal language model with a tokenizer that has a BOS token.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = resolve(config.path, config.revision)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, config.dtype),  # not .to(): that would round the rotary frequencies too
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
        tokenizer = load_tokenizer(folder)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise SettingError(
            f"model.path={config.path} is not a loadable causal language model: {_first_line(error)}"
        ) from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise SettingError(f"the weights in {folder} are damaged ({error}); copy or download them again") from error
    if missing := report["missing_keys"]:
        raise SettingError(f"{folder} lacks {len(missing)} weights, e.g. {sorted(missing)[0]}; it is incomplete")
    # Models whose tokenizer has no BOS (Qwen) put their end-of-text token before a document.
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if bos is None:
        raise SettingError(f"the tokenizer of {config.path} has neither a BOS nor an EOS token to start pieces with")
    decoder = model.get_decoder().eval().requires_grad_(False).to(config.device)
    text = model.config.get_text_config()
    blocks = find_blocks(decoder, text.num_hidden_layers)
    identity = {
        "id": "tiny" if config.path == EMBEDDED else folder.name if folder == Path(config.path) else config.path,
        "revision": config.revision,
        "architecture": type(model).__name__,
        "weights": _digest_files(folder, "*.safetensors"),
        "tokenizer": tokenizer_digest(tokenizer),
        "bos": bos,
        "dtype": config.dtype,
        "d_model": text.hidden_size,
        "n_layers": text.num_hidden_layers,
    }
    return LanguageModel(
        config=config,
        decoder=decoder,
        blocks=blocks,
        tokenizer=tokenizer,
        bos=bos,
        d_model=text.hidden_size,
        vocabulary=text.vocab_size,
        n_layers=text.num_hidden_layers,
        max_context=getattr(text, "max_position_embeddings", None) or 2**31,
        identity=identity,
    )


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a model's folder.

    Raises:
        SettingError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise SettingError(f"{folder} has no loadable tokenizer: {_first_line(error)}") from error


def tokenizer_digest(tokenizer: Any) -> str:
    """Digest of everything that decides which ids a text gets.

    Raises:
        SettingError: it is a tokenizer in Python, which has no one description to digest.
    """
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise SettingError(
            f"{type(tokenizer).__name__} has no fast form (tokenizer.json); convert it with transformers"
        )
    return durable.digest(tokenizer.backend_tokenizer.to_str().encode())


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _digest_files(folder: Path, pattern: str) -> str:
    files = sorted(folder.glob(pattern))
    return durable.digest(*(f"{file.name} {durable.digest_file(file).xxh3_128}\n".encode() for file in files))


def find_blocks(decoder: nn.Module, n_layers: int) -> nn.ModuleList:
    """The decoder's own list of layers: `layers` in most families, `h` in GPT-2's."""
    for child in decoder.children():
        if isinstance(child, nn.ModuleList) and len(child) == n_layers:
            return child
    raise SettingError(f"{type(decoder).__name__} has no list of {n_layers} layers to take residuals from")


@contextmanager
def tap(blocks: nn.ModuleList, layers: Sequence[int]) -> Iterator[dict[int, torch.Tensor]]:
    """While open, each forward pass leaves the outputs of `layers`, (b, t, d) each, in the yielded dict."""
    taken: dict[int, torch.Tensor] = {}

    def keep(layer: int) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            taken[layer] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [blocks[layer].register_forward_hook(keep(layer)) for layer in layers]
    try:
        yield taken
    finally:
        for handle in handles:
            handle.remove()


# -- keeping documents apart ------------------------------------------------------------------------------------


def forward_inputs(tokens: NDArray[np.uint32], starts: NDArray[np.bool_], isolation: Isolation) -> list[Inputs]:
    """The forward passes for a (B, T) batch whose pieces begin where `starts` is true: a pure function."""
    batch, context = tokens.shape
    ids = torch.from_numpy(tokens.astype(np.int64))
    flat = np.flatnonzero(starts)
    if isolation == "packed":
        at = np.arange(batch * context)
        positions = at - np.repeat(flat, np.diff([*flat, batch * context]))
        # Positions that start anew are what tells transformers' mask functions where documents end.
        reset = torch.from_numpy(positions.reshape(batch, context))
        return [Inputs(ids, reset, torch.arange(batch * context).view(batch, context))]
    lengths = np.diff([*flat, batch * context])
    by_length = np.argsort(-lengths, kind="stable")
    groups: list[list[int]] = [[]]
    for piece in by_length:
        # No group costs more than the packed batch; its first piece is its longest.
        if groups[-1] and lengths[groups[-1][0]] * (len(groups[-1]) + 1) > batch * context:
            groups.append([])
        groups[-1].append(int(piece))
    return [_padded(ids.flatten(), flat[group], lengths[group]) for group in groups]


def _padded(ids: torch.Tensor, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> Inputs:
    """Single pieces, padded on the right, where a causal model cannot see it: no mask is needed."""
    reach = np.arange(lengths.max())[None, :]
    inside = reach < lengths[:, None]
    source = torch.from_numpy(np.where(inside, starts[:, None] + reach, -1))
    return Inputs(torch.where(source >= 0, ids[source], 0), None, source)


def run(lm: LanguageModel, passes: Sequence[Inputs], layers: Sequence[int]) -> dict[int, torch.Tensor]:
    """Residuals of `layers` for a batch: (B*T, d) each, on the model's device, in the order of its tokens."""
    total = sum(int((one.source >= 0).sum()) for one in passes)
    out = {layer: torch.empty(total, lm.d_model, dtype=torch.bfloat16, device=lm.config.device) for layer in layers}
    with tap(lm.blocks, layers) as taken:
        for one in passes:
            _forward(lm, one)
            for layer in layers:
                _scatter(taken[layer], one, out[layer])
    return out


def _forward(lm: LanguageModel, one: Inputs, **options: Any) -> Any:
    device = lm.config.device
    positions = None if one.positions is None else one.positions.to(device)
    with torch.inference_mode():
        return lm.decoder(
            input_ids=one.ids.to(device),
            position_ids=positions,
            attention_mask=None,
            use_cache=False,
            **options,
        )


def _scatter(states: torch.Tensor, one: Inputs, out: torch.Tensor) -> None:
    """Put a pass's (b, t, d) states, rounded to bfloat16, where their tokens belong in (B*T, d)."""
    shape = (*one.ids.shape, out.shape[1])
    if tuple(states.shape) != shape:
        raise PipelineError(f"a layer gave states of shape {tuple(states.shape)} where {shape} was expected")
    inside = one.source >= 0
    out[one.source[inside].to(out.device)] = states[inside.to(states.device)].to(torch.bfloat16)


# -- checks at every start --------------------------------------------------------------------------------------


def choose_isolation(lm: LanguageModel) -> Isolation:
    """Whether documents packed into a row stay apart in this architecture, found out by trying.

    Two pieces share a row. Packing is right if changing the first leaves the second's last residuals as they were
    (attention masked away adds exactly nothing), and if the second equals itself run alone, where positions start at
    0. Linear attention fails the first; it is run as padded pieces.
    """
    generator = torch.Generator().manual_seed(0)
    length = min(24, lm.max_context // 2)
    vocabulary = lm.vocabulary
    first, other, second = torch.randint(vocabulary, (3, 1, length), generator=generator)
    positions = torch.arange(length).repeat(2)[None]
    layer = len(lm.blocks) - 1
    with tap(lm.blocks, [layer]) as taken:
        _forward(lm, Inputs(torch.cat([first, second], 1), positions, positions))
        beside_first = taken[layer][:, length:].float()
        _forward(lm, Inputs(torch.cat([other, second], 1), positions, positions))
        beside_other = taken[layer][:, length:].float()
        _forward(lm, Inputs(second, None, second))
        alone = taken[layer].float()
    apart = bool(_distance(beside_first, beside_other) <= 1e-4 and _distance(beside_first, alone) <= _SAME_PIECE)
    return "packed" if apart else "padded"


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def truncate_checked_(lm: LanguageModel, passes: Sequence[Inputs], layers: Sequence[int]) -> None:
    """Truncate to the deepest of `layers`; stop unless it still gives what the whole model calls their outputs.

    The reference is transformers' own `output_hidden_states` of the untruncated model on the same batch, whose entry
    L + 1 is layer L's output, except the last, which has gone through the final norm.

    Raises:
        PipelineError: a layer's rows differ from the reference by more than bf16 rounding.
    """
    tokens = sum(int((one.source >= 0).sum()) for one in passes)
    reference = {layer: torch.empty(tokens, lm.d_model, dtype=torch.bfloat16) for layer in layers}
    for one in passes:
        states = _forward(lm, one, output_hidden_states=True).hidden_states
        if len(states) != lm.n_layers + 1:
            raise PipelineError(f"the model gives {len(states)} hidden states for {lm.n_layers} layers: cannot check")
        for layer in layers:
            _scatter(states[layer + 1].cpu(), one, reference[layer])
    lm.truncate_(max(layers))
    harvested = run(lm, passes, layers)
    for layer in layers:
        rows = harvested[layer]
        if layer == lm.n_layers - 1:
            rows = _final_norm(lm.decoder)(rows.to(getattr(torch, lm.config.dtype)))
        # Row by row: one attention sink at 1000 times the norm would hide every other row in a common sum.
        norms = reference[layer].float().norm(dim=1)
        wrong = float(((rows.float().cpu() - reference[layer].float()).norm(dim=1) / norms).max())
        if not wrong <= _ROUNDING:
            raise PipelineError(
                f"self-check failed: layer {layer} as harvested differs from the whole model's hidden state by up to "
                f"{wrong:.2%} (allowed {_ROUNDING:.2%}); this version of transformers and this model do not agree"
            )


def _final_norm(decoder: nn.Module) -> nn.Module:
    for name in ("norm", "ln_f", "final_layernorm", "final_layer_norm"):
        if isinstance(module := getattr(decoder, name, None), nn.Module):
            return module
    raise PipelineError(f"{type(decoder).__name__} has no final norm by a known name: the last layer cannot be checked")
