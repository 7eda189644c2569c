"""Questions to the model behind the pages: what is answered, to whom, and how it ends."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from residual_saes.analyze.pages.browser import live as lives
from residual_saes.analyze.pages.browser.live import Live
from residual_saes.analyze.pages.browser.serve import ASKING, server
from residual_saes.analyze.studies import features, steer
from residual_saes.analyze.study import Study

TEXT = "Tom has 7 apples and 3 pears."
STEER = {"prompt": "Tom has", "feature": 0, "scale": [0, 4], "new_tokens": 6}


@pytest.fixture(scope="module")
def answered(tiny_browser: Study) -> Callable[..., list[dict[str, Any]]]:
    """Asks a model that stays loaded."""
    live = Live(tiny_browser)
    return lambda name, **request: list(live.answer(name, request, lambda: False))


@pytest.fixture(scope="module")
def port(tiny_browser: Study) -> Iterator[int]:
    """Of a server with the model."""
    with server(tiny_browser.place, 0, Live(tiny_browser)) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield running.server_port
        running.shutdown()
        thread.join()


def post(port: int, body: bytes, path: str = "/live/features", **headers: str | None) -> bytes:
    """The answer to a POST; a header None is left out, and `_` in a name is a hyphen."""
    every: dict[str, str | None] = {
        **{"Host": f"localhost:{port}", "Origin": f"http://localhost:{port}"},
        **{"Content-Type": "application/json", ASKING: "1", "Content-Length": str(len(body))},
        **{name.replace("_", "-"): value for name, value in headers.items()},
    }
    lines = [f"{name}: {value}" for name, value in every.items() if value is not None]
    head = "\r\n".join([f"POST {path} HTTP/1.1", *lines, "", ""])
    with socket.create_connection(("127.0.0.1", port), 60) as connection:
        connection.sendall(head.encode() + body)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def test_the_box_says_what_the_study_says(
    tiny_browser: Study, answered: Callable[..., Any]
) -> None:
    """Every figure of a sentence is study=features', every continuation study=steer's."""
    first, answer = answered("features", text=TEXT)
    assert "loading" in first["note"]
    of_text = replace(tiny_browser, name="features", options={}, asked={"text": TEXT})
    (expected,) = features.features(of_text).figures["texts"]
    assert json.loads(json.dumps(answer["text"])) == {
        **expected,
        "browser": answer["text"]["browser"],
    }
    for position, strongest in enumerate(expected["strongest"]):
        fires = answer["fires"][position]
        pairs = dict(zip(fires[::2], fires[1::2], strict=True))
        assert len(pairs) == (8 if position else 0)
        for latent, value in strongest:
            assert pairs[latent] == pytest.approx(value, rel=1e-3)
    asked = {"prompt": "Tom has", "feature": 0, "scale": [0, 4]}
    options = {"new_tokens": 6, "seed": 0, "rows": 4096}
    steered = steer.steer(replace(tiny_browser, name="steer", options=options, asked=asked)).figures
    untouched, *doses = answered("steer", **STEER)
    assert untouched["untouched"] == steered["untouched"]["text"]
    for name in ("chosen", "random"):
        own = [line["dose"] for line in doses if line["of"] == name]
        assert json.loads(json.dumps(own)) == steered[name]["doses"]
    # A chat, in the model's template, is one here where it is one there.
    chat = json.dumps([{"role": "user", "content": TEXT}])
    (answer,) = answered("features", text=chat)
    assert len(answer["text"]["ids"]) > len(expected["ids"])


@pytest.mark.parametrize(
    ("name", "request_", "said"),
    [
        ("features", {"text": ""}, "text="),
        ("features", {"text": 7}, "text="),
        ("features", {}, "text="),
        ("features", {"text": '["one", "two"]'}, "text="),
        ("features", {"text": "a " * 9000}, "text="),
        ("features", {"text": "\ud800"}, "text="),
        ("steer", {**STEER, "feature": 10**9}, "feature="),
        ("steer", {**STEER, "feature": "<b>"}, "feature="),
        ("steer", {**STEER, "scale": [1e400]}, "scale="),
        ("steer", {**STEER, "scale": list(range(9))}, "scales"),
        ("steer", {**STEER, "new_tokens": 10**4}, "new_tokens="),
        ("steer", {**STEER, "new_tokens": 257}, "new_tokens="),
        ("steer", {**STEER, "new_tokens": None}, "new_tokens="),
        ("steer", {**STEER, "scale": 1e39}, "scale="),
        ("__class__", {}, "features or steer"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant(
    answered: Callable[..., Any], name: str, request_: dict[str, Any], said: str
) -> None:
    """One plain line."""
    error = answered(name, **request_)[-1]["error"]
    assert said in error and "\n" not in error


def test_a_text_names_no_file(answered: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "secret.txt"
    path.write_text("secret")
    text = answered("features", text=f"@{path}")[-1]["text"]
    assert "".join(text["tokens"][1:4]).startswith("@")


def test_one_question_at_a_time_and_who_leaves_is_not_waited_for(
    tiny_browser: Study, answered: Callable[..., Any]
) -> None:
    live = Live(tiny_browser)
    first = live.answer("steer", STEER, lambda: False)
    next(first)
    (refused,) = live.answer("features", {"text": TEXT}, lambda: False)
    assert "another question" in refused["error"]
    first.close()  # the connection broke
    looks = iter([False] * 20)
    left = list(live.answer("steer", STEER, lambda: next(looks, True)))
    assert left == []  # in the first continuation
    assert "error" not in list(live.answer("features", {"text": TEXT}, lambda: False))[-1]
    assert not any(block._forward_pre_hooks for block in tiny_browser.lm.blocks)


def test_any_failure_is_a_line(tiny_browser: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> None:
        raise RuntimeError("out of memory\nTraceback")

    live = Live(tiny_browser)
    monkeypatch.setattr(lives.features, "found", failing)
    answer = list(live.answer("features", {"text": TEXT}, lambda: False))[-1]
    assert answer == {"error": "RuntimeError: out of memory"}


def test_its_own_page_alone_may_ask(port: int) -> None:
    body = json.dumps({"text": TEXT}).encode()
    answer = post(port, body)
    assert b" 200 " in answer and json.loads(answer.splitlines()[-1])["fires"]
    for name, value in (
        *(("Origin", "http://evil.example"), ("Origin", "null"), ("Origin", "http://localhost:1")),
        *((ASKING, None), ("Content_Type", "text/plain"), ("Sec_Fetch_Site", "cross-site")),
    ):
        refused = post(port, body, **{name: value})
        assert b" 403 " in refused and b"fires" not in refused, name
    assert b" 421 " in post(port, body, Host="evil.example")
    for wrong in (b"[]", b"{", b"\xff", b"[" * 60000, b'{"text":"' + b"a" * 70000 + b'"}'):
        refused = post(port, wrong)
        assert b" 400 " in refused and b"Traceback" not in refused
    for length in (None, "-1", "1e3", "99999999999"):
        assert b" 400 " in post(port, body, Content_Length=length)
    for path in ("/index.html", "/live/../secret", "/live/__init__"):
        assert b"is not known" in post(port, body, path)


def test_closing_the_connection_cancels(port: int) -> None:
    """The next question finds the model free long before so many tokens are written."""
    body = json.dumps({**STEER, "new_tokens": 120, "scale": [1, 2, 3, 4, 5, 6, 7, 8]}).encode()
    head = "POST /live/steer HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"{ASKING}: 1\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port), 60) as connection:
        connection.sendall(head.encode() + body)
        while b"untouched" not in connection.recv(65536):
            pass
    for _ in range(200):
        answer = post(port, json.dumps({"text": TEXT}).encode())
        if b"another question" not in answer:
            break
    assert b"fires" in answer
