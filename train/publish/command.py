"""What `python -m train.publish run=runs/NAME repo=OWNER/NAME` does with its settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from residual_saes.conf.command import ALONE, Job
from residual_saes.data.errors import SettingError
from residual_saes.data.journal import heartbeat, show, size
from residual_saes.data.settings import flag
from residual_saes.train.publish import release


def command(settings: dict[str, Any], _: Job = ALONE) -> None:
    """Write the folder and list its files; upload them if upload=true."""
    if not settings["run"]:
        raise SettingError(
            "run= is missing; give the directory of a finished training run, e.g. run=runs/demo"
        )
    run = Path(settings["run"])
    repo = release.require_repository(settings["repo"])
    upload = flag("upload", settings["upload"])
    private = flag("private", settings["private"])
    if upload:
        release.require_token()  # before gigabytes are written
    folder = Path(settings["out"]) if settings["out"] else run / release.FOLDER
    with heartbeat(f"writing {folder}"):
        files = release.prepare(run, repo, folder)
    for name, count in files.items():
        show(f"{size(count):>8}  {folder / name}")
    visibility = "private" if private else "public"
    total = f"{len(files)} files, {size(sum(files.values()))}, for {repo} ({visibility})"
    if not upload:
        show(f"{total}: nothing was uploaded; upload=true does")
        return
    with heartbeat(f"uploading {total}"):
        release.upload(folder, files, repo, private)
    show(f"{total}: uploaded to https://huggingface.co/{repo}")
