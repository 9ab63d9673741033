"""Weight files: found, read without running code in them, or refused with one error that names the file."""

from __future__ import annotations

import builtins
import hashlib
import io
import json
import os
import pickle
import random
import sys
import tarfile
import types
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from musetalk import manifest, weights
from musetalk.errors import WeightsError
from musetalk.foreign_pickle import rebuild_tensor
from musetalk.networks.rtmpose import rtmpose_from_state
from tests.support.tiny_models import write_tiny_models

STATE = {f"layer{index}.weight": torch.arange(6.0).reshape(2, 3) + index for index in range(4)}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models in the official layout; tests must not write to it."""
    return write_tiny_models(tmp_path_factory.mktemp("official"))


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as safetensors files; tests must not write to them."""
    return write_tiny_models(tmp_path_factory.mktemp("converted"), as_safetensors=True)


def linked(models_dir: Path, folder: Path) -> Path:
    """Fill a models folder with links, some of which a test may replace."""
    for path in sorted(models_dir.rglob("*")):
        target = folder / path.relative_to(models_dir)
        if path.is_dir():
            target.mkdir()
        else:
            target.symlink_to(path)
    return folder


def refusal(read: Callable[[], object], *local: Path) -> WeightsError:
    """Return the error that `read` raises, after checking that it contains none of the `local` folders."""
    with pytest.raises(WeightsError) as caught:
        read()
    error = caught.value
    for folder in local:
        assert str(folder) not in f"{error} {error.details}"
    assert "\n" not in str(error)
    assert "\x1b" not in str(error)
    assert "Re-running" not in str(error), "no advice to switch the protection off"
    assert error.__cause__ is None
    assert error.__context__ is None or error.__suppress_context__, (
        "the library's own message, with its path, stays out of the trace"
    )
    assert not error.retryable
    return error


def equal(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return got.keys() == wanted.keys() and all(torch.equal(got[key], wanted[key]) for key in wanted)


# -- paths ------------------------------------------------------------------------------------------------------------


def test_the_official_layout_is_found(models: Path) -> None:
    files = weights.locate(models, "v15")
    assert files.unet == models / "musetalkV15/unet.pth"
    assert files.unet_config == models / "musetalkV15/musetalk.json"
    assert (files.vae_dir, files.whisper_dir) == (models / "sd-vae", models / "whisper")
    assert files.pose == models / "dwpose/dw-ll_ucoco_384.pth"
    assert files.detector == models / "s3fd-619a316812.pth"
    assert files.parsing == models / "face-parse-bisent/79999_iter.pth"


def test_the_converted_layout_is_found(converted: Path) -> None:
    files = weights.locate(converted, "v15")
    assert files.unet == converted / "musetalkV15/unet.safetensors"
    assert files.detector == converted / "s3fd-619a316812.safetensors"


def test_a_folder_of_links_works_like_the_files(models: Path, tmp_path: Path) -> None:
    through_link = tmp_path / "models"
    through_link.symlink_to(models, target_is_directory=True)
    files = weights.locate(linked(through_link, tmp_path), "v15")
    assert files.pose == tmp_path / "dwpose/dw-ll_ucoco_384.pth"
    assert equal(weights.read_state(files.pose), weights.read_state(models / "dwpose/dw-ll_ucoco_384.pth"))


def test_safetensors_is_preferred(models: Path, tmp_path: Path) -> None:
    linked(models, tmp_path)
    (tmp_path / "musetalkV15/unet.safetensors").write_bytes(b"x")
    assert weights.locate(tmp_path, "v15").unet.name == "unet.safetensors"


@pytest.mark.parametrize(
    ("official", "other"),
    [
        ("sd-vae/diffusion_pytorch_model.bin", "sd-vae/diffusion_pytorch_model.safetensors"),
        ("whisper/pytorch_model.bin", "whisper/model.safetensors"),
        ("s3fd-619a316812.pth", "s3fd/s3fd-619a316812.pth"),
        ("s3fd-619a316812.pth", "s3fd/s3fd.pth"),
        ("s3fd-619a316812.pth", "s3fd.pth"),
        ("s3fd-619a316812.pth", "hub/checkpoints/s3fd-619a316812.pth"),
        ("musetalkV15/unet.pth", "musetalkV15/diffusion_pytorch_model.safetensors"),
    ],
)
def test_a_file_is_found_under_its_other_names(models: Path, tmp_path: Path, official: str, other: str) -> None:
    linked(models, tmp_path)
    (tmp_path / official).unlink()
    assert official in refusal(lambda: weights.locate(tmp_path, "v15")).details["missing"]  # type: ignore[operator]
    (tmp_path / other).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / other).write_bytes(b"x")
    files = weights.locate(tmp_path, "v15")
    assert {files.unet, files.detector, files.vae_dir / Path(other).name, files.whisper_dir / Path(other).name} & {
        tmp_path / other
    }


@pytest.mark.parametrize("version", ["v15", "v1"])
def test_each_missing_file_is_named_with_size_purpose_and_source(tmp_path: Path, version: weights.ModelVersion) -> None:
    error = refusal(lambda: weights.locate(tmp_path, version), tmp_path)
    wanted = [entry for entry in manifest.files_of(manifest.MANIFEST, version) if entry.is_needed]
    assert error.details["missing"] == [entry.name for entry in wanted]
    assert str(error).startswith(f"{len(wanted)} of the model files are missing")
    assert str(error).endswith(f"; run python -m musetalk.weights fetch --version {version}")
    for entry in wanted:
        size = f"{entry.n_bytes:,} bytes, " if entry.n_bytes else ""
        assert f"{entry.name} ({size}{entry.purpose}, from {entry.source})" in str(error)


def test_only_what_is_missing_is_listed(models: Path, tmp_path: Path) -> None:
    linked(models, tmp_path)
    (tmp_path / "dwpose/dw-ll_ucoco_384.pth").unlink()
    (tmp_path / "whisper/config.json").unlink()
    error = refusal(lambda: weights.locate(tmp_path, "v15"), tmp_path, models)
    assert error.details["missing"] == ["whisper/config.json", "dwpose/dw-ll_ucoco_384.pth"]
    assert "406,878,486 bytes" in str(error)


def test_a_dangling_link_is_a_missing_file(models: Path, tmp_path: Path) -> None:
    linked(models, tmp_path)
    (tmp_path / "musetalkV15/unet.pth").unlink()
    (tmp_path / "musetalkV15/unet.pth").symlink_to(tmp_path / "gone")
    error = refusal(lambda: weights.locate(tmp_path, "v15"), tmp_path)
    assert error.details["missing"] == ["musetalkV15/unet.pth"]


def test_find_weights_returns_the_first_existing_name_or_lists_all(tmp_path: Path) -> None:
    folder = tmp_path / "sd-vae"
    folder.mkdir()
    error = refusal(lambda: weights.find_weights(folder, ("a.safetensors", "a.bin")), tmp_path)
    assert str(error) == "sd-vae contains none of a.safetensors, a.bin"
    for name in ("a.bin", "a.safetensors"):
        (folder / name).write_bytes(b"x")
        assert weights.find_weights(folder, ("a.safetensors", "a.bin")) == folder / name


# -- tensors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pth", ".bin", ".pt", ".safetensors"])
def test_a_plain_state_is_read_in_any_format(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"unet{suffix}"
    if suffix == ".safetensors":
        save_file(STATE, path)
    else:
        torch.save(STATE, path)
    assert equal(weights.read_state(path), STATE)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("level", ["state_dict", "model", "unet", None])
@pytest.mark.parametrize("prefix", ["", "module.", "unet."])
def test_wrapping_and_prefixes_are_removed(tmp_path: Path, zipped: bool, level: str | None, prefix: str) -> None:
    inner = OrderedDict((prefix + key, value) for key, value in STATE.items())
    saved: Any = inner if level is None else {"epoch": 3, "lr": 0.1, level: inner}
    path = tmp_path / "unet.pth"
    torch.save(saved, path, _use_new_zipfile_serialization=zipped)
    assert equal(weights.read_state(path), STATE)


def test_a_prefix_that_not_all_keys_share_stays(tmp_path: Path) -> None:
    state = {"module.a": torch.ones(2), "b": torch.ones(1)}
    torch.save(state, tmp_path / "unet.pth")
    assert equal(weights.read_state(tmp_path / "unet.pth"), state)


def test_a_mapping_without_tensors_is_not_the_state(tmp_path: Path) -> None:
    torch.save({"model": {"name": "unet"}, **STATE}, tmp_path / "unet.pth")
    assert equal(weights.read_state(tmp_path / "unet.pth"), STATE)


def test_counters_and_half_precision_keep_their_type(tmp_path: Path) -> None:
    state = {"n": torch.tensor(7), "h": torch.ones(3, dtype=torch.float16), "e": torch.zeros(0)}
    torch.save(state, tmp_path / "unet.pth")
    got = weights.read_state(tmp_path / "unet.pth")
    assert equal(got, state)
    assert [value.dtype for value in got.values()] == [torch.int64, torch.float16, torch.float32]


@pytest.mark.parametrize("folder", ["models", "converted"])
def test_every_file_of_the_layout_is_read(folder: str, request: pytest.FixtureRequest) -> None:
    models_dir: Path = request.getfixturevalue(folder)
    files = [path for path in models_dir.rglob("*") if path.suffix in {".pth", ".bin", ".safetensors"}]
    assert len(files) == 6
    for path in files:
        assert weights.read_state(path)


def test_the_pose_file_is_read_without_importing_what_it_names(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = models / "dwpose/dw-ll_ucoco_384.pth"
    module = "tests.support.tiny_models"
    with zipfile.ZipFile(path) as archive:
        pickled = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    assert b"HistoryBuffer" in pickled
    monkeypatch.delitem(sys.modules, module)
    state = weights.read_state(path)
    assert module not in sys.modules
    assert all(isinstance(value, Tensor) for value in state.values())
    assert not any(key.startswith(("meta", "optimizer")) for key in state)
    rtmpose_from_state(state)


def test_sha256_of_reads_the_whole_file(tmp_path: Path) -> None:
    data = random.Random(0).randbytes(3_000_001)
    (tmp_path / "file").write_bytes(data)
    assert manifest.sha256_of(tmp_path / "file") == hashlib.sha256(data).hexdigest()


# -- files without usable weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["whisper/pytorch_model.bin", "whisper/model.safetensors"])
@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "is empty"),
        (b"\n <!DOCTYPE html><html><body>Not found</body></html>", "is a web page"),
        (b"<html><head></head></html>", "is a web page"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 151095027\n", "is a git-lfs pointer"),
        (b'{"error": "Repository not found"}', "torch checkpoint|safetensors file"),
        (b"\x00" * 4096, "torch checkpoint|safetensors file"),
        (b"PK", "torch checkpoint|safetensors file"),
        (b"PK\x05\x06" + b"\x00" * 18, "torch checkpoint|safetensors file"),
    ],
)
def test_leftovers_of_failed_downloads_are_described(tmp_path: Path, name: str, content: bytes, text: str) -> None:
    path = tmp_path / name
    path.parent.mkdir()
    path.write_bytes(content)
    error = refusal(lambda: weights.read_state(path), tmp_path)
    assert str(error).startswith(f"{name} ")
    assert any(words in str(error) for words in text.split("|"))
    assert "expected 151,095,027 bytes, Whisper (its encoder is used), from Hugging Face openai/whisper-tiny" in str(
        error
    )
    assert error.details == {"file": name}


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    error = refusal(lambda: weights.read_state(tmp_path / "sd-vae/diffusion_pytorch_model.bin"), tmp_path)
    assert str(error).startswith("sd-vae/diffusion_pytorch_model.bin is missing; expected 334,707,217 bytes, VAE")


def test_a_file_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "unet.pth"
    torch.save(STATE, path)

    def refuse(self: Path, *_args: object, **_options: object) -> NoReturn:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)
    assert "cannot be read (Permission denied)" in str(refusal(lambda: weights.read_state(path), tmp_path))


@pytest.mark.parametrize("form", ["zipped", "legacy", "safetensors"])
def test_a_path_in_a_librarys_message_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    path = tmp_path / ("unet.safetensors" if form == "safetensors" else "unet.pth")
    if form == "safetensors":
        save_file(STATE, path)
    else:
        torch.save(STATE, path, _use_new_zipfile_serialization=form == "zipped")

    def fail(file: object, *_args: object, **_options: object) -> NoReturn:
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(torch, "load", fail)
    monkeypatch.setattr(weights, "load_file", fail)
    assert "Input/output error" in str(refusal(lambda: weights.read_state(path), tmp_path))


@pytest.mark.parametrize("form", ["zipped", "legacy", "safetensors"])
def test_a_file_cut_anywhere_is_named(tmp_path: Path, form: str) -> None:
    path = tmp_path / "musetalkV15" / ("unet.safetensors" if form == "safetensors" else "unet.pth")
    path.parent.mkdir()
    if form == "safetensors":
        save_file(STATE, path)
    else:
        torch.save(STATE, path, _use_new_zipfile_serialization=form == "zipped")
    whole = path.read_bytes()
    points = {1, 2, 4, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1, *range(0, len(whole), len(whole) // 97)} - {0}
    for length in sorted(points):
        path.write_bytes(whole[:length])
        error = refusal(lambda: weights.read_state(path), tmp_path)
        assert str(error).startswith(f"musetalkV15/{path.name} ")
        assert "UNet of MuseTalk v1.5" in str(error)
    path.write_bytes(whole)
    assert equal(weights.read_state(path), STATE)


def test_the_error_of_a_cut_zip_file_has_its_size(tmp_path: Path) -> None:
    path = tmp_path / "unet.pth"
    torch.save(STATE, path)
    path.write_bytes(path.read_bytes()[:1000])
    assert "is cut short: it has 1,000 bytes and its end is missing" in str(
        refusal(lambda: weights.read_state(path), tmp_path)
    )


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
@pytest.mark.parametrize("form", ["zipped", "legacy", "safetensors", "pickle"])
def test_damaged_bytes_give_tensors_or_one_error(tmp_path: Path, form: str) -> None:
    chance = random.Random(form)
    path = tmp_path / ("unet.safetensors" if form == "safetensors" else "unet.pth")
    if form == "safetensors":
        save_file(STATE, path)
    else:
        torch.save({"meta": OrderedDict(a=1), "model": STATE}, path, _use_new_zipfile_serialization=form != "legacy")
    whole = path.read_bytes()
    pickled = pickle_in(path) if form == "pickle" else whole
    messages: list[str] = []
    for _ in range(150):
        damaged = bytearray(pickled)
        for _ in range(chance.randint(1, 3)):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        if form == "pickle":
            path.write_bytes(whole)
            replace_pickle(path, bytes(damaged))
        else:
            path.write_bytes(damaged)
        try:
            weights.read_state(path)
        except WeightsError as error:
            messages.append(str(error))
    assert len(messages) > 15
    assert not any(str(tmp_path) in message for message in messages)


def pickle_in(path: Path) -> bytes:
    """The pickle inside a zipped checkpoint."""
    with zipfile.ZipFile(path) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))


def replace_pickle(path: Path, pickled: bytes) -> None:
    """Put another pickle into a zipped checkpoint."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, pickled if name.endswith("data.pkl") else data)


@pytest.mark.parametrize("content", [[1, 2, 3], {}, {"state_dict": {}}, {"a": 1}, torch.ones(3), "text", None])
def test_a_checkpoint_without_named_tensors_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "unet.pth")
    assert "contains no tensors" in str(refusal(lambda: weights.read_state(tmp_path / "unet.pth"), tmp_path))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", ["pth", "safetensors"])
def test_values_that_are_not_finite_are_refused(tmp_path: Path, value: float, dtype: torch.dtype, form: str) -> None:
    path = tmp_path / f"unet.{form}"
    broken = torch.ones(5, 7, dtype=dtype)
    broken[3, 6] = value
    state = {**STATE, "late.bias": broken}
    if form == "pth":
        torch.save(state, path)
    else:
        save_file(state, path)
    error = refusal(lambda: weights.read_state(path), tmp_path)
    assert "contains values that are not finite (in late.bias)" in str(error)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn, torch.float16, torch.bfloat16])
def test_finite_values_of_any_precision_are_read(tmp_path: Path, dtype: torch.dtype) -> None:
    state = {"a": torch.linspace(-200, 200, 77).to(dtype), "empty": torch.zeros(0, dtype=dtype)}
    torch.save(state, tmp_path / "unet.pth")
    assert weights.read_state(tmp_path / "unet.pth")["a"].dtype == dtype


def test_values_beyond_single_precision_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.tensor([0.0, -1e300], dtype=torch.float64)}, tmp_path / "unet.pth")
    assert "not finite (in a)" in str(refusal(lambda: weights.read_state(tmp_path / "unet.pth"), tmp_path))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (torch.eye(3).to_sparse(), "something other than plain numbers"),
        (torch.ones(3, device="meta"), "something other than plain numbers"),
        (torch.ones(3, dtype=torch.complex64), "something other than plain numbers"),
        (torch.ones(1).expand(10**13), "larger than the file"),
    ],
    ids=["sparse", "meta", "complex", "expanded"],
)
def test_tensors_that_no_network_can_load_are_refused(tmp_path: Path, value: Tensor, text: str) -> None:
    torch.save({**STATE, "late.bias": value}, tmp_path / "unet.pth")
    error = refusal(lambda: weights.read_state(tmp_path / "unet.pth"), tmp_path)
    assert f"{text} (in late.bias)" in str(error)


def test_a_checkpoint_in_the_oldest_format_is_named(tmp_path: Path) -> None:
    path = tmp_path / "resnet18-5c106cde.pth"
    with tarfile.open(path, "w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            content = pickle.dumps({}, 2)
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    assert "legacy .tar format" in str(refusal(lambda: weights.read_state(path), tmp_path))


# -- hostile files ----------------------------------------------------------------------------------------------------


class Call:
    """Pickles as a call that would run when the file is unpickled."""

    def __init__(self, function: Callable[..., object], *args: object) -> None:
        self._call = function, args

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self._call


class Made:
    """Pickles as a call, and as a state set on its result."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...], dict[str, object]]:
        return builtins.getattr, (Call(__import__, "os"), "environ"), {"MUSETALK_HOSTILE": "1"}


def hostile(marker: Path) -> dict[str, object]:
    """Objects that create the marker when they are unpickled without protection, by their method."""
    touch = f"open({str(marker)!r}, 'w').close()"
    return {
        "os.system": Call(os.system, f"touch {marker}"),
        "eval": Call(eval, touch),
        "exec": Call(exec, touch),
        "open": Call(open, str(marker), "w"),
        "getattr chain": Call(getattr, Call(__import__, "os"), "system"),
        "import and call": Call(eval, f"__import__('os').system('touch {marker}')"),
        "path method": Call(Path.touch, marker),
        "mkdir": Call(os.mkdir, str(marker)),
        "torch loads code": Call(torch.hub.load, str(marker.parent), "model"),
        "state": Made(),
    }


# No checkpoint names these modules, so the file is refused; any other object becomes inert.
REFUSED = {"os.system", "mkdir"}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("attempt", sorted(hostile(Path("marker"))))
def test_nothing_in_a_file_is_executed(tmp_path: Path, attempt: str, zipped: bool) -> None:
    marker, path = tmp_path / "marker", tmp_path / "unet.pth"
    torch.save({"hook": hostile(marker)[attempt], **STATE}, path, _use_new_zipfile_serialization=zipped)
    if zipped and attempt not in REFUSED:
        assert equal(weights.read_state(path), STATE), "an object that is no tensor becomes inert and is left out"
    else:
        assert "torch checkpoint" in str(refusal(lambda: weights.read_state(path), tmp_path))
    assert not marker.exists()
    assert "MUSETALK_HOSTILE" not in os.environ


def test_the_attempts_would_succeed_without_the_protection(tmp_path: Path) -> None:
    for number, attempt in enumerate(("os.system", "eval", "exec", "import and call", "path method", "mkdir")):
        marker = tmp_path / str(number)
        torch.save({"hook": hostile(marker)[attempt]}, tmp_path / "unet.pth")
        torch.load(tmp_path / "unet.pth", weights_only=False)
        assert marker.exists(), attempt


@pytest.mark.parametrize("zipped", [True, False])
def test_a_module_named_in_a_file_is_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool
) -> None:
    marker, name = tmp_path / "marker", "module_with_side_effects"
    (tmp_path / f"{name}.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Thing:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    stand_in: Any = types.ModuleType(name)
    stand_in.Thing = type("Thing", (), {"__module__": name})
    monkeypatch.setitem(sys.modules, name, stand_in)
    things = [stand_in.Thing(), {stand_in.Thing: stand_in.Thing()}]
    things[0].attribute = 1
    torch.save({"things": things, **STATE}, tmp_path / "unet.pth", _use_new_zipfile_serialization=zipped)
    monkeypatch.delitem(sys.modules, name)
    if zipped:
        assert equal(weights.read_state(tmp_path / "unet.pth"), STATE)
    else:
        refusal(lambda: weights.read_state(tmp_path / "unet.pth"), tmp_path)
    assert not marker.exists()
    assert name not in sys.modules


class Growing(list[int]):
    """A list of another library, pickled with its items."""


class Record:
    """An object of another library with a plain state."""

    def __init__(self) -> None:
        self.values = [1.0]
        self.mean = Call(getattr, Call, "mean")


def test_foreign_objects_become_inert(tmp_path: Path) -> None:
    torch.save({"log": [Record(), Record()], "one": Record(), **STATE}, tmp_path / "unet.pth")
    assert equal(weights.read_state(tmp_path / "unet.pth"), STATE)


class Settings(dict[str, object]):
    """A mapping of another library with a state of its own."""

    def __init__(self) -> None:
        super().__init__(lr=0.1)
        self.name = "settings"


def test_foreign_lists_sets_and_mappings_are_ignored(tmp_path: Path) -> None:
    meta = {"log": Growing([1, 2]), "cfg": Settings(), "seen": {1, 2}, "kind": Record, "shape": torch.Size([2, 3])}
    torch.save({"meta": meta, "state_dict": {**STATE, "half": torch.ones(2, dtype=torch.float16)}}, tmp_path / "a.pth")
    state = weights.read_state(tmp_path / "a.pth")
    assert torch.equal(state.pop("half"), torch.ones(2, dtype=torch.float16))
    assert equal(state, STATE)


def test_views_of_one_storage_are_read_correctly(tmp_path: Path) -> None:
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    views = {"all": base, "columns": base.t(), "part": base[1:3, 2:5], "scalar": base[2, 3], "none": base[:0]}
    torch.save({"log": Growing([1]), **views}, tmp_path / "a.pth")
    state = weights.read_state(tmp_path / "a.pth")
    for name, view in views.items():
        assert torch.equal(state[name], view), name


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [(0, (3,), (4,)), (8, (1,), (1,)), (0, (2, 2), (8, 1)), (-1, (1,), (1,)), (0, (2,), (-1,)), (0, (2,), (1, 1)),
     (0, (1.0,), (1,)), (0, (True,), (1,))],
)  # fmt: skip
def test_a_tensor_beyond_its_storage_is_refused(offset: int, size: Any, stride: Any) -> None:
    with pytest.raises(pickle.UnpicklingError):
        rebuild_tensor(torch.arange(8), offset, size, stride)


def test_reading_does_not_extend_torchs_list_of_allowed_classes(tmp_path: Path) -> None:
    before = set(map(str, torch.serialization.get_safe_globals()))
    torch.save({"log": Record(), "list": Growing([1]), **STATE}, tmp_path / "unet.pth")
    assert weights.read_state(tmp_path / "unet.pth")
    assert set(map(str, torch.serialization.get_safe_globals())) == before


# -- configurations ---------------------------------------------------------------------------------------------------


def test_private_entries_of_configurations_are_dropped(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "X", "sample_size": 256}))
    assert weights.read_config(tmp_path / "config.json") == {"sample_size": 256}


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "is missing"),
        (b"", "is not a readable JSON file"),
        (b"{", "is not a readable JSON file"),
        (b"\xff\xfe{}", "is not a readable JSON file"),
        (b"<html></html>", "is not a readable JSON file"),
        (b"[1]", "is not a JSON object"),
        (b"null", "is not a JSON object"),
    ],
)
def test_a_broken_configuration_is_named(tmp_path: Path, content: bytes | None, text: str) -> None:
    path = tmp_path / "whisper/config.json"
    path.parent.mkdir()
    if content is not None:
        path.write_bytes(content)
    error = refusal(lambda: weights.read_config(path), tmp_path)
    assert str(error).startswith(f"whisper/config.json {text}")
    assert "configuration of Whisper" in str(error)


# -- networks ---------------------------------------------------------------------------------------------------------


def test_strict_loading_loads_every_tensor() -> None:
    network = nn.Linear(3, 2)
    state = {"weight": torch.full((2, 3), 5.0), "bias": torch.full((2,), 6.0)}
    weights.load_strictly(network, state, "musetalkV15/unet.pth")
    assert equal(network.state_dict(), state)


def test_strict_loading_counts_and_names_the_keys_that_do_not_match() -> None:
    network = nn.Sequential(*(nn.Linear(3, 2) for _ in range(3)))
    state = network.state_dict()
    before = {key: value.clone() for key, value in state.items()}
    for key in ("0.bias", "1.bias"):
        del state[key]
    state |= {f"extra{index}": torch.ones(1) for index in range(5)}
    state["2.weight"] = torch.ones(3, 2)
    error = refusal_of_loading(network, state)
    assert str(error) == (
        "musetalkV15/unet.pth belongs to another network: of 6 tensors 2 missing (0.bias, 1.bias), "
        "5 unexpected (extra0, extra1, extra2, …), 1 of another shape (2.weight); expected 3,400,074,924 bytes, "
        "UNet of MuseTalk v1.5, from Hugging Face TMElyralab/MuseTalk"
    )
    assert error.details == {"file": "musetalkV15/unet.pth"}
    assert equal(network.state_dict(), before), "nothing is loaded unless all keys match"


def refusal_of_loading(network: nn.Module, state: dict[str, Tensor]) -> WeightsError:
    with pytest.raises(WeightsError) as caught:
        weights.load_strictly(network, state, "musetalkV15/unet.pth")
    return caught.value


def test_a_checkpoint_of_another_network_is_named(models: Path) -> None:
    state = weights.read_state(models / "s3fd-619a316812.pth")
    message = str(refusal_of_loading(nn.Linear(3, 2), state))
    assert f"2 missing (bias, weight), {len(state)} unexpected (conv1_1.bias, " in message


def test_a_face_file_that_does_not_fit_names_the_first_keys(models: Path) -> None:
    state = weights.read_state(models / "dwpose/dw-ll_ucoco_384.pth")
    lost = [key for key in state if key.startswith("backbone.stage3.1.blocks.") and key.endswith(".running_mean")]
    for key in lost:
        del state[key]

    def load() -> None:
        with weights.loading("dw-ll_ucoco_384.pth"):
            rtmpose_from_state(state)

    message = str(refusal(load))
    assert f"{len(lost)} missing ({', '.join(sorted(lost)[:3])}, …)); expected 406,878,486 bytes" in message


@pytest.mark.parametrize("error", [RuntimeError, OSError, ValueError, KeyError, TypeError, AttributeError])
def test_errors_of_libraries_become_one_that_names_the_file(error: type[Exception]) -> None:
    def fail() -> None:
        with weights.loading("dw-ll_ucoco_384.pth"):
            raise error("the first line\nthe second line")

    refused = refusal(fail)
    assert str(refused).startswith("dw-ll_ucoco_384.pth cannot be loaded (")
    assert "landmarks (RTMPose-l, whole body)" in str(refused)


def test_our_own_error_passes_unchanged() -> None:
    ours = WeightsError("ours")
    with pytest.raises(WeightsError) as caught, weights.loading("a.pth"):
        raise ours
    assert caught.value is ours


@pytest.mark.parametrize(
    ("name", "purpose"),
    [
        ("whisper/pytorch_model.bin", "Whisper (its encoder is used)"),
        ("musetalk/pytorch_model.bin", "UNet of MuseTalk v1.0"),
        ("musetalk/diffusion_pytorch_model.safetensors", "UNet of MuseTalk v1.0"),
        ("musetalkV15/diffusion_pytorch_model.safetensors", "UNet of MuseTalk v1.5"),
        ("sd-vae/diffusion_pytorch_model.safetensors", "VAE"),
        ("whisper/config.json", "configuration of Whisper"),
        ("anywhere/unet.pth", "UNet of MuseTalk v1.5"),
        ("models/s3fd-619a316812.pth", "face detection (S3FD)"),
        ("face_detection/s3fd.pth", "face detection (S3FD)"),
        ("79999_iter.pth", "face parsing (BiSeNet)"),
        ("anywhere/pytorch_model.bin", None),
        ("anywhere/other.bin", None),
    ],
)
def test_an_error_describes_the_expected_file(tmp_path: Path, name: str, purpose: str | None) -> None:
    error = refusal(lambda: weights.read_state(tmp_path / name), tmp_path)
    assert ("expected" in str(error)) == (purpose is not None)
    if purpose is not None:
        assert f" {purpose}, from " in str(error)
