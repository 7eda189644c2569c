"""A model's folder: where it lies, its configuration, and the digests that identify it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from residual_saes.data import durable
from residual_saes.data.errors import SettingError
from residual_saes.data.foreign import json_object, shortened
from residual_saes.data.journal import note, size
from residual_saes.harvest.weights import not_loadable

# Entries of config.json that count what transformers builds one by one, and the most of each. Of
# families the largest default is 16,384 experts (Doge).
_COUNT = re.compile(r"layers?$|blocks$|heads$|experts$|_groups$")
_PARTS = 20_000
# Entries of config.json that no residual depends on.
_NOISE = {
    "_name_or_path",
    "architectures",
    "auto_map",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}


def read_config(folder: Path) -> Any:
    """The configuration in a model's folder; its `get_text_config()` is the decoder's.

    Raises:
        SettingError: there is none, or it is not of a causal language model, or its weights are
            quantised in a way that cannot be read.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    _require_sane(folder)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        text = config.get_text_config()
        kind = text.model_type
        if not all(isinstance(name, str) for name in config.architectures or ()):
            raise ValueError("its architectures are no names")
    except Exception as error:  # checks of the configuration's class may raise anything
        raise not_loadable(folder, error) from error
    sizes = hasattr(text, "hidden_size") and hasattr(text, "vocab_size")
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or not sizes:
        raise SettingError(
            f"{folder} is not a loadable causal language model but of model_type={kind}; take one "
            "that transformers' AutoModelForCausalLM loads"
        )
    _require_readable(folder, config)
    return config


def _require_sane(folder: Path) -> None:
    """Raise SettingError for numbers of parts by which a model would be built for days."""
    path = folder / "config.json"
    way_out = "take a folder or a repository of a transformers model"
    waiting: list[Any] = [json_object(path, way_out, SettingError)]
    while waiting:
        part = waiting.pop()
        for name, value in part.items():
            if isinstance(value, dict):
                waiting.append(value)
            is_count = _COUNT.search(name) is not None and isinstance(value, int | float)
            if is_count and value > _PARTS:
                raise SettingError(
                    f"{shortened(str(path))} has {shortened(name)}={value:.3g}, and a model at "
                    f"most {_PARTS:,}; copy or download it again"
                )


def _require_readable(folder: Path, whole: Any) -> None:
    """Refuse quantised weights that transformers would read as if they were plain numbers.

    Raises:
        SettingError: the method is unknown, or stands beside the text part's configuration.
    """
    from transformers.quantizers.auto import AutoHfQuantizer

    quantised = getattr(whole, "quantization_config", None)
    if quantised is None:
        return
    method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
    known = isinstance(quantised, dict) and method is not None
    if known:
        known = AutoHfQuantizer.supports_quant_method(quantised)
    if not known or whole.get_text_config() is not whole:
        raise SettingError(
            f"{folder} is quantised in a way that cannot be read here (quant_method={method}); "
            "take the model that it was made from"
        )


def weights_digest(files: Sequence[Path]) -> str:
    """Digest of the weight files' names and bytes, in the order of `files`.

    Hashing releases the interpreter's lock, so it can run in a thread while the weights load.
    """
    lines: list[bytes] = []
    total = sum(file.stat().st_size for file in files)
    before = 0

    def show(done: int) -> None:
        note(f"digest of the model's weights: {size(before + done)} of {size(total)}")

    for file in files:
        written = durable.digest_file(file, progress=show)
        before += written.bytes
        lines.append(f"{file.name} {written.xxh3_128}\n".encode())
    return durable.digest(*lines)


def config_digest(folder: Path, whole: Any) -> str:
    """Digest of the text decoder's part of config.json.

    The same weights with other settings are another model. The digest is of the file itself:
    transformers adds defaults that differ between its versions.
    """
    recorded = json.loads((folder / "config.json").read_text())
    text = whole.get_text_config()
    part = recorded
    if text is not whole:
        names = [name for name in recorded if getattr(whole, name, None) is text]
        part = recorded[names[0]] if names else recorded
    kept = {name: value for name, value in part.items() if name not in _NOISE}
    return durable.digest(json.dumps(kept, sort_keys=True).encode())
