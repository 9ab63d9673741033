"""A pretended CUDA device: the real code runs on tensors that have shape, precision, layout and place, but no numbers.

Tensors on the device are torch's fake tensors. Copies to the host give zeros (ones for bytes and truth values), so that
code which looks at them goes on. Counted are the bytes that cross the bus, every operation at which the host waits for
the device, and the stream of each operation. Refused are operations on tensors of several devices or precisions, and
waits while a graph is captured. Seen are no races, no kernels, no values, no real memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import subprocess
import sysconfig
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from musetalk.streaming import BackgroundReader, BackgroundWriter

ROOT = Path(__file__).resolve().parents[2]
SOURCE = Path(__file__).with_name("pretended_guard.cpp")
COMPILERS = ("g++", "clang++")
DEVICE = torch.device("cuda")
_GIB = 2**30

aten: Any = torch.ops.aten
# All their floating-point tensors must have one precision; the formulas for shapes do not check it.
_ONE_PRECISION = {
    aten.convolution.default,
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten.native_group_norm.default,
    aten.native_layer_norm.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
}
_FILLS = {aten.uniform_.default, aten.normal_.default, aten.fill_.Scalar, aten.fill_.Tensor, aten.zero_.default}


def missing_compiler() -> str | None:
    """The reason to skip tests on the pretended card, or None."""
    if torch.version.cuda is not None or any(shutil.which(name) for name in COMPILERS):
        return None
    return f"no C++ compiler ({' or '.join(COMPILERS)}; Debian: apt-get install g++)"


def load_guard() -> None:
    """Build the guard library, once for each version of torch, and load it; a torch with CUDA has its own."""
    if torch.version.cuda is not None:
        return
    compiler = next(path for name in COMPILERS if (path := shutil.which(name)))
    tag = hashlib.sha256(f"{SOURCE.read_text()} {torch.__version__} {sysconfig.get_platform()}".encode()).hexdigest()
    library = ROOT / "build" / f"pretended_guard-{tag[:16]}.so"
    if not library.exists():
        library.parent.mkdir(exist_ok=True)
        unfinished = library.with_suffix(f".{threading.get_native_id()}")
        torch_dir = Path(torch.__file__).parent
        command = [compiler, "-std=c++20", "-O0", "-shared", "-fPIC", f"-I{torch_dir / 'include'}", str(SOURCE)]
        command += [f"-L{torch_dir / 'lib'}", "-lc10", "-o", str(unfinished)]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        unfinished.rename(library)
    operations: Any = torch.ops
    operations.load_library(str(library))


def _place() -> str:
    """The innermost line of the project outside the tests."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.is_relative_to(ROOT / "musetalk"):
            return f"{path.relative_to(ROOT)}:{frame.lineno} {frame.name}"
    return "tests"


@dataclass(frozen=True)
class Wait:
    """One operation at which the host waited for the device."""

    kind: str
    place: str
    thread: str


class Stream:
    """Stands for a CUDA stream; each is its own."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.name = "stream"

    def wait_stream(self, _other: object) -> None:
        """Order on the device: the host does not wait."""

    def wait_event(self, _event: object) -> None:
        """Order on the device: the host does not wait."""

    def synchronize(self) -> None:
        """The host waits."""
        _now().wait("stream.synchronize")


class Event:
    """Stands for a CUDA event that is never there early."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record(self, *_: Any) -> None:
        """Mark a place on the stream."""

    def query(self) -> bool:
        """Always under way: the code must not count on the device being fast."""
        return False

    def synchronize(self) -> None:
        """The host waits."""
        _now().wait("event.synchronize")


class Graph:
    """Stands for a captured CUDA graph."""

    n_replays = 0

    def replay(self) -> None:
        """One launch."""
        type(self).n_replays += 1


@dataclass
class Card:
    """What the device was given, by all threads."""

    fake: FakeTensorMode = field(default_factory=lambda: FakeTensorMode(allow_non_fake_inputs=True))
    lock: Any = field(default_factory=threading.RLock)
    waits: list[Wait] = field(default_factory=list)
    bytes_up: int = 0
    bytes_down: int = 0
    n_operations: int = 0
    # Operations by the stream they were launched on.
    by_stream: dict[Any, int] = field(default_factory=dict)
    default_stream: Stream = field(default_factory=Stream)
    here: Any = field(default_factory=threading.local)
    is_capturing: bool = False

    @property
    def stream(self) -> Any:
        """The current stream of this thread."""
        return getattr(self.here, "stream", None) or self.default_stream

    def wait(self, kind: str) -> None:
        """Note that the host waits; an error while a graph is captured."""
        if self.is_capturing:
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({kind} at {_place()})")
        self.waits.append(Wait(kind, _place(), threading.current_thread().name))

    @contextlib.contextmanager
    def waits_of(self, found: list[Wait]) -> Iterator[None]:
        """Collect the waits of this thread in the block."""
        first, name = len(self.waits), threading.current_thread().name
        yield
        found += [wait for wait in self.waits[first:] if wait.thread == name]

    def empty(self, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor on the device with the shape and layout of another."""
        with self.fake:
            return torch.empty_strided(tuple(like.shape), like.stride(), dtype=dtype or like.dtype, device="cuda:0")

    def uploaded(self, source: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """The result of a copy to the device."""
        self.count_upload(source, bool(kwargs.get("non_blocking")))
        copy = self.empty(source, kwargs.get("dtype"))
        layout = kwargs.get("memory_format")
        if layout in (None, torch.preserve_format):
            return copy
        with self.fake:
            return copy.contiguous(memory_format=layout)

    def count_upload(self, source: Tensor, non_blocking: bool) -> None:
        """Bytes up; the host waits unless they come from pinned memory and need not be there at once."""
        if self.is_capturing:
            raise RuntimeError(f"a graph would read memory of the host at every replay ({_place()})")
        self.bytes_up += source.nbytes
        if source.ndim and not (non_blocking and getattr(source, "is_pretended_pinned", False)):
            self.wait("blocking upload")

    def downloaded(self, source: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The result of a copy to the host."""
        self.bytes_down += source.nbytes
        dtype = dtype or source.dtype
        make = torch.ones if dtype in (torch.bool, torch.uint8) else torch.zeros
        return make(tuple(source.shape), dtype=dtype)


_current: list[Card] = []


def _now() -> Card:
    return _current[-1]


@cache
def _is_composite(func: Any) -> bool:
    """Whether an operation is made of others, which are seen one by one."""
    has_kernel, name = torch._C._dispatch_has_kernel_for_dispatch_key, func.name()
    return func.namespace != "prim" and has_kernel(name, "CompositeImplicitAutograd") and not has_kernel(name, "Meta")


_Mode: Any = TorchDispatchMode


class _Dispatch(_Mode):  # type: ignore[misc]
    """Sees every operation of one thread."""

    def __init__(self, card: Card) -> None:
        super().__init__()
        self.card = card

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if _is_composite(func):
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        with self.card.lock:
            return self._run(func, args, kwargs)

    def _run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        card = self.card
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        here = [tensor for tensor in tensors if isinstance(tensor, FakeTensor)]
        wanted = kwargs.get("device")
        to_device = wanted is not None and torch.device(wanted).type == "cuda"
        if func is torch.ops.prim.device.default:
            return args[0].fake_device if here else torch.device("cpu")
        if not here and not to_device:
            kwargs.pop("pin_memory", None)
            return func(*args, **kwargs)
        card.n_operations += 1
        card.by_stream[card.stream] = card.by_stream.get(card.stream, 0) + 1
        if func in _FILLS:
            return args[0]
        if func is aten._to_copy.default and not here:
            return card.uploaded(args[0], kwargs)
        if func is aten._to_copy.default and wanted is not None and not to_device:
            card.wait("download")
            return card.downloaded(args[0], kwargs.get("dtype"))
        if func is aten.copy_.default:
            return self._copy(args, kwargs)
        if func is aten._local_scalar_dense.default:
            card.wait("a number is read")
            return True if args[0].dtype == torch.bool else 1
        if func is aten.nonzero.default:
            card.wait("nonzero")
        if func is aten.index.Tensor or func is aten.index_put_.default:
            self._check_index(args[1])
        on_host = [tensor for tensor in tensors if not isinstance(tensor, FakeTensor) and tensor.ndim]
        return self._compute(func, args, kwargs, on_host)

    def _copy(self, args: Any, kwargs: dict[str, Any]) -> Tensor:
        card, (target, source) = self.card, args[:2]
        non_blocking = bool(args[2] if len(args) > 2 else kwargs.get("non_blocking"))
        if not isinstance(target, FakeTensor):
            if not non_blocking:
                card.wait("download")
            target.copy_(card.downloaded(source))
            return cast(Tensor, target)
        if not isinstance(source, FakeTensor):
            card.count_upload(source, non_blocking)
            source = card.empty(source)
        with card.fake:
            result: Tensor = aten.copy_.default(target, source)
        return result

    def _check_index(self, indices: Any) -> None:
        for index in indices:
            if isinstance(index, Tensor) and not isinstance(index, FakeTensor):
                self.card.wait("index from the host")
            if isinstance(index, Tensor) and index.dtype == torch.bool:
                self.card.wait("index by truth values")

    def _compute(self, func: Any, args: Any, kwargs: dict[str, Any], on_host: list[Tensor]) -> Any:
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if func in _ONE_PRECISION:
            precisions = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
            if len(precisions) > 1:
                raise RuntimeError(f"{func} mixes {precisions} at {_place()}")
        if on_host and func is not aten.index.Tensor and func is not aten.index_put_.default:
            raise RuntimeError(f"{func} mixes tensors of host and device at {_place()}")
        if on_host:
            args, kwargs = pytree.tree_map(self._moved, (args, kwargs))
        with self.card.fake:
            return func(*args, **kwargs)

    def _moved(self, value: Any) -> Any:
        is_host = isinstance(value, Tensor) and not isinstance(value, FakeTensor) and value.ndim > 0
        return self.card.empty(value) if is_host else value


def _pinned(tensor: Tensor, *_: Any) -> Tensor:
    copy: Any = tensor.clone()
    copy.is_pretended_pinned = True
    pinned: Tensor = copy
    return pinned


def _applied(module: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """`nn.Module._apply` with new parameters: a tensor of the host cannot become one of the device in place."""
    for child in module.children():
        cast(Any, child)._apply(change)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            module._parameters[name] = nn.Parameter(change(parameter.detach()), requires_grad=False)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = change(buffer)
    return module


def _patches(card: Card) -> Iterator[Any]:
    """Everything of torch that would look for a real card."""

    def put(owner: Any, name: str, value: Any) -> Any:
        return mock.patch.object(owner, name, value)

    usual_item, usual_tensor = Tensor.__getitem__, torch.tensor
    usual_device: Any = FakeTensor.device

    def device(tensor: Any) -> torch.device:
        # While one thread computes shapes, which it does as if on no device, the others must not see that.
        is_mine: bool = card.lock._is_owned()
        found: torch.device = usual_device.fget(tensor) if is_mine else tensor.fake_device
        return found

    def item(tensor: Tensor, index: Any) -> Any:
        if isinstance(tensor, FakeTensor) and isinstance(index, list):
            card.wait("index from the host")
            index = torch.empty(len(index), dtype=torch.long, device=DEVICE)
        return usual_item(tensor, index)

    def tensor(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        made = usual_tensor(data, *args, **kwargs)
        return made if device is None or torch.device(device).type == "cpu" else made.to(device)

    @contextlib.contextmanager
    def on_stream(stream: Any) -> Iterator[None]:
        before = getattr(card.here, "stream", None)
        card.here.stream = stream or before
        yield
        card.here.stream = before

    @contextlib.contextmanager
    def capture(_graph: Any, stream: Any = None, **_: Any) -> Iterator[None]:
        card.is_capturing = True
        try:
            with on_stream(stream):
                yield
        finally:
            card.is_capturing = False

    yield put(FakeTensor, "device", property(device))
    yield put(Tensor, "__getitem__", item)
    yield put(Tensor, "pin_memory", _pinned)
    yield put(nn.Module, "_apply", _applied)
    yield put(torch, "tensor", tensor)
    memory = (20 * _GIB, 24 * _GIB)
    stand_ins: dict[str, Any] = {
        "is_available": lambda: True,
        "_lazy_init": lambda: None,
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": capture,
        "stream": on_stream,
        "current_stream": lambda _device=None: card.stream,
        "synchronize": lambda _device=None: card.wait("torch.cuda.synchronize"),
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda _device=None: None,
        "memory_allocated": lambda _device=None: 0,
        "max_memory_allocated": lambda _device=None: _GIB // 8,
        "mem_get_info": lambda _device=None: memory,
        "get_device_capability": lambda _device=None: (9, 0),
        "get_device_name": lambda _device=None: "Pretended",
        "get_arch_list": list,
    }
    for name, value in stand_ins.items():
        yield put(torch.cuda, name, value)
    for kind in (BackgroundReader, BackgroundWriter):
        usual_run: Any = kind._run

        def run(thread: Any, usual_run: Any = usual_run) -> None:
            with _Dispatch(card):
                usual_run(thread)

        yield put(kind, "_run", run)


@contextlib.contextmanager
def pretended_card() -> Iterator[Card]:
    """A CUDA device in this thread and in those around the model, for the block."""
    load_guard()
    card = Card()
    with contextlib.ExitStack() as stack:
        # torch.tensor then makes its values on the host and copies them, which can be seen; what ran before in this
        # process may have left it otherwise.
        stack.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)
        for patch in _patches(card):
            stack.enter_context(patch)
        _current.append(card)
        stack.callback(_current.pop)
        stack.enter_context(_Dispatch(card))
        yield card
