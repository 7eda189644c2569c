"""Hydra's launcher of `python -m train -m ...`: all arms of a sweep on one read of the store.

Hydra takes plugins from this package alone. The package has no __init__.py, because Hydra's own
plugins share it. Every command imports this file, so it imports what it needs when it launches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hydra.core.utils import JobReturn, JobStatus, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

if TYPE_CHECKING:
    from residual_saes.data.errors import PipelineError
    from residual_saes.train.arm import Arm


class OnePass(Launcher):
    """Trains a sweep's arms together.

    Under torchrun or accelerate, each process trains its share of them on its own GPU.
    """

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Keep what `launch` needs. The task function trains a single arm, so it is not used."""
        self._context = hydra_context
        self._config = config

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Compose the jobs and train their arms; the jobs with their results."""
        from residual_saes.data import rank
        from residual_saes.data.errors import PipelineError

        setup_globals()
        jobs = []
        process = rank.processes()
        for number in range(process.rank, len(job_overrides), process.world):
            jobs.append(self._prepare(list(job_overrides[number]), initial_job_idx + number))
        # The first job has loaded torch, behind what is refused before.
        from residual_saes.data.device import own_device
        from residual_saes.train.sweep import train_sweep

        by_device: dict[str | None, list[JobReturn]] = {}
        for job in jobs:
            if not isinstance(job.return_value, PipelineError):
                by_device.setdefault(job.cfg["device"], []).append(job)  # type: ignore[index]
        for name, ours in by_device.items():
            outcomes = train_sweep([job.return_value for job in ours], own_device(name))
            for job, outcome in zip(ours, outcomes, strict=True):
                job.return_value = outcome
        for job in jobs:
            if isinstance(job.return_value, PipelineError):
                job.status = JobStatus.FAILED
        return jobs

    def _prepare(self, overrides: list[str], number: int) -> JobReturn:
        """Compose one job. Its value is its Arm, or the error for which it is refused."""
        from residual_saes.conf.command import begin
        from residual_saes.data import machine

        def task(cfg: DictConfig) -> Arm | PipelineError:
            try:
                settings, job = begin(cfg, "residual_saes.train.command")
                from residual_saes.train.command import arm

                return arm(settings, job)
            except Exception as error:
                refusal = machine.answer(error)
                if refusal is None:
                    raise
                return refusal

        config = self._context.config_loader.load_sweep_config(self._config, overrides)
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = number
        return run_job(
            hydra_context=self._context,
            task_function=task,
            config=config,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )
