"""What headers say about the bytes of a file: its claimed size, and where files that were joined begin."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import islice
from pathlib import Path

# Enough of a file to recognise its kind.
_SIGN_BYTES = 64
_MAX_PARTS = 1000
_HEAD_BYTES = 2**16
_PLACEHOLDER_BYTES = 0x7FFF0000
# The ids of these objects: 16 bytes each, of W64 those behind the letters.
_W64_RIFF = bytes.fromhex("2e91cf11a5d628db04c10000")
_ASF_HEADER = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
_ASF_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")
_EBML = bytes.fromhex("1a45dfa3")


def joined_parts(path: Path) -> list[tuple[int, int]]:
    """(first byte, byte behind the last) of each file that was joined in this one, in order.

    FFmpeg plays the first of these files alone or loses the seams, and stops where an Ogg chain changes its channels.
    Other formats are read through by themselves; they, and files that were not joined, are one span.
    """
    n_bytes = path.stat().st_size
    if n_bytes == 0:
        return [(0, 0)]
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as data:
        starts = [0, *islice(_later_starts(data), _MAX_PARTS - 1)]
    return list(zip(starts, [*starts[1:], n_bytes], strict=True))


def _later_starts(data: mmap.mmap) -> Iterator[int]:
    """Where further files of the same kind begin."""
    head = data[:_SIGN_BYTES]
    if head[:4] == b"OggS":
        yield from _ogg_starts(data)
    elif head[4:8] == b"ftyp":
        yield from _mp4_starts(data)
    for word, is_header in _SIGNS:
        if head.startswith(word) and is_header(head):
            at = data.find(word, len(word))
            while at >= 0:
                if is_header(data[at : at + _SIGN_BYTES]):
                    yield at
                at = data.find(word, at + len(word))


def _ogg_starts(data: mmap.mmap) -> Iterator[int]:
    """Pages that begin a stream, behind one that does not: the tracks of one link all begin before any goes on."""
    at, has_gone_on = 0, False
    while data[at : at + 5] == b"OggS\0" and at + 27 <= len(data):
        begins = bool(data[at + 5] & 2)
        if begins and has_gone_on:
            yield at
        has_gone_on = not begins
        n_segments = data[at + 26]
        at += 27 + n_segments + sum(data[at + 27 : at + 27 + n_segments])


def _mp4_starts(data: mmap.mmap) -> Iterator[int]:
    at = 0
    while at + 16 <= len(data):
        size, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        if size == 1:
            size = int.from_bytes(data[at + 8 : at + 16], "big")
        if kind == b"ftyp" and at > 0:
            yield at
        if size < 8:
            return
        at += size


def _is_wave(head: bytes) -> bool:
    return head[8:12] == b"WAVE" and head[12:16].strip().isalnum()


def _is_au(head: bytes) -> bool:
    # Where the samples begin, their encoding, and behind the rate the number of channels.
    begin, encoding, channels = (int.from_bytes(head[at : at + 4], "big") for at in (4, 12, 20))
    return 24 <= begin <= _HEAD_BYTES and 1 <= encoding <= 27 and 1 <= channels <= 64


def _is_wavpack(head: bytes) -> bool:
    # Behind the size the version 4.x; then where the block's samples begin, and of several channels the first block.
    return head[9:10] == b"\x04" and head[16:20] == bytes(4) and bool(int.from_bytes(head[24:28], "little") & 0x800)


# A file's first letters, and what its head must have besides: letters alone are found in any noise.
_SIGNS: tuple[tuple[bytes, Callable[[bytes], bool]], ...] = (
    *((word, _is_wave) for word in (b"RIFF", b"RF64", b"BW64")),
    (b"FORM", lambda head: head[8:12] in {b"AIFF", b"AIFC"} and head[12:16].strip().isalnum()),
    # The first block is the stream's description, of 34 bytes, and may be the last.
    (b"fLaC", lambda head: head[4:8] in {b"\0\0\0\x22", b"\x80\0\0\x22"}),
    (b".snd", _is_au),
    (b"caff\0\x01", lambda head: head[8:12] == b"desc"),
    # The format, plain or encrypted, and the number of channels.
    (b"TTA1", lambda head: head[4:6] in {b"\x01\0", b"\x02\0"} and head[7:8] == b"\0"),
    (b"wvpk", _is_wavpack),
    (b"#!AMR", lambda head: head[5:6] in {b"\n", b"-", b"_"}),
    (_ASF_HEADER, bool),
    (b"riff" + _W64_RIFF, bool),
    (_EBML, lambda head: b"matroska" in head or b"webm" in head),
    # The flags, then the header's own length.
    (b"FLV\x01", lambda head: head[5:9] == b"\0\0\0\x09"),
)


def claimed_share(path: Path, span: tuple[int, int]) -> float:
    """How much larger the file in `span` is by its header than it is there: 1.0 for a whole one, 2.0 for a half.

    FFmpeg takes the smaller size of the two and says nothing. Knows WAV, W64, CAF, ASF and MP3 with a frame count;
    others are 1.0.
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
    if (frame := _mp3_frame(head)) is not None:
        return _claimed_by_mp3(head, frame)
    if head[:4] == b"caff" and (at := head.find(b"data", 8)) >= 0:
        size = int.from_bytes(head[at + 4 : at + 12], "big", signed=True)
        return None if size < 0 else at + 12 + size
    return None


def _mp3_frame(head: bytes) -> int | None:
    """Where the first frame of an MP3 begins, behind its tag; None for other files."""
    at = 0
    if head[:3] == b"ID3" and len(head) >= 10:
        at = 10 + sum((byte & 0x7F) << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0), strict=True))
    return at if len(head) > at + 4 and head[at] == 0xFF and head[at + 1] & 0xE6 == 0xE2 else None


def _claimed_by_mp3(head: bytes, frame: int) -> int | None:
    """The size that the first frame's summary claims; None where it has none or no size in it."""
    at = max(head.find(b"Xing", frame, frame + 64), head.find(b"Info", frame, frame + 64))
    if at < 0:
        return None
    flags = int.from_bytes(head[at + 4 : at + 8], "big")
    if not flags & 2:
        return None
    place = at + 8 + (4 if flags & 1 else 0)
    return frame + int.from_bytes(head[place : place + 4], "big")


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
