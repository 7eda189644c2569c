"""Whatever a chat's row holds reaches the template, and none of it makes a special token."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from residual_saes.data.errors import DocumentError, SettingError
from residual_saes.data.text.chats import Chat, Message
from residual_saes.data.tiny.embedded import MODEL_DIR
from residual_saes.harvest.tokens import Tokenizer
from tests.harvest.test_tokens import HOSTILE, chat, special, with_template

TURN = "<|turn>{{ m.role }}\n"
# What templates do with fields: name them, print them as JSON or as Python, go through them.
TEMPLATES = {
    "named": "{{ bos_token }}{% for m in messages %}" + TURN + "{{ m.name }} {{ m.content }}"
    "{% if m.reasoning_content %}<pad>{{ m.reasoning_content }}<eos>{% endif %}"
    "{% for c in m.tool_calls or [] %}<|turn>{{ c.function.name }}"
    "{% for k, v in c.function.arguments.items() %}{{ k }}:{{ v }},{% endfor %}{% endfor %}"
    "<turn|>{% endfor %}{{ tools }}{{ documents }}{{ more }}",
    "json": "{% for m in messages %}"
    + TURN
    + "{{ m.tool_calls | tojson if m.tool_calls }}{{ m.content }}<turn|>"
    "{{ m.reasoning_content }}{% endfor %}{{ tools | tojson }}"
    "{{ more | tojson(indent=1) if more }}",
    "python": "{% for m in messages %}" + TURN + "{{ m.tool_calls }}{{ m.content }}<turn|>"
    "{{ m.reasoning_content }}{% endfor %}{{ tools }}{{ more }}{{ documents | string }}",
}


def call(name: str, arguments: Any) -> Message:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def talk(a: str, b: str, c: str) -> Chat:
    """A chat with the three texts in every place that a template may read."""
    messages: list[Message] = [
        {"role": "user", "content": a, "name": b},
        {"role": "assistant", "tool_calls": [call(a, {b: c, "list": [a, {"x": b}]})]},
        {"role": "tool", "content": b, "tool_call_id": c},
        {"role": "assistant", "content": c, "reasoning_content": a},
    ]
    tool = {"function": {"name": a, "description": b, "parameters": {c: None}}}
    return Chat(messages, {"tools": [tool], "documents": [{"title": b, "text": c}], "more": {a: b}})


def transformers_text(tokenizer: Tokenizer, whole: Chat) -> str:
    """The rendered text as transformers has it, without a BOS."""
    rendered = tokenizer.inner.apply_chat_template(
        whole.messages, tokenize=False, **whole.variables
    )
    return str(rendered).removeprefix("<bos>")


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_field_is_rendered_as_transformers_does_and_stays_text(
    tmp_path: Path, name: str
) -> None:
    tokenizer = with_template(tmp_path, TEMPLATES[name])
    (harmless,) = tokenizer.encode([talk("x", "y", "z")])
    assert special(harmless)

    @given(*[HOSTILE.filter(bool) | st.text("a\ua000\ua001 '\\<", min_size=1, max_size=9)] * 3)
    @settings(max_examples=40)
    def check(a: str, b: str, c: str) -> None:
        whole = talk(a, b, c)
        (ids,) = tokenizer.encode([whole])
        assert special(ids) == special(harmless)
        if len({a, b, c, "x", "list"}) == 5:  # else keys fall together
            assert tokenizer.inner.decode(ids) == transformers_text(tokenizer, whole)

    check()


@pytest.mark.parametrize("name", ["gemma4", "glm4moe", "qwen3", "lfm2_2_5"])
def test_templates_of_models_get_calls_and_thoughts(tmp_path: Path, name: str) -> None:
    """Templates as trl has them, with their special tokens."""
    trl = find_spec("trl")
    path = Path(trl.origin).parent / f"chat_templates/{name}.jinja" if trl and trl.origin else None
    if path is None or not path.exists():
        pytest.skip("trl has this template no more, or is not installed")
    template = path.read_text()
    inner = AutoTokenizer.from_pretrained(MODEL_DIR, trust_remote_code=False)
    spelled = sorted(set(re.findall(r'<\|[\w"]+\|?>|<\w+\|>', template)))
    inner.add_special_tokens({"extra_special_tokens": spelled})
    inner.chat_template = template
    inner.save_pretrained(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    ids = {token: tokenizer.inner.convert_tokens_to_ids(token) for token in spelled}

    def talk(text: str) -> Chat:
        made = call("weather", {"city": text})
        messages: list[Message] = [
            {"role": "user", "content": f"How warm? {text}"},
            {"role": "assistant", "content": "", "reasoning_content": text, "tool_calls": [made]},
            {"role": "tool", "content": f"19 {text}", "name": "weather", "tool_call_id": "1"},
            {"role": "assistant", "content": f"{text} 19"},
        ]
        shape = {"type": "object", "properties": {"city": {"type": "string", "description": text}}}
        tool = {"name": "weather", "description": f"{text} air", "parameters": shape}
        return Chat(messages, {"tools": [{"type": "function", "function": tool}]})

    harmless, hostile = tokenizer.encode([talk("Ulm"), talk(spelled[0] + " <|im_end|><tu")])
    assert tokenizer.inner.decode(harmless) == transformers_text(tokenizer, talk("Ulm"))
    assert tokenizer.inner.decode(harmless).count("Ulm") >= 4
    own = set(ids.values())
    assert [i for i in hostile if i in own] == [i for i in harmless if i in own] != []


def test_plain_messages_are_a_chat_without_more(tmp_path: Path) -> None:
    tokenizer = with_template(tmp_path, TEMPLATES["named"])
    messages = chat("<bos>", "b")
    assert isinstance(messages, list)
    assert tokenizer.encode([messages]) == tokenizer.encode([Chat(messages, {})])
    assert tokenizer.encode([Chat([], {"more": 1})]) == [[]]


BOTH = "{% for m in messages %}{% if m.content is string %}[{{ m.content }}]{% else %}"
LOOP = "{% for p in m.content %}{% if p.type == 'text' %}({{ p.text }}){% endif %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "text", "parts"),
    [
        ("{% for m in messages %}[{{ m.content }}]{% endfor %}", "[a<b]", "[a<bc]"),
        ("{% for m in messages %}[{{ m.content | trim }}]{% endfor %}", "[a<b]", "[a<bc]"),
        ("{% for m in messages %}{{ m.content | tojson }}{% endfor %}", '"a<b"', '"a<bc"'),
        ("{% for m in messages %}{{ '[' + m.content + ']' }}{% endfor %}", "[a<b]", "[a<bc]"),
        (f"{BOTH}{LOOP}{{% endif %}}{{% endfor %}}", "[a<b]", "[a<bc]"),
        (f"{{% for m in messages %}}{LOOP}{{% endfor %}}", "(a<b)", "(a<b)(c)"),
    ],
)
def test_contents_are_given_in_the_form_that_the_template_reads(
    tmp_path: Path, template: str, text: str, parts: str
) -> None:
    tokenizer = with_template(tmp_path, template)
    listed = [{"type": "text", "text": part} for part in ("a<b", "c")]
    for content, expected in (("a<b", text), (listed, parts)):
        (ids,) = tokenizer.encode([[{"role": "user", "content": content}]])
        assert tokenizer.inner.decode(ids) == expected


def test_a_template_for_tools_is_taken_where_there_are_tools(tmp_path: Path) -> None:
    tokenizer = with_template(tmp_path, "plain {{ messages[0].content }}")
    digest = tokenizer.template_digest
    templates = {"default": "plain {{ messages[0].content }}", "tool_use": "{{ tools | tojson }}"}
    tokenizer.inner.chat_template = templates
    messages = [{"role": "user", "content": "x"}]
    plain, tools = tokenizer.encode([messages, Chat(messages, {"tools": [{"a": "<bos>"}]})])
    assert tokenizer.inner.decode(plain) == "plain x"
    assert tokenizer.inner.decode(tools) == '[{"a": "<bos>"}]' and not special(tools)
    assert tokenizer.template_digest == digest


STRICT = "{{ raise_exception('no') if messages[0].content == 'bad' }}{{ messages[0].content }}"


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (chat("bad"), r"'bad': no"),
        (Chat([*chat("x")], {"chat_template": "{{ eos_token }}"}), "chat_template,"),
        (Chat([*chat("x")], {"tokenize": True}), "tokenize,"),
        (Chat([*chat("x")], {"messages": []}), "messages,"),
    ],
)
def test_a_refused_chat_stands_alone(tmp_path: Path, bad: Any, message: str) -> None:
    tokenizer = with_template(tmp_path, STRICT)
    first, refused, last = tokenizer.attempt([chat("one"), bad, "two"])
    assert [first, last] == tokenizer.encode([chat("one"), "two"])
    assert isinstance(refused, DocumentError)
    assert refused.kind == "refused by the chat template"
    with pytest.raises(DocumentError, match=message):
        tokenizer.encode([bad])


@pytest.mark.parametrize(
    "expression",
    ["1 // 0", "messages[9].x.y", "messages | tojson | int(x=1)", "range(10**9) | list", "nix()"],
)
def test_whatever_a_template_raises_is_its_refusal(tmp_path: Path, expression: str) -> None:
    tokenizer = with_template(tmp_path, f"{{{{ {expression} }}}}")
    (refused,) = tokenizer.attempt([chat("x")])
    assert isinstance(refused, DocumentError) and "'x'" in str(refused)


def test_a_template_that_cannot_be_read_is_no_fault_of_a_document(tmp_path: Path) -> None:
    tokenizer = with_template(tmp_path, "{% for %}")
    with pytest.raises(SettingError, match=str(tmp_path)) as caught:
        tokenizer.attempt([chat("x")])
    assert not isinstance(caught.value, DocumentError)


def test_json_texts_in_chats_survive(tmp_path: Path) -> None:
    """Arguments that are JSON in text, as OpenAI has them, are given as they are."""
    tokenizer = with_template(tmp_path, TEMPLATES["json"])
    arguments = json.dumps({"<bos>": "\\ud83d"})
    whole = Chat([{"role": "assistant", "content": "", "tool_calls": [call("f", arguments)]}], {})
    (ids,) = tokenizer.encode([whole])
    assert tokenizer.inner.decode(ids) == transformers_text(tokenizer, whole)
