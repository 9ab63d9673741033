"""One address for all cards of a machine: /hc is 200 while a card is healthy, /metrics are those of all cards.

The servers of the cards are asked every second, so that a probe is answered at once whatever they do. Knows no jobs.
"""

from __future__ import annotations

import http.client
import json
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from flask import Flask, Response, current_app, jsonify, request
from werkzeug.exceptions import HTTPException

from musetalk.errors import MethodNotAllowedError, NotFoundError, RequestError, UnauthorizedError
from worker.config import Settings, load_settings
from worker.jobs import error_body
from worker.web.callers import check

_ASK_EVERY_S = 1.0
# /hc answers in milliseconds; on a machine whose cores are all busy it may take longer.
_ANSWER_S = 5.0
# An answer that is older says nothing.
_FRESH_S = 10.0
_MAX_ANSWER_BYTES = 10_000_000
_UP = "musetalk_card_up"
_NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))
_SAMPLE = re.compile(r"([A-Za-z_:][\w:]*)(?:\{(.*)\})?( .+)")
_KINDS: Mapping[int, type[RequestError]] = {401: UnauthorizedError, 404: NotFoundError, 405: MethodNotAllowedError}


@dataclass(frozen=True)
class Place:
    """Where a card's server is: the card, its worker's name, its port."""

    card: str
    worker_id: str
    port: int


class Watch:
    """The newest answer of one card's /hc."""

    def __init__(self, place: Place, host: str, key: str) -> None:
        """Nothing is asked before `start`; `key` is sent along because the server's own address may not be local."""
        self.place = place
        self._address = f"http://{f'[{host}]' if ':' in host else host}:{place.port}"
        self._headers = {"X-Internal-API-Key": key} if key else {}
        self._answer: dict[str, Any] = {}
        self._answered = float("-inf")

    def start(self) -> None:
        """Ask in a thread of its own from now on."""
        threading.Thread(target=self._run, name=f"card-{self.place.card}", daemon=True).start()

    def _run(self) -> None:
        while True:
            self.ask()
            time.sleep(_ASK_EVERY_S)

    def ask(self) -> None:
        """Ask once."""
        try:
            body = json.loads(self.fetch("/hc"))
        except (OSError, http.client.HTTPException, ValueError) as error:
            if isinstance(getattr(error, "reason", error), ConnectionRefusedError):
                # Nobody listens; a server that is only slow keeps its last answer for a while.
                self._answered = float("-inf")
            return
        if isinstance(body, dict):
            self._answer, self._answered = body, time.monotonic()

    def fetch(self, path: str) -> bytes:
        """The body at `path`, whatever the status; raises OSError or HTTPException when there is none."""
        call = urllib.request.Request(self._address + path, headers=self._headers)  # noqa: S310 - our own http address
        try:
            with _NO_PROXY.open(call, timeout=_ANSWER_S) as answer:
                return bytes(answer.read(_MAX_ANSWER_BYTES))
        except urllib.error.HTTPError as error:
            with error:
                return error.read(_MAX_ANSWER_BYTES)

    def state(self) -> dict[str, Any]:
        """The card, its worker and port, and the answer of its /hc; `unreachable` without a fresh one."""
        body: dict[str, Any] = {
            "card": self.place.card,
            "worker_id": self.place.worker_id,
            "port": self.place.port,
        }
        if time.monotonic() - self._answered > _FRESH_S:
            return {**body, "status": "unreachable", "reason": "the server of this card does not answer"}
        return {**body, **self._answer}


def create_app(places: Sequence[tuple[str, str, int]], settings: Settings | None = None) -> Flask:
    """Build the app for the cards at `places` (card, worker's name, port) and start to ask them."""
    settings = settings or load_settings()
    host = {"": "127.0.0.1", "::": "127.0.0.1", "0.0.0.0": "127.0.0.1"}.get(settings.host, settings.host)  # noqa: S104 - compared only
    watches = [Watch(Place(*place), host, settings.internal_api_key) for place in places]
    for watch in watches:
        watch.start()
    app = Flask("musetalk-cards", static_folder=None)
    app.json.sort_keys = False  # type: ignore[attr-defined]
    app.extensions["watches"], app.extensions["settings"] = watches, settings
    app.add_url_rule("/hc", view_func=health, methods=["GET"])
    app.add_url_rule("/metrics", view_func=metrics, methods=["GET"])
    app.before_request(_check_caller)
    app.register_error_handler(HTTPException, _answer_error)
    return app


def _watches() -> list[Watch]:
    watches: list[Watch] = current_app.extensions["watches"]
    return watches


def _check_caller() -> None:
    check(request, current_app.extensions["settings"], is_open=request.endpoint == "health")


def health() -> tuple[Response, int]:
    """Answer 200 while a card is healthy, 503 with all reasons otherwise."""
    body = summary([watch.state() for watch in _watches()])
    return jsonify(body), 200 if body["healthy"] else 503


def summary(cards: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The body of /hc from those of the cards: the best status of them, the number of healthy ones, the list."""
    n_healthy = sum(card["status"] == "ok" for card in cards)
    states = [card["status"] for card in cards]
    status = next((state for state in ("ok", "starting", "draining", "failed") if state in states), "unreachable")
    body: dict[str, Any] = {"status": status, "healthy": n_healthy, "cards": list(cards)}
    if not n_healthy:
        body["reason"] = "; ".join(f"card {card['card']}: {card.get('reason', card['status'])}" for card in cards)
    return body


def metrics() -> Response:
    """Answer with the metrics of all cards, each with the label `card`, and whether each card answered."""
    watches = _watches()
    with ThreadPoolExecutor(len(watches)) as pool:
        texts = list(pool.map(_metrics_of, watches))
    joined = joined_metrics((watch.place.card, text) for watch, text in zip(watches, texts, strict=True))
    return Response(joined, content_type="text/plain; version=0.0.4; charset=utf-8")


def _metrics_of(watch: Watch) -> str | None:
    try:
        return watch.fetch("/metrics").decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        return None


def joined_metrics(texts: Iterable[tuple[str, str | None]]) -> str:
    """Metrics in Prometheus' text format of (card, its text or None) as one text with the label `card`.

    All samples of a metric stand together behind its description, as the format demands.
    """
    families: dict[str, list[str]] = {_UP: []}
    descriptions = {_UP: [f"# HELP {_UP} Whether the server of a card answered this scrape.", f"# TYPE {_UP} gauge"]}
    for card, text in texts:
        families[_UP].append(f'{_UP}{{card="{card}"}} {int(text is not None)}')
        family = ""
        for line in (text or "").splitlines():
            if line.startswith(("# HELP ", "# TYPE ")):
                family = line.split(" ")[2]
                known = descriptions.setdefault(family, [])
                if line not in known:
                    known.append(line)
            elif (sample := _SAMPLE.fullmatch(line)) is not None:
                labels = ",".join(filter(None, (f'card="{card}"', sample[2])))
                families.setdefault(family, []).append(f"{sample[1]}{{{labels}}}{sample[3]}")
    lines = [line for name, described in descriptions.items() for line in (*described, *families.get(name, []))]
    return "\n".join(lines) + "\n"


def _answer_error(error: HTTPException) -> tuple[Response, int]:
    """Answer with the JSON body of the protocol."""
    status = error.code or 500
    text = str(error.description if status in (401, 403) else error.name)
    if status == 404:
        text = "this address has /hc and /metrics of all cards; each card serves the other routes at its own port"
    ours = _KINDS.get(status, RequestError)(text, status_code=status)
    ours.stage = "validation"
    return jsonify(error_body(ours)[1]), status
