"""Why and when a job stops."""

from __future__ import annotations

import pytest

from musetalk.errors import DeadlineError, JobCancelledError, ShutdownError
from worker.job_control import STUCK_AFTER_S, JobControl
from worker.jobs import http_status


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def control(clock: Clock) -> JobControl:
    return JobControl(["m-1", None, "b-1"], limit_s=60, stage_limits_s={"inference": 20}, now=clock)


def test_a_job_is_called_by_its_ids_only(control: JobControl) -> None:
    assert control.has_id("m-1")
    assert control.has_id("b-1")
    assert not control.has_id("")
    assert not control.has_id("m-2")


def test_the_first_reason_is_reported(control: JobControl) -> None:
    assert not control.should_stop()
    control.stop("shutdown")
    control.stop("cancelled")
    assert control.should_stop()
    error = control.error()
    assert isinstance(error, ShutdownError)
    assert (http_status(error), error.retryable) == (503, True)


def test_a_cancel_is_an_end_that_nobody_retries(control: JobControl) -> None:
    control.stop("cancelled")
    error = control.error()
    assert isinstance(error, JobCancelledError)
    assert (http_status(error), error.retryable) == (409, False)


def test_a_stage_limit_counts_from_the_stage_and_ends_with_it(control: JobControl, clock: Clock) -> None:
    clock.now += 30
    control.begin("inference")
    clock.now += 19.9
    assert not control.should_stop()
    clock.now += 0.2
    assert control.should_stop()
    error = control.error()
    assert isinstance(error, DeadlineError)
    assert error.message == "inference did not finish within 20 s"
    assert error.retryable


def test_the_next_stage_has_its_own_limit(control: JobControl, clock: Clock) -> None:
    control.begin("inference")
    control.begin("upload")
    clock.now += 59
    assert not control.should_stop()
    clock.now += 1
    assert control.should_stop()
    assert control.error().message == "the job did not finish within 60 s"


def test_a_job_that_does_not_look_is_stuck_long_after_its_limit(control: JobControl, clock: Clock) -> None:
    control.begin("inference")
    clock.now += 20 + STUCK_AFTER_S
    assert not control.is_stuck
    clock.now += 1
    assert control.is_stuck
