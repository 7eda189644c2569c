"""`python -m train.publish run=runs/NAME repo=OWNER/NAME`: a finished run as a folder for the Hugging Face Hub."""

from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while libraries load ends this at once, without a traceback

import os
import sys
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data.errors import SettingError, run_command, run_main
from data.journal import size
from data.settings import described, flag
from train.publish import release


def command(settings: dict[str, Any]) -> None:
    """Write the folder, say what is in it, and upload it if that was asked."""
    if not settings["run"]:
        raise SettingError("run= is missing; give the directory of a finished training run, e.g. run=runs/demo")
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


@hydra.main(version_base="1.3", config_path="../../conf", config_name="publish")
def main(cfg: DictConfig) -> None:
    settings = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(settings, dict)
    run_command(lambda: command({str(key): value for key, value in settings.items()}))


if __name__ == "__main__":
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # so that its refusals come here, to be said in one line
    run_main(main, (HydraException, OmegaConfBaseException), lambda: described("publish", sys.argv[1:]))
