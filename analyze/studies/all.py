"""The studies of the model card, one after the other, with one load of the language model.

What a study needs comes before it: answers before what reads them, the loss of the splice before
SAEBench's file, and the report, which shows all, last. A study that is refused does not stop the
others. Each is kept once it is done, so the same command again does what is left.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

from residual_saes.analyze.outcome import Outcome
from residual_saes.analyze.questions.answering import NoProblemsError
from residual_saes.analyze.study import Definition, Study, find
from residual_saes.data.errors import (
    AGAIN,
    PipelineError,
    SettingError,
    TemporaryError,
    caused,
    first_line,
    is_passing,
)
from residual_saes.data.journal import tell
from residual_saes.data.machine import is_out_of_memory

ORDER = (
    "quality",
    "gsm8k",
    "contrast",
    "steering",
    "stage_gate",
    "logit_lens",
    "reason_score",
    "splice",
    "saebench",
    "catalogue",
    "report",
)


def every(study: Study) -> Outcome:
    """Do each study of `ORDER` that is among the settings.

    Raises:
        SettingError: some could not be done, or a setting is of no study.
        TemporaryError: some could not be done, and one of these may be done later.
    """
    for name, options in study.options.items():
        if name not in ORDER or not isinstance(options, Mapping):
            raise SettingError(
                f"study.{name}={options} is no study's settings; studies are {', '.join(ORDER)}, a "
                "setting is study.NAME.SETTING=, and ~study.NAME leaves one out"
            )
    wanted = [name for name in ORDER if name in study.options]
    left_out: dict[str, str] = {}
    refused: dict[str, PipelineError] = {}
    for number, name in enumerate(wanted, 1):
        tell(f"study={name}, {number} of {len(wanted)}")
        options = {key: value for key, value in study.options[name].items() if key != "name"}
        part = replace(study, name=name, options=options)
        definition = find(name)
        if reason := definition.refuses(study.subject, options):
            left_out[name] = reason
            continue
        try:
            outcome = _refusing(partial(part.perform, definition))
        except NoProblemsError as error:
            left_out[name] = str(error)
        except PipelineError as error:
            tell(f"study={name} cannot be done: {error}")
            refused[name] = error
        else:
            part.show(definition, outcome)
    lines = [f"study={name} was left out: {reason}" for name, reason in left_out.items()]
    if refused:
        tell(*lines)
        raise _refusal(refused, len(wanted))
    return Outcome({}, [*lines, f"{len(wanted) - len(left_out)} studies are done"])


def _refusing(perform: Callable[[], Outcome]) -> Outcome:
    """What `perform` gives; what the machine refuses, as a command would end with it."""
    try:
        return perform()
    except OSError as error:
        if not is_passing(error):
            raise
        raise caused(error, first_line(error), "") from error
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise SettingError(f"out of memory ({first_line(error)[:200]})") from error


def _refusal(refused: dict[str, PipelineError], wanted: int) -> PipelineError:
    """The error of the whole command."""
    reasons = "; ".join(f"{name}: {error}" for name, error in refused.items())
    text = (
        f"{len(refused)} of {wanted} studies could not be done, and the same command again goes on "
        f"with these: {reasons}"
    )
    passing = any(error.exit_code == AGAIN for error in refused.values())
    return TemporaryError(text) if passing else SettingError(text)


DEFINITION = Definition(every, fresh=True, finds=False)
