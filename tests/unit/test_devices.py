"""What torch's errors mean, and which cards a build of torch runs on."""

from __future__ import annotations

import pytest
import torch

from errors import GpuLostError, OutOfMemoryError
from musetalk.devices import GpuFacts, gpu_errors, gpu_problem, is_lost, memory_bytes, try_out


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: an illegal memory access was encountered\nCompile with TORCH_USE_CUDA_DSA",
        "CUDA error: unspecified launch failure",
        "CUDA error: device-side assert triggered",
        "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
    ],
)
def test_a_lost_gpu_is_told_from_other_trouble(text: str) -> None:
    assert is_lost(RuntimeError(text))
    assert not is_lost(ValueError(text))
    with pytest.raises(GpuLostError) as caught, gpu_errors():
        raise RuntimeError(text)
    assert caught.value.retryable
    assert "TORCH_USE" not in str(caught.value.details)


def test_other_errors_pass() -> None:
    assert not is_lost(RuntimeError("shapes do not match"))
    assert not is_lost(torch.OutOfMemoryError("CUDA error: out of memory"))
    with pytest.raises(RuntimeError, match="shapes"), gpu_errors():
        raise RuntimeError("shapes do not match")
    with pytest.raises(OutOfMemoryError), gpu_errors():
        raise torch.OutOfMemoryError("CUDA out of memory")


def facts(capability: tuple[int, int], *architectures: str, free: int = 8000) -> GpuFacts:
    return GpuFacts("Card", capability, architectures, free, 8192)


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
def test_a_card_runs_what_was_compiled_for_it(card: GpuFacts, fits: bool) -> None:
    problem = gpu_problem(card, 100)
    assert (problem is None) is fits
    if problem is not None:
        assert f"{card.capability[0]}.{card.capability[1]}" in problem


def test_too_little_free_memory_is_told_with_figures() -> None:
    problem = gpu_problem(facts((8, 0), "sm_80", free=900), 4096)
    assert problem is not None
    assert "900 of 8192 MiB" in problem
    assert gpu_problem(facts((8, 0), "sm_80", free=900), 0) is None


def test_the_cpu_computes_and_has_no_gpu_memory() -> None:
    try_out(torch.device("cpu"))
    assert memory_bytes(torch.device("cpu")) == {}
