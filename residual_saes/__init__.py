"""SAEs and stores from Python: `from residual_saes import SAE, Store`."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from residual_saes.data.store.store import Store as Store
    from residual_saes.sae import SAE as SAE


def __getattr__(name: str) -> object:
    """SAE or Store, imported when it is first asked for: every command imports this package, and
    these import torch.
    """
    if name == "SAE":
        from residual_saes.sae import SAE

        return SAE
    if name == "Store":
        from residual_saes.data.store.store import Store

        return Store
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
