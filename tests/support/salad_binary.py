"""An imitation of Salad's queue binary, as a program: python salad_binary.py QUEUE_PORT READINESS_S DELIVERY_S.

Takes one job at a time from `salad_queue.SaladQueue`, posts it to the worker on WORKER_PORT, and passes the answer on:
408, 429, 5xx and a broken connection are a refusal, everything else is the job's result. It asks /hc every READINESS_S
seconds and takes jobs only while that is 200. SIGTERM ends it at once, without a word about the job it has.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import sys
import threading
import time
from typing import Any


def refused(status: int) -> bool:
    """Whether the queue counts this status as a failed attempt."""
    return status in (408, 429) or status >= 500


def post(port: int, job: dict[str, Any]) -> dict[str, Any]:
    """Post a job without a time limit; return what the queue gets."""
    try:
        connection = http.client.HTTPConnection("localhost", port)
        headers = {"Content-Type": "application/json", "Salad-Job-Id": job["id"]}
        connection.request("POST", "/generate", json.dumps(job["body"]), headers)
        answer = connection.getresponse()
        body = answer.read().decode()
        connection.close()
    except (OSError, http.client.HTTPException) as error:
        return {"id": job["id"], "result": "rejected", "reason": type(error).__name__}
    if refused(answer.status):
        return {"id": job["id"], "result": "rejected", "reason": str(answer.status)}
    return {"id": job["id"], "result": "completed", "body": body}


def is_ready(port: int) -> bool:
    """Whether /hc is 200, as the platform's probe sees it."""
    try:
        connection = http.client.HTTPConnection("localhost", port, timeout=5)
        connection.request("GET", "/hc")
        status = connection.getresponse().status
        connection.close()
    except (OSError, http.client.HTTPException):
        return False
    return status == 200


def main() -> None:
    """Take jobs until SIGTERM."""
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    queue_port, readiness_s, delivery_s = int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
    port = int(os.environ["WORKER_PORT"])
    stream = socket.create_connection(("127.0.0.1", queue_port))
    sending = threading.Lock()

    def send(message: dict[str, Any]) -> None:
        with sending:
            stream.sendall(json.dumps(message).encode() + b"\n")

    def watch() -> None:
        while True:
            send({"ready": is_ready(port)})
            time.sleep(readiness_s)

    threading.Thread(target=watch, daemon=True).start()
    for line in stream.makefile():
        outcome = post(port, json.loads(line))
        # The call by which the real one completes or rejects a job crosses the internet.
        time.sleep(delivery_s)
        send(outcome)


if __name__ == "__main__":
    main()
