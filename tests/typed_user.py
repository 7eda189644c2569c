"""What a user's script does, for `make lint`: mypy --strict takes it, and knows the types."""

from __future__ import annotations

from typing import assert_type

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from residual_saes import SAE, Batch, Column, SettingError, Sparse, Store, TextFeatures


def script(model: nn.Module, array: NDArray[np.float64]) -> None:
    sae = SAE.load("runs/demo", device="cpu")
    assert_type(sae.encode(torch.zeros(3, sae.d_model)), Tensor)
    assert_type(sae.topk(array), Sparse)
    assert_type(sae.decode(sae.topk(array)), Tensor)
    found = sae.features("Tom has 7 apples", model=model)
    assert_type(found, TextFeatures)
    with sae.steer(model, found.top(1)[0].feature, 4.0), sae.steer([1, 2], [1.0, -1.0]) as own:
        assert_type(own.generate("Tom has", new_tokens=8), str)
    with sae.steer(model, 7, change="ablate"):
        pass
    store = Store.open("activations/tiny.zarr")
    assert_type(store.rows(layer=5), Column)
    assert_type(store.tokens[:10], Tensor)
    for batch in store.batches(5, part="held_out"):
        assert_type(batch, Batch)
    try:
        SAE.load("nothing")
    except SettingError as error:
        assert_type(str(error), str)
