"""A hub of our own, on this machine: slow, busy, with answers cut short. The text stays the same.

Each check runs in its own process, since the hub's client reads its address at import.
"""

from __future__ import annotations

import gzip
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import pytest

from residual_saes.data.errors import PipelineError, SettingError, StoreError
from residual_saes.data.text import hub, retry
from residual_saes.data.text.documents import State
from residual_saes.data.text.hub import HubText
from tests.stand_in_hub import Alone, Hub, serving

ROWS = 40
TEXTS = [
    f"row {i} " + chr(0x4E00 + i) * (2000 + i) for i in range(ROWS)
]  # 250 kB: a footer is read with 64 kB


def jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def in_parquet(texts: list[str], rows_in_group: int) -> bytes:
    import pyarrow
    from pyarrow import parquet

    file = BytesIO()
    table = pyarrow.table({"n": range(len(texts)), "text": texts})
    parquet.write_table(
        table, file, row_group_size=rows_in_group, compression="none", use_dictionary=False
    )
    return file.getvalue()


def two_files() -> dict[str, dict[str, bytes]]:
    """The same rows as two files of each form."""
    return {
        "jsonl": {"data/train-0.jsonl": jsonl(TEXTS[:25]), "data/train-1.jsonl": jsonl(TEXTS[25:])},
        "parquet": {
            "data/train-0.parquet": in_parquet(TEXTS[:25], 4),
            "data/train-1.parquet": in_parquet(TEXTS[25:], 100),
        },
    }


@contextmanager
def served(files: dict[str, bytes]) -> Iterator[tuple[Hub, list[float]]]:
    """A hub, and the list of waits (seconds) that were asked for; none is waited."""
    slept: list[float] = []
    retry.sleep = slept.append
    hub.BLOCK_BYTES = 30_000
    with serving(files) as server:
        yield server, slept


def texts(source: HubText, state: State = None) -> list[str]:
    return [str(document.content) for document in source.documents(state)]


# -- checks, each in a process of its own ----------------------------------------------------------


def check_restarts() -> None:
    for files in two_files().values():
        with served(files) as (server, slept):
            source = HubText("me/data")
            whole = list(source.documents(None))
            assert [document.content for document in whole] == TEXTS
            assert source.identity()["revision"] == server.commit
            for number in (*range(1, ROWS, 4), 12, 24, 26, ROWS):
                document = whole[number - 1]
                stored = json.dumps(document.after)
                assert len(stored) < 40
                server.ranges.clear()
                assert list(source.documents(json.loads(stored))) == whole[number:]
                if 12 < number < 25:
                    # But for two probes (size and footer), the first file's first quarter is not
                    # read.
                    size = len(next(iter(files.values())))
                    starts = [
                        start
                        for name, start, stop in server.ranges
                        if "-0." in name and stop - start > 4
                    ]
                    assert starts and min(starts) > size // 4
            assert not slept


def check_other_forms() -> None:
    """Compressed files, and one list of rows: read again up to their place, whatever fails."""
    import pyarrow

    halves = (TEXTS[:25], TEXTS[25:])
    forms: dict[str, Callable[[list[str]], bytes]] = {
        "jsonl.gz": lambda part: gzip.compress(jsonl(part)),
        "jsonl.zst": lambda part: pyarrow.compress(jsonl(part), codec="zstd", asbytes=True),
        "json": lambda part: json.dumps([{"text": text} for text in part], indent=1).encode(),
    }
    for form, made in forms.items():
        files = {f"data/train-{n}.{form}": made(part) for n, part in enumerate(halves)}
        with served(files) as (server, slept):
            source = HubText("me/data")
            whole = list(source.documents(None))
            assert [document.content for document in whole] == TEXTS
            for number in (1, 13, 24, 25, 26, ROWS):
                server.faults = [("/cdn/", (503, {})), ("/cdn/", None), ("/cdn/", "cut")]
                rest = list(source.documents(json.loads(json.dumps(whole[number - 1].after))))
                assert rest == whole[number:]
            assert slept


def check_every_request_may_fail() -> None:
    faults: list[Any] = [
        (429, {"Retry-After": "33"}),
        (503, {}),
        "cut",
        "drop",
        (500, {"RateLimit": '"a";r=0;t=9'}),
    ]
    for files in two_files().values():
        with served(files) as (server, slept):
            source = HubText("me/data")
            assert texts(source) == TEXTS
            requests = len(server.ranges)
            assert requests > 7
            for number in range(requests):
                fault = faults[number % len(faults)]
                slept.clear()
                server.faults = [("/cdn/", None)] * number + [("/cdn/", fault)]
                with redirect_stderr(StringIO()) as printed:
                    assert texts(source) == TEXTS, (number, fault)
                assert not server.faults
                headers = fault[1] if isinstance(fault, tuple) else {}
                asked = {"Retry-After": 33.0, "RateLimit": 9.0}
                expected = [asked[name] for name in headers] or [2.0]
                assert slept == expected
                assert len(printed.getvalue().splitlines()) == 1


def check_the_messages() -> None:
    files = two_files()["jsonl"]
    with served(files) as (server, slept):
        server.faults = [
            ("/api/datasets", (429, {})),
            ("/api/datasets", "drop"),
            ("/cdn/", (503, {})),
            ("/cdn/", "cut"),
        ]
        with redirect_stderr(StringIO()) as printed:
            assert texts(HubText("me/data")) == TEXTS
        assert slept == [2, 4, 2, 2] or slept == [2, 4, 2, 4], slept
        lines = printed.getvalue().splitlines()
        assert len(lines) == 4
        base = os.environ["HF_ENDPOINT"]
        url = f"{base}/datasets/me/data/resolve/{server.commit}/data/train-0.jsonl"
        facts = [
            ("HTTP 429", "me/data", "2 s", "1 of 8"),
            ("me/data", "4 s", "2 of 8"),
            ("HTTP 503", url, "2 s", "1 of 8"),
        ]
        for line, named in zip(lines, facts, strict=False):
            for fact in named:
                assert fact in line


def check_giving_up_and_going_on() -> None:
    files = two_files()["parquet"]
    with served(files) as (server, slept):
        source = HubText("me/data")
        stream = source.documents(None)
        taken = [next(stream) for _ in range(10)]
        server.faults = [
            ("/cdn/", (503, {"Retry-After": "9999"} if i == 3 else {})) for i in range(9)
        ]
        caught = ""
        try:
            taken += stream
        except StoreError as error:
            caught = str(error)
        assert "HTTP 503, 9 times" in caught and "the same command again" in caught
        assert slept == [2, 4, 8, 600, 32, 64, 120, 120]
        again = HubText("me/data")
        assert [d.content for d in taken] + texts(again, taken[-1].after) == TEXTS


def check_an_absent_hub_is_given_up_soon() -> None:
    files = two_files()["jsonl"]
    with served(files) as (server, slept):
        server.faults = [("/api/datasets", "drop")] * 9
        with redirect_stderr(StringIO()) as printed:
            require_refusal(lambda: texts(HubText("me/data")), "3 times", "text.path=", "text=tiny")
        assert slept == [2, 4]
        assert "2 of 2" in printed.getvalue()
        server.faults = [("/api/datasets", (503, {}))] * 9  # the hub is there, and busy
        answers = len(slept)
        require_refusal(lambda: texts(HubText("me/data")), "HTTP 503, 9 times", "text.path=")
        assert len(slept) == answers + 8
        server.faults = []
        assert texts(HubText("me/data")) == TEXTS
        server.faults = [("/api/datasets", "drop")] * 9
        answers = len(slept)
        require_refusal(lambda: texts(HubText("me/data")), "9 times", "the same command again")
        assert len(slept) == answers + 8


def check_refusals() -> None:
    with served(two_files()["jsonl"]) as (server, slept):
        for status, code, way_out in (
            (401, "GatedRepo", "HF_TOKEN"),
            (403, "GatedRepo", "HF_TOKEN"),
            (404, "RepoNotFound", "text=tiny"),
        ):
            server.faults = [("/api/datasets", (status, {"X-Error-Code": code}))]
            require_refusal(
                lambda: texts(HubText("me/data")), f"me/data .*HTTP {status}.*{way_out}"
            )
            source = HubText("me/data")
            assert source.identity()
            server.faults = [("/cdn/", (status, {}))]
            require_refusal(lambda source=source: texts(source), f"HTTP {status}")
        require_refusal(
            lambda: texts(HubText("nobody/nothing")), "text=tiny, which needs no network"
        )
        require_refusal(lambda: texts(HubText("me/data", split="test")), "split=test.* train")
        require_refusal(lambda: texts(HubText("me/data", config="none")), "none")
        server.whole = True
        require_refusal(lambda: texts(HubText("me/data")), "text.path=")
        assert not slept
    with served({"data/train-0.csv": b"text\na\n"}):
        require_refusal(
            lambda: texts(HubText("me/data")), "train-0.csv .*revision=refs/convert/parquet"
        )
    with served({"data/train-0.jsonl": b"", "data/train-1.jsonl": jsonl(TEXTS[:2])}):
        assert texts(HubText("me/data")) == TEXTS[:2]


def require_refusal(act: Callable[[], Any], *facts: str) -> None:
    """Check that `act` is refused in one line that names `facts` (regular expressions)."""
    with pytest.raises(PipelineError) as caught:
        act()
    assert "\n" not in str(caught.value)
    for fact in facts:
        assert re.search(fact, str(caught.value)), fact


@pytest.mark.parametrize(
    "check",
    [
        check_restarts,
        check_other_forms,
        check_every_request_may_fail,
        check_the_messages,
        check_giving_up_and_going_on,
        check_an_absent_hub_is_given_up_soon,
        check_refusals,
    ],
    ids=lambda check: check.__name__,
)
def test_against_a_hub(check: Callable[[], None], alone: Alone, tmp_path: Path) -> None:
    alone.run(check, tmp_path)


# -- without a network -----------------------------------------------------------------------------


def test_without_network_the_way_out_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "sleep", lambda _: pytest.fail("waited for a network that is off"))
    for act in (HubText("nobody/nothing").identity, lambda: texts(HubText("nobody/nothing"))):
        with pytest.raises(StoreError, match="text=tiny"):
            act()


def test_our_own_errors_are_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "sleep", lambda _: pytest.fail("tried again"))

    def refuse() -> None:
        raise SettingError("no")

    with pytest.raises(SettingError, match="no"):
        retry.persistent("it", refuse)
