"""Faster forms of one step of the networks for one fixed shape: captured CUDA graphs, or torch's compiler.

Both give the results of the plain step, except for rounding. Knows tensors, no networks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

Acceleration = Literal["none", "graphs", "compile"]
Step = Callable[[Tensor, Tensor], Tensor]

# Before a capture every kernel of it must have run: libraries choose their algorithms then.
_WARM_UP_ROUNDS = 3


def accelerator(kind: Acceleration, latents: Tensor, windows: Tensor) -> Callable[[Step], Step] | None:
    """A faster step for these two shapes on their device; None for the plain step.

    Always None on a CPU: chunks have any size there, so a step for one shape would never be used.
    """
    if kind == "none" or latents.device.type != "cuda":
        return None
    if kind == "graphs":
        return lambda step: _captured(step, latents, windows)
    return lambda step: _compiled(step, latents, windows)


@torch.inference_mode()
def _captured(step: Step, latents: Tensor, windows: Tensor) -> Step:
    """`step` recorded once and replayed: one launch instead of a thousand. Its result is overwritten by the next call.

    Inputs are copied into the recorded ones on the stream of the caller, and what reads the result runs on that stream
    too, so nothing is overwritten early.
    """
    device = latents.device
    inputs = (latents.clone(), windows.clone())
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(_WARM_UP_ROUNDS):
            step(*inputs)
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # The thread that prepares a source may launch work of its own during the capture.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
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
    """`step` through torch's compiler, compiled now and not in the first job."""
    compiled: Any = torch.compile(step, dynamic=False)
    compiled(latents, windows)
    logger.info("the networks are compiled", extra={"batch_size": len(latents)})
    made: Step = compiled
    return made


def frames_that_fit(free_bytes: int, one_bytes: int, two_bytes: int, wanted: int) -> int:
    """Number of frames that fit `free_bytes`, 1 to `wanted`, estimated from the peaks of one and of two.

    A tenth of the free memory stays free, for fragments and for other shapes later.
    """
    each = max(1, two_bytes - one_bytes)
    fixed = max(0, one_bytes - each)
    return max(1, min(wanted, int((free_bytes * 9 // 10 - fixed) // each)))
