"""Weights fetched in this process from a hub on loopback: complete, resumed, refused, converted, verified."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from musetalk import manifest, weights
from musetalk.converting_weights import convert
from musetalk.errors import WeightsError
from musetalk.fetch_progress import Progress, Watcher
from musetalk.fetching import fetch
from musetalk.manifest import WeightFile, read_record
from musetalk.models import load_models
from musetalk.remote_files import TRIES
from musetalk.verifying import verify
from tests.support.fake_hub import COMMIT, SIGNATURE, TOKEN, FakeHub, Order, manifest_of
from tests.support.tiny_models import write_tiny_models
from worker.cli import weights as weights_command

UNET, S3FD, VAE = "musetalkV15/unet.pth", "s3fd-619a316812.pth", "sd-vae/diffusion_pytorch_model.bin"
POSE, CONFIG = "dwpose/dw-ll_ucoco_384.pth", "musetalkV15/musetalk.json"
# Their paths on the hosts.
UNET_AT, POSE_AT = f"TMElyralab/MuseTalk/{UNET}", "yzd-v/DWPose/dw-ll_ucoco_384.pth"


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models in the official layout, S3FD in the format from before torch 1.6; tests must not write to it."""
    folder = write_tiny_models(tmp_path_factory.mktemp("official"))
    state = torch.load(folder / S3FD, weights_only=True)
    torch.save(state, folder / S3FD, _use_new_zipfile_serialization=False)
    return folder


@pytest.fixture
def hub(official: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub that serves these files; HF_HUB_OFFLINE, which the tests set, is off for it."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with FakeHub() as fake:
        fake.serve_all(official)
        yield fake


class Caller:
    """Fetches into one folder; records their messages, progress and pauses."""

    def __init__(self, hub: FakeHub, official: Path, models_dir: Path) -> None:
        self.hub, self.models_dir = hub, models_dir
        self.files = manifest.with_s3fd_url(manifest_of(official), hub.s3fd_url)
        self.said: list[str] = []
        self.progress: list[Progress] = []
        self.pauses: list[float] = []

    def change(self, name: str, **changes: Any) -> None:
        """Change an entry of the manifest."""
        self.files = tuple(replace(entry, **changes) if entry.name == name else entry for entry in self.files)

    def entry(self, name: str) -> WeightFile:
        return next(entry for entry in self.files if entry.name == name)

    def fetch(self, version: manifest.ModelVersion = "v15", **options: Any) -> list[str]:
        return fetch(
            self.models_dir,
            version,
            manifest=self.files,
            watcher=Watcher(self.said.append, self.progress.append),
            endpoint=self.hub.url,
            pause=self.pauses.append,
            **options,
        )

    def refusal(self) -> WeightsError:
        """Return the error of a failed fetch, after checking that it contains no address, signature or path."""
        with pytest.raises(WeightsError) as caught:
            self.fetch()
        error = caught.value
        for secret in (SIGNATURE, TOKEN, "http", str(self.models_dir)):
            assert secret not in f"{error} {error.details} {self.said}"
        assert "\n" not in str(error)
        return error

    def parts(self) -> list[Path]:
        return sorted(self.models_dir.rglob("*.part"))


@pytest.fixture
def caller(hub: FakeHub, official: Path, tmp_path: Path) -> Caller:
    return Caller(hub, official, tmp_path / "models")


def same(models_dir: Path, official: Path, name: str) -> bool:
    return (models_dir / name).read_bytes() == (official / name).read_bytes()


# -- complete ---------------------------------------------------------------------------------------------------------


def test_everything_is_fetched_checked_and_loads(caller: Caller, official: Path) -> None:
    fetched = caller.fetch()
    assert sorted(fetched) == sorted(entry.name for entry in caller.files if "v15" in entry.versions)
    assert all(same(caller.models_dir, official, name) for name in fetched)
    assert caller.parts() == []
    record = read_record(caller.models_dir)
    assert record.keys() == set(fetched)
    assert record[UNET].sha256 == caller.entry(UNET).sha256
    assert (record[UNET].commit, record[S3FD].commit) == (COMMIT, None)
    models = load_models(caller.models_dir, "v15", device=torch.device("cpu"), dtype=torch.float32)
    assert models.version == "v15"
    assert all(finding.verdict == "ok" for finding in verify(caller.models_dir, "v15", manifest=caller.files))


def test_the_other_version_has_its_own_files(hub: FakeHub, tmp_path: Path) -> None:
    official = write_tiny_models(tmp_path / "v1", "v1")
    hub.serve_all(official)
    caller = Caller(hub, official, tmp_path / "models")
    fetched = caller.fetch("v1")
    assert {"musetalk/pytorch_model.bin", "musetalk/musetalk.json"} < set(fetched)
    assert UNET not in fetched
    assert weights.locate(caller.models_dir, "v1").unet.name == "pytorch_model.bin"


def test_progress_grows_to_a_hundred_percent(caller: Caller, official: Path) -> None:
    caller.fetch()
    percents = [progress.percent for progress in caller.progress]
    assert percents == sorted(percents)
    assert percents[-1] == 100
    assert caller.progress[-1].n_done == sum(
        (official / name).stat().st_size for name in read_record(caller.models_dir)
    )


@pytest.mark.parametrize("is_offline", [False, True])
def test_complete_files_need_no_request(caller: Caller, monkeypatch: pytest.MonkeyPatch, is_offline: bool) -> None:
    caller.fetch()
    n_seen = len(caller.hub.seen)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", is_offline)
    assert caller.fetch() == []
    assert len(caller.hub.seen) == n_seen


def test_only_the_hub_receives_the_login(caller: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    caller.hub.gated.add(POSE_AT)
    caller.fetch()
    to_hub = [seen for seen in caller.hub.seen if seen.host == "hub"]
    assert all(seen.headers["authorization"] == f"Bearer {TOKEN}" for seen in to_hub)
    elsewhere = [seen for seen in caller.hub.seen if seen.host == "content"]
    assert len(elsewhere) >= 6
    assert not any(name == "authorization" for seen in elsewhere for name in seen.headers)
    assert all(text not in str(caller.said) for text in (TOKEN, SIGNATURE))


def test_an_optional_file_may_be_absent(caller: Caller) -> None:
    del caller.hub.files["openai/whisper-tiny/preprocessor_config.json"]
    assert "whisper/preprocessor_config.json" not in caller.fetch()
    assert any("this file is optional" in text for text in caller.said)
    weights.locate(caller.models_dir, "v15")


# -- cut and resumed --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "place"), [(UNET, UNET_AT), (S3FD, S3FD)])
def test_a_cut_connection_is_resumed(caller: Caller, official: Path, name: str, place: str) -> None:
    size = (official / name).stat().st_size
    caller.hub.orders[place] = [Order(cut_after=1000), Order(cut_after=0), Order(cut_after=500), Order(status=503)]
    caller.fetch()
    assert same(caller.models_dir, official, name)
    starts = [seen.headers.get("range") for seen in caller.hub.requests_for(Path(name).name)]
    assert starts == [None, "bytes=1000-", "bytes=1000-", "bytes=1500-", "bytes=1500-"]
    assert len(caller.pauses) == 4
    assert caller.hub.n_sent == sum((official / entry).stat().st_size for entry in read_record(caller.models_dir))
    assert size > 1500


def test_a_reset_connection_is_resumed(caller: Caller, official: Path) -> None:
    caller.hub.orders[UNET_AT] = [Order(cut_after=50_000, resets=True)] * 3
    caller.fetch()
    assert same(caller.models_dir, official, UNET)


def test_from_a_host_without_ranges_the_file_starts_again(caller: Caller, official: Path) -> None:
    caller.hub.orders[UNET_AT] = [Order(cut_after=1000), Order(ignores_range=True)]
    caller.fetch()
    assert same(caller.models_dir, official, UNET)


def test_an_interrupted_fetch_is_resumed_by_the_next(caller: Caller, official: Path) -> None:
    caller.hub.orders[UNET_AT] = [Order(cut_after=1000)] + [Order(status=502)] * TRIES
    error = caller.refusal()
    assert error.retryable
    assert str(error) == (
        f"{UNET} could not be fetched from Hugging Face TMElyralab/MuseTalk: the host answered 502, 6 attempts in a "
        "row; fetch again to resume after the received bytes"
    )
    assert [part.stat().st_size for part in caller.parts()] == [1000]
    (finding,) = (f for f in verify(caller.models_dir, "v15", manifest=caller.files) if f.name == UNET)
    assert (finding.verdict, "1,000 bytes have arrived" in finding.text) == ("missing", True)
    caller.hub.seen.clear()
    caller.fetch()
    assert [seen.headers.get("range") for seen in caller.hub.requests_for("unet.pth")] == ["bytes=1000-"]
    assert same(caller.models_dir, official, UNET)
    assert caller.parts() == []


def test_a_part_of_another_version_of_the_file_is_not_resumed(caller: Caller, official: Path) -> None:
    caller.hub.orders[UNET_AT] = [Order(cut_after=1000)] + [Order(status=502)] * TRIES
    caller.refusal()
    (part,) = caller.parts()
    part.rename(part.with_name(".unet.pth.another.part"))
    caller.hub.seen.clear()
    caller.fetch()
    assert [seen.headers.get("range") for seen in caller.hub.requests_for("unet.pth")] == [None]
    assert caller.parts() == []


@pytest.mark.parametrize("size", [1000, None, 10_000_000])
def test_a_damaged_part_is_dropped_and_fetched_again(caller: Caller, official: Path, size: int | None) -> None:
    caller.hub.orders[UNET_AT] = [Order(cut_after=1000)] + [Order(status=502)] * TRIES
    caller.refusal()
    (part,) = caller.parts()
    part.write_bytes(b"x" * (size or (official / UNET).stat().st_size))
    caller.fetch()
    assert same(caller.models_dir, official, UNET)


def test_transient_statuses_of_the_hub_are_retried(caller: Caller, official: Path) -> None:
    caller.hub.orders[f"hub:{UNET_AT}"] = [Order(status=429), Order(status=503)]
    caller.fetch()
    assert caller.pauses == [1.0, 2.0]
    assert same(caller.models_dir, official, UNET)


def test_an_error_about_a_missing_hub_contains_no_address(caller: Caller) -> None:
    caller.hub.url = "http://127.0.0.1:1"
    error = caller.refusal()
    assert error.retryable
    assert "the connection failed (ConnectError), 6 attempts in a row" in str(error)


def test_two_fetches_into_one_folder_download_once(caller: Caller, hub: FakeHub, official: Path) -> None:
    hub.orders[UNET_AT] = [Order(cut_after=1000, holds=True)]
    second = Caller(hub, official, caller.models_dir)
    waits = threading.Event()
    second.said = _Messages(waits)
    first_thread, second_thread = threading.Thread(target=caller.fetch), threading.Thread(target=second.fetch)
    first_thread.start()
    assert hub.is_held.wait(30)
    second_thread.start()
    assert waits.wait(30)
    hub.release.set()
    first_thread.join()
    second_thread.join()
    assert second.said == ["another process is fetching into this folder; waiting for it"]
    assert len(hub.requests_for("unet.pth")) == 1
    assert same(caller.models_dir, official, UNET)


class _Messages(list[str]):
    def __init__(self, arrived: threading.Event) -> None:
        super().__init__()
        self._arrived = arrived

    def append(self, text: str) -> None:
        super().append(text)
        self._arrived.set()


# -- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("known", [64, 16])
def test_a_wrong_checksum_is_reported_and_the_file_removed(caller: Caller, official: Path, known: int) -> None:
    right = (official / UNET).read_bytes()
    wrong = right[:-1] + bytes([right[-1] ^ 1])
    caller.hub.orders[UNET_AT] = [Order(body=wrong)]
    digest = caller.entry(UNET).sha256
    assert digest is not None
    caller.change(UNET, sha256=digest[:known])
    error = caller.refusal()
    beginning = "" if known == 64 else "one that begins with "
    assert str(error) == (
        f"{UNET} has the SHA-256 {hashlib.sha256(wrong).hexdigest()}, expected {beginning}{digest[:known]}; "
        "the file was removed"
    )
    assert error.details == {"file": UNET}
    assert not (caller.models_dir / UNET).exists()
    assert caller.parts() == []
    assert len(caller.hub.requests_for("unet.pth")) == 1
    assert UNET in caller.fetch()


def test_another_file_on_the_hub_is_reported_before_the_download(caller: Caller, official: Path) -> None:
    size = (official / UNET).stat().st_size
    caller.hub.files[UNET_AT].announced_size = 12
    assert str(caller.refusal()) == (
        f"{UNET}: Hugging Face TMElyralab/MuseTalk has another file of 12 bytes, expected {size:,}"
    )
    caller.hub.files[UNET_AT].announced_size = None
    caller.hub.files[UNET_AT].announced_checksum = "ab" * 32
    assert f"has another file, SHA-256 {'ab' * 32}, expected {caller.entry(UNET).sha256}" in str(caller.refusal())
    assert not any(seen.method == "GET" for seen in caller.hub.seen)


def test_a_file_without_published_checksum_must_match_the_hubs_own(caller: Caller, official: Path) -> None:
    for name in (UNET, CONFIG):
        caller.change(name, sha256=None, n_bytes=None)
    right = (official / UNET).read_bytes()
    caller.hub.orders[UNET_AT] = [Order(body=bytes(len(right)))]
    assert "has the SHA-256" in str(caller.refusal())
    caller.hub.files[f"TMElyralab/MuseTalk/{CONFIG}"].announced_checksum = "cd" * 20
    assert f"expected {'cd' * 20}" in str(caller.refusal())
    caller.hub.files[f"TMElyralab/MuseTalk/{CONFIG}"].announced_checksum = None
    caller.fetch()
    assert same(caller.models_dir, official, UNET)


def test_more_bytes_than_announced_are_an_error(caller: Caller, official: Path) -> None:
    right = (official / S3FD).read_bytes()
    caller.hub.orders[S3FD] = [Order(body=right * 2)]
    assert "has more than the" in str(caller.refusal())
    assert caller.parts() == []


def test_a_file_missing_on_the_hub_is_named(caller: Caller) -> None:
    del caller.hub.files[POSE_AT]
    error = caller.refusal()
    assert str(error) == f"{POSE}: Hugging Face yzd-v/DWPose answered 404: there is no such file"
    assert not error.retryable
    assert caller.pauses == []
    assert not any(seen.method == "GET" for seen in caller.hub.seen), "no download before all files exist"


def test_a_gated_file_asks_for_a_login(caller: Caller) -> None:
    caller.hub.gated.add(POSE_AT)
    error = caller.refusal()
    assert str(error).startswith(
        f"{POSE}: Hugging Face yzd-v/DWPose answered 401: the file is gated, private or gone; set HF_TOK"
    )
    assert error.details["status"] == 401


def test_a_refused_s3fd_has_the_same_error_texts(caller: Caller) -> None:
    caller.change(S3FD, url=caller.hub.s3fd_url.partition("?")[0])
    caller.hub.heads_are_refused = True
    error = caller.refusal()
    assert str(error).startswith(f"{S3FD}: the face-alignment project's site (its S3FD detector) answered 403: refused")
    del caller.hub.files[S3FD]
    assert "answered 404: there is no such file" in str(caller.refusal())


@pytest.mark.parametrize("n_bytes", [None, "known"])
def test_s3fd_may_have_an_address_signed_only_for_get(caller: Caller, official: Path, n_bytes: str | None) -> None:
    caller.hub.heads_are_refused = True
    size = (official / S3FD).stat().st_size
    caller.change(S3FD, n_bytes=size if n_bytes else None)
    caller.hub.orders[S3FD] = [Order(cut_after=1000)]
    caller.fetch()
    assert same(caller.models_dir, official, S3FD)
    assert caller.progress[-1].percent == 100


def test_offline_names_the_missing_file(caller: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    error = caller.refusal()
    assert str(error) == f"{UNET} is missing and cannot be fetched: HF_HUB_OFFLINE is set"
    assert caller.hub.seen == []


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_too_little_room_is_reported_before_the_download(caller: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    total = sum(entry.n_bytes or 0 for entry in caller.files if "v15" in entry.versions)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: Usage(10, 0, total - 1))
    error = caller.refusal()
    assert f"the weights need {manifest.readable_size(total)}" in str(error)
    assert error.details == {"free_bytes": total - 1, "needed_bytes": total, "kind": "disk"}
    assert not any(seen.method == "GET" for seen in caller.hub.seen)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: Usage(10, 0, total))
    with pytest.raises(WeightsError, match="the weights need"):
        caller.fetch(room_for_conversion=True)
    caller.fetch()


def test_an_error_about_an_unusable_folder_contains_no_path(caller: Caller) -> None:
    caller.models_dir.write_text("a file")
    assert str(caller.refusal()).startswith("the models folder cannot be created (")


# -- existing files ---------------------------------------------------------------------------------------------------


def test_existing_files_are_checked_once(caller: Caller, official: Path) -> None:
    shutil.copytree(official, caller.models_dir)
    assert caller.fetch() == []
    assert f"checking {UNET}, which exists already" in caller.said
    caller.said.clear()
    assert caller.fetch() == []
    assert caller.said == []
    assert caller.hub.seen == []


def test_wrong_files_are_fetched_again(caller: Caller, official: Path) -> None:
    shutil.copytree(official, caller.models_dir)
    right = (official / UNET).read_bytes()
    (caller.models_dir / UNET).write_bytes(right[:-1] + b"?")
    (caller.models_dir / POSE).write_bytes(b"<html>")
    assert caller.fetch() == [UNET, POSE]
    assert same(caller.models_dir, official, UNET)
    assert same(caller.models_dir, official, POSE)


def test_a_file_under_another_name_counts(caller: Caller, official: Path) -> None:
    shutil.copytree(official, caller.models_dir)
    (caller.models_dir / S3FD).rename(caller.models_dir / "s3fd.pth")
    assert caller.fetch() == []
    assert caller.hub.seen == []


def test_a_damaged_record_counts_as_none(caller: Caller, official: Path) -> None:
    shutil.copytree(official, caller.models_dir)
    for text in ("", "[]", '{"files": []}', '{"files": {"a": 1}}', '{"files": {"a": {"sha256": "b"}}}'):
        (caller.models_dir / manifest.RECORD_NAME).write_text(text)
        assert read_record(caller.models_dir) == {}
    assert caller.fetch() == []
    assert UNET in read_record(caller.models_dir)


# -- converted --------------------------------------------------------------------------------------------------------


def outputs(models_dir: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Outputs of every network for fixed inputs."""
    models = load_models(models_dir, "v15", device=torch.device("cpu"), dtype=torch.float32)
    rng = np.random.default_rng(0)
    crops = rng.integers(0, 256, (1, 256, 256, 3), dtype=np.uint8)
    features = models.audio.features(rng.normal(0, 0.1, 8000).astype(np.float32))
    latents = models.generator.encode(crops)
    windows = features[:10].reshape(1, -1, features.shape[-1])
    return {
        "features": features.numpy(),
        "latents": latents.numpy(),
        "predicted": models.generator.predict(latents, windows).numpy(),
        "patches": models.generator.generate(latents, windows).astype(np.float32),
        "labels": np.asarray(models.parser.labels(list(crops))),
    }


def test_converted_files_are_half_as_large_and_run_the_same(official: Path, tmp_path: Path) -> None:
    before = outputs(official)
    shutil.copytree(official, tmp_path / "models")
    made = convert(tmp_path / "models", "v15", manifest=manifest_of(official), remove_originals=True)
    assert len(made) == 6
    files = weights.locate(tmp_path / "models", "v15")
    found = {files.unet, files.pose, files.detector, files.parsing}
    assert all(path is not None and path.suffix == ".safetensors" for path in found)
    assert not list(tmp_path.rglob("*.pth"))
    assert not list(tmp_path.rglob("*.part*"))
    for path, dtype in ((files.unet, torch.float16), (files.pose, torch.float32), (files.detector, torch.float32)):
        assert path is not None
        floats = {value.dtype for value in load_file(path).values() if value.is_floating_point()}
        assert floats == {dtype}
    for name in (UNET, VAE):
        n_values = sum(value.numel() for value in weights.read_state(official / name).values())
        size = (tmp_path / "models" / name).with_suffix(".safetensors").stat().st_size
        assert 2 * n_values < size < 2 * n_values + 200 * len(weights.read_state(official / name))
    whisper = load_file(tmp_path / "models/whisper/pytorch_model.safetensors")
    assert all(key.startswith("model.encoder.") for key in whisper)
    after = outputs(tmp_path / "models")
    assert np.array_equal(after.pop("labels"), before["labels"]), "the face networks are converted without loss"
    for name, values in after.items():
        # float16 rounds a weight to 11 bits, an error of 0.0005; a few dozen layers add up to a few times that.
        largest = max(1.0, float(np.abs(before[name]).max()))
        assert np.abs(values - before[name]).max() <= 0.02 * largest, name
        assert np.abs(values - before[name]).mean() <= 0.002 * largest, name


def test_a_converted_file_is_not_converted_again(official: Path, tmp_path: Path) -> None:
    models_dir, said = tmp_path / "models", list[str]()
    shutil.copytree(official, models_dir)
    files = manifest_of(official)
    convert(models_dir, "v15", manifest=files)
    assert convert(models_dir, "v15", manifest=files, say=said.append) == []
    assert len(said) == 6
    # Another checkpoint is converted although a converted file exists.
    state = torch.load(models_dir / UNET, weights_only=True)
    torch.save({key: value * 2 for key, value in state.items()}, models_dir / UNET)
    (models_dir / manifest.RECORD_NAME).write_text(
        json.dumps({"files": _without(UNET, json.loads((models_dir / manifest.RECORD_NAME).read_text())["files"])})
    )
    assert convert(models_dir, "v15", manifest=files) == ["musetalkV15/unet.safetensors"]


def _without(name: str, files: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in files.items() if key != name}


def test_a_safetensors_file_of_other_origin_is_not_replaced(official: Path, tmp_path: Path) -> None:
    models_dir, said = tmp_path / "models", list[str]()
    shutil.copytree(official, models_dir)
    save_file({"a": torch.ones(1)}, models_dir / "musetalkV15/unet.safetensors")
    made = convert(models_dir, "v15", manifest=manifest_of(official), say=said.append, remove_originals=True)
    assert "musetalkV15/unet.safetensors" not in made
    assert any("was not written by this command" in text for text in said)
    assert (models_dir / UNET).is_file()


def test_a_tensor_with_numbers_too_large_for_float16_stays_float32(official: Path, tmp_path: Path) -> None:
    models_dir = tmp_path / "models"
    shutil.copytree(official, models_dir)
    state = torch.load(models_dir / UNET, weights_only=True)
    state["conv_in.bias"][0] = 1e6
    torch.save(state, models_dir / UNET)
    convert(models_dir, "v15", manifest=manifest_of(models_dir))
    converted = weights.read_state(models_dir / "musetalkV15/unet.safetensors")
    assert converted["conv_in.bias"].dtype == torch.float32
    assert converted["conv_in.bias"][0] == 1e6
    assert converted["conv_in.weight"].dtype == torch.float16


def test_a_converted_folder_needs_no_network_and_verifies(caller: Caller, official: Path) -> None:
    caller.fetch()
    convert(caller.models_dir, "v15", manifest=caller.files, remove_originals=True)
    n_seen = len(caller.hub.seen)
    assert caller.fetch() == []
    assert len(caller.hub.seen) == n_seen
    findings = verify(caller.models_dir, "v15", manifest=caller.files)
    assert {finding.verdict for finding in findings} == {"ok"}
    assert sum(finding.name.endswith(".safetensors") for finding in findings) == 6
    spoiled = caller.models_dir / "musetalkV15/unet.safetensors"
    spoiled.write_bytes(spoiled.read_bytes()[:-1] + b"?")
    wrong = [finding for finding in verify(caller.models_dir, "v15", manifest=caller.files) if not finding.is_fine]
    assert [(finding.name, finding.verdict) for finding in wrong] == [("musetalkV15/unet.safetensors", "wrong")]
    assert "(recorded)" in wrong[0].text


def test_a_disk_without_room_fails_the_conversion_with_the_sizes(
    official: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(official, tmp_path / "models")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: Usage(10, 0, 10))
    with pytest.raises(
        WeightsError, match=r"the disk is full: musetalkV15/unet.safetensors needs .*, 10 bytes are free"
    ):
        convert(tmp_path / "models", "v15", manifest=manifest_of(official), remove_originals=True)
    assert (tmp_path / "models" / UNET).is_file()


def test_what_a_killed_conversion_left_is_removed_by_the_next(official: Path, tmp_path: Path) -> None:
    shutil.copytree(official, tmp_path / "models")
    leftover = tmp_path / "models/musetalkV15/.0123456789abcdef.part.safetensors"
    leftover.write_bytes(b"half")
    convert(tmp_path / "models", "v15", manifest=manifest_of(official))
    assert not leftover.exists()


def test_missing_files_cannot_be_converted(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="model files are missing"):
        convert(tmp_path, "v15")


# -- verified ---------------------------------------------------------------------------------------------------------


def test_every_fault_has_its_own_verdict(official: Path, tmp_path: Path) -> None:
    models_dir, files = tmp_path / "models", manifest_of(official, prefix=16)
    shutil.copytree(official, models_dir)
    files = tuple(replace(e, n_bytes=None, sha256=None) if e.name == "sd-vae/config.json" else e for e in files)
    (models_dir / UNET).write_bytes(b"<!DOCTYPE html><p>no such file")
    (models_dir / VAE).write_bytes((official / VAE).read_bytes() + b"more")
    pose = (official / POSE).read_bytes()
    (models_dir / POSE).write_bytes(pose[:-1] + b"?")
    (models_dir / S3FD).unlink()
    (models_dir / "whisper/preprocessor_config.json").unlink()
    (models_dir / "sd-vae/config.json").write_text("{")
    findings = {finding.name: finding for finding in verify(models_dir, "v15", manifest=files)}
    verdicts = {name: finding.verdict for name, finding in findings.items() if finding.verdict != "ok"}
    assert verdicts == {
        UNET: "cut short",
        VAE: "too long",
        POSE: "wrong",
        S3FD: "missing",
        "whisper/preprocessor_config.json": "absent",
        "sd-vae/config.json": "unreadable",
    }
    assert "is a web page, not weights" in findings[UNET].text
    assert "(published)" in findings[POSE].text
    assert "begins as published" in findings["whisper/pytorch_model.bin"].text
    assert "face detection (S3FD)" in findings[S3FD].text


def test_an_old_checkpoint_without_a_known_checksum_is_read(official: Path) -> None:
    files = tuple(replace(entry, sha256=None, n_bytes=None) for entry in manifest_of(official))
    (finding,) = (finding for finding in verify(official, "v15", manifest=files) if finding.name == S3FD)
    assert (finding.verdict, "readable; its checksum is not known" in finding.text) == ("ok", True)


def test_every_official_file_has_one_source() -> None:
    for entry in manifest.MANIFEST:
        assert bool(entry.repo) != bool(entry.url), entry.name
        assert bool(entry.repo) == bool(entry.repo_path), entry.name
        assert (entry.precision is None) == entry.name.endswith(".json"), entry.name
        assert entry.source


# -- on a terminal ----------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar_and_a_pipe_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream, wanted in ((Terminal(), ("a.pth", "50%", "100%")), (io.StringIO(), ("50 % (a.pth)", "100 % (a.pth)"))):
        monkeypatch.setattr("sys.stderr", stream)
        with weights_command.progress_on_stderr() as watcher:
            watcher.say("fetching a.pth")
            for n_done in (5_000, 10_000):
                watcher.on_progress(Progress("a.pth", n_done, 10_000))
        text = stream.getvalue()
        assert "fetching a.pth" in text
        if isinstance(stream, Terminal):
            assert "a.pth: 100%" in text
        else:
            assert all(part in text for part in wanted)
