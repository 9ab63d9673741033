"""Files made to break, to exhaust or to spy: a typed error, quickly, and nothing else.

Specified in docs/media.md#media-limits and docs/media.md#opening-files.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import psutil
import pytest
from PIL import Image

from musetalk.errors import MediaError, ProcessingError
from musetalk.media import (
    MediaLimits,
    decoder,
    decoder_main,
    inspect_audio,
    inspect_source,
    probe_audio,
    probe_source,
    read_source,
    read_waveform,
)
from tests.support import clips
from tests.support.clips import Sound, Tags, picture, tone, write_clip, write_sound
from tests.support.faulty_decoder import write_faulty_main
from tests.support.server import wait_until
from tests.support.watch import CountingServer, OpenWatch

LIMITS = MediaLimits()
ROOT = Path(__file__).resolve().parents[2]
LOOKS: list[Callable[[Path, MediaLimits], Any]] = [inspect_source, inspect_audio]
PROBES: list[Callable[[Path, MediaLimits], Any]] = [probe_source, probe_audio]


def assert_refused(look: Callable[[Path, MediaLimits], Any], path: Path, limits: MediaLimits = LIMITS) -> MediaError:
    """`look` raises MediaError soon, and says nothing about where the file lies."""
    started = time.monotonic()
    with pytest.raises(MediaError) as caught:
        look(path, limits)
    assert time.monotonic() - started < 10
    text = f"{caught.value} {caught.value.details}"
    assert str(path.parent) not in text
    assert path.name not in text
    assert not caught.value.retryable
    return caught.value


# -- broken and huge (3.5) --------------------------------------------------------------------------------------------


def png(width: int, height: int, rows: bytes) -> bytes:
    """A PNG of one bit per pixel with the given (uncompressed) rows."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x01\0\0\0\0"
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 1)) + chunk(b"IEND", b"")


def no_index(folder: Path) -> bytes:
    path = write_clip(folder / "whole.mp4", 20)
    data = path.read_bytes()
    path.unlink()
    return data[: data.find(b"moov") - 4]


BROKEN: dict[str, Callable[[Path], bytes]] = {
    "empty": lambda _: b"",
    "one byte": lambda _: b"\0",
    "html": lambda _: b"<!doctype html><html><head><title>404</title></head><body>Not found</body></html>" * 20,
    "json": lambda _: b'{"error": "not found"}',
    "random": lambda _: random.Random(5).randbytes(100_000),
    "zeros": lambda _: bytes(100_000),
    "mp4 without index": no_index,
    "wav header only": lambda _: (
        b"RIFF\x24\0\0\0WAVEfmt \x10\0\0\0\x01\0\x01\0\x80\x3e\0\0\0\x7d\0\0\x02\0\x10\0data\0\0\0\0"
    ),
    "png header only": lambda _: png(100, 100, b"")[:33],
    "png of 20000 x 20000": lambda _: png(20_000, 20_000, bytes(2501) * 20_000),
    "png claims 60000 x 60000": lambda _: png(60_000, 60_000, bytes(100)),
    "gif header only": lambda _: b"GIF89a\x40\0\x40\0\0\0\0",
    "webp header only": lambda _: b"RIFF\x10\0\0\0WEBPVP8 \0\0\0\0",
    "jpeg header only": lambda _: b"\xff\xd8\xff\xe0\0\x10JFIF\0",
    "tiff header only": lambda _: b"II*\0\x08\0\0\0",
    "bitmap header only": lambda _: b"BM" + bytes(30),
}


@pytest.mark.parametrize("what", BROKEN)
@pytest.mark.parametrize("suffix", [".mp4", ".wav"])
def test_broken_files_are_refused(tmp_path: Path, what: str, suffix: str) -> None:
    path = tmp_path / f"given{suffix}"
    path.write_bytes(BROKEN[what](tmp_path))
    for look in LOOKS:
        assert_refused(look, path)


def test_unknown_codecs_are_refused(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "given.mp4", 5, sound=Sound(tone(0.5)))
    data = path.read_bytes()
    at = data.find(b"moov")
    index = data[at:]
    for name in (b"avc1", b"avcC", b"mp4a", b"esds"):
        index = index.replace(name, b"zzzz")
    path.write_bytes(data[:at] + index)
    for look in [*LOOKS, *PROBES]:
        assert_refused(look, path)


def large_film(path: Path) -> Path:
    size = (4096, 2400)
    return write_clip(path, 2, size=size, draw=lambda _index: av.VideoFrame(*size, "yuv420p"))


def test_a_film_of_too_many_pixels_is_refused(tmp_path: Path) -> None:
    path = large_film(tmp_path / "given.mp4")
    for look in (inspect_source, probe_source):
        assert "4096x2400" in str(assert_refused(look, path))


def test_a_header_that_lies_about_the_size_does_not_help(tmp_path: Path) -> None:
    path = large_film(tmp_path / "given.mp4")
    data = bytearray(path.read_bytes())
    # Width and height of the sample entry: 24 bytes behind its name.
    at = data.find(b"avc1", data.find(b"stsd")) + 28
    assert data[at : at + 4] == (4096).to_bytes(2, "big") + (2400).to_bytes(2, "big")
    data[at : at + 4] = (160).to_bytes(2, "big") + (96).to_bytes(2, "big")
    path.write_bytes(data)
    assert_refused(inspect_source, path)
    small = write_clip(tmp_path / "small.mp4", 2)
    with pytest.raises(MediaError):
        list(read_source(path, inspect_source(small, LIMITS), LIMITS))


def test_a_film_that_grows_on_the_way_is_refused(tmp_path: Path) -> None:
    parts = []
    for index, size in enumerate([(160, 96), (640, 480)]):
        path = write_clip(tmp_path / f"{index}.ts", 10, size=size, options={"x264-params": "repeat-headers=1"})
        parts.append(path.read_bytes())
    both = tmp_path / "both.ts"
    both.write_bytes(b"".join(parts))
    limits = replace(LIMITS, max_pixels=160 * 128)
    info = inspect_source(both, limits)
    # The decoder leaves out what is over its limit: too many pictures are missing then.
    with pytest.raises(MediaError):
        list(read_source(both, info, limits))


def test_ten_hours_of_mp3_are_left_at_the_limit(tmp_path: Path) -> None:
    psutil = pytest.importorskip("psutil")
    short = write_sound(
        tmp_path / "short.mp3", Sound(np.zeros(160_000, np.float32), rate=16_000, codec="libmp3lame", bit_rate=8000)
    )
    path = tmp_path / "given.mp3"
    path.write_bytes(short.read_bytes() * 3600)
    info = inspect_audio(path, LIMITS)
    before = psutil.Process().memory_info().rss
    with pytest.raises(MediaError, match="longer than the 900 s"):
        read_waveform(path, info, LIMITS)
    # 901 s of samples are 58 MB.
    assert psutil.Process().memory_info().rss - before < 200 * 2**20


MEASURE = """
import json, resource, sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from musetalk.errors import MuseTalkError
from musetalk.media import MediaLimits, probe_source
for line in sys.stdin:
    started = time.monotonic()
    try:
        probe_source(Path(line.rstrip("\\n")), MediaLimits())
        outcome = "accepted"
    except MuseTalkError as error:
        outcome = type(error).__name__
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    print(json.dumps([outcome, time.monotonic() - started, memory]), flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is counted in kilobytes on Linux only")
def test_probing_costs_little_whatever_the_file(tmp_path: Path) -> None:
    paths = []
    for index, (what, make) in enumerate(BROKEN.items()):
        if what.startswith(("png", "mp4", "random", "html")):
            paths.append(tmp_path / f"{index}.mp4")
            paths[-1].write_bytes(make(tmp_path))
    paths.append(large_film(tmp_path / "large.mp4"))
    paths.append(write_clip(tmp_path / "fast.mp4", 3000, size=(64, 64), rate=Fraction(1000)))
    largest = tmp_path / "largest.png"
    Image.new("RGBA", (3840, 2310), (1, 2, 3, 128)).save(largest, compress_level=1)
    paths.append(largest)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(ROOT)],
        input="\n".join(map(str, paths)),
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [outcome for outcome, _, _ in results] == ["MediaError"] * (len(paths) - 2) + ["accepted"] * 2
    for _, seconds, kilobytes in results:
        assert seconds < 2
        assert kilobytes < 300 * 1024


# -- files that open other files (3.6) --------------------------------------------------------------------------------


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A film with sound that no test may open; whoever follows a playlist to it would succeed."""
    folder = tmp_path / "private"
    folder.mkdir()
    return write_clip(folder / "secret.ts", 25, sound=Sound(tone(1.0)))


@pytest.fixture
def watch(secret: Path) -> Iterator[OpenWatch]:
    try:
        watching = OpenWatch(secret)
    except OSError as error:
        pytest.skip(str(error))
    yield watching
    watching.close()


@pytest.fixture
def server() -> Iterator[CountingServer]:
    counting = CountingServer()
    yield counting
    assert counting.close() == 0, "a request was sent"


def hls(address: str) -> str:
    return f"#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{address}\n#EXT-X-ENDLIST\n"


SPIES: dict[str, Callable[[str, str, str], str]] = {
    "hls, absolute": lambda absolute, _relative, _url: hls(absolute),
    "hls, relative": lambda _absolute, relative, _url: hls(relative),
    "hls, file address": lambda absolute, _relative, _url: hls(f"file://{absolute}"),
    "hls, http": lambda _absolute, _relative, url: hls(url),
    "hls, key by http": lambda absolute, _relative, url: hls(absolute).replace(
        "#EXTINF", f'#EXT-X-KEY:METHOD=AES-128,URI="{url}"\n#EXTINF'
    ),
    "concat, relative": lambda _absolute, relative, _url: f"ffconcat version 1.0\nfile {relative}\n",
    "concat, absolute": lambda absolute, _relative, _url: f"ffconcat version 1.0\nfile '{absolute}'\n",
    "concat, http": lambda _absolute, _relative, url: f"ffconcat version 1.0\nfile {url}\n",
    "sdp": lambda _absolute, _relative, _url: (
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\n"
        "m=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n"
    ),
    "dash": lambda _absolute, _relative, url: (
        '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"'
        f' mediaPresentationDuration="PT9S">'
        f'<Period><AdaptationSet mimeType="video/mp4"><Representation id="1" bandwidth="1"><BaseURL>{url}</BaseURL>'
        "</Representation></AdaptationSet></Period></MPD>"
    ),
    "svg": lambda absolute, _relative, url: (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="200" height="200">'
        f'<image xlink:href="{url}"/><image xlink:href="file://{absolute}"/></svg>'
    ),
    "svg with a declaration": lambda _absolute, _relative, url: (
        f'<?xml version="1.0"?><!DOCTYPE svg SYSTEM "{url}"><svg xmlns="http://www.w3.org/2000/svg"/>'
    ),
    "smil": lambda absolute, _relative, _url: f'<smil><body><video src="{absolute}"/></body></smil>',
    "asx": lambda _absolute, _relative, url: f'<asx version="3"><entry><ref href="{url}"/></entry></asx>',
    "image list": lambda absolute, _relative, _url: (
        f"push graphic-context\nfill 'url({absolute})'\npop graphic-context\n"
    ),
}
NAMES = ["given", "given.m3u8", "given.mp4", "given.txt", "given.ts", "given.wav", "given.svg", "given.ffconcat"]


def spy(path: Path, what: str, secret: Path, server: CountingServer) -> Path:
    url = f"http://127.0.0.1:{server.port}/secret.ts"
    path.write_text(SPIES[what](str(secret), os.path.relpath(secret, path.parent), url))
    return path


@pytest.mark.parametrize("what", SPIES)
@pytest.mark.parametrize("name", NAMES)
def test_files_that_name_others_are_refused(
    tmp_path: Path, secret: Path, watch: OpenWatch, server: CountingServer, what: str, name: str
) -> None:
    path = spy(tmp_path / name, what, secret, server)
    for look in LOOKS:
        assert_refused(look, path)
    assert watch.n_events() == 0


@pytest.mark.parametrize("what", ["hls, absolute", "hls, http", "concat, relative", "sdp", "dash", "svg"])
def test_probing_them_in_a_process_opens_nothing_either(
    tmp_path: Path, secret: Path, watch: OpenWatch, server: CountingServer, what: str
) -> None:
    path = spy(tmp_path / "given.mp4", what, secret, server)
    for probe in PROBES:
        assert_refused(probe, path)
    assert watch.n_events() == 0


def test_a_playlist_behind_a_probed_name_is_not_followed(
    tmp_path: Path, secret: Path, watch: OpenWatch, server: CountingServer
) -> None:
    # Someone changes the file between the first look and the reading.
    good = write_clip(tmp_path / "good.mp4", 5, sound=Sound(tone(1.0)))
    source, audio = inspect_source(good, LIMITS), inspect_audio(good, LIMITS)
    for what in SPIES:
        path = spy(tmp_path / "given.mp4", what, secret, server)
        with pytest.raises(MediaError):
            list(read_source(path, source, LIMITS))
        with pytest.raises(MediaError):
            read_waveform(path, audio, LIMITS)
    assert watch.n_events() == 0


def test_the_watch_sees_what_an_unguarded_reader_opens(
    tmp_path: Path, secret: Path, watch: OpenWatch, server: CountingServer
) -> None:
    path = spy(tmp_path / "given.m3u8", "hls, relative", secret, server)
    with av.open(str(path)) as container:
        assert next(container.decode(video=0)) is not None
    assert watch.n_events() > 0


def test_the_server_sees_a_request() -> None:
    counting = CountingServer()
    with pytest.raises((OSError, urllib.error.URLError)):
        urllib.request.urlopen(f"http://127.0.0.1:{counting.port}/", timeout=5)
    assert counting.close() == 1


@pytest.mark.parametrize(
    "name", ["concat:a.mp4|b.mp4", "http:x.mp4", "subfile,,start,0,end,9,,:a.mp4", "%03d.mp4", "-i.mp4"]
)
def test_a_name_is_only_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    write_clip(tmp_path / "a.mp4", 3).rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    info = inspect_source(Path(name), LIMITS)
    assert len(list(read_source(Path(name), info, LIMITS))) == 3


def test_named_pipes_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "given.mp4")
    for look in [*LOOKS, *PROBES]:
        with pytest.raises(ProcessingError, match="not a regular file"):
            look(tmp_path / "given.mp4", LIMITS)


# -- the probing process ----------------------------------------------------------------------------------------------


@pytest.fixture
def faulty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Puts a decoder in the place of ours that runs `fault` for each packet after the first `after`."""

    def replaced(fault: str, after: int = 0) -> None:
        path = write_faulty_main(tmp_path / "decoder_main.py", fault, after)
        monkeypatch.setattr(decoder_main, "__file__", str(path))

    monkeypatch.setattr(decoder, "_server", decoder._Server())
    yield replaced
    decoder._server.stop()


@pytest.fixture
def film(tmp_path: Path) -> Path:
    return write_clip(tmp_path / "given.mp4", 40, size=(96, 64), sound=Sound(tone(2.0)))


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGABRT", "SIGBUS", "SIGFPE", "SIGILL", "SIGKILL"])
def test_a_decoder_that_crashes_is_the_files_fault(faulty: Callable[..., None], film: Path, name: str) -> None:
    faulty(f"os.kill(os.getpid(), signal.{name})")
    for probe in PROBES:
        assert "crashes the decoder" in str(assert_refused(probe, film))


FAULTS = {
    "crash": ("os.kill(os.getpid(), signal.SIGSEGV)", "crashes the decoder"),
    "hang": ("signal.pause()", "could not be read within 1 s"),
    "memory": ("numpy.empty(2**40)", "needs too much memory"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_decoder_that_fails_in_the_middle_costs_that_file_only(
    faulty: Callable[..., None], film: Path, tmp_path: Path, kind: str
) -> None:
    fault, text = FAULTS[kind]
    limits = replace(LIMITS, stall_s=1.0)
    source, audio = inspect_source(film, limits), inspect_audio(film, limits)
    faulty(fault, after=30)
    frames = read_source(film, source, limits)
    assert next(frames).index == 0
    with pytest.raises(MediaError, match=f"the source .*{text}"):
        list(frames)
    with pytest.raises(MediaError, match=f"the audio .*{text}"):
        read_waveform(film, audio, limits)
    # The same server reads the next file.
    short = write_clip(tmp_path / "short.mp4", 5, size=(96, 64))
    assert len(list(read_source(short, inspect_source(short, limits), limits))) == 5


def test_a_reader_that_leaves_early_leaves_no_process_behind(faulty: Callable[..., None], film: Path) -> None:
    faulty("pass")
    info = inspect_source(film, LIMITS)
    frames = read_source(film, info, LIMITS)
    next(frames)
    server = psutil.Process(decoder._server.pid or 0)
    assert len(server.children()) == 1
    frames.close()
    wait_until(lambda: not server.children(), 10)


def test_a_decoder_server_that_was_killed_is_started_again(faulty: Callable[..., None], film: Path) -> None:
    faulty("pass")
    assert probe_source(film, LIMITS).n_frames == 40
    os.kill(decoder._server.pid or 0, signal.SIGKILL)
    assert probe_source(film, LIMITS).n_frames == 40


def test_a_process_ended_from_outside_is_not(faulty: Callable[..., None], film: Path) -> None:
    faulty("os.kill(os.getpid(), signal.SIGTERM)")
    with pytest.raises(ProcessingError, match="from outside") as caught:
        probe_source(film, LIMITS)
    assert caught.value.retryable


def test_a_decoder_that_hangs_is_killed(faulty: Callable[..., None], film: Path) -> None:
    faulty("signal.pause()")
    error = assert_refused(probe_source, film, replace(LIMITS, probe_wall_s=0.5))
    assert "within 0.5 s" in str(error)
    server = psutil.Process(decoder._server.pid or 0)
    wait_until(lambda: not server.children(), 10)


def test_a_decoder_that_computes_for_ever_is_ended(faulty: Callable[..., None], film: Path) -> None:
    faulty("while True: pass")
    with pytest.raises(MediaError, match="too much time"):
        probe_source(film, replace(LIMITS, probe_cpu_s=1))


def test_a_decoder_that_wants_too_much_memory_is_stopped(tmp_path: Path) -> None:
    Image.new("RGBA", (3840, 2310), (1, 2, 3, 128)).save(tmp_path / "given.png", compress_level=1)
    assert probe_source(tmp_path / "given.png", LIMITS).width == 3840
    # Enough for the interpreter and its libraries, not for the pictures.
    with pytest.raises(MediaError, match="too much memory"):
        probe_source(tmp_path / "given.png", replace(LIMITS, probe_memory_bytes=_library_memory() + 40 * 2**20))


def _library_memory() -> int:
    """Address space (bytes) of a process that imported what the probing one does."""
    script = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import musetalk.media.probe\n"
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmPeak')))"
    )
    environment = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", script], capture_output=True, text=True, check=True, env=environment
    )
    return int(done.stdout) * 1024


def test_an_answer_that_makes_no_sense_is_the_workers_fault(faulty: Callable[..., None], film: Path) -> None:
    faulty("raise SystemExit(3)")
    for probe in PROBES:
        with pytest.raises(ProcessingError):
            probe(film, LIMITS)


def test_an_unforeseen_error_of_a_reader_is_the_workers_fault(faulty: Callable[..., None], film: Path) -> None:
    faulty("raise IndexError('of ours')")
    for probe in PROBES:
        with pytest.raises(ProcessingError, match="IndexError"):
            probe(film, LIMITS)


def test_an_interpreter_that_is_missing_is_the_workers_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_clip(tmp_path / "given.mp4", 2)
    monkeypatch.setattr(decoder, "_server", decoder._Server())
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no-python"))
    with pytest.raises(ProcessingError, match="cannot be started"):
        probe_source(path, LIMITS)


def test_the_process_sees_no_credentials(
    faulty: Callable[..., None], film: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("B2_APPLICATION_KEY", "very secret")
    faulty("from musetalk.errors import MediaError\nraise MediaError(' '.join([*os.environ, *os.environ.values()]))")
    with pytest.raises(MediaError) as caught:
        probe_source(film, LIMITS)
    assert "secret" not in str(caught.value)
    assert "B2_APPLICATION_KEY" not in str(caught.value)


def test_the_working_directory_decides_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_clip(tmp_path / "given.mp4", 2)
    for name in ("errors.py", "av.py", "numpy.py", "json.py"):
        (tmp_path / name).write_text("raise SystemExit(9)")
    monkeypatch.chdir(tmp_path)
    assert probe_source(Path("given.mp4"), LIMITS).n_frames == 2


def test_the_process_does_not_load_the_model(tmp_path: Path) -> None:
    script = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import musetalk.media; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.strip() == "False"


def test_errors_keep_their_class_and_details(tmp_path: Path) -> None:
    Image.new("1", (8000, 7600)).save(tmp_path / "given.png")
    with pytest.raises(MediaError) as caught:
        probe_source(tmp_path / "given.png", LIMITS)
    assert caught.value.details == {"width": 8000, "height": 7600}


# -- chance -----------------------------------------------------------------------------------------------------------


def valid_files(folder: Path) -> list[Path]:
    image = Image.fromarray(np.ascontiguousarray(picture(3, 96, 64)[..., ::-1]))
    sound = Sound(tone(0.5))
    for name in ("a.png", "a.jpg", "a.webp", "a.bmp", "a.tiff"):
        image.save(folder / name)
    for name in ("b.gif", "b.webp", "b.png"):
        image.save(folder / name, save_all=True, append_images=[image.transpose(Image.Transpose.ROTATE_180)] * 3)
    write_clip(folder / "c.mp4", 8, size=(96, 64), b_frames=2, sound=sound, rotation=90, tags=Tags(1, 1, 1, True))
    write_clip(folder / "c.mkv", 8, size=(96, 64), sound=Sound(tone(0.5), codec="libopus"))
    write_clip(folder / "c.avi", 8, size=(96, 64), codec="mpeg4")
    write_clip(folder / "c.ts", 8, size=(96, 64), sound=sound)
    write_clip(folder / "c.webm", 4, size=(96, 64), codec="libvpx-vp9")
    for name, codec in (("d.wav", "pcm_s16le"), ("d.mp3", "libmp3lame"), ("d.flac", "flac"), ("d.ogg", "libopus")):
        write_sound(folder / name, Sound(tone(0.3), codec=codec))
    return sorted(path for path in folder.iterdir() if path.is_file())


@contextmanager
def no_memory_suppressed() -> Iterator[None]:
    try:
        yield
    except ProcessingError as error:
        if error.details.get("reason") != "MemoryError":
            raise


def try_both(path: Path) -> None:
    """Look at and read a file as a source and as audio; anything but success or a MediaError is a bug.

    A header may ask for more memory than there is; the probing process makes that a MediaError as well.
    """
    with suppress(MediaError), no_memory_suppressed():
        info = inspect_source(path, LIMITS)
        for frame in read_source(path, info, LIMITS, max_frames=50):
            assert (frame.planes.width, frame.planes.height) == (info.width, info.height)
    with suppress(MediaError), no_memory_suppressed():
        waveform = read_waveform(path, inspect_audio(path, LIMITS), LIMITS)
        assert np.isfinite(waveform).all()


def test_random_damage_never_ends_in_an_untyped_error(tmp_path: Path) -> None:
    chance = random.Random(11)
    for path in valid_files(tmp_path):
        original = path.read_bytes()
        for _ in range(4):
            data = bytearray(original)
            for _ in range(chance.choice([1, 4, 30])):
                data[chance.randrange(min(len(data), chance.choice([64, 1000, len(data)])))] = chance.randrange(256)
            if chance.random() < 0.3:
                del data[chance.randrange(len(data)) :]
            path.write_bytes(data)
            try_both(path)


def test_every_cut_of_a_file_is_typed(tmp_path: Path) -> None:
    for path in valid_files(tmp_path):
        data = path.read_bytes()
        for share in (0.02, 0.3, 0.7, 0.97):
            path.write_bytes(data[: int(len(data) * share)])
            try_both(path)


def test_the_helpers_cut_and_damage(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", 20)
    before = path.read_bytes()
    clips.damage(path, 10)
    assert before != path.read_bytes()
    clips.cut(path, 0.5)
    assert path.stat().st_size == len(before) // 2
