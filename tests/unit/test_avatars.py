"""The cache of prepared sources: entries read back equal, budgets are kept, damage never becomes a picture."""

from __future__ import annotations

import logging
import multiprocessing
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from musetalk.avatars import (
    SUFFIX,
    Arena,
    Avatar,
    AvatarCache,
    PreparedFace,
    avatar_key,
    file_digest,
    read_avatar,
    write_avatar,
)
from musetalk.blending import PastePlan
from musetalk.faces import Face
from musetalk.geometry import Box
from worker.config import ROOT

MIB = 2**20


def prepared(seed: int, *, band: bool = False, side: int = 12) -> PreparedFace:
    rng = np.random.default_rng(seed)
    plan = PastePlan(
        Box(seed, 2, seed + side, 2 + side),
        Box(seed, 4, seed + side, 2 + side),
        rng.integers(0, 255, (side, side), np.uint8),
        rng.integers(0, 255, (side // 2, side // 2), np.uint8),
    )
    colours = rng.random((10, 3), np.float32) if band else None
    return PreparedFace(plan, rng.random((8, 4, 4)).astype(np.float16), colours)


def avatar_of(n_frames: int, *, first: int = 0, is_whole: bool = False, side: int = 12) -> Avatar:
    found = tuple(
        None if index % 5 == 3 else Face(Box(index, 0, index + 9, 9), np.full((68, 2), index, np.float32), 0.5)
        for index in range(n_frames)
    )
    faces = {index: prepared(first + index, side=side) for index, face in enumerate(found) if face is not None}
    return Avatar(found, is_whole, faces)


def assert_same(got: Avatar, wanted: Avatar) -> None:
    assert got.is_whole == wanted.is_whole
    assert len(got.found) == len(wanted.found)
    for one, other in zip(got.found, wanted.found, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert (one.box, one.score) == (other.box, other.score)
            assert (one.landmarks is None) == (other.landmarks is None)
            if one.landmarks is not None:
                np.testing.assert_array_equal(one.landmarks, other.landmarks)
    assert got.prepared.keys() == wanted.prepared.keys()
    for index, face in wanted.prepared.items():
        kept = got.prepared[index]
        assert (kept.plan.box, kept.plan.region) == (face.plan.box, face.plan.region)
        for name, array in face.arrays().items():
            assert kept.arrays()[name].dtype == array.dtype
            np.testing.assert_array_equal(kept.arrays()[name], array)


faces = st.builds(
    Face,
    st.builds(Box, *[st.integers(-50, 5000)] * 4),
    st.one_of(st.none(), st.integers(0, 9).map(lambda value: np.full((68, 2), value, np.float32))),
    st.floats(0, 1),
)
avatars = st.builds(
    Avatar,
    st.lists(st.one_of(st.none(), faces), max_size=6).map(tuple),
    st.booleans(),
    st.dictionaries(
        st.integers(0, 10**6),
        st.builds(prepared, st.integers(0, 99), band=st.booleans(), side=st.sampled_from([2, 12])),
        max_size=4,
    ),
)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(avatar=avatars)
def test_what_is_read_is_what_was_written(tmp_path: Path, avatar: Avatar) -> None:
    n_bytes = write_avatar(tmp_path / "one", avatar)
    assert n_bytes == (tmp_path / "one").stat().st_size
    assert_same(read_avatar(tmp_path / "one"), avatar)
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


@given(sizes=st.lists(st.integers(0, 5000), max_size=30))
def test_an_arena_keeps_arrays_apart_and_as_they_were(sizes: list[int]) -> None:
    arena = Arena(block_bytes=4096)
    rng = np.random.default_rng(1)
    arrays = [rng.random(size).astype(dtype) for size, dtype in zip(sizes, [np.float32, np.float16] * 15, strict=False)]
    copies = [arena.copy(array) for array in arrays]
    for array, copy in zip(arrays, copies, strict=True):
        assert copy.dtype == array.dtype
        np.testing.assert_array_equal(copy, array)
        assert not copy.flags.writeable


MEMORY = """
import sys
import numpy as np
from benchmarks.measuring import memory
from musetalk.avatars import Arena
arena, kept, before = Arena(), [], memory("VmRSS")
np.empty(4 * 2**20, np.uint8).fill(1)
for index in range(300):
    frame = np.full(2 * 2**20, index % 255, np.uint8)
    small = np.full(60_000, 1, np.uint8)
    kept.append(arena.copy(small))
    del frame, small
print((memory("VmRSS") - before) >> 20)
"""


def test_what_is_kept_of_each_frame_does_not_keep_the_frames_memory() -> None:
    """Seen as a worker that grew by the size of every frame it had prepared: 300 frames of 2 MB, 18 MB of them kept."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    assert int(done.stdout) < 60


def test_a_file_is_readable_by_its_owner_only(tmp_path: Path) -> None:
    """A face's pictures can be made again from its latents."""
    cache = AvatarCache(tmp_path / "kept", memory_bytes=MIB, disk_bytes=MIB)
    cache.put("a" * 64, avatar_of(3))
    cache.flush()
    (path,) = (tmp_path / "kept").iterdir()
    assert path.stat().st_mode & 0o077 == 0
    assert (tmp_path / "kept").stat().st_mode & 0o077 == 0


def test_every_choice_is_part_of_the_key() -> None:
    base = {"box": [1, 2], "mode": "jaw", "blur": 0.05, "gap": None}
    keys = [avatar_key("d", "n", base), avatar_key("e", "n", base), avatar_key("d", "m", base)]
    for name, value in (("box", [1, 3]), ("mode", "raw"), ("blur", 0.1), ("gap", 0)):
        keys.append(avatar_key("d", "n", {**base, name: value}))
    assert len(set(keys)) == len(keys)
    assert avatar_key("d", "n", dict(reversed(base.items()))) == keys[0]


def test_a_digest_is_of_the_bytes_not_of_the_name(tmp_path: Path) -> None:
    data = os.urandom(3 * MIB + 17)
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(data)
    assert file_digest(tmp_path / "a") == file_digest(tmp_path / "b")
    (tmp_path / "b").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert file_digest(tmp_path / "a") != file_digest(tmp_path / "b")


@pytest.mark.parametrize("n_frames", [0, 3, 7])
def test_faces_are_known_up_to_where_the_detector_looked(n_frames: int) -> None:
    part, whole = avatar_of(5), avatar_of(5, is_whole=True)
    assert part.faces_of(n_frames) == (None if n_frames > 5 else part.found[:n_frames])
    assert whole.faces_of(n_frames) == whole.found[:n_frames]


def damaged(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]


@pytest.mark.parametrize("damage", ["cut", "empty", "foreign", *range(0, 100, 3)])
def test_damage_anywhere_is_seen_and_the_entry_is_gone(
    tmp_path: Path, damage: str | int, caplog: pytest.LogCaptureFixture
) -> None:
    cache = AvatarCache(tmp_path, memory_bytes=MIB, disk_bytes=MIB)
    cache.put("k", avatar_of(4))
    cache.flush()
    path = tmp_path / f"k{SUFFIX}"
    data = path.read_bytes()
    broken = {"cut": data[:-9], "empty": b"", "foreign": b"PK\x03\x04" + data}
    path.write_bytes(broken[damage] if isinstance(damage, str) else damaged(data, len(data) * damage // 100))
    fresh = AvatarCache(tmp_path, memory_bytes=MIB, disk_bytes=MIB)
    with caplog.at_level(logging.WARNING):
        hit = fresh.get("k")
    if hit is None:
        assert not path.exists()
        assert "broken" in caplog.text
    else:
        # A bit of the header that names no array and no place (white space, say) changes nothing.
        assert_same(hit[0], avatar_of(4))


def test_memory_is_asked_first_then_the_disk_then_none(tmp_path: Path) -> None:
    cache = AvatarCache(tmp_path, memory_bytes=MIB, disk_bytes=MIB)
    assert cache.get("k") is None
    cache.put("k", avatar_of(4))
    hit = cache.get("k")
    assert hit is not None
    assert hit[1] == "memory"
    cache.flush()
    after_restart = AvatarCache(tmp_path, memory_bytes=MIB, disk_bytes=MIB)
    hit = after_restart.get("k")
    assert hit is not None
    assert hit[1] == "disk"
    assert_same(hit[0], avatar_of(4))
    hit = after_restart.get("k")
    assert hit is not None
    assert hit[1] == "memory"


def test_what_was_used_last_stays_in_memory() -> None:
    size = avatar_of(4).n_bytes
    cache = AvatarCache(None, memory_bytes=2 * size + size // 2, disk_bytes=0)
    for key in "ab":
        cache.put(key, avatar_of(4))
    assert cache.get("a")
    cache.put("c", avatar_of(4))
    assert [key for key in "abc" if cache.get(key)] == ["a", "c"]
    assert cache.memory_used == 2 * size


def test_what_was_used_last_stays_on_disk(tmp_path: Path) -> None:
    write_avatar(tmp_path / "probe", avatar_of(4))
    size = (tmp_path / "probe").stat().st_size
    (tmp_path / "probe").unlink()
    cache = AvatarCache(tmp_path, memory_bytes=0, disk_bytes=2 * size + size // 2)
    for age, key in enumerate("ab"):
        cache.put(key, avatar_of(4))
        cache.flush()
        # Written long ago, one after the other: file systems store times coarsely.
        os.utime(tmp_path / f"{key}{SUFFIX}", (1000 + age, 1000 + age))
    assert cache.get("a")
    cache.put("c", avatar_of(4))
    cache.flush()
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"a{SUFFIX}", f"c{SUFFIX}"]


def test_one_large_source_does_not_push_the_others_out() -> None:
    small, large = avatar_of(2), avatar_of(40, side=200)
    cache = AvatarCache(None, memory_bytes=large.n_bytes + small.n_bytes, disk_bytes=0)
    cache.put("small", small)
    cache.put("large", large)
    assert cache.get("large") is None
    assert cache.get("small")


def test_a_writer_that_died_leaves_nothing_for_ever(tmp_path: Path) -> None:
    old, young = tmp_path / "writing-1.avatar-part", tmp_path / "writing-2.avatar-part"
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (1000, 1000))
    AvatarCache(tmp_path, memory_bytes=MIB, disk_bytes=MIB)
    assert list(tmp_path.iterdir()) == [young]


def test_a_folder_that_cannot_be_made_leaves_the_memory_tier(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    cache = AvatarCache(tmp_path / "file" / "kept", memory_bytes=MIB, disk_bytes=MIB)
    cache.put("k", avatar_of(4))
    cache.flush()
    assert cache.get("k")


FULL_DISK = """
import logging, resource, sys
from pathlib import Path
logging.basicConfig()
from musetalk.avatars import AvatarCache
from tests.unit.test_avatars import MIB, avatar_of
folder = Path(sys.argv[1])
cache = AvatarCache(folder, memory_bytes=MIB, disk_bytes=MIB)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
cache.put("k", avatar_of(4))
cache.flush()
assert cache.get("k")[1] == "memory"
print(sorted(path.name for path in folder.iterdir()))
"""


def test_a_full_disk_costs_the_entry_and_not_the_job(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
    assert "could not be kept on disk" in done.stderr


def _hammer(folder: str, key: str, n_rounds: int, failures: Any) -> None:
    cache = AvatarCache(Path(folder), memory_bytes=0, disk_bytes=MIB)
    for _ in range(n_rounds):
        cache.put(key, avatar_of(4))
        cache.flush()
        hit = cache.get(key)
        # Another process may have made room in between; a broken one would be removed and be None for ever after.
        if hit is not None:
            try:
                assert_same(hit[0], avatar_of(4))
            except AssertionError:
                failures.put(1)


def test_processes_that_share_a_folder_never_see_half_a_file(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    failures = context.Queue()
    workers = [context.Process(target=_hammer, args=(str(tmp_path), "k", 40, failures)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    assert failures.empty()
    assert [path.name for path in tmp_path.iterdir()] == [f"k{SUFFIX}"]
    assert_same(read_avatar(tmp_path / f"k{SUFFIX}"), avatar_of(4))


def test_threads_that_read_and_write_at_once_get_whole_avatars(tmp_path: Path) -> None:
    cache = AvatarCache(tmp_path, memory_bytes=avatar_of(4).n_bytes * 2, disk_bytes=MIB)
    wrong: list[str] = []

    def read(key: str, first: int) -> None:
        for _ in range(60):
            if (hit := cache.get(key)) is not None and hit[0].prepared[0].plan.box.x0 != first:
                wrong.append(key)

    cache.put("a", avatar_of(4, first=0))
    readers = [threading.Thread(target=read, args=(key, first)) for key, first in (("a", 0), ("b", 7), ("c", 9))]
    for reader in readers:
        reader.start()
    for _ in range(20):
        cache.put("b", avatar_of(4, first=7))
        cache.put("c", avatar_of(4, first=9))
    for reader in readers:
        reader.join()
    cache.flush()
    assert wrong == []
