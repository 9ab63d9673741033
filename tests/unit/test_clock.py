"""Pauses after failures."""

from __future__ import annotations

from worker.clock import Backoff


def test_pauses_grow_to_a_minute_and_start_again() -> None:
    backoff = Backoff()
    pauses = [backoff.next_s() for _ in range(12)]
    for pause, top in zip(pauses, [1, 2, 4, 8, 16, 32, 60, 60, 60, 60, 60, 60], strict=True):
        assert 0.75 * top <= pause <= top
    assert backoff.next_s(retry_after_s=3600) == 60
    backoff.reset()
    assert backoff.next_s() <= 1
    assert backoff.next_s(retry_after_s=9) == 9
