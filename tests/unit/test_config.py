"""Settings: every variable read, every problem reported at once, nothing secret shown."""

from __future__ import annotations

import socket
from dataclasses import fields
from pathlib import Path

import pytest

from musetalk.errors import SettingsError
from worker.config import (
    ROOT,
    VARIABLES,
    Settings,
    bind_addresses,
    exposure_problem,
    load_settings,
    port_problem,
)


def load(**environment: str) -> Settings:
    return load_settings(environment, env_file=None)


def test_defaults_need_no_environment() -> None:
    settings = load()
    assert settings.port == 8000
    assert settings.batch_size == 8
    assert settings.models_dir == ROOT / "models"
    assert settings.public_base_url == "http://localhost:8000"
    assert settings.worker_id
    assert settings.gpu_class is None


def test_empty_and_blank_mean_unset() -> None:
    assert load(BATCH_SIZE="", WORKER_PORT="  ", GPU_CLASS=" ") == load()


def test_all_problems_are_reported_at_once() -> None:
    with pytest.raises(SettingsError) as caught:
        load(BATCH_SIZE="eight", WORKER_PORT="0", VIDEO_CRF="99", MUSETALK_MODEL="v2", ALLOW_FILE_URLS="1")
    for name in ("BATCH_SIZE", "WORKER_PORT", "VIDEO_CRF", "MUSETALK_MODEL", "FILE_URL_ROOTS"):
        assert name in str(caught.value)


@pytest.mark.parametrize("text", ["8.5", "0", "257", "1e2", "٣", "0x8"])
def test_a_batch_size_that_is_no_whole_number_in_range_is_refused(text: str) -> None:
    if text == "٣":
        assert load(BATCH_SIZE=text).batch_size == 3  # a digit is a digit
        return
    with pytest.raises(SettingsError, match="BATCH_SIZE"):
        load(BATCH_SIZE=text)


def test_aliases_lose_against_the_name() -> None:
    assert load(GPU_CLASS_NAME="RTX 3090").gpu_class == "RTX 3090"
    assert load(GPU_CLASS_NAME="RTX 3090", GPU_CLASS="RTX 4090 (24 GB)").gpu_class == "RTX 4090 (24 GB)"


def test_the_environment_wins_over_the_file(tmp_path: Path) -> None:
    env_file = tmp_path / ".env"
    env_file.write_text("BATCH_SIZE=4\nVIDEO_CRF='20'\n# a comment\n", encoding="utf-8")
    settings = load_settings({"BATCH_SIZE": "2"}, env_file=env_file)
    assert (settings.batch_size, settings.video_crf) == (2, 20)


def test_another_file_may_be_named_or_none(tmp_path: Path) -> None:
    usual, other = tmp_path / ".env", tmp_path / "second.env"
    usual.write_text("BATCH_SIZE=4\n", encoding="utf-8")
    other.write_text("BATCH_SIZE=5\n", encoding="utf-8")
    sizes = [
        load_settings({"MUSETALK_ENV_FILE": named}, env_file=usual).batch_size for named in ("", "none", str(other))
    ]
    assert sizes == [4, load().batch_size, 5]
    with pytest.raises(SettingsError, match="MUSETALK_ENV_FILE names a file that does not exist"):
        load_settings({"MUSETALK_ENV_FILE": str(tmp_path / "third.env")}, env_file=usual)


def test_half_a_bucket_stops_the_start_and_names_what_is_missing() -> None:
    with pytest.raises(SettingsError, match="B2_APP_KEY and B2_BUCKET_NAME must be set"):
        load(B2_KEY_ID="id-of-a-key")
    assert not load().uses_b2


def test_secrets_are_shown_nowhere() -> None:
    settings = load(B2_KEY_ID="id-of-a-key", B2_APP_KEY="very-secret", B2_BUCKET_NAME="bucket")
    assert settings.uses_b2
    for text in (repr(settings), str(settings.describe())):
        assert "very-secret" not in text
        assert "id-of-a-key" not in text
        assert "bucket" in text


def test_each_setting_belongs_to_one_variable() -> None:
    names = [name for variable in VARIABLES for name in (variable.name, *variable.aliases)]
    assert len(names) == len(set(names))
    without = [item.name for item in fields(Settings) if "variable" not in item.metadata]
    assert without == ["warnings"]


def test_an_address_with_a_login_is_not_repeated_in_the_error() -> None:
    for name in ("ORCHESTRATOR_BASE_URL", "BUFFER_ORCHESTRATOR_BASE_URL", "PUBLIC_BASE_URL", "MUSETALK_S3FD_URL"):
        with pytest.raises(SettingsError, match=f"{name} must be an http or https address") as caught:
            load(**{name: "ftp://user:hidden@host/"})  # pragma: allowlist secret
        assert "hidden" not in str(caught.value)


def test_description_holds_json_values_only() -> None:
    import json

    described = json.dumps(load(DOWNLOAD_ALLOWED_HOSTS="a.example, *.b.example").describe())
    assert "*.b.example" in described


def test_the_worker_has_one_name_by_the_rule_of_its_mode() -> None:
    both = {"WORKER_ID": "mine", "SALAD_MACHINE_ID": "salad", "VAST_CONTAINERLABEL": "C.7"}
    assert load(**both).worker_id == "salad"
    assert load(WORKER_MODE="buffer", **both).worker_id == "mine"
    assert load(BUFFER_WORKER_ID="buffer-1", WORKER_MODE="queue", **both).worker_id == "buffer-1"
    assert load(VAST_CONTAINERLABEL="C.7").worker_id == "C.7"
    host = socket.gethostname()
    assert load().worker_id == host
    assert load(WORKER_MODE=" Buffer ").worker_id == f"buffer-{host}"


def test_variables_of_the_older_worker_do_no_harm() -> None:
    settings = load(USE_OPTIMIZED_INFERENCE="true", MUSETALK_WORKDIR="/app", PROVIDER="vast")
    assert not settings.is_buffer_mode
    assert any("USE_OPTIMIZED_INFERENCE, MUSETALK_WORKDIR, PROVIDER" in warning for warning in settings.warnings)


@pytest.mark.parametrize("mode", ["bufer", "main", "queue,buffer", "0"])
@pytest.mark.parametrize("more", [{}, {"BUFFER_WORKER_ID": "b-1"}])
def test_an_unknown_mode_stops_the_start_and_lists_both(mode: str, more: dict[str, str]) -> None:
    """Seen as a worker that claimed no job: `bufer` meant queue mode."""
    with pytest.raises(SettingsError, match="WORKER_MODE must be one of queue, buffer"):
        load(WORKER_MODE=mode, **more)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("BATCH_SIZ", "BATCH_SIZE"), ("batch_size", "BATCH_SIZE"), ("INTERNAL_KEY", "INTERNAL_API_KEY")],
)
def test_a_misspelt_name_in_the_file_is_named_with_the_nearest_setting(tmp_path: Path, name: str, nearest: str) -> None:
    env_file = tmp_path / ".env"
    env_file.write_text(f"{name}=4\nWORKER_PORT=9000\nPROVIDER=vast\n", encoding="utf-8")
    settings = load_settings({"SOMETHING_ELSE": "1"}, env_file=env_file)
    (warning,) = [text for text in settings.warnings if ".env" in text]
    assert warning.startswith(name)
    assert f"did you mean {nearest}?" in warning


def test_a_name_like_no_setting_is_named_alone(tmp_path: Path) -> None:
    env_file = tmp_path / ".env"
    env_file.write_text("FAVOURITE_COLOUR=blue\n", encoding="utf-8")
    (warning,) = load_settings({}, env_file=env_file).warnings
    assert "FAVOURITE_COLOUR" in warning
    assert "did you mean" not in warning


def test_a_port_in_use_is_named_with_its_setting() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        problem = port_problem("127.0.0.1", port, patience_s=0.3)
    assert problem is not None
    assert str(port) in problem
    assert "WORKER_PORT" in problem
    assert port_problem("127.0.0.1", port, patience_s=0.3) is None


def test_an_address_of_another_machine_is_named_with_its_setting() -> None:
    problem = port_problem("203.0.113.7", 8000, patience_s=0)
    assert problem is not None
    assert "WORKER_HOST" in problem


@pytest.mark.parametrize(
    ("host", "key", "is_open"),
    [
        ("::", "", True),
        ("0.0.0.0", "", True),
        ("192.168.1.7", "", True),
        ("a.example", "", True),
        ("::", "key", False),
        ("127.0.0.1", "", False),
        ("::1", "", False),
        ("localhost", "", False),
    ],
)
def test_a_server_open_to_others_without_a_key_is_a_loud_warning(host: str, key: str, is_open: bool) -> None:
    problem = exposure_problem(load(INTERNAL_API_KEY=key), host)
    assert (problem is not None) == is_open
    if problem is not None:
        assert "INTERNAL_API_KEY" in problem


def test_the_host_is_everyone_under_gunicorn_unless_it_is_set() -> None:
    assert load().listen_host == "::"
    assert load(WORKER_HOST="127.0.0.1").listen_host == "127.0.0.1"


def test_bodies_of_salad_fit_by_default() -> None:
    assert load().max_body_bytes >= 10_000_000


def test_a_key_from_a_file_loses_its_newline_and_none_may_hold_control_characters() -> None:
    assert load(INTERNAL_API_KEY="key-1\n").internal_api_key == "key-1"  # pragma: allowlist secret
    with pytest.raises(SettingsError, match="INTERNAL_API_KEY") as caught:
        load(INTERNAL_API_KEY="key\x07-secret")  # pragma: allowlist secret
    assert "secret" not in str(caught.value)


def test_the_default_host_means_every_address_of_either_family(tmp_path: Path) -> None:
    only = tmp_path / "bindv6only"
    only.write_text("1\n", encoding="ascii")
    addresses = bind_addresses("::", 8000, ipv6_only_file=tmp_path / "absent")
    assert addresses in (["[::]:8000"], ["0.0.0.0:8000"])
    if addresses == ["[::]:8000"]:
        assert bind_addresses("::", 8000, ipv6_only_file=only) == ["0.0.0.0:8000", "[::]:8000"]
    assert bind_addresses("127.0.0.1", 80) == ["127.0.0.1:80"]
    assert bind_addresses("::1", 80) == ["[::1]:80"]


def test_folders_do_not_depend_on_where_the_worker_was_started() -> None:
    """Seen as a second cache of prepared sources in the folder of whoever started the worker."""
    settings = load_settings({}, env_file=None)
    for folder in (settings.models_dir, settings.output_dir, settings.work_dir, settings.avatar_dir):
        assert folder.is_absolute()
