"""`from residual_saes import SAE, Store`, docs/api.md and the examples of the docstrings."""

from __future__ import annotations

import doctest
import importlib
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import residual_saes
from residual_saes import SAE, SettingError, Store, StoreError
from residual_saes.analyze.latents import rates
from residual_saes.analyze.subject import open_store, recorded_stores
from residual_saes.data.rows import split
from residual_saes.data.site import HookPoint
from residual_saes.data.store import store as stores
from residual_saes.data.tiny.embedded import MODEL_DIR
from residual_saes.train.publish import release
from residual_saes.train.run import read_config
from tests.test_house import ROOT

TEXT = "Question: Tom has 7 apples."


@pytest.fixture(scope="module")
def own(tiny_run: Path) -> SAE:
    return SAE.load(tiny_run)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(MODEL_DIR)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL_DIR)


def random_rows(*shape: int) -> Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(0))


# -- rows ------------------------------------------------------------------------------------------


def dense(sae: SAE, x: Tensor) -> Tensor:
    """The formula, by torch alone."""
    weights = sae.weights
    pre = (x - (weights.b_dec if weights.b_in is None else weights.b_in)) @ sae.W_enc
    pre = pre + weights.b_enc
    if weights.threshold is not None:
        return torch.where(pre > weights.threshold, pre, 0.0)
    kept = pre.topk(weights.k)
    return torch.zeros_like(pre).scatter(-1, kept.indices, kept.values.relu())


@pytest.fixture(params=["topk", "thresholds", "transcoder"])
def sae(own: SAE, request: pytest.FixtureRequest) -> SAE:
    if request.param == "topk":
        return own
    if request.param == "thresholds":
        weights = replace(own.weights, threshold=torch.full((own.d_sae,), 2.0))
        return replace(own, weights=weights, subject=None)
    skip = torch.eye(own.d_model)[:, :32]
    weights = replace(own.weights, W_dec=own.W_dec[:, :32].contiguous(), W_skip=skip)
    weights = replace(weights, b_dec=own.weights.b_dec[:32], b_in=own.weights.b_dec)
    return replace(own, weights=weights, subject=None)


@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (0,)])
def test_activations_dense_and_sparse(sae: SAE, shape: tuple[int, ...]) -> None:
    x = random_rows(*shape, sae.d_model)
    f = sae.encode(x)
    torch.testing.assert_close(f, dense(sae, x), atol=1e-5, rtol=1e-5)
    sparse = sae.topk(x)
    assert sparse.values.shape[:-1] == shape
    again = torch.zeros_like(f).scatter_add(-1, sparse.indices, sparse.values)
    torch.testing.assert_close(again, f, atol=0, rtol=0)
    assert (sparse.values.diff(dim=-1) <= 0).all()
    y = f @ sae.W_dec + sae.weights.b_dec
    for decoded in (sae.decode(f), sae.decode(sparse)):
        torch.testing.assert_close(decoded, y, atol=1e-4, rtol=1e-4)
    y = y if sae.weights.W_skip is None else y + sae.weights.centred(x) @ sae.weights.W_skip
    torch.testing.assert_close(sae.reconstruct(x), y, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_dtype_is_computed_in_float32(own: SAE, dtype: torch.dtype) -> None:
    x = random_rows(7, own.d_model).to(dtype)
    expected = own.encode(x.float())
    assert own.encode(x).equal(expected) and expected.dtype == torch.float32
    if dtype != torch.bfloat16:
        assert own.encode(x.numpy()).equal(expected)


def test_gradients_are_those_of_the_formula(sae: SAE) -> None:
    def gradient(f: Any) -> Tensor:
        x = random_rows(6, sae.d_model).requires_grad_()
        f(x).square().sum().backward()
        assert x.grad is not None
        return x.grad

    expected = gradient(lambda x: dense(sae, x))
    torch.testing.assert_close(gradient(sae.encode), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        gradient(lambda x: sae.topk(x).values), expected, atol=1e-4, rtol=1e-4
    )

    def reconstruction(x: Tensor) -> Tensor:
        y = dense(sae, x) @ sae.W_dec + sae.weights.b_dec
        weights = sae.weights
        return y if weights.W_skip is None else y + weights.centred(x) @ weights.W_skip

    expected = gradient(reconstruction)
    torch.testing.assert_close(gradient(sae.reconstruct), expected, atol=1e-3, rtol=1e-3)


def test_what_are_no_rows_is_refused(own: SAE) -> None:
    x = random_rows(2, own.d_model)
    for wrong in (x[:, :5], x[0, 0], x.long(), x.numpy().astype(int), x.tolist(), TEXT, None):
        with pytest.raises(SettingError, match=r"^x of"):
            own.encode(wrong)  # type: ignore[arg-type]
    with pytest.raises(SettingError, match=r"^f of"):
        own.decode(x)


# -- loading ---------------------------------------------------------------------------------------


@pytest.fixture
def hub(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hub whose repository me/mine has a release of the run."""
    release.prepare(tiny_run, "me/mine", tmp_path / "me/mine")

    def download(repo: str, revision: str | None, allow_patterns: list[str]) -> str:
        """Of all that is there, what is asked for."""
        assert revision in (None, "v1")
        cache = tmp_path / "cache"
        for name in filter(lambda name: (tmp_path / repo / name).is_file(), allow_patterns):
            (cache / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(tmp_path / repo / name, cache / name)
        return str(cache)

    def names(repo: str, revision: str | None) -> list[str]:
        every = (tmp_path / repo).rglob("*")
        return [str(path.relative_to(tmp_path / repo)) for path in every]

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("huggingface_hub.list_repo_files", names)
    return tmp_path


def test_one_sae_from_wherever_it_lies(
    own: SAE, tiny_run: Path, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run, a run without its store, an export, a release on the Hub: the same values."""
    expected = own.features(TEXT).dense
    store = own.subject.store.name if own.subject else ""
    monkeypatch.chdir(hub)
    for where, more in (
        (f"{tiny_run}/sae_final.pt", {"store": store}),
        (f"saelens:{hub}/me/mine/saelens", {}),
        (f"{hub}/me/mine/saelens", {"store": store}),
        ("hub:me/mine", {}),
        ("hub:me/mine/saelens@v1", {}),
        (str(hub / "me/mine"), {}),
    ):
        sae = SAE.load(where, **more)
        assert (sae.features(TEXT).dense == expected).all(), where
        assert (sae.subject is None) != bool(more) and "layer 5" in repr(sae)
    with pytest.raises(SettingError, match="store"), sae.steer(0, 2):
        pass
    with sae.steer(0, activation=3.0):
        assert sae.generate(TEXT, 2)


def test_what_is_no_sae_is_said(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(hub)
    (hub / "me/none").mkdir()
    for name in ("sae_final.pt", "sae.safetensors"):
        (hub / "me/mine" / name).unlink()
    for where in ("nothing", "unknown:here", "owner/name", "hub:gpt2", "hub:me/none", "hub:"):
        with pytest.raises(SettingError, match=where):
            SAE.load(where)
    for where in ("hub:me/mine", "me/mine"):
        with pytest.raises(SettingError, match="saelens"):  # the folder that has one
            SAE.load(where)


def test_a_run_finds_its_store_from_any_folder(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ((place, identity),) = recorded_stores(read_config(tiny_run))
    assert open_store(tiny_run, Path(place).name, identity, None).identity == identity
    with pytest.raises(StoreError, match="other"):
        open_store(tiny_run, "other", identity, None)


def test_a_foreign_sae_names_what_it_lacks(hub: Path) -> None:
    with pytest.raises(StoreError, match=r"saelens:.*mine/saelens"):
        SAE.load(f"saelens:{hub / 'me/mine'}")
    foreign = replace(SAE.load(f"saelens:{hub / 'me/mine/saelens'}"), model="gpt2-small")
    with pytest.raises(SettingError, match="gpt2-small"):
        foreign.features(TEXT)


def test_who_asks_as_for_saelens_is_told_how_to_load() -> None:
    for name in ("from_pretrained", "load_from_disk"):
        with pytest.raises(AttributeError, match=f"{name}.*SAE.load"):
            getattr(SAE, name)


def test_another_model_is_refused(own: SAE, model: Any) -> None:
    wide = own.W_dec.repeat(1, 2)
    weights = type(own.weights).of(wide.T, wide, own.weights.b_enc, torch.zeros(128), 8)
    for other in (
        replace(own, subject=None, points=(HookPoint(12),)),
        replace(own, subject=None, weights=weights),
    ):
        with pytest.raises(SettingError, match="model="):
            other.features(TEXT)
        with pytest.raises(SettingError, match="model="):
            other.features(TEXT, model=model)
        with pytest.raises(SettingError, match="steer"), other.steer(model, 0, activation=1.0):
            model(torch.tensor([[2, 5]]))
    with pytest.raises(SettingError, match="model="):
        replace(own, subject=None, model=None).features(TEXT)


# -- texts -----------------------------------------------------------------------------------------


def test_texts_that_cannot_be_read_are_refused(own: SAE) -> None:
    wrong: list[Any] = ["", "7 " * 200, [], ["a"], [{"role": "user"}], "\ud800", None, Path("a")]
    for text in wrong:
        with pytest.raises(SettingError, match="text"):
            own.features(text)
    for new_tokens in (0, -1, 1024):
        with pytest.raises(SettingError, match="new_tokens"):
            own.generate(TEXT, new_tokens)


def test_a_loaded_model_gives_what_the_recorded_one_gives(
    own: SAE, model: Any, tokenizer: Any
) -> None:
    for text in (TEXT, "a <eos> that is text", [{"role": "user", "content": "3 + 4?"}]):
        expected = own.features(text)
        for given in (tokenizer, None):
            found = own.features(text, model=model, tokenizer=given)
            assert found.ids == expected.ids and (found.dense == expected.dense).all()
    assert tokenizer("<eos>")["input_ids"][-1] == tokenizer.eos_token_id  # as it was
    model.train()
    with pytest.raises(SettingError, match="eval"):
        own.features(TEXT, model=model)
    model.eval()
    with pytest.raises(SettingError, match="model="):
        own.features(TEXT, model="gpt2")


def test_notebooks_show_a_text(own: SAE, monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels are the catalogue's; what is in a text stays text."""
    known = rates.Rates(1, np.ones(256, np.int64), np.ones(256), Path("features.parquet"))
    said = {latent: {"peaks": ["<b>plums"]} for latent in range(256)}
    monkeypatch.setattr(rates, "of_catalogue", lambda _: known)
    monkeypatch.setattr(rates.Rates, "examples", lambda *_: said)
    found = own.features("Tom <script>alert(1)</script> has 7")
    page = found._repr_html_()
    assert "<script" not in page and "&lt;" in page and "&lt;b&gt;plums" in page
    first = found.top(1)[0]
    assert f"<td>{first.feature}</td>" in page and "<b>plums" in repr(found)
    assert re.search(r"background: rgba\(217, 119, 6, 0\.75\)", page)  # the largest
    monkeypatch.undo()
    assert "elsewhere" not in own.features(TEXT)._repr_html_()


# -- steering --------------------------------------------------------------------------------------


def written(model: Any, block: int) -> Tensor:
    """A layer's output on a text of 6 tokens, twice: what the next layer reads."""
    ids = torch.tensor([[2, 8, 9, 10, 11, 12]]).repeat(2, 1)
    seen: list[Tensor] = []
    above = model.model.layers[block + 1]
    hook = above.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    model(ids)
    hook.remove()
    return seen[0]


def test_latents_of_a_loaded_model_are_changed(own: SAE, model: Any) -> None:
    before = written(model, 5)
    first = own.topk(before[0, 3]).indices[0].item()
    f = own.encode(before)
    assert f[0, 3, first] > 0
    direction = own.W_dec[first]
    mean = own.rates.mean[first]

    def moved(*given: Any, **more: Any) -> Tensor:
        with own.steer(*given, **more):
            return written(model, 5) - before

    close = {"atol": 1e-4, "rtol": 1e-3}
    pushed = moved(model, first, 2.0)
    torch.testing.assert_close(pushed, (2 * mean * direction).float().expand_as(pushed), **close)
    both = moved(model, np.array([first, 3]), [2.0, -1.0], activation=4.0)
    torch.testing.assert_close(both, (8 * direction - 4 * own.W_dec[3]).expand_as(both), **close)
    gone = moved(model=model, feature=first, change="ablate")
    torch.testing.assert_close(gone, -f[..., first, None] * direction, **close)
    clamped = moved(model, torch.tensor(first), 7, activation=1.0, change="clamp")
    torch.testing.assert_close(clamped, (7 - f[..., first, None]) * direction, **close)
    assert written(model, 5).equal(before)

    # What enters layer 6 is what layer 5 gives.
    with replace(own, points=(HookPoint(6, "resid_pre"),)).steer(model, first, 2.0):
        assert (written(model, 5) - before).equal(pushed)
    elsewhere = [(HookPoint(5, "mlp_out"),), (HookPoint(0, "resid_pre"),), (HookPoint(5),) * 2, ()]
    for points in elsewhere:
        other = replace(own, points=points)
        with pytest.raises(SettingError, match="steer"), other.steer(model, first, 2.0):
            pass


def test_nothing_stays_behind(own: SAE, model: Any) -> None:
    before = written(model, 5)
    with own.steer(model, 1, activation=2.0):
        with own.steer(model, 1, activation=-2.0):
            torch.testing.assert_close(written(model, 5), before, atol=1e-5, rtol=1e-5)
        assert not written(model, 5).equal(before)
    with pytest.raises(RuntimeError, match="mine"), own.steer(model, 1, activation=2.0):
        raise RuntimeError("mine")
    assert written(model, 5).equal(before)
    ids = torch.tensor([[2, 8, 9]])
    with own.steer(model, 1, 3.0, activation=1.0, change="clamp"):
        model(ids).logits.sum().backward()  # a gradient flows past an intervention
    model.zero_grad()


def test_the_recorded_model_is_steered_in_generation(own: SAE) -> None:
    latent = own.features(TEXT).top(1)[0].feature
    plain = own.generate(TEXT, 8)
    with own.steer(latent, 5) as same:
        assert same is own and own.generate(TEXT, 8) != plain
    with own.steer(feature=[latent], scale=0):
        assert own.generate(TEXT, 8) == plain
    assert own.generate(TEXT, 8) == plain


@pytest.mark.parametrize(
    ("given", "more", "match"),
    [
        ((256,), {}, "feature"),
        (([1, 1],), {}, "feature"),
        ((), {}, "feature"),
        ((1, 2, 3), {}, "model"),
        (("gpt2", 1, 2), {}, "model"),
        ((1, [1, 2]), {"activation": 1.0}, "scales"),
        ((1, "5"), {"activation": 1.0}, "scale"),
        ((1, float("nan")), {}, "scale"),
        ((1, 2), {"activation": float("inf")}, "activation"),
        ((1,), {"change": "delete"}, "change"),
        ((1, 2), {"activation": "x"}, "activation"),
    ],
)
def test_what_cannot_be_steered_is_said(
    own: SAE, given: tuple[Any, ...], more: dict[str, Any], match: str
) -> None:
    with pytest.raises(SettingError, match=match), own.steer(*given, **more):
        pass


# -- the store -------------------------------------------------------------------------------------


def test_rows_are_the_stores(own: SAE) -> None:
    assert own.subject is not None
    inner: stores.Store = own.subject.store
    store = Store.open(inner.name)
    size = inner.unit_tokens
    bits = np.concatenate([inner.residuals(5, unit) for unit in range(inner.units)])
    expected = torch.from_numpy(bits).view(torch.bfloat16)
    rows = store.rows()
    assert rows.shape == tuple(expected.shape) and len(rows) == len(store)
    for part in (slice(0, 3), slice(size - 3, size + 130), slice(-5, None), slice(5, 2)):
        assert rows[part].equal(expected[part]), part
    assert rows[size::size].equal(expected[size::size]) and rows[-1].equal(expected[-1])
    assert store.positions[:].sort().values.equal(torch.arange(len(store)))
    with pytest.raises(IndexError):
        rows[len(store)]

    # One text, in its order.
    place = int(store.positions[size + 7]) - size
    assert store.tokens[size + 7] == inner.tokens(1).ravel()[place]
    assert store.documents[size + 7] == inner.document(1).ravel()[place]
    order = store.positions[:size].argsort()
    written = "".join(store.text(int(row)) for row in order[100:108])
    assert store.text(int(order[103]), before=3, after=4) == written


def test_batches_are_all_rows_of_a_part_once(own: SAE) -> None:
    assert own.subject is not None
    inner = own.subject.store
    store = Store.open(inner.name)
    numbers = {}
    for part in ("training", "held_out", "all"):
        batches = list(store.batches(layer=5, size=700, part=part))
        numbers[part] = torch.cat([batch.numbers for batch in batches])
        for batch in batches[:2]:
            assert batch.tokens.equal(store.tokens[:][batch.numbers])
            assert batch.rows.equal(store.rows(5)[:][batch.numbers])
            assert len(batch.rows) <= 700
    assert torch.cat([numbers["training"], numbers["held_out"]]).sort().values.equal(numbers["all"])
    held_out = store.held_out[:]
    assert held_out[numbers["held_out"]].all() and not held_out[numbers["training"]].any()
    assert int(held_out.sum()) == sum(map(inner.rows_of, split.held_out_units(inner)))
    assert store.kept(5)[:].nonzero()[:, 0].equal(numbers["all"])
    every = sum(len(batch.rows) for batch in store.batches(every=True))
    assert every == len(store)


def test_what_a_store_lacks_is_said(own: SAE, tmp_path: Path) -> None:
    assert own.subject is not None
    store = Store.open(own.subject.store.name)
    with pytest.raises(StoreError, match="layer 6"):
        store.rows(layer=6)
    with pytest.raises(SettingError, match="layer="):
        store.rows(site="mlp_in")
    with pytest.raises(SettingError, match="site="):
        store.rows(layer=5, site="output")
    with pytest.raises(SettingError, match="part="):
        next(store.batches(layer=5, part="test"))  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="size="):
        next(store.batches(layer=5, size=0))
    with pytest.raises(SettingError, match="layer="):
        store.rows("5")  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="slice"):
        store.tokens[[1, 2]]  # type: ignore[call-overload]
    with pytest.raises(StoreError, match=str(tmp_path)):
        Store.open(tmp_path)
    with pytest.raises(SettingError, match="model"):
        Store.open(store.name, model="nowhere").text(3)


# -- examples --------------------------------------------------------------------------------------


@pytest.fixture
def demo(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder of `make demo`, with a data/ and a train.py of the user's."""
    monkeypatch.chdir(tmp_path)
    for name, target in (
        ("runs/demo", tiny_run),
        ("activations/demo.zarr", tiny_run.parent / "s.zarr"),
        ("activations/tiny.zarr", tiny_run.parent / "s.zarr"),
    ):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).symlink_to(target)


@pytest.mark.usefixtures("demo")
@pytest.mark.parametrize("name", ["sae", "store"])
def test_examples_of_docstrings_run(name: str) -> None:
    module = importlib.import_module(f"residual_saes.{name}")
    failed, tried = doctest.testmod(module, extraglobs={"torch": torch})
    assert failed == 0 and tried > 8


@pytest.mark.usefixtures("demo")
def test_every_block_of_the_page_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/api.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block, names)
    assert (names["error"] if "error" in names else names["x_hat"]) is not None and len(blocks) > 10


def test_the_page_has_every_public_name() -> None:
    page = (ROOT / "docs/api.md").read_text()
    for name in residual_saes.__all__:
        public = getattr(residual_saes, name)
        members = vars(public).items() if public in (SAE, Store) else ()
        fields = (str, int, type(None))  # of the dataclass, by their defaults
        shown = [key for key, value in members if key[0] != "_" and not isinstance(value, fields)]
        for word in [name, *shown]:
            assert re.search(rf"\b{word}\b", page), f"{name}.{word}"
