"""Encoder, preset and threads that the settings and the machine choose."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.encoders import encode
from benchmarks.material import camera_frames
from musetalk import media
from musetalk.media import EncoderSettings
from worker.config import load_settings
from worker.engine import _choose_encoder


def chosen(monkeypatch: pytest.MonkeyPatch, device: str, *, has_nvenc: bool, **variables: str) -> EncoderSettings:
    """The encoder of a worker on this device, where NVENC works or not."""
    codec = "h264_nvenc" if has_nvenc else "libx264"
    monkeypatch.setattr(media, "choose_encoder", lambda _wanted: (EncoderSettings(codec=codec), None))
    models: Any = SimpleNamespace(device=torch.device(device))
    return _choose_encoder(load_settings(variables, env_file=None), models)


def test_a_card_without_an_encoder_gets_the_lean_preset_and_nothing_else_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Seen as an H100 that waited for x264."""
    assert chosen(monkeypatch, "cuda", has_nvenc=False).preset == "lean"
    assert chosen(monkeypatch, "cuda", has_nvenc=False, VIDEO_PRESET="faster").preset == "faster"
    assert chosen(monkeypatch, "cpu", has_nvenc=False, VIDEO_PRESET="lean").preset == "lean"
    for device, has_nvenc in (("cpu", False), ("cuda", True)):
        assert chosen(monkeypatch, device, has_nvenc=has_nvenc).preset == "veryfast"


def test_the_usual_settings_are_those_of_every_earlier_video() -> None:
    assert EncoderSettings().options() == {"preset": "veryfast", "crf": "16", "profile": "high"}
    assert EncoderSettings(preset="lean", crf=0).options()["crf"] == "1"


def test_the_number_of_threads_is_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(monkeypatch, "cpu", has_nvenc=False, VIDEO_THREADS="5").n_threads() == 5
    assert chosen(monkeypatch, "cpu", has_nvenc=False).threads == 0


def test_the_lean_preset_keeps_the_look_ahead_and_is_smaller_than_superfast(tmp_path: Path) -> None:
    frames = list(camera_frames((320, 240), (80, 80), 25))
    sizes = {
        preset: encode(preset, "small", frames, EncoderSettings(preset=preset, threads=1), tmp_path).frame_bytes
        for preset in ("lean", "superfast", "veryfast")
    }
    assert sizes["lean"] < 0.8 * sizes["superfast"]
    assert sizes["lean"] < 1.5 * sizes["veryfast"]
