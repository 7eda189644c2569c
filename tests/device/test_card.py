"""The card that is not there finds what is planted."""

import importlib.util
import threading
from contextlib import suppress

import pytest
import torch

from residual_saes.data.rows.copy import Side, to_device
from residual_saes.train.kernels import Kept
from tests.device import card as cards
from tests.device.card import FROM_HOST, Card
from tests.device.streams import DeviceFault, Event, Stream

ONE = torch.device("cuda", 1)


@pytest.fixture
def card():
    """Faults stay where a test expects them."""
    with suppress(DeviceFault), Card() as made:
        torch.cuda.set_device(1)
        yield made


def test_tensors_say_where_they_are(card):
    x = torch.arange(6.0, device="cuda").view(2, 3)
    assert x.device == ONE and x.is_cuda and x.get_device() == 1
    assert x[0].device == x.new_zeros(2).device == (x @ x.T).device == torch.ones_like(x).device
    assert torch.zeros(2).device.type == x.cpu().device.type == "cpu" != x.to("cuda:1").device.type
    assert not torch.zeros(2).is_cuda and x.to(torch.zeros(1)).device.type == "cpu"
    scaled = torch.tensor(2.0) * x + torch.ones((), device=ONE)  # a number may be the host's
    assert scaled.is_cuda and scaled.cpu().tolist() == [[1, 3, 5], [7, 9, 11]]
    (gradient,) = torch.autograd.grad((x.requires_grad_()[0, 1] * 3).sum(), x)
    assert gradient.is_cuda and gradient.cpu()[0].tolist() == [0, 3, 0]


MIXED = {
    "sum": lambda x, y: x + y,
    "product": lambda x, y: x @ y.T,
    "cat": lambda x, y: torch.cat([x, y]),
    "in place": lambda x, y: y.copy_(y).add_(x),
    "scalar in place": lambda x, y: y[0, 0].add_(x[0, 0]),
    "gather": lambda x, y: x.gather(1, y.long()),
    "numpy": lambda x, y: x.numpy(),
    "numpy's own": lambda x, y: torch.from_numpy(x.__array__()),
    "pinned": lambda x, y: x.pin_memory(),
    "another card": lambda x, y: x.to("cuda:0"),
    "made there": lambda x, y: torch.zeros(2, device="cuda:0"),
    "its stream": lambda x, y: torch.cuda.Stream(torch.device("cuda", 0)),
    "its memory": lambda x, y: torch.cuda.mem_get_info(0),
    "long product": lambda x, y: x.long() @ x.long().T,
}


@pytest.mark.parametrize("name", MIXED)
def test_finds_what_is_on_another_device(name, card):
    x, y = torch.ones(2, 3, device=ONE), torch.zeros(2, 3)
    with pytest.raises(DeviceFault):
        MIXED[name](x, y)
    assert len(card.faults) == 1


def test_finds_another_current_device(card):
    """As each new thread has it."""

    def launch():
        with pytest.raises(DeviceFault):
            torch.zeros(2, device="cuda")
        with pytest.raises(DeviceFault):
            torch.cuda.Event().record()
        decode = cards.train.triton_kernels.decode
        with pytest.raises(DeviceFault):
            decode(x[0], whole, whole[:1], x.T.contiguous())
        with torch.cuda.device_of(x):
            done.append(decode(x[0], whole, whole[:1], x.T.contiguous()))

    x, whole, done = torch.ones(2, 3, device=ONE), torch.arange(3, device=ONE), []
    thread = threading.Thread(target=launch)
    thread.start()
    thread.join()
    assert done[0].is_cuda and done[0].cpu().tolist() == [[3, 3]]


def test_finds_a_kernel_that_is_given_a_view(card):
    kept = Kept.even(torch.ones(3, 2, device=ONE), torch.ones(3, 2, dtype=torch.int64, device=ONE))
    every = torch.arange(6, device=ONE)
    kernels, W_dec = cards.train.triton_kernels, torch.ones(4, 3, device=ONE)
    assert torch.equal(
        kernels.decode(kept.values, kept.indices, every[::2].clone(), W_dec), W_dec[:3] * 2
    )
    with pytest.raises(DeviceFault, match="contiguous"):
        kernels.decode(kept.values, kept.indices, every[::2], W_dec)


def test_finds_what_cuda_does_not_do_deterministically(card):
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(DeviceFault):
            torch.ones(3, 2, device=ONE).median(0)
    finally:
        torch.use_deterministic_algorithms(False)


WAITS = """\
x.sum().item()
bool(x.sum())
int(x.sum())
float(x[0])
x.tolist()
x.nonzero()
x[x > 0]
x[torch.tensor([1])]
x.__setitem__(x > 0, x.clone())
x.masked_select(x > 0)
x.unique()
x.cpu()
x.to("cpu", torch.float64)
torch.zeros(3).copy_(x)
x.repeat_interleave(x.long())
torch.equal(x, x)
torch.cuda.synchronize()
torch.linalg.eigh(x.view(3, 1) * x)
torch.arange(3)[x.long()[0]:]
"""
WAITS_NOT = """\
x[0] * 2
x[1:].add_(1)
x[x.long() - 1]
x.masked_fill(x > 0, 0)
x.__setitem__(x > 0, 0.0)
x.to("cpu", non_blocking=True)
torch.zeros(3).pin_memory().to(x.device, non_blocking=True)
torch.where(x > 0, x, 0.0).topk(2).values.sort(stable=True)
x.repeat_interleave(2)
len(x), x.shape, x.device, x.new_zeros(3)
"""


def product(tmp_path, monkeypatch, source):
    """A function f(x) of the product, with these lines."""
    monkeypatch.setattr(cards, "ROOT", tmp_path)
    (tmp_path / "train").mkdir()
    path = tmp_path / "train" / "planted.py"
    path.write_text("import torch\n\ndef f(x):\n" + "".join(f"    {line}\n" for line in source))
    spec = importlib.util.spec_from_file_location("planted", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.f


def test_finds_each_wait_that_no_comment_tells(card, tmp_path, monkeypatch):
    waits = WAITS.splitlines()
    lines = [
        *waits,
        *WAITS_NOT.splitlines(),
        "y = x.tolist()  # device sync",
        "",
        "# Device sync: all.",
        "x.tolist()",
    ]
    product(tmp_path, monkeypatch, lines)(torch.ones(3, device=ONE))
    found = sorted({int(wait.where.rpartition(":")[2]) - 4 for wait in card.hidden})
    assert found == list(range(len(waits)))
    assert len(card.waits) >= len(waits) + 2


def test_counts_copies_from_the_host(card, tmp_path, monkeypatch):
    lines = [
        "torch.tensor([1], device=x.device)",
        "torch.zeros(3).to(x.device)",
        "x.copy_(torch.ones(3))",
    ]
    product(tmp_path, monkeypatch, lines)(torch.zeros(3, device=ONE))
    assert [wait.what for wait in card.waits] == [FROM_HOST] * 3


# -- streams ---------------------------------------------------------------------------------------


def read_unwaited(side, batch):
    return side.begin(batch).batch + 1


def read_the_hosts_copy(side, batch):
    on_host = batch.to(ONE).to("cpu", non_blocking=True)
    return on_host + 1


def written_while_read(side, batch):
    x = batch.to(ONE)
    with torch.cuda.stream(Stream(ONE)):
        x + 1
    x.zero_()


@pytest.mark.parametrize("fault", [read_unwaited, read_the_hosts_copy, written_while_read])
def test_finds_streams_that_do_not_wait(fault, card):
    with pytest.raises(DeviceFault):
        fault(Side(ONE), torch.ones(4, 3).pin_memory())


def test_streams_that_wait_are_right(card):
    side, batch = Side(ONE), torch.ones(4, 3).pin_memory()
    copy = side.begin(batch)
    side.finish(copy)
    batch.zero_()
    assert side.hand_over(copy).float().sum().item() == 12
    on_host = copy.batch.to("cpu", non_blocking=True)
    torch.cuda.current_stream(ONE).synchronize()
    assert on_host.sum() == 12


def pinned_batches(number):
    """As a reader's: each in the memory of the one before."""
    memory = torch.zeros(4, 3).pin_memory()
    for at in range(number):
        memory.numpy()[:] = at
        yield memory


def served(is_early):
    """Means of batches, from streams that no host waits for."""
    means = []
    for batch in to_device(pinned_batches(4), ONE, lambda _: is_early):
        means.append(batch.mean())
    return [mean.item() for mean in means]


@pytest.mark.parametrize("is_early", [False, True])
def test_the_readers_side_stream_is_right(is_early):
    with Card():
        torch.cuda.set_device(1)
        assert served(is_early) == [0, 1, 2, 3]


BREAKS = {
    "not waited for": (Stream, "wait_event", lambda *_: None),
    "freed": (torch.Tensor, "record_stream", lambda *_: None),
    "overwritten": (Event, "synchronize", lambda *_: None),
}


def broken(monkeypatch, what):
    with Card():
        torch.cuda.set_device(1)
        monkeypatch.setattr(*what)
        served(is_early=False)


@pytest.mark.parametrize("name", BREAKS)
def test_finds_a_broken_side_stream(name, monkeypatch):
    with pytest.raises(DeviceFault):
        broken(monkeypatch, BREAKS[name])
