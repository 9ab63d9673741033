"""A small orchestrator for trying buffer mode on one machine, and the command that gives it jobs.

    export INTERNAL_API_KEY=a-key-of-yours
    python examples/orchestrator.py serve                              # one terminal
    WORKER_MODE=buffer ORCHESTRATOR_BASE_URL=http://127.0.0.1:8500 \\
      ALLOW_PRIVATE_NETWORKS=1 ./run_worker.sh                         # another
    python examples/orchestrator.py submit face.mp4 speech.wav         # a third: shows progress, prints the address

It implements docs/protocol.md: heartbeats, claims, outcomes, progress. A job whose worker is silent for 30 seconds, or
that failed as retryable, is handed out again, four times at most. Everything is in one SQLite file.
"""

from __future__ import annotations

import argparse
import hmac
import json
import os
import re
import secrets
import sqlite3
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests
from flask import Flask, Response, jsonify, request, send_from_directory
from tqdm import tqdm
from werkzeug.exceptions import HTTPException

PORT = 8500
# A worker that is silent for longer counts as dead.
SILENCE_S = 30.0
MAX_ATTEMPTS = 4
MAX_FILE_BYTES = 2**30

SCHEMA = """
CREATE TABLE IF NOT EXISTS workers (
  id TEXT PRIMARY KEY, seen REAL NOT NULL, status TEXT, gpu_class TEXT, error TEXT);
CREATE TABLE IF NOT EXISTS jobs (
  id TEXT PRIMARY KEY, musetalk_job_id TEXT NOT NULL, request TEXT NOT NULL, created REAL NOT NULL,
  state TEXT NOT NULL DEFAULT 'queued', worker TEXT, attempts INTEGER NOT NULL DEFAULT 0,
  cancel INTEGER NOT NULL DEFAULT 0, phase TEXT, progress REAL NOT NULL DEFAULT 0, output_url TEXT,
  metrics TEXT, error TEXT);
"""


class Jobs:
    """The queue in a SQLite file; every method is one transaction."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with self._transaction() as database:
            database.executescript(SCHEMA)

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        database = sqlite3.connect(self._path, timeout=10, isolation_level=None)
        database.row_factory = sqlite3.Row
        try:
            # One writer at a time, from the first look on: two claims must not see the same job.
            database.execute("BEGIN IMMEDIATE")
            yield database
            if database.in_transaction:
                database.execute("COMMIT")
        finally:
            database.close()

    def add(self, fields: Mapping[str, Any]) -> str:
        """Queue a job; returns its id."""
        job_id = uuid.uuid4().hex
        with self._transaction() as database:
            database.execute(
                "INSERT INTO jobs (id, musetalk_job_id, request, created) VALUES (?, ?, ?, ?)",
                (job_id, fields["musetalk_job_id"], json.dumps(dict(fields)), time.time()),
            )
        return job_id

    def get(self, job_id: str) -> dict[str, Any] | None:
        """One job as a person sees it."""
        with self._transaction() as database:
            row = database.execute("SELECT * FROM jobs WHERE id = ?", (job_id,)).fetchone()
        return _shown(row) if row else None

    def all(self) -> list[dict[str, Any]]:
        """All jobs, newest first."""
        with self._transaction() as database:
            return [_shown(row) for row in database.execute("SELECT * FROM jobs ORDER BY created DESC LIMIT 200")]

    def workers(self) -> list[dict[str, Any]]:
        """All workers and how long ago they were heard."""
        now = time.time()
        with self._transaction() as database:
            rows = database.execute("SELECT * FROM workers ORDER BY id").fetchall()
        return [{**dict(row), "silent_s": round(now - row["seen"], 1)} for row in rows]

    def heard(self, worker: str, status: str, gpu_class: str | None, error: str | None) -> list[str]:
        """Record a heartbeat; return the cancelled jobs of this worker."""
        with self._transaction() as database:
            database.execute(
                "INSERT INTO workers (id, seen, status, gpu_class, error) VALUES (?, ?, ?, ?, ?) ON CONFLICT (id) "
                "DO UPDATE SET seen = excluded.seen, status = excluded.status, gpu_class = excluded.gpu_class, "
                "error = excluded.error",
                (worker, time.time(), status, gpu_class, error),
            )
            rows = database.execute(
                "SELECT id FROM jobs WHERE worker = ? AND state = 'claimed' AND cancel = 1", (worker,)
            )
            return [row["id"] for row in rows]

    def claim(self, worker: str) -> dict[str, Any] | None:
        """The oldest job that is free, now this worker's."""
        with self._transaction() as database:
            self._give_back(database)
            row = database.execute("SELECT * FROM jobs WHERE state = 'queued' ORDER BY created LIMIT 1").fetchone()
            if row is None:
                return None
            database.execute(
                "UPDATE jobs SET state = 'claimed', worker = ?, attempts = attempts + 1, phase = NULL, progress = 0 "
                "WHERE id = ?",
                (worker, row["id"]),
            )
        return {"buffer_job_id": row["id"], **json.loads(row["request"])}

    def _give_back(self, database: sqlite3.Connection) -> None:
        """Jobs of silent workers are free again, or failed when they were tried too often."""
        silent = (
            "state = 'claimed' AND worker NOT IN (SELECT id FROM workers WHERE seen > ?)",
            (time.time() - SILENCE_S,),
        )
        database.execute(
            f"UPDATE jobs SET state = 'failed', error = 'its worker went silent' WHERE attempts >= {MAX_ATTEMPTS} "
            f"AND {silent[0]}",
            silent[1],
        )
        database.execute(f"UPDATE jobs SET state = 'queued' WHERE {silent[0]}", silent[1])

    def ended(self, job_id: str, report: Mapping[str, Any]) -> int:
        """The end of an attempt; returns the HTTP status: 200, 404 unknown, 409 ended before in another way."""
        with self._transaction() as database:
            row = database.execute("SELECT * FROM jobs WHERE id = ?", (job_id,)).fetchone()
            if row is None:
                return 404
            wanted = "succeeded" if report["status"] == "succeeded" else "failed"
            if row["state"] in ("succeeded", "failed", "cancelled"):
                return 200 if row["state"] == wanted else 409
            if wanted == "failed" and row["cancel"]:
                wanted = "cancelled"
            elif wanted == "failed" and report.get("retryable") and row["attempts"] < MAX_ATTEMPTS:
                wanted = "queued"
            database.execute(
                "UPDATE jobs SET state = ?, error = ?, output_url = ?, metrics = ?, progress = ? WHERE id = ?",
                (
                    wanted,
                    report.get("error"),
                    report.get("output_url"),
                    json.dumps(report.get("metrics")),
                    1.0 if wanted == "succeeded" else row["progress"],
                    job_id,
                ),
            )
        return 200

    def progressed(self, musetalk_job_id: str, update: Mapping[str, Any]) -> list[str]:
        """Progress of a running attempt; returns the ids to cancel."""
        with self._transaction() as database:
            database.execute(
                "UPDATE jobs SET phase = coalesce(?, phase), progress = coalesce(?, progress) "
                "WHERE musetalk_job_id = ? AND state = 'claimed'",
                (update.get("phase"), update.get("progress"), musetalk_job_id),
            )
            rows = database.execute(
                "SELECT id FROM jobs WHERE musetalk_job_id = ? AND state = 'claimed' AND cancel = 1", (musetalk_job_id,)
            )
            return [row["id"] for row in rows]

    def cancel(self, job_id: str) -> bool:
        """Cancel a queued job at once, a claimed one with its worker's next call; return whether the job exists."""
        with self._transaction() as database:
            database.execute("UPDATE jobs SET state = 'cancelled' WHERE id = ? AND state = 'queued'", (job_id,))
            found = database.execute(
                "UPDATE jobs SET cancel = 1 WHERE id = ? AND state IN ('claimed', 'cancelled')", (job_id,)
            )
            return found.rowcount > 0


def _shown(row: sqlite3.Row) -> dict[str, Any]:
    shown = dict(row)
    shown["request"] = json.loads(shown["request"])
    shown["metrics"] = json.loads(shown["metrics"]) if shown["metrics"] else None
    return shown


def create_app(folder: Path, key: str) -> Flask:
    """The orchestrator over `folder`, which contains its database and the submitted files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = (folder / "files").resolve()
    files.mkdir(exist_ok=True)
    jobs = Jobs(folder / "jobs.sqlite")
    app = Flask("orchestrator", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = MAX_FILE_BYTES

    @app.before_request
    def check_key() -> tuple[Response, int] | None:
        # Workers fetch files without the key; their names cannot be guessed.
        if request.path == "/health" or (request.method == "GET" and request.path.startswith("/files/")):
            return None
        given = request.headers.get("X-Internal-API-Key", "").encode("utf-8", "surrogateescape")
        return None if hmac.compare_digest(given, key.encode()) else (jsonify({"detail": "wrong key"}), 401)

    @app.errorhandler(HTTPException)
    def answer_http_error(error: HTTPException) -> tuple[Response, int]:
        return jsonify({"detail": error.name}), error.code or 500

    def body() -> dict[str, Any]:
        given = request.get_json(force=True, silent=True)
        return given if isinstance(given, dict) else {}

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/internal/buffer/workers/<path:worker>/heartbeat")
    def heartbeat(worker: str) -> dict[str, Any]:
        given = body()
        cancelled = jobs.heard(worker, str(given.get("status")), given.get("gpu_class"), given.get("error"))
        return {"detail": "ok", "cancel": cancelled}

    @app.post("/internal/buffer/jobs/claim")
    def claim() -> dict[str, Any]:
        return {"job": jobs.claim(str(body().get("worker_id")))}

    @app.post("/internal/buffer/jobs/<path:job_id>/status")
    def status(job_id: str) -> tuple[dict[str, str], int]:
        report = body()
        if report.get("status") not in ("succeeded", "failed"):
            return {"detail": "status must be succeeded or failed"}, 422
        code = jobs.ended(job_id, report)
        return {"detail": {200: "ok", 404: "no such job", 409: "it ended before"}[code]}, code

    @app.post("/internal/jobs/<path:musetalk_job_id>/progress")
    def progress(musetalk_job_id: str) -> dict[str, Any]:
        return {"detail": "ok", "cancel": jobs.progressed(musetalk_job_id, body())}

    @app.post("/files")
    def add_file() -> dict[str, str]:
        suffix = re.sub(r"[^a-z0-9.]", "", Path(request.args.get("name", "")).suffix.lower())[:8]
        name = secrets.token_urlsafe(18) + suffix
        with (files / name).open("xb") as file:
            while block := request.stream.read(2**20):
                file.write(block)
        return {"url": f"{request.host_url}files/{name}"}

    @app.get("/files/<name>")
    def get_file(name: str) -> Response:
        return send_from_directory(files, name)

    @app.post("/jobs")
    def submit() -> tuple[dict[str, str], int]:
        given = body()
        for name in ("video_url", "audio_url"):
            if not isinstance(given.get(name), str):
                return {"detail": f"{name} must be an address"}, 422
        given.setdefault("musetalk_job_id", f"job-{uuid.uuid4().hex[:12]}")
        return {"id": jobs.add(given), "musetalk_job_id": str(given["musetalk_job_id"])}, 201

    @app.get("/jobs")
    def show_all() -> dict[str, Any]:
        return {"jobs": jobs.all(), "workers": jobs.workers()}

    @app.get("/jobs/<job_id>")
    def show(job_id: str) -> tuple[dict[str, Any], int]:
        job = jobs.get(job_id)
        return (job, 200) if job else ({"detail": "no such job"}, 404)

    @app.delete("/jobs/<job_id>")
    def cancel(job_id: str) -> tuple[dict[str, str], int]:
        return ({"detail": "cancelled"}, 202) if jobs.cancel(job_id) else ({"detail": "no such job"}, 404)

    return app


# -- commands ---------------------------------------------------------------------------------------------------------


class Client:
    """Calls an orchestrator."""

    def __init__(self, url: str, key: str) -> None:
        self._url = url.rstrip("/")
        self._session = requests.Session()
        self._session.headers["X-Internal-API-Key"] = key

    def call(self, method: str, path: str, **arguments: Any) -> dict[str, Any]:
        """One call; exits with the orchestrator's words when it refuses."""
        try:
            answer = self._session.request(method, self._url + path, timeout=60, **arguments)
        except requests.ConnectionError:
            raise SystemExit(f"error: no orchestrator answers at {self._url}") from None
        decoded: dict[str, Any] = answer.json()
        if not answer.ok:
            raise SystemExit(f"error: {decoded.get('detail')} (HTTP {answer.status_code})")
        return decoded

    def address_of(self, given: str) -> str:
        """Return an address unchanged; submit a file first."""
        if re.match(r"https?://", given):
            return given
        path = Path(given)
        if not path.is_file():
            raise SystemExit(f"error: there is no file {given}")
        with path.open("rb") as file:
            return str(self.call("POST", "/files", params={"name": path.name}, data=file)["url"])

    def watch(self, job_id: str) -> int:
        """Show a job's progress until its end; returns the exit status."""
        with tqdm(total=100, unit="%", desc="queued", file=sys.stderr, bar_format="{desc}: {bar} {n:.0f}%") as bar:
            while True:
                job = self.call("GET", f"/jobs/{job_id}")
                bar.set_description(job["phase"] if job["state"] == "claimed" and job["phase"] else job["state"])
                bar.update(100 * job["progress"] - bar.n)
                if job["state"] in ("succeeded", "failed", "cancelled"):
                    break
                time.sleep(0.3)
        if job["state"] == "succeeded":
            print(job["output_url"])
            return 0
        print(f"{job['state']}: {job['error'] or ''}", file=sys.stderr)
        return 1


def _submit(client: Client, given: argparse.Namespace) -> int:
    params: dict[str, Any] = {}
    for pair in given.param:
        name, _, text = pair.partition("=")
        try:
            params[name] = json.loads(text)
        except ValueError:
            params[name] = text
    job = {"video_url": client.address_of(given.source), "audio_url": client.address_of(given.audio), "params": params}
    added = client.call("POST", "/jobs", json=job)
    print(f"job {added['id']}", file=sys.stderr)
    return 0 if given.no_watch else client.watch(added["id"])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="A small orchestrator for the MuseTalk worker's buffer mode.")
    parser.add_argument("--url", default=os.environ.get("ORCHESTRATOR_BASE_URL", f"http://127.0.0.1:{PORT}"))
    commands = parser.add_subparsers(dest="command", required=True)
    serve = commands.add_parser("serve", help="run the orchestrator")
    serve.add_argument("--port", type=int, default=PORT)
    serve.add_argument("--folder", type=Path, default=Path("orchestrator"))
    submit = commands.add_parser("submit", help="give it a job and watch it")
    submit.add_argument("source", help="video or still: a file or an address")
    submit.add_argument("audio", help="speech: a file or an address")
    submit.add_argument("--param", action="append", default=[], metavar="NAME=VALUE")
    submit.add_argument("--no-watch", action="store_true")
    for name, what in (("watch", "watch a job"), ("cancel", "cancel a job")):
        commands.add_parser(name, help=what).add_argument("job")
    commands.add_parser("list", help="jobs and workers")
    given = parser.parse_args(arguments)
    key = os.environ.get("INTERNAL_API_KEY", "")
    if not key:
        raise SystemExit("error: set INTERNAL_API_KEY; workers must have the same")
    if given.command == "serve":
        create_app(given.folder, key).run(host="127.0.0.1", port=given.port, threaded=True)
        return 0
    client = Client(given.url, key)
    if given.command == "submit":
        return _submit(client, given)
    if given.command == "watch":
        return client.watch(given.job)
    if given.command == "cancel":
        client.call("DELETE", f"/jobs/{given.job}")
        return 0
    state = client.call("GET", "/jobs")
    for worker in state["workers"]:
        print(f"worker {worker['id']}: {worker['status']}, heard {worker['silent_s']} s ago, {worker['gpu_class']}")
    for job in state["jobs"]:
        print(f"job {job['id']}: {job['state']} {job['output_url'] or job['error'] or ''}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
