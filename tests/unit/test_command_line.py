"""The command line around a scripted core: forms, lists, what is printed where, exit statuses."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from musetalk.errors import MuseTalkError, NoFaceError, OutOfMemoryError, WeightsError
from musetalk.options import RenderOptions
from musetalk.render import Preview, RenderSummary
from tests.support.rendering import make_audio, make_source
from worker.cli.render import main
from worker.config import Settings
from worker.engine import Rendered
from worker.jobs import JobParams, Stage
from worker.telemetry import StageClock

SUMMARY = RenderSummary(
    width=192,
    height=256,
    rate=Fraction(25),
    n_frames=10,
    duration_s=0.4,
    n_bytes=5,
    n_source_frames=6,
    n_without_face=0,
    n_interpolated=0,
    n_reused=0,
    generator_s=0.1,
    encoder="libx264",
    warnings=("the speech is quiet",),
    model="v15",
    options=RenderOptions(),
    peak_gpu_memory_mib=None,
)


@dataclass
class ScriptedRenderer:
    """Writes "video" to each output, or raises what `errors` has for the name of the source."""

    model: str = "v15"
    load_error: MuseTalkError | None = None
    errors: dict[str, BaseException] = field(default_factory=dict)
    n_loads: int = 0
    calls: list[tuple[str, str, JobParams, str | None]] = field(default_factory=list)

    def __call__(self, settings: Settings, *, fetch_watcher: Any) -> ScriptedRenderer:
        return self

    def load(self) -> None:
        self.n_loads += 1
        if self.load_error is not None:
            raise self.load_error

    def render(
        self,
        source: Path,
        audio: Path,
        output: Path,
        params: JobParams | None = None,
        *,
        aspect_ratio: str | None = None,
        resolution: str | None = None,
        on_progress: Callable[[Stage, int, int], None] = lambda _stage, _done, _total: None,
    ) -> Rendered:
        assert params is not None
        self.calls.append((audio.name, output.name, params, resolution))
        if (error := self.errors.get(source.name)) is not None:
            raise error
        on_progress("inference", 10, 10)
        output.write_bytes(b"video")
        return Rendered(replace(SUMMARY, model=self.model), StageClock())

    def preview(self, *arguments: object, **_more: object) -> Preview:
        raise AssertionError("not asked for")


@pytest.fixture(scope="module")
def media_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    make_source(folder / "face.mp4", 4)
    make_audio(folder / "one.wav", 0.2)
    make_audio(folder / "two.wav", 0.2)
    return folder


@pytest.fixture
def folder(media_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MUSETALK_ENV_FILE", "none")
    for path in media_folder.iterdir():
        (tmp_path / path.name).hardlink_to(path)
    for name in ("other.mp4", "third.mp4"):
        (tmp_path / name).write_bytes((media_folder / "face.mp4").read_bytes())
    return tmp_path


def call(core: ScriptedRenderer, folder: Path, *arguments: str) -> int:
    """Run the command; words that name a file become paths in `folder`."""
    is_file = re.compile(r"[\w-]+\.(mp4|wav|csv|jsonl)|videos")
    return main(core, [str(folder / word) if is_file.fullmatch(word) else word for word in arguments])


def test_a_call_without_an_output_is_answered_with_its_own_usage(capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in (["a.mp4", "a.wav"], ["--bogus"], ["a.mp4", "--list", "x.csv"], []):
        with pytest.raises(SystemExit) as ended:
            main(ScriptedRenderer(), wrong)
        assert ended.value.code == 2
        assert "usage: musetalk_core.py [options] SOURCE AUDIO OUTPUT" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [["--resolution", "big"], ["--param", "loop_mode=fast"], ["--param", "x=1"]])
def test_a_wrong_value_is_usage_and_nothing_is_loaded(folder: Path, wrong: list[str]) -> None:
    core = ScriptedRenderer()
    assert call(core, folder, "face.mp4", "one.wav", "out.mp4", *wrong) == 2
    assert core.n_loads == 0


def test_options_may_stand_between_the_paths(folder: Path) -> None:
    core = ScriptedRenderer()
    assert call(core, folder, "face.mp4", "--resolution", "720p", "one.wav", "-q", "out.mp4") == 0
    assert core.calls == [("one.wav", "out.mp4", JobParams(), "720p")]


def test_an_existing_video_is_kept_unless_overwriting_is_asked_for(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    core = ScriptedRenderer()
    (folder / "out.mp4").write_bytes(b"precious")
    assert call(core, folder, "face.mp4", "one.wav", "out.mp4") == 2
    assert capsys.readouterr().err == f"error: OUTPUT exists; --overwrite replaces it: {folder}/out.mp4\n"
    assert (folder / "out.mp4").read_bytes() == b"precious"
    assert core.n_loads == 0
    assert call(core, folder, "face.mp4", "one.wav", "out.mp4", "--overwrite") == 0
    assert (folder / "out.mp4").read_bytes() == b"video"


def test_several_speeches_are_made_into_a_new_folder_with_one_loading(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    core = ScriptedRenderer()
    assert call(core, folder, "face.mp4", "one.wav", "two.wav", "videos", "--param", "box_smoothing=2") == 0
    assert sorted(path.name for path in (folder / "videos").iterdir()) == ["one.mp4", "two.mp4"]
    assert core.n_loads == 1
    assert {params.box_smoothing for _, _, params, _ in core.calls} == {2}
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1] == "2 of 2 videos made"
    assert "[2/2]" in printed.err


def test_a_failed_video_does_not_stop_the_others_and_the_worst_status_counts(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    no_face = NoFaceError("no frame of the source shows a face")
    core = ScriptedRenderer(errors={"face.mp4": no_face, "other.mp4": OutOfMemoryError("the GPU ran out of memory")})
    rows = ["source,audio,output"]
    rows += [f"{source}.mp4,one.wav,{source}-out.mp4" for source in ("face", "none", "other", "third")]
    (folder / "jobs.csv").write_text("\n".join(rows), encoding="utf-8")
    assert call(core, folder, "--list", "jobs.csv", "--json", "-q") == 4
    printed = capsys.readouterr()
    lines = [json.loads(line) for line in printed.out.splitlines()]
    assert [(line["status"], Path(line["output"]).name, line.get("exit_status")) for line in lines] == [
        ("failed", "none-out.mp4", 3),
        ("failed", "face-out.mp4", 3),
        ("failed", "other-out.mp4", 4),
        ("success", "third-out.mp4", None),
    ]
    assert lines[1]["error_type"] == "media_error"
    assert lines[3]["video"]["frames"] == 10
    assert lines[3]["warnings"] == ["the speech is quiet"]
    assert f"error for {folder}/other-out.mp4: the GPU ran out of memory" in printed.err
    assert core.n_loads == 1
    core.errors = {"other.mp4": no_face}
    assert call(core, folder, "--list", "jobs.csv", "--overwrite") == 3


def test_an_error_that_nobody_foresaw_does_not_stop_the_others(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    core = ScriptedRenderer(errors={"face.mp4": KeyError("x")})
    (folder / "jobs.jsonl").write_text(
        '{"source": "face.mp4", "audio": "one.wav", "output": "a.mp4"}\n\n'
        '{"source": "other.mp4", "audio": "one.wav", "output": "b.mp4", "params": {"extra_margin": 4}}\n',
        encoding="utf-8",
    )
    assert call(core, folder, "--list", "jobs.jsonl", "--param", "extra_margin=9", "--param", "batch_size=2") == 4
    assert "KeyError" in capsys.readouterr().err
    assert (folder / "b.mp4").exists()
    assert [(params.extra_margin, params.batch_size) for _, _, params, _ in core.calls] == [(9, 2), (4, 2)]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("source,audio\nface.mp4,one.wav\n", "line 2: output missing"),
        ("source,audio,output,speed\nface.mp4,one.wav,a.mp4,2\n", "line 2: unknown fields: speed"),
        ("source,audio,output\nface.mp4,one.wav,a.mp4,2\n", "line 2: more fields than the header has"),
        ('source,audio,output,params\nface.mp4,one.wav,a.mp4,"{""loop"": 1}"\n', "line 2: unknown params: loop"),
        ("source,audio,output,params\nface.mp4,one.wav,a.mp4,fast\n", "line 2: params must be a JSON object"),
        ("source,audio,output,resolution\nface.mp4,one.wav,a.mp4,big\n", "line 2: resolution must be like"),
        ('{"source": "face.mp4", "audio": 3, "output": "a.mp4"}', "line 1: audio must be text"),
        ('{"source": "face.mp4"}\n{]\n', "line 2: not a JSON object or CSV row"),
        ("source;audio;output\nface.mp4;one.wav;a.mp4\nface.mp4;two.wav;a.mp4\n", "two videos have the same OUTPUT"),
        ("", "names no video"),
    ],
)
def test_a_list_with_a_mistake_names_the_line_before_anything_is_loaded(
    folder: Path, capsys: pytest.CaptureFixture[str], text: str, complaint: str
) -> None:
    core = ScriptedRenderer()
    (folder / "jobs.csv").write_text(text, encoding="utf-8-sig")
    assert call(core, folder, "--list", "jobs.csv") == 2
    assert complaint in capsys.readouterr().err
    assert core.n_loads == 0


def test_two_speeches_of_one_name_do_not_replace_each_other(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "sub").mkdir()
    (folder / "sub/one.wav").hardlink_to(folder / "one.wav")
    assert call(ScriptedRenderer(), folder, "face.mp4", "one.wav", f"{folder}/sub/one.wav", "videos") == 2
    assert "two videos have the same OUTPUT" in capsys.readouterr().err
    assert not (folder / "videos").exists()


def test_a_video_never_replaces_an_input_of_another(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "jobs.csv").write_text(
        "source,audio,output\nface.mp4,one.wav,other.mp4\nother.mp4,one.wav,b.mp4\n", encoding="utf-8"
    )
    before = (folder / "other.mp4").read_bytes()
    assert call(ScriptedRenderer(), folder, "--list", "jobs.csv", "--overwrite") == 2
    assert "OUTPUT is an input of another video" in capsys.readouterr().err
    assert (folder / "other.mp4").read_bytes() == before
    assert (folder / "b.mp4").exists()


def test_missing_weights_are_the_machines_fault_and_every_video_has_its_line(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    core = ScriptedRenderer(load_error=WeightsError("unet.pth is missing"))
    assert call(core, folder, "face.mp4", "one.wav", "two.wav", "videos", "--json") == 4
    printed = capsys.readouterr()
    assert [json.loads(line)["error_message"] for line in printed.out.splitlines()] == ["unet.pth is missing"] * 2
    assert printed.err.count("unet.pth is missing") == 1


def test_a_wrong_setting_is_usage(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BATCH_SIZE", "many")
    assert call(ScriptedRenderer(), folder, "face.mp4", "one.wav", "out.mp4") == 2
    assert "BATCH_SIZE" in capsys.readouterr().err


def test_a_quiet_call_prints_warnings_only(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(ScriptedRenderer("demo"), folder, "face.mp4", "one.wav", "out.mp4", "--quiet") == 0
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "warning: the speech is quiet\n")


def test_the_last_line_says_that_this_was_the_demo_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(ScriptedRenderer("demo"), folder, "face.mp4", "one.wav", "out.mp4") == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert "demo model" in last
    assert "musetalk.weights fetch" in last
    assert call(ScriptedRenderer(), folder, "face.mp4", "one.wav", "out2.mp4") == 0
    assert "demo" not in capsys.readouterr().out


def test_a_call_that_is_stopped_says_how_far_it_came(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "jobs.csv").write_text(
        "source,audio,output\nface.mp4,one.wav,a.mp4\nother.mp4,one.wav,b.mp4\n", encoding="utf-8"
    )
    core = ScriptedRenderer(errors={"other.mp4": KeyboardInterrupt()})
    assert call(core, folder, "--list", "jobs.csv", "-q") == 130
    assert "stopped; 1 of 2 videos were made" in capsys.readouterr().err
