"""Whatever the environment is like, a command works or says in one line why it cannot."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import residual_saes.harvest.command
from tests.conftest import make_store
from tests.forked import run_forked

assert residual_saes.harvest.command.command
ROOT = Path(__file__).parent.parent
OPTIONS = ["sae=tiny", "sae.d_sae=64", "sae.k=8", "sae.k_aux=16", "optim=tiny", "batch=128"]
TRAIN = ["-m", "train", *OPTIONS, "eval_rows=256", "tokens=640"]
HARVEST = ["-m", "harvest", "model=tiny", "text=tiny", "layer=2", "context=64", "unit=1024"]
GROUP = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def at_most(what: int, most: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(what, (most, most))


def ignoring(*signals: signal.Signals) -> Callable[[], None]:
    def ignore() -> None:
        for signum in signals:
            signal.signal(signum, signal.SIG_IGN)

    return ignore


def mask(bits: int) -> Callable[[], None]:
    def change() -> None:
        os.umask(bits)

    return change


def closed(*handles: int) -> Callable[[], None]:
    def close() -> None:
        for handle in handles:
            os.close(handle)

    return close


def into_a_full_disk(handle: int) -> Callable[[], None]:
    def turn() -> None:
        os.dup2(os.open("/dev/full", os.O_WRONLY), handle)

    return turn


def in_a_removed_folder() -> None:
    os.mkdir("gone")
    os.chdir("gone")
    os.rmdir("../gone")


def beside_modules_of_the_user() -> None:
    for name in ("conf", "data", "train", "harvest"):
        os.mkdir(name)
        Path(name, "__init__.py").write_text("raise SystemExit(7)")
    Path("json.py").write_text("raise SystemExit(7)")


# -- what a running interpreter shows --------------------------------------------------------------

QUICK: dict[str, Callable[[], object]] = {
    "removed folder": in_a_removed_folder,
    "umask 777": mask(0o777),
    "4 open files more": at_most(resource.RLIMIT_NOFILE, 12),
    "files of no byte": at_most(resource.RLIMIT_FSIZE, 0),
    "stdin closed": closed(0),
    "stderr closed": closed(2),
    "stdout full": into_a_full_disk(1),
    "half a rank": lambda: os.environ.update(RANK="3"),
    "an odd rank": lambda: os.environ.update(RANK="²"),
    "an odd world": lambda: os.environ.update(RANK="0", WORLD_SIZE="none"),
    "an odd array": lambda: os.environ.update(
        SLURM_ARRAY_TASK_ID="3", SLURM_ARRAY_TASK_STEP="0", SLURM_ARRAY_TASK_COUNT="0"
    ),
    "no home": lambda: os.environ.pop("HOME", None),
    "Hydra's own errors": lambda: os.environ.update(HYDRA_FULL_ERROR="0"),
    "no columns": lambda: os.environ.update(COLUMNS="0", TERM="dumb"),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made") / "s.zarr"
    values = np.random.default_rng(0).normal(size=(128, 8)).astype(np.float32)
    make_store(path, (values.view(np.uint32) >> 16).astype(np.uint16))
    return path


@pytest.mark.parametrize("name", QUICK)
def test_a_look_at_a_store_works_or_says_in_one_line_why_not(
    name: str, made: Path, tmp_path: Path
) -> None:
    code = (
        "from tests import test_environments as here\n"
        "from residual_saes.conf.command import start\n"
        f"here.QUICK[{name!r}]()\n"
        "start('harvest', 'residual_saes.harvest.command')"
    )
    refused = ["no=such"] if name == "Hydra's own errors" else []
    ended = run_forked("-c", code, "action=status", f"store={made}", *refused, cwd=tmp_path)
    require_a_line(ended.returncode, ended.stderr)


def require_a_line(code: int | str, said: str) -> None:
    assert "Traceback" not in said and "Exception ignored" not in said, said
    assert code in (0, 2, 75), said
    if code and said:
        assert re.search(r"^(\w+: )?error: .+|^.*error.*$", said, re.MULTILINE), said


# -- what only a new one shows ---------------------------------------------------------------------


# Name -> (command, variables, what is done before). A variable that is None is not set.
FRESH: dict[str, tuple[list[str], Mapping[str, Any], Callable[[], object] | None]] = {}
for _name, _value in (
    *(("HOME", value) for value in (None, "/nonexistent", "/proc", __file__)),
    *(("TMPDIR", value) for value in ("/nonexistent", "/proc", __file__)),
    *(("XDG_CACHE_HOME", value) for value in ("/proc/x", __file__)),
    *(("HF_HOME", value) for value in ("/proc/x", __file__)),
    *(("HF_HUB_OFFLINE", value) for value in ("1", "maybe", "")),
    ("HF_HUB_DOWNLOAD_TIMEOUT", "abc"),
    ("HF_HUB_ETAG_TIMEOUT", "abc"),
    ("HF_HUB_VERBOSITY", "abc"),
    ("TRANSFORMERS_VERBOSITY", "abc"),
    ("DATASETS_VERBOSITY", "abc"),
    ("HF_DATASETS_IN_MEMORY_MAX_SIZE", "abc"),
    ("HF_ENDPOINT", "nonsense://"),
    ("MPLCONFIGDIR", "/proc/x"),
    ("LC_ALL", "xx_YY.bad"),
    ("PYTHONIOENCODING", "ascii"),
    ("PYTHONOPTIMIZE", "2"),
    ("PYTHONDEVMODE", "1"),
    ("PYTHONWARNINGS", "error"),
    ("PYTHONSAFEPATH", "1"),
    ("PYTHONHASHSEED", "0"),
    ("PYTHONPYCACHEPREFIX", "/proc/x"),
    *(("OMP_NUM_THREADS", value) for value in ("0", "abc", "-1", "1000")),
    ("MKL_NUM_THREADS", "abc"),
    *(("CUDA_VISIBLE_DEVICES", value) for value in ("-1", "abc", "99", "")),
    *(("RANK", value) for value in ("0", "3", "abc", "9" * 40)),
    *(("WORLD_SIZE", value) for value in ("0", "abc")),
    *(("LOCAL_RANK", value) for value in ("99", "x")),
    *(("SLURM_PROCID", value) for value in ("x", "-1")),
    *(("HYDRA_FULL_ERROR", value) for value in ("0", "1", "x")),
    *(("COLUMNS", value) for value in ("0", "abc")),
    ("TERM", "dumb"),
    ("NO_COLOR", "1"),
    ("TZ", "Mars/Phobos"),
    ("ALL_PROXY", "socks9://x"),
    ("https_proxy", "nonsense"),
    ("PATH", None),
    ("TORCH_LOGS", "abc"),
    ("PYTORCH_CUDA_ALLOC_CONF", "abc"),
    ("RAYON_NUM_THREADS", "abc"),
    ("TOKENIZERS_PARALLELISM", "abc"),
):
    FRESH[f"{_name}={str(_value)[:20]}"] = (HARVEST, {_name: _value}, None)
for _name, _before in {
    "umask 777": mask(0o777),
    "umask 000": mask(0),
    "stdin closed": closed(0),
    "stdout closed": closed(1),
    "stderr closed": closed(2),
    "all closed": closed(0, 1, 2),
    "stderr full": into_a_full_disk(2),
    **{f"{n} open files": at_most(resource.RLIMIT_NOFILE, n) for n in (8, 16, 24, 40, 64)},
    **{f"files of {n} bytes": at_most(resource.RLIMIT_FSIZE, n) for n in (0, 1024, 65536)},
    **{f"{n} MB of memory": at_most(resource.RLIMIT_AS, n << 20) for n in (300, 1000, 2500)},
    "256 kB of stack": at_most(resource.RLIMIT_STACK, 1 << 18),
    "SIGPIPE, SIGHUP, SIGINT ignored": ignoring(signal.SIGPIPE, signal.SIGHUP, signal.SIGINT),
    "SIGCHLD ignored": ignoring(signal.SIGCHLD),
    "a removed folder": in_a_removed_folder,
    "modules of the user": beside_modules_of_the_user,
}.items():
    # The installed command does not look in the working directory either.
    FRESH[_name] = (HARVEST, {"PYTHONSAFEPATH": "1"}, _before)
    if "files" in _name or "closed" in _name or "memory" in _name:
        FRESH[f"train: {_name}"] = (TRAIN, {}, _before)
for _name, _values in {
    "train: half a group": {"RANK": "0", "WORLD_SIZE": "2"},
    "train: no such rank": {**GROUP, "RANK": "3"},
    "train: an odd port": {**GROUP, "MASTER_PORT": "abc"},
    "train: port 99999": {**GROUP, "MASTER_PORT": "99999"},
    "train: no world": {"RANK": "1"},
    "train: an odd task": {"SLURM_PROCID": "x", "SLURM_LOCALID": "z"},
    "train: warnings": {"PYTHONWARNINGS": "error"},
    "train: no asserts": {"PYTHONOPTIMIZE": "2"},
    "train: ascii": {"PYTHONIOENCODING": "ascii"},
}.items():
    FRESH[_name] = (TRAIN, _values, None)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store to train on."""
    path = tmp_path_factory.mktemp("small") / "s.zarr"
    code, said = fresh([*HARVEST, "tokens=4000", f"store={path}"], {}, None, path.parent)
    assert code == 0, said
    return path


def fresh(
    command: list[str],
    variables: Mapping[str, Any],
    before: Callable[[], object] | None,
    folder: Path,
) -> tuple[int | str, str]:
    """Exit code, or "hung", and stderr of a command in an interpreter of its own."""
    environment: dict[str, Any] = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    set_ones = {name: value for name, value in environment.items() if value is not None}
    with (folder / "stderr").open("w+") as said:
        child = subprocess.Popen(
            [sys.executable, *command],
            env=set_ones,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=said,
            preexec_fn=before,
            start_new_session=True,
        )
        try:
            code: int | str = child.wait(240)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            code = "hung"
        said.seek(0)
        return code, said.read()


@pytest.mark.long
@pytest.mark.parametrize("name", FRESH)
def test_a_command_works_or_says_in_one_line_why_not(
    name: str, tmp_path: Path, small: Path
) -> None:
    command, values, before = FRESH[name]
    places = [f"store={small}", f"run={tmp_path}/run"]
    if command is HARVEST:
        places = ["tokens=2000", f"store={tmp_path}/s.zarr"]
    require_a_line(*fresh([*command, *places], values, before, tmp_path))
