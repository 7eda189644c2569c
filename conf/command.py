"""The one file that knows Hydra: how a command line starts, what it is refused with, and how it
ends.

A command is a function of plain settings and of the `Job` that they come from. `start` runs it as a
command line.
"""

from __future__ import annotations

import io
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from residual_saes.conf import early, meant, schema
from residual_saes.conf.help import described
from residual_saes.conf.names import quoted, require_no_secret, texts, typed
from residual_saes.data import command_line, machine, secrets, stopping
from residual_saes.data.errors import Interrupted, PipelineError, SettingError, first_line
from residual_saes.data.journal import heartbeat, show, shown, tell, tell_stopped
from residual_saes.data.settings import require_like

if TYPE_CHECKING:  # hydra and omegaconf take 0.3 s to load: `start` first makes Ctrl-C quiet
    from omegaconf import DictConfig

ENVIRONMENT = {
    # Waiting OpenMP threads sleep instead of spinning. With one of two cores taken by another
    # program, spinning cost training a factor of 5 (3,228 against 15,459 tokens/s; d 384, d_sae
    # 4,096). No bit depends on it. OpenMP reads it when torch loads.
    "OMP_WAIT_POLICY": "passive",
    # cuBLAS repeats its bits only with a workspace of fixed size. CUDA reads it when it starts.
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    # Libraries draw no bars of their own into our line; `heartbeat` and hub_model.py tell instead.
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}


# What decides how much memory a command takes, and where it is set anew: with other values a store
# or a run that is begun does not go on.
_OF_MEMORY = {
    "harvest": (("batch", "context", "unit", "model.dtype"), " in another store="),
    "train": (("batch", "sae.d_sae"), " in another run="),
    "analyze": (("study.rows", "answers.batch", "answers.new_tokens"), ""),
}
# From the start of a command until Hydra is through: what is raised then is no error of our code.
_starting = threading.Event()


class Job(NamedTuple):
    """Where a command's settings come from."""

    multirun: bool = False  # one of several jobs of `-m`
    overrides: Sequence[str] = ()  # NAME=VALUE, as the job's part of the command line has them
    shared: frozenset[str] = frozenset()  # names of those that all jobs of the multirun have

    @property
    def given(self) -> set[str]:
        """Names of the settings and groups that the command line gives."""
        return {override.partition("=")[0].lstrip("+~") for override in self.overrides}


ALONE = Job()


def start(name: str, module: str) -> None:
    """Run the command line whose settings are conf/NAME.yaml.

    Args:
        module: has the function `command(settings, job)`. It is loaded here, behind the
            environment.
    """
    command_line.take(name, sys.argv[1:])
    stopping.left = stopping.Left(command=shown(command_line.again()), tell=tell_stopped)
    stopping.answer_early()
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # else Hydra ends the command itself, and not in a line
    sys.excepthook = print_defect
    _starting.set()
    asked = [word for word in sys.argv[1:] if word in ("--help", "-h", "--version")]
    try:
        if "--version" in asked:
            run_command(lambda: print(f"residual-saes {metadata.version('residual-saes')}"))
        elif asked or sys.argv[1:] == ["help"]:
            run_command(lambda: _show_help(name, sys.argv[1:]))
        else:
            run_command(lambda: _run_by_hydra(name, module))
    except SystemExit as end:
        stopping.leave(end)
        raise
    finally:
        _flush_standard_streams()


def _show_help(name: str, words: Sequence[str]) -> None:
    """Print every setting of the command, of the options that the command line chooses."""
    require_no_secret(words, name)
    show(*described(name, words).splitlines())


def _run_by_hydra(name: str, module: str) -> None:
    """Have Hydra make the settings and call the command with them."""
    _open_standard_streams()
    _require_folder()
    words = sys.argv[1:]
    require_no_secret(words, name)  # before Hydra writes or repeats one
    if refusal := meant.foreign_options(name, words):
        raise SettingError(refusal)
    sys.argv[1:] = quoted(words, name)

    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    @hydra.main(version_base="1.3", config_path=".", config_name=name)
    def main(cfg: DictConfig) -> None:
        smaller = _smaller(name, cfg)
        if is_multirun():
            # A launcher must see what went wrong, and would take an exit for an answer.
            with _cleaned(), machine.answering(smaller):
                _carry_out(cfg, module)
        else:
            run_command(lambda: _carry_out(cfg, module), smaller)

    try:
        main()
    except (HydraException, OmegaConfBaseException) as error:
        refusal = meant.advice(name, words) if _starting.is_set() else None
        raise SettingError(refusal or _one_line(name, str(error))) from error
    except Exception as error:
        if not _starting.is_set() or isinstance(error, PipelineError | OSError):
            raise
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise SettingError(f"Hydra made no settings of the command line: {reason}") from error


def _carry_out(cfg: DictConfig, module: str) -> None:
    """Run the command on settings that Hydra has made."""
    settings, job = begin(cfg, module)
    import_module(module).command(settings, job)


def _open_standard_streams() -> None:
    """Give a command that was started without stdin, stdout or stderr an empty one.

    The next files would take their numbers, and what a library prints would go into a store.
    """
    while (handle := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(handle, True)
    os.close(handle)
    sys.stdout = sys.stdout or os.fdopen(1, "w")
    sys.stderr = sys.stderr or os.fdopen(2, "w")
    if isinstance(sys.stdout, io.TextIOWrapper):  # names that the terminal's encoding lacks
        sys.stdout.reconfigure(errors="backslashreplace")


def _require_folder() -> None:
    """Raise SettingError if the working directory was removed: not even torch loads there."""
    try:
        os.getcwd()
    except OSError as error:
        raise SettingError(
            f"the folder in which this command was given is gone ({error.strerror}); cd to one "
            "that is there"
        ) from error


def _flush_standard_streams() -> None:
    """Have the interpreter, which flushes them as it ends, find nothing that fails."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # a pipe without a reader, or a full disk
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def begin(cfg: DictConfig, module: str) -> tuple[dict[str, Any], Job]:
    """The settings of the job that Hydra runs at present, and where they come from.

    The first job of a command loads `module`, which takes seconds: what can be refused before is.

    Raises:
        SettingError: a value has another type than its default, or refers to a setting that is not
            there.
    """
    settings = plain(cfg)
    job = current_job()
    _require_types(settings)
    if _starting.is_set():
        with heartbeat(f"{module.split('.')[-2]}: loading libraries"):
            import_module(module)
        stopping.watch()  # while libraries loaded, signals ended the process at once
        _starting.clear()
    return settings, job


def _require_types(settings: Mapping[str, Any]) -> None:
    """Refuse text where a setting's default is a number, and what else needs no library to refuse.

    Raises:
        SettingError: names the first such setting.
        StoreError: there is no such run.
    """
    from hydra.core.hydra_config import HydraConfig

    hydra = HydraConfig.get()
    values = schema.flat(settings)
    for name, default in schema.defaults(str(hydra.job.config_name), hydra.runtime.choices).items():
        if values.get(name) is not None and not name.startswith("text.sources."):  # weights
            require_like(name, values[name], default)
    early.require_right(str(hydra.job.config_name), values)


def _smaller(name: str, cfg: DictConfig) -> str:
    """What a command says where memory is missing."""
    from omegaconf import OmegaConf

    settings, where = _OF_MEMORY.get(name, ((), ""))
    values = {setting: OmegaConf.select(cfg, setting) for setting in settings}
    listed = [f"{setting}={value}" for setting, value in values.items() if value is not None]
    device = "take a device= with more memory"
    return f"lower {' or '.join(listed)}{where}, or {device}" if listed else device


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
    return typed(texts({str(key): value for key, value in settings.items()}))


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
        hydra = HydraConfig.get()
        # Put there by hydra_plugins/all_jobs.py.
        shared = frozenset(hydra.job.config.override_dirname.exclude_keys)
        return Job(is_multirun(), tuple(hydra.overrides.task), shared)


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


def run_command(command: Callable[[], None], smaller: str = "") -> None:
    """Run a command. Exceptions that the user can mend become one line and an exit code.

    Args:
        smaller: what to lower where memory is missing.
    """
    try:
        with machine.answering(smaller):
            command()
            sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough, as `head` does
        _flush_standard_streams()
        sys.exit(128 + signal.SIGPIPE)
    except PipelineError as error:
        _refuse(str(error), error.exit_code)
    except Interrupted as stop:
        _tell_stopped(stop)
        sys.exit(stop.exit_code)
    except KeyboardInterrupt:
        _tell_stopped("SIGINT")
        sys.exit(130)


def _refuse(message: str, code: int) -> NoReturn:
    tell(f"error: {message}")
    sys.exit(code)


def _tell_stopped(reason: object) -> None:
    with stopping.telling:
        stopping.told.set()
        tell_stopped(str(reason))


# A launcher as Hydra names it when it is missing, and its plugin.
_LAUNCHERS = (
    ("submitit_", "hydra-submitit-launcher"),
    ("joblib", "hydra-joblib-launcher"),
)


def _one_line(name: str, refusal: str) -> str:
    """Hydra's refusal on one line, without its search paths, and with the way out."""
    text = refusal.split("Config search path:")[0]
    for named, plugin in _LAUNCHERS:
        if f"hydra/launcher/{named}" in text:
            return f"this launcher needs {plugin}: pip install {plugin}"
    if several := re.match(r"Ambiguous value for argument '(.+?)'\s", text):
        command = f"python -m {meant.module_of(name)} -m {several[1]}"
        return f"{several[1]}: several values are a sweep, as in `{command}`; a list is in brackets"
    unknown, is_unknown, _ = text.partition("To append to your config")
    if is_unknown:
        return unknown.strip().rstrip(".") + ": no such setting; --help lists them all"
    malformed, is_malformed, _ = text.partition("See https://")
    if "override" in text and is_malformed:
        way_out = "a value with signs or spaces needs quotes: \"NAME='a=b'\""
        return f"{' '.join(malformed.split())}; {way_out}"
    return " ".join(text.split())
