"""SAEs and stores from Python: `from residual_saes import SAE, Store`."""

from data.store.store import Store as Store
from residual_saes.sae import SAE as SAE
