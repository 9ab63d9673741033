"""Weight files that ask for more than they contain: one clear error, in a moment and without the memory."""

from __future__ import annotations

import pickle
import resource
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from musetalk import weights
from musetalk.checkpoint_limits import OversizeError, RefusedNameError, check_operations
from musetalk.errors import WeightsError

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30


def zipped(path: Path, pickled: bytes, *, storage: bytes = b"", compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/data/0", storage)


def legacy(path: Path, pickled: bytes) -> None:
    head = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    path.write_bytes(b"".join([*head, pickled, pickle.dumps(["0"], 2), struct.pack("<q", 4), bytes(16)]))


def tensor(n_elements: int, *, view: bool = False) -> bytes:
    """A pickle of {"a": a tensor of `n_elements` numbers}; legacy files have one more part in the reference."""
    numbers = (
        b"J" + struct.pack("<i", n_elements) if n_elements < 2**31 else b"\x8a\x08" + struct.pack("<q", n_elements)
    )
    reference = (
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
        + numbers
        + (b"N" if view else b"")
        + b"tQ"
    )
    shape = numbers + b"\x85" + b"K\x01\x85"
    call = (
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + reference + b"K\x00" + shape + b"\x89ccollections\nOrderedDict\n)RtR"
    )
    return b"\x80\x02}X\x01\x00\x00\x00a" + call + b"s."


def call(module: str, function: str, n: int) -> bytes:
    """A pickle of {"a": function(n)}."""
    name = f"c{module}\n{function}\n".encode()
    return b"\x80\x02}X\x01\x00\x00\x00a" + name + b"\x8a\x08" + struct.pack("<q", n) + b"\x85Rs."


def memo_index(index: int) -> bytes:
    return b"\x80\x02}r" + struct.pack("<I", index) + b"."


def multiplied_tuple(levels: int) -> bytes:
    """A dictionary with a key that hashes for ever: a tuple of the same tuple twice, and so on."""
    return b"\x80\x02}K\x01" + b"q\x01h\x01\x86" * levels + b"K\x01s."


BOMBS: dict[str, Callable[[Path], object]] = {
    "memo index, zipped": lambda path: zipped(path, memo_index(2**30)),
    "memo index, legacy": lambda path: legacy(path, memo_index(2**31 - 1)),
    "inflates": lambda path: zipped(
        path, pickle.dumps({}, 2), storage=bytes(300_000_000), compression=zipfile.ZIP_DEFLATED
    ),
    "index inflates": lambda path: zipped(
        path, b"\x80\x02" + b"N0" * 50_000_000 + b"N.", compression=zipfile.ZIP_DEFLATED
    ),
    "storage, zipped": lambda path: zipped(path, tensor(2**31), storage=bytes(2_000_000)),
    "storage, legacy": lambda path: legacy(path, tensor(2**31, view=True)),
    "bytearray, zipped": lambda path: zipped(path, call("builtins", "bytearray", 8 * GIB)),
    "bytearray, legacy": lambda path: legacy(path, call("__builtin__", "bytearray", 8 * GIB)),
    "tensor, zipped": lambda path: zipped(path, call("torch", "FloatTensor", 2 * GIB)),
    "tensor, legacy": lambda path: legacy(path, call("torch", "Tensor", 2 * GIB)),
    "untyped storage": lambda path: legacy(path, call("torch.storage", "UntypedStorage", 8 * GIB)),
    "key that hashes for ever": lambda path: zipped(path, multiplied_tuple(60)),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_bomb_is_one_error_in_a_moment(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "musetalkV15/unet.pth"
    path.parent.mkdir()
    BOMBS[kind](path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begun = time.process_time()
    with pytest.raises(WeightsError) as caught:
        weights.read_state(path)
    assert time.process_time() - begun < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000
    assert str(caught.value).startswith("musetalkV15/unet.pth ")
    assert "UNet of MuseTalk v1.5" in str(caught.value)


@pytest.mark.parametrize("kind", ["memo index, zipped", "memo index, legacy", "storage, legacy", "bytearray, zipped"])
def test_a_bomb_does_not_even_ask_for_the_memory(tmp_path: Path, kind: str) -> None:
    """A machine without so much memory would end the process."""
    path = tmp_path / "unet.pth"
    BOMBS[kind](path)
    code = (
        "import resource, sys; from pathlib import Path; from musetalk import weights\n"
        "now = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (now + 500_000_000, now + 500_000_000))\n"
        "try:\n    weights.read_state(Path(sys.argv[1]))\n"
        "except weights.WeightsError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "out of memory" not in done.stdout.lower()
    assert "cannot allocate" not in done.stdout.lower()


def test_what_torch_saves_passes(tmp_path: Path) -> None:
    state = {f"layer.{number}.weight": torch.rand(3, 4) for number in range(300)}
    for kind in (True, False):
        torch.save(
            {"state_dict": state, "meta": [(1, (2, 3))] * 5000}, tmp_path / "a.pth", _use_new_zipfile_serialization=kind
        )
        assert len(weights.read_state(tmp_path / "a.pth")) == 300


def test_an_archive_that_somebody_compressed_is_still_read(tmp_path: Path) -> None:
    torch.save({"a": torch.rand(1000)}, tmp_path / "a.pth")
    with zipfile.ZipFile(tmp_path / "a.pth") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "b.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    assert weights.read_state(tmp_path / "b.pth")["a"].shape == (1000,)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_ordinary_pickles_of_every_protocol_pass_the_check(protocol: int) -> None:
    value = {"a": [1, (2, 3), {"b"}, b"c", 1.5, None, True, 10**30], "d": {"e": frozenset({1})}}
    check_operations(pickle.dumps(value, protocol))


def test_the_check_names_what_is_wrong() -> None:
    with pytest.raises(OversizeError, match="remembered values"):
        check_operations(memo_index(2**30))
    with pytest.raises(OversizeError, match="tuple"):
        check_operations(multiplied_tuple(60))
    with pytest.raises(RefusedNameError, match=r"builtins\.bytearray"):
        check_operations(call("builtins", "bytearray", 8))


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"a": ' * 50_000])
def test_a_configuration_that_is_nested_too_deep_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "musetalk.json").write_bytes(content)
    with pytest.raises(WeightsError, match="not a readable JSON file"):
        weights.read_config(tmp_path / "musetalk.json")


def test_a_configuration_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "musetalk.json").open("wb") as file:
        file.truncate(8 * GIB)
    with pytest.raises(WeightsError, match="too many for a configuration"):
        weights.read_config(tmp_path / "musetalk.json")
