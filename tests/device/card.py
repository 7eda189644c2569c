"""A CUDA card that is not there: "cuda" tensors are CPU tensors that say they are on cuda:N.

    with Card() as card:                 # two cards; all is to happen on cuda:1
        device = torch_device("cuda:1")
        ...
    card.hidden                          # waits for the device that no comment tells

A storage knows where it lives (streams.Place), so views and what torch makes of a tensor live there
too. A function mode answers for Python (device=, .to, .is_cuda, .numpy), a dispatch mode looks at
each operation. Faults (streams.DeviceFault): operands of two devices; anything on another card than
cuda:1; what one stream reads before it waits for the other that wrote it; memory freed or
overwritten under a copy. Kernels in Triton are stood in: they check their operands and compute as
the CPU does, so figures are the CPU's own.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from types import FrameType, ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from residual_saes import train
from residual_saes.train import kernels
from tests.device.streams import HOST, Arrival, DeviceFault, Event, Place, Stream

FROM_HOST = "copy from the host"
ROOT = Path(__file__).resolve().parents[2]
PRODUCT = ("data", "conf", "harvest", "train", "analyze", "residual_saes")
CPU = torch.device("cpu")
# Operations after which the host knows a size or a value: it waits for the device.
_WAITS = (
    *("_local_scalar_dense", "nonzero", "masked_select", "_unique", "_unique2", "unique_dim"),
    *("unique_consecutive", "equal", "bincount", "_coalesce", "_linalg_eigh", "linalg_qr"),
    *("_linalg_svd", "linalg_lstsq", "linalg_cholesky_ex", "_linalg_solve_ex", "linalg_inv_ex"),
)
# What raises on CUDA under torch.use_deterministic_algorithms, and what there is not for integers.
_UNDETERMINED = ("median", "kthvalue", "histc", "put_", "nll_loss_forward")
_PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "mv", "dot")
_INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")
_CREATES = ("scalar_tensor", "lift_fresh", "lift")


class Wait(NamedTuple):
    """The host waited for the device."""

    what: str
    where: str  # file:line of the product, innermost first
    told: bool  # a comment says so


class _Thread(threading.local):
    device = 0  # of each new thread, as CUDA has it

    def __init__(self) -> None:
        self.streams: dict[int, Stream] = {}


_here = _Thread()
_card: Card | None = None  # the one that is on


def touched(device: Any = None) -> torch.device:
    """The device of a call: the current one where no number is given. It must be the card's."""
    assert _card is not None
    if isinstance(device, int):
        device = torch.device("cuda", device)
    named = torch.device("cuda" if device is None else device)
    number = _here.device if named.index is None else named.index
    if number != _card.number:
        raise _card.fault(f"cuda:{number} is used where all is on cuda:{_card.number}")
    return torch.device("cuda", number)


def current_stream(device: Any = None) -> Stream:
    assert _card is not None
    number = touched(device).index
    return _here.streams.get(number) or _card.default


def place_of(tensor: Tensor) -> Place | None:
    """None: plain memory of the host."""
    if tensor.layout is not torch.strided:
        tensor = tensor._values()
    if tensor.device.type == "meta":
        return None
    return getattr(tensor.untyped_storage(), "place", None)


def _put(tensor: Tensor, place: Place | None) -> None:
    if tensor.layout is not torch.strided:
        _put(tensor._indices(), place)
        tensor = tensor._values()
    if tensor.device.type != "meta":
        tensor.untyped_storage().place = place


def _each(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _each(value)
    elif isinstance(values, dict):
        yield from _each(list(values.values()))


@cache
def _lines(path: str) -> tuple[bool, list[str]]:
    real = Path(path).resolve()
    ours = real.is_relative_to(ROOT) and real.relative_to(ROOT).parts[0] in PRODUCT
    return ours, real.read_text().splitlines() if ours else []


def _told(frame: FrameType) -> bool:
    """A comment in the paragraph down to the frame's line says it, or the module's docstring."""
    lines = _lines(frame.f_code.co_filename)[1]
    if "aits for the device" in (frame.f_globals["__doc__"] or ""):
        return True
    for line in reversed(lines[: frame.f_lineno]):
        if "device sync" in line.lower() or "waits for the device" in line:
            return True
        if not line.strip() or line.lstrip().startswith(("def ", "class ")):
            return False
    return False


@cache
def _is_composite(func: Any) -> bool:
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key)


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert _card is not None
        with torch._C.DisableTorchFunction():
            if _is_composite(func):  # in inference mode: look at what it is made of
                with self:
                    return func.decompose(*args, **(kwargs or {}))
            return _card.operation(func, args, kwargs or {})


class _Function(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert _card is not None
        return _card.call(func, args, dict(kwargs or {}))


class Card:
    """Cards 0 and 1; what is done in the block is to be done on card `number`."""

    def __init__(self, number: int = 1) -> None:
        self.number = number
        self.waits: list[Wait] = []
        self.faults: list[str] = []
        self.kernels: list[str] = []  # stood in, by name, in the order of their launches
        self._stack = ExitStack()
        answers: dict[Any, Callable[..., Any]] = {
            Tensor.device.__get__: lambda x: self.device_of(x),
            Tensor.is_cuda.__get__: lambda x: self.device_of(x).type == "cuda",
            Tensor.is_cpu.__get__: lambda x: self.device_of(x).type == "cpu",
            Tensor.get_device: lambda x: self.device_of(x).index if self.device_of(x).index else -1,
            Tensor.to: self._to,
            Tensor.cpu: lambda x, **_: self.move(x, CPU, False),
            Tensor.cuda: lambda x, device=None, non_blocking=False: self.move(
                x, touched(device), non_blocking
            ),
            Tensor.pin_memory: self._pin,
            Tensor.is_pinned: lambda x, *_: bool((place := place_of(x)) and place.pinned),
            Tensor.tolist: self._tolist,
            Tensor.numpy: self._numpy,
            Tensor.__array__: self._numpy,
            torch.as_tensor: self._as_tensor,
            torch.asarray: self._as_tensor,
        }
        self._answers = answers

    @property
    def hidden(self) -> list[Wait]:
        """Waits of the product that no comment tells; a copy from the host is plain to see."""
        return [wait for wait in self.waits if not wait.told and wait.what != FROM_HOST]

    def __enter__(self) -> Card:
        global _card
        assert _card is None
        _card, _here.device = self, 0
        HOST.knows.clear()
        Arrival.under_way.clear()
        Place.lost.clear()
        self.default = Stream(torch.device("cuda", self.number))
        patch = self._stack.enter_context(pytest.MonkeyPatch.context())
        for name, stand_in in _torch_cuda(self).items():
            patch.setattr(torch.cuda, name, stand_in)
        patch.setattr(torch.autograd, "has_torch_function", lambda _: False)  # the mode stays on
        patch.setattr(threading.Thread, "run", _with_modes(threading.Thread.run))
        # Its own takes torch's streams alone.
        patch.setattr(Tensor, "record_stream", lambda x, s: place_of(x).recorded.add(s))
        patch.setattr(torch, "Generator", _Generator)
        stand_in = self._triton()
        patch.setitem(sys.modules, stand_in.__name__, stand_in)
        patch.setattr(train, "triton_kernels", stand_in, raising=False)
        self._stack.enter_context(_Function())
        self._stack.enter_context(_Dispatch())
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        global _card
        self._stack.close()
        _card, _here.device = None, 0
        _here.streams.clear()
        if kind is None:
            Arrival.check(None)
            self.faults.extend(Place.lost)
            if self.faults:
                raise DeviceFault("; ".join(self.faults))

    def fault(self, text: str) -> DeviceFault:
        """Kept, too: the product may answer an exception in its own way."""
        self.faults.append(text)
        return DeviceFault(text)

    def wait(self, what: str) -> None:
        """The host waits for the current stream."""
        HOST.learn(current_stream(self.number).now())
        frames: list[FrameType] = []
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            if _lines(frame.f_code.co_filename)[0]:
                frames.append(frame)
            frame = frame.f_back
        if frames:
            where = [f"{Path(f.f_code.co_filename).name}:{f.f_lineno}" for f in frames[:3]]
            told = any(map(_told, frames[:2]))
            self.waits.append(Wait(what, " < ".join(where), told))

    def device_of(self, tensor: Tensor) -> torch.device:
        place = place_of(tensor)
        return place.device if place is not None and place.device is not None else tensor.device

    # -- what Python asks --------------------------------------------------------------------------

    def call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        answer = self._answers.get(func)
        if answer is not None:
            with torch._C.DisableTorchFunction():
                return answer(*args, **kwargs)
        pinned = kwargs.pop("pin_memory", False)
        asked = kwargs.get("device")
        if isinstance(asked, int):
            asked = torch.device("cuda", asked)
        wanted = None if asked is None else torch.device(asked)
        if wanted is not None and wanted.type == "cuda":
            wanted, kwargs["device"] = touched(wanted), CPU
        elif func is Tensor.new_tensor and wanted is None:
            wanted = self.device_of(args[0])
        result = func(*args, **kwargs)
        for tensor in _each(result):
            with torch._C.DisableTorchFunction():
                place = place_of(tensor)
                if wanted is not None and wanted.type == "cuda":
                    if func in (torch.tensor, Tensor.new_tensor):
                        self.wait(FROM_HOST)
                    self._made(tensor, wanted)
                elif wanted is not None or (place and place.device is None and not _each_in(args)):
                    _put(tensor, None)
                if pinned:
                    self._made(tensor, CPU).pinned = True
        return result

    def _made(self, tensor: Tensor, device: torch.device) -> Place:
        """New memory on `device`, written by its current stream."""
        stream = current_stream(device) if device.type == "cuda" else None
        place = Place(device, stream)
        _put(tensor, place)
        if stream is not None:
            stream.count += 1
            place.use(stream, True, "making")
        return place

    def _to(self, x: Tensor, *args: Any, copy: bool = False, **kwargs: Any) -> Tensor:
        like = kwargs.pop("other", None)
        if args and isinstance(args[0], Tensor):
            like, args = args[0], args[1:]
        if like is not None:
            kwargs.update(device=self.device_of(like), dtype=like.dtype)
        device, dtype, non_blocking, layout = torch._C._nn._parse_to(*args, **kwargs)
        if device is not None and device.type not in ("cpu", "cuda"):
            return x.to(device, dtype, copy=copy)
        if device is not None and device.type == "cuda":
            device = touched(device)
        if device is None or device == self.device_of(x):
            return x.to(dtype=dtype or x.dtype, copy=copy, memory_format=layout)
        return self.move(x, device, non_blocking, dtype)

    def move(
        self, x: Tensor, device: torch.device, non_blocking: bool, dtype: torch.dtype | None = None
    ) -> Tensor:
        """A copy on another device; `x` itself where it is there already."""
        if device == self.device_of(x):
            return x
        moved = x.to(dtype=dtype or x.dtype, copy=True)
        place = self._made(moved, device)
        place.pinned = non_blocking and device == CPU
        self._transfer(moved, x, non_blocking)
        return moved

    def _transfer(self, to: Tensor, source: Tensor, non_blocking: bool) -> None:
        """One copy between host and device. It waits unless told not to, from pinned memory."""
        into, out = place_of(to), place_of(source)
        stream = current_stream(self.number)
        stream.count += 1
        if self.device_of(to) == CPU:
            assert out is not None
            out.use(stream, False, "a copy to the host")
            if not (non_blocking and into is not None and into.pinned):
                return self.wait("copy to the host")
            into.use(stream, True, "a copy to the host")
        else:
            assert into is not None
            into.use(stream, True, "a copy from the host")
            if not non_blocking:
                return self.wait(FROM_HOST)
            if out is not None and out.pinned:
                Arrival(source, stream)
        return None

    def _pin(self, x: Tensor, *_: Any) -> Tensor:
        if self.device_of(x) != CPU:
            raise self.fault("pin_memory of memory that is not the host's")
        pinned = x.clone()
        self._made(pinned, CPU).pinned = True
        return pinned

    def _as_tensor(self, data: Any, dtype: Any = None, device: Any = None, **_: Any) -> Tensor:
        made = data if isinstance(data, Tensor) else torch.asarray(data, dtype=dtype)
        return self._to(made, device or self.device_of(made), dtype or made.dtype)

    def _numpy(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        place = place_of(x)
        if place is not None and place.device is not None:
            if place.device.type == "cuda":
                raise self.fault(f"numpy of a tensor on {place.device}")
            place.use(HOST, False, "numpy")
        return x.__array__(*args) if args else x.numpy(**kwargs)

    def _tolist(self, x: Tensor) -> Any:
        if self.device_of(x).type == "cuda":
            self.wait("tolist")
        return x.clone().tolist() if x.layout is torch.strided else x.tolist()

    # -- each operation ----------------------------------------------------------------------------

    def operation(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        given = list(_each([*args, kwargs]))
        placed = [(tensor, place_of(tensor)) for tensor in given]
        name = func._schema.name.removeprefix("aten::")
        cuda = [place for _, place in placed if place and place.device and place.device != CPU]
        made_within = [place for _, place in placed if place and place.device is None]
        if not cuda:
            for place in {id(place): place for _, place in placed if place}.values():
                place.use(HOST, False, name)
            result = self._run(func, args, kwargs)
            unplaced = len(made_within) == len(given) and (made_within or name not in _CREATES)
            for tensor in _each(result):
                if unplaced and (not given or place_of(tensor) is None):
                    _put(tensor, Place(None))
            return result
        device = cuda[0].device
        assert device is not None
        if name == "copy_" and self.device_of(args[0]) != self.device_of(args[1]):
            result = self._run(func, args, kwargs)
            waits_not = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
            if not any(place is not None and place.device is None for _, place in placed[:2]):
                self._transfer(args[0], args[1], waits_not)
            return result
        self._require_one_device(func, name, args, placed, cuda)
        if torch.are_deterministic_algorithms_enabled() and name in _UNDETERMINED:
            raise self.fault(f"{name} has no deterministic way on CUDA")
        if name in _PRODUCTS and not args[1].dtype.is_floating_point:
            raise self.fault(f"{name} of {args[1].dtype} is not there on CUDA")
        stream = current_stream(device)
        stream.count += 1
        writes = set()
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                writes |= {id(place_of(tensor)) for tensor in _each(value)}
        writes |= {id(place_of(tensor)) for tensor in _each(kwargs.get("out"))}
        is_view = not writes and all(r.alias_info for r in func._schema.returns)
        for place in {id(place): place for _, place in placed if place}.values():
            if place.device is None and id(place) in writes:
                place.device, place.home = device, stream
            if place.device == device and not is_view:
                place.use(stream, id(place) in writes, name)
        result = self._run(func, args, kwargs)
        storages = {id(place) for _, place in placed if place}
        for tensor in _each(result):
            place = place_of(tensor)
            if not is_view and (place is None or id(place) not in storages):
                self._made(tensor, device)
        if name in _WAITS or self._looks_inside(name, args, kwargs):
            self.wait(name)
        return result

    @staticmethod
    def _run(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if func is torch.ops.aten.mm.dtype_out:  # of CUDA alone
            return kwargs["out"].copy_(args[0].to(args[2]) @ args[1].to(args[2]))
        return func(*args, **kwargs)

    def _looks_inside(self, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
        """Whether the host needs what operands hold: masks as indices, repeats, indices of its."""
        if name == "repeat_interleave":
            return kwargs.get("output_size") is None and len(args) < 2
        if name not in _INDEXED:
            return False
        indices = [index for index in args[1] if index is not None]
        if any(self.device_of(index) == CPU and index.numel() > 0 for index in indices):
            return True
        masks = [index for index in indices if index.dtype in (torch.bool, torch.uint8)]
        return bool(masks) and not (name != "index" and args[2].numel() == 1)  # a masked fill

    def _require_one_device(
        self, func: Any, name: str, args: Any, placed: Any, cuda: list[Place]
    ) -> None:
        for place in cuda:
            if place.device != cuda[0].device or place.device.index != self.number:
                raise self.fault(f"{name} of tensors on {place.device} and {cuda[0].device}")
        for at, (tensor, place) in enumerate(placed):
            if place is not None and place.device != CPU:
                continue
            scalar = tensor.dim() == 0 and (torch.Tag.pointwise in func.tags or name in _INDEXED)
            index = name in _INDEXED and any(tensor is found for found in _each(args[1]))
            written = at == 0 and name.endswith("_")
            if not (scalar or index or "_fused_adam" in name) or written:
                raise self.fault(f"{name} of tensors on {cuda[0].device} and on the host")

    # -- kernels -----------------------------------------------------------------------------------

    def _triton(self) -> ModuleType:
        """train/triton_kernels.py by the CPU's own functions."""
        k, made = kernels, ModuleType("residual_saes.train.triton_kernels")

        def weight_gradient(source: Any, weights: Any, order: Any, rows: Any, starts: Any, _: int):
            return torch.nn.functional.embedding_bag(
                rows, source, starts, mode="sum", per_sample_weights=weights[order]
            )

        def sums(weights: Tensor, order: Tensor, starts: Tensor) -> Tensor:
            ends = torch.cat([starts[1:], starts.new_tensor([len(order)])])
            latents = torch.arange(len(starts)).repeat_interleave(ends - starts)
            where = torch.empty_like(latents).scatter_(0, order, latents)
            return weights.new_zeros(len(starts)).scatter_add_(0, where, weights)

        def pairs(values: Tensor, indices: Tensor, starts: Tensor) -> kernels.Kept:
            rows = torch.bucketize(torch.arange(len(indices)), starts, right=True) - 1
            return k.Kept(values, indices, rows, starts)

        made.topk = self._kernel(k.topk)
        made.decode = self._kernel(lambda v, i, s, W: k.decode(pairs(v, i, s), W), "decode")
        made.values_gradient = self._kernel(
            lambda u, i, s, W: k.values_gradient(u, pairs(i, i, s), W), "values_gradient"
        )
        made.weight_gradient = self._kernel(weight_gradient)
        made.latent_sums = self._kernel(sums, "latent_sums")
        return made

    def _kernel(self, compute: Callable[..., Any], name: str | None = None) -> Callable[..., Any]:
        """A kernel that takes only what a launch would take: its own card's, in one piece."""
        called = name or compute.__name__

        def launch(*given: Any) -> Any:
            with torch._C.DisableTorchFunction():
                for tensor in _each(given):
                    device = self.device_of(tensor)
                    if device != torch.device("cuda", _here.device):
                        raise self.fault(f"{called} of {device} while cuda:{_here.device} is on")
                    if not tensor.is_contiguous() and called != "topk":
                        raise self.fault(f"{called} of a tensor that is not contiguous")
                    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.int64):
                        raise self.fault(f"{called} of {tensor.dtype}")
                    stream = current_stream(device)
                    stream.count += 1
                    place_of(tensor).use(stream, False, called)
                self.kernels.append(called)
                with torch.utils._python_dispatch._disable_current_modes():
                    result = compute(*given)
                for tensor in _each(result):
                    self._made(tensor, torch.device("cuda", _here.device))
                return result

        return launch


class _Generator(torch.Generator):
    """The host's, on any device: draws are the CPU's."""

    def __new__(cls, device: Any = None) -> _Generator:
        return super().__new__(cls)


def _each_in(args: Any) -> bool:
    return any(True for _ in _each(args))


def _with_modes(run: Callable[..., None]) -> Callable[..., None]:
    """Modes are of one thread: new ones take them on."""

    def started(self: threading.Thread) -> None:
        if _card is None:
            return run(self)
        with _Function(), _Dispatch():
            return run(self)

    return started


def _torch_cuda(card: Card) -> dict[str, Any]:
    """Stand-ins for what torch.cuda has."""

    @contextmanager
    def device(of: Any) -> Iterator[None]:
        before = _here.device
        index = torch.device("cuda", of).index if isinstance(of, int) else torch.device(of).index
        _here.device = before if index is None else index
        try:
            yield
        finally:
            _here.device = before

    @contextmanager
    def stream(on: Stream | None) -> Iterator[None]:
        before, current = dict(_here.streams), _here.device
        if on is not None:
            _here.device = on.device.index
            _here.streams[on.device.index] = on
        try:
            yield
        finally:
            _here.streams, _here.device = before, current

    def set_device(of: Any) -> None:
        _here.device = of if isinstance(of, int) else torch.device(of).index

    def synchronize(of: Any = None) -> None:
        touched(of)
        card.wait("synchronize")
        Arrival.check(None)

    facts = SimpleNamespace(
        name="None", total_memory=80 << 30, major=9, minor=0, multi_processor_count=132
    )
    return {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "is_initialized": lambda: True,
        "current_device": lambda: _here.device,
        "set_device": set_device,
        "device": device,
        "device_of": lambda tensor: device(tensor.device),
        "Stream": Stream,
        "Event": Event,
        "stream": stream,
        "current_stream": current_stream,
        "default_stream": lambda of=None: (touched(of), card.default)[1],
        "synchronize": synchronize,
        "empty_cache": lambda: None,
        "mem_get_info": lambda of=None: (touched(of), (60 << 30, 80 << 30))[1],
        "get_device_properties": lambda of=None: (touched(of), facts)[1],
        "get_device_name": lambda of=None: (touched(of), facts.name)[1],
        "get_device_capability": lambda of=None: (touched(of), (9, 0))[1],
        "max_memory_allocated": lambda of=None: (touched(of), 1 << 30)[1],
        "reset_peak_memory_stats": lambda of=None: touched(of),
        "is_bf16_supported": lambda *_, **__: True,
    }
