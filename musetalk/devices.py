"""The device the networks run on: which one, whether it is fit, its memory, and what its errors mean.

Knows torch, nothing of networks or pictures.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import cv2
import torch

from musetalk.cores import thread_count
from musetalk.errors import GpuLostError, OutOfMemoryError, ProcessingError, WeightsError

_MIB = 2**20
# First compute capability (major) with tensor cores.
_TENSOR_CORES = 7
# After one of these every further call of the process fails; torch's text is the only place that says which it was.
_LOST_SIGNS = (
    "illegal memory access",
    "device-side assert",
    "unspecified launch failure",
    "misaligned address",
    "illegal instruction",
    "device is lost",
    "gpu has fallen off the bus",
    "uncorrectable ecc error",
    "cudnn_status_execution_failed",
    "cublas_status_execution_failed",
    "cuda error",
)


def choose_device(wanted: str) -> torch.device:
    """`auto`, `cpu` or `cuda` as a device; raises WeightsError when CUDA is requested and unavailable."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise WeightsError("a GPU was asked for, but torch sees no CUDA device", retryable=True)
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def torch_version() -> str:
    """The version of torch with its build, for logs and metrics."""
    return str(torch.__version__)


def choose_dtype(wanted: str, device: torch.device) -> tuple[torch.dtype, str]:
    """Precision of the networks and why; `auto` is the fastest that the device computes natively.

    float16 on a GPU with tensor cores (from capability 7.0 on; the weights are run so upstream too), float32 on older
    ones; on a CPU bfloat16 where it has instructions for it, else float32.
    """
    named = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if wanted in named:
        return named[wanted], "MUSETALK_DTYPE says so"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if major >= _TENSOR_CORES:
            return torch.float16, f"compute capability {major}.{minor} has tensor cores for it"
        return torch.float32, f"compute capability {major}.{minor} has no tensor cores"
    if cpu_has_bfloat16():
        return torch.bfloat16, "the CPU has instructions for it"
    return torch.float32, "the CPU has no instructions for less"


def cpu_has_bfloat16(gpu: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the CPU multiplies bfloat16 itself (AVX-512 BF16 or AMX); elsewhere torch imitates it, slowly."""
    try:
        flags = gpu.read_text(encoding="ascii", errors="replace").split()
    except OSError:
        return False
    return any(flag in flags for flag in ("avx512_bf16", "amx_bf16"))


def configure_threads(wanted: int, device: torch.device) -> int:
    """Set and return the number of CPU threads for tensor work; 0 chooses.

    With a GPU one thread is right: what is left on the CPU is small, and more threads only spin
    (docs/model.md#precision-and-batches). Without one, as many as the cores that the CPU quota leaves.
    """
    n_threads = wanted or (1 if device.type == "cuda" else thread_count())
    torch.set_num_threads(n_threads)
    # OpenCV counts the machine's cores, without the quota of newer control groups.
    cv2.setNumThreads(min(cv2.getNumThreads(), thread_count()))
    return n_threads


def is_lost(error: BaseException) -> bool:
    """Whether `error` says that this process cannot use the GPU any more."""
    if isinstance(error, torch.OutOfMemoryError) or not isinstance(error, RuntimeError):
        return False
    text = str(error).lower()
    return any(sign in text for sign in _LOST_SIGNS)


@contextmanager
def gpu_errors() -> Iterator[None]:
    """Turn torch's GPU errors into ours: out of memory where no smaller batch is left to try, and a lost GPU.

    The traceback is dropped because it keeps the tensors that did not fit.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise OutOfMemoryError("the GPU's memory is too small for this job", is_oom=True) from None
    except RuntimeError as error:
        if not is_lost(error):
            raise
        raise GpuLostError("the GPU failed and needs a new process", reason=_first_line(error)) from None


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0][:200]


@dataclass(frozen=True)
class GpuProperties:
    """Properties of a GPU before it is used; memory in MiB."""

    name: str
    capability: tuple[int, int]
    architectures: tuple[str, ...]
    free_mib: int
    total_mib: int


def gpu_properties(device: torch.device) -> GpuProperties:
    """Read the properties of a CUDA device; raises GpuLostError when they cannot be read."""
    try:
        free, total = torch.cuda.mem_get_info(device)
        return GpuProperties(
            name=torch.cuda.get_device_name(device),
            capability=torch.cuda.get_device_capability(device),
            architectures=tuple(torch.cuda.get_arch_list()),
            free_mib=free // _MIB,
            total_mib=total // _MIB,
        )
    except RuntimeError as error:
        raise GpuLostError("the GPU cannot be asked", reason=_first_line(error)) from None


def gpu_problem(gpu: GpuProperties, min_free_mib: int) -> str | None:
    """Reason why a GPU with these properties cannot be used, or None.

    A binary for the same major capability runs on a later minor one; `compute_XY` is compiled for any later card when
    it is loaded (CUDA's compatibility rules).
    """
    major, minor = gpu.capability
    fits = any(_runs_on(name, major, minor) for name in gpu.architectures)
    if gpu.architectures and not fits:
        known = " ".join(gpu.architectures)
        return f"{gpu.name} has compute capability {major}.{minor}, this torch is compiled for {known}"
    if gpu.free_mib < min_free_mib:
        return f"{gpu.name} has {gpu.free_mib} of {gpu.total_mib} MiB free, MIN_GPU_MEMORY_MB asks for {min_free_mib}"
    return None


def _runs_on(architecture: str, major: int, minor: int) -> bool:
    kind, _, number = architecture.partition("_")
    digits = "".join(character for character in number if character.isdigit())
    if not digits:
        return False
    built = (int(digits[:-1] or 0), int(digits[-1]))
    if kind == "compute":
        return built <= (major, minor)
    return built[0] == major and built[1] <= minor


def try_out(device: torch.device) -> None:
    """A small product on the device, checked; raises ProcessingError when it fails or is wrong."""
    numbers = torch.arange(64, dtype=torch.float32).reshape(8, 8)
    with gpu_errors():
        product = (numbers.to(device) @ numbers.to(device)).cpu()
    if not torch.allclose(product, numbers @ numbers):
        raise ProcessingError(f"the device {device} computes wrong numbers", retryable=False)


def reset_peak_memory(device: torch.device) -> None:
    """Reset the peak of GPU memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_mib(device: torch.device) -> float | None:
    """Highest GPU memory in use since `reset_peak_memory`, in MiB; None on a CPU."""
    if device.type != "cuda":
        return None
    return torch.cuda.max_memory_allocated(device) / _MIB


def memory_bytes(device: torch.device) -> dict[str, float]:
    """GPU memory by kind (`total`, `used` by anyone, `allocated` and `peak` of this process); empty on a CPU."""
    if device.type != "cuda":
        return {}
    free, total = torch.cuda.mem_get_info(device)
    return {
        "total": float(total),
        "used": float(total - free),
        "allocated": float(torch.cuda.memory_allocated(device)),
        "peak": float(torch.cuda.max_memory_allocated(device)),
    }
