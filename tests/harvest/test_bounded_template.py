"""A chat template of a stranger ends soon and makes little; those of models never meet a bound."""

from __future__ import annotations

import multiprocessing
import resource
import threading
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from residual_saes.data.errors import DocumentError
from residual_saes.data.tiny.embedded import MODEL_DIR
from residual_saes.harvest.bounded_template import bounded, install
from residual_saes.harvest.chat_template import ChatTemplate, Spellings

LOOP = "{% for i in range(99999) %}"
END = "{% endfor %}"
LARGE = "{% set x = 'a' * 10000000 %}"
NAMESPACE = (
    "{% set ns = namespace(x=START) %}{% for i in range(60) %}{% set ns.x = NEXT %}{% endfor %}"
)


def grown(start: str, following: str) -> str:
    """A value that doubles at each of 60 steps."""
    return NAMESPACE.replace("START", start).replace("NEXT", following)


HOSTILE = {
    "nested loops": f"{LOOP}{LOOP}{END}{END}",
    "nested loops with a condition": f"{{% for i in range(99999) if i %}}{LOOP}{END}{END}",
    "loops in a macro": f"{{% macro f() %}}{LOOP}{END}{{% endmacro %}}{LOOP}{{{{ f() }}}}{END}",
    "a tree of calls": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}"
    "{{ f(90) }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a repeated text": "{{ 'a' * 3000000000 }}",
    "a repeated list": "{% set n = 3000000000 %}{{ ([1] * n) | length }}",
    "a power": "{% set n = 9 ** 9 %}{{ n ** n }}",
    "products": grown("3", "ns.x * ns.x") + "{{ ns.x }}",
    "doubled texts": grown("'aa'", "ns.x ~ ns.x"),
    "doubled texts by +": grown("'aa'", "ns.x + ns.x"),
    "doubled texts that escape": "{% autoescape true %}"
    + grown("'aa'", "ns.x ~ ns.x")
    + "{% endautoescape %}",
    "doubled lists": grown("[1]", "[ns.x, ns.x]") + "{{ ns.x }}",
    "doubled tuples": grown("(1,)", "(ns.x, ns.x)") + "{{ {ns.x: 1} }}",
    "doubled mappings": grown("{}", "{'a': ns.x, 'b': ns.x}") + "{{ ns.x | tojson }}",
    "a width": "{{ 'a'.center(10000000000) }}",
    "a width in a filter": "{{ 'a' | indent(10000000000, true) }}",
    "a width in a format": "{{ '%10000000000d' % 3 }}",
    "a width given to a format": "{{ '{:{}}'.format(3, 10 ** 10) }}",
    "digits": "{{ 1.5 | round(1000000000) }}",
    "replaced": "{{ ('a' * 1000000).replace('', 'b' * 1000000) }}",
    "joined": "{{ range(99999) | join('x' * 1000000) }}",
    "separated": "{{ range(999) | list | tojson(separators=('x' * 10000000, 'y')) }}",
    "made while it is read": "{{ range(99999) | map('center', 1000000) | join }}",
    "a large output": f"{LARGE}{LOOP}{{{{ x }}}}{END}",
    "a large block": f"{LARGE}{{% set y %}}{LOOP}{{{{ x }}}}{END}{{% endset %}}",
    "sorts": f"{LOOP}{{{{ range(99999) | sort | first }}}}{END}",
    "comparisons": f"{{% set s = range(99999) | list %}}{LOOP}{{{{ -1 in s }}}}{END}",
    "sums of lists": "{{ ([[1] * 1000] * 10000) | sum(start=[]) }}",
    "nested too deep": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "a large template": "{{ 1 }}" * 200_000,
}
# These take a million steps, and so a second or more each.
LONG = {"nested loops with a condition", "loops in a macro", "a tree of calls", "sorts"}


def template_of(text: str) -> ChatTemplate:
    inner = AutoTokenizer.from_pretrained(MODEL_DIR, trust_remote_code=False)
    inner.chat_template = text
    return ChatTemplate(inner, Path("folder"), Spellings({"<bos>": 2}))


def render_all(line: Any, names: list[str]) -> None:
    """Render hostile templates within 1 GiB, in a process of its own; tell what came of each."""
    template = template_of("")
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + (1 << 30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for name in names:
        template._inner.chat_template = HOSTILE[name]
        template.__dict__.pop("text", None)
        try:
            template.parts([{"role": "user", "content": "hi"}], reply=False)
            line.send((name, "rendered"))
        except DocumentError as error:
            line.send((name, str(error)))


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(sorted(HOSTILE.keys() - LONG), id="short"),
        pytest.param(sorted(LONG), id="long", marks=pytest.mark.long),
    ],
)
def test_a_hostile_template_is_refused_and_fills_no_memory(names: list[str]) -> None:
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe()
    process = context.Process(target=render_all, args=(theirs, names))
    process.start()
    theirs.close()
    try:
        for expected in names:
            assert mine.poll(60), f"{expected} does not end"
            name, answer = mine.recv()
            assert name == expected
            assert answer != "rendered", name
            assert "MemoryError" not in answer, name
    finally:
        process.kill()
        process.join()


def test_a_bound_holds_in_threads_and_each_rendering_has_its_own() -> None:
    answers: list[str] = []

    def render() -> None:
        template = template_of(HOSTILE["doubled lists"])
        with pytest.raises(DocumentError) as caught:
            template.parts([{"role": "user", "content": "hi"}], reply=False)
        answers.append(str(caught.value))

    threads = [threading.Thread(target=render) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 2
    some = template_of("{% for i in range(30000) %}{{ i | abs }}{% endfor %}")
    for _ in range(2):  # more than half of the steps each
        (text,) = some.parts([{"role": "user", "content": "hi"}], reply=False)
        assert len(text) > 30000


def published() -> list[Path]:
    """The templates of models that trl has."""
    trl = find_spec("trl")
    folder = Path(trl.origin).parent / "chat_templates" if trl and trl.origin else Path("nowhere")
    return sorted(folder.glob("*.jinja"))


@pytest.mark.parametrize(
    ("rounds", "every"),
    [(1, 8), (30, 8), pytest.param(400, 1, marks=pytest.mark.long)],
    ids=["a chat", "a longer one", "all with a long one"],
)
def test_templates_of_models_render_as_without_bounds(rounds: int, every: int) -> None:
    paths = published()[::every]
    if not paths:
        pytest.skip("trl, which has templates of models, is not installed")
    inner: Any = AutoTokenizer.from_pretrained(MODEL_DIR, trust_remote_code=False)
    schema = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}
    messages = []
    for _ in range(rounds):
        messages.append({"role": "user", "content": "How warm is it?"})
        messages.append({"role": "assistant", "content": "19", "reasoning_content": "Look."})
    texts = [text for message in messages for text in message.values()]
    install()
    compared = 0
    for path in paths:

        def render(template: str) -> Any:
            return inner.apply_chat_template(
                messages,
                chat_template=template,
                tokenize=False,
                tools=[{"type": "function", "function": schema}],
            )

        try:
            expected = render(path.read_text())
        except Exception:  # the template has other ideas of a chat, with bounds or without
            continue
        with bounded(texts):
            assert render(path.read_text()) == expected, path.name
        compared += 1
    assert compared > len(paths) // 2
