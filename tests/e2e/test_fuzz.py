"""A thousand malformed and random bodies at a real worker: never a 500, never a trace of ours, always the document."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import requests
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.support.schemas import JSON, values_of
from tests.support.server import Server
from worker.web.openapi import job_schema

_KEYS = ["musetalk_job_id", "video_url", "audio_url", "aspect_ratio", "resolution", "params", "surplus"]


def _job_like() -> st.SearchStrategy[Any]:
    """What the document allows, then with fields replaced by anything."""
    schema: Any = job_schema()
    return st.tuples(values_of(schema), st.dictionaries(st.sampled_from(_KEYS), JSON, max_size=3)).map(
        lambda pair: {**pair[0], **pair[1]}
    )


BODIES = (
    st.binary(max_size=200)
    | JSON.map(lambda value: json.dumps(value).encode())
    | _job_like().map(lambda value: json.dumps(value).encode())
    | _job_like().map(lambda value: json.dumps(value).encode()[:-1])
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_models: Path) -> Iterator[Server]:
    # No name is looked up: only one host is allowed, and it is never drawn.
    server = Server(tmp_path_factory.mktemp("fuzz"), tiny_models, DOWNLOAD_ALLOWED_HOSTS="media.example")
    try:
        server.wait_for(200)
        yield server
    finally:
        server.stop()


def test_no_body_makes_the_worker_stumble(server: Server) -> None:
    document = requests.get(f"{server.url}/openapi.json", timeout=10).json()
    failure = document["components"]["schemas"]["Failure"]
    seen: dict[int, int] = {}
    with requests.Session() as session:

        @settings(
            max_examples=1000,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(BODIES, st.sampled_from(["application/json", "text/plain", "", "multipart/form-data"]))
        def post(body: bytes, kind: str) -> None:
            answer = session.post(f"{server.url}/generate", data=body, headers={"Content-Type": kind}, timeout=30)
            seen[answer.status_code] = seen.get(answer.status_code, 0) + 1
            assert answer.status_code == 422, answer.text
            jsonschema.validate(answer.json(), failure)
            assert answer.json()["retryable"] is False
            for ours in ("Traceback", str(server.folder), ".py"):
                assert ours not in answer.text

        post()
    assert seen[422] >= 1000
    assert server.health()[0] == 200
    assert "unexpected error" not in server.log_text()
    assert server.leftovers() == []


def test_other_methods_paths_and_headers_make_no_trouble_either(server: Server) -> None:
    for method in ("GET", "PUT", "PATCH", "HEAD", "OPTIONS", "DELETE", "TRACE"):
        for path in (
            "/",
            "/generate",
            "/generate/",
            "/hc",
            "/outputs/",
            "/outputs/..%2f..%2fetc%2fpasswd",
            "/%ff",
            "/metrics",
        ):
            answer = requests.request(method, server.url + path, timeout=10)
            assert answer.status_code < 500, f"{method} {path}: {answer.text}"
    answer = requests.post(f"{server.url}/generate", data=(b" " * 65536 for _ in range(200)), timeout=30)
    assert answer.status_code == 413
    assert server.health()[0] == 200
