"""Hydra's sweeper of every command: the exit code of a multirun stands for all of its jobs.

Hydra takes plugins from this package alone. Every command imports this file, so it imports what it
needs when it launches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher

# How launchers name a job whose process was lost: submitit, joblib, Ray.
_LOST = ("UncompletedJobError", "TerminatedWorkerError", "WorkerCrashedError", "NodeDiedError")


class AllJobs(BasicSweeper):
    """Hydra's own sweeper. Of jobs that failed, it raises the one that matters most."""

    def setup(self, **given: Any) -> None:
        """Take the launcher that the settings name."""
        super().setup(**given)
        assert self.launcher is not None
        self.launcher = _Judged(self.launcher)


class _Judged(Launcher):
    """A launcher whose failed jobs are told, one line each, and the gravest is raised."""

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher

    def setup(self, **given: Any) -> None:
        self._launcher.setup(**given)

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        from data.errors import TemporaryError, first_line
        from data.journal import tell

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


def _exit_code(error: BaseException) -> int:
    """1 for a defect of ours, 2 for what the user must mend, 75 for what goes on later."""
    return getattr(error, "exit_code", 1)
