"""Correctness on a card: golden vectors, half precision against float32, launches that wait, memory that grows.

Each function also runs on a CPU, where the tests call it with small networks.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from benchmarks.networks import build, dtype_of
from musetalk.models import Models
from musetalk.render import RenderSession

# Of the largest value of each result: half precision against float32. A wrong kernel or layout is off by far more.
TOLERANCES = {"float16": 0.02, "bfloat16": 0.1}
# Mean difference of the pictures, in levels of 0 to 255.
PICTURE_LEVELS = {"float16": 1.0, "bfloat16": 4.0}
# Reserved memory may differ by this share after the jobs that bring every shape.
_FLAT_WITHIN = 0.02
_SETTLED_AFTER = 10


@dataclass(frozen=True)
class Check:
    """One comparison: its name, whether it is right, and a number or a reason for people."""

    name: str
    is_right: bool
    detail: str
    seconds: float = 0.0


def timed_check(name: str, work: Callable[[], str]) -> Check:
    """Run `work`, which returns the detail; an error of any kind is a failed check with its first line."""
    began = time.monotonic()
    try:
        detail, is_right = work(), True
    except Exception as error:  # noqa: BLE001 - one check may fail, the others must run
        first_line = (str(error).strip().splitlines() or [""])[0]
        detail, is_right = f"{type(error).__name__}: {first_line}"[:300], False
    return Check(name, is_right, detail, time.monotonic() - began)


# -- golden vectors ---------------------------------------------------------------------------------------------------


@contextmanager
def exact_float32() -> Iterator[None]:
    """Compute float32 products and convolutions in float32 inside the block, not in the shorter TF32 of newer cards."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


@contextmanager
def checks_on(device: torch.device, modules: Sequence[Any]) -> Iterator[None]:
    """Let the golden checks, which are written for a CPU, run on `device` inside the block.

    Their networks and arrays go there, and results come back before they become arrays.
    """
    from_numpy, as_numpy = torch.from_numpy, Tensor.numpy
    cached = [each for module in modules for each in vars(module).values() if hasattr(each, "cache_clear")]
    with ExitStack() as stack:
        stack.enter_context(exact_float32())
        stack.enter_context(mock.patch.object(torch, "from_numpy", lambda array: from_numpy(array).to(device)))
        stack.enter_context(mock.patch.object(Tensor, "numpy", lambda tensor: as_numpy(tensor.detach().cpu())))
        for module in modules:
            if hasattr(module, "CPU"):
                stack.enter_context(mock.patch.object(module, "CPU", device))
            if hasattr(module, "filled"):
                stack.enter_context(mock.patch.object(module, "filled", _placed(module.filled, device)))
        for each in cached:
            # Networks of other tests are elsewhere, and these must not stay for them.
            each.cache_clear()
            stack.callback(each.cache_clear)
        yield


def _placed(make: Callable[..., torch.nn.Module], device: torch.device) -> Callable[..., torch.nn.Module]:
    return lambda *given: make(*given).to(device)


def check_goldens(folder: Path, device: torch.device, has_time: Callable[[], bool] = lambda: True) -> list[Check]:
    """Run every vector of `folder` in float32 on the device; those for which no time is left are named so."""
    from tests.golden import families

    modules = [importlib.import_module(f"tests.golden.{name}") for name in {each.module for each in families.FAMILIES}]
    paths = sorted(folder.glob("*.npz"), key=lambda path: path.stat().st_size)
    checks = []
    with checks_on(device, modules):
        for path in paths:
            if not has_time():
                checks.append(Check(path.stem, is_right=True, detail="not run: no time left"))
                continue
            checks.append(timed_check(path.stem, lambda path=path: _check_golden(path)))  # type: ignore[misc]
    return checks


def _check_golden(path: Path) -> str:
    from tests.golden import families

    family = families.family_of(path.name)
    if family is None:
        raise ValueError("a file of no known family")
    family.check(path)
    return "within the tolerance of its test"


# -- half precision ---------------------------------------------------------------------------------------------------


def results(models: Models, n_frames: int = 2) -> dict[str, Tensor]:
    """The results of all networks for the same inputs, float32 on the CPU."""
    generator = models.generator
    source = torch.Generator().manual_seed(3)
    side = generator.crop_px
    crops = torch.randint(0, 256, (n_frames, side, side, 3), dtype=torch.uint8, generator=source)
    latents = torch.randn(n_frames, *generator.latent_shape, generator=source)
    windows = torch.randn(n_frames, 10 * models.audio.n_layers, models.audio.d_model, generator=source)
    waveform = np.sin(np.arange(16_000) / 20, dtype=np.float32)
    predicted = generator.predict(latents, windows)
    made = {
        "audio features": models.audio.features(waveform),
        "source latents": generator.encode(crops),
        "predicted latents": predicted,
        # From the same latents in every precision: the difference of this network alone.
        "pictures": generator.decode(latents[:, : generator.latent_shape[0] // 2]).clamp(0, 1),
    }
    return {name: tensor.detach().float().cpu() for name, tensor in made.items()}


def check_precision(size: Any, device: torch.device, dtypes: Sequence[str]) -> list[Check]:
    """Compare the networks in each precision with themselves in float32 on the same device."""
    with exact_float32():
        wanted = results(build(size, device, torch.float32))
    checks = []
    for name in dtypes:
        got = results(build(size, device, dtype_of(name)))
        for network, right in wanted.items():
            checks.append(timed_check(f"{network}, {name}", lambda a=got[network], b=right, n=name: _close(a, b, n)))  # type: ignore[misc]
        levels = 255 * float((got["pictures"] - wanted["pictures"]).abs().mean())
        is_right = levels <= PICTURE_LEVELS[name]
        checks.append(Check(f"levels of the pictures, {name}", is_right, f"{levels:.3f} of 255 on average"))
    return checks


def _close(got: Tensor, wanted: Tensor, dtype: str) -> str:
    if not torch.isfinite(got).all():
        raise ValueError("values that are not finite")
    share = float((got - wanted).abs().max() / wanted.abs().max())
    if share > TOLERANCES[dtype]:
        raise ValueError(f"off by {share:.2e} of the largest value; {TOLERANCES[dtype]:g} is allowed")
    return f"off by {share:.2e} of the largest value"


# -- launches ---------------------------------------------------------------------------------------------------------


@contextmanager
def no_waits_in_launches(set_mode: Callable[[str], None] = torch.cuda.set_sync_debug_mode) -> Iterator[list[int]]:
    """Make every wait for the device an error while a chunk is launched; gives the list of chunks' sizes.

    The mode counts for all threads: run it on a prepared source, where no other thread uses the device.
    """
    launch: Any = RenderSession._launch
    launched: list[int] = []

    def watched(session: RenderSession, records: Any, *given: Any, **named: Any) -> Any:
        set_mode("error")
        try:
            launched.append(len(records))
            return launch(session, records, *given, **named)
        finally:
            set_mode("default")

    with mock.patch.object(RenderSession, "_launch", watched):
        yield launched


# -- memory -----------------------------------------------------------------------------------------------------------


def check_flat(sizes: Sequence[int]) -> Check:
    """Compare the memory (bytes) after each of many jobs with what it was once every shape had been seen."""
    name = f"reserved memory after {len(sizes)} jobs"
    settled = max(sizes[: max(1, min(_SETTLED_AFTER, len(sizes) // 2))])
    growth = max(sizes) / settled - 1 if settled else 0.0
    detail = f"{sizes[0] >> 20} MiB after the first job, {sizes[-1] >> 20} MiB after the last"
    return Check(name, growth <= _FLAT_WITHIN, f"{detail}; grew by {growth:.1%} after the first jobs")
