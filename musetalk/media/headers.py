"""What headers say about the bytes of a file: its claimed size, and where joined WAV files begin."""

from __future__ import annotations

import mmap
from fractions import Fraction
from pathlib import Path

_HEADER_BYTES = 44
_MAX_PARTS = 1000
_HEAD_BYTES = 2**16
_PLACEHOLDER_BYTES = 0x7FFF0000
# The ids of these objects: 16 bytes each, of W64 those behind the letters.
_W64_RIFF = bytes.fromhex("2e91cf11a5d628db04c10000")
_ASF_HEADER = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
_ASF_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")


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


def claimed_share(path: Path, span: tuple[int, int]) -> float:
    """How much larger the file in `span` is by its header than it is there: 1.0 for a whole one, 2.0 for a half.

    FFmpeg takes the smaller size of the two and says nothing. Knows WAV, W64, CAF and ASF; others are 1.0.
    """
    start, end = span
    with path.open("rb") as file:
        file.seek(start)
        head = file.read(_HEAD_BYTES)
    claimed = _claimed(head)
    n_bytes = end - start
    # A placeholder of a writer that could not go back: the largest number of one sign or the other, or nothing.
    if claimed is None or claimed <= n_bytes or claimed >= _PLACEHOLDER_BYTES:
        return 1.0
    return claimed / n_bytes


def _claimed(head: bytes) -> int | None:
    if head[:4] == b"RIFF" and head[8:12] == b"WAVE":
        return 8 + int.from_bytes(head[4:8], "little")
    if head[:4] == b"riff" and head[4:16] == _W64_RIFF:
        return int.from_bytes(head[16:24], "little")
    if head[:16] == _ASF_HEADER and (at := head.find(_ASF_PROPERTIES)) >= 0:
        # Behind the object's id and size: the file's id, then its size.
        return int.from_bytes(head[at + 40 : at + 48], "little")
    if head[:4] == b"caff" and (at := head.find(b"data", 8)) >= 0:
        size = int.from_bytes(head[at + 4 : at + 12], "big", signed=True)
        return None if size < 0 else at + 12 + size
    return None


def avi_duration(path: Path) -> Fraction | None:
    """The length (s) that the main header of an AVI promises; FFmpeg guesses another one where the index is cut off."""
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    at = head.find(b"avih", 12)
    if head[:4] != b"RIFF" or head[8:12] != b"AVI " or at < 0 or len(head) < at + 28:
        return None
    # Behind the chunk's name and size: microseconds a picture, and as the fifth number all pictures.
    period, n_pictures = (int.from_bytes(head[at + 8 + skip : at + 12 + skip], "little") for skip in (0, 16))
    return Fraction(period * n_pictures, 1_000_000) or None
