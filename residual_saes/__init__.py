"""SAEs and stores from Python: `from residual_saes import SAE, Store`; see docs/api.md."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from residual_saes.analyze.latents.text_features import TextFeatures as TextFeatures
    from residual_saes.data.errors import PipelineError as PipelineError
    from residual_saes.data.errors import SettingError as SettingError
    from residual_saes.data.errors import StoreError as StoreError
    from residual_saes.sae import SAE as SAE
    from residual_saes.sae import Sparse as Sparse
    from residual_saes.store import Batch as Batch
    from residual_saes.store import Column as Column
    from residual_saes.store import Store as Store

__all__ = [
    "SAE",
    "Batch",
    "Column",
    "PipelineError",
    "SettingError",
    "Sparse",
    "Store",
    "StoreError",
    "TextFeatures",
]
_ELSEWHERE = {
    "Batch": "store",
    "Column": "store",
    "PipelineError": "data.errors",
    "SettingError": "data.errors",
    "Sparse": "sae",
    "StoreError": "data.errors",
    "TextFeatures": "analyze.latents.text_features",
}


def __getattr__(name: str) -> object:
    """A public name, imported when it is first asked for: every command imports this package, and
    these import torch.
    """
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _ELSEWHERE.get(name, name.lower())
    return getattr(import_module(f"{__name__}.{module}"), name)
