"""`python -m analyze study=NAME run=runs/NAME`: what a trained SAE is worth."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from analyze.quality import markdown, quality, write
from analyze.report import report
from analyze.subject import Subject
from data.device import torch_device
from data.errors import SettingError, run_command
from data.settings import whole


def command(settings: dict[str, Any]) -> None:
    """Run one study and say where its results are."""
    if not settings["run"]:
        raise SettingError("run= is missing; give the directory of a finished training run, e.g. run=runs/demo")
    device = torch_device(settings["device"])
    study = settings["study"]
    limit = whole("study.rows", study["rows"])
    if limit < 1:
        raise SettingError(f"study.rows={limit} must be at least 1")
    store = str(settings["store"]) if settings["store"] else None
    subject = Subject.open(Path(settings["run"]), store, device)
    if study["name"] == "quality":
        figures = quality(subject, limit)
        write(subject, figures)
        print("\n".join(markdown(subject, figures)))
        print(f"\nwrote {subject.run / 'quality.json'} and quality.md", file=sys.stderr)
    else:
        path = report(subject, limit, settings["model"]["path"])
        print(f"wrote {path}: open it in a browser", file=sys.stderr)


@hydra.main(version_base="1.3", config_path="../conf", config_name="analyze")
def main(cfg: DictConfig) -> None:
    settings = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(settings, dict)
    run_command(lambda: command({str(key): value for key, value in settings.items()}))


if __name__ == "__main__":
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # so that its refusals come here, to be said in one line
    run_command(main, (HydraException, OmegaConfBaseException))
