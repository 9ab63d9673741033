"""The cards of one machine: which of them work, and the settings of the worker on each. Knows no processes."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from musetalk.cores import MAX_THREADS, usable_cores
from musetalk.errors import SettingsError
from worker.config import Settings, load_settings
from worker.process_variables import CARD

# A driver in trouble may never answer.
_NVIDIA_SMI_S = 60.0
_VISIBLE = "CUDA_VISIBLE_DEVICES"
EVERY_CARD = ("all",)
# `0, GPU-1f…` as answered to a query, `GPU 0: NVIDIA … (UUID: GPU-1f…)` as in the list.
_LISTED = re.compile(r"^(?:GPU )?(\d+)\b[^\n]*?(GPU-[\w-]+)?\)?$", re.MULTILINE)
_QUERIES = (("--query-gpu=index,uuid", "--format=csv,noheader"), ("-L",))


@dataclass(frozen=True)
class InstalledCard:
    """A card that the machine has: its number and, where it is known, its UUID."""

    number: str
    uuid: str = ""


@dataclass(frozen=True)
class CardWorker:
    """The worker on one card: the card as CUDA knows it, and what differs from the other workers of the machine."""

    card: str
    port: int
    worker_id: str
    variables: Mapping[str, str]


def installed_cards(dev: Path = Path("/dev")) -> list[InstalledCard]:
    """The cards of this machine by nvidia-smi; without that program, as many as there are device files."""
    for arguments in _QUERIES:
        try:
            done = subprocess.run(  # noqa: S603 - no shell, constant arguments
                ["nvidia-smi", *arguments],  # noqa: S607 - found on PATH, where the driver's tools are
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_NVIDIA_SMI_S,
                check=True,
            )
        except (OSError, subprocess.SubprocessError):
            continue
        if cards := [InstalledCard(found[1], found[2] or "") for found in _LISTED.finditer(done.stdout)]:
            return cards
    try:
        n_files = sum(re.fullmatch(r"nvidia\d+", name) is not None for name in os.listdir(dev))
    except OSError:
        n_files = 0
    # A container may have /dev/nvidia3 alone; CUDA counts what it sees from 0.
    return [InstalledCard(str(number)) for number in range(n_files)]


def choose_cards(
    wanted: Sequence[str],
    visible: str | None,
    installed: Callable[[], Sequence[InstalledCard]] = installed_cards,
) -> list[str]:
    """The cards of WORKER_GPUS as CUDA_VISIBLE_DEVICES names them; `visible` is that variable's value (None: unset).

    Raises SettingsError when a card is not there, named twice, or when there is none.
    """
    if visible is None:
        found = list(installed())
        if not found:
            raise SettingsError(
                "WORKER_GPUS is set, but this machine has no NVIDIA card, or its driver does not answer"
            )
    else:
        found = [
            InstalledCard(name.strip(), name.strip()) for name in visible.split(",") if name.strip() not in {"", "-1"}
        ]
        if not found:
            raise SettingsError(f"WORKER_GPUS is set, but {_VISIBLE} hides every card")
    if tuple(wanted) == EVERY_CARD:
        return [card.number for card in found]
    chosen: list[str] = []
    for name in wanted:
        match = next((card for card in found if name == card.number or (card.uuid and name == card.uuid)), None)
        # Parts of a card have names of their own, which the list above lacks.
        if match is None and not (visible is None and name.startswith("MIG-")):
            cards = ", ".join(card.number for card in found)
            raise SettingsError(f"WORKER_GPUS names card {name}; this machine has {cards}")
        if match is not None and {match.number, match.uuid or match.number} & set(chosen):
            raise SettingsError(f"WORKER_GPUS names card {name} twice")
        chosen.append(name)
    return chosen


def card_workers(settings: Settings, cards: Sequence[str], environment: Mapping[str, str]) -> list[CardWorker]:
    """The workers on `cards`: WORKER_PORT + 1, + 2 …, a folder and a name each; the rest is the machine's.

    Raises SettingsError when a worker could not start with these settings.
    """
    if settings.port + len(cards) > 65535:
        raise SettingsError(f"WORKER_PORT {settings.port} leaves no {len(cards)} ports above it for the cards")
    workers = []
    for number, card in enumerate(cards, start=1):
        variables = {
            _VISIBLE: card,
            # nvidia-smi counts by place on the bus; CUDA by itself begins with the fastest card.
            "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
            CARD: card,
            "WORKER_PORT": str(settings.port + number),
            "WORK_DIR": str(settings.work_dir / f"card-{card}"),
            "BUFFER_WORKER_ID": f"{settings.worker_id}-{card}",
        }
        if not settings.video_threads:
            variables["VIDEO_THREADS"] = str(min(MAX_THREADS, max(1, usable_cores() // len(cards))))
        own = load_settings({**environment, **variables})
        workers.append(CardWorker(card, own.port, own.worker_id, variables))
    return workers
