"""What the core promises its two front doors, with tiny models in this process."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from musetalk.acceleration import accelerator
from musetalk.errors import DiskFullError, JobCancelledError, UnavailableError
from musetalk.generator import Generator
from musetalk.warming import warm_up
from musetalk_core import Core
from tests.support import clips
from tests.support.rendering import FACE, make_audio, make_source
from worker.jobs import parse_job, result_body


@pytest.fixture
def job(core: Core, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A job about local files, which the core may read for this test."""
    make_source(tmp_path / "source.mp4", 10)
    make_audio(tmp_path / "audio.wav", 0.6)
    allowed = replace(core.settings, allow_file_urls=True, file_url_roots=(tmp_path,), gpu_class="RTX 3080")
    monkeypatch.setattr(core, "settings", allowed)
    return {
        "musetalk_job_id": "core/1",
        "video_url": (tmp_path / "source.mp4").as_uri(),
        "audio_url": (tmp_path / "audio.wav").as_uri(),
        "aspect_ratio": "9:16",
        "params": {"face_box": list(FACE), "odd": 1},
    }


def test_what_the_speech_lacks_is_in_the_result_and_beside_the_video(
    core: Core, job: dict[str, Any], tmp_path: Path
) -> None:
    path = clips.write_sound(tmp_path / "speech.m4a", clips.Sound(clips.tone(1.0)), movflags="faststart")
    clips.cut(path, 0.6)
    result = core.run_job(parse_job({**job, "audio_url": path.as_uri(), "params": {"face_box": list(FACE)}}))
    (warning,) = result.rendered.warnings
    assert result_body(result)["warnings"] == [warning]
    assert warning.startswith("the audio is incomplete: its header promises 1.00 s, ")
    sidecar = (core.settings.output_dir / result.object_name).with_suffix(".json")
    assert json.loads(sidecar.read_text(encoding="utf-8"))["warnings"] == [warning]


def test_the_file_beside_the_video_says_how_it_was_made(core: Core, job: dict[str, Any]) -> None:
    result = core.run_job(parse_job(job, queue_job_id="q-1", buffer_job_id="b-1"))
    path = core.settings.output_dir / result.object_name
    sidecar = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    assert sidecar["musetalk_job_id"] == "core/1"
    assert (sidecar["queue_job_id"], sidecar["buffer_job_id"]) == ("q-1", "b-1")
    assert (sidecar["gpu_class"], sidecar["aspect_ratio"], sidecar["resolution"]) == ("RTX 3080", "9:16", None)
    assert sidecar["params"]["face_box"] == list(FACE)
    assert sidecar["generation_time_sec"] > 0
    assert sidecar["script_wall_time_sec"] >= sidecar["generation_time_sec"]
    assert sidecar["peak_vram_mib"] is None
    assert sidecar["peak_ram_kb"] > 0
    assert sidecar["create_time_utc"].endswith("+00:00")
    assert sidecar["warnings"] == ["params.odd is not known and was ignored"]
    assert (sidecar["b2_bucket"], sidecar["b2_file_name"]) == (None, result.object_name)
    assert sidecar["size_bytes"] == path.stat().st_size
    assert len(sidecar["sha1"]) == 40
    assert {"worker_id", "config_label", "batch_size", "stage_times", "model", "video"} <= set(sidecar)
    assert "file:" not in json.dumps(sidecar)


def test_too_little_disk_ends_a_job_before_it_fetches(
    core: Core, job: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core, "settings", replace(core.settings, min_free_disk_mb=2**39))
    with pytest.raises(DiskFullError) as caught:
        core.run_job(parse_job({**job, "video_url": "https://nowhere.invalid/a.mp4"}))
    assert caught.value.stage == "download"
    assert caught.value.retryable


def test_a_draining_core_takes_nothing(job: dict[str, Any], core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core.status, "_is_draining", True)
    with pytest.raises(UnavailableError, match="shutting down"):
        core.run_job(parse_job(job))
    assert core.readiness.state == "draining"


def test_a_cancel_comes_through_wherever_the_job_is(core: Core, job: dict[str, Any]) -> None:
    for stage in ("download", "preprocessing", "inference", "upload"):

        def cancel(now: str, _done: int, _total: int, wanted: str = stage) -> None:
            if now == wanted:
                assert core.cancel("core/1")

        with pytest.raises(JobCancelledError) as caught:
            core.run_job(parse_job(job), on_progress=cancel)
        assert caught.value.stage == stage
        assert not core.cancel("core/1")
    text = core.metrics.text().decode()
    assert 'musetalk_jobs_total{result="cancelled"} 4.0' in text


def test_warming_up_runs_the_chain_and_finds_broken_weights(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    models = core.engine.models
    seen: list[int] = []
    generate = Generator.generate

    def watched(self: Generator, latents: torch.Tensor, windows: torch.Tensor) -> Any:
        seen.append(len(latents))
        return generate(self, latents, windows)

    monkeypatch.setattr(Generator, "generate", watched)
    assert warm_up(models, 8) == 8
    # One frame proves the chain where nothing is compiled for a shape.
    assert seen == [1]


@pytest.mark.parametrize("wanted", ["graphs", "compile"])
def test_a_cpu_compiles_nothing_that_no_job_would_take(core: Core, wanted: Any, caplog: Any) -> None:
    models = core.engine.models
    generator = models.generator
    latents = torch.zeros(1, *generator.latent_shape)
    windows = torch.zeros(1, 10 * models.audio.n_layers, models.audio.d_model)
    assert accelerator(wanted, latents, windows) is None
    warm_up(models, 2, wanted)
    assert generator._whole_step == generator._step
    assert "not accelerated" in caplog.text
