"""Files to pictures and sound, and back (PyAV and Pillow). Knows no model, no settings, no network.

Reading, in limited processes of its own: `probe_source` and `probe_audio` (`probe_both` at once) look at a file,
`read_source` gives its pictures on a constant-rate grid, `read_waveform` its sound as the model hears it.
"""

from __future__ import annotations

from musetalk.media.decoder import (
    decoder_pid,
    probe_audio,
    probe_both,
    probe_source,
    read_audio_blocks,
    read_source,
    read_waveform,
    start_decoder,
)
from musetalk.media.limits import AudioInfo, MediaLimits, SourceInfo
from musetalk.media.probe import inspect_source
from musetalk.media.reading import SourceFrame
from musetalk.media.scaling import fit_planes
from musetalk.media.sound import inspect_audio
from musetalk.media.thumbnails import thumbnail
from musetalk.media.writing import (
    PICTURE_SUFFIXES,
    EncoderSettings,
    OutputInfo,
    VideoWriter,
    choose_encoder,
    write_picture,
)

__all__ = [
    "PICTURE_SUFFIXES",
    "AudioInfo",
    "EncoderSettings",
    "MediaLimits",
    "OutputInfo",
    "SourceFrame",
    "SourceInfo",
    "VideoWriter",
    "choose_encoder",
    "decoder_pid",
    "fit_planes",
    "inspect_audio",
    "inspect_source",
    "probe_audio",
    "probe_both",
    "probe_source",
    "read_audio_blocks",
    "read_source",
    "read_waveform",
    "start_decoder",
    "thumbnail",
    "write_picture",
]
