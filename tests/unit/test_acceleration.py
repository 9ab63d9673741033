"""Faster steps: what torch's compiler needs, that it works once, and what a worker that lacks it says at its start."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from musetalk import acceleration, devices
from musetalk.acceleration import compiler_problem
from musetalk.errors import MuseTalkError, ProcessingError
from tests.support.small_generators import inputs, small_generator
from worker.config import ROOT, load_settings
from worker.engine import EngineLoader
from worker.telemetry import Metrics


def find_none(_name: str) -> None:
    return None


def test_a_missing_compiler_and_missing_headers_are_both_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/gcc" if name == "gcc" else None)
    assert compiler_problem(tmp_path) is None
    assert "Python.h" in str(compiler_problem(tmp_path / "nowhere"))
    monkeypatch.setattr(shutil, "which", find_none)
    assert "C compiler" in str(compiler_problem(tmp_path))
    assert "Python.h" not in str(compiler_problem(tmp_path))


def test_a_worker_that_cannot_compile_refuses_before_it_loads_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    card = devices.GpuProperties("Card", (9, 0), (), 24_000, 24_564)
    monkeypatch.setattr(devices, "choose_device", lambda _wanted: torch.device("cuda"))
    monkeypatch.setattr(devices, "gpu_properties", lambda _device: card)
    monkeypatch.setattr(devices, "try_out", lambda _device: None)
    monkeypatch.setattr(devices, "configure_threads", lambda *_: 1)
    monkeypatch.setattr(shutil, "which", find_none)
    loader = EngineLoader(load_settings({"MUSETALK_ACCELERATION": "compile"}, env_file=None), Metrics())
    with pytest.raises(ProcessingError, match=r"MUSETALK_ACCELERATION=compile: .*C compiler") as caught:
        loader._check_device()
    assert not caught.value.retryable


def test_the_image_has_what_the_compiler_needs() -> None:
    text = (ROOT / "Dockerfile.worker").read_text(encoding="utf-8")
    for package in ("gcc", "libc6-dev", "python3.10-dev"):
        assert package in text.split()


def test_a_failing_compiler_is_reported_and_not_raised_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_step: Any, **_options: Any) -> Any:
        def run(*_: Any) -> None:
            raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.\nmore")

        return run

    monkeypatch.setattr(torch, "compile", broken)
    made = small_generator()
    latents, windows = inputs(2)
    with pytest.raises(MuseTalkError, match="Failed to find C compiler"):
        made.accelerate(lambda step: acceleration._compiled(step, latents, windows))


def test_the_networks_are_compiled_once_for_the_warm_up_and_all_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._dynamo as dynamo
    from torch._dynamo.testing import CompileCounter

    dynamo.reset()
    counter, usual = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda step, **_: usual(step, dynamic=False, backend=counter))
    made = small_generator()
    made.fixed_batch = 2
    latents, windows = inputs(2)
    made.accelerate(lambda step: acceleration._compiled(step, latents, windows))
    wanted = small_generator().generate(latents, windows)
    # As in a job: tensors of inference mode, and others; in a layout of their own; smaller batches.
    with torch.inference_mode():
        copies = latents.clone(), windows.clone()
    runs: list[tuple[Tensor, Tensor]] = [(latents, windows), copies, (latents[:1], windows[:1])]
    for one, other in runs:
        assert abs(made.generate(one, other).astype(int) - wanted[: len(one)]).max() <= 1
    assert counter.frame_count == 1
    dynamo.reset()


@pytest.mark.parametrize(
    ("variables", "memory_mib", "speed"),
    [
        ({}, 24_564, (16, "graphs")),
        ({}, 81_559, (32, "graphs")),
        ({}, 8_188, (8, "graphs")),
        ({"BATCH_SIZE": "8", "MUSETALK_ACCELERATION": "none"}, 81_559, (8, "none")),
    ],
)
def test_batch_and_graphs_follow_the_card_unless_they_are_set(
    variables: dict[str, str], memory_mib: int, speed: tuple[int, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from worker.engine import _speed

    properties: Callable[[Any], Any] = lambda _device: devices.GpuProperties("Card", (9, 0), (), 0, memory_mib)  # noqa: E731
    monkeypatch.setattr(devices, "gpu_properties", properties)
    settings = load_settings(variables, env_file=None)
    assert _speed(settings, torch.device("cuda")) == speed
    assert _speed(settings, torch.device("cpu")) == (8, "none")
