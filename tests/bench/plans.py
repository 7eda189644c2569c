"""What a harvest takes, calculated for models of several sizes: the table in README.

    python -m tests.bench.plans [--out FILE]

Nothing is run. Each row is the plan that `python -m harvest action=plan` prints: the bytes of a
layer's residuals, FLOP a token and the memory on a GPU. The configurations are the published ones.
Hours are FLOP over `--flops`, by default 30 % of the 989 TFLOP/s of an H100 in bfloat16.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any
from unittest import mock

from transformers import GPT2Config, LlamaConfig

from residual_saes.data.site import HookPoint
from residual_saes.harvest.config import HarvestConfig
from residual_saes.harvest.cost import cost
from residual_saes.harvest.plan import plan
from tests.bench.outcome import finish
from tests.harvest.models import E4B

_LLAMA = {"num_key_value_heads": 8, "num_attention_heads": 32, "vocab_size": 128_256}
LLAMA_1B = LlamaConfig(
    hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, head_dim=64, **_LLAMA
)
LLAMA_8B = LlamaConfig(
    hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, head_dim=128, **_LLAMA
)
# By name: configuration, its middle layer, tokens, d_sae.
CASES = {
    "GPT-2 small": (GPT2Config(), 6, 100_000_000, 12_288),
    "Llama 3.2 1B": (LLAMA_1B, 8, 300_000_000, 32_768),
    "Gemma 4 E4B": (E4B, 21, 1_000_000_000, 32_768),
    "Llama 3.1 8B": (LLAMA_8B, 16, 1_000_000_000, 65_536),
}
_OF_TRAINING = 16  # bytes of a weight in float32: itself, its gradient, Adam's two moments


def planned(config: Any, layer: int, tokens: int, d_sae: int, flops: float) -> dict[str, float]:
    """The figures of one harvest, and the weights of the SAE that is trained from it."""
    text = config.get_text_config()
    asked = HarvestConfig(store="plans.zarr", layers=(layer,), tokens=tokens)
    costs = cost(config, [HookPoint(layer)], "bfloat16", asked.batch, asked.context)
    with mock.patch("residual_saes.harvest.plan.free_bytes", return_value=None):
        made = plan(asked, costs, text.hidden_size, "cuda")  # on a machine that may have none
    return {
        "layer": layer,
        "d_model": text.hidden_size,
        "tokens": tokens,
        "bytes": made.expected_bytes,
        "gflop_per_token": costs.flop / 1e9,
        "harvest_hours": tokens * costs.flop / flops / 3600,
        "harvest_memory_bytes": made.memory.total,
        "d_sae": d_sae,
        "training_state_bytes": _OF_TRAINING * 2 * text.hidden_size * d_sae,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--flops", type=float, default=0.3 * 989e12, help="FLOP/s of the GPU")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    rows = {name: planned(*case, asked.flops) for name, case in CASES.items()}
    finish({"flops": asked.flops}, rows, asked.out)


if __name__ == "__main__":
    main()
