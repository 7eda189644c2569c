"""`python -m train.export run=runs/NAME to=saelens`: a finished run's SAE in the files of other libraries."""

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

from data import durable
from data.errors import SettingError, run_command, run_main
from data.settings import described, names
from train import export, sae
from train.export.formats import FORMATS, about
from train.run import read_config


def command(settings: dict[str, Any]) -> None:
    """Write the files and say where they are."""
    if not settings["run"]:
        raise SettingError("run= is missing; give the directory of a finished training run, e.g. run=runs/demo")
    run = Path(settings["run"])
    asked = names("to", settings["to"], FORMATS)
    config, trained = read_config(run), sae.load(run / export.FILE)
    what = about(run, config)
    for name in asked:
        folder = (Path(settings["out"]) if settings["out"] else run / "export") / name
        for file, content in FORMATS[name].write(trained, what).items():
            durable.make_directory((folder / file).parent)
            durable.write(folder / file, [content])
            print(f"wrote {folder / file}", file=sys.stderr)


@hydra.main(version_base="1.3", config_path="../../conf", config_name="export")
def main(cfg: DictConfig) -> None:
    settings = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(settings, dict)
    run_command(lambda: command({str(key): value for key, value in settings.items()}))


if __name__ == "__main__":
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # so that its refusals come here, to be said in one line
    run_main(main, (HydraException, OmegaConfBaseException), lambda: described("export", sys.argv[1:]))
