"""Conversion of official checkpoints to safetensors files beside them: only tensors, in float16 where possible."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from musetalk import weights
from musetalk.errors import WeightsError
from musetalk.files import replacing
from musetalk.manifest import (
    MANIFEST,
    ModelVersion,
    Recorded,
    WeightFile,
    candidate_paths,
    files_of,
    read_record,
    readable_size,
    sha256_of,
    write_record,
)

# Ends as the finished file does: the name selects the reader that checks it.
_PART_SUFFIX = ".part.safetensors"


def convert(
    models_dir: Path,
    version: ModelVersion,
    *,
    manifest: Sequence[WeightFile] = MANIFEST,
    say: Callable[[str], None] = lambda _text: None,
    remove_originals: bool = False,
) -> list[str]:
    """Write a `.safetensors` file for every checkpoint of `version`; return the names of the new ones.

    UNet, VAE and Whisper's encoder are stored in float16, the face networks in float32, in which they run. Sizes and
    checksums go into the folder's record. `remove_originals` deletes a checkpoint once its converted file has been
    written and read back. Raises WeightsError if a file is missing or cannot be read, and if the disk is full.
    """
    weights.locate(models_dir, version)
    made: list[str] = []
    for entry in files_of(manifest, version):
        if entry.precision is None:
            continue
        sources = [
            path for path in candidate_paths(models_dir, entry.name) if path.is_file() and path.suffix != ".safetensors"
        ]
        if not sources:
            say(f"{entry.name} does not exist in its official format; the file in use stays unchanged")
            continue
        if _convert_one(models_dir, entry, sources[0], say):
            made.append(entry.converted_name)
        if remove_originals and entry.converted_name in read_record(models_dir):
            sources[0].unlink()
            _remove_from_record(models_dir, sources[0])
    return made


def _convert_one(models_dir: Path, entry: WeightFile, source: Path, say: Callable[[str], None]) -> bool:
    """Convert one checkpoint; return whether a new file was written. A file of other origin is never replaced."""
    target, record = models_dir / entry.converted_name, read_record(models_dir)
    made, known = record.get(entry.converted_name), record.get(entry.name)
    if target.is_file() and made is None:
        say(f"{entry.converted_name} was not written by this command; it stays unchanged")
        return False
    # Hashing gigabytes takes a while; the record has the checksum if `fetch` wrote the checkpoint.
    is_known = known is not None and source == models_dir / entry.name and known.n_bytes == source.stat().st_size
    source_sha256 = known.sha256 if known is not None and is_known else sha256_of(source)
    is_whole = made is not None and target.is_file() and made.n_bytes == target.stat().st_size
    if made is not None and is_whole and made.made_from == source_sha256:
        say(f"{entry.converted_name} exists already")
        return False
    state = {
        key: _in_precision(value, entry)
        for key, value in weights.read_state(source).items()
        if not entry.keeps or key.startswith(entry.keeps)
    }
    _write(state, target, entry)
    recorded = Recorded(n_bytes=target.stat().st_size, sha256=sha256_of(target), made_from=source_sha256)
    write_record(models_dir, {**read_record(models_dir), entry.converted_name: recorded})
    say(f"{entry.converted_name}: {readable_size(recorded.n_bytes)} instead of {readable_size(source.stat().st_size)}")
    return True


def _in_precision(value: Tensor, entry: WeightFile) -> Tensor:
    """Copy a tensor, of any shape, for writing: floats in the file's precision, in a storage of their own."""
    if not value.is_floating_point():
        return value.clone().contiguous()
    if entry.precision == "half":
        half = value.to(torch.float16, copy=True)
        # A number too large for float16 would become infinite, so a tensor with one is stored in float32.
        if not half.numel() or bool(torch.isfinite(half).all()):
            return half.contiguous()
    return value.to(torch.float32, copy=True).contiguous()


def _write(state: Mapping[str, Tensor], target: Path, entry: WeightFile) -> None:
    n_bytes = sum(value.numel() * value.element_size() for value in state.values())
    free = shutil.disk_usage(target.parent).free
    if free < n_bytes:
        raise WeightsError(
            f"the disk is full: {entry.converted_name} needs {readable_size(n_bytes)}, {readable_size(free)} are free",
            file=entry.converted_name,
            needed_bytes=n_bytes,
            free_bytes=free,
            kind="disk",
        )
    try:
        # A killed conversion leaves its part, up to gigabytes that nothing would ever use.
        for leftover in target.parent.glob(f".*{_PART_SUFFIX}"):
            leftover.unlink(missing_ok=True)
        with replacing(target, suffix=_PART_SUFFIX) as part:
            save_file(dict(state), part, metadata={"format": "pt"})
            written = weights.read_state(part)
            if any(key not in written or not torch.equal(written[key], value) for key, value in state.items()):
                raise WeightsError(f"{entry.converted_name} was not written correctly", file=entry.converted_name)
            del written
    except (OSError, SafetensorError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error).partition("\n")[0]
        raise WeightsError(
            f"{entry.converted_name} cannot be written ({reason}); it needs {readable_size(n_bytes)}",
            file=entry.converted_name,
        ) from None


def _remove_from_record(models_dir: Path, source: Path) -> None:
    record = read_record(models_dir)
    if record.pop(source.relative_to(models_dir).as_posix(), None) is not None:
        write_record(models_dir, record)
