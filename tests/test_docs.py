"""docs/ is true: its settings exist, its code runs, its messages are ours, its figures add up."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from residual_saes.data import order
from residual_saes.data.store.kinds import ORDINARY
from residual_saes.data.store.zarr_bfloat16 import to_float32
from residual_saes.harvest.config import HarvestConfig
from residual_saes.harvest.cost import Cost, cost
from residual_saes.harvest.plan import plan
from tests.conftest import make_store
from tests.harvest.models import E4B
from tests.test_docs_run import lines, parsed, pieces
from tests.test_house import PRODUCT, ROOT, SETTINGS

DOCS = sorted((ROOT / "docs").glob("*.md"))


PAGES = [ROOT / "README.md", *DOCS]


def flat(config: Mapping[str, Any], above: str) -> Iterator[str]:
    """Dotted names of all settings and of their groups."""
    for name, value in config.items():
        yield above + name
        if isinstance(value, Mapping):
            yield from flat(value, f"{above}{name}.")


def all_settings() -> set[str]:
    """The name of every setting and group in conf/. A source of text is called NAME."""
    names = {"hydra/launcher"}
    for path in SETTINGS:
        group = path.relative_to(ROOT / "conf").parent.as_posix().replace("/", ".")
        above = {".": "", "text": "text.sources.NAME."}.get(group, f"{group}.")
        names |= {group, *flat(yaml.safe_load(path.read_text()), above)}
    return names


def test_settings_that_are_named_exist() -> None:
    """`name=` and `name=value` in the text of a page; tests/test_docs_run.py runs what stands in
    commands.
    """
    known, seen = all_settings(), set()
    for page in PAGES:
        if page.name == "api.md":  # those are arguments of functions
            continue
        for line in lines(page.read_text()):
            if not parsed(line) and not re.search(r"[\n(]", line):
                names = re.findall(r"(?:^|\s)([a-z][\w./]*)=", line)
                seen |= {
                    (re.sub(r"^text\.sources\.\w+", "text.sources.NAME", name), page.name)
                    for name in names
                }
    assert len(seen) > 50
    # A message of ours says `messages=`, which is text.messages= or a source's.
    unknown = {(name, page) for name, page in seen if name not in known} - {
        ("messages", "troubleshooting.md")
    }
    assert not unknown


def test_benchmarks_and_their_flags_are_there() -> None:
    count = 0
    for page in PAGES:
        for _, code in pieces(page.read_text()):
            for module, flags in re.findall(r"python -m ((?:tests|data)\.[\w.]+)([^\n#]*)", code):
                source = (ROOT / f"{module.replace('.', '/')}.py").read_text()
                for flag in re.findall(r"--([\w-]+)", flags):
                    assert re.search(rf'("|--){flag}"', source), (page.name, flag)
                count += 1
    assert count > 20


def is_module(name: str) -> bool:
    """Whether a dotted name is a module or package of ours, or something in one."""
    path = ROOT / name.replace(".", "/")
    if path.is_dir() or path.with_suffix(".py").exists():
        return True
    module = path.parent.with_suffix(".py")
    return module.exists() and re.search(rf"\b{path.name}\b", module.read_text()) is not None


def test_files_and_modules_that_are_named_exist() -> None:
    """Paths with NAME in them are a form, not a file."""
    count = 0
    for page in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]:
        text = page.read_text()
        if page.name == "CHANGELOG.md":  # the first column has the names of before
            text = re.sub(r"^\|[^|]*\|", "|", text, flags=re.MULTILINE)
        folders = "data|harvest|train|analyze|conf|tests"
        files = re.findall(rf"`((?:{folders})/[\w/.-]+)`", text)
        modules = re.findall(rf"`((?:{folders})(?:\.[A-Za-z]\w*)+)`", text)
        for name in files:
            assert "NAME" in name or (ROOT / name).exists(), (page, name)
        for name in modules:
            setting = name.startswith("train.matmul") or name == "train.jsonl"
            assert setting or is_module(name), (page, name)
        count += len(files) + len(modules)
    assert count > 40


def test_links_lead_somewhere() -> None:
    for page in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]:
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            if "://" in link:
                continue
            file, _, anchor = link.partition("#")
            target = page.parent / file if file else page
            assert target.exists(), (page, link)
            assert not anchor or f'<a id="{anchor}"></a>' in target.read_text(), (page, link)


# -- docs/store.md ---------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The store that the page's code opens, and its rows in the text's order."""
    rng = np.random.default_rng(5)
    bits = rng.integers(0x3C00, 0x4200, (4096, 8)).astype(np.uint16)
    (tmp_path / "activations").mkdir()
    monkeypatch.chdir(tmp_path)
    return make_store(
        "activations/tiny.zarr", bits, context=64, unit=1024, chunk=128, layer=5
    ), bits


def test_the_stores_code_runs(small: Any) -> None:
    store, bits = small
    in_text = to_float32(bits)
    spine = np.concatenate([store.tokens(unit) for unit in range(4)]).ravel()
    first, second, third = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs" / "store.md").read_text(), re.DOTALL
    )

    names = run(first)
    index = store.token_index(0)
    np.testing.assert_array_equal(names["x"], in_text[index])
    np.testing.assert_array_equal(names["tokens"], spine[index])

    names = run(second)
    kinds = np.empty(1024, np.uint8)
    kinds[store.permutation(1)] = store.kinds(5, 1)
    np.testing.assert_array_equal(names["x"], in_text[1024:2048][kinds == ORDINARY])
    np.testing.assert_array_equal(names["tokens"], spine[1024:2048])
    np.testing.assert_array_equal(names["document"], store.document(1).ravel())

    names = run(third)
    np.testing.assert_array_equal(names["bits"], bits[names["index"]])


def run(code: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(code, names)
    return names


def test_the_stores_table_is_the_stores(small: Any) -> None:
    store, _ = small
    text = (ROOT / "docs" / "store.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| \((.*?)\) \| \w+", text, re.MULTILINE))
    types = dict(re.findall(r"^\| `(\w+)` \| \(.*?\) \| (\w+)", text, re.MULTILINE))
    for columns in (rows, types):  # an array of another site is as one of resid_post
        assert columns.pop("SITE_L") == columns["layer_L"]
    sizes = {"S": 64, "T": 64, "N": 4096, "d": 8, "U": 4}
    metadata = {
        key.split("/")[0]: value for key, value in store.metadata([5]).items() if "/" in key
    }
    assert {name.replace("_L", "_5") for name in rows} == set(metadata)
    arrays = {array.name: array for array in [*store.arrays.of_spine(), *store.arrays.of_point(5)]}
    for name, shape in rows.items():
        array = arrays[name.replace("_L", "_5")]
        wanted: list[int] = [
            sizes.get(size) or int(size) for size in shape.replace(" ", "").split(",") if size
        ]
        assert [array.length, *array.inner] == wanted, name
        assert array.data_type == types[name], name


# -- docs/troubleshooting.md -----------------------------------------------------------------------


def texts() -> list[str]:
    """Every text of the product's code, with a mark where a value is put in."""
    texts = []
    for path in PRODUCT:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = [
                    str(part.value) if isinstance(part, ast.Constant) else "\0"
                    for part in node.values
                ]
                texts.append("".join(parts))
    return texts


def test_every_message_is_one_of_ours() -> None:
    quoted = re.findall(
        r"^\| `((?:\\`|[^`])*)` \|",
        (ROOT / "docs" / "troubleshooting.md").read_text(),
        re.MULTILINE,
    )
    assert len(quoted) >= 25
    ours = texts()
    for message in quoted:
        fixed = [part.strip(" ()") for part in message.replace("\\`", "`").split("...")]
        pattern = re.compile(".*".join(re.escape(part) for part in fixed if part), re.DOTALL)
        assert sum(map(len, fixed)) > 10, message
        assert any(pattern.search(text) for text in ours), message


# -- docs/reproduce.md -----------------------------------------------------------------------------


def row(label: str) -> list[str]:
    """The cells of a row of docs/reproduce.md."""
    (line,) = re.findall(
        rf"^\| {re.escape(label)} \|.*$", (ROOT / "docs" / "reproduce.md").read_text(), re.MULTILINE
    )
    return [cell.strip() for cell in line.split("|")[2:-1]]


H100_FLOPS = 989e12  # dense bfloat16, of NVIDIA's data sheet


def test_reproducing_is_counted() -> None:
    costs = [cost(E4B, layers, "bfloat16", 16, 512) for layers in ([21], [21, 27])]
    assert row("GFLOP a token, matrix products")[:2] == [
        f"{each.matmul_flop / 1e9:.2f}" for each in costs
    ]
    assert row("GFLOP a token, attention, context 512")[:2] == [
        f"{each.attention_flop / 1e9:.2f}" for each in costs
    ]
    weights = [f"{each.kept_bytes / 1e9:.1f}" for each in costs]
    assert row("weights on a GPU, GB")[:2] == weights
    for share in (0.5, 0.3, 0.1):
        hours = [1e9 * each.flop / (H100_FLOPS * share) / 3600 for each in costs]
        assert row(f"{share:.0%}") == [f"{hour:.1f}" for hour in hours]
    speed = 0.3 * H100_FLOPS / costs[1].flop
    assert f"{round(speed, -3):,.0f} tokens/s" in text()
    assert f"{speed * 7.07e12 / 1e9 / 1e9:.2f} GB/s" in text()


def text() -> str:
    return (ROOT / "docs" / "reproduce.md").read_text()


def test_bytes_and_minutes_are_counted(tmp_path: Path) -> None:
    def planned(layers: tuple[int, ...], codec: Any) -> Any:
        return plan(
            HarvestConfig(tmp_path / "s", layers, 10**9, 512, codec=codec),
            Cost(*[1] * 7),
            2560,
            "cpu",
        )

    plans = {
        codec: [planned(layers, codec) for layers in ((21,), (21, 27))]
        for codec in ("blosc", "int8")
    }
    assert row("residuals, TB")[:2] == [f"{each.raw_bytes / 1e12:.2f}" for each in plans["blosc"]]
    for codec, both in plans.items():
        assert row(f"on the disk, TB, `codec={codec}`")[:2] == [
            f"{each.disk_bytes / 1e12:.2f}" for each in both
        ]
    units, out = plans["blosc"][0].units, len(order.held_out(15_259, 0))
    steps = (10**9 - out * 65_536) // 4096
    for figure in (out, units, steps):
        assert re.search(rf"(?<![\d,]){figure:,}(?![\d,])", text()), figure
    minutes = {
        "encoder product, tf32": 1e9 * 2 * 2560 * 32_768 / (989e12 / 2) / 60,
        "decoding and two gradients of k rows": 1e9 * 3 * 128 * 2560 * 4 / 3.35e12 / 60,
        "reading": plans["blosc"][0].disk_bytes / 3e9 / 60,
    }
    for label, each in minutes.items():
        assert row(label)[1] == f"{each:.1f}", label
    for share, centred in ((0.5, "0.878"), (0.7, "0.797")):
        assert f"{1 - 0.061 / (1 - share):.3f}" == centred and centred in text()
