"""Batches that shrink when the GPU's memory runs out, and the depth of the queues around them.

Knows tensors only by the errors they raise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from musetalk.devices import is_out_of_memory
from musetalk.errors import OutOfMemoryError

T = TypeVar("T")

# Frames that wait between two threads at least: enough to hide an uneven frame.
QUEUE_DEPTH = 4
# Memory of the frames in one queue: 86 frames of 1080p, 21 of 4K.
_QUEUE_BYTES = 256 * 2**20


def queue_depth(frame_bytes: int, batch_size: int) -> int:
    """Frames that may wait between two threads: two batches, as far as memory allows.

    With room for less than a batch the thread that launches would wait in the middle of passing one on.
    """
    return max(QUEUE_DEPTH, min(2 * batch_size, _QUEUE_BYTES // max(1, frame_bytes)))


class Batches:
    """Runs work in batches that shrink when the GPU's memory runs out; the size is kept for the rest of the job."""

    def __init__(self, size: int) -> None:
        self.size = size

    def run(self, work: Callable[[slice], T], n_items: int) -> list[T]:
        """`work` over consecutive slices of `n_items`; halves the batch when memory runs out.

        Raises OutOfMemoryError when even one item does not fit.
        """
        results: list[T] = []
        start = 0
        while start < n_items:
            stop = min(n_items, start + self.size)
            try:
                results.append(work(slice(start, stop)))
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                fits = False
            else:
                fits = True
            # Outside the except block, because the traceback keeps the tensors that did not fit.
            if fits:
                start = stop
                continue
            torch.cuda.empty_cache()
            if stop - start == 1:
                raise OutOfMemoryError("the GPU's memory is too small for one frame", is_oom=True, batch_size=1)
            self.size = (stop - start) // 2
        return results
