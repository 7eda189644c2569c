"""The language model as a source of residuals: load what is used of it, truncate it, tap it.

Shapes: B rows, T context, d d_model; residuals are `resid_post`, the output of a decoder layer (the value that the
next layer reads), so layer 0 is the first block's output and never the embedding.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from data.errors import PipelineError, SettingError
from harvest.checkpoint import EMBEDDED as EMBEDDED
from harvest.checkpoint import config_digest, load_decoder, read_config, weights_digest
from harvest.checkpoint import is_out_of_memory as is_out_of_memory
from harvest.checkpoint import resolve as resolve
from harvest.isolation import Inputs, Isolation, Mask, attention_mask
from harvest.isolation import forward_inputs as forward_inputs
from harvest.tokens import Tokenizer

# bf16 keeps 8 bits: one rounding is 2^-9 relative, and truncation changes no kernel, so this is generous.
_ROUNDING = 2.0**-7
# A packed piece against the same piece alone: 3 % of bf16 noise was seen on random networks, ignored masks give > 30 %.
_SAME_PIECE = 0.15


class OutOfMemory(PipelineError):
    """A batch of `batch` packed rows of unit `unit` did not fit in memory; nothing of the unit was written."""

    def __init__(self, unit: int, batch: int) -> None:
        super().__init__(
            f"unit {unit}: a batch of {batch} rows does not fit in memory; what was committed before is intact. Go on "
            "with oom=halve (smaller batches may change bits, and are recorded), or begin another store= with less "
            "batch= or context="
        )
        self.unit, self.batch = unit, batch


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


@dataclass
class LanguageModel:
    """A text decoder, without its head unless that was asked for."""

    config: ModelConfig
    decoder: nn.Module
    blocks: nn.ModuleList  # its layers, as long as it has not been truncated all of them
    tokenizer: Tokenizer
    d_model: int
    vocabulary: int  # token ids
    n_layers: int  # of the whole model
    max_context: int  # tokens
    identity: dict[str, Any]  # what the manifest records of it
    isolation: Isolation = "packed"
    causal: Any = None  # transformers' model of `decoder` and its head, where the head was asked for

    def truncate_(self, deepest: int) -> None:
        """Drop every layer above `deepest` and what only these read, and give the memory back.

        The layers that stay were laid out by the whole model's configuration (which of them share keys and values,
        which ends a pattern), so this cannot be had by loading fewer of them.
        """
        del self.blocks[deepest + 1 :]
        narrow_per_layer_inputs_(self.decoder, len(self.blocks))
        gc.collect()  # modules are circular, and GBs cannot wait for the next collection
        if self.config.device.startswith("cuda"):
            torch.cuda.empty_cache()


class _Leading(nn.Module):
    """The first `width` outputs of `whole`, with the bits that they have among all of them.

    A product of fewer columns may be given another kernel, whose sums round otherwise; then a layer's rows would
    depend on how deep the model was cut. This one costs 0.3 % of E4B's forward to layer 27.
    """

    def __init__(self, whole: nn.Module, width: int) -> None:
        super().__init__()
        self.whole, self.width = whole, width

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """(b, t, d) to (b, t, width)."""
        found: torch.Tensor = self.whole(states)[..., : self.width]
        return found


def narrow_per_layer_inputs_(decoder: nn.Module, layers: int) -> None:
    """Where every layer has an input of its own per token (Gemma 4), keep those of the first `layers` only.

    The table holds them side by side: (vocabulary, layers * width), 5.6 GB in Gemma 4 E4B, 3.8 GB of it to layer 27.
    """
    table = getattr(decoder, "embed_tokens_per_layer", None)
    if table is None:
        return
    config: Any = decoder.config
    projection: Any = decoder.per_layer_model_projection
    width = layers * config.hidden_size_per_layer_input
    table.weight = nn.Parameter(table.weight[:, :width].clone(), requires_grad=False)  # a view would keep all of it
    table.embedding_dim = width
    decoder.per_layer_model_projection = _Leading(projection, width)
    config.num_hidden_layers = layers  # by which the decoder shapes both


def load(config: ModelConfig, *, head: bool = False) -> LanguageModel:
    """Load the text decoder, all layers of it, in its own dtype straight onto its device.

    What sees or hears is neither built nor read, nor is the head unless asked for. The weights' digest is taken while
    they load.

    Raises:
        SettingError: the folder holds no complete causal language model with a tokenizer that has a BOS token.
    """
    folder = resolve(config.path, config.revision)
    whole = read_config(folder)
    tokenizer = Tokenizer.load(folder)
    with ThreadPoolExecutor(1, thread_name_prefix="digest") as pool:
        weights = pool.submit(weights_digest, folder)
        loaded: Any = load_decoder(folder, whole, config.dtype, config.device, head=head)
    decoder = loaded.get_decoder() if head else loaded
    text: Any = decoder.config
    identity = {
        "id": "tiny" if config.path == EMBEDDED else folder.name if folder == Path(config.path) else config.path,
        "revision": config.revision,
        "architecture": (whole.architectures or [type(decoder).__name__])[0],
        "weights": weights.result(),
        "config": config_digest(folder, whole),
        "tokenizer": tokenizer.digest,
        "bos": tokenizer.bos,
        "dtype": config.dtype,
        "d_model": text.hidden_size,
        "n_layers": text.num_hidden_layers,
    }
    return LanguageModel(
        config=config,
        decoder=decoder,
        blocks=find_blocks(decoder, text.num_hidden_layers),
        tokenizer=tokenizer,
        d_model=text.hidden_size,
        vocabulary=text.vocab_size,
        n_layers=text.num_hidden_layers,
        max_context=getattr(text, "max_position_embeddings", None) or 2**31,
        identity=identity,
        causal=loaded if head else None,
    )


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


def run(
    lm: LanguageModel, passes: Sequence[Inputs], layers: Sequence[int], out: dict[int, torch.Tensor] | None = None
) -> dict[int, torch.Tensor]:
    """Residuals of `layers` for a batch: (B*T, d) bfloat16 each, in the order of its tokens.

    Nothing here waits for the device, except transformers itself in families that `attention_mask` does not know, so
    on an accelerator the rows are there only after what the caller queues behind them, or a synchronisation.

    Args:
        out: where to write, (B*T, d) a layer on the model's device, e.g. slices of a unit; None: new ones.
    """
    total = sum(one.tokens for one in passes)
    if out is None:
        out = {layer: torch.empty(total, lm.d_model, dtype=torch.bfloat16, device=lm.config.device) for layer in layers}
    with tap(lm.blocks, layers) as taken:
        for one in passes:
            here = _upload(one, lm.config.device)
            positions = here.positions
            _forward(lm, here, attention_mask(lm.decoder.config, positions))
            for layer in layers:
                _put(taken.pop(layer), here, out[layer])
    return out


def _upload(one: Inputs, device: str) -> Inputs:
    """The pass's tensors on the device; from pinned memory, so that the copies are queued like kernels."""

    def moved(part: torch.Tensor | None) -> Any:
        if part is None or not device.startswith("cuda"):
            return part if part is None else part.to(device)
        return part.pin_memory().to(device, non_blocking=True)

    return Inputs(*map(moved, one))


def _forward(lm: LanguageModel, one: Inputs, mask: Mask = None, **options: Any) -> Any:
    """The decoder on a pass that is on its device. Without `mask`, transformers finds pieces by their positions."""
    with torch.inference_mode():
        return lm.decoder(
            input_ids=one.ids, position_ids=one.positions, attention_mask=mask, use_cache=False, **options
        )


def _put(states: torch.Tensor, one: Inputs, out: torch.Tensor) -> None:
    """Put a pass's (b, t, d) states, rounded to the type of `out`, where their tokens belong in (B*T, d)."""
    shape = (*one.ids.shape, out.shape[1])
    if tuple(states.shape) != shape:
        raise PipelineError(f"a layer gave states of shape {tuple(states.shape)} where {shape} was expected")
    rows = states.reshape(-1, shape[-1])
    if one.inside is None or one.into is None:
        out.copy_(rows, non_blocking=True)
    else:
        out.index_copy_(0, one.into, rows.index_select(0, one.inside).to(out.dtype))


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

    def last(ids: torch.Tensor, at: torch.Tensor | None) -> torch.Tensor:
        here = _upload(Inputs(ids, at, None, None), lm.config.device)
        _forward(lm, here, attention_mask(lm.decoder.config, here.positions))
        return taken[layer][:, -length:].float()

    with tap(lm.blocks, [layer]) as taken:
        beside_first = last(torch.cat([first, second], 1), positions)
        beside_other = last(torch.cat([other, second], 1), positions)
        alone = last(second, None)
    apart = bool(_distance(beside_first, beside_other) <= 1e-4 and _distance(beside_first, alone) <= _SAME_PIECE)
    return "packed" if apart else "padded"


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def truncate_checked_(lm: LanguageModel, passes: Sequence[Inputs], layers: Sequence[int]) -> None:
    """Truncate to the deepest of `layers`; stop unless it still gives what the whole model calls their outputs.

    The reference is transformers' own `output_hidden_states` of the untruncated model on the same batch, with masks
    of its own making; entry L + 1 is layer L's output, except the last, which has gone through the final norm.

    Raises:
        PipelineError: a layer's rows differ from the reference by more than bf16 rounding.
    """
    tokens = sum(one.tokens for one in passes)
    device = lm.config.device
    reference = {layer: torch.empty(tokens, lm.d_model, dtype=torch.bfloat16, device=device) for layer in layers}
    for one in passes:
        here = _upload(one, device)
        states = _forward(lm, here, output_hidden_states=True).hidden_states
        if len(states) != lm.n_layers + 1:
            raise PipelineError(f"the model gives {len(states)} hidden states for {lm.n_layers} layers: cannot check")
        for layer in layers:
            _put(states[layer + 1], here, reference[layer])
        del states  # of all layers: 0.44 GB in E4B for 2 rows, and they must go before the next pass and the truncation
    lm.truncate_(max(layers))
    harvested = run(lm, passes, layers)
    for layer in layers:
        rows = harvested[layer]
        if layer == lm.n_layers - 1:
            rows = final_norm(lm.decoder)(rows.to(getattr(torch, lm.config.dtype)))
        # Row by row: one attention sink at 1000 times the norm would hide every other row in a common sum.
        norms = reference[layer].float().norm(dim=1)
        wrong = float(((rows.float() - reference[layer].float()).norm(dim=1) / norms).max())
        if not wrong <= _ROUNDING:
            raise PipelineError(
                f"self-check failed: layer {layer} as harvested differs from the whole model's hidden state by up to "
                f"{wrong:.2%} (allowed {_ROUNDING:.2%}); this version of transformers and this model do not agree"
            )


def final_norm(decoder: nn.Module) -> nn.Module:
    """The norm between the last layer and the head, by the names that families give it."""
    for name in ("norm", "ln_f", "final_layernorm", "final_layer_norm"):
        if isinstance(module := getattr(decoder, name, None), nn.Module):
            return module
    raise PipelineError(f"{type(decoder).__name__} has no final norm by a known name")
