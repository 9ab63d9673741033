"""WAV files that were joined end to end: where each of them begins. FFmpeg plays the first alone."""

from __future__ import annotations

import mmap
from pathlib import Path

_HEADER_BYTES = 44
_MAX_PARTS = 1000


def wav_parts(path: Path) -> list[tuple[int, int]]:
    """(first byte, byte after the last) of each WAV in the file; one span, the whole file, where nothing was joined."""
    n_bytes = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(12)
        if head[:4] != b"RIFF" or head[8:12] != b"WAVE":
            return [(0, n_bytes)]
        with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as data:
            starts = [0]
            at = data.find(b"RIFF", _HEADER_BYTES)
            # Four letters alone are found in any noise; with the second word and a chunk's name they are a header.
            while at >= 0 and len(starts) < _MAX_PARTS:
                if data[at + 8 : at + 12] == b"WAVE" and data[at + 12 : at + 16].strip().isalnum():
                    starts.append(at)
                at = data.find(b"RIFF", at + 4)
    return list(zip(starts, [*starts[1:], n_bytes], strict=True))
