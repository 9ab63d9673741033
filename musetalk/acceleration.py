"""Faster forms of one step of the networks for one fixed shape: captured CUDA graphs, or torch's compiler.

Both give the results of the plain step, except for rounding. Knows tensors, no networks.
"""

from __future__ import annotations

import logging
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from musetalk.devices import first_line, gpu_failure
from musetalk.errors import ProcessingError

logger = logging.getLogger(__name__)

Acceleration = Literal["none", "graphs", "compile"]
Step = Callable[[Tensor, Tensor], Tensor]

# Before a capture every kernel of it must have run: libraries choose their algorithms then.
_WARM_UP_ROUNDS = 3
# Torch's compiler builds a small library against Python for each GPU kernel, with the first of these it finds.
_COMPILERS = ("gcc", "clang")


def accelerator(kind: Acceleration, latents: Tensor, windows: Tensor) -> Callable[[Step], Step] | None:
    """A faster step for these two shapes on their device; None for the plain step.

    Always None on a CPU: chunks have any size there, so a step for one shape would never be used.
    """
    if kind == "none" or latents.device.type != "cuda":
        return None
    if kind == "compile":
        return lambda step: _compiled(step, latents, windows)
    # One stream for every capture: torch keeps freed memory by stream.
    stream = torch.cuda.Stream(latents.device)  # type: ignore[no-untyped-call]
    return lambda step: _captured(step, latents, windows, stream)


def compiler_problem(include: Path | None = None) -> str | None:
    """Reason why torch's compiler cannot work on this machine, or None; `include` is the folder of Python's headers."""
    missing = [] if any(shutil.which(name) for name in _COMPILERS) else [f"a C compiler ({' or '.join(_COMPILERS)})"]
    if not ((include or Path(sysconfig.get_path("include"))) / "Python.h").is_file():
        missing.append("Python's headers (Python.h)")
    return None if not missing else f"torch's compiler needs {' and '.join(missing)}"


@torch.inference_mode()
def _captured(step: Step, latents: Tensor, windows: Tensor, stream: Any) -> Step:
    """`step` recorded once and replayed: one launch instead of a thousand. Its result is overwritten by the next call.

    Inputs are copied into the recorded ones on the stream of the caller, and what reads the result runs on that stream
    too, so nothing is overwritten early.
    """
    device = latents.device
    inputs = (latents.clone(), windows.clone())
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP_ROUNDS):
            step(*inputs)
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # The thread that prepares a source may launch work of its own during the capture.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        recorded = step(*inputs)

    def replay(latents: Tensor, windows: Tensor) -> Tensor:
        inputs[0].copy_(latents)
        inputs[1].copy_(windows)
        graph.replay()
        return recorded

    logger.info("a CUDA graph is captured", extra={"batch_size": len(latents)})
    return replay


@torch.inference_mode()
def _compiled(step: Step, latents: Tensor, windows: Tensor) -> Step:
    """`step` through torch's compiler, compiled now and not in the first job.

    Raises ProcessingError when the compiler fails, and torch's errors of the GPU.
    """
    # Always these tensors: the compiler starts again for others, even if only their origin differs.
    inputs = (latents.clone(), windows.clone())
    step(*inputs)  # fills the tables of constants, which would also make it start again
    compiled: Any = torch.compile(step, dynamic=False)

    def run(latents: Tensor, windows: Tensor) -> Tensor:
        inputs[0].copy_(latents)
        inputs[1].copy_(windows)
        result: Tensor = compiled(*inputs)
        return result

    try:
        run(latents, windows)
    except Exception as error:
        if gpu_failure(error) is not None:
            raise
        raise ProcessingError(
            f"torch's compiler failed ({first_line(error)}); CUDA graphs need none",
            retryable=False,
        ) from error
    logger.info("the networks are compiled", extra={"batch_size": len(latents)})
    return run


def frames_that_fit(free_bytes: int, one_bytes: int, two_bytes: int, wanted: int) -> int:
    """Number of frames that fit `free_bytes`, 1 to `wanted`, estimated from the peaks of one and of two.

    A tenth of the free memory stays free, for fragments and for other shapes later.
    """
    each = max(1, two_bytes - one_bytes)
    fixed = max(0, one_bytes - each)
    return max(1, min(wanted, int((free_bytes * 9 // 10 - fixed) // each)))
