"""The environment and `.env` as one frozen `Settings`; the only reader of the environment. Knows no Flask, no torch.

Every variable is one line of `VARIABLES`: name, how to read it, default, meaning. The README's table and `.env.example`
are checked against it. An empty variable counts as unset; all problems are reported at once.
"""

from __future__ import annotations

import os
import re
import socket
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from dotenv import dotenv_values

from musetalk.errors import SettingsError

ROOT = Path(__file__).resolve().parents[1]

_TRUE = {"1", "true", "yes", "on"}
_FALSE = {"0", "false", "no", "off"}


def _text(value: str) -> str:
    return value


def _flag(value: str) -> bool:
    lowered = value.lower()
    if lowered in _TRUE:
        return True
    if lowered in _FALSE:
        return False
    raise ValueError("must be 1 or 0")


def _whole(low: int, high: int) -> Callable[[str], int]:
    def parse(value: str) -> int:
        if not re.fullmatch(r"[+-]?\d+", value):
            raise ValueError("must be a whole number")
        number = int(value)
        if not low <= number <= high:
            raise ValueError(f"must be {low} to {high}")
        return number

    return parse


def _seconds(low: float, high: float) -> Callable[[str], float]:
    def parse(value: str) -> float:
        try:
            number = float(value)
        except ValueError:
            raise ValueError("must be a number of seconds") from None
        if not low <= number <= high:
            raise ValueError(f"must be {low:g} to {high:g} seconds")
        return number

    return parse


def _choice(*allowed: str) -> Callable[[str], str]:
    def parse(value: str) -> str:
        lowered = value.lower()
        if lowered not in allowed:
            raise ValueError(f"must be one of {', '.join(allowed)}")
        return lowered

    return parse


def _auto_or_flag(value: str) -> str:
    """`auto`, `1` or `0`."""
    if value.lower() == "auto":
        return "auto"
    try:
        return "1" if _flag(value) else "0"
    except ValueError:
        raise ValueError("must be auto, 1 or 0") from None


def _path(value: str) -> Path:
    return Path(value).expanduser()


def _paths(value: str) -> tuple[Path, ...]:
    return tuple(Path(part).expanduser() for part in value.split(os.pathsep) if part.strip())


def _names(value: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in value.split(",") if part.strip())


@dataclass(frozen=True)
class Variable:
    """One environment variable: its name, the setting it fills, how it is read, and what it means."""

    name: str
    setting: str
    parse: Callable[[str], Any]
    meaning: str
    default: str = ""
    aliases: tuple[str, ...] = ()
    secret: bool = False


ENV_FILE = "MUSETALK_ENV_FILE"

VARIABLES: tuple[Variable, ...] = (
    # HTTP server
    Variable("WORKER_HOST", "host", _text, "Address the HTTP server listens on; `::` is every IPv4 and IPv6 address of the machine.", "::"),
    Variable("WORKER_PORT", "port", _whole(1, 65535), "Port of the HTTP server.", "8000"),
    Variable("GRACEFUL_TIMEOUT_SEC", "graceful_timeout_s", _seconds(1, 3600), "Time from SIGTERM to the end of the process; ten seconds before it (of less than 20 s, after half) a running job is handed back as retryable.", "120"),
    Variable("PLAYGROUND", "playground", _flag, "1 serves a page at `/` to try the worker on, and takes uploads; `python app.py` always does.", "0"),
    Variable("MAX_BODY_BYTES", "max_body_bytes", _whole(1024, 2**30), "Largest body of a request.", "1000000"),
    # Model
    Variable("MUSETALK_MODEL", "model", _choice("auto", "v15", "v1", "demo"), "Which weights to run; `auto` takes v1.5, else v1.0, else fetches v1.5 or, when no official file is there, runs the demo model.", "auto"),
    Variable("MUSETALK_MODELS_DIR", "models_dir", _path, "Folder with the official `models/` layout.", "models"),
    Variable("MUSETALK_FETCH_WEIGHTS", "fetch_weights", _auto_or_flag, "Whether missing official weights are fetched at start; `auto`: only on a machine with a GPU that is used.", "auto"),
    Variable("MUSETALK_S3FD_URL", "s3fd_url", _text, "Another address for S3FD's file, which the hub does not hold; unset: its author's site.", ""),
    Variable("MUSETALK_UNET_MODEL_PATH", "unet_path", _path, "Another UNet weights file than the layout's."),
    Variable("MUSETALK_UNET_CONFIG", "unet_config_path", _path, "Another UNet configuration file than the layout's."),
    Variable("MUSETALK_DEVICE", "device", _choice("auto", "cpu", "cuda"), "Where the networks run; `auto` takes the GPU when there is one.", "auto"),
    Variable("MUSETALK_DTYPE", "dtype", _choice("auto", "float32", "float16", "bfloat16"), "Precision of the networks; `auto` is float16 on a GPU with tensor cores, bfloat16 on a CPU with instructions for it, else float32.", "auto"),
    Variable("MUSETALK_ACCELERATION", "acceleration", _choice("none", "graphs", "compile"), "On a GPU: `graphs` captures the networks as CUDA graphs, `compile` runs torch's compiler (minutes at start).", "none"),
    Variable("DEVICE_PIXELS", "device_pixels", _choice("auto", "0", "1"), "1 cuts and pastes faces with tensor operations where the networks run; `auto` does on a GPU.", "auto"),
    Variable("MUSETALK_CPU_THREADS", "cpu_threads", _whole(0, 256), "Threads of tensor work on the CPU; 0 chooses one on a GPU, all cores without.", "0"),
    Variable("MIN_GPU_MEMORY_MB", "min_gpu_memory_mb", _whole(0, 10_000_000), "GPU memory that must be free at start; 0 does not check.", "4096"),
    Variable("BATCH_SIZE", "batch_size", _whole(1, 256), "Output frames computed in one pass of the networks.", "8"),
    # Media
    Variable("OUTPUT_GEOMETRY", "output_geometry", _choice("source", "request"), "`source` keeps the source's size; `request` honours a job's aspect_ratio and resolution.", "source"),
    Variable("VIDEO_ENCODER", "video_encoder", _choice("auto", "libx264", "h264_nvenc"), "H.264 encoder; `auto` tries NVENC with a real test encode on a GPU, else x264.", "auto"),
    Variable("VIDEO_PRESET", "video_preset", _choice("ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow"), "x264 preset: speed against size.", "veryfast"),
    Variable("VIDEO_CRF", "video_crf", _whole(0, 51), "x264 quality: smaller is better and larger files.", "16"),
    Variable("MAX_VIDEO_BYTES", "max_video_bytes", _whole(1, 2**40), "Largest source file that is fetched.", "524288000"),
    Variable("MAX_AUDIO_BYTES", "max_audio_bytes", _whole(1, 2**40), "Largest audio file that is fetched.", "104857600"),
    Variable("MAX_AUDIO_SEC", "max_audio_s", _seconds(1, 86400), "Longest audio that is rendered.", "900"),
    Variable("MAX_OUTPUT_FRAMES", "max_output_frames", _whole(1, 10_000_000), "Most frames one job may produce.", "27000"),
    Variable("MAX_SOURCE_SIDE_PX", "max_source_side", _whole(64, 16384), "Longest side of a source picture.", "3840"),
    Variable("FRAME_MEMORY_MB", "frame_memory_mb", _whole(16, 1_048_576), "Memory for source frames kept for the backwards leg; beyond it they go to a scratch file.", "512"),
    Variable("SCRATCH_DISK_MB", "scratch_disk_mb", _whole(0, 16_777_216), "Disk for that scratch file.", "16384"),
    Variable("AVATAR_MEMORY_MB", "avatar_memory_mb", _whole(0, 1_048_576), "Memory for prepared sources (faces, latents, masks) kept for later jobs; 0 keeps none in memory.", "512"),
    Variable("AVATAR_DISK_MB", "avatar_disk_mb", _whole(0, 16_777_216), "Disk for the same, kept over restarts; 0 keeps none on disk.", "2048"),
    Variable("AVATAR_DIR", "avatar_dir", _path, "Folder for it; workers of one machine may share it.", "avatars"),
    # Limits of a job
    Variable("JOB_TIMEOUT_SEC", "job_timeout_s", _seconds(1, 604_800), "Limit for one whole job; it then fails as retryable.", "3600"),
    Variable("INFERENCE_TIMEOUT_SEC", "inference_timeout_s", _seconds(1, 604_800), "Limit for each of the stages preprocessing, inference and postprocessing.", "1800"),
    Variable("MIN_FREE_DISK_MB", "min_free_disk_mb", _whole(0, 2**40), "Disk that must be free in WORK_DIR and OUTPUT_DIR at start, and in WORK_DIR before each job.", "1024"),
    # Where files come from and go to
    Variable("ALLOW_FILE_URLS", "allow_file_urls", _flag, "1 lets a job name local files as `file:` addresses (tests, closed machines).", "0"),
    Variable("FILE_URL_ROOTS", "file_url_roots", _paths, "Folders (separated by `:`) that `file:` addresses may lie in; needed with ALLOW_FILE_URLS.", ""),
    Variable("ALLOW_PRIVATE_NETWORKS", "allow_private_networks", _flag, "1 lets downloads reach loopback and private addresses (tests, closed networks).", "0"),
    Variable("DOWNLOAD_ALLOWED_HOSTS", "download_allowed_hosts", _names, "Hosts (comma-separated, `*.suffix` allowed) that downloads may reach; unset: any public host.", ""),
    Variable("DOWNLOAD_TIMEOUT_SEC", "download_timeout_s", _seconds(1, 86400), "Limit for one whole download, retries included.", "300"),
    Variable("OUTPUT_DIR", "output_dir", _path, "Folder the finished files go to; the worker serves it at `/outputs/<name>`.", "outputs"),
    Variable("PUBLIC_BASE_URL", "public_base_url", _text, "What callers reach this server by; unset: `http://localhost:<port>`.", ""),
    Variable("WORK_DIR", "work_dir", _path, "Folder for the files of running jobs, one worker's alone; emptied of old jobs at start.", "work"),
    Variable("B2_KEY_ID", "b2_key_id", _text, "Backblaze B2 key id; with the two below, finished files go to the bucket.", "", secret=True),
    Variable("B2_APP_KEY", "b2_app_key", _text, "Backblaze B2 application key.", "", secret=True),
    Variable("B2_BUCKET_NAME", "b2_bucket", _text, "Backblaze B2 bucket.", ""),
    Variable("B2_PREFIX", "b2_prefix", _text, "Folder in the bucket.", "avatar/outputs"),
    Variable("B2_REALM", "b2_realm", _text, "B2 realm, or the address of a B2-compatible service.", "production"),
    Variable("B2_LINK_LIFETIME_SEC", "b2_link_lifetime_s", _whole(1, 604_800), "How long the link to a file in a private bucket is valid.", "604800"),
    Variable("UPLOAD_TIMEOUT_SEC", "upload_timeout_s", _seconds(1, 86400), "Limit for one whole upload, retries included.", "300"),
    # How jobs arrive
    Variable("WORKER_MODE", "worker_mode", _text, "`queue`: jobs are posted to `/generate`; `buffer`: the worker claims them from the orchestrator.", "queue"),
    Variable("BUFFER_WORKER_ID", "buffer_worker_id", _text, "Name of this worker; being set selects buffer mode.", ""),
    Variable("ORCHESTRATOR_BASE_URL", "orchestrator_url", _text, "Address of the orchestrator, for progress and (buffer mode) for jobs.", ""),
    Variable("BUFFER_ORCHESTRATOR_BASE_URL", "buffer_orchestrator_url", _text, "Another address for the calls of buffer mode alone.", ""),
    Variable("INTERNAL_API_KEY", "internal_api_key", _text, "Sent to the orchestrator as `X-Internal-API-Key`, and wanted as such from callers on other machines.", "", secret=True),
    Variable("BUFFER_POLL_INTERVAL_SEC", "buffer_poll_interval_s", _seconds(0.05, 3600), "Pause between two claims when there is no job.", "10", aliases=("POLL_INTERVAL_SEC",)),
    Variable("BUFFER_CAPACITY", "buffer_capacity", _whole(1, 1000), "Number sent in the heartbeat; one job is run at a time whatever it says.", "1"),
    Variable("SALAD_QUEUE_WORKER", "salad_queue_worker", _text, "Salad's queue binary, started by `run_worker.sh` in queue mode where it is found.", "salad-http-job-queue-worker"),
    Variable("CONFIG_LABEL", "config_label", _text, "Free text, sent with every progress report.", "default"),
    # Who this worker is
    Variable("WORKER_ID", "worker_id", _text, "Name of this worker in logs and reports; unset: the host's name.", "", aliases=("SALAD_MACHINE_ID", "VAST_CONTAINERLABEL")),
    Variable("GPU_CLASS", "gpu_class", _text, "GPU class echoed in metrics; unset: `unknown`.", "", aliases=("GPU_CLASS_NAME",)),
    Variable("LOG_LEVEL", "log_level", _choice("debug", "info", "warning", "error"), "Least severity that is logged.", "info"),
    Variable(ENV_FILE, "env_file", _text, "In the environment only: the file read instead of `.env`, so that several workers share one checkout; `none`: no file.", ".env"),
)  # fmt: skip


# Variables of the worker before this one: deployments still set them, and nothing is left for them to say.
LEGACY = ("USE_OPTIMIZED_INFERENCE", "MUSETALK_WORKDIR", "MUSETALK_RESULT_DIR", "WORKER_TYPE", "PROVIDER")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything the process was told, checked; one field per line of `VARIABLES`."""

    host: str
    port: int
    graceful_timeout_s: float
    playground: bool
    max_body_bytes: int
    model: str
    models_dir: Path
    fetch_weights: str
    s3fd_url: str
    unet_path: Path | None
    unet_config_path: Path | None
    device: str
    dtype: str
    acceleration: Any
    device_pixels: str
    cpu_threads: int
    min_gpu_memory_mb: int
    batch_size: int
    output_geometry: str
    video_encoder: str
    video_preset: str
    video_crf: int
    max_video_bytes: int
    max_audio_bytes: int
    max_audio_s: float
    max_output_frames: int
    max_source_side: int
    frame_memory_mb: int
    scratch_disk_mb: int
    avatar_memory_mb: int
    avatar_disk_mb: int
    avatar_dir: Path
    job_timeout_s: float
    inference_timeout_s: float
    min_free_disk_mb: int
    allow_file_urls: bool
    file_url_roots: tuple[Path, ...]
    allow_private_networks: bool
    download_allowed_hosts: tuple[str, ...]
    download_timeout_s: float
    output_dir: Path
    public_base_url: str
    work_dir: Path
    b2_key_id: str = field(repr=False)
    b2_app_key: str = field(repr=False)
    b2_bucket: str
    b2_prefix: str
    b2_realm: str
    b2_link_lifetime_s: int
    upload_timeout_s: float
    worker_mode: str
    buffer_worker_id: str
    orchestrator_url: str
    buffer_orchestrator_url: str
    internal_api_key: str = field(repr=False)
    buffer_poll_interval_s: float
    buffer_capacity: int
    salad_queue_worker: str
    config_label: str
    worker_id: str
    gpu_class: str | None
    log_level: str
    env_file: str
    warnings: tuple[str, ...] = field(default=())

    @property
    def is_buffer_mode(self) -> bool:
        """Whether jobs are claimed from the orchestrator instead of posted to us."""
        return self.worker_mode == "buffer" or bool(self.buffer_worker_id)

    @property
    def uses_b2(self) -> bool:
        """Whether finished files go to a bucket."""
        return bool(self.b2_bucket)

    def describe(self) -> dict[str, object]:
        """The settings as JSON values for the log at start; secrets show only whether they are set."""
        secret = {variable.setting for variable in VARIABLES if variable.secret}
        shown: dict[str, object] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name in secret:
                value = "set" if value else "unset"
            elif isinstance(value, Path):
                value = str(value)
            elif isinstance(value, tuple):
                value = [str(part) for part in value]
            shown[item.name] = value
        return shown


def load_settings(environment: Mapping[str, str] | None = None, env_file: Path | None = ROOT / ".env") -> Settings:
    """Settings from the environment, then from `env_file` for what the environment leaves unset, then defaults.

    MUSETALK_ENV_FILE names another file, or none. Raises SettingsError that lists every variable at fault, with its value
    unless it is a secret.
    """
    environment = os.environ if environment is None else environment
    if env_file is not None and (named := environment.get(ENV_FILE, "").strip()):
        env_file = None if named == "none" else ROOT / named
        if env_file is not None and not env_file.is_file():
            raise SettingsError(f"{ENV_FILE} names a file that is not there")
    from_file = dotenv_values(env_file) if env_file is not None and env_file.is_file() else {}
    given = {name: value.strip() for name, value in from_file.items() if value and value.strip()}
    given.update({name: value.strip() for name, value in environment.items() if value.strip()})

    values: dict[str, Any] = {}
    problems: list[str] = []
    for variable in VARIABLES:
        name = next((n for n in (variable.name, *variable.aliases) if n in given), variable.name)
        text = given.get(name, variable.default)
        if not text:
            values[variable.setting] = variable.parse("") if variable.parse in (_paths, _names, _text) else None
            continue
        try:
            values[variable.setting] = variable.parse(text)
        except ValueError as problem:
            shown = "" if variable.secret else f" (it is {text!r})"
            problems.append(f"{name} {problem}{shown}")
    problems += _joint_problems(values)
    if problems:
        raise SettingsError("; ".join(problems))
    _resolve(values, given)
    return Settings(**values)


def _joint_problems(values: Mapping[str, Any]) -> Iterable[str]:
    """What is wrong between variables that are each fine."""
    if values.get("allow_file_urls") and not values.get("file_url_roots"):
        yield "FILE_URL_ROOTS must name the allowed folders when ALLOW_FILE_URLS is 1"
    b2 = {"B2_KEY_ID": "b2_key_id", "B2_APP_KEY": "b2_app_key", "B2_BUCKET_NAME": "b2_bucket"}
    unset = [name for name, setting in b2.items() if not values.get(setting)]
    if 0 < len(unset) < len(b2):
        yield f"{' and '.join(unset)} must be set as well, or none of {', '.join(b2)}"
    for name in ("ORCHESTRATOR_BASE_URL", "BUFFER_ORCHESTRATOR_BASE_URL"):
        address = values.get("orchestrator_url" if name[0] == "O" else "buffer_orchestrator_url")
        if address and not re.fullmatch(r"https?://[^\s?#]+", address):
            yield f"{name} must be an http or https address without query"
    # It may be signed, so a query is fine here.
    if values.get("s3fd_url") and not re.fullmatch(r"https?://[^\s#]+", values["s3fd_url"]):
        yield "MUSETALK_S3FD_URL must be an http or https address"
    if not all(character.isprintable() and character.isascii() for character in values.get("internal_api_key") or ""):
        yield "INTERNAL_API_KEY must not hold control characters"
    base = values.get("public_base_url")
    if base and not re.fullmatch(r"https?://[^\s?#]+", base):
        yield "PUBLIC_BASE_URL must be an http or https address without query"


def _resolve(values: dict[str, Any], given: Mapping[str, str]) -> None:
    """Fill in what depends on the machine: folders are taken from the project's root, names from the host."""
    for name in ("models_dir", "output_dir", "work_dir", "avatar_dir", "unet_path", "unet_config_path"):
        if values[name] is not None:
            values[name] = (ROOT / values[name]).resolve()
    warnings: list[str] = []
    mode = values["worker_mode"].lower()
    if mode not in ("queue", "buffer"):
        warnings.append(f"WORKER_MODE is {mode!r}, which is no mode of this worker: queue mode is used")
        mode = "queue"
    if ignored := [name for name in LEGACY if name in given]:
        warnings.append(f"{', '.join(ignored)}: set, but of no use to this worker")
    values["warnings"] = tuple(warnings)
    values["worker_mode"] = "buffer" if values["buffer_worker_id"] else mode
    values["worker_id"] = values["buffer_worker_id"] or _worker_id(values["worker_mode"], given)
    for name in ("orchestrator_url", "buffer_orchestrator_url"):
        values[name] = values[name].rstrip("/")
    values["gpu_class"] = values["gpu_class"] or None
    values["public_base_url"] = (values["public_base_url"] or f"http://localhost:{values['port']}").rstrip("/")


def _worker_id(mode: str, given: Mapping[str, str]) -> str:
    """The worker's one name: set by a person, else by the platform, else the host's (protocol section 2)."""
    order = ["WORKER_ID", "SALAD_MACHINE_ID", "VAST_CONTAINERLABEL"]
    if mode == "queue":
        # Salad's name came first there, and its peers know the worker by it.
        order = ["SALAD_MACHINE_ID", "WORKER_ID", "VAST_CONTAINERLABEL"]
    host = socket.gethostname()
    return next((given[name] for name in order if name in given), f"buffer-{host}" if mode == "buffer" else host)


def bind_addresses(host: str, port: int, *, ipv6_only_file: Path = Path("/proc/sys/net/ipv6/bindv6only")) -> list[str]:
    """What Gunicorn should bind: `::` means IPv4 and IPv6, on machines without IPv6 too."""
    if host != "::":
        return [f"[{host}]:{port}" if ":" in host else f"{host}:{port}"]
    every_ipv4 = f"0.0.0.0:{port}"
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            probe.bind(("::", 0))
    except OSError:
        return [every_ipv4]
    try:
        is_ipv6_only = ipv6_only_file.read_text(encoding="ascii").strip() == "1"
    except OSError:
        is_ipv6_only = False
    return [every_ipv4, f"[::]:{port}"] if is_ipv6_only else [f"[::]:{port}"]


def main() -> int:
    """For run_worker.sh: what it must know, as lines `name=value`; returns the exit status (2: settings are wrong)."""
    try:
        settings = load_settings()
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"mode={settings.worker_mode}")
    print(f"port={settings.port}")
    print(f"queue_worker={settings.salad_queue_worker}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
