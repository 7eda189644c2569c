"""Requests to the Hugging Face hub that are retried while their errors are temporary."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, TypeVar

from residual_saes.data.errors import (
    PipelineError,
    StoreError,
    TemporaryError,
    first_line,
    is_passing,
)
from residual_saes.data.journal import tell

T = TypeVar("T")

TRIES = 8  # retries: with the waits below, six minutes and six seconds
# Retries while no server answers and no text ever came: six seconds tell a machine is offline.
FIRST_TRIES = 2
LONGEST_S = 120.0  # cap of our own waits, which double from 2 s
LONGEST_ASKED_S = 600.0  # cap of the waits that a server asks for
sleep: Callable[[float], None] = time.sleep  # replaced where a wait must end early

text_came = threading.Event()  # set once this process has had bytes of any file from the hub

_TEMPORARY = (408, 425, 429, 500, 502, 503, 504)  # HTTP statuses that later requests may not meet


class ShortBody(ConnectionError):
    """A body shorter than was asked for."""


class Trouble(NamedTuple):
    """A temporary error."""

    reason: str  # HTTP status, or the exception's name
    asked_s: float  # seconds that the server asks to wait
    answered: bool  # whether a server answered at all


def persistent(what: str, request: Callable[[], T], way_out: str | None = None) -> T:
    """The result of `request`, retried with growing waits while its errors are temporary.

    Args:
        way_out: what the user may do; None: of a text.

    Raises:
        StoreError: refused for good.
        TemporaryError: still failing after `TRIES` retries (`FIRST_TRIES` where no server answers
            and no text has come before).
    """
    answered = False
    for number in range(1, TRIES + 2):
        try:
            return request()
        except PipelineError:
            raise
        except Exception as error:  # the hub's own kinds, its HTTP library's, and fsspec's
            trouble = _temporary(error)
            if trouble is None:
                raise StoreError(_refusal(what, error, way_out)) from error
            answered = answered or trouble.answered
            tries = TRIES if answered or text_came.is_set() else FIRST_TRIES
            if number > tries:
                raise TemporaryError(
                    f"{what} cannot be reached ({trouble.reason}, {number} times); "
                    f"{way_out or _way_out()}"
                ) from error
            wait = max(min(2.0**number, LONGEST_S), min(trouble.asked_s, LONGEST_ASKED_S))
            tell(
                f"{'' if way_out else 'text: '}{trouble.reason} from {what}, "
                f"trying again in {wait:.0f} s ({number} of {tries})"
            )
            sleep(wait)
    raise AssertionError("the last try returns or raises")


def may_pass(error: BaseException) -> bool:
    """Whether what a server or the disk answered may be gone at another time."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    causes = [*_causes(error)]
    # A setting keeps a machine offline, though the client calls it a failed connection.
    decided = any(
        isinstance(cause, OfflineModeIsEnabled) or getattr(cause, "response", None) is not None
        for cause in causes
    )
    return _temporary(error) is not None or (not decided and any(map(is_passing, causes)))


def _way_out() -> str:
    if text_came.is_set():
        return "everything committed stays: the same command again goes on from there"
    return "check the network; or give text.path=FILES, or text=tiny, which needs no network"


def _temporary(error: BaseException) -> Trouble | None:
    """What is temporary about `error`; None for an error that a retry does not help."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    for cause in _causes(error):
        if isinstance(cause, OfflineModeIsEnabled):
            return None
        response = getattr(cause, "response", None)
        if response is not None:
            if response.status_code not in _TEMPORARY:
                return None
            return Trouble(f"HTTP {response.status_code}", _asked_s(response.headers), True)
        # By name: the hub's client has changed its HTTP library twice, and kept the base's name.
        kinds = {kind.__name__ for kind in type(cause).__mro__}
        network = kinds & {"RequestError", "RequestException"}
        if network or isinstance(cause, ConnectionError | TimeoutError):
            return Trouble(type(cause).__name__, 0.0, False)
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and those that led to it, first cause first: wrappers hide an answer's status."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    yield from reversed(chain)


def _asked_s(headers: Mapping[str, str]) -> float:
    """Seconds that a server asks to wait (Retry-After, or `t` of the hub's RateLimit), else 0."""
    after = headers.get("Retry-After", "").strip()
    if re.fullmatch(r"\d+(\.\d+)?", after):
        return float(after)
    window = re.search(r"\bt=(\d+)", headers.get("RateLimit", ""))
    return float(window[1]) if window else 0.0


def _refusal(what: str, error: Exception, way_out: str | None) -> str:
    """The message for an error that a retry does not help."""
    answers = (getattr(cause, "response", None) for cause in _causes(error))
    status = next((answer.status_code for answer in answers if answer is not None), None)
    if status in (401, 403):
        return (
            f"{what} is not open to you (HTTP {status}): check its name, or accept its terms and "
            "set HF_TOKEN"
        )
    reason = f"HTTP {status}" if status else type(error).__name__
    way_out = way_out or (
        "check the name and the network, use text.path=FILE, or text=tiny, which needs no network"
    )
    return f"{what} cannot be opened ({reason}: {first_line(error)[:200]}); {way_out}"
