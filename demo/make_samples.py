"""The page's samples: faces, voices, pictures of them, and a finished video; from this code and flite's voices alone.

python -m demo.make_samples         # writes demo/media/samples/; needs flite, and the pair of demo.make_pair
"""

from __future__ import annotations

from demo import arguments

if __name__ == "__main__":
    # Before the imports below, which take seconds: --help and mistyped arguments are answered at once.
    arguments.none("make_samples", __doc__)

import tempfile
from dataclasses import replace
from pathlib import Path

import av
import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from demo import speech
from demo.drawing import rgb
from demo.evaluate import read_frames
from demo.identity import Identity
from demo.make_pair import AVATAR, MEDIA, SPEECH, natural_poses, resting_frames, write_clip, write_sound
from demo.portrait import Portrait
from demo.stages import MODELS
from musetalk import media
from musetalk.devices import choose_dtype
from musetalk.models import load_models
from musetalk.options import version_defaults
from musetalk.render import RenderSession

SAMPLES = MEDIA / "samples"
# Short enough for a first job on a CPU.
VOICES = {
    "short": ("slt", 1.0, "This is a short sample. It is over soon."),
    "scottish": ("awb", 1.0, "Good morning. Every word that you hear is drawn on these lips."),
    "american": ("rms", 1.05, "I am a voice made by a program. Now give me a face to speak with."),
}
# The same person, whom the demo model knows, elsewhere.
EVENING = Identity(
    clothes=rgb(122, 52, 58), back_top=rgb(58, 66, 92), back_bottom=rgb(30, 34, 52), iris=rgb(86, 120, 160)
)
EVENING_S = 4.0
EVENING_SEED = 21
_THUMBNAIL_PX = 160
_QUALITY = 84
_BARS = 20
_INK = "#b3402a"


def write_thumbnail(path: Path, picture: NDArray[np.uint8], size: int = _THUMBNAIL_PX) -> None:
    """Write a small JPEG of a picture (BGR)."""
    small = cv2.resize(picture, (size, size), interpolation=cv2.INTER_AREA)
    cv2.imwrite(str(path), small, [cv2.IMWRITE_JPEG_QUALITY, _QUALITY])


def write_waveform(path: Path, waveform: NDArray[np.float32]) -> None:
    """Write the loudness of a voice as a row of bars (SVG)."""
    parts = np.array_split(np.abs(waveform), _BARS)
    levels = np.array([float(np.sqrt(np.mean(part**2))) for part in parts])
    heights = np.maximum(1.3, 30 * levels / levels.max())
    bars = "".join(
        f'<rect x="{index * 4 + 1}" y="{40 - height:.1f}" width="2.6" height="{2 * height:.1f}" rx="1.3"/>'
        for index, height in enumerate(heights)
    )
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 80 80" fill="{_INK}">{bars}</svg>\n', encoding="utf-8"
    )


def spoken(sentence: str, voice: str, stretch: float) -> NDArray[np.float32]:
    """A sentence with a moment of silence around it, at the loudness of the demo pair."""
    said = speech.with_flite(sentence, voice, stretch).waveform
    quiet = np.zeros(speech.RATE // 5, np.float32)
    return np.concatenate([quiet, said * (0.6 / np.abs(said).max()), quiet]).astype(np.float32)


def render_finished(output: Path, poster: Path) -> None:
    """Render the demo pair with the demo model, and its first picture."""
    device = torch.device("cpu")
    models = load_models(MODELS, "demo", device=device, dtype=choose_dtype("auto", device)[0])
    encoder = media.EncoderSettings(preset="slow", crf=26)
    with RenderSession(models, AVATAR, SPEECH, output, version_defaults("demo"), encoder=encoder) as session:
        session.probe()
        session.prepare()
        session.generate()
        session.finish()
    write_thumbnail(poster, read_frames(output)[40], 512)


def sound_of(path: Path) -> NDArray[np.float32]:
    """The samples of a mono file."""
    with av.open(str(path)) as container:
        blocks = [frame.to_ndarray().reshape(-1) for frame in container.decode(audio=0)]
    return np.asarray(np.concatenate(blocks) / 32768, np.float32)


def main() -> None:
    """Write all files."""
    SAMPLES.mkdir(parents=True, exist_ok=True)
    frames = read_frames(AVATAR)
    write_thumbnail(SAMPLES / "portrait.jpg", frames[0])
    cv2.imwrite(str(SAMPLES / "photo-full.jpg"), frames[60], [cv2.IMWRITE_JPEG_QUALITY, 92])
    write_thumbnail(SAMPLES / "photo.jpg", frames[60])
    poses = natural_poses(round(EVENING_S * 25), EVENING_SEED)
    evening = resting_frames(Portrait(EVENING), [replace(pose) for pose in poses])
    write_clip(SAMPLES / "evening.mp4", evening, crf=18)
    write_thumbnail(SAMPLES / "evening.jpg", evening[0])
    write_waveform(SAMPLES / "hello.svg", sound_of(SPEECH))
    for name, (voice, stretch, sentence) in VOICES.items():
        waveform = spoken(sentence, voice, stretch)
        write_sound(SAMPLES / f"{name}.flac", waveform)
        write_waveform(SAMPLES / f"{name}.svg", waveform)
    with tempfile.TemporaryDirectory() as folder:
        finished = Path(folder) / "finished.mp4"
        render_finished(finished, SAMPLES / "finished.jpg")
        (SAMPLES / "finished.mp4").write_bytes(finished.read_bytes())
    for path in sorted(SAMPLES.iterdir()):
        print(f"{path.name}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
