"""Environment variables that are no settings: what our programs set for each other, and for libraries."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

# Set by run_worker.sh to its process id, for the server that it starts.
SCRIPT_PID = "MUSETALK_SCRIPT_PID"
# Set by run_worker.sh for each server of several: the card that it works with.
CARD = "MUSETALK_CARD"
# Of the OpenMP library that torch's Linux wheels contain (GNU's): how long its threads wait by spinning.
SPINNING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
_SPINS = "4000"


def is_started_by_script() -> bool:
    """Whether run_worker.sh is the parent of this process; it passes its signals on."""
    return os.environ.get(SCRIPT_PID) == str(os.getppid())


def card_of_process() -> str | None:
    """Return the card that run_worker.sh gave to this process as one of several servers; None for a single one."""
    return os.environ.get(CARD) or None


def limit_spinning(environment: MutableMapping[str, str] | None = None) -> None:
    """Let tensor threads wait briefly by spinning, then sleep; call it before torch is imported.

    By default they spin for milliseconds for a thread whose core another process has, and take the time that the other
    process would have needed. A variable that is set already wins.
    """
    environment = os.environ if environment is None else environment
    if not any(environment.get(name) for name in SPINNING):
        environment["GOMP_SPINCOUNT"] = _SPINS
