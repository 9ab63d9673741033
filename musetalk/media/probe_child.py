"""The process behind `probe_source` and `probe_audio`: one request on standard input, one answer on standard output.

Started as a file by an isolated interpreter, so that neither the working directory nor the environment decides what it
imports. Only the standard library is imported before the limits are set.
"""

from __future__ import annotations

import json
import sys
from fractions import Fraction
from typing import Any


def main() -> int:
    """Read the request, set the limits, inspect the file, write the answer; returns the exit status."""
    request = json.load(sys.stdin)
    plain = dict(request["limits"])
    _limit_process(cpu_s=plain["probe_cpu_s"], memory_bytes=plain["probe_memory_bytes"])
    sys.path[:] = request["sys_path"]
    json.dump(_answer(request["kind"], request["path"], plain), sys.stdout)
    return 0


def _limit_process(*, cpu_s: int, memory_bytes: int) -> None:
    try:
        import resource
    except ImportError:  # a system without such limits; the limit of wall time still applies
        return
    # A little more as the hard limit: the soft one ends the process with a signal of its own name.
    for kind, soft, hard in (
        (resource.RLIMIT_CPU, cpu_s, cpu_s + 1),
        (resource.RLIMIT_AS, memory_bytes, memory_bytes),
        (resource.RLIMIT_CORE, 0, 0),
        (resource.RLIMIT_FSIZE, 0, 0),
    ):
        allowed = resource.getrlimit(kind)[1]
        most = sys.maxsize if allowed == resource.RLIM_INFINITY else allowed
        resource.setrlimit(kind, (min(soft, most), min(hard, most)))


def _answer(kind: str, path: str, plain: dict[str, Any]) -> dict[str, Any]:
    from pathlib import Path

    from musetalk.errors import MuseTalkError
    from musetalk.media.limits import MediaLimits, to_json

    rates = {name: Fraction(plain[name]) for name in ("min_rate", "raised_rate", "max_rate", "resampled_rate")}
    limits = MediaLimits(**{**plain, **rates, "decoder_threads": 1})
    try:
        if kind == "source":
            from musetalk.media.probe import inspect_source

            return {"info": to_json(inspect_source(Path(path), limits))}
        from musetalk.media.sound import inspect_audio

        return {"info": to_json(inspect_audio(Path(path), limits))}
    except MemoryError:
        return _too_much_memory(kind)
    except MuseTalkError as error:
        # Within a process of limited memory this is the file's doing, not the machine's.
        if error.details.get("reason") == "MemoryError":
            return _too_much_memory(kind)
        return _as_answer(type(error).__name__, error.message, error.retryable, error.details)


def _too_much_memory(kind: str) -> dict[str, Any]:
    return _as_answer("MediaError", f"the {kind} needs too much memory to be decoded", False, {})


def _as_answer(name: str, message: str, retryable: bool, details: dict[str, Any]) -> dict[str, Any]:
    return {"error": name, "message": message, "retryable": retryable, "details": details}


if __name__ == "__main__":
    sys.exit(main())
