"""Names of objects, the local folder as a store, and settings whose repr contains no secret."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from b2sdk.v3.exception import B2SimpleError
from hypothesis import given, settings
from hypothesis import strategies as st

from musetalk.errors import CancelledError, DeadlineError, DiskFullError, ProcessingError, SettingsError, StorageError
from storage import LocalStore, LocalStoreSettings, open_store
from worker.backblaze import B2Settings, B2Store
from worker.config import load_settings
from worker.stored import StoredObject, object_name

BASE = "http://localhost:8000"
BODY = b"mp4" * 700_000


@pytest.fixture
def video(tmp_path: Path) -> Path:
    path = tmp_path / "output.mp4"
    path.write_bytes(BODY)
    return path


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(LocalStoreSettings(tmp_path / "outputs", BASE + "/"))


@pytest.mark.parametrize(
    ("prefix", "job_id", "name"),
    [
        ("avatar/outputs", "4f7d1c2e-job_1.b", "avatar/outputs/4f7d1c2e-job_1.b.mp4"),
        ("", "job", "job.mp4"),
        ("/", "job", "job.mp4"),
        ("/a//b/", "job", "a/b/job.mp4"),
        ("a", "../../etc/passwd", "a/~2E.~2F..~2Fetc~2Fpasswd.mp4"),
        ("a", "..", "a/~2E..mp4"),
        ("a", "x/y", "a/x~2Fy.mp4"),
        ("a", "x~2Fy", "a/x~7E2Fy.mp4"),
        ("a", "a b?c#d%e", "a/a~20b~3Fc~23d~25e.mp4"),
        ("a", "ü\n\x7f\\", "a/~C3~BC~0A~7F~5C.mp4"),
        ("a", "\ud800", "a/~ED~A0~80.mp4"),
        ("..", "job", "~2E./job.mp4"),
    ],
)
def test_object_names(prefix: str, job_id: str, name: str) -> None:
    assert object_name(prefix, job_id) == name


@pytest.mark.parametrize("job_id", [None, ""])
def test_without_an_id_each_name_is_new(job_id: str | None) -> None:
    names = {object_name("a/b", job_id) for _ in range(3)}
    assert len(names) == 3
    assert all(re.fullmatch(r"a/b/manual-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\.mp4", name) for name in names)


ids = st.one_of(
    st.text(min_size=1, max_size=80),
    st.text(alphabet="ab/.~%2F é", min_size=1, max_size=400),
    st.text(alphabet="aé", min_size=195, max_size=205),
)


@settings(max_examples=200, deadline=None)
@given(ids, ids)
def test_different_ids_have_different_names_that_b2_accepts(one: str, two: str) -> None:
    first, second = object_name("p/q", one), object_name("p/q", two)
    assert (first == second) is (one == two)
    assert re.fullmatch(r"p/q/[A-Za-z0-9_~-][A-Za-z0-9._~-]*\.mp4", first)
    assert len(first.rpartition("/")[2]) <= 250
    assert first.removesuffix(".mp4") + ".json" != second


def test_an_id_that_looks_like_a_cut_one_has_another_name() -> None:
    cut = object_name("", "x" * 300)
    assert object_name("", cut.removesuffix(".mp4")) != cut


def test_settings_with_a_prefix_that_leaves_no_room_are_refused() -> None:
    for prefix in ("a/" * 450, "a" * 251):
        with pytest.raises(SettingsError):
            B2Settings(key_id="k", app_key="s", bucket="b", prefix=prefix)


@pytest.mark.parametrize("lifetime", [0, -1, 604_801])
def test_settings_with_a_link_lifetime_that_b2_rejects_are_refused(lifetime: int) -> None:
    with pytest.raises(SettingsError, match=f"valid for {lifetime} s"):
        B2Settings(key_id="k", app_key="s", bucket="b", link_lifetime_s=lifetime)


def test_repr_contains_no_secret() -> None:
    shown = repr(B2Settings(key_id="KEYID", app_key="APPKEY", bucket="clips"))
    assert "KEYID" not in shown
    assert "APPKEY" not in shown
    assert "clips" in shown
    assert "token" not in repr(StoredObject("n", "https://h/f?Authorization=token", 1, "s", "b"))


def test_without_a_bucket_files_are_stored_in_the_folder(tmp_path: Path) -> None:
    settings = load_settings({"OUTPUT_DIR": str(tmp_path)}, env_file=None)
    store = open_store(settings)
    assert isinstance(store, LocalStore)
    assert store.folder == tmp_path


def test_the_file_and_its_sidecar_appear_in_the_folder(store: LocalStore, video: Path) -> None:
    stored = store.upload(video, "job 1", {"params": {"a": 1}, "when": Path("x")}, deadline_s=60)
    sha1 = hashlib.sha1(BODY).hexdigest()
    assert stored == StoredObject("job~201.mp4", f"{BASE}/outputs/job~201.mp4", len(BODY), sha1, None)
    assert (store.folder / unquote(stored.url.rsplit("/", 1)[1])).read_bytes() == BODY
    assert json.loads((store.folder / "job~201.json").read_text()) == {
        "params": {"a": 1},
        "when": "x",
        "b2_bucket": None,
        "b2_file_name": "job~201.mp4",
        "size_bytes": len(BODY),
        "sha1": sha1,
    }
    assert sorted(path.name for path in store.folder.iterdir()) == ["job~201.json", "job~201.mp4"]
    assert video.read_bytes() == BODY


def test_a_repeated_id_replaces_the_file(store: LocalStore, video: Path) -> None:
    store.upload(video, "job", {}, deadline_s=60)
    video.write_bytes(b"newer")
    stored = store.upload(video, "job", {}, deadline_s=60)
    assert (store.folder / stored.name).read_bytes() == b"newer"


def test_a_hostile_id_stays_in_the_folder(store: LocalStore, video: Path, tmp_path: Path) -> None:
    before = set(tmp_path.iterdir())
    stored = store.upload(video, "../../x/../y", {}, deadline_s=60)
    assert set(tmp_path.iterdir()) - before == {store.folder}
    assert (store.folder / stored.name).parent == store.folder


@pytest.mark.parametrize(
    ("options", "error"),
    [({"deadline_s": 0.0}, DeadlineError), ({"deadline_s": 60, "should_stop": lambda: True}, CancelledError)],
)
def test_an_interrupted_upload_leaves_the_older_file(
    store: LocalStore, video: Path, options: dict[str, Any], error: type[Exception]
) -> None:
    store.upload(video, "job", {}, deadline_s=60)
    video.write_bytes(b"newer")
    with pytest.raises(error):
        store.upload(video, "job", {}, **options)
    assert (store.folder / "job.mp4").read_bytes() == BODY
    assert len(list(store.folder.iterdir())) == 2


def test_cancelling_during_the_copy_leaves_no_file(store: LocalStore, video: Path) -> None:
    answers = iter([False, False, True])
    with pytest.raises(CancelledError):
        store.upload(video, "job", {}, deadline_s=60, should_stop=lambda: next(answers))
    assert list(store.folder.iterdir()) == []


def test_an_empty_or_missing_output_is_refused(store: LocalStore, video: Path) -> None:
    video.write_bytes(b"")
    with pytest.raises(ProcessingError, match="empty") as empty:
        store.upload(video, "job", {}, deadline_s=60)
    assert empty.value.retryable is False
    video.unlink()
    with pytest.raises(StorageError) as missing:
        store.upload(video, "job", {}, deadline_s=60)
    assert str(video.parent) not in str(missing.value)
    assert list(store.folder.iterdir()) == []


@pytest.mark.parametrize(("number", "error"), [(errno.ENOSPC, DiskFullError), (errno.EACCES, StorageError)])
def test_disk_errors_contain_no_paths(
    store: LocalStore, video: Path, monkeypatch: pytest.MonkeyPatch, number: int, error: type[Exception]
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(number, "no", str(store.folder))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(error) as caught:
        store.upload(video, "job", {}, deadline_s=60)
    assert str(store.folder) not in str(caught.value)
    assert list(store.folder.iterdir()) == []


def test_a_sidecar_that_cannot_be_written_does_not_fail_the_upload(
    store: LocalStore, video: Path, caplog: pytest.LogCaptureFixture
) -> None:
    endless: dict[str, object] = {}
    endless["itself"] = endless
    stored = store.upload(video, "job", endless, deadline_s=60)
    assert [path.name for path in store.folder.iterdir()] == [stored.name]
    assert "sidecar not stored" in caplog.text


@pytest.mark.parametrize(
    "quoted",
    [
        "bad signature: hidden words of it",
        'Invalid authorization token "hidden words of it"',
        "authorizationToken='hidden'; retry",
        "account token = hidden-words/of+it==",
        "the value 4_hiddenwords was refused",
        "not valid: 0012abcHIDDEN99",
        "see https://host.example/file?Authorization=hidden",
        "key id-of-the-key and its secret app-secret-of-the-key",
    ],
)
def test_an_error_of_b2_that_quotes_a_token_is_logged_without_it(quoted: str) -> None:
    """B2 repeats what it was sent in words of its own, which no list of our secrets contains."""
    store = B2Store(B2Settings("id-of-the-key", "app-secret-of-the-key", "bucket"))
    text = store._describe(B2SimpleError(quoted)).lower()
    assert text.startswith("b2simpleerror")
    for hidden in ("hidden", "words of it", "of-the-key"):
        assert hidden not in text


def test_an_error_of_b2_without_a_token_keeps_its_words() -> None:
    store = B2Store(B2Settings("id-of-the-key", "app-secret-of-the-key", "bucket"))
    text = store._describe(B2SimpleError("Cannot upload files, storage cap exceeded (403 cap_exceeded)"))
    assert text.endswith("Cannot upload files, storage cap exceeded (403 cap_exceeded)")
