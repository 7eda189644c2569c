"""The one file that knows Hydra: how a command line starts, what it is refused with, and how it
ends.

A command is a function of plain settings and of the `Job` that they come from. `start` runs it as a
command line.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from conf.help import described
from conf.names import quoted, require_no_secret, texts
from data import secrets, stopping
from data.errors import (
    AGAIN,
    Interrupted,
    PipelineError,
    SettingError,
    first_line,
    is_passing,
    is_wrong_name,
)
from data.journal import heartbeat, shown

if TYPE_CHECKING:  # hydra and omegaconf take 0.3 s to load: `start` first makes Ctrl-C quiet
    from omegaconf import DictConfig

ENVIRONMENT = {
    # Waiting OpenMP threads sleep instead of spinning. With one of two cores taken by another
    # program, spinning cost training a factor of 5 (3,228 against 15,459 tokens/s; d 384, d_sae
    # 4,096). No bit depends on it. OpenMP reads it when torch loads.
    "OMP_WAIT_POLICY": "passive",
    # cuBLAS repeats its bits only with a workspace of fixed size. CUDA reads it when it starts.
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    # Hydra's refusals come to `run_main`, which prints one line.
    "HYDRA_FULL_ERROR": "1",
}


class Job(NamedTuple):
    """Where a command's settings come from."""

    multirun: bool = False  # one of several jobs of `-m`
    overrides: Sequence[str] = ()  # NAME=VALUE, as the job's part of the command line has them


ALONE = Job()


def start(name: str, module: str) -> None:
    """Run the command line whose settings are conf/NAME.yaml.

    Args:
        module: has the function `command(settings, job)`. It is loaded here, behind the
            environment.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while libraries load: no traceback
    stopping.answer_early()
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    sys.excepthook = print_defect
    run_command(lambda: require_no_secret(sys.argv[1:]))  # before Hydra writes or repeats one
    with heartbeat(f"{name}: loading libraries"):
        import hydra
        from hydra.errors import HydraException
        from omegaconf.errors import OmegaConfBaseException

        import_module(module)
    sys.argv[1:] = quoted(sys.argv[1:])
    if isinstance(sys.stdout, io.TextIOWrapper):  # names that the terminal's encoding lacks
        sys.stdout.reconfigure(errors="backslashreplace")

    @hydra.main(version_base="1.3", config_path=".", config_name=name)
    def main(cfg: DictConfig) -> None:
        command = import_module(module).command
        if is_multirun():
            # A launcher must see what went wrong, and would take an exit for an answer.
            with _cleaned():
                command(plain(cfg), current_job())
        else:
            run_command(lambda: command(plain(cfg), current_job()))

    stopping.watch()
    try:
        run_main(
            main, (HydraException, OmegaConfBaseException), lambda: described(name, sys.argv[1:])
        )
    except SystemExit as end:
        stopping.leave(end)
        raise


def plain(cfg: DictConfig) -> dict[str, Any]:
    """Hydra's settings as plain values.

    Raises:
        SettingError: a value refers to a setting that is not there, or is a secret.
    """
    from omegaconf import OmegaConf

    with _resolving():
        settings = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(settings, dict)
    if found := secrets.kind_in_settings(settings):
        name, kind = found
        raise SettingError(f"{name}= holds {kind}; {secrets.BELONG}")
    return texts({str(key): value for key, value in settings.items()})


def is_multirun() -> bool:
    """Whether the job that Hydra runs at present is one of a multirun."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    return bool(HydraConfig.get().mode == RunMode.MULTIRUN)


def current_job() -> Job:
    """The job that Hydra runs at present.

    Raises:
        SettingError: a value refers to a setting that is not there.
    """
    from hydra.core.hydra_config import HydraConfig

    with _resolving():
        return Job(is_multirun(), tuple(HydraConfig.get().overrides.task))


def enter_folder(folder: str, settings: Mapping[str, Any]) -> None:
    """Go to the folder where a multirun was given; a launcher may run its jobs in another one.

    What is relative is meant from there: the defaults of store= and run= are.

    Raises:
        SettingError: a default is needed, and this machine does not have the folder.
    """
    try:
        os.chdir(folder)
    except OSError as error:
        unnamed = [f"{name}=" for name in ("store", "run") if settings.get(name, "") is None]
        if unnamed:
            raise SettingError(
                f"{folder}, where the command was given, is not on this machine "
                f"({error.strerror}); give {' and '.join(unnamed)} a place that all machines share"
            ) from error


@contextmanager
def _resolving() -> Iterator[None]:
    """Refuse a ${...} that leads nowhere."""
    from omegaconf.errors import OmegaConfBaseException

    try:
        yield
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise SettingError(f"{reason}; ${{NAME}} in a value stands for another setting") from error


@contextmanager
def _cleaned() -> Iterator[None]:
    """Let no secret leave by an exception: launchers log and pickle it with its causes."""
    try:
        yield
    except Exception as error:
        if (clean := secrets.cleaned(error)) is not error:
            raise clean from None
        raise


def print_defect(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Print a traceback as the interpreter does, without secrets."""
    for part in traceback.format_exception(kind, error, trace):
        for line in part.splitlines():
            print(shown(line), file=sys.stderr)


def run_main(
    main: Callable[[], None], refusals: tuple[type[Exception], ...], help_text: Callable[[], str]
) -> None:
    """Run a command line, or print its help.

    Args:
        main: parses the settings and runs the command by `run_command`.
        refusals: exceptions by which the parser refuses settings. They exit like a `PipelineError`.
        help_text: makes what --help prints.
    """
    stopping.answer_signals()  # while libraries loaded, they ended the process at once
    wants_help = {"--help", "-h"} & {*sys.argv[1:]}
    try:
        run_command((lambda: print(help_text())) if wants_help else main)
    except refusals as error:
        _refuse(_one_line(str(error)), 2)


def run_command(command: Callable[[], None]) -> None:
    """Run a command. Exceptions that the user can mend become one line and an exit code."""
    try:
        command()
    except PipelineError as error:
        _refuse(str(error), error.exit_code)
    except BrokenPipeError:
        # The reader has seen enough, as `head` does. A pipe that stays closed would make the
        # interpreter complain when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        reason = ": ".join(str(part) for part in (error.filename, error.strerror) if part)
        if is_passing(error):
            _refuse(f"{reason or first_line(error)}; {stopping.KEPT}", AGAIN)
        if not is_wrong_name(error):
            raise
        _refuse(f"{reason}; choose another place", 2)
    except Exception as error:  # torch, whose class it may be, is not loaded for this
        if type(error).__name__ not in ("MemoryError", "OutOfMemoryError"):
            raise
        reason = f"out of memory ({first_line(error)[:200]})"
        _refuse(f"{reason}; take a smaller batch= or another device=; {stopping.KEPT}", 2)
    except Interrupted as stop:
        _tell_stopped(stop)
        sys.exit(stop.exit_code)
    except KeyboardInterrupt:
        _tell_stopped("SIGINT")
        sys.exit(130)


def _refuse(message: str, code: int) -> NoReturn:
    print(f"error: {shown(message)}", file=sys.stderr, flush=True)
    sys.exit(code)


def _tell_stopped(reason: object) -> None:
    with stopping.telling:
        stopping.told.set()
        print(f"stopped by {reason}; {stopping.KEPT}", file=sys.stderr, flush=True)


# A launcher as Hydra names it when it is missing, its plugin, and our extra.
_LAUNCHERS = (
    ("submitit_", "hydra-submitit-launcher", "slurm"),
    ("joblib", "hydra-joblib-launcher", "joblib"),
)


def _one_line(refusal: str) -> str:
    """Hydra's refusal on one line, without its search paths, and with the way out."""
    text = refusal.split("Config search path:")[0]
    for named, plugin, extra in _LAUNCHERS:
        if f"hydra/launcher/{named}" in text:
            return f"this launcher needs {plugin}: pip install 'residual-saes[{extra}]'"
    unknown, is_unknown, _ = text.partition("To append to your config")
    if is_unknown:
        return unknown.strip().rstrip(".") + ": no such setting; --help lists them all"
    malformed, is_malformed, _ = text.partition("See https://")
    if "override" in text and is_malformed:
        way_out = "a value with signs or spaces needs quotes: \"NAME='a=b'\""
        return f"{' '.join(malformed.split())}; {way_out}"
    return " ".join(text.split())
