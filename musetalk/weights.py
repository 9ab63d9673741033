"""Weight files: their paths, and their tensors, read without running any code stored in them.

A file that is missing, cut short or of another network raises one WeightsError with its name, the expected file and its
source. Knows no networks. `python -m musetalk.weights` fetches, verifies and converts the files.
"""

from __future__ import annotations

import runpy

if __name__ == "__main__":
    # The command reads settings, which the model must not know. Starting it by name avoids an import of a higher layer.
    # Before torch is imported, because most calls do not need it.
    runpy.run_module("worker.cli.weights", run_name="__main__")

import json
import math
import pickle
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from musetalk.checkpoint_limits import OversizeError, check_legacy, check_zip
from musetalk.errors import WeightsError
from musetalk.foreign_pickle import read_foreign
from musetalk.manifest import MANIFEST, OFFICIAL, OTHER_NAMES, ModelVersion, WeightFile, find_file

__all__ = ["MANIFEST", "ModelFiles", "ModelVersion", "WeightFile"]

# Characters of a library's message that go into an error: enough for the keys that do not fit a network.
_MESSAGE_LIMIT = 600

# A configuration has a few kilobytes.
MAX_CONFIG_BYTES = 1_000_000

# Raised by torch's readers for bytes that are no checkpoint or only the beginning of one.
_UNREADABLE = (
    RuntimeError,
    OSError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
    EOFError,
    pickle.UnpicklingError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)


@dataclass(frozen=True)
class ModelFiles:
    """Paths of the files of one version; None where the demo has no network of its own."""

    unet: Path
    unet_config: Path
    vae_dir: Path
    whisper_dir: Path
    pose: Path | None
    detector: Path | None
    parsing: Path | None


def locate(models_dir: Path, version: ModelVersion) -> ModelFiles:
    """Find the files of `version` under `models_dir`; a `.safetensors` file of the same name is preferred.

    Raises WeightsError that lists every missing file with its size, purpose and source.
    """
    found: dict[str, Path] = {}
    missing: list[WeightFile] = []
    for entry in MANIFEST:
        if version not in entry.versions:
            continue
        path = find_file(models_dir, entry.name)
        if path is not None:
            found[entry.purpose] = path
        elif entry.is_needed:
            missing.append(entry)
    if missing:
        # The demo model ships with the project; its files cannot be fetched.
        advice = f"; run python -m musetalk.weights fetch --version {version}" if version in OFFICIAL else ""
        lines = "; ".join(f"{entry.name} ({expected(entry)})" for entry in missing)
        raise WeightsError(
            f"{len(missing)} of the model files are missing under the models folder: {lines}{advice}",
            missing=[entry.name for entry in missing],
        )
    unet = "UNet of MuseTalk v1.0" if version == "v1" else "UNet of MuseTalk v1.5"
    config = "configuration of the v1.0 UNet" if version == "v1" else "configuration of the v1.5 UNet"
    return ModelFiles(
        unet=found[unet],
        unet_config=found[config],
        vae_dir=found["configuration of the VAE"].parent,
        whisper_dir=found["configuration of Whisper"].parent,
        pose=found.get("landmarks (RTMPose-l, whole body)"),
        detector=found.get("face detection (S3FD)"),
        parsing=found.get("face parsing (BiSeNet)"),
    )


def has_any(models_dir: Path) -> bool:
    """Whether any file of the official layout exists; then a missing one is a mistake, not a choice of the demo."""
    return any(find_file(models_dir, entry.name) is not None for entry in MANIFEST)


def find_weights(folder: Path, names: tuple[str, ...]) -> Path:
    """Return the first of `names` that exists in `folder`; raises WeightsError that lists them."""
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise WeightsError(f"{folder.name} contains none of {', '.join(names)}", file=folder.name)


def expected(entry: WeightFile) -> str:
    """Describe the size, purpose and source of a file, for messages."""
    size = f"{entry.n_bytes:,} bytes, " if entry.n_bytes else ""
    return f"{size}{entry.purpose}, from {entry.source}"


def _advice(path: Path) -> str:
    """Describe the file that the manifest expects at `path`, for messages; empty if it expects none."""
    namesakes: list[WeightFile] = []
    for entry in MANIFEST:
        places = [Path(place) for place in (entry.name, *OTHER_NAMES.get(entry.name, ()))]
        if any((place.parent.name, place.stem) == (path.parent.name, path.stem) for place in places):
            return f"; expected {expected(entry)}"
        if any(place.stem == path.stem for place in places):
            namesakes.append(entry)
    # Several folders have a `pytorch_model.bin`, so that the name alone does not identify the file.
    return f"; expected {expected(namesakes[0])}" if len(namesakes) == 1 else ""


def _file_error(path: Path, what: str) -> WeightsError:
    """Return the error for a bad file: its folder and name, what is wrong, and the expected file."""
    label = f"{path.parent.name}/{path.name}"
    # A library's message may contain the whole path, which callers must not see.
    what = what.replace(str(path), label)
    return WeightsError(f"{label} {what}{_advice(path)}", file=label)


def read_config(path: Path) -> dict[str, Any]:
    """Read a JSON configuration, without the entries that start with an underscore; raises WeightsError."""
    try:
        n_bytes = path.stat().st_size
        if n_bytes > MAX_CONFIG_BYTES:
            raise _file_error(path, f"has {n_bytes:,} bytes, too many for a configuration")
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise _file_error(path, "is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise _file_error(path, f"is not a readable JSON file ({type(error).__name__})") from None
    if not isinstance(raw, dict):
        raise _file_error(path, "is not a JSON object")
    return {key: value for key, value in raw.items() if not key.startswith("_")}


def read_state(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint by key, in their stored shapes and types, on the CPU.

    The file is `.safetensors`, or torch's own format with any suffix.

    One level of wrapping (`state_dict`, `model`, `unet`, `params_ema`, `params`) is removed, and so is a common prefix
    `module.` or `unet.`.
    No code stored in the file is executed: tensors are read, every other object becomes inert.
    Raises WeightsError for a missing, cut or foreign file, and for tensors that are not plain finite numbers.
    """
    if not path.is_file():
        raise _file_error(path, "is missing")
    reject_non_checkpoint(path)
    raw = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    state = _unwrap(raw)
    if not state:
        raise _file_error(path, "contains no tensors")
    _reject_unusable(path, state)
    return state


def reject_non_checkpoint(path: Path) -> None:
    """Raise WeightsError for what a failed download leaves: an empty file, a web page, a git-lfs pointer."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise _file_error(path, f"cannot be read ({error.strerror})") from None
    if size == 0:
        raise _file_error(path, "is empty")
    text = head.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise _file_error(path, "is a web page, not weights: the server answered the download with an error page")
    if text.startswith(b"version https://git-lfs"):
        raise _file_error(
            path, "is a git-lfs pointer, not the weights themselves: run git lfs pull or download the file"
        )


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path, device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        raise _file_error(path, f"is cut short or not a safetensors file ({error})") from None


def _read_torch(path: Path) -> object:
    try:
        is_zip = zipfile.is_zipfile(path)
    except zipfile.BadZipFile as error:
        raise _file_error(path, f"cannot be read as a torch checkpoint ({_cause(error)})") from None
    if not is_zip:
        with path.open("rb") as file:
            magic = file.read(4)
        # The index of a zip file is at its end: a cut file begins like one but is not readable as one.
        if magic == b"PK\x03\x04":
            raise _file_error(path, f"is cut short: it has {path.stat().st_size:,} bytes and its end is missing")
        return _read_legacy(path)
    try:
        # Mapped, so that a checkpoint of 3.4 GB is not copied into memory. Compressed bytes would be taken for numbers.
        is_plain = check_zip(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_plain)
    except OversizeError as error:
        raise _file_error(path, str(error)) from None
    except pickle.UnpicklingError:
        # The checkpoint also contains objects of its training library; this reader builds none of them.
        try:
            return read_foreign(path)
        except (*_UNREADABLE, MemoryError) as error:
            raise _file_error(path, f"cannot be read as a torch checkpoint ({_cause(error)})") from None
    except _UNREADABLE as error:
        raise _file_error(path, f"cannot be read as a torch checkpoint ({_cause(error)})") from None


def _read_legacy(path: Path) -> object:
    """Read a checkpoint from before torch 1.6: a sequence of pickles and raw storages."""
    try:
        # Torch itself explains that it reads no tar files.
        if not tarfile.is_tarfile(path):
            check_legacy(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except OversizeError as error:
        raise _file_error(path, str(error)) from None
    except _UNREADABLE as error:
        raise _file_error(path, f"is not a torch checkpoint, or is cut short ({_cause(error)})") from None


def _cause(error: BaseException) -> str:
    """Describe an error of torch's reader, without its advice to load the file unprotected."""
    if isinstance(error, pickle.UnpicklingError) and error.__context__ is not None:
        error = error.__context__
    return type(error).__name__ if isinstance(error, LookupError) else _first_line(error).partition(". ")[0]


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0][:_MESSAGE_LIMIT] if text else type(error).__name__


def _unwrap(raw: object) -> dict[str, Tensor]:
    if not isinstance(raw, Mapping):
        return {}
    for name in ("state_dict", "model", "unet", "params_ema", "params"):
        inner = raw.get(name)
        if isinstance(inner, Mapping) and any(isinstance(value, Tensor) for value in inner.values()):
            raw = inner
            break
    state = {str(key): value for key, value in raw.items() if isinstance(value, Tensor)}
    for prefix in ("module.", "unet."):
        if state and all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _reject_unusable(path: Path, state: Mapping[str, Tensor]) -> None:
    n_bytes = path.stat().st_size
    for key, value in state.items():
        plain = value.layout == torch.strided and value.device.type == "cpu"
        if not plain or value.is_quantized or value.is_nested or value.is_complex():
            raise _file_error(path, f"contains something other than plain numbers (in {key})")
        if value.numel() * value.element_size() > n_bytes:
            # With a stride of 0 one stored number fills any shape; copying that could exhaust the memory.
            raise _file_error(path, f"declares a tensor that is larger than the file (in {key})")
        if value.is_floating_point() and value.numel() and not _is_finite(value):
            raise _file_error(path, f"contains values that are not finite (in {key})")


def _is_finite(values: Tensor) -> bool:
    """Whether all values are finite as float32: one pass without a copy; a NaN makes both extremes NaN."""
    least, greatest = torch.aminmax(values if values.element_size() > 1 else values.float())
    return math.isfinite(least.float().item()) and math.isfinite(greatest.float().item())


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], name: str) -> None:
    """Load `state` into `module`; all keys and shapes must match.

    Raises WeightsError with the number of keys that do not match, and the first of them.
    """
    # Compared here, because torch's own message lists every key of another network.
    own = module.state_dict()
    missing = sorted(own.keys() - state.keys())
    unexpected = sorted(state.keys() - own.keys())
    wrong = sorted(key for key in own.keys() & state.keys() if own[key].shape != state[key].shape)
    if missing or unexpected or wrong:
        parts = [
            f"{len(keys)} {what} ({', '.join(keys[:3])}{', …' if len(keys) > 3 else ''})"
            for what, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", wrong))
            if keys
        ]
        raise WeightsError(
            f"{name} belongs to another network: of {len(own)} tensors {', '.join(parts)}{_advice(Path(name))}",
            file=name,
        )
    module.load_state_dict(dict(state), strict=True)


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Translate the errors of libraries that read `name` into WeightsError with the file's name."""
    try:
        yield
    except WeightsError:
        raise
    except (RuntimeError, OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise WeightsError(f"{name} cannot be loaded ({_first_line(error)}){_advice(Path(name))}", file=name) from None
    except pickle.UnpicklingError as error:
        raise WeightsError(f"{name} cannot be read ({_first_line(error)}){_advice(Path(name))}", file=name) from None
