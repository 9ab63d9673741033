"""Environment variables that are no settings: what our programs set for each other, and for libraries."""

from __future__ import annotations

import os

# Set by run_worker.sh to its process id, for the server that it starts.
SCRIPT_PID = "MUSETALK_SCRIPT_PID"
# Set by run_worker.sh for each server of several: the card that it works with.
CARD = "MUSETALK_CARD"


def is_started_by_script() -> bool:
    """Whether run_worker.sh is the parent of this process; it passes its signals on."""
    return os.environ.get(SCRIPT_PID) == str(os.getppid())


def card_of_process() -> str | None:
    """Return the card that run_worker.sh gave to this process as one of several servers; None for a single one."""
    return os.environ.get(CARD) or None
