"""Requests become jobs, results and errors become bodies; nothing leaks and nothing is NaN."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from musetalk.errors import MediaError, MuseTalkError, ProcessingError, RequestError, UnavailableError, WeightsError
from musetalk.options import RenderOptions
from tests.support.results import a_result
from worker.jobs import (
    ALWAYS_REPORTED,
    PARAMS,
    Job,
    JobParams,
    error_body,
    parse_job,
    parse_params,
    result_body,
    sidecar_body,
)

GOOD = {"musetalk_job_id": "job-1", "video_url": "https://host/a.mp4", "audio_url": "https://host/a.wav"}


def test_a_job_as_peers_send_it() -> None:
    job = parse_job({**GOOD, "aspect_ratio": "9:16", "resolution": "720p", "params": {}, "surplus": 1})
    assert (job.job_id, job.aspect_ratio, job.resolution) == ("job-1", "9:16", "720p")
    assert job.params == JobParams()


@pytest.mark.parametrize("body", [None, 3, "text", [], [GOOD], True, 1.5])
def test_a_body_that_is_no_object_is_refused(body: object) -> None:
    with pytest.raises(RequestError, match="JSON object"):
        parse_job(body)


@pytest.mark.parametrize("name", ["musetalk_job_id", "video_url", "audio_url"])
@pytest.mark.parametrize("value", [None, "", "   ", 7, [], {}, True, "x" * 9000, "\x00"])
def test_a_bad_required_field_is_named(name: str, value: object) -> None:
    with pytest.raises(RequestError) as caught:
        parse_job({**GOOD, name: value})
    assert caught.value.details["field"] == name
    assert not caught.value.retryable


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("bbox_shift", 1.5),
        ("bbox_shift", "1"),
        ("bbox_shift", True),
        ("bbox_shift", 10**400),
        ("extra_margin", -1),
        ("parsing_mode", "cheek"),
        ("parsing_mode", ["jaw"]),
        ("left_cheek_width", 300),
        ("face_box", [1, 2, 3]),
        ("face_box", [10, 10, 10, 20]),
        ("face_box", [0, 0, 1e9, 10]),
        ("face_box", "0,0,9,9"),
        ("box_smoothing", float("nan")),
        ("batch_size", 0),
    ],
)
def test_a_bad_parameter_is_named(name: str, value: object) -> None:
    with pytest.raises(RequestError, match=f"params.{name}"):
        parse_params({name: value})


def test_unknown_parameters_are_kept_for_a_warning() -> None:
    params = parse_params({"face_box": [1, 2, 30, 40.0], "guidance": 3})
    assert params.face_box == (1, 2, 30, 40)
    assert params.ignored == ("guidance",)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(st.sampled_from([*GOOD, "aspect_ratio", "resolution", "params", "x"]), json_values)
    | json_values
    | st.dictionaries(st.sampled_from(list(JobParams.__dataclass_fields__)), json_values).map(
        lambda params: {**GOOD, "params": params}
    )
)
def test_any_json_gives_a_job_or_a_request_error(body: Any) -> None:
    try:
        parse_job(body)
    except RequestError as error:
        status, answer = error_body(error)
        assert status == 422
        json.dumps(answer, allow_nan=False)


def test_the_success_body_has_the_legacy_fields() -> None:
    body: Any = result_body(a_result())
    metrics = body["metrics"]
    assert body["status"] == "success"
    assert metrics["GENERATION_TIME_SEC"] == 2.0
    assert metrics["SCRIPT_WALL_TIME_SEC"] == 3.0
    assert metrics["PEAK_VRAM_MIB"] is None
    assert metrics["gpu_class"] == "RTX"
    assert result_body(a_result(gpu_class=None))["metrics"]["gpu_class"] == "unknown"  # type: ignore[index]
    assert set(ALWAYS_REPORTED) <= set(metrics["stage_times"])


def test_figures_that_are_not_finite_become_null() -> None:
    body: Any = result_body(a_result(peak_gpu_memory_mib=math.nan, total_time_s=math.inf))
    assert body["metrics"]["PEAK_VRAM_MIB"] is None
    json.dumps(body, allow_nan=False)


@pytest.mark.parametrize(
    ("error", "status", "kind", "retryable"),
    [
        (MediaError("no face"), 422, "media_error", False),
        (ProcessingError("gone"), 500, "processing_error", True),
        (WeightsError("missing"), 500, "processing_error", False),
        (UnavailableError("busy"), 503, "processing_error", True),
        (ValueError("/secret/path"), 500, "unknown_error", False),
    ],
)
def test_errors_become_the_bodies_of_the_protocol(error: Exception, status: int, kind: str, retryable: bool) -> None:
    if isinstance(error, MuseTalkError):
        error.stage, error.stage_times = "inference", {"inference": 1.23456}
    got, body = error_body(error, job_id="job-1")
    assert (got, body["error_type"], body["retryable"]) == (status, kind, retryable)
    assert body["error"] == body["error_message"]
    assert ("stack_trace" in body) == (status == 500)
    assert "secret" not in json.dumps(body)


def test_a_trace_in_an_answer_holds_no_path_and_no_text() -> None:
    try:
        raise RuntimeError("/home/somebody/models/unet.pth?token=abc")
    except RuntimeError as error:
        _, body = error_body(error)
    text = json.dumps(body)
    assert "token" not in text
    assert "/" not in text
    assert "test_a_trace_in_an_answer" in text


def test_the_sidecar_starts_from_the_same_value_as_the_result() -> None:
    options = RenderOptions(face_box=(1, 2, 30, 40), mask_mode="raw", batch_size=4)
    job = Job("job-1", "https://host/a.mp4?signature=x", "https://host/a.wav", queue_job_id="q-1")
    result = a_result(job=job, options=options, peak_memory_kb=7)
    sidecar: Any = sidecar_body(result.rendered, result.stage_times)
    body: Any = result_body(result)
    assert sidecar["peak_ram_kb"] == body["metrics"]["PEAK_RAM_KB"] == 7
    assert sidecar["script_wall_time_sec"] == body["metrics"]["SCRIPT_WALL_TIME_SEC"] == 3.0
    assert (sidecar["model"], sidecar["batch_size"], sidecar["queue_job_id"]) == ("v15", 4, "q-1")
    assert sidecar["params"]["parsing_mode"] == "raw"
    assert sidecar["params"]["face_box"] == (1, 2, 30, 40)
    assert "max_gap_frames" not in sidecar["params"]
    assert "signature" not in json.dumps(sidecar)


def test_each_parameter_sets_a_model_option_of_its_type() -> None:
    """A parameter whose option was renamed would fail in every job that uses it."""
    options = {item.name for item in fields(RenderOptions)}
    assert {row.option or name for name, row in PARAMS.items()} <= options
    assert JobParams(parsing_mode="neck", batch_size=2).chosen() == {"mask_mode": "neck", "batch_size": 2}
    assert JobParams().chosen() == {}
