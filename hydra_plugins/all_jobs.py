"""Hydra's sweeper of every command: what stands for all jobs of a multirun.

That is the folder where the command was given, and the exit code. Hydra takes plugins from this
package alone. Every command imports this file, so it imports what it needs when it launches.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

# Launchers that run the jobs in this process, and so in its folder.
_HERE = ("BasicLauncher", "OnePass")
# How launchers name a job whose process was lost: submitit, joblib, Ray.
_LOST = ("UncompletedJobError", "TerminatedWorkerError", "WorkerCrashedError", "NodeDiedError")


class AllJobs(BasicSweeper):
    """Hydra's own sweeper, behind a `_Guarded` launcher."""

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Take the launcher that the settings name."""
        there = _InFolder(task_function, os.getcwd())
        super().setup(hydra_context=hydra_context, task_function=there, config=config)
        assert self.launcher is not None
        self.launcher = _Guarded(self.launcher)


class _InFolder:
    """A task that goes to the folder where the command was given before it begins."""

    def __init__(self, task: TaskFunction, folder: str) -> None:
        self._task = task
        self._folder = folder

    def __call__(self, settings: DictConfig) -> Any:
        from residual_saes.conf.command import enter_folder

        enter_folder(self._folder, settings)
        return self._task(settings)


class _Guarded(Launcher):
    """A launcher that ships absolute paths. Of jobs that failed, the gravest is raised."""

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher

    def setup(self, **given: Any) -> None:
        self._launcher.setup(**given)

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        from residual_saes.data.errors import TemporaryError, first_line
        from residual_saes.data.journal import tell

        # An arm's directory is named by what differs: tell each job what does not.
        if len(job_overrides) > 1:
            same = set[str].intersection(*map(set, job_overrides))
            names = ",".join(sorted(f"'{_name(override)}'" for override in same))
            told = f"hydra.job.config.override_dirname.exclude_keys=[{names}]"
            job_overrides = [[*overrides, told] for overrides in job_overrides]
        if type(self._launcher).__name__ not in _HERE:
            # Hydra makes that folder in each job's own place. The launcher's logs are not there.
            nowhere = "hydra.sweep.dir=."
            job_overrides = [[*map(_absolute, overrides), nowhere] for overrides in job_overrides]
        try:
            jobs = self._launcher.launch(job_overrides, initial_job_idx)
        except Exception as error:
            if type(error).__name__ not in _LOST:
                raise
            raise TemporaryError(
                f"a job was lost ({first_line(error)}); the same command goes on"
            ) from error
        failed = [job for job in jobs if job.status is JobStatus.FAILED]
        if not failed:
            return jobs
        gravest = min(failed, key=lambda job: _exit_code(job._return_value))
        for job in failed:
            if job is not gravest:
                tell(f"{' '.join(job.overrides or [])}: {job._return_value}")
        raise gravest._return_value  # here, or Hydra adds lines of its own


def _name(override: str) -> str:
    """The setting that one NAME=VALUE sets."""
    return override.partition("=")[0].lstrip("+")


def _absolute(override: str) -> str:
    """One NAME=VALUE of a job, with the paths in it as from this folder."""
    from residual_saes.conf.names import absolute, quote

    name = override.partition("=")[0]
    value = OverridesParser.create().parse_override(override).value()
    items = value if isinstance(value, list) else [value]
    typed = [item for item in items if isinstance(item, str)]
    paths = [absolute(name, item, os.getcwd()) for item in typed]
    if paths == typed or len(typed) < len(items):
        return override  # an arm's directory is named by what was typed
    listed = ",".join(map(quote, paths))
    return f"{name}=[{listed}]" if isinstance(value, list) else f"{name}={listed}"


def _exit_code(error: BaseException) -> int:
    """1 for a defect of ours, 2 for what the user must mend, 75 for what goes on later."""
    return getattr(error, "exit_code", 1)
