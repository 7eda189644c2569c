"""What an arm needs of its device's memory, and what to lower where it is not there."""

from __future__ import annotations

import torch

from residual_saes.data import device as devices
from residual_saes.data.errors import SettingError
from residual_saes.data.journal import size, tell
from residual_saes.train.arm import Arm
from residual_saes.train.blocks import GPU_BLOCK_BYTES
from residual_saes.train.columns import widths_of

_STATE = 3  # tensors of each parameter's size: itself, and Adam's two moments
# (batch, d) float32 at a time: rows, centred rows, reconstruction, error, gradient, ...
_ROW_BUFFERS = 8
_NESTED = ("matryoshka", "hierarchical")  # they reconstruct each row sae.nested times
_NESTED_BUFFERS = 4  # (batch, nested, d) float32: what levels add, errors, and both gradients


def arm_bytes(arm: Arm) -> int:
    """Bytes that an arm holds all the time, on its device."""
    d, d_out = widths_of(arm.config.ports, arm.stream.reader)
    sae = arm.config.sae
    parameters = (d + d_out) * sae.d_sae + sae.d_sae + d_out + d * d_out * sae.skip
    counters = 8 * sae.d_sae * (1 + sae.resample)
    basis = 4 * d * d * sae.rotate
    return 4 * _STATE * parameters + counters + basis


def step_bytes(arm: Arm) -> int:
    """Bytes that an arm needs during a step and frees after it."""
    d, d_out = widths_of(arm.config.ports, arm.stream.reader)
    d_sae = arm.config.sae.d_sae
    batch = arm.config.batch
    gradients = 4 * (d + d_out) * d_sae
    nested = arm.config.sae.nested if arm.config.sae.activation in _NESTED else 0
    rows = 4 * batch * (_ROW_BUFFERS * max(d, d_out) + _NESTED_BUFFERS * nested * d_out)
    pre_activations = min(4 * batch * d_sae, GPU_BLOCK_BYTES)
    pairs = 4 * 12 * batch * arm.config.sae.k
    return gradients + rows + pre_activations + pairs


def require_fit(arm: Arm, device: torch.device) -> None:
    """Say before an arm begins that memory is short.

    Raises:
        SettingError: its state alone does not fit. What a step needs is an estimate, by which
            nothing is refused.
    """
    free = devices.free_bytes(device)
    held = arm_bytes(arm)
    if free is None or held + step_bytes(arm) <= free:
        return
    needed = f"{size(held)} of state and about {size(step_bytes(arm))} a step"
    line = f"{arm.folder} needs {needed}, and device={device} has {size(free)} free"
    if held > free:
        raise SettingError(f"{line}; {smaller(arm)}")
    tell(f"{line}: it may run out of memory")


def smaller(arm: Arm) -> str:
    """What to lower, with its present values."""
    config = arm.config
    return (
        f"lower batch={config.batch} or sae.d_sae={config.sae.d_sae} in another run=, train fewer "
        "arms at a time (hydra/launcher=basic takes one after the other), or take a device= with "
        "more memory"
    )
