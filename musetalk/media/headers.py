"""What headers say about the bytes of a file: its claimed size, and where files that were joined begin."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import islice
from pathlib import Path

_HEADER_BYTES = 44
_MAX_PARTS = 1000
_HEAD_BYTES = 2**16
_PLACEHOLDER_BYTES = 0x7FFF0000
# The ids of these objects: 16 bytes each, of W64 those behind the letters.
_W64_RIFF = bytes.fromhex("2e91cf11a5d628db04c10000")
_ASF_HEADER = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
_ASF_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")
_EBML = bytes.fromhex("1a45dfa3")
# Of a WavPack block: the first of those that hold the same samples of other channels.
_WV_INITIAL = 0x800


def joined_parts(path: Path) -> list[tuple[int, int]]:
    """(first byte, byte behind the last) of each file that was joined in this one, in order.

    FFmpeg plays the first of these files alone or loses the seams, and stops where an Ogg chain changes its channels.
    Other formats are read through by themselves; they, and files that were not joined, are one span.
    """
    n_bytes = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(12)
        find = next((find for is_kind, find in _JOINED if is_kind(head)), None)
        if find is None or n_bytes == 0:
            return [(0, n_bytes)]
        with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as data:
            starts = [0, *islice(find(data), _MAX_PARTS - 1)]
    return list(zip(starts, [*starts[1:], n_bytes], strict=True))


def _wav_starts(data: mmap.mmap) -> Iterator[int]:
    # Four letters alone are found in any noise; with the second word and a chunk's name they are a header.
    for at in _found(data, b"RIFF", _HEADER_BYTES):
        if data[at + 8 : at + 12] == b"WAVE" and data[at + 12 : at + 16].strip().isalnum():
            yield at


def _flac_starts(data: mmap.mmap) -> Iterator[int]:
    # The first block is the stream's description, of 34 bytes.
    for at in _found(data, b"fLaC", 42):
        if data[at + 4] & 0x7F == 0 and data[at + 5 : at + 8] == b"\0\0\x22":
            yield at


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


def _aiff_starts(data: mmap.mmap) -> Iterator[int]:
    for at in _found(data, b"FORM", _HEADER_BYTES):
        if data[at + 8 : at + 12] in {b"AIFF", b"AIFC"} and data[at + 12 : at + 16].strip().isalnum():
            yield at


def _au_starts(data: mmap.mmap) -> Iterator[int]:
    for at in _found(data, b".snd", 24):
        # Where the samples begin, their encoding, and behind the rate the number of channels.
        begin, encoding, channels = (int.from_bytes(data[at + skip : at + skip + 4], "big") for skip in (4, 12, 20))
        if 24 <= begin <= _HEAD_BYTES and 1 <= encoding <= 27 and 1 <= channels <= 64:
            yield at


def _caf_starts(data: mmap.mmap) -> Iterator[int]:
    # The description of the samples comes first.
    for at in _found(data, b"caff\0\x01", _HEADER_BYTES):
        if data[at + 8 : at + 12] == b"desc":
            yield at


def _tta_starts(data: mmap.mmap) -> Iterator[int]:
    # Behind the letters: the format, plain or encrypted, and the number of channels.
    for at in _found(data, b"TTA1", 22):
        if data[at + 4 : at + 6] in {b"\x01\0", b"\x02\0"} and data[at + 7] == 0:
            yield at


def _wv_starts(data: mmap.mmap) -> Iterator[int]:
    # Behind the block's size: the version 4.x, and further on where its samples begin.
    for at in _found(data, b"wvpk", 32):
        index, flags = (int.from_bytes(data[at + skip : at + skip + 4], "little") for skip in (16, 24))
        if data[at + 9 : at + 10] == b"\x04" and index == 0 and flags & _WV_INITIAL:
            yield at


def _amr_starts(data: mmap.mmap) -> Iterator[int]:
    return _found(data, b"#!AMR", 6)


def _asf_starts(data: mmap.mmap) -> Iterator[int]:
    return _found(data, _ASF_HEADER, len(_ASF_HEADER))


def _w64_starts(data: mmap.mmap) -> Iterator[int]:
    return _found(data, b"riff" + _W64_RIFF, 16)


def _matroska_starts(data: mmap.mmap) -> Iterator[int]:
    for at in _found(data, _EBML, _HEADER_BYTES):
        if any(name in data[at : at + 64] for name in (b"matroska", b"webm")):
            yield at


def _flv_starts(data: mmap.mmap) -> Iterator[int]:
    # Version 1, then the flags, then the header's own length.
    for at in _found(data, b"FLV\x01", 9):
        if data[at + 5 : at + 9] == b"\0\0\0\x09":
            yield at


def _found(data: mmap.mmap, word: bytes, start: int) -> Iterator[int]:
    at = data.find(word, start)
    while at >= 0:
        yield at
        at = data.find(word, at + len(word))


_JOINED: tuple[tuple[Callable[[bytes], bool], Callable[[mmap.mmap], Iterator[int]]], ...] = (
    (lambda head: head[:4] == b"RIFF" and head[8:12] == b"WAVE", _wav_starts),
    (lambda head: head[:4] == b"fLaC", _flac_starts),
    (lambda head: head[:4] == b"OggS", _ogg_starts),
    (lambda head: head[4:8] == b"ftyp", _mp4_starts),
    (lambda head: head[:4] == b"FLV\x01", _flv_starts),
    (lambda head: head[:4] == b"FORM" and head[8:12] in {b"AIFF", b"AIFC"}, _aiff_starts),
    (lambda head: head[:4] == b".snd", _au_starts),
    (lambda head: head[:4] == _EBML, _matroska_starts),
    (lambda head: head[:4] == b"caff", _caf_starts),
    (lambda head: head[:4] == b"TTA1", _tta_starts),
    (lambda head: head[:4] == b"wvpk", _wv_starts),
    (lambda head: head[:5] == b"#!AMR", _amr_starts),
    (lambda head: head[:12] == _ASF_HEADER[:12], _asf_starts),
    (lambda head: head[:12] == b"riff" + _W64_RIFF[:8], _w64_starts),
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
