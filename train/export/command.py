"""`python -m train.export run=runs/NAME to=saelens`: a finished run's SAE in the files of other
libraries.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from conf.command import ALONE, Job
from data.journal import heartbeat, note, tell
from data.settings import names
from train import sae_file
from train.export import bundle, format, golden
from train.run import named_or_newest, read_config, sae_of


def command(settings: dict[str, Any], _: Job = ALONE) -> None:
    """Write the files and say where they are."""
    asked = names("to", settings["to"], format.names())
    run = named_or_newest(settings["run"])
    with heartbeat(f"reading {run / sae_file.FILE}"):
        config = read_config(run)
        trained = sae_of(run)[0]
        what = format.about(run, config)
        for name in asked:
            place = (Path(settings["out"]) if settings["out"] else run / "export") / name
            note(f"making the files of {name}")
            for file in bundle.write(place, golden.files(name, trained, what)):
                tell(f"wrote {place / file}")
