"""Several cards in one machine: which are chosen, the settings of each worker, and how the summary adds them up."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from musetalk.errors import SettingsError
from tests.support.cards import pretend_cards
from tests.support.server import wait_until
from worker.cli.cards import InstalledCard, card_workers, choose_cards, installed_cards
from worker.cli.fleet import Child
from worker.cli.summary import joined_metrics, summary
from worker.config import load_settings

THREE = [InstalledCard("0", "GPU-aa-00"), InstalledCard("1", "GPU-bb-11"), InstalledCard("2", "GPU-cc-22")]


def choose(text: str, visible: str | None = None, installed: list[InstalledCard] | None = None) -> list[str]:
    settings = load_settings({"WORKER_GPUS": text}, env_file=None)
    return choose_cards(settings.worker_gpus, visible, lambda: THREE if installed is None else installed)


def test_the_cards_that_the_variable_names_are_chosen() -> None:
    assert choose("all") == choose(" ALL ") == ["0", "1", "2"]
    assert choose("0,2") == choose("0, 02") == ["0", "2"]
    assert choose("2,0") == ["2", "0"]
    assert choose("GPU-bb-11,0") == ["GPU-bb-11", "0"]
    assert choose("MIG-1234-ab") == ["MIG-1234-ab"]


def test_what_the_platform_hides_stays_hidden() -> None:
    assert choose("all", "2,3") == ["2", "3"]
    assert choose("all", "GPU-cc-22") == ["GPU-cc-22"]
    assert choose("3", "2,3") == ["3"]


@pytest.mark.parametrize(
    ("text", "visible", "reason"),
    [
        ("0,", None, "numbers of cards, separated by commas"),
        ("0 1", None, "numbers of cards"),
        ("-1", None, "numbers of cards"),
        ("0-3", None, "numbers of cards"),
        ("two", None, "numbers of cards"),
        ("all,0", None, "numbers of cards"),
        ("1,0,01", None, "each card once"),
        ("0,GPU-aa-00", None, "twice"),
        ("0,7", None, "names card 7; this machine has 0, 1, 2"),
        ("GPU-dd-33", None, "names card GPU-dd-33"),
        ("1", "0", "names card 1; this machine has 0"),
        ("all", "", "CUDA_VISIBLE_DEVICES hides every card"),
        ("all", "-1", "CUDA_VISIBLE_DEVICES hides every card"),
    ],
)
def test_a_wrong_list_is_one_error_that_names_the_variable(text: str, visible: str | None, reason: str) -> None:
    with pytest.raises(SettingsError, match="WORKER_GPUS") as caught:
        choose(text, visible)
    assert reason in caught.value.message
    assert "\n" not in caught.value.message


def test_a_machine_without_a_card_is_refused_by_name() -> None:
    for text in ("all", "0"):
        with pytest.raises(SettingsError, match="WORKER_GPUS is set, but this machine has no NVIDIA card"):
            choose(text, installed=[])


def test_the_cards_are_those_that_nvidia_smi_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", pretend_cards(tmp_path / "query", 2))
    assert [card.number for card in installed_cards()] == ["0", "1"]
    monkeypatch.setenv("PATH", pretend_cards(tmp_path / "list", 2, only_list=True))
    assert [(card.number, card.uuid[:4]) for card in installed_cards()] == [("0", "GPU-"), ("1", "GPU-")]


def test_without_nvidia_smi_the_device_files_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("nvidia3", "nvidia7", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / name).touch()
    assert [card.number for card in installed_cards(tmp_path)] == ["0", "1"]
    assert installed_cards(tmp_path / "nowhere") == []


def test_each_worker_has_a_port_a_folder_and_a_name_of_its_own(tmp_path: Path) -> None:
    environment = {"WORKER_MODE": "buffer", "WORKER_ID": "vast-17", "WORKER_PORT": "9000", "WORK_DIR": str(tmp_path)}
    workers = card_workers(load_settings(environment, env_file=None), ["0", "2"], environment)
    assert [(each.port, each.worker_id) for each in workers] == [(9001, "vast-17-0"), (9002, "vast-17-2")]
    for each in workers:
        own = load_settings({**environment, **each.variables}, env_file=None)
        assert own.work_dir == tmp_path / f"card-{each.card}"
        assert each.variables["CUDA_VISIBLE_DEVICES"] == each.card
        assert own.is_buffer_mode
        assert own.video_threads >= 1


def test_ports_beyond_the_last_one_are_an_error_that_names_the_variable() -> None:
    settings = load_settings({"WORKER_PORT": "65534", "WORKER_MODE": "buffer"}, env_file=None)
    with pytest.raises(SettingsError, match="WORKER_PORT 65534 leaves no 2 ports"):
        card_workers(settings, ["0", "1"], {})


def test_a_server_that_fails_at_once_is_started_less_and_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    child, lines, now = Child("card 0", ["-c", "raise SystemExit(3)"], {}), list[str](), 1000.0
    monkeypatch.setattr("worker.cli.fleet.time.monotonic", lambda: now)
    pauses = []
    for _ in range(8):
        child.revive(lines.append)
        ends = time.perf_counter() + 30
        while child.is_alive:
            assert time.perf_counter() < ends
        child.revive(lines.append)
        started = now
        while not child.is_alive and now - started < 100:
            now += 0.5
            child.revive(lines.append)
        pauses.append(now - started)
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60]
    assert "card 0: the server ended with status 3; it starts again in 4 s" in lines
    child.end(10)


def test_a_server_ends_with_the_program_that_started_it(tmp_path: Path) -> None:
    """Seen as servers that kept their ports and their cards after run_worker.sh was killed."""
    from tests.support.cards import is_running, run_and_kill

    pid = run_and_kill(
        f"""
import sys, time
from worker.cli.fleet import Child
sleeper = "import time, pathlib; pathlib.Path({str(tmp_path / "up")!r}).touch(); time.sleep(600)"
child = Child("card 0", ["-c", sleeper], {{}})
child.start()
print(child.pid, flush=True)
time.sleep(600)
""",
        wait_for=tmp_path / "up",
        python=sys.executable,
    )
    wait_until(lambda: not is_running(pid), 30)


def test_the_summary_is_healthy_while_one_card_is() -> None:
    good = {"card": "0", "status": "ok", "model": "v15", "busy": True}
    lost = {"card": "1", "status": "failed", "reason": "the GPU failed"}
    away = {"card": "2", "status": "unreachable", "reason": "no answer"}
    loading = {"card": "3", "status": "starting", "reason": "the models are loading"}
    both = summary([good, lost, away])
    assert (both["status"], both["healthy"], [card["card"] for card in both["cards"]]) == ("ok", 1, ["0", "1", "2"])
    none = summary([lost, away])
    assert (none["status"], none["healthy"]) == ("failed", 0)
    assert none["reason"] == "card 1: the GPU failed; card 2: no answer"
    assert summary([lost, loading])["status"] == "starting"
    assert summary([away])["status"] == "unreachable"


def test_the_metrics_of_all_cards_are_one_valid_text() -> None:
    from prometheus_client.parser import text_string_to_metric_families

    text = (
        "# HELP jobs_total Jobs.\n# TYPE jobs_total counter\n"
        'jobs_total{result="succeeded, \\"all\\" } of them"} 3.0\njobs_total{result="failed"} 0.0\n'
        "# HELP up_s Seconds.\n# TYPE up_s gauge\nup_s 1.5e+09\n"
    )
    joined = joined_metrics([("0", text), ("2", text.replace("3.0", "4.0")), ("5", None)])
    assert joined.count("# TYPE jobs_total counter") == 1
    families = {family.name: family.samples for family in text_string_to_metric_families(joined)}
    assert [(sample.labels["card"], sample.value) for sample in families["musetalk_card_up"]] == [
        ("0", 1),
        ("2", 1),
        ("5", 0),
    ]
    jobs = [(sample.labels["card"], sample.labels["result"][:4], sample.value) for sample in families["jobs"]]
    assert jobs == [("0", "succ", 3), ("0", "fail", 0), ("2", "succ", 4), ("2", "fail", 0)]
    assert [(sample.labels, sample.value) for sample in families["up_s"]] == [
        ({"card": "0"}, 1.5e9),
        ({"card": "2"}, 1.5e9),
    ]
