"""TRL's GRPOTrainer with rollouts, advantages and a reference of ours.

Of TRL it keeps the loss, the log-probabilities, the optimizer and the checkpoints. The loss is

    - mean over a step's tokens of ratio * (A - beta * k3)

ratio is p / p.detach(), k3 Schulman's estimate of the KL to the reference: TRL's `loss_type="dapo"`
with `use_bias_correction_kl` (DeepSeek-V3.2, arXiv 2512.02556). A is of completions, (B,), or, from
subclasses, of tokens, (B, T). Ours is of tokens at both levels; that of a trajectory is the same
for all its tokens.

Shapes: B rollouts of a step, T tokens of the longest one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from residual_saes.analyze.studies.stage_gate_2.arms import Arm, Options

# Of a step, by its number: what the loss takes. See `rollouts.Rollouts.inputs`.
Inputs = Callable[[int], dict[str, Tensor]]


class Trainer(GRPOTrainer):
    """Trains a policy on the inputs that it is given."""

    def __init__(self, model: nn.Module, tokenizer: Any, config: GRPOConfig, inputs: Inputs):
        """
        Args:
            model: transformers' causal model, or peft's.
            tokenizer: transformers'.
        """
        beta, config.beta = config.beta, 0.0  # else TRL loads a reference model of its own
        # What is asked in a step follows from its number.
        parts = config.max_steps * config.gradient_accumulation_steps
        steps = Dataset.from_dict({"prompt": [""] * parts})
        super().__init__(
            model,
            reward_funcs=_no_reward,
            args=config,
            train_dataset=steps,
            processing_class=tokenizer,
        )
        config.beta = self.beta = beta
        self.remove_callback(PrinterCallback)
        self._inputs = inputs
        self._of_step: dict[str, Tensor] = {}

    def get_train_dataloader(self) -> DataLoader[Any]:
        """A batch of nothing for each backward pass."""
        return DataLoader(self.train_dataset, batch_size=1, collate_fn=list)

    def _prepare_inputs(self, _: Any) -> dict[str, Tensor]:
        """The rollouts of one backward pass, an equal part of the step's."""
        parts = self.args.gradient_accumulation_steps
        part = self._step % parts
        if not part:
            made = self._inputs(self.state.global_step)
            self._of_step = {
                name: value.to(self.accelerator.device) for name, value in made.items()
            }
        size = self.args.per_device_train_batch_size
        rows = slice(part * size, (part + 1) * size)
        chosen = {name: value[rows] for name, value in self._of_step.items() if value.dim()}
        return self._of_step | chosen

    def _send_telemetry(self) -> None:
        """Nothing is sent to anybody."""


def _no_reward(**_: Any) -> list[float]:
    raise AssertionError("the advantages are ours")


def config(folder: Path, arm: Arm, options: Options, temperature: float, device: str) -> GRPOConfig:
    """What TRL is told.

    Args:
        folder: for checkpoints.
        temperature: of the rollouts.
    """
    on_cpu = torch.device(device).type == "cpu"
    together = options.together or options.of_step
    made = GRPOConfig(
        output_dir=str(folder),
        max_steps=options.steps,
        per_device_train_batch_size=together,
        gradient_accumulation_steps=options.of_step // together,
        num_generations=options.rollouts,
        generation_batch_size=options.of_step,
        learning_rate=arm.lr,
        lr_scheduler_type="constant",
        beta=options.beta,
        temperature=temperature,
        loss_type="dapo",
        use_bias_correction_kl=True,
        seed=arm.seed,
        disable_dropout=True,
        activation_checkpointing=not on_cpu,
        use_cpu=on_cpu,
        bf16=not on_cpu,
        dataloader_pin_memory=False,
        logging_steps=1,
        save_strategy="steps",
        save_steps=options.checkpoint,
        save_total_limit=2,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        ignore_data_skip=True,
    )
    made._n_gpu = min(made.n_gpu, 1)  # several would be torch's DataParallel
    return made


class Stopping(TrainerCallback):
    """Calls `check` before each step and backward pass, and `saved` after each checkpoint."""

    def __init__(self, check: Callable[[], None], saved: Callable[[Path], None]) -> None:
        self._check = check
        self._saved = saved

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._check()

    def on_substep_end(self, *_: Any, **__: Any) -> None:
        self._check()

    def on_save(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        self._saved(Path(args.output_dir) / f"checkpoint-{state.global_step}")
