"""Prepared sources kept for the next job: faces, latents and masks by content, in memory and on disk.

A key names the source's bytes, the networks and every choice that changes a pixel, so an entry is right or absent.
Frames themselves are not kept: decoding them again is cheap and runs beside the networks. On disk an avatar is one
safetensors file, written whole or not at all, checked when it is read; a broken one is removed and prepared again.
Knows arrays and files, no networks.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import mmap
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as parse_tensors
from safetensors.numpy import save_file

from musetalk.blending import PastePlan
from musetalk.faces import Face
from musetalk.files import replacing
from musetalk.geometry import Box

logger = logging.getLogger(__name__)

# Part of every key: to be raised whenever preparing the same source gives other numbers, or the file's layout changes.
FORMAT = 3
SUFFIX = ".avatar"
_UNFINISHED = ".avatar-part"
# A writer that is still at work after this long is dead.
_STALE_S = 3600.0
# No single source may push everything else out, nor may memory grow with a long one.
LARGEST_SHARE = 0.5
LARGEST_BYTES = 256 * 2**20
_HASH_BLOCK = 1 << 20
# Sources whose faces are known without their preparation; some hundred bytes a frame.
KEPT_SEARCHES = 8

Tier = Literal["memory", "disk"]


class Arena:
    """Memory for arrays that stay, apart from the heap.

    Small arrays that stay, allocated between frames that go, would keep the heap from shrinking: a megabyte each.
    """

    def __init__(self, block_bytes: int = 8 * 2**20) -> None:
        self._block_bytes = block_bytes
        self._block: NDArray[np.uint8] = np.empty(0, np.uint8)
        self._used = 0

    def copy(self, array: NDArray[Any]) -> NDArray[Any]:
        """A read-only copy of `array`, same shape and type; a block is freed when no array in it is left."""
        start = -(-self._used // 64) * 64
        if start + array.nbytes > len(self._block):
            # Mapped by itself whatever its size is.
            size = max(self._block_bytes, array.nbytes)
            self._block, start = np.frombuffer(mmap.mmap(-1, size), np.uint8), 0
        self._used = start + array.nbytes
        place: NDArray[Any] = self._block[start : self._used].view(array.dtype).reshape(array.shape)
        place[...] = array
        place.flags.writeable = False
        return place


_OPTIONAL = ("band", "original", "lips")


@dataclass(frozen=True, eq=False)
class PreparedFace:
    """The face of one source frame, ready for the generator: latents, where the patch goes, colours to match.

    `latents` (8, 32, 32); `band` (10, 3) or None (`blending.colour_band`); `original` (2, s, s, 3) and
    `lips` (3,) or None (`strangers.give_back`).
    """

    plan: PastePlan
    latents: NDArray[Any]
    band: NDArray[np.float32] | None = None
    original: NDArray[np.uint8] | None = None
    lips: NDArray[np.float32] | None = None

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The value as named arrays, as they are stored."""
        named = {"latents": self.latents, **{f"plan_{name}": array for name, array in self.plan.arrays().items()}}
        optional = {name: getattr(self, name) for name in _OPTIONAL}
        return {**named, **{name: array for name, array in optional.items() if array is not None}}

    @staticmethod
    def from_arrays(named: Mapping[str, NDArray[Any]]) -> PreparedFace:
        """Rebuild the value that `arrays` describe; raises KeyError when something is missing."""
        plan = {name.removeprefix("plan_"): array for name, array in named.items() if name.startswith("plan_")}
        return PreparedFace(PastePlan.from_arrays(plan), named["latents"], *(named.get(name) for name in _OPTIONAL))

    def moved_to(self, arena: Arena) -> PreparedFace:
        """The same in the arena's memory."""
        return PreparedFace.from_arrays({name: arena.copy(array) for name, array in self.arrays().items()})

    @property
    def n_bytes(self) -> int:
        """Bytes of its arrays."""
        return sum(array.nbytes for array in self.arrays().values())


@dataclass(frozen=True, eq=False)
class Avatar:
    """The prepared beginning of a source; immutable.

    `found` are the detector's faces from the first frame on, before gaps are filled and boxes smoothed, because both
    depend on later frames; `is_whole` says that the source has no further frame. `prepared` is by frame index.
    """

    found: tuple[Face | None, ...] = ()
    is_whole: bool = False
    prepared: Mapping[int, PreparedFace] = field(default_factory=dict)

    @cached_property
    def n_bytes(self) -> int:
        """Bytes it takes, in memory and nearly the same on disk."""
        return sum(face.n_bytes for face in self.prepared.values()) + 600 * len(self.found)

    def faces_of(self, n_frames: int) -> tuple[Face | None, ...] | None:
        """Faces of the first `n_frames` (or all frames of the source); None when some of them were not searched."""
        if len(self.found) >= n_frames:
            return self.found[:n_frames]
        return self.found if self.is_whole else None


def avatar_key(source_digest: str, networks: str, choices: Mapping[str, object]) -> str:
    """64 hex digits; `choices` are the options that change a prepared pixel, of types that JSON has."""
    text = json.dumps([FORMAT, source_digest, networks, dict(choices)], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()


# -- one file ---------------------------------------------------------------------------------------------------------


def _tensors(avatar: Avatar) -> dict[str, NDArray[Any]]:
    seen = [face for face in avatar.found if face is not None]
    tensors: dict[str, NDArray[Any]] = {
        "found": np.array([face is not None for face in avatar.found], np.uint8),
        "whole": np.array([avatar.is_whole], np.uint8),
        "boxes": np.array([face.box for face in seen], np.int64).reshape(-1, 4),
        "scores": np.array([face.score for face in seen], np.float64),
        "has_landmarks": np.array([face.landmarks is not None for face in seen], np.uint8),
        "landmarks": np.array([face.landmarks for face in seen if face.landmarks is not None], np.float32),
    }
    for index, face in avatar.prepared.items():
        tensors.update({f"{index}/{name}": np.ascontiguousarray(array) for name, array in face.arrays().items()})
    return tensors


def _from_tensors(tensors: Mapping[str, NDArray[Any]]) -> Avatar:
    landmarks = iter(tensors["landmarks"])
    seen = iter(
        Face(Box(*(int(edge) for edge in box)), next(landmarks) if has else None, float(score))
        for box, score, has in zip(tensors["boxes"], tensors["scores"], tensors["has_landmarks"], strict=True)
    )
    by_frame: dict[int, dict[str, NDArray[Any]]] = {}
    for name, array in tensors.items():
        index, slash, part = name.partition("/")
        if slash:
            by_frame.setdefault(int(index), {})[part] = array
    arena = Arena()
    return Avatar(
        found=tuple(next(seen) if is_found else None for is_found in tensors["found"]),
        is_whole=bool(tensors["whole"][0]),
        prepared={index: PreparedFace.from_arrays(by_frame[index]).moved_to(arena) for index in sorted(by_frame)},
    )


def _checksum(tensors: Mapping[str, NDArray[Any]]) -> NDArray[np.uint8]:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        array = tensors[name]
        digest.update(f"{name} {array.dtype.str} {array.shape};".encode())
        digest.update(array.tobytes() if array.size == 0 else np.ascontiguousarray(array).data)
    return np.frombuffer(digest.digest(), np.uint8)


def write_avatar(path: Path, avatar: Avatar) -> int:
    """Write `avatar` to `path`, which appears whole or not at all; returns its bytes. Raises OSError."""
    tensors = _tensors(avatar)
    # Readable by this user alone: a face can be reconstructed from its latents.
    with replacing(path, suffix=_UNFINISHED, mode=0o600) as unfinished:
        unfinished.touch(0o600)
        try:
            save_file({**tensors, "checksum": _checksum(tensors)}, unfinished)
        except SafetensorError as error:
            # The library reports a full disk in an error of its own.
            raise OSError(str(error)) from None
        return unfinished.stat().st_size


def read_avatar(path: Path) -> Avatar:
    """The avatar in `path`; raises OSError when it cannot be read, ValueError when it is not what was written."""
    try:
        tensors = parse_tensors(path.read_bytes())
        checksum = tensors.pop("checksum")
        if not np.array_equal(checksum, _checksum(tensors)):
            raise ValueError("the checksum is wrong")
        return _from_tensors(tensors)
    except (SafetensorError, KeyError, IndexError, TypeError, StopIteration) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None


# -- both tiers -------------------------------------------------------------------------------------------------------


class AvatarCache:
    """Avatars by key: the latest used in memory, more of them in a folder that processes may share."""

    def __init__(self, folder: Path | None, *, memory_bytes: int, disk_bytes: int) -> None:
        """No `folder` or no `disk_bytes`: memory alone. Cleans up after writers that died; raises nothing."""
        self._folder = folder if disk_bytes > 0 else None
        self._memory_bytes, self._disk_bytes = memory_bytes, disk_bytes
        self._lock = threading.Lock()
        self._in_memory: OrderedDict[str, Avatar] = OrderedDict()
        self._faces: OrderedDict[str, Avatar] = OrderedDict()
        self._writer: threading.Thread | None = None
        if self._folder is not None:
            try:
                self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                self._remove_unfinished()
            except OSError as error:
                logger.warning("avatars are kept in memory only", extra={"reason": error.strerror})
                self._folder = None

    @property
    def largest_bytes(self) -> int:
        """Largest size of one avatar in bytes; 0 when none are kept."""
        disk_bytes = self._disk_bytes if self._folder is not None else 0
        return min(LARGEST_BYTES, int(max(self._memory_bytes, disk_bytes) * LARGEST_SHARE))

    @property
    def memory_used(self) -> int:
        """Bytes of the avatars in memory."""
        with self._lock:
            return sum(avatar.n_bytes for avatar in self._in_memory.values())

    def get(self, key: str) -> tuple[Avatar, Tier] | None:
        """The avatar and where it was, or None; what is used now is thrown out last."""
        with self._lock:
            if (avatar := self._in_memory.get(key)) is not None:
                self._in_memory.move_to_end(key)
                return avatar, "memory"
        if self._folder is None:
            return None
        path = self._folder / f"{key}{SUFFIX}"
        try:
            avatar = read_avatar(path)
            os.utime(path)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            logger.warning("stored avatar broken; preparing again", extra={"reason": str(error)[:200]})
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        self._remember(key, avatar)
        return avatar, "disk"

    def known_faces(self, key: str) -> Avatar | None:
        """The faces of a source that was searched before, with nothing prepared of them; None when it is unknown."""
        with self._lock:
            return self._faces.get(key)

    def remember_faces(self, key: str, avatar: Avatar) -> None:
        """Keep the faces of a source in memory, the longest search that was made."""
        with self._lock:
            known = self._faces.get(key)
            if known is None or len(avatar.found) >= len(known.found):
                self._faces[key] = avatar
            self._faces.move_to_end(key)
            while len(self._faces) > KEPT_SEARCHES:
                self._faces.popitem(last=False)

    def put(self, key: str, avatar: Avatar) -> None:
        """Keep `avatar`, in memory at once, on disk soon (in a thread of its own); one that is too large is dropped."""
        if avatar.n_bytes > self.largest_bytes:
            return
        self._remember(key, avatar)
        if self._folder is None:
            return
        self.flush()
        self._writer = threading.Thread(
            target=self._write, args=(self._folder, key, avatar), name="avatar-writer", daemon=True
        )
        self._writer.start()

    def flush(self) -> None:
        """Wait until what was put is on disk."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None

    def _remember(self, key: str, avatar: Avatar) -> None:
        if avatar.n_bytes > self._memory_bytes:
            return
        with self._lock:
            self._in_memory[key] = avatar
            self._in_memory.move_to_end(key)
            used = sum(kept.n_bytes for kept in self._in_memory.values())
            while used > self._memory_bytes:
                _, dropped = self._in_memory.popitem(last=False)
                used -= dropped.n_bytes

    def _write(self, folder: Path, key: str, avatar: Avatar) -> None:
        try:
            write_avatar(folder / f"{key}{SUFFIX}", avatar)
            self._make_room(folder)
        except OSError as error:
            # A job does not fail because the next one will not be faster.
            logger.warning("an avatar could not be kept on disk", extra={"reason": str(error)[:200]})

    def _make_room(self, folder: Path) -> None:
        """Remove the least recently used files until the rest fits; other processes may do the same at that moment."""
        kept = sorted(_stats(folder.glob(f"*{SUFFIX}")), key=lambda item: item[1].st_mtime_ns)
        used = sum(stat.st_size for _, stat in kept)
        for path, stat in kept:
            if used <= self._disk_bytes:
                return
            path.unlink(missing_ok=True)
            used -= stat.st_size

    def _remove_unfinished(self) -> None:
        assert self._folder is not None
        for path, stat in _stats(self._folder.glob(f"*{_UNFINISHED}")):
            if time.time() - stat.st_mtime > _STALE_S:
                path.unlink(missing_ok=True)


def _stats(paths: Iterable[Path]) -> list[tuple[Path, os.stat_result]]:
    """Paths with their stat results; files that vanish in the meantime are skipped."""
    found = []
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            found.append((path, path.stat()))
    return found
