"""What torch's errors mean, and which cards a build of torch runs on."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor

from musetalk.acceleration import frames_that_fit
from musetalk.devices import (
    GpuProperties,
    batch_for,
    choose_dtype,
    cpu_has_bfloat16,
    gpu_errors,
    gpu_problem,
    is_lost,
    memory_bytes,
    try_out,
)
from musetalk.errors import GpuLostError, OutOfMemoryError, ProcessingError


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: an illegal memory access was encountered\nCompile with TORCH_USE_CUDA_DSA",
        "CUDA error: unspecified launch failure",
        "CUDA error: device-side assert triggered",
        "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
    ],
)
def test_a_lost_gpu_is_distinguished_from_other_errors(text: str) -> None:
    assert is_lost(RuntimeError(text))
    assert not is_lost(ValueError(text))
    with pytest.raises(GpuLostError) as caught, gpu_errors():
        raise RuntimeError(text)
    assert caught.value.retryable
    assert "TORCH_USE" not in str(caught.value.details)


# What torch, cuBLAS, cuDNN, Triton and the driver print, with the advice that torch appends.
_ADVICE = (
    "\nCUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be "
    "incorrect.\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1\nCompile with `TORCH_USE_CUDA_DSA` to enable "
    "device-side assertions.\n"
)
_SEARCH = "\nSearch for `cudaError' in https://docs.nvidia.com/cuda/cuda-runtime-api/ for more information."
MESSAGES = [
    ("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.64 GiB of which 1.06 GiB is "
     "free. Process 4711 has 22.5 GiB memory in use.", "memory"),
    ("CUDA error: out of memory", "memory"),
    ("CUDA driver error: out of memory", "memory"),
    ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", "memory"),
    ("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`", "memory"),
    ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", "memory"),
    ("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED", "memory"),
    ("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED", "memory"),
    ("GET was unable to find an engine to execute this computation", "memory"),
    ("FIND was unable to find an engine to execute this computation", "memory"),
    ("Triton Error [CUDA]: out of memory", "memory"),
    ("cudaErrorMemoryAllocation: out of memory", "memory"),
    ('NVML_SUCCESS == DriverAPI::get()->nvmlInit_v2_() INTERNAL ASSERT FAILED at "CUDACachingAllocator.cpp":1117, '
     "please report a bug to PyTorch.", "memory"),
    ("CUDA error: an illegal memory access was encountered", "lost"),
    ("CUDA error: unspecified launch failure", "lost"),
    ("CUDA error: device-side assert triggered", "lost"),
    ("CUDA error: misaligned address", "lost"),
    ("CUDA error: an illegal instruction was encountered", "lost"),
    ("CUDA error: invalid program counter", "lost"),
    ("CUDA error: operation not supported on global/shared address space", "lost"),
    ("CUDA error: hardware stack error", "lost"),
    ("CUDA error: the launch timed out and was terminated", "lost"),
    ("CUDA error: uncorrectable ECC error encountered", "lost"),
    ("CUDA error: uncorrectable NVLink error detected during the execution", "lost"),
    ("CUDA error: CUDA-capable device(s) is/are busy or unavailable", "lost"),
    ("CUDA error: no CUDA-capable device is detected", "lost"),
    ("CUDA error: context is destroyed", "lost"),
    ("CUDA error: unknown error", "lost"),
    ("CUDA error: initialization error", "lost"),
    ("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(handle, ...)`", "lost"),
    ("CUDA error: CUBLAS_STATUS_INTERNAL_ERROR when calling `cublasSgemm(handle, ...)`", "lost"),
    ("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED", "lost"),
    ("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR", "lost"),
    ("cuDNN error: CUDNN_STATUS_MAPPING_ERROR", "lost"),
    ("Triton Error [CUDA]: an illegal memory access was encountered", "lost"),
    ("GPU is lost.  Reboot the system to recover this GPU", "lost"),
    ("CUDA error: invalid argument", None),
    ("CUDA error: invalid configuration argument", None),
    ("CUDA error: invalid device function", None),
    ("CUDA error: no kernel image is available for execution on the device", None),
    ("CUDA error: the provided PTX was compiled with an unsupported toolchain.", None),
    ("CUDA error: too many resources requested for launch", None),
    ("CUDA error: operation not permitted when stream is capturing", None),
    ("CUDA error: operation failed due to a previous error during capture", None),
    ("CUDA error: operation not supported", None),
    ("CUDA error: CUBLAS_STATUS_INVALID_VALUE when calling `cublasSgemm(handle, ...)`", None),
    ("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasLtMatmul(...)`", None),
    ("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED", None),
    ("cuDNN error: CUDNN_STATUS_BAD_PARAM", None),
    ("Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!", None),
    ("expected scalar type Half but found Float", None),
    ("shape '[2, 3]' is invalid for input of size 5", None),
]  # fmt: skip


@pytest.mark.parametrize(("text", "meaning"), MESSAGES, ids=[text[:60] for text, _ in MESSAGES])
def test_each_message_of_the_gpu_means_a_full_card_a_lost_one_or_neither(text: str, meaning: str | None) -> None:
    advice = ("", _ADVICE, _SEARCH + _ADVICE) if "error" in text.lower() else ("",)
    for error in (RuntimeError(text + behind) for behind in advice):
        assert is_lost(error) is (meaning == "lost")
        wanted = {"memory": OutOfMemoryError, "lost": GpuLostError, None: RuntimeError}[meaning]
        with pytest.raises(wanted), gpu_errors():
            raise error


@pytest.mark.parametrize("text", ["CUDA out of memory", "CUDA error: an illegal memory access was encountered"])
def test_after_an_error_of_the_gpu_the_tensors_of_the_failed_call_are_freed(text: str) -> None:
    """While our error is handled: the job's answer is written with it at hand."""
    kept: list[weakref.ref[Tensor]] = []

    def earlier() -> None:
        before = torch.zeros(3)
        kept.append(weakref.ref(before))
        raise ValueError("first")

    def fail() -> None:
        large = torch.zeros(3)
        kept.append(weakref.ref(large))
        try:
            earlier()
        except ValueError:
            raise RuntimeError(text) from None

    with pytest.raises(ProcessingError) as caught, gpu_errors():
        fail()
    assert caught.value.__context__ is None
    assert [ref() for ref in kept] == [None, None]


def test_other_errors_pass() -> None:
    assert not is_lost(RuntimeError("shapes do not match"))
    assert not is_lost(torch.OutOfMemoryError("CUDA error: out of memory"))
    assert not is_lost(RuntimeError("CUDA error: out of memory"))
    with pytest.raises(RuntimeError, match="shapes"), gpu_errors():
        raise RuntimeError("shapes do not match")
    with pytest.raises(OutOfMemoryError), gpu_errors():
        raise torch.OutOfMemoryError("CUDA out of memory")


def facts(capability: tuple[int, int], *architectures: str, free: int = 8000) -> GpuProperties:
    return GpuProperties("Card", capability, architectures, free, 8192)


@pytest.mark.parametrize(
    ("card", "fits"),
    [
        (facts((8, 6), "sm_80", "sm_90"), True),
        (facts((8, 9), "sm_80"), True),
        (facts((7, 5), "sm_80", "sm_90"), False),
        (facts((12, 0), "sm_80", "sm_90"), False),
        (facts((12, 0), "sm_90", "compute_90"), True),
        (facts((9, 0), "sm_90a"), True),
        (facts((8, 0), "sm_86"), False),
        (facts((8, 6)), True),
    ],
)
def test_a_card_runs_what_was_compiled_for_it(card: GpuProperties, fits: bool) -> None:
    problem = gpu_problem(card, 100)
    assert (problem is None) is fits
    if problem is not None:
        assert f"{card.capability[0]}.{card.capability[1]}" in problem


def test_too_little_free_memory_is_reported_with_figures() -> None:
    problem = gpu_problem(facts((8, 0), "sm_80", free=900), 4096)
    assert problem is not None
    assert "900 of 8192 MiB" in problem
    assert gpu_problem(facts((8, 0), "sm_80", free=900), 0) is None


def test_the_cpu_computes_and_has_no_gpu_memory() -> None:
    try_out(torch.device("cpu"))
    assert memory_bytes(torch.device("cpu")) == {}


@pytest.mark.parametrize(
    ("free", "one", "two", "wanted", "fits"),
    [
        (1000, 100, 200, 8, 8),  # 100 each, nothing fixed: nine would fit
        (1000, 300, 400, 8, 7),  # 200 fixed, 100 each: 900 - 200
        (1000, 300, 400, 4, 4),
        (100, 300, 400, 8, 1),  # one at a time is tried whatever was measured
        (10**9, 5, 5, 8, 8),  # too small to be seen
    ],
)
def test_the_decoders_batch_follows_what_one_and_two_frames_took(
    free: int, one: int, two: int, wanted: int, fits: int
) -> None:
    assert frames_that_fit(free, one, two, wanted) == fits


@pytest.mark.parametrize(
    ("flags", "has"),
    [("fpu avx512f avx512_bf16", True), ("fpu amx_tile amx_bf16", True), ("fpu avx2 avx512f bf16_emulated", False)],
)
def test_half_precision_on_a_cpu_only_where_it_has_instructions(tmp_path: Path, flags: str, has: bool) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor : 0\nflags\t\t: {flags}\n", encoding="ascii")
    assert cpu_has_bfloat16(tmp_path / "cpuinfo") is has
    assert not cpu_has_bfloat16(tmp_path / "absent")


@pytest.mark.parametrize(
    ("capability", "dtype"), [((6, 1), torch.float32), ((7, 5), torch.float16), ((9, 0), torch.float16)]
)
def test_precision_on_a_gpu_follows_its_tensor_cores(
    capability: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    chosen, reason = choose_dtype("auto", torch.device("cuda"))
    assert chosen == dtype
    assert f"{capability[0]}.{capability[1]}" in reason


def test_a_precision_that_was_asked_for_is_taken() -> None:
    assert choose_dtype("bfloat16", torch.device("cpu"))[0] == torch.bfloat16
    assert choose_dtype("auto", torch.device("cpu"))[0] in (torch.float32, torch.bfloat16)


@pytest.mark.parametrize(
    ("total_mib", "batch"),
    [(4_096, 8), (8_188, 8), (16_376, 8), (23_028, 16), (24_564, 16), (32_607, 16), (40_960, 32), (81_559, 32)],
)
def test_larger_cards_compute_more_frames_in_one_pass(total_mib: int, batch: int) -> None:
    assert batch_for(total_mib) == batch
