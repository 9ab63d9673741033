"""Synthetic speech with the time of every sound: espeak-ng through its C library, flite as a program. For training.

Both come as Debian packages (`espeak-ng`, `libespeak-ng1`, `flite`); nothing of them is shipped.
"""

from __future__ import annotations

import ctypes
import functools
import re
import subprocess
import tempfile
import wave
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from demo.visemes import Phone

RATE = 16000
FLITE_VOICES = ("kal16", "awb", "rms", "slt")
ESPEAK_LANGUAGES = (
    "en-us",
    "en-gb",
    "en-gb-scotland",
    "de",
    "fr-fr",
    "es",
    "it",
    "pt-br",
    "nl",
    "pl",
    "sv",
    "fi",
    "tr",
)
ESPEAK_VARIANTS = ("", *(f"+m{n}" for n in range(1, 8)), *(f"+f{n}" for n in range(1, 6)), "+croak", "+whisper")

WORDS = tuple(
    """
    a able about above across after again air all along also always among and animal answer any apple area arm
    around ask away baby back bad bag ball bank base bath beach bear beat beautiful because become bed been before
    began behind being believe below best better between big bird bit black blood blow blue board boat body bone
    book both bottle bottom bow box boy branch bread break breath bright bring broad brother brought build burn busy
    but buy cake call came camp can capital captain car care carry case cat catch caught cause cell center chair
    chance change cheap check chick child choose church circle city claim class clean clear climb clock close cloth
    cloud coast coat cold color come common company compare cook cool copper copy corn corner cost could count
    country course cover cow create crop cross crowd cry current cut dance danger dark daughter day dead deal dear
    death decide deep desert design determine develop did differ dinner direct discuss distant divide doctor does
    dog dollar done door double down draw dream dress drink drive drop dry during each ear early earth ease east eat
    edge effect egg eight electric else end enemy energy engine enough enter equal even evening event ever every
    example excite exercise expect eye face fact fair fall family famous far farm fast fat father favor fear feed
    feel feet fell few field fifty fight figure fill final find fine finger finish fire first fish fit five flat
    floor flow flower fly follow food foot for force forest form forward found four fraction free fresh friend from
    front fruit full fun game garden gas gather gave general gentle get girl give glad glass go gold gone good got
    govern grand grass gray great green grew ground group grow guess guide gun had hair half hand happen happy hard
    has hat have he head hear heart heat heavy held help her here high hill him his history hit hold hole home hope
    horse hot hour house how huge human hundred hunt hurry ice idea if imagine inch industry insect iron island it
    job join joy jump just keep kept key kill kind king knew know lady lake land language large last late laugh law
    lay lead learn least leave left leg length less let letter level lie life lift light like line liquid list
    listen little live locate log lone long look lost lot loud love low machine made magnet main major make man many
    map mark market mass master match matter may me mean meant measure meat meet melody men metal method middle
    might mile milk million mind mine minute miss mix modern molecule moment money month moon more morning most
    mother motion mount mountain mouth move much multiply music must my name nation nature near neck need neighbor
    never new next night nine noise noon north nose note nothing notice noun now number numeral object observe occur
    ocean of off offer office often oil old on once one only open operate opposite or order other our out over own
    oxygen page paint pair paper paragraph parent part party pass past path pattern pay people perhaps person phrase
    pick picture piece place plain plan plane planet plant play please plural poem point poor populate port pose
    position possible pound power practice prepare present press pretty print probable problem process produce
    product proper property protect proud prove provide pull push put quart question quick quiet quite race radio
    rail rain raise range rather reach read ready real reason receive record red region remember repeat reply
    represent require rest result rich ride right ring rise river road rock roll room root rope rose round row rub
    rule run safe said sail salt same sand save saw say scale school science sea search season seat second section
    see seed seem sell send sense sentence separate serve seven several shall shape share sharp she sheet shell
    shine ship shoe shop shore short should shoulder shout show side sight sign silent silver similar simple since
    sing single sister sit six size skill skin sky sleep slip slow small smell smile smooth snow so soft soil
    soldier solution solve some son song soon sound south space speak special speech speed spell spend spoke spot
    spread spring square stand star start state stay steam steel step stick still stone stood stop store story
    straight strange stream street stretch string strong student study subject success such sudden sugar suggest
    suit summer sun supply support sure surface surprise swim table tail take talk tall teach team teeth tell ten
    term test than thank that the their them then there these they thick thin thing think third this those though
    thought thousand three through throw thus tie time tiny to together told tone too took tool top total touch
    toward town track trade train travel tree triangle trip trouble truck true try tube turn twenty two type uncle
    under unit until up us use usual valley value vary verb very view village visit voice vowel wait walk wall want
    war warm was wash watch water wave way we wear weather week weight well went were west what wheel when where
    whether which while white who whole whose why wide wife wild will win wind window wing winter wire wish with
    woman wonder wood word work world would write written wrong yard year yellow yes yet you young your
    """.split()  # noqa: SIM905 - a list of a thousand strings is no better to read
)


@dataclass(frozen=True)
class Speech:
    """Sound float32 (n,) at 16 kHz in -1..1, and its phones."""

    waveform: NDArray[np.float32]
    phones: tuple[Phone, ...]


def sentence(random: np.random.Generator) -> str:
    """Three to ten words in a row, for the sounds and not for the sense."""
    words = [WORDS[index] for index in random.integers(0, len(WORDS), int(random.integers(3, 11)))]
    return (" ".join(words)).capitalize() + "."


def resample(waveform: NDArray[np.floating[Any]], factor: float) -> NDArray[np.float32]:
    """`waveform` with `factor` times as many samples (linear; good enough for what a voice is changed by)."""
    n_out = max(1, round(len(waveform) * factor))
    places = np.arange(n_out) / factor
    made: NDArray[np.float32] = np.interp(places, np.arange(len(waveform)), waveform).astype(np.float32)
    return made


def with_flite(text: str, voice: str, stretch: float = 1.0) -> Speech:
    """Speak with flite; `voice` is one of FLITE_VOICES. It prints each sound with the time of its end."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "speech.wav"
        command = ["flite", "-voice", voice, "--setf", f"duration_stretch={stretch:.3f}"]
        command += ["-t", text, "-psdur", "-o", str(path)]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        with wave.open(str(path)) as file:
            rate = file.getframerate()
            samples = np.frombuffer(file.readframes(file.getnframes()), np.int16).astype(np.float32) / 32768
    phones: list[Phone] = []
    begin = 0.0
    for name, end in re.findall(r"(\S+):([\d.]+)", printed):
        phones.append(Phone(name, begin, float(end)))
        begin = float(end)
    return Speech(resample(samples, RATE / rate), tuple(phones))


class _Event(ctypes.Structure):
    """An event of espeak-ng's C interface (speak_lib.h)."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", ctypes.c_char * 8),
    )


_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))
_PHONEME_EVENT = 7
_SYNCHRONOUS = 2
_PHONEMES_AS_IPA = 3
_UTF8 = 1
_SPEED, _PITCH = 1, 3


@functools.cache
def _espeak() -> tuple[ctypes.CDLL, int]:
    library = ctypes.CDLL("libespeak-ng.so.1")
    rate = library.espeak_Initialize(_SYNCHRONOUS, 200, None, _PHONEMES_AS_IPA)
    if rate <= 0:
        raise RuntimeError("espeak-ng cannot be started")
    return library, rate


def with_espeak(text: str, voice: str, *, words_per_minute: int = 165, pitch: int = 50) -> Speech:
    """Speak with espeak-ng; `voice` is a language with an optional variant (`en-us+f2`)."""
    library, rate = _espeak()
    blocks: list[NDArray[np.int16]] = []
    starts: list[tuple[float, str]] = []

    def on_sound(samples: ctypes._Pointer[ctypes.c_short], count: int, events: ctypes._Pointer[_Event]) -> int:
        if samples and count > 0:
            blocks.append(np.ctypeslib.as_array(samples, (count,)).astype(np.int16).copy())
        index = 0
        while events[index].type != 0:
            event = events[index]
            if event.type == _PHONEME_EVENT:
                starts.append((event.audio_position / 1000, event.id.decode("utf-8", "ignore")))
            index += 1
        return 0

    callback = _CALLBACK(on_sound)
    library.espeak_SetSynthCallback(callback)
    library.espeak_SetVoiceByName(voice.encode())
    library.espeak_SetParameter(_SPEED, words_per_minute, 0)
    library.espeak_SetParameter(_PITCH, pitch, 0)
    data = text.encode()
    library.espeak_Synth(data, len(data) + 1, 0, 0, 0, _UTF8, None, None)
    library.espeak_Synchronize()
    samples = (np.concatenate(blocks) if blocks else np.zeros(1, np.int16)).astype(np.float32) / 32768
    ends = [start for start, _ in starts[1:]] + [len(samples) / rate]
    phones = tuple(Phone(name, start, end) for (start, name), end in zip(starts, ends, strict=True))
    return Speech(resample(samples, RATE / rate), phones)


def utterance(random: np.random.Generator) -> Speech:
    """A random sentence by a random voice, resampled so that pitch, formants and tempo differ."""
    text = sentence(random)
    if random.random() < 0.5:
        speech = with_flite(text, FLITE_VOICES[random.integers(len(FLITE_VOICES))], float(random.uniform(0.85, 1.25)))
    else:
        voice = ESPEAK_LANGUAGES[random.integers(len(ESPEAK_LANGUAGES))]
        voice += ESPEAK_VARIANTS[random.integers(len(ESPEAK_VARIANTS))]
        speech = with_espeak(
            text, voice, words_per_minute=int(random.integers(120, 221)), pitch=int(random.integers(10, 91))
        )
    factor = float(random.uniform(0.86, 1.18))
    phones = tuple(Phone(phone.symbol, phone.start_s * factor, phone.end_s * factor) for phone in speech.phones)
    peak = float(np.abs(speech.waveform).max()) + 1e-6
    return Speech(resample(speech.waveform, factor) * (0.7 / peak), phones)


def clip(random: np.random.Generator, seconds: float) -> Speech:
    """Utterances with pauses of 0.2 to 2 s until `seconds` are full; cut there."""
    n_samples = int(seconds * RATE)
    waveform = np.zeros(n_samples, np.float32)
    phones: list[Phone] = []
    place = int(random.uniform(0.1, 0.8) * RATE)
    while place < n_samples:
        spoken = utterance(random)
        count = min(len(spoken.waveform), n_samples - place)
        waveform[place : place + count] = spoken.waveform[:count]
        offset = place / RATE
        phones += [
            Phone(phone.symbol, phone.start_s + offset, min(seconds, phone.end_s + offset))
            for phone in spoken.phones
            if phone.start_s + offset < seconds
        ]
        place += len(spoken.waveform) + int(random.choice([0.2, 0.4, 0.8, 2.0]) * random.uniform(0.7, 1.3) * RATE)
    return Speech(waveform, tuple(phones))
