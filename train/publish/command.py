"""`python -m train.publish run=runs/NAME repo=OWNER/NAME`: a finished run as a folder for the
Hugging Face Hub.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from conf.command import ALONE, Job
from data.errors import SettingError
from data.journal import size
from data.settings import flag
from train.publish import release


def command(settings: dict[str, Any], _: Job = ALONE) -> None:
    """Write the folder, say what is in it, and upload it if that was asked."""
    if not settings["run"]:
        raise SettingError(
            "run= is missing; give the directory of a finished training run, e.g. run=runs/demo"
        )
    run, repo = Path(settings["run"]), release.require_repository(settings["repo"])
    upload, private = flag("upload", settings["upload"]), flag("private", settings["private"])
    if upload:
        release.require_token()  # before gigabytes are written
    folder = Path(settings["out"]) if settings["out"] else run / release.FOLDER
    files = release.prepare(run, repo, folder)
    for name, count in files.items():
        print(f"{size(count):>8}  {folder / name}")
    what = f"{len(files)} files, {size(sum(files.values()))}, for {repo} ({'private' if private else 'public'})"
    if not upload:
        print(f"{what}: nothing was uploaded; upload=true does")
        return
    release.upload(folder, files, repo, private)
    print(f"{what}: uploaded to https://huggingface.co/{repo}")
