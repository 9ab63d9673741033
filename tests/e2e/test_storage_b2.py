"""The real b2sdk against a B2 on loopback that is slow, full or gone, expires tokens, or sends wrong answers."""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from musetalk.errors import CancelledError, DeadlineError, SettingsError, StorageError
from storage import open_store
from tests.support.fake_b2 import CAPABILITIES, FakeB2, Fault
from tests.support.server import Server, wait_until
from worker import backblaze
from worker.backblaze import B2Settings, B2Store
from worker.config import load_settings
from worker.stored import StoredObject

BODY = random.Random(3).randbytes(250_000)
SHA1 = hashlib.sha1(BODY).hexdigest()
SIDECAR = {"musetalk_job_id": "job-1", "params": {"bbox_shift": 3}, "queue_job_id": None}
# B2 may send Retry-After with any 503. With 0 b2sdk does not pause, which keeps these tests short.
BUSY = Fault(status=503, retry_after="0")


@pytest.fixture
def video(tmp_path: Path) -> Path:
    path = tmp_path / "output.mp4"
    path.write_bytes(BODY)
    return path


@pytest.fixture
def b2() -> Iterator[FakeB2]:
    with FakeB2() as running:
        yield running


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def settings(b2: FakeB2, **changes: Any) -> B2Settings:
    key_id, app_key = b2.key
    values: dict[str, Any] = {
        "key_id": key_id,
        "app_key": app_key,
        "bucket": b2.bucket,
        "realm": b2.realm,
        "backoff_s": 0.0,
        "idle_timeout_s": 5.0,
        "connect_timeout_s": 5.0,
    }
    return B2Settings(**{**values, **changes})


def put(store: B2Store, video: Path, job_id: str | None = "job-1", deadline_s: float = 20.0, **options: Any) -> Any:
    try:
        return store.upload(video, job_id, SIDECAR, deadline_s=deadline_s, **options)
    finally:
        store.close()


def fail(
    b2: FakeB2, video: Path, error: type[Exception] = StorageError, *, deadline_s: float = 20.0, **changes: Any
) -> Any:
    with pytest.raises(error) as caught:
        put(B2Store(settings(b2, **changes)), video, deadline_s=deadline_s)
    for secret in (*b2.key, "SECRETTOKEN", "127.0.0.1", str(video.parent)):
        assert secret not in str(caught.value) + repr(getattr(caught.value, "details", ""))
    return caught.value


def check(b2: FakeB2, stored: StoredObject, name: str = "avatar/outputs/job-1.mp4") -> None:
    """Check that the returned object, the bucket and the link agree."""
    assert (stored.name, stored.n_bytes, stored.sha1, stored.bucket) == (name, len(BODY), SHA1, b2.bucket)
    assert b2.newest(name).body == BODY
    assert b2.newest(name).content_type == "video/mp4"
    answer = requests.get(stored.url, timeout=5)
    assert (answer.status_code, answer.content, answer.headers["Content-Type"]) == (200, BODY, "video/mp4")


def test_the_video_and_its_sidecar_are_stored_and_the_link_works(b2: FakeB2, video: Path) -> None:
    stored = put(B2Store(settings(b2)), video)
    check(b2, stored)
    assert stored.url == f"{b2.realm}/file/clips/avatar/outputs/job-1.mp4"
    assert b2.newest(stored.name).sha1 == SHA1
    sidecar = b2.newest("avatar/outputs/job-1.json")
    assert sidecar.content_type == "application/json"
    assert json.loads(sidecar.body) == {
        **SIDECAR,
        "b2_bucket": "clips",
        "b2_file_name": stored.name,
        "size_bytes": len(BODY),
        "sha1": SHA1,
    }


def test_the_store_is_chosen_by_the_settings(b2: FakeB2, video: Path) -> None:
    key_id, app_key = b2.key
    environment = {"B2_KEY_ID": key_id, "B2_APP_KEY": app_key, "B2_BUCKET_NAME": b2.bucket, "B2_REALM": b2.realm}
    store = open_store(load_settings(environment, env_file=None))
    assert isinstance(store, B2Store)
    check(b2, put(store, video))


def test_one_authorization_serves_many_jobs_and_a_repeat_replaces(b2: FakeB2, video: Path) -> None:
    store = B2Store(settings(b2, prefix=""))
    video.write_bytes(b"first" * 1000)
    put(store, video, "job-1")
    video.write_bytes(BODY)
    check(b2, put(store, video, "job-1"), "job-1.mp4")
    check(b2, put(store, video, "job/2 ü"), "job~2F2~20~C3~BC.mp4")
    assert len(b2.versions["job-1.mp4"]) == 2
    assert b2.count("b2_authorize_account") == 1
    assert b2.count("b2_list_buckets") == 1
    assert put(store, video, None).name.startswith("manual-")


@pytest.mark.parametrize(
    "call", ["b2_authorize_account", "b2_list_buckets", "b2_get_upload_url", "upload", "b2_get_download_authorization"]
)
@pytest.mark.parametrize(
    "fault",
    [BUSY, Fault(status=500, retry_after="0", code="internal_error"), Fault(status=429, retry_after="0", code="x")],
    ids=["503", "500", "429"],
)
def test_a_burst_of_refused_calls_is_retried(video: Path, call: str, fault: Fault) -> None:
    with FakeB2(bucket_type="allPrivate") as b2:
        b2.inject(call, fault, times=5)
        check(b2, put(B2Store(settings(b2)), video))
        assert b2.count(call) >= 6


def test_a_burst_of_cut_connections_is_retried_with_new_upload_urls(b2: FakeB2, video: Path) -> None:
    b2.inject("upload", Fault(cut=True), times=7)
    check(b2, put(B2Store(settings(b2)), video))
    assert b2.count("b2_get_upload_url") >= 8
    assert b2.upload_tokens_used[-2] not in b2.upload_tokens_used[:-2]


def test_an_upload_whose_answer_was_lost_is_retried(b2: FakeB2, video: Path) -> None:
    b2.inject("upload", Fault(lost=True))
    stored = put(B2Store(settings(b2)), video)
    check(b2, stored)
    assert len(b2.versions[stored.name]) == 2


def test_an_expired_upload_token_is_renewed(b2: FakeB2, video: Path) -> None:
    store = B2Store(settings(b2))
    put(store, video)
    b2.expire_upload_tokens()
    check(b2, put(store, video))


def test_an_expired_authorization_is_renewed(b2: FakeB2, video: Path) -> None:
    store = B2Store(settings(b2))
    put(store, video)
    b2.expire_account_tokens()
    b2.expire_upload_tokens()
    check(b2, put(store, video))
    assert b2.count("b2_authorize_account") >= 2


def test_another_sha1_in_the_answer_is_retried(b2: FakeB2, video: Path) -> None:
    b2.inject("upload", Fault(lie=True))
    stored = put(B2Store(settings(b2)), video)
    check(b2, stored)
    assert len(set(b2.upload_tokens_used[:2])) == 2


def test_another_sha1_in_every_answer_fails(b2: FakeB2, video: Path) -> None:
    b2.inject("upload", Fault(lie=True), times=50)
    error = fail(b2, video, tries=3)
    assert "SHA-1" in str(error)
    assert b2.count("upload") == 3
    assert error.details["tries"] == 3


@pytest.mark.parametrize("call", ["b2_authorize_account", "b2_get_upload_url", "upload"])
def test_an_answer_that_is_no_json_is_retried(b2: FakeB2, video: Path, call: str) -> None:
    b2.inject(call, Fault(garbage=True), times=2)
    check(b2, put(B2Store(settings(b2)), video))


def test_a_burst_longer_than_the_retries_of_b2sdk_is_survived(b2: FakeB2, video: Path) -> None:
    b2.inject("upload", BUSY, times=24)
    check(b2, put(B2Store(settings(b2)), video))


def test_a_burst_longer_than_all_retries_fails_with_the_reason(b2: FakeB2, video: Path) -> None:
    b2.inject("upload", BUSY, times=1000)
    error = fail(b2, video, tries=3)
    assert error.retryable is True
    assert "503" in str(error)
    assert b2.count("upload") == 15


def test_after_a_failure_the_store_works_again(b2: FakeB2, video: Path) -> None:
    store = B2Store(settings(b2, tries=1))
    b2.inject("upload", BUSY, times=5)
    with pytest.raises(StorageError):
        put(store, video)
    check(b2, put(store, video))


@pytest.mark.parametrize(
    ("code", "said"), [("storage_cap_exceeded", "storage cap"), ("transaction_cap_exceeded", "cap on calls")]
)
def test_an_exceeded_cap_is_not_retried(b2: FakeB2, video: Path, code: str, said: str) -> None:
    b2.inject("upload", Fault(status=403, code=code), times=100)
    error = fail(b2, video)
    assert said in str(error)
    assert error.retryable is True
    assert b2.count("upload") == 1


def test_a_wrong_key_is_not_retried(b2: FakeB2, video: Path) -> None:
    error = fail(b2, video, app_key="K000wrongappkey000")
    assert "invalid key" in str(error)
    assert "wrongappkey" not in str(error)
    assert b2.count("b2_authorize_account") == 1


def test_a_key_that_was_replaced_at_b2_works_without_a_restart(b2: FakeB2, video: Path) -> None:
    store = B2Store(settings(b2))
    right = b2.key
    b2.key = ("other", "other")
    with pytest.raises(StorageError):
        put(store, video)
    b2.key = right
    check(b2, put(store, video))


def test_a_missing_bucket_is_not_retried(b2: FakeB2, video: Path) -> None:
    error = fail(b2, video, bucket="elsewhere")
    assert "the bucket does not exist" in str(error)
    assert b2.count("b2_list_buckets") == 1


def test_a_key_for_another_bucket_says_so(video: Path) -> None:
    with FakeB2(restricted_to="other") as b2:
        assert "another bucket" in str(fail(b2, video))


def test_a_key_without_the_right_to_write_is_not_retried_for_ever(video: Path) -> None:
    with FakeB2(capabilities=("listBuckets",)) as b2:
        error = fail(b2, video)
        assert "not entitled" in str(error)
        assert b2.count("b2_get_upload_url") <= 5


def test_a_name_outside_the_keys_prefix_is_not_retried_for_ever(video: Path) -> None:
    with FakeB2(name_prefix="elsewhere/") as b2:
        fail(b2, video)
        assert b2.count("upload") <= 5


@pytest.mark.parametrize(
    ("bucket", "mine", "text"),
    [
        ({}, {"app_key": "K000wrongappkey000"}, "invalid key"),
        ({}, {"bucket": "elsewhere"}, "the bucket does not exist; check B2_KEY_ID"),
        ({"restricted_to": "other"}, {}, "another bucket"),
        ({"capabilities": ("listBuckets", "readFiles")}, {}, "may not write"),
        ({"name_prefix": "elsewhere/"}, {}, "B2_PREFIX"),
    ],
    ids=["key", "bucket", "restricted", "rights", "prefix"],
)
def test_wrong_settings_are_found_before_the_first_job(bucket: dict[str, Any], mine: dict[str, Any], text: str) -> None:
    with FakeB2(**bucket) as b2:
        store = B2Store(settings(b2, **mine))
        with pytest.raises(SettingsError, match=text) as caught:
            store.check()
        store.close()
        for secret in (*b2.key, "wrongappkey", "SECRETTOKEN", "127.0.0.1"):
            assert secret not in str(caught.value)
        assert b2.count("upload") == 0


@pytest.mark.parametrize("changes", [{}, {"name_prefix": "avatar/"}, {"bucket_type": "allPrivate"}])
def test_the_check_and_the_first_upload_share_one_authorization(changes: dict[str, Any], video: Path) -> None:
    with FakeB2(**changes) as b2:
        store = B2Store(settings(b2))
        store.check()
        put(store, video)
        assert b2.count("b2_authorize_account") == 1


def test_an_unreachable_b2_at_startup_is_only_logged(
    video: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(backblaze, "_CHECK_S", 0.5)
    with FakeB2() as b2:
        away = settings(b2)
    B2Store(away).check()
    (logged,) = (record for record in caplog.records if record.name == "musetalk.backblaze")
    assert logged.getMessage() == "B2 check failed; starting anyway"
    assert vars(logged)["reason"]
    assert "127.0.0.1" not in caplog.text + str(vars(logged))


def test_a_worker_with_a_wrong_key_never_becomes_ready_and_says_why(
    b2: FakeB2, tmp_path: Path, tiny_models: Path
) -> None:
    server = Server(
        tmp_path,
        tiny_models,
        B2_KEY_ID=b2.key[0],
        B2_APP_KEY="K000wrongappkey000",
        B2_BUCKET_NAME=b2.bucket,
        B2_REALM=b2.realm,
    )
    try:
        wait_until(lambda: server.entries("startup failed"))
        status, body = server.health()
        assert (status, body["status"]) == (503, "failed")
        assert "B2 refuses uploads" in body["reason"]
        assert "wrongappkey" not in server.log_text()
    finally:
        server.stop()


def test_a_dead_b2_fails_with_the_reason(video: Path) -> None:
    with FakeB2() as b2:
        dead = settings(b2, tries=1)
    started = time.monotonic()
    with pytest.raises(DeadlineError) as caught:
        put(B2Store(dead), video, deadline_s=1.0)
    assert time.monotonic() - started < 4
    assert "127.0.0.1" not in str(caught.value)


@pytest.mark.parametrize("restricted", [None, "clips"])
def test_links_to_a_private_bucket_contain_a_token_for_this_object_only(video: Path, restricted: str | None) -> None:
    with FakeB2(bucket_type="allPrivate", restricted_to=restricted) as b2:
        stored = put(B2Store(settings(b2, link_lifetime_s=3600)), video)
        check(b2, stored)
        assert b2.lifetimes == [3600]
        base, _, query = stored.url.partition("?")
        assert query.startswith("Authorization=")
        assert requests.get(base, timeout=5).status_code == 401
        other = stored.url.replace("job-1.mp4", "job-1.json")
        assert requests.get(other, timeout=5).status_code == 401
        assert query not in repr(stored)


@pytest.mark.parametrize("bucket_type", ["allPublic", "allPrivate"])
def test_without_the_right_to_list_buckets_privacy_is_found_by_reading(video: Path, bucket_type: str) -> None:
    capabilities = [name for name in CAPABILITIES if name != "listBuckets"]
    with FakeB2(bucket_type=bucket_type, restricted_to="clips", capabilities=capabilities) as b2:
        store = B2Store(settings(b2))
        stored = put(store, video)
        check(b2, stored)
        assert ("Authorization=" in stored.url) is (bucket_type == "allPrivate")
        n_asked = b2.count("download")
        put(store, video)
        assert b2.count("download") == n_asked


def test_is_private_decides_about_links_without_a_call_to_b2(video: Path) -> None:
    with FakeB2(bucket_type="allPublic", restricted_to="clips") as b2:
        assert "Authorization=" in put(B2Store(settings(b2, is_private=True)), video).url
        assert "Authorization=" not in put(B2Store(settings(b2, is_private=False)), video).url
        assert b2.count("b2_list_buckets") == 0


def test_a_key_that_may_not_share_files_fails_the_upload_to_a_private_bucket(video: Path) -> None:
    capabilities = [name for name in CAPABILITIES if name != "shareFiles"]
    with FakeB2(bucket_type="allPrivate", capabilities=capabilities) as b2:
        fail(b2, video)
        assert b2.count("upload") == 1


@pytest.mark.parametrize(
    "fault", [Fault(deaf=True), Fault(silent=True), Fault(drip=True)], ids=["deaf", "silent", "drip"]
)
@pytest.mark.parametrize("call", ["b2_authorize_account", "upload"])
def test_a_stalled_upload_and_its_thread_end_at_the_deadline(b2: FakeB2, video: Path, call: str, fault: Fault) -> None:
    video.write_bytes(BODY * 40)  # more than fits into the buffers of the sockets
    b2.inject(call, fault, times=50)
    started = time.monotonic()
    error = fail(b2, video, DeadlineError, deadline_s=0.7)
    assert time.monotonic() - started < 3
    assert error.retryable is True
    assert "within 0.7 s" in str(error)
    assert not [thread.name for thread in threading.enumerate() if thread.name == "b2-upload"]


@pytest.mark.parametrize("fault", [Fault(deaf=True), Fault(silent=True)], ids=["deaf", "silent"])
def test_a_stalled_upload_is_retried(b2: FakeB2, video: Path, fault: Fault) -> None:
    b2.inject("upload", fault)
    check(b2, put(B2Store(settings(b2, idle_timeout_s=0.4, connect_timeout_s=0.4)), video))


def test_cancelling_ends_the_upload_at_once(b2: FakeB2, video: Path) -> None:
    b2.inject("upload", Fault(silent=True), times=50)
    started = time.monotonic()
    with pytest.raises(CancelledError):
        put(B2Store(settings(b2)), video, should_stop=lambda: "upload" in b2.calls)
    assert time.monotonic() - started < 3


def test_cancelling_ends_the_pause_between_attempts(b2: FakeB2, video: Path) -> None:
    b2.inject("upload", BUSY, times=50)
    started = time.monotonic()
    with pytest.raises(CancelledError):
        put(B2Store(settings(b2, backoff_s=20.0)), video, should_stop=lambda: b2.count("upload") >= 5)
    assert time.monotonic() - started < 3


def test_a_long_retry_after_cannot_outlast_the_deadline(b2: FakeB2, video: Path) -> None:
    b2.inject("b2_get_upload_url", Fault(status=503, retry_after="86400"), times=1000)
    started = time.monotonic()
    fail(b2, video, DeadlineError, deadline_s=0.8)
    assert time.monotonic() - started < 3


def test_the_deadline_names_the_last_fault(b2: FakeB2, video: Path) -> None:
    b2.inject("upload", BUSY, times=50)
    assert "503" in str(fail(b2, video, DeadlineError, deadline_s=0.5, backoff_s=20.0))


def test_a_sidecar_that_cannot_be_stored_does_not_fail_the_job(
    b2: FakeB2, video: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse_after_the_video(call: str) -> None:
        if b2.count("upload") == 1 and call == "upload":
            b2.inject("upload", Fault(status=403, code="storage_cap_exceeded"), times=100)

    b2.on_call = refuse_after_the_video
    check(b2, put(B2Store(settings(b2)), video))
    assert "avatar/outputs/job-1.json" not in b2.versions
    assert "sidecar not stored" in caplog.text


# ---- large files


def large(**changes: Any) -> FakeB2:
    return FakeB2(part_bytes=60_000, **changes)


def test_a_large_file_is_uploaded_in_parts(video: Path) -> None:
    with large() as b2:
        stored = put(B2Store(settings(b2)), video)
        check(b2, stored)
        assert len(b2.part_numbers) >= 4
        assert b2.newest(stored.name).info["large_file_sha1"] == SHA1
        assert b2.unfinished == {}


@pytest.mark.parametrize("fault", [BUSY, Fault(cut=True), Fault(lie=True)], ids=["503", "cut", "lie"])
def test_parts_survive_bursts(video: Path, fault: Fault) -> None:
    with large() as b2:
        b2.inject("upload_part", fault, times=12)
        check(b2, put(B2Store(settings(b2)), video))


def test_finished_parts_of_a_large_file_are_not_sent_again(video: Path) -> None:
    with large() as b2:
        b2.inject("b2_finish_large_file", Fault(status=400, code="bad_request", message="try later"))
        check(b2, put(B2Store(settings(b2)), video))
        assert sorted(b2.part_numbers) == sorted(set(b2.part_numbers))
        assert b2.count("b2_start_large_file") == 1


def test_a_new_process_resumes_a_large_file(video: Path) -> None:
    with large() as b2:
        b2.inject("b2_finish_large_file", Fault(silent=True), times=9)
        fail(b2, video, DeadlineError, deadline_s=1.0)
        n_parts = len(b2.part_numbers)
        assert n_parts >= 4
        b2._faults.clear()
        check(b2, put(B2Store(settings(b2)), video))
        assert len(b2.part_numbers) == n_parts
        assert b2.count("b2_start_large_file") == 1


def test_a_stalled_part_stops_at_the_deadline(video: Path) -> None:
    video.write_bytes(BODY * 4)
    with large() as b2:
        b2.inject("upload_part", Fault(silent=True), times=50)
        started = time.monotonic()
        fail(b2, video, DeadlineError, deadline_s=0.7)
        assert time.monotonic() - started < 3


def test_no_secret_reaches_a_log(video: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with FakeB2(bucket_type="allPrivate") as b2:
        b2.inject(
            "upload",
            Fault(status=400, code="auth_token_limit", message="more than one upload using auth token 4_SECRETTOKEN"),
        )
        b2.inject("upload", Fault(cut=True), Fault(lie=True), Fault(garbage=True), BUSY)
        store = B2Store(settings(b2))
        stored = put(store, video)
        check(b2, stored)
        token = stored.url.partition("Authorization=")[2]
        assert b2.count("upload") >= 5
    records = [record for record in caplog.records if record.name != "urllib3.connectionpool"]
    ours = "\n".join(f"{record.getMessage()} {vars(record)}" for record in records)
    assert "upload attempt failed" in ours
    for secret in (*b2.key, "SECRETTOKEN", token, SHA1):
        assert secret not in ours
        assert secret not in repr(store.settings)
    gc.collect()  # an unclosed socket would warn here
