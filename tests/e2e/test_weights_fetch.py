"""The weights command and the worker's first start as real processes, against a hub on loopback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch

from musetalk import devices, manifest
from musetalk.errors import WeightsError
from musetalk.fetch_progress import Watcher
from musetalk_core import Core
from tests.support.fake_hub import SIGNATURE, TOKEN, FakeHub, Order, manifest_of
from tests.support.server import Server, wait_until
from tests.support.small_manifest import install, write_manifest
from worker import engine
from worker.config import load_settings
from worker.engine import DEMO_MODELS, EngineLoader

ROOT = Path(__file__).resolve().parents[2]
UNET, UNET_AT = "musetalkV15/unet.pth", "TMElyralab/MuseTalk/musetalkV15/unet.pth"


@pytest.fixture
def hub(tiny_models: Path) -> Iterator[FakeHub]:
    """A hub that serves the tiny models."""
    with FakeHub() as fake:
        fake.serve_all(tiny_models)
        yield fake


@pytest.fixture
def small(tiny_models: Path, tmp_path: Path) -> Path:
    """The manifest of the tiny models, as a file."""
    return write_manifest(tmp_path / "manifest.json", manifest_of(tiny_models))


class Command:
    """`python -m musetalk.weights` with the manifest of the tiny models."""

    def __init__(self, hub: FakeHub, small: Path, folder: Path) -> None:
        self.models_dir = folder / "models"
        self._small = small
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        self.environment = {
            **kept,
            "OMP_NUM_THREADS": "1",
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(folder / "hub-home"),
            "HF_TOKEN": TOKEN,
            "MUSETALK_S3FD_URL": hub.s3fd_url,
            "MUSETALK_ENV_FILE": "none",
            "MUSETALK_MODELS_DIR": str(self.models_dir),
        }

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.support.small_manifest", str(self._small), *arguments],
            cwd=ROOT,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *arguments: str, status: int = 0) -> str:
        """Run it and return its output; see `end`."""
        return self.end(self.start(*arguments), status)

    def end(self, process: subprocess.Popen[str], status: int) -> str:
        """Wait for the process; return its output, after checking its status and that no secret is in it."""
        text, _ = process.communicate(timeout=120)
        assert process.returncode == status, text
        for secret in (TOKEN, SIGNATURE, "http:", "Traceback"):
            assert secret not in text
        return text


@pytest.fixture
def command(hub: FakeHub, small: Path, tmp_path: Path) -> Command:
    return Command(hub, small, tmp_path)


def test_after_fetch_and_convert_no_command_needs_the_network(command: Command, hub: FakeHub) -> None:
    assert "missing    musetalkV15/unet.pth" in command.run("verify", status=1)
    hub.gated.add("yzd-v/DWPose/dw-ll_ucoco_384.pth")
    text = command.run("fetch", "--version", "v15", "--convert", "--remove-originals")
    assert "10 files fetched" in text
    assert "6 files converted" in text
    assert "100 % (s3fd-619a316812.pth)" in text
    assert "all files of v15 are complete and correct" in command.run("verify")
    assert not list(command.models_dir.rglob("*.pth"))
    hub.seen.clear()
    command.environment["HF_HUB_OFFLINE"] = "1"
    assert "nothing to fetch: all files are present" in command.run("fetch")
    assert hub.seen == []
    spoiled = command.models_dir / "musetalkV15/unet.safetensors"
    spoiled.write_bytes(spoiled.read_bytes()[:-100])
    assert "cut short  musetalkV15/unet.safetensors" in command.run("verify", status=1)


def test_the_next_run_resumes_after_an_interrupt(command: Command, hub: FakeHub) -> None:
    hub.orders[UNET_AT] = [Order(cut_after=5000, holds=True)]
    process = command.start("fetch")
    assert hub.is_held.wait(60)
    # The interrupt comes only after the sent bytes are in the file, so that its size shows what was kept.
    part = _grown(command.models_dir, 5000)
    process.send_signal(signal.SIGINT)
    assert "stopped; run the same command again" in command.end(process, 130)
    assert not (command.models_dir / UNET).exists()
    assert part.stat().st_size == 5000
    hub.release.set()
    hub.seen.clear()
    command.run("fetch")
    assert [seen.headers.get("range") for seen in hub.requests_for("unet.pth")] == ["bytes=5000-"]
    command.run("verify")


def _grown(models_dir: Path, n_bytes: int) -> Path:
    def parts() -> list[Path]:
        return [part for part in models_dir.rglob("*.part") if part.stat().st_size >= n_bytes]

    wait_until(parts)
    return parts()[0]


def test_a_full_disk_is_reported_and_the_received_bytes_are_kept(command: Command, tiny_models: Path) -> None:
    size = (tiny_models / UNET).stat().st_size
    text = command.run("--largest-file", str(size // 2), "fetch", status=1)
    assert f"error: the disk is full: {UNET} needs {manifest.readable_size(size)}, of which" in text
    assert list(command.models_dir.rglob("*.part"))
    command.run("fetch")


def test_a_gated_repository_is_named_and_the_token_is_not(command: Command, hub: FakeHub) -> None:
    hub.gated.add("yzd-v/DWPose/dw-ll_ucoco_384.pth")
    command.environment["HF_TOKEN"] = "hf_of_somebody_else"
    text = command.run("fetch", status=1)
    assert "error: dwpose/dw-ll_ucoco_384.pth: Hugging Face yzd-v/DWPose answered 401: the file is gated" in text
    assert "somebody" not in text


def test_the_command_is_the_module_of_the_weights(tmp_path: Path) -> None:
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    done = subprocess.run(
        [sys.executable, "-m", "musetalk.weights", "verify", "--models-dir", str(tmp_path)],
        cwd=ROOT,
        env={**kept, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert "missing    musetalkV15/unet.pth: expected 3,400,074,924 bytes" in done.stdout
    assert done.stderr == ""


# -- the worker -------------------------------------------------------------------------------------------------------


@pytest.fixture
def start(hub: FakeHub, small: Path, tmp_path: Path) -> Iterator[Any]:
    """Function that starts workers with the small manifest and an empty models folder."""
    servers: list[Server] = []
    configuration = tmp_path / "small.conf.py"
    configuration.write_text(
        "import runpy\n"
        "from pathlib import Path\n"
        f"own = runpy.run_path({str(ROOT / 'gunicorn.conf.py')!r})\n"
        "globals().update({name: value for name, value in own.items() if not name.startswith('__')})\n"
        "def post_fork(server, worker):\n"
        "    from tests.support.small_manifest import install\n"
        f"    install(Path({str(small)!r}))\n"
        "    own['post_fork'](server, worker)\n"
    )

    def run(**environment: Any) -> Server:
        server = Server(
            tmp_path,
            tmp_path / "models",
            command=[sys.executable, "-m", "gunicorn", "--config", str(configuration)],
            HF_ENDPOINT=hub.url,
            HF_HOME=str(tmp_path / "hub-home"),
            HF_TOKEN=TOKEN,
            MUSETALK_S3FD_URL=hub.s3fd_url,
            MUSETALK_FETCH_WEIGHTS="1",
            **environment,
        )
        servers.append(server)
        return server

    yield run
    hub.release.set()
    for server in servers:
        server.stop()
        assert TOKEN not in server.log_text()
        assert SIGNATURE not in server.log_text()


def test_a_first_start_fetches_reports_progress_and_becomes_ready(
    start: Any, hub: FakeHub, tiny_models: Path, tmp_path: Path
) -> None:
    size = (tiny_models / UNET).stat().st_size
    hub.orders[UNET_AT] = [Order(cut_after=size // 2, holds=True)]
    server = start()
    assert hub.is_held.wait(60)
    _grown(tmp_path / "models", size // 2)
    body = server.wait_for(503)
    # Half of the largest file has arrived; it is the first one.
    total = sum(entry.n_bytes or 0 for entry in manifest_of(tiny_models))
    assert body["reason"] == f"fetching the weights: {size // 2 * 100 // total} %"
    assert body["status"] == "starting"
    hub.release.set()
    assert server.wait_for(200)["model"] == "v15"
    assert server.entries("fetching the weights")[-1]["percent"] == 100
    assert len(server.entries("weights fetched")) == 1


def test_a_failed_fetch_fails_the_start_with_its_reason(start: Any, hub: FakeHub) -> None:
    del hub.files[UNET_AT]
    server = start()
    server.wait_for(503)
    wait_until(lambda: server.health()[1]["status"] == "failed")
    assert server.health()[1]["reason"] == (
        f"{UNET}: Hugging Face TMElyralab/MuseTalk answered 404: there is no such file"
    )
    assert server.health()[1]["model"] is None


@pytest.fixture
def core_of(hub: FakeHub, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Function that makes a core in this process, with an empty models folder, with or without a GPU."""
    from musetalk import fetching, weights

    # Bound now to the official manifest, whichever test imports the module first.
    assert weights.MANIFEST is manifest.MANIFEST
    monkeypatch.setattr(manifest, "MANIFEST", manifest.MANIFEST)
    monkeypatch.setattr(fetching, "fetch", fetching.fetch)
    install(small)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
    template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    # The CPU stands in for the GPU.
    monkeypatch.setattr(devices, "choose_device", lambda _wanted: torch.device("cpu"))

    def make(has_gpu: bool, watcher: Watcher | None = None, **environment: str) -> Core:
        monkeypatch.setattr(engine, "has_gpu_hardware", lambda: has_gpu)
        folders = {"OUTPUT_DIR": "outputs", "WORK_DIR": "work", "MUSETALK_MODELS_DIR": "models"}
        settings = load_settings(
            {
                **{name: str(tmp_path / folder) for name, folder in folders.items()},
                "MUSETALK_DEVICE": "cuda",
                "MUSETALK_CPU_THREADS": "1",
                "MUSETALK_S3FD_URL": hub.s3fd_url,
                "MIN_FREE_DISK_MB": "16",
                **environment,
            },
            env_file=None,
        )
        return Core(settings, fetch_watcher=watcher)

    return make


def test_with_a_gpu_missing_weights_are_fetched_once(core_of: Any, hub: FakeHub) -> None:
    core = core_of(True)
    core.load()
    assert core.readiness.model == "v15"
    n_seen = len(hub.seen)
    again = core_of(True)
    again.load()
    assert (again.readiness.model, len(hub.seen)) == ("v15", n_seen)


def test_a_watcher_gets_messages_and_progress(core_of: Any) -> None:
    said, percents = list[str](), list[int]()
    core = core_of(True, Watcher(said.append, lambda progress: percents.append(progress.percent)))
    core.load()
    assert any(text.startswith(f"fetching {UNET} (") for text in said)
    assert percents[-1] == 100
    assert core.readiness.state == "ready"


def test_one_missing_file_of_a_folder_is_fetched(core_of: Any, hub: FakeHub, tiny_models: Path) -> None:
    core = core_of(True, MUSETALK_MODEL="v15")
    core.load()
    (core.settings.models_dir / UNET).unlink()
    hub.seen.clear()
    core_of(True).load()
    assert [seen.path.rpartition("/")[2] for seen in hub.seen if seen.host == "hub"] == ["unet.pth"] * 2


def choose_model(core: Core) -> tuple[str, Path]:
    """Model and folder that `core` would load."""
    return EngineLoader(core.settings, core.metrics).choose_model()


@pytest.mark.parametrize(
    ("has_gpu", "environment"),
    [(False, {}), (True, {"MUSETALK_FETCH_WEIGHTS": "0"}), (True, {"MUSETALK_DEVICE": "cpu"})],
)
def test_otherwise_the_demo_runs_without_a_request(
    core_of: Any, hub: FakeHub, has_gpu: bool, environment: dict[str, str]
) -> None:
    core = core_of(has_gpu, **environment)
    assert choose_model(core) == ("demo", DEMO_MODELS)
    with pytest.raises(WeightsError, match="model files are missing"):
        choose_model(core_of(has_gpu, MUSETALK_MODEL="v15", **environment))
    assert hub.seen == []


def test_a_chosen_demo_model_fetches_nothing(core_of: Any, hub: FakeHub) -> None:
    core = core_of(True, MUSETALK_MODEL="demo", MUSETALK_FETCH_WEIGHTS="1")
    assert choose_model(core) == ("demo", DEMO_MODELS)
    assert hub.seen == []


def test_on_a_gpu_a_failed_fetch_does_not_fall_back_to_the_demo(core_of: Any, hub: FakeHub) -> None:
    hub.files[UNET_AT] = replace(hub.files[UNET_AT], announced_size=7)
    core = core_of(True)
    core.start_loading().join()
    assert core.readiness.state == "failed"
    assert "has another file of 7 bytes" in (core.readiness.reason or "")
    assert core.readiness.model is None
