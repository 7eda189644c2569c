"""Adam, and its learning rate as a pure function of the step.

optim=adam is the reference's (caiovicentino/mechreward scripts/train_sae_qwen35.py), for rows as
they are: eps 1e-8, the global gradient norm clipped at 1, steps counted from 0. optim=scaled does
without, on rows scaled to E||x|| = sqrt(d): there the norm is 0.55 at the first step and 0.02 later
(embedded model, layers 5 and 8, 544 steps, lr 1e-2), so clipping would never act, and the usual eps
would silence latents that fire rarely. A batch that is not finite stops the run in any case.

Left out, because measurement found no use for it (the same runs): removing the gradient along each
decoder direction before Adam (Gao et al., appendix A). Held-out variance explained .9759 and .9606
with it, .9756 and .9605 without; projecting at every step instead of every tenth, .9752 and .9600.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from residual_saes.data.errors import SettingError
from residual_saes.train.sae import recorded

DECAYS = ("cosine", "linear")
# lr=auto, from the best rates of docs/method.md.
_AUTO_LR = 1.2e-2  # of _AUTO_STEPS steps and _AUTO_D_SAE latents
_AUTO_STEPS = 146
_AUTO_D_SAE = 4096
_AUTO_BY_STEPS = 0.4
_AUTO_BY_D_SAE = 0.25
_AUTO_LEAST = 1e-4
_AUTO_MOST = 1.5e-2


@dataclass(frozen=True)
class OptimConfig:
    """Adam's schedule.

    Rates: caiovicentino/mechreward scripts/train_sae_qwen35.py (the reference). Defaults are
    conf/optim/scaled.yaml's; conf/optim/adam.yaml is the reference to the step.
    """

    lr: float | str = 2e-4  # after warm-up; "auto" goes by the dictionary and the run's length
    lr_floor: float = 6e-5  # at the last step
    warmup_steps: int | None = None  # optimizer steps; None: 5 % of the run, at most 5,000
    project_every: int = 10  # optimizer steps between projections of the decoder to norm 1
    decay: str = "cosine"  # from lr to lr_floor: one of DECAYS
    beta1: float = 0.9  # Gao et al., appendix A.3
    beta2: float = 0.999
    # Gradients of a mean over scaled rows and dimensions are tiny: with the usual 1e-8 a latent
    # that fires rarely would learn nothing. openai/sparse_autoencoder train.py has this value.
    eps: float = 6.25e-10
    clip_norm: float | None = None  # of all gradients together; None: not clipped
    # The number of the first step, by which warm-up, decay and projection go: 1, or 0 as the
    # reference. From 0 the first rate is 0, and the decoder is projected after it.
    first_step: int = 1
    # What runs had before those settings were there, and do not record.
    LATER: ClassVar[Mapping[str, Any]] = {"eps": 6.25e-10, "clip_norm": None, "first_step": 1}

    def __post_init__(self) -> None:
        if isinstance(self.lr, str):
            if self.lr != "auto":
                raise SettingError(f"optim.lr={self.lr} must be a positive number, or auto")
        elif not (math.isfinite(self.lr) and self.lr > 0):
            raise SettingError(f"optim.lr={self.lr} must be a positive number, or auto")
        if self.decay not in DECAYS:
            raise SettingError(f"optim.decay={self.decay} must be one of {', '.join(DECAYS)}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise SettingError(
                    f"optim.{name}={getattr(self, name)} must be at least 0 and below 1"
                )
        if not (math.isfinite(self.lr_floor) and self.lr_floor >= 0):
            raise SettingError(f"optim.lr_floor={self.lr_floor} must be 0 or a positive number")
        if not isinstance(self.lr, str) and self.lr_floor > self.lr:
            raise SettingError(
                f"optim.lr_floor={self.lr_floor} must be between 0 and optim.lr={self.lr}; set "
                f"both, for example optim.lr={self.lr} optim.lr_floor={0.3 * self.lr:.2g}"
            )
        if self.warmup_steps is not None and self.warmup_steps < 0:
            raise SettingError(
                f"optim.warmup_steps={self.warmup_steps} must be 0 or more, or null for 5% of the "
                "run"
            )
        if self.project_every < 1:
            raise SettingError(
                f"optim.project_every={self.project_every} must be at least 1 (optimizer steps)"
            )
        for name, value in (("eps", self.eps), ("clip_norm", self.clip_norm)):
            if value is not None and not (math.isfinite(value) and value > 0):
                raise SettingError(f"optim.{name}={value} must be a positive number")
        if self.first_step not in (0, 1):
            raise SettingError(f"optim.first_step={self.first_step} must be 0 or 1")

    def recorded(self) -> dict[str, Any]:
        """What a run records: settings that came later, only where they differ from before."""
        return recorded(self, self.LATER)


def resolved(config: OptimConfig, d_sae: int, steps: int) -> OptimConfig:
    """The schedule with lr as a number: `auto` goes by dictionary size and steps of the run."""
    if config.lr != "auto":
        return config
    by_steps = (steps / _AUTO_STEPS) ** -_AUTO_BY_STEPS
    by_size = (d_sae / _AUTO_D_SAE) ** -_AUTO_BY_D_SAE
    lr = _AUTO_LR * by_steps * by_size
    return replace(config, lr=min(max(lr, _AUTO_LEAST), _AUTO_MOST))


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """The rate of step 0 ... steps - 1: linear warm-up to `lr`, then decay to `lr_floor`.

    Counted from 1, the last step has the floor; counted from 0, the one after it would.

    Args:
        config: resolved.
    """
    lr = float(config.lr)
    warmup = warmup_steps(config, steps)
    if step < warmup:
        return lr * (step + config.first_step) / warmup
    progress = (step - warmup) / max(1, steps - config.first_step - warmup)
    left = 1 - progress if config.decay == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr_floor + (lr - config.lr_floor) * left


def warmup_steps(config: OptimConfig, steps: int) -> int:
    """Optimizer steps of a run of `steps` in which the rate rises."""
    return min(5_000, steps // 20) if config.warmup_steps is None else config.warmup_steps


class Adam:
    """torch's fused Adam on hand-made gradients, with its state by name.

    It calls the kernel of `torch.optim.Adam(fused=True)`. The class itself loads torch's compiler:
    2.3 s of a core before the first step.
    """

    def __init__(self, parameters: dict[str, Tensor], config: OptimConfig) -> None:
        """Start at step 0; `parameters` are changed in place by `step_`."""
        self._parameters = parameters
        self._clip_norm = config.clip_norm
        self._constants: dict[str, Any] = {
            "beta1": config.beta1,
            "beta2": config.beta2,
            "eps": config.eps,
        }
        self._state: dict[str, dict[str, Tensor]] = {}
        for name, parameter in parameters.items():
            self._state[name] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    def step_(self, gradients: dict[str, Tensor], lr: float) -> None:
        """One step at rate `lr`."""
        if self._clip_norm is not None:
            for name, parameter in self._parameters.items():
                parameter.grad = gradients[name]
            torch.nn.utils.clip_grad_norm_(self._parameters.values(), self._clip_norm)
            for parameter in self._parameters.values():
                parameter.grad = None
        steps = self._every("step")
        torch._foreach_add_(steps, 1)
        torch._fused_adam_(
            list(self._parameters.values()),
            [gradients[name] for name in self._parameters],
            self._every("exp_avg"),
            self._every("exp_avg_sq"),
            [],
            steps,
            lr=lr,
            weight_decay=0.0,
            amsgrad=False,
            maximize=False,
            **self._constants,
        )

    def _every(self, kind: str) -> list[Tensor]:
        """A part of the state of every parameter, in their order."""
        return [state[kind] for state in self._state.values()]

    def restart_(self, name: str, latents: Tensor) -> None:
        """Restart a parameter's moments at `latents`: first 0, second the mean over all latents.

        With a second moment of 0 restarted latents would take the largest steps, and most of them
        would die again (docs/method.md).
        """
        state = self._state[name]
        second = state["exp_avg_sq"]
        state["exp_avg"][latents] = 0.0
        second[latents] = second.mean(0)

    def tensors(self) -> dict[str, Tensor]:
        """Both moments and the step count of every parameter: what a checkpoint must hold."""
        return {
            f"{name}.{kind}": tensor
            for name, state in self._state.items()
            for kind, tensor in state.items()
        }
