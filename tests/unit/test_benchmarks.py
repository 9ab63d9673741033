"""The benchmarks' own parts, on the CPU with tiny networks: what a first run on a card must not stumble over."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import card, correctness, wheels
from benchmarks.encoders import compare, encode, encoder_rows, settings_to_compare
from benchmarks.material import camera_frames
from musetalk.media import EncoderSettings
from tests.support.outside import GOLDEN_DIR
from worker.config import ROOT

CPU = torch.device("cpu")


def small_card(folder: Path, **changes: object) -> card.Card:
    """A card's measurement in small: tiny networks on the CPU, the smallest of everything."""
    fields: dict[str, object] = {
        "batches": (1, 2),
        "dtypes": ("bfloat16", "float32"),
        "forms": ("none",),
        "sizes": ("720p",),
        "seconds": 0.2,
        "n_jobs": 3,
        "job_batch": 2,
        "n_encoded": 3,
        **changes,
    }
    return card.Card(CPU, "tiny", folder, time.monotonic() + 600, **fields)  # type: ignore[arg-type]


def test_every_part_runs_and_its_results_are_rows_and_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The peak of a matrix product takes minutes in bfloat16 on a CPU without instructions for it.
    monkeypatch.setattr(card, "matmul_tflops", lambda *_: 1.0)
    threads = torch.get_num_threads()
    measured, saved = small_card(tmp_path), list[str]()
    try:
        card.run_parts(measured, list(card.PARTS), lambda: saved.append(card.as_markdown(measured)))
    finally:
        torch.set_num_threads(threads)
    # Memory of a process on a CPU is not flat over its first jobs.
    assert [
        (check.name, check.detail) for check in measured.checks if not check.is_right and "memory" not in check.name
    ] == []
    assert len(saved) == len(card.PARTS)
    assert {(rate.dtype, rate.batch) for rate in measured.rates} == {
        ("bfloat16", 1),
        ("bfloat16", 2),
        ("float32", 1),
        ("float32", 2),
    }
    assert [(job.kind, job.n_frames, job.reused) for job in measured.jobs] == [("new", 5, 0), ("prepared", 5, 5)]
    assert [check.detail for check in measured.checks if check.name.startswith("launches")] == ["3 launches, 5 frames"]
    assert any(check.name == "reserved memory after 3 jobs" for check in measured.checks)
    assert measured.left_out == ["golden vectors: GOLDEN_DIR is not set"]
    facts = json.loads(json.dumps(card.as_json(measured)))
    assert facts["jobs"][0]["fps"] > 0
    rows = saved[-1]
    for text in (
        "| source latents, bfloat16 | right |",
        "| float32 | none | 2 |",
        "| 720p, prepared | 5 |",
        "S3FD 720p",
    ):
        assert text in rows


def test_a_part_that_fails_is_a_wrong_check_and_the_others_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_card: card.Card) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    monkeypatch.setitem(card.PARTS, "faces", (fail, 0))
    measured = small_card(tmp_path)
    card.run_parts(measured, ["faces", "goldens"], lambda: None)
    (check,) = measured.checks
    assert (check.is_right, check.detail) == (
        False,
        "RuntimeError: CUDA error: an illegal memory access was encountered",
    )
    assert measured.left_out == ["golden vectors: GOLDEN_DIR is not set"]


def test_a_machine_without_a_card_is_one_line_and_a_status(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a card")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.card", "--out", str(tmp_path / "out")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout) == (card.NO_CARD, "")
    assert done.stderr == "error: torch sees no CUDA device here; this benchmark is about one\n"
    assert not (tmp_path / "out").exists()


def test_the_rows_replace_those_of_the_last_run() -> None:
    text = (ROOT / "benchmarks/RESULTS.md").read_text(encoding="utf-8")
    once = card.with_rows(text, "| a |\n")
    assert card.with_rows(once, "| b |\n") == once.replace("| a |", "| b |")
    with pytest.raises(ValueError, match="no place"):
        card.with_rows("# Results\n", "| a |\n")


def test_golden_checks_run_on_another_device_than_they_are_written_for(tmp_path: Path) -> None:
    """Nothing is computed on the meta device: what reaches it without an error was sent there."""
    from tests.golden import check_generator

    seen: list[torch.device] = []

    class Module:
        CPU = CPU

        @staticmethod
        def filled() -> torch.nn.Module:
            return torch.nn.Linear(2, 2)

    meta = torch.device("meta")
    with correctness.checks_on(meta, [Module, check_generator]):
        assert meta == Module.CPU == check_generator.CPU
        array = torch.from_numpy(np.ones((1, 2), np.float32))
        seen += [array.device, Module.filled()(array).device]
        assert torch.backends.cudnn.allow_tf32 is False
    assert [device.type for device in seen] == ["meta", "meta"]
    assert Module.CPU == CPU
    assert torch.from_numpy(np.ones(1)).numpy().tolist() == [1.0]


def test_a_golden_vector_that_differs_is_a_wrong_check(tmp_path: Path) -> None:
    np.savez(tmp_path / "posenc.npz", table=np.ones((2, 4), np.float32))
    np.savez(tmp_path / "unknown.npz", x=np.ones(1))
    checks = {check.name: check for check in correctness.check_goldens(tmp_path, CPU)}
    assert [check.is_right for check in checks.values()] == [False, False]
    assert "no known family" in checks["unknown"].detail
    late = correctness.check_goldens(tmp_path, CPU, lambda: False)
    assert {check.detail for check in late} == {"not run: no time left"}


@pytest.mark.skipif(GOLDEN_DIR is None, reason="GOLDEN_DIR is not set")
def test_small_golden_vectors_pass_by_the_way_of_the_card(tmp_path: Path) -> None:
    assert GOLDEN_DIR is not None
    for name in ("posenc.npz", "simcc_decode.npz", "audio_windows.npz"):
        (tmp_path / name).symlink_to(GOLDEN_DIR / name)
    assert [(check.name, check.is_right) for check in correctness.check_goldens(tmp_path, CPU)] == [
        ("audio_windows", True),
        ("simcc_decode", True),
        ("posenc", True),
    ]


def test_memory_that_grows_with_every_job_is_found() -> None:
    assert correctness.check_flat([900, 1000, 1000, 1000, 1010, 1000]).is_right
    assert not correctness.check_flat([1000 + 10 * number for number in range(40)]).is_right
    assert correctness.check_flat([1000]).is_right


def test_values_that_are_off_or_not_finite_are_wrong() -> None:
    right = torch.ones(4)
    for got in (right + 0.5, torch.full((4,), float("nan"))):
        check = correctness.timed_check("x", lambda got=got: correctness._close(got, right, "float16"))  # type: ignore[misc]
        assert not check.is_right
    assert correctness.timed_check("x", lambda: correctness._close(right + 1e-4, right, "float16")).is_right


def test_missing_packages_come_from_the_wheels_or_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("requirements.txt", "requirements-torch.txt", "requirements-nodeps.txt"):
        (tmp_path / name).write_text("# none\n", encoding="utf-8")
    wheels.add_missing(tmp_path / "wheels", tmp_path)
    (tmp_path / "requirements.txt").write_text("numpy>=1\nno-such-package>=2,<3\nb2sdk>=2\n", encoding="utf-8")
    assert wheels.missing_packages(tmp_path) == ["no-such-package"]
    with pytest.raises(SystemExit) as ended:
        wheels.add_missing(tmp_path / "wheels", tmp_path)
    assert ended.value.code == 2
    assert "missing packages: no-such-package; put their wheels into" in capsys.readouterr().err
    assert wheels.missing_packages() == []


def test_the_checkout_fits_where_it_has_to_travel() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    paths = [ROOT / name.decode() for name in listed.stdout.split(b"\0") if name]
    assert sum(path.stat().st_size for path in paths if path.is_file()) < 48 * 2**20


def test_encoders_are_compared_on_the_same_pictures(tmp_path: Path) -> None:
    frames = list(camera_frames((320, 240), (80, 80), 6))
    good = encode("good", "small", frames, EncoderSettings(crf=10, threads=1), tmp_path)
    poor = encode("poor", "small", frames, EncoderSettings(crf=40, threads=1), tmp_path)
    assert good.psnr_db > poor.psnr_db + 5
    assert good.frame_bytes > poor.frame_bytes
    assert good.cpu_ms > 0
    settings = {
        name: each
        for name, each in settings_to_compare(with_hardware=False, presets=("lean", "veryfast")).items()
        if name.endswith(", 1 thread")
    }
    lean, usual = compare("small", frames, settings, tmp_path)
    assert (lean.name, usual.name) == ("x264 lean, 1 thread", "x264 veryfast, 1 thread")
    # A line through three qualities meets each of them nearly.
    assert usual.equal_bytes == pytest.approx(usual.frame_bytes, rel=0.1)
    assert lean.equal_bytes > 0
    assert "| x264 lean, 1 thread | small |" in encoder_rows([lean, usual])[2]
