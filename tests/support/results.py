"""Results of finished jobs, as the core would return them."""

from __future__ import annotations

from dataclasses import fields
from types import SimpleNamespace
from typing import Any

from musetalk.options import RenderOptions
from worker.jobs import Job, JobResult, RenderedJob


def a_preview() -> Any:
    """What is known of a preview, without its picture: the real class would import torch."""
    return SimpleNamespace(
        index=37,
        time_s=1.48,
        warnings=("one thing",),
        model="v15",
        duration_s=9.56,
        face_box=(1, 2, 3, 4),
        source_size=(64, 48),
    )


def a_result(**changes: Any) -> JobResult:
    """A plausible result; `changes` are fields of `JobResult` or of its `RenderedJob`."""
    of_rendering = {item.name for item in fields(RenderedJob)}
    rendered: dict[str, Any] = {
        "job": Job("job-1", "https://host/a.mp4", "https://host/a.wav"),
        "options": RenderOptions(),
        "model": "v15",
        "video": {"frames": 25},
        "warnings": (),
        "created": "2026-01-02T03:04:05+00:00",
        "worker_id": "worker-1",
        "config_label": "default",
        "gpu_class": "RTX",
        "peak_gpu_memory_mib": None,
        "peak_memory_kb": 1000,
        **{name: value for name, value in changes.items() if name in of_rendering},
    }
    stored: dict[str, Any] = {
        "output_url": "http://localhost:8000/outputs/job-1.mp4",
        "object_name": "job-1.mp4",
        "bucket": None,
        "stage_times": {"download": 1.0, "validation": 0.5, "preprocessing": 1.0, "inference": 2.0, "upload": 0.25},
        "total_time_s": 4.75,
        **{name: value for name, value in changes.items() if name not in of_rendering},
    }
    return JobResult(RenderedJob(**rendered), **stored)
