"""The environment and `.env` as one frozen `Settings`; the only reader of the environment. Knows no Flask, no torch.

Each setting is one line of `Settings`: type, variable, parser, meaning, default. `docs/configuration.md` and
`.env.example` are generated from it. An empty variable counts as unset; all problems are reported at once.
"""

from __future__ import annotations

import difflib
import errno
import ipaddress
import os
import re
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

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


def _choice(choices: Any) -> Callable[[str], str]:
    """A parser for the values of a `Literal` type."""
    allowed = get_args(choices)

    def parse(value: str) -> str:
        lowered = value.lower()
        if lowered not in allowed:
            raise ValueError(f"must be one of {', '.join(allowed)}")
        return lowered

    return parse


class _HiddenValueError(ValueError):
    """A problem with a value that may contain a login or a signature, so it is not repeated in the message."""


def _address(*, with_query: bool = False) -> Callable[[str], str]:
    """A parser for http(s) addresses; those that others are built from must not have a query."""
    pattern, suffix = (r"https?://[^\s#]+", "") if with_query else (r"https?://[^\s?#]+", " without query")

    def parse(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise _HiddenValueError(f"must be an http or https address{suffix}")
        return value

    return parse


def _segment(value: str) -> str:
    """A name that is one segment of a path."""
    if value in (".", "..") or not value.isprintable() or len(value) > 256:
        raise ValueError("must be a name of at most 256 printable characters, not . or ..")
    return value


def _key(value: str) -> str:
    """A secret that travels in an HTTP header."""
    if not (value.isprintable() and value.isascii()):
        raise _HiddenValueError("must not contain control characters or characters outside ASCII")
    return value


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


def _cards(value: str) -> tuple[str, ...]:
    """`all`, or cards by their numbers or UUIDs, each once."""
    if value.lower() == "all":
        return ("all",)
    cards = [part.strip() for part in value.split(",")]
    if not all(re.fullmatch(r"[0-9]{1,3}|(GPU|MIG)-[A-Za-z0-9-]+", card) for card in cards):
        raise ValueError("must be `all` or the numbers of cards, separated by commas, like 0,2")
    cards = [str(int(card)) if card.isdigit() else card for card in cards]
    if len(set(cards)) < len(cards):
        raise ValueError("must name each card once")
    return tuple(cards)


def _names(value: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in value.split(",") if part.strip())


@dataclass(frozen=True)
class Variable:
    """One environment variable: its name, how it is read, its default and its meaning."""

    name: str
    parse: Callable[[str], Any]
    meaning: str
    default: str = ""
    aliases: tuple[str, ...] = ()
    secret: bool = False


def variable(
    name: str,
    parse: Callable[[str], Any],
    meaning: str,
    default: str = "",
    *,
    aliases: tuple[str, ...] = (),
    secret: bool = False,
) -> Any:
    """A field of `Settings` that is read from the environment variable `name`; secrets stay out of `repr`."""
    row = Variable(name, parse, meaning, default, aliases, secret)
    return field(repr=not secret, metadata={"variable": row})


ENV_FILE = "MUSETALK_ENV_FILE"

ModeChoice = Literal["queue", "buffer"]
ModelChoice = Literal["auto", "v15", "v1", "demo"]
DeviceChoice = Literal["auto", "cpu", "cuda"]
DtypeChoice = Literal["auto", "float32", "float16", "bfloat16"]
AccelerationChoice = Literal["auto", "none", "graphs", "compile"]
GeometryChoice = Literal["source", "request"]
EncoderChoice = Literal["auto", "libx264", "h264_nvenc"]
AutoOrFlag = Literal["auto", "1", "0"]
X264Preset = Literal["ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow"]
PresetChoice = Literal["auto", "lean", X264Preset]
FaceSearchChoice = Literal["interval", "every_frame"]
LogLevel = Literal["debug", "info", "warning", "error"]

# Output frames in one pass of the networks on a CPU and on small cards.
DEFAULT_BATCH_SIZE = 8

# Variables of the previous worker: deployments still set them, and nothing depends on them any more.
LEGACY = ("USE_OPTIMIZED_INFERENCE", "MUSETALK_WORKDIR", "MUSETALK_RESULT_DIR", "WORKER_TYPE", "PROVIDER")


# fmt: off
@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of the process, checked. A new setting is one line here; documents and `.env.example` follow from it."""

    # HTTP server
    host: str = variable("WORKER_HOST", _text, "Address the HTTP server listens on; unset: `::`, every IPv4 and IPv6 address of the machine, and only `127.0.0.1` with `python app.py`.", "")
    port: int = variable("WORKER_PORT", _whole(1, 65535), "Port of the HTTP server.", "8000")
    graceful_timeout_s: float = variable("GRACEFUL_TIMEOUT_SEC", _seconds(1, 3600), "Time from SIGTERM to the end of the process; ten seconds before it a running job is stopped and returned as retryable (under 20 s: after half of it).", "120")
    playground: bool = variable("PLAYGROUND", _flag, "1 serves a page at `/` to try the worker on, and takes uploads; `python app.py` always does.", "0")
    max_body_bytes: int = variable("MAX_BODY_BYTES", _whole(1024, 2**30), "Largest request body; Salad sends up to 10 MB.", "10485760")
    upload_receive_timeout_s: float = variable("UPLOAD_RECEIVE_TIMEOUT_SEC", _seconds(1, 86400), "Time in which an upload of the page must arrive; other bodies have 30 s.", "600")
    start_wait_s: float = variable("START_WAIT_SEC", _seconds(0, 86400), "Longest time that `POST /generate` waits while the models load; 0 answers 503 at once.", "1800")
    allowed_hosts: tuple[str, ...] = variable("ALLOWED_HOSTS", _names, "Names (comma-separated, `*.suffix` allowed) by which callers without a key may address this server, beside `localhost`, IP addresses, this machine's name and PUBLIC_BASE_URL.", "")
    # Model
    model: ModelChoice = variable("MUSETALK_MODEL", _choice(ModelChoice), "Which weights to run; `auto` takes v1.5, else v1.0, else fetches v1.5 or, without any official file, runs the demo model.", "auto")
    models_dir: Path = variable("MUSETALK_MODELS_DIR", _path, "Folder with the official `models/` layout.", "models")
    fetch_weights: AutoOrFlag = variable("MUSETALK_FETCH_WEIGHTS", _auto_or_flag, "Whether missing official weights are fetched at start; `auto`: only when the worker runs on a GPU.", "auto")
    s3fd_url: str = variable("MUSETALK_S3FD_URL", _address(with_query=True), "Another address for the S3FD file, which is not on the hub; unset: its author's site.", "")
    unet_path: Path | None = variable("MUSETALK_UNET_MODEL_PATH", _path, "Another UNet weights file than the layout's.")
    restorer_path: Path | None = variable("MUSETALK_RESTORER", _path, "Weights of a face restorer (GFPGAN, RestoreFormer, …) for `params.restore`; needs `requirements-restorer.txt`.")
    unet_config_path: Path | None = variable("MUSETALK_UNET_CONFIG", _path, "Another UNet configuration file than the layout's.")
    device: DeviceChoice = variable("MUSETALK_DEVICE", _choice(DeviceChoice), "Where the networks run; `auto` uses the GPU when there is one.", "auto")
    worker_gpus: tuple[str, ...] = variable("WORKER_GPUS", _cards, "Several cards in one machine, in buffer mode: `all`, or numbers as in `nvidia-smi`, like `0,2`. `run_worker.sh` starts a worker for each, on the ports after WORKER_PORT; unset: one worker.", "")
    dtype: DtypeChoice = variable("MUSETALK_DTYPE", _choice(DtypeChoice), "Precision of the networks; `auto` is float16 on a GPU with tensor cores, bfloat16 on a CPU with instructions for it, else float32.", "auto")
    acceleration: AccelerationChoice = variable("MUSETALK_ACCELERATION", _choice(AccelerationChoice), "On a GPU: `graphs` captures the networks as CUDA graphs, `compile` runs torch's compiler (minutes at start; needs a C compiler), `none` runs them as they are; `auto` is graphs on a GPU, and the plain networks where the capture fails.", "auto")
    device_pixels: AutoOrFlag = variable("DEVICE_PIXELS", _auto_or_flag, "1 cuts and pastes faces with tensor operations on the device of the networks; `auto` does so on a GPU.", "auto")
    face_search: FaceSearchChoice = variable("FACE_SEARCH", _choice(FaceSearchChoice), "How often the official face detector looks at a source: `interval` every 8 to 16 frames and wherever the landmarks leave a doubt, `every_frame` always, as the original.", "interval")
    cpu_threads: int = variable("MUSETALK_CPU_THREADS", _whole(0, 256), "Threads of tensor work on the CPU; 0 chooses one on a GPU, else all cores, and fewer while others want them.", "0")
    min_gpu_memory_mb: int = variable("MIN_GPU_MEMORY_MB", _whole(0, 10_000_000), "GPU memory that must be free at start; 0 does not check.", "4096")
    wanted_batch_size: int | None = variable("BATCH_SIZE", _whole(1, 256), "Output frames computed in one pass of the networks; unset: 8, on a GPU with 24 GB or more 16, with 40 GB or more 32.", "")
    # Media
    output_geometry: GeometryChoice = variable("OUTPUT_GEOMETRY", _choice(GeometryChoice), "`source` keeps the source's size; `request` honours a job's aspect_ratio and resolution.", "source")
    video_encoder: EncoderChoice = variable("VIDEO_ENCODER", _choice(EncoderChoice), "H.264 encoder; `auto` tries NVENC with a real test encode on a GPU, else x264.", "auto")
    video_preset: PresetChoice = variable("VIDEO_PRESET", _choice(PresetChoice), "x264 preset: speed against size; `lean` takes half the time of `veryfast` for files 5 to 10 % larger. `auto`: lean on a card without NVENC, else veryfast.", "auto")
    video_crf: int = variable("VIDEO_CRF", _whole(0, 51), "x264 quality: smaller is better and larger files.", "16")
    video_threads: int = variable("VIDEO_THREADS", _whole(0, 64), "Threads of x264; 0 chooses the cores that this worker may use but one, at most 16.", "0")
    max_video_bytes: int = variable("MAX_VIDEO_BYTES", _whole(1, 2**40), "Largest source file that is downloaded.", "524288000")
    max_audio_bytes: int = variable("MAX_AUDIO_BYTES", _whole(1, 2**40), "Largest audio file that is downloaded.", "104857600")
    max_audio_s: float = variable("MAX_AUDIO_SEC", _seconds(1, 86400), "Longest audio that is rendered.", "900")
    max_output_frames: int = variable("MAX_OUTPUT_FRAMES", _whole(1, 10_000_000), "Most frames one job may produce.", "27000")
    max_source_side: int = variable("MAX_SOURCE_SIDE_PX", _whole(64, 16384), "Longest side of a source picture.", "4096")
    frame_memory_mb: int = variable("FRAME_MEMORY_MB", _whole(16, 1_048_576), "Memory for source frames kept for the way back (ping-pong); beyond it they go to a scratch file.", "512")
    scratch_disk_mb: int = variable("SCRATCH_DISK_MB", _whole(0, 16_777_216), "Disk for that scratch file.", "16384")
    avatar_memory_mb: int = variable("AVATAR_MEMORY_MB", _whole(0, 1_048_576), "Memory for prepared sources (faces, latents, masks) kept for later jobs; 0 keeps none in memory.", "512")
    avatar_disk_mb: int = variable("AVATAR_DISK_MB", _whole(0, 16_777_216), "Disk for prepared sources, kept over restarts; 0 keeps none on disk.", "2048")
    avatar_dir: Path = variable("AVATAR_DIR", _path, "Folder for prepared sources; workers of one machine may share it.", "avatars")
    # Limits of a job
    job_timeout_s: float = variable("JOB_TIMEOUT_SEC", _seconds(1, 604_800), "Limit for one whole job; it then fails as retryable.", "3600")
    inference_timeout_s: float = variable("INFERENCE_TIMEOUT_SEC", _seconds(1, 604_800), "Limit for each of the stages preprocessing, inference and postprocessing.", "1800")
    min_free_disk_mb: int = variable("MIN_FREE_DISK_MB", _whole(0, 2**40), "Disk that must be free in WORK_DIR and OUTPUT_DIR at start, and in WORK_DIR before each job.", "1024")
    # Where files come from and go to
    allow_file_urls: bool = variable("ALLOW_FILE_URLS", _flag, "1 lets a job name local files as `file:` addresses (tests, closed machines).", "0")
    file_url_roots: tuple[Path, ...] = variable("FILE_URL_ROOTS", _paths, "Folders (separated by `:`) that `file:` addresses may point into; required with ALLOW_FILE_URLS.", "")
    allow_private_networks: bool = variable("ALLOW_PRIVATE_NETWORKS", _flag, "1 lets downloads reach loopback and private addresses (tests, closed networks).", "0")
    download_allowed_hosts: tuple[str, ...] = variable("DOWNLOAD_ALLOWED_HOSTS", _names, "Hosts (comma-separated, `*.suffix` allowed) that downloads may reach; unset: any public host.", "")
    download_timeout_s: float = variable("DOWNLOAD_TIMEOUT_SEC", _seconds(1, 86400), "Limit for one whole download, retries included.", "300")
    output_dir: Path = variable("OUTPUT_DIR", _path, "Folder for finished files without a bucket; the worker serves it at `/outputs/<name>`.", "outputs")
    public_base_url: str = variable("PUBLIC_BASE_URL", _address(), "Address by which callers reach this server; unset: `http://localhost:<port>`.", "")
    work_dir: Path = variable("WORK_DIR", _path, "Folder for the files of running jobs; one worker per folder. Old jobs are removed at start.", "work")
    b2_key_id: str = variable("B2_KEY_ID", _text, "Backblaze B2 key id; with the two below, finished files go to the bucket.", "", secret=True)
    b2_app_key: str = variable("B2_APP_KEY", _text, "Backblaze B2 application key.", "", secret=True)
    b2_bucket: str = variable("B2_BUCKET_NAME", _text, "Backblaze B2 bucket.", "")
    b2_prefix: str = variable("B2_PREFIX", _text, "Folder in the bucket.", "avatar/outputs")
    b2_realm: str = variable("B2_REALM", _text, "B2 realm, or the address of a B2-compatible service.", "production")
    b2_link_lifetime_s: int = variable("B2_LINK_LIFETIME_SEC", _whole(1, 604_800), "How long the link to a file in a private bucket is valid.", "604800")
    upload_timeout_s: float = variable("UPLOAD_TIMEOUT_SEC", _seconds(1, 86400), "Limit for one whole upload, retries included.", "300")
    # How jobs arrive
    worker_mode: ModeChoice = variable("WORKER_MODE", _choice(ModeChoice), "`queue`: jobs are posted to `/generate`; `buffer`: the worker claims them from the orchestrator.", "queue")
    buffer_worker_id: str = variable("BUFFER_WORKER_ID", _segment, "Name of this worker; setting it selects buffer mode.", "")
    orchestrator_url: str = variable("ORCHESTRATOR_BASE_URL", _address(), "Address of the orchestrator, for progress and (buffer mode) for jobs.", "")
    buffer_orchestrator_url: str = variable("BUFFER_ORCHESTRATOR_BASE_URL", _address(), "Another orchestrator address for the calls of buffer mode.", "")
    internal_api_key: str = variable("INTERNAL_API_KEY", _key, "Sent to the orchestrator as `X-Internal-API-Key`, and required in the same header from callers on other machines.", "", secret=True)
    orchestrator_proxy: str = variable("ORCHESTRATOR_PROXY", _address(), "HTTP proxy for the calls to the orchestrator, which use neither the proxies of the environment nor `.netrc`; the proxy of an `http` orchestrator sees the key.", "", secret=True)
    orchestrator_ca_file: Path | None = variable("ORCHESTRATOR_CA_FILE", _path, "Certificates (PEM) that prove the orchestrator's name; unset: those of public authorities.", "", aliases=("REQUESTS_CA_BUNDLE",))
    buffer_poll_interval_s: float = variable("BUFFER_POLL_INTERVAL_SEC", _seconds(0.05, 3600), "Pause between two claims when there is no job.", "10", aliases=("POLL_INTERVAL_SEC",))
    buffer_capacity: int = variable("BUFFER_CAPACITY", _whole(1, 1000), "Capacity sent in the heartbeat; the worker always runs one job at a time.", "1")
    salad_queue_worker: str = variable("SALAD_QUEUE_WORKER", _text, "Salad's queue binary; `run_worker.sh` starts it in queue mode when it is installed.", "salad-http-job-queue-worker")
    config_label: str = variable("CONFIG_LABEL", _text, "Free text, sent with every progress report.", "default")
    # Who this worker is
    worker_id: str = variable("WORKER_ID", _segment, "Name of this worker in logs and reports; unset: the host's name.", "", aliases=("SALAD_MACHINE_ID", "VAST_CONTAINERLABEL"))
    gpu_class: str | None = variable("GPU_CLASS", _text, "GPU class echoed in metrics; unset: `unknown`.", "", aliases=("GPU_CLASS_NAME",))
    log_level: LogLevel = variable("LOG_LEVEL", _choice(LogLevel), "Lowest severity that is logged.", "info")
    env_file: str = variable(ENV_FILE, _text, "In the environment only: the file read instead of `.env`, so that several workers share one checkout; `none`: no file.", ".env")

    # Set, but without effect or not understood; logged at start.
    warnings: tuple[str, ...] = field(default=())
    # fmt: on

    @property
    def batch_size(self) -> int:
        """Output frames in one pass of the networks, unless the card's memory chooses them (`wanted_batch_size`)."""
        return self.wanted_batch_size or DEFAULT_BATCH_SIZE

    @property
    def is_buffer_mode(self) -> bool:
        """Whether jobs are claimed from the orchestrator instead of posted to `/generate`."""
        return self.worker_mode == "buffer" or bool(self.buffer_worker_id)

    @property
    def listen_host(self) -> str:
        """Address that the server under Gunicorn listens on."""
        return self.host or "::"

    @property
    def uses_b2(self) -> bool:
        """Whether finished files go to a bucket."""
        return bool(self.b2_bucket)

    def describe(self) -> dict[str, object]:
        """The settings as JSON values for the log at start; a secret shows only whether it is set."""
        shown: dict[str, object] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            row = item.metadata.get("variable")
            if row is not None and row.secret:
                value = "set" if value else "unset"
            elif isinstance(value, Path):
                value = str(value)
            elif isinstance(value, tuple):
                value = [str(part) for part in value]
            shown[item.name] = value
        return shown


# Name of the setting -> its variable, in the order of the documents.
_ROWS: dict[str, Variable] = {item.name: item.metadata["variable"] for item in fields(Settings) if item.metadata}
VARIABLES: tuple[Variable, ...] = tuple(_ROWS.values())
_KNOWN = frozenset([*(name for row in _ROWS.values() for name in (row.name, *row.aliases)), *LEGACY])
# Unset settings of these types are empty, those of all other types None.
_UNSET: dict[str, Any] = {"str": "", "tuple[Path, ...]": (), "tuple[str, ...]": ()}


def load_settings(environment: Mapping[str, str] | None = None, env_file: Path | None = ROOT / ".env") -> Settings:
    """Read the settings from the environment, then from `env_file`, then from the defaults.

    MUSETALK_ENV_FILE names another file, or `none`. Raises SettingsError that lists every wrong variable, with its
    value unless that may contain a credential.
    """
    environment = os.environ if environment is None else environment
    given = {name: value.strip() for name, value in _read_env_file(environment, env_file).items()}
    mistakes = [_mistake(name) for name in given if name not in _KNOWN]
    given.update({name: value.strip() for name, value in environment.items() if value.strip()})
    values: dict[str, Any] = {}
    problems: list[str] = []
    for setting, row in _ROWS.items():
        name = next((n for n in (row.name, *row.aliases) if n in given), row.name)
        text = given.get(name, row.default)
        if not text:
            values[setting] = _UNSET.get(Settings.__annotations__[setting])
            continue
        try:
            values[setting] = row.parse(text)
        except ValueError as problem:
            is_hidden = row.secret or isinstance(problem, _HiddenValueError)
            problems.append(f"{name} {problem}" + ("" if is_hidden else f" (it is {text!r})"))
    problems += _joint_problems(values)
    if problems:
        raise SettingsError("; ".join(problems))
    _resolve(values, given)
    values["warnings"] = (*values["warnings"], *mistakes)
    return Settings(**values)


def _mistake(name: str) -> str:
    """The warning about a name in `.env` that is no setting; nobody else reads the file."""
    nearest = difflib.get_close_matches(name.upper(), _KNOWN, n=1, cutoff=0.75)
    hint = f"; did you mean {nearest[0]}?" if nearest else ""
    return f"{name} in the .env file is not a setting of this worker and has no effect{hint}"


def _read_env_file(environment: Mapping[str, str], env_file: Path | None) -> dict[str, str]:
    """The non-empty lines of the file in use; raises SettingsError when the environment names one that is missing."""
    if env_file is not None and (named := environment.get(ENV_FILE, "").strip()):
        env_file = None if named == "none" else ROOT / named
        if env_file is not None and not env_file.is_file():
            raise SettingsError(f"{ENV_FILE} names a file that does not exist")
    if env_file is None or not env_file.is_file():
        return {}
    return {name: value for name, value in dotenv_values(env_file).items() if value and value.strip()}


def _joint_problems(values: Mapping[str, Any]) -> Iterable[str]:
    """Problems between variables that are each valid."""
    if values.get("allow_file_urls") and not values.get("file_url_roots"):
        yield "FILE_URL_ROOTS must name the allowed folders when ALLOW_FILE_URLS is 1"
    b2 = {_ROWS[setting].name: values.get(setting) for setting in ("b2_key_id", "b2_app_key", "b2_bucket")}
    unset = [name for name, value in b2.items() if not value]
    if 0 < len(unset) < len(b2):
        yield f"{' and '.join(unset)} must be set as well, or none of {', '.join(b2)}"


def _resolve(values: dict[str, Any], given: Mapping[str, str]) -> None:
    """Complete values that depend on the machine: folders are relative to the project's root, names come from the host."""
    for name in ("models_dir", "output_dir", "work_dir", "avatar_dir", "unet_path", "unet_config_path", "restorer_path"):
        if values[name] is not None:
            values[name] = (ROOT / values[name]).resolve()
    warnings: list[str] = []
    if ignored := [name for name in LEGACY if name in given]:
        warnings.append(f"{', '.join(ignored)}: set, but this worker does not use it")
    values["warnings"] = tuple(warnings)
    if values["buffer_worker_id"]:
        values["worker_mode"] = "buffer"
    values["worker_id"] = values["buffer_worker_id"] or _worker_id(values["worker_mode"], given)
    for name in ("orchestrator_url", "buffer_orchestrator_url"):
        values[name] = values[name].rstrip("/")
    values["gpu_class"] = values["gpu_class"] or None
    values["public_base_url"] = (values["public_base_url"] or f"http://localhost:{values['port']}").rstrip("/")


def _worker_id(mode: str, given: Mapping[str, str]) -> str:
    """The worker's one name: set by a person, else by the platform, else the host's (docs/protocol.md#worker-id)."""
    order = ["WORKER_ID", "SALAD_MACHINE_ID", "VAST_CONTAINERLABEL"]
    if mode == "queue":
        # In queue mode the orchestrator knows the worker by Salad's name, so that one counts first.
        order = ["SALAD_MACHINE_ID", "WORKER_ID", "VAST_CONTAINERLABEL"]
    host = socket.gethostname()
    return next((given[name] for name in order if name in given), f"buffer-{host}" if mode == "buffer" else host)


def bind_addresses(host: str, port: int, *, ipv6_only_file: Path = Path("/proc/sys/net/ipv6/bindv6only")) -> list[str]:
    """Addresses for Gunicorn to bind: `::` means IPv4 and IPv6, also on machines without IPv6."""
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


def port_problem(host: str, port: int, *, patience_s: float = 5.0) -> str | None:
    """Return why no server can listen on `host` and `port`, or None; a server that is just ending gets `patience_s`."""
    ends = time.monotonic() + patience_s
    while True:
        problem = next(filter(None, (_bind_problem(address) for address in bind_addresses(host, port))), None)
        if problem is None or time.monotonic() > ends:
            return problem
        time.sleep(0.2)


def _bind_problem(address: str) -> str | None:
    host, _, port = address.rpartition(":")
    try:
        family, kind, protocol, _name, place = socket.getaddrinfo(
            host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return f"port {port} is in use by another program; stop that one, or set WORKER_PORT to a free port"
        return f"the server cannot listen on {address} ({error.strerror}); check WORKER_HOST and WORKER_PORT"
    return None


def is_loopback(host: str) -> bool:
    """Whether only programs on this machine reach a server that listens on `host`."""
    try:
        return ipaddress.ip_address(host.strip("[]").partition("%")[0]).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def exposure_problem(settings: Settings, host: str) -> str | None:
    """Return the warning about a server on `host` that other machines can use without a key, or None."""
    if settings.internal_api_key or is_loopback(host):
        return None
    return (
        "ANYONE WHO REACHES THIS SERVER CAN USE IT: INTERNAL_API_KEY is not set, and it listens on "
        f"{host}, port {settings.port}; set INTERNAL_API_KEY, or WORKER_HOST=127.0.0.1"
    )
