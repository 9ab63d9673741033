"""Command lines of the benchmarks. A benchmark reads its own before it imports slow libraries."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Literal, get_args

from musetalk.geometry import Box

# Of the networks, see benchmarks.networks.
Size = Literal["tiny", "demo", "full"]
# Of the synthetic clips: size of the frame and of the face in px.
FRAME_SIZES: dict[str, tuple[tuple[int, int], tuple[int, int]]] = {
    "720p": ((1280, 720), (250, 255)),
    "1080p": ((1920, 1080), (375, 375)),
}
# The prediction of FFmpeg's PNG encoder: "none" was its default up to 7.0. With "paeth", the default of 8.0, encoding
# takes about three times as long; the original is older, so ours is compared with the cheaper one.
PNG_FILTERS = ("none", "paeth")


def _parser(name: str, description: str | None) -> argparse.ArgumentParser:
    first_line = (description or "").split("\n", 1)[0]
    return argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=first_line)


def _of_networks(name: str, description: str | None, model: Size) -> argparse.ArgumentParser:
    """A command line with the options of every benchmark of networks: which ones, on which device, output file."""
    parser = _parser(name, description)
    parser.add_argument("--model", choices=get_args(Size), default=model)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write all numbers here")
    return parser


def engine(description: str | None) -> argparse.Namespace:
    """Arguments of benchmarks.engine."""
    parser = _of_networks("engine", description, "demo")
    parser.add_argument("--batches", default="", help="comma-separated; default 1,4,8 on a CPU, 1,4,8,16,32 on a GPU")
    parser.add_argument(
        "--dtypes", default="", help="default float32,bfloat16 on a CPU, float32,float16,bfloat16 on a GPU"
    )
    parser.add_argument("--accelerations", default="", help="default none on a CPU, none,graphs on a GPU")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--profile", action="store_true")
    return parser.parse_args()


def job(description: str | None) -> argparse.Namespace:
    """Arguments of benchmarks.job."""
    parser = _of_networks("job", description, "demo")
    parser.add_argument("--dtype", default="", help="default: what a worker would choose")
    parser.add_argument("--acceleration", choices=["none", "graphs", "compile"], default="none")
    parser.add_argument("--sizes", default="720p,1080p")
    parser.add_argument("--seconds", default="10", help="length of the speech, comma-separated")
    parser.add_argument("--source-seconds", type=float, default=0, help="length of the source; default: the speech's")
    parser.add_argument("--demo-pair", action="store_true", help="the project's own clip and sentence")
    parser.add_argument("--jobs", default="cold,warm,repeat", help="which of the three")
    parser.add_argument("--batch", type=int, default=8)
    return parser.parse_args()


# The parts of benchmarks.card, in their order.
CARD_PARTS = ("precision", "jobs", "rates", "faces", "goldens", "encoders", "profile")


def card(description: str | None) -> argparse.Namespace:
    """Arguments of benchmarks.card; `parts` is a list, `golden` a folder or None."""
    parser = _parser("card", description)
    parser.add_argument("--limit", type=float, default=460, metavar="S", help="seconds after which no part begins")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out"), help="folder for card.json and card.md")
    parser.add_argument("--wheels", type=Path, default=Path("wheels"), help="folder with wheels of missing packages")
    parser.add_argument("--golden", type=Path, help="folder with golden vectors; default: GOLDEN_DIR")
    parser.add_argument("--parts", default=",".join(CARD_PARTS), help="comma-separated; default: all")
    parser.add_argument("--model", choices=get_args(Size), default="full")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu tries the benchmark itself out")
    options = parser.parse_args()
    options.parts = options.parts.split(",")
    if unknown := [name for name in options.parts if name not in CARD_PARTS]:
        parser.error(f"unknown parts: {', '.join(unknown)}; there are {', '.join(CARD_PARTS)}")
    if options.golden is None and os.environ.get("GOLDEN_DIR"):
        options.golden = Path(os.environ["GOLDEN_DIR"])
    if options.golden is not None and not options.golden.is_dir():
        parser.error("the folder with golden vectors does not exist")
    return options


def detail(description: str | None) -> argparse.Namespace:
    """Arguments of benchmarks.detail."""
    parser = _parser("detail", description)
    parser.add_argument("--frames", type=int, default=40, help="frames of each case")
    parser.add_argument(
        "--clips", type=Path, nargs="*", default=[], help="videos with one face each, to be measured too"
    )
    parser.add_argument("--json", type=Path, help="write all numbers here")
    return parser.parse_args()


def media(description: str | None) -> argparse.Namespace:
    """Arguments of benchmarks.media; `--side` and `--folder` are for the processes that it starts itself."""
    parser = _parser("media", description)
    parser.add_argument("--frames", type=int, default=100, help="output frames of each run")
    parser.add_argument("--sizes", default="720p,1080p", help="synthetic clips to make, of 720p and 1080p")
    parser.add_argument("--clip", type=Path, help="a video instead of synthetic clips")
    parser.add_argument("--audio", type=Path, help="its sound, at least as long as the frames used")
    parser.add_argument("--face-box", type=_box, help="X0,Y0,X1,Y1 in px; default: in the middle")
    parser.add_argument("--png-filter", choices=PNG_FILTERS, default=PNG_FILTERS[0], help="of upstream's source dump")
    parser.add_argument("--encoders", action="store_true", help="only: x264's presets and NVENC, by CPU, size and PSNR")
    parser.add_argument("--preset", default="veryfast", help="x264 preset of ours; default: the worker's")
    parser.add_argument("--decoding", action="store_true", help="only: what a decoder in its own process costs")
    parser.add_argument("--json", type=Path, help="write all numbers here")
    parser.add_argument("--side", choices=["ours", "upstream"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.frames < 1:
        parser.error("--frames must be at least 1")
    if (options.clip is None) != (options.audio is None):
        parser.error("--clip and --audio go together")
    unknown = set(options.sizes.split(",")) - set(FRAME_SIZES)
    if unknown:
        parser.error(f"unknown sizes: {', '.join(sorted(unknown))}")
    return options


def _box(text: str) -> Box:
    """A box of four whole numbers with commas between; raises ValueError for anything else."""
    x0, y0, x1, y1 = (int(edge) for edge in text.split(","))
    return Box(x0, y0, x1, y1)


def service(description: str | None) -> argparse.Namespace:
    """Arguments of benchmarks.service."""
    parser = _parser("service", description)
    parser.add_argument("--seconds", type=float, default=40, help="length of each measurement")
    parser.add_argument("--hogs", type=int, default=2, help="busy processes")
    parser.add_argument("--slow", type=int, default=500, help="slow connections")
    return parser.parse_args()


def neighbour(description: str | None) -> argparse.Namespace:
    """Arguments of benchmarks.neighbour; `--child` is for the processes that it starts itself."""
    parser = _parser("neighbour", description)
    parser.add_argument("--rounds", type=int, default=5, help="runs of each setting in each situation")
    parser.add_argument("--settings", default="fixed,own,passive", help="fixed, own, passive, or counts of spins")
    parser.add_argument("--threads", type=int, default=0, help="threads where their number is fixed; default: all")
    parser.add_argument("--seconds", type=float, default=0, help="length of made speech; default: the demo sentence")
    parser.add_argument("--json", type=Path, help="write all numbers here")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    wrong = [
        name for name in options.settings.split(",") if name not in ("fixed", "own", "passive") and not name.isdigit()
    ]
    if wrong:
        parser.error(f"unknown settings: {', '.join(wrong)}")
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    return options


def modelled_card(description: str | None) -> argparse.Namespace:
    """Arguments of benchmarks.modelled_card; the defaults are an H100 as estimated (no measurement)."""
    parser = _parser("modelled_card", description)
    parser.add_argument("--frame-ms", type=float, default=2.75, help="the card's time for a frame")
    parser.add_argument("--launch-ms", type=float, default=0.5, help="time to launch a chunk; 15 without graphs")
    parser.add_argument("--encode-ms", type=float, default=2.475, help="the encoder's time for a frame")
    parser.add_argument("--batches", default="8,16,32")
    parser.add_argument("--seconds", type=int, default=20, help="length of the speech")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--real-encoder", action="store_true", help="x264 instead of a sleep")
    parser.add_argument("--json", type=Path, help="write all numbers here")
    return parser.parse_args()


def costs(description: str | None) -> argparse.Namespace:
    """Arguments of benchmarks.costs."""
    parser = _parser("costs", description)
    parser.add_argument("--size", choices=list(FRAME_SIZES), default="1080p")
    parser.add_argument("--seconds", type=float, default=60, help="length of the source")
    parser.add_argument("--json", type=Path, help="write all numbers here")
    return parser.parse_args()


def upstream_like(description: str | None) -> argparse.Namespace:
    """Arguments of benchmarks.upstream_like."""
    parser = _of_networks("upstream_like", description, "tiny")
    parser.add_argument("--dtype", default="float32", help="of both sides")
    parser.add_argument("--sizes", default="720p,1080p")
    parser.add_argument("--seconds", type=float, default=4, help="length of the speech")
    parser.add_argument(
        "--source-seconds", type=float, default=2, help="length of the source, which plays back and forth"
    )
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    for hidden in ("--side", "--folder", "--source", "--audio", "--box"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    return parser.parse_args()
