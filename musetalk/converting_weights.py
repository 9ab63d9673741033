"""Official checkpoints -> safetensors beside them: half the size where half precision is run, nothing but tensors."""

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
    in_words,
    places,
    read_record,
    sha256_of,
    wanted,
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
    """Write a `.safetensors` file for every checkpoint of `version` and return the names of those that are new.

    UNet, VAE and Whisper's encoder are stored in float16, the face networks, which run in float32, in that. Sizes and
    checksums go into the folder's record. `remove_originals` deletes a checkpoint once its converted file has been
    written and read back. Raises WeightsError when a file is missing or cannot be read, and when the disk is full.
    """
    weights.locate(models_dir, version)
    made: list[str] = []
    for entry in wanted(manifest, version):
        if entry.precision is None:
            continue
        sources = [path for path in places(models_dir, entry.name) if path.is_file() and path.suffix != ".safetensors"]
        if not sources:
            say(f"{entry.name} does not exist in its official format; its replacement is left unchanged")
            continue
        if _convert_one(models_dir, entry, sources[0], say):
            made.append(entry.converted_name)
        if remove_originals and entry.converted_name in read_record(models_dir):
            sources[0].unlink()
            _forget(models_dir, sources[0])
    return made


def _convert_one(models_dir: Path, entry: WeightFile, source: Path, say: Callable[[str], None]) -> bool:
    """Whether a new file was written; a file of that name that we did not make is left alone."""
    target, record = models_dir / entry.converted_name, read_record(models_dir)
    made, known = record.get(entry.converted_name), record.get(entry.name)
    if target.is_file() and made is None:
        say(f"{entry.converted_name} exists and was not made here; it is left unchanged")
        return False
    is_known = known is not None and source == models_dir / entry.name and known.n_bytes == source.stat().st_size
    source_sum = known.sha256 if known is not None and is_known else sha256_of(source)
    is_whole = made is not None and target.is_file() and made.n_bytes == target.stat().st_size
    if made is not None and is_whole and made.made_from == source_sum:
        say(f"{entry.converted_name} exists already")
        return False
    state = {
        key: _stored(value, entry)
        for key, value in weights.read_state(source).items()
        if not entry.keeps or key.startswith(entry.keeps)
    }
    _write(state, target, entry)
    facts = Recorded(n_bytes=target.stat().st_size, sha256=sha256_of(target), made_from=source_sum)
    write_record(models_dir, {**read_record(models_dir), entry.converted_name: facts})
    say(f"{entry.converted_name}: {in_words(facts.n_bytes)} instead of {in_words(source.stat().st_size)}")
    return True


def _stored(value: Tensor, entry: WeightFile) -> Tensor:
    """A tensor as it is written: floats in the file's precision, in a storage of their own."""
    if not value.is_floating_point():
        return value.clone().contiguous()
    if entry.precision == "half":
        half = value.to(torch.float16, copy=True)
        # A number too large for half precision would become infinite, so such a tensor keeps its precision.
        if not half.numel() or bool(torch.isfinite(half).all()):
            return half.contiguous()
    return value.to(torch.float32, copy=True).contiguous()


def _write(state: Mapping[str, Tensor], target: Path, entry: WeightFile) -> None:
    n_bytes = sum(value.numel() * value.element_size() for value in state.values())
    free = shutil.disk_usage(target.parent).free
    if free < n_bytes:
        raise WeightsError(
            f"the disk is full: {entry.converted_name} needs {in_words(n_bytes)}, {in_words(free)} are free",
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
            f"{entry.converted_name} cannot be written ({reason}); it needs {in_words(n_bytes)}",
            file=entry.converted_name,
        ) from None


def _forget(models_dir: Path, source: Path) -> None:
    record = read_record(models_dir)
    if record.pop(source.relative_to(models_dir).as_posix(), None) is not None:
        write_record(models_dir, record)
