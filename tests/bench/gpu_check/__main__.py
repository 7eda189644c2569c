"""Whether a GPU does what this project needs, and how fast: `make gpu-check`, or `python -m
tests.bench.gpu_check [--out FILE]`.

Within eight minutes on one card: kernels against dense sums in float64, training steps, harvests in
the shape of Gemma 4 E4B with random weights, the same bits twice, and a run that is killed and goes
on. Each part is a process of its own with a share of the time. One that fails is reported, and the
others go on. Nothing is downloaded.

The exit code is 0 if all checks hold, 1 if some do not, 2 without a GPU. An aim that is missed is
no failure. The results file is written after every part.

`--tiny --device cpu` shows on a CPU, with toy sizes, that the parts work; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from datetime import UTC, datetime
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import torch

from residual_saes.data.errors import first_line
from tests.bench.gpu_check.notes import Notes
from tests.bench.outcome import finish

RESULTS = Path(__file__).parents[1] / "results"
# Each part: its function in this package, which is loaded where it runs, and its share in seconds.
PARTS = {
    "kernels": ("arithmetic.part", 85),
    "training": ("training.part", 90),
    "harvest": ("harvesting.part", 105),
    "bits": ("sameness.repeated", 60),
    "resume": ("sameness.resumed", 55),
    # The last, which has what the others left: FlexAttention compiles for long.
    "attention": ("harvesting.attention", 75),
}
TOTAL_S = 470  # of all parts; with the start and the end of it all, eight minutes
Found = dict[str, dict[str, Any]]  # by part: s, limit_s, check, figure, table


def main(arguments: list[str], run: Callable[..., str | None] | None = None) -> int:
    """The exit code.

    Args:
        run: a part, as `in_child` does.
    """
    given = asked(arguments)
    device = torch.device(given.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        return refuse(
            f"gpu-check needs a CUDA GPU, and torch {torch.__version__} sees none; "
            "--tiny --device cpu shows on a CPU that its parts work"
        )
    if device.type == "cpu" and not given.tiny:
        return refuse("--device cpu is for --tiny: full sizes take hours there")
    if given.part:
        work(given.part, given, Notes(given.notes))
        return 0
    facts = card(device)
    for name, value in facts.items():
        print(f"{name:<14}{value}")
    out = given.out
    if out is None and not given.tiny:
        name = re.sub(r"[^A-Za-z0-9]+", "-", facts["card"])
        out = RESULTS / f"gpu_check_{facts['date'][:10]}_{name}.json"
    found: Found = {}
    began = time.monotonic()
    # Of a part that is killed, a child may still be writing.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for name in given.parts:
            left = TOTAL_S - (time.monotonic() - began)
            limit = left if name == given.parts[-1] else min(PARTS[name][1], left)
            limit = 3600.0 if given.tiny else limit  # s; a CPU may be busy
            notes = Notes(Path(folder, name))
            found[name] = measured(name, run or in_child, given, notes, limit)
            if out:
                with redirect_stdout(None):  # the table has it
                    shape = {"card": facts, "sizes": "tiny" if given.tiny else "full"}
                    finish(shape, {"held": holds(found), "parts": found}, out)
    show(found)
    print("all checks hold" if holds(found) else "some checks FAILED")
    return 0 if holds(found) else 1


def asked(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.gpu_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, help="the results file")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toy sizes")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # in a child
    parser.add_argument("--notes", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def refuse(line: str) -> int:
    print(line, file=sys.stderr)
    return 2


def card(device: torch.device) -> dict[str, Any]:
    """What figures depend on besides the code; None where it is not known."""
    found: dict[str, Any] = {"date": datetime.now(UTC).isoformat(timespec="seconds")}
    for library in ("torch", "triton", "transformers", "flash-attn"):
        there = next(iter(metadata.distributions(name=library)), None)
        found[library] = there and there.version
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        found |= {"card": about.name, "capability": f"{about.major}.{about.minor}"}
        found |= {"processors": about.multi_processor_count, "memory_bytes": about.total_memory}
        found |= {"free_bytes": torch.cuda.mem_get_info(device)[0], "cuda": torch.version.cuda}
        driver = Path("/proc/driver/nvidia/version")
        version = re.search(r"\d+\.\d+[\d.]*", driver.read_text() if driver.exists() else "")
        found["driver"] = version and version.group()
    return found


# -- parts -----------------------------------------------------------------------------------------


def work(name: str, given: argparse.Namespace, notes: Notes) -> None:
    """Do one part."""
    module, function = PARTS[name][0].split(".")
    room = import_module(f"tests.bench.gpu_check.{module}")
    toy = room.TINY[function] if given.tiny else {}
    getattr(room, function)(torch.device(given.device), notes, **toy)


def measured(
    name: str, run: Callable[..., str | None], given: argparse.Namespace, notes: Notes, limit: float
) -> dict[str, Any]:
    """Run a part; that it runs to its end is a check too."""
    print(f"{name}, at most {limit:.0f} s", flush=True)
    began = time.monotonic()
    fault = run(name, given, notes, limit) if limit > 0 else "no time was left for it"
    notes.check(f"{name} runs to its end", fault)
    return {"s": time.monotonic() - began, "limit_s": limit, **notes.read()}


def in_child(name: str, given: argparse.Namespace, notes: Notes, limit_s: float) -> str | None:
    """Run a part in a process of its own, which no other part's broken GPU reaches; its fault."""
    command = [sys.executable, "-m", "tests.bench.gpu_check", "--device", given.device]
    command += [*["--tiny"] * given.tiny, "--part", name, "--notes", str(notes.file)]
    return watched(command, limit_s, notes.file.parent)


def watched(command: Sequence[str], limit_s: float, folder: Path) -> str | None:
    """Run a command; how it failed.

    Args:
        folder: for its temporary files, which outlive a process that is killed.
    """
    environment = {**os.environ, "TMPDIR": str(folder)}
    with subprocess.Popen(command, env=environment, start_new_session=True) as process:
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return f"stopped at its limit of {limit_s:.0f} s"
        finally:
            if process.poll() is None:  # Ctrl-C reaches this process alone
                os.killpg(process.pid, signal.SIGKILL)
    return f"ended with {code}" if code else None  # below 0: a signal


def here(name: str, given: argparse.Namespace, notes: Notes, limit_s: float) -> str | None:
    """Like `in_child`, in this process and without a limit."""
    try:
        work(name, given, notes)
    except Exception as error:
        traceback.print_exc()
        return f"{type(error).__name__}: {first_line(error)}"
    return None


# -- what is shown ---------------------------------------------------------------------------------


def holds(found: Found) -> bool:
    return all(check["held"] for part in found.values() for check in part["check"])


def show(found: Found) -> None:
    """The parts, the figures beside their aims, and what did not hold."""
    print(f"\n{'part':<16}{'s':>6}{'limit':>7}  checks that hold")
    for name, part in found.items():
        held = sum(check["held"] for check in part["check"])
        print(f"{name:<16}{part['s']:6.0f}{part['limit_s']:7.0f}  {held} of {len(part['check'])}")
    print(f"\n{'figure':<58}{'here':>12}")
    for part in found.values():
        for figure in part["figure"]:
            print(line(figure))
    for part in found.values():
        for check in part["check"]:
            if not check["held"]:
                print(f"FAILED  {check['what']}: {check['said']}")


def line(figure: Mapping[str, Any]) -> str:
    shown = f"{figure['what']:<58}{figure['value']:>12,.4g} {figure['unit']}"
    if figure["aim"]:
        reached = "reached" if figure["value"] >= figure["aim"] else "missed"
        shown += f"  (aim {figure['aim']:,.0f}: {reached})"
    return shown + (f"  ({figure['elsewhere']})" if figure["elsewhere"] else "")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
