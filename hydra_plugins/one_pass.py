"""Hydra's launcher of `python -m train -m ...`: all arms of a sweep on one read of the store, in
this process.

It stands in this package because Hydra takes plugins from no other, without an __init__.py because
Hydra's own plugins share the package. Every command of Hydra's imports it, so what it needs is
imported when it launches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hydra.core.utils import JobReturn, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

if TYPE_CHECKING:
    from data.errors import PipelineError
    from train.arm import Arm


class OnePass(Launcher):
    """Trains a sweep's arms together; under torchrun or accelerate, each process its share of them
    on its own GPU.
    """

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Take what Hydra gives; the task function, which trains a single arm, is not needed."""
        self._context, self._config = hydra_context, config

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Compose the jobs, and train their arms; what became of each."""
        from data.device import own_device
        from data.errors import PipelineError
        from data.journal import tell
        from train import parallel
        from train.sweep import train_sweep

        setup_globals()
        share = range(parallel.rank(), len(job_overrides), parallel.world())
        jobs = [
            self._prepare(list(job_overrides[number]), initial_job_idx + number) for number in share
        ]
        by_device: dict[str | None, list[JobReturn]] = {}
        for job in jobs:
            if not isinstance(job.return_value, PipelineError):
                by_device.setdefault(job.cfg["device"], []).append(job)  # type: ignore[index]
        for name, ours in by_device.items():
            outcomes = train_sweep([job.return_value for job in ours], own_device(name))
            for job, outcome in zip(ours, outcomes, strict=True):
                job.return_value = outcome
        failed = [job for job in jobs if isinstance(job.return_value, PipelineError)]
        for job in failed[1:]:
            tell(f"{' '.join(job.overrides or [])}: {job.return_value}")
        if failed:
            raise failed[0].return_value  # Hydra would say it in lines of its own
        return jobs

    def _prepare(self, overrides: list[str], number: int) -> JobReturn:
        """Compose one job; its Arm, or why it is refused, stands where its result will."""
        from conf.command import current_job, plain
        from data.errors import PipelineError
        from train.command import arm

        def task(cfg: DictConfig) -> Arm | PipelineError:
            try:
                return arm(plain(cfg), current_job())
            except PipelineError as error:
                return error

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
