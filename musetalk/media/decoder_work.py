"""The work of one forked process: set its limits, read one file, send what it contains, end.

Messages are datagrams: one letter, then its payload. `J` is a JSON object (the last one has "end" or "error"), `B` a
block of sound as float32, `P` a picture: its tick, the slot of the shared memory that contains it, or -1 for a repeat.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import socket
import struct
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from musetalk.errors import MediaError, MuseTalkError, ProcessingError
from musetalk.frames import Planes
from musetalk.media.limits import MediaLimits, source_from_json, to_json
from musetalk.media.probe import inspect_source
from musetalk.media.reading import SourceFrame, read_source
from musetalk.media.sound import inspect_audio, read_audio_blocks

PICTURE = struct.Struct("=qi")
# A datagram must fit the socket's buffer.
BLOCK_BYTES = 2**16
REQUEST_BYTES = 2**16


def work(channel: socket.socket, shared: int | None) -> None:
    """Serve the one request that arrives on `channel`; pictures go into the memory behind `shared`."""
    request = json.loads(channel.recv(REQUEST_BYTES))
    limits = MediaLimits.from_json(request["limits"])
    is_look = request["task"] in {"source", "audio"}
    if is_look:
        # Threads would only reserve address space for a single picture.
        limits = replace(limits, decoder_threads=1)
    _limit_process(
        cpu_s=limits.probe_cpu_s if is_look else None,
        memory_bytes=limits.probe_memory_bytes if is_look else limits.reading_memory_bytes,
    )
    warnings: list[str] = []
    try:
        answer = _TASKS[request["task"]](_Task(request, limits, channel, shared, warnings.append))
    except MemoryError:
        answer = _too_much_memory(request["what"])
    except MuseTalkError as error:
        # Within a process of limited memory this is the file's doing, not the machine's.
        is_memory = error.details.get("reason") == "MemoryError"
        answer = _too_much_memory(request["what"]) if is_memory else error_to_json(error)
    except _ReaderGoneError:
        return
    except Exception as error:  # noqa: BLE001 - whatever it is, the reader has to hear of it
        # Only the class: the text of an unforeseen error may contain the path.
        answer = error_to_json(ProcessingError(f"{request['what']} could not be read: {type(error).__name__}"))
    with contextlib.suppress(OSError):
        channel.send(b"J" + json.dumps({**answer, "warnings": warnings}).encode())


class _ReaderGoneError(Exception):
    """Nobody waits for the answer any more."""


def _limit_process(*, cpu_s: int | None, memory_bytes: int) -> None:
    try:
        import resource
    except ImportError:  # a system without such limits; the limits of wall time still apply
        return
    wanted = [
        (resource.RLIMIT_AS, memory_bytes, memory_bytes),
        (resource.RLIMIT_CORE, 0, 0),
        (resource.RLIMIT_FSIZE, 0, 0),
    ]
    if cpu_s is not None:
        # A little more as the hard limit: the soft one ends the process with a signal of its own name.
        wanted.append((resource.RLIMIT_CPU, cpu_s, cpu_s + 1))
    for kind, soft, hard in wanted:
        allowed = resource.getrlimit(kind)[1]
        most = sys.maxsize if allowed == resource.RLIM_INFINITY else allowed
        resource.setrlimit(kind, (min(soft, most), min(hard, most)))


class _Task:
    """One request and the ways its answer takes."""

    def __init__(
        self,
        request: dict[str, Any],
        limits: MediaLimits,
        channel: socket.socket,
        shared: int | None,
        warn: Callable[[str], None],
    ) -> None:
        self.request, self.limits, self._channel, self.warn = request, limits, channel, warn
        self.path = Path(request["path"])
        self._shared = None if shared is None else mmap.mmap(shared, 0)
        self._free = list(range(request.get("slots", 0)))

    def send_block(self, samples: np.ndarray[Any, Any]) -> None:
        """Send samples (channels, n) in pieces of interleaved float32."""
        n_channels = samples.shape[0]
        flat = np.ascontiguousarray(samples.T, np.float32)
        step = BLOCK_BYTES // (4 * n_channels)
        for start in range(0, len(flat), step):
            self._send(b"B" + flat[start : start + step].tobytes())

    def send_picture(self, frame: SourceFrame) -> None:
        """Put the picture into a free slot and announce it; waits until the reader has emptied one."""
        if frame.is_repeat:
            self._send(b"P" + PICTURE.pack(frame.index, -1))
            return
        if not self._free:
            self._free.append(self._freed())
        slot = self._free.pop()
        self._write(slot, frame.planes)
        self._send(b"P" + PICTURE.pack(frame.index, slot))

    def _send(self, message: bytes) -> None:
        try:
            self._channel.send(message)
        except OSError:
            raise _ReaderGoneError from None

    def _freed(self) -> int:
        """The slot that the reader has emptied; waits for it."""
        try:
            freed = self._channel.recv(8)
        except OSError:
            freed = b""
        if not freed:
            raise _ReaderGoneError
        return freed[0]

    def _write(self, slot: int, planes: Planes) -> None:
        assert self._shared is not None
        n_bytes = planes.y.size + planes.u.size + planes.v.size
        target = np.frombuffer(self._shared, np.uint8, n_bytes, slot * n_bytes)
        np.concatenate([planes.y.ravel(), planes.u.ravel(), planes.v.ravel()], out=target)


def _look_at_source(task: _Task) -> dict[str, Any]:
    return {"info": to_json(inspect_source(task.path, task.limits))}


def _look_at_audio(task: _Task) -> dict[str, Any]:
    return {"info": to_json(inspect_audio(task.path, task.limits))}


def _send_sound(task: _Task) -> dict[str, Any]:
    blocks = read_audio_blocks(
        task.path,
        task.limits,
        rate=task.request["rate"],
        n_channels=task.request["n_channels"],
        on_warning=task.warn,
    )
    for block in blocks:
        task.send_block(block)
    return {"end": True}


def _send_pictures(task: _Task) -> dict[str, Any]:
    info = source_from_json(task.request["info"])
    frames = read_source(
        task.path,
        info,
        task.limits,
        max_frames=task.request["max_frames"],
        background=tuple(task.request["background"]),
        on_warning=task.warn,
    )
    for frame in frames:
        if (frame.planes.width, frame.planes.height) != (info.width, info.height):
            raise MediaError("the source changes its size on the way")
        task.send_picture(frame)
    return {"end": True}


_TASKS: dict[str, Callable[[_Task], dict[str, Any]]] = {
    "source": _look_at_source,
    "audio": _look_at_audio,
    "sound": _send_sound,
    "pictures": _send_pictures,
}


def error_to_json(error: MuseTalkError) -> dict[str, Any]:
    """The error as the JSON value from which `musetalk.media.decoder` makes it again."""
    return {
        "error": type(error).__name__,
        "message": error.message,
        "retryable": error.retryable,
        "details": error.details,
    }


def _too_much_memory(what: str) -> dict[str, Any]:
    return error_to_json(MediaError(f"{what} needs too much memory to be decoded"))
