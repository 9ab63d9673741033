"""A Backblaze B2 on loopback for the real b2sdk: the native API (v4), as far as uploads need it.

It checks tokens, SHA-1, names and parts as B2 does, and keeps the uploads. Faults are injected by the name of the call:
`b2_authorize_account`, `b2_get_upload_url`, ..., and `upload`, `upload_part`, `download` for the data.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import socket
import struct
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

from tests.support.loopback import LoopbackServer

ACCOUNT = "0123456789ab"
BUCKET_ID = "b" * 24
CAPABILITIES = ("listBuckets", "listFiles", "readFiles", "shareFiles", "writeFiles", "deleteFiles")


@dataclass(frozen=True)
class Fault:
    """Fault of one call.

    `status` answers with an error; `cut` resets the connection in mid-body; `deaf` does not read the body; `silent`
    reads and never answers; `drip` sends header lines for ever; `lie` reports another SHA-1; `garbage` is no JSON.
    `lost` stores the upload and then resets the connection instead of answering.
    """

    status: int = 0
    code: str = "service_unavailable"
    message: str = "busy"
    retry_after: str | None = None
    cut: bool = False
    deaf: bool = False
    silent: bool = False
    drip: bool = False
    lie: bool = False
    garbage: bool = False
    lost: bool = False


@dataclass(frozen=True)
class Stored:
    """One version of an object."""

    body: bytes
    content_type: str
    sha1: str
    info: dict[str, str]


@dataclass
class Unfinished:
    """An unfinished large file: its parts by number."""

    name: str
    content_type: str
    info: dict[str, str]
    parts: dict[int, bytes] = field(default_factory=dict)


class RefusalError(Exception):
    """The call is answered with an error."""

    def __init__(self, status: int, code: str, message: str = "") -> None:
        super().__init__(code)
        self.status, self.code, self.message = status, code, message


class FakeB2:
    """An account with one bucket; use it as a context manager. `realm` goes into the settings."""

    def __init__(
        self,
        *,
        bucket: str = "clips",
        bucket_type: str = "allPublic",
        key: tuple[str, str] = ("000keyid0001", "K000secretappkey"),
        restricted_to: str | None = None,
        name_prefix: str | None = None,
        capabilities: Iterable[str] = CAPABILITIES,
        part_bytes: int = 100_000_000,
    ) -> None:
        self.bucket, self.bucket_type, self.key = bucket, bucket_type, key
        self.restricted_to, self.name_prefix = restricted_to, name_prefix
        self.capabilities, self.part_bytes = list(capabilities), part_bytes
        self.calls: list[str] = []
        self.upload_tokens_used: list[str] = []
        self.part_numbers: list[int] = []
        self.versions: dict[str, list[Stored]] = {}
        self.unfinished: dict[str, Unfinished] = {}
        self.lifetimes: list[int] = []
        self.on_call: Callable[[str], None] = lambda name: None
        self.closing = threading.Event()
        self._faults: dict[str, list[Fault]] = {}
        self._account_tokens: set[str] = set()
        self._upload_tokens: set[str] = set()
        self._download_tokens: dict[str, str] = {}
        self._n_issued = 0
        self._lock = threading.RLock()
        self._connections: set[socket.socket] = set()
        self._server = self._make_server()
        self.realm = f"http://127.0.0.1:{self._server.port}"

    def _make_server(self) -> LoopbackServer:
        fake = self

        class Server(LoopbackServer):
            def finish_request(self, request: Any, client_address: Any) -> None:
                with fake._lock:
                    fake._connections.add(request)
                try:
                    super().finish_request(request, client_address)
                finally:
                    with fake._lock:
                        fake._connections.discard(request)
                    request.close()

        class Handler(_Handler):
            b2 = fake

        return Server(Handler)

    def __enter__(self) -> FakeB2:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        with self._lock:
            for connection in self._connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        self._server.stop()

    def inject(self, call: str, *faults: Fault, times: int = 1) -> None:
        """Let the next calls of this name fail, one fault each; the sequence is repeated `times` times."""
        with self._lock:
            self._faults.setdefault(call, []).extend(list(faults) * times)

    def take_fault(self, call: str) -> Fault:
        """Count a call that has arrived and return its fault."""
        with self._lock:
            self.calls.append(call)
            waiting = self._faults.get(call)
            fault = waiting.pop(0) if waiting else Fault()
        self.on_call(call)
        return fault

    def count(self, call: str) -> int:
        """Return the number of calls of this name."""
        return self.calls.count(call)

    def newest(self, name: str) -> Stored:
        """Return the version that the object's address serves."""
        return self.versions[name][-1]

    def expire_account_tokens(self) -> None:
        """Expire the authorizations, as B2 does after 24 hours."""
        self._account_tokens.clear()

    def expire_upload_tokens(self) -> None:
        """Expire the upload URLs, as B2 does after a while."""
        self._upload_tokens.clear()

    # ---- the calls; each returns the JSON answer or raises RefusalError

    def token(self, kind: str, known: set[str]) -> str:
        with self._lock:
            self._n_issued += 1
            token = f"4_{ACCOUNT}_{kind}_{self._n_issued:06d}_SECRETTOKEN="
            known.add(token)
            return token

    def b2_authorize_account(self, header: str, _: dict[str, Any]) -> dict[str, Any]:
        if header != "Basic " + base64.b64encode(":".join(self.key).encode()).decode():
            raise RefusalError(401, "unauthorized", "invalid key")
        buckets = [{"id": BUCKET_ID, "name": self.restricted_to}] if self.restricted_to else None
        storage = {
            "apiUrl": self.realm,
            "downloadUrl": self.realm,
            "s3ApiUrl": self.realm,
            "absoluteMinimumPartSize": 1000,
            "recommendedPartSize": self.part_bytes,
            "infoType": "storageApi",
            "allowed": {"buckets": buckets, "capabilities": self.capabilities, "namePrefix": self.name_prefix},
        }
        return {
            "accountId": ACCOUNT,
            "authorizationToken": self.token("acct", self._account_tokens),
            "apiInfo": {"storageApi": storage},
            "applicationKeyExpirationTimestamp": None,
        }

    def require(self, capability: str, name: str | None = None) -> None:
        """Refuse a capability that the key lacks, or a name outside its prefix."""
        is_outside = name is not None and not name.startswith(self.name_prefix or "")
        if capability not in self.capabilities or is_outside:
            raise RefusalError(401, "unauthorized", "not entitled")

    def b2_list_buckets(self, _: str, body: dict[str, Any]) -> dict[str, Any]:
        self.require("listBuckets")
        wanted = body.get("bucketName")
        bucket = {
            "accountId": ACCOUNT,
            "bucketId": BUCKET_ID,
            "bucketName": self.bucket,
            "bucketType": self.bucket_type,
            "bucketInfo": {},
            "corsRules": [],
            "lifecycleRules": [],
            "options": [],
            "revision": 1,
            "defaultServerSideEncryption": {"isClientAuthorizedToRead": True, "value": {"mode": None}},
            "fileLockConfiguration": {"isClientAuthorizedToRead": False, "value": None},
            "replicationConfiguration": {"isClientAuthorizedToRead": False, "value": None},
        }
        return {"buckets": [bucket] if wanted in {None, self.bucket} else []}

    def b2_get_upload_url(self, _: str, body: dict[str, Any]) -> dict[str, Any]:
        self.require("writeFiles", self.name_prefix or "")
        if body["bucketId"] != BUCKET_ID:
            raise RefusalError(400, "bad_bucket_id")
        token = self.token("up", self._upload_tokens)
        return {
            "bucketId": BUCKET_ID,
            "uploadUrl": f"{self.realm}/upload/{self._n_issued}",
            "authorizationToken": token,
        }

    def b2_start_large_file(self, _: str, body: dict[str, Any]) -> dict[str, Any]:
        self.require("writeFiles", body["fileName"])
        with self._lock:
            self._n_issued += 1
            file_id = f"4_z{BUCKET_ID}_large{self._n_issued}"
            self.unfinished[file_id] = Unfinished(body["fileName"], body["contentType"], body["fileInfo"])
        return self.large_file(file_id)

    def large_file(self, file_id: str) -> dict[str, Any]:
        large = self.unfinished[file_id]
        return {
            **self.locks(),
            "fileId": file_id,
            "fileName": large.name,
            "accountId": ACCOUNT,
            "bucketId": BUCKET_ID,
            "contentType": large.content_type,
            "fileInfo": large.info,
        }

    def locks(self) -> dict[str, Any]:
        return {
            "action": "upload",
            "uploadTimestamp": 1_700_000_000_000,
            "fileRetention": {"isClientAuthorizedToRead": True, "value": {"mode": None}},
            "legalHold": {"isClientAuthorizedToRead": True, "value": None},
        }

    def b2_get_upload_part_url(self, _: str, body: dict[str, Any]) -> dict[str, Any]:
        token = self.token("part", self._upload_tokens)
        url = f"{self.realm}/part/{body['fileId']}/{self._n_issued}"
        return {"fileId": body["fileId"], "uploadUrl": url, "authorizationToken": token}

    def b2_list_unfinished_large_files(self, _: str, body: dict[str, Any]) -> dict[str, Any]:
        self.require("listFiles")
        prefix = body.get("namePrefix") or ""
        files = [
            self.large_file(file_id) for file_id, large in self.unfinished.items() if large.name.startswith(prefix)
        ]
        return {"files": files, "nextFileId": None}

    def b2_list_parts(self, _: str, body: dict[str, Any]) -> dict[str, Any]:
        parts = sorted(self.unfinished[body["fileId"]].parts.items())
        found = [
            {
                "fileId": body["fileId"],
                "partNumber": number,
                "contentLength": len(part),
                "contentSha1": hashlib.sha1(part).hexdigest(),
            }
            for number, part in parts
        ]
        return {"parts": found, "nextPartNumber": None}

    def b2_finish_large_file(self, _: str, body: dict[str, Any]) -> dict[str, Any]:
        large = self.unfinished[body["fileId"]]
        parts = [part for _, part in sorted(large.parts.items())]
        if [hashlib.sha1(part).hexdigest() for part in parts] != body["partSha1Array"]:
            raise RefusalError(400, "bad_request", "part sha1 mismatch")
        with self._lock:
            del self.unfinished[body["fileId"]]
        return self.store(large.name, b"".join(parts), large.content_type, "none", large.info)

    def b2_get_download_authorization(self, _: str, body: dict[str, Any]) -> dict[str, Any]:
        self.require("shareFiles", body["fileNamePrefix"])
        self.lifetimes.append(body["validDurationInSeconds"])
        token = self.token("dl", set()) + "/+"
        self._download_tokens[token] = body["fileNamePrefix"]
        return {"bucketId": BUCKET_ID, "fileNamePrefix": body["fileNamePrefix"], "authorizationToken": token}

    # ---- data

    def check_account(self, header: str) -> None:
        if header not in self._account_tokens:
            raise RefusalError(401, "expired_auth_token", "the token is too old")

    def check_upload(self, header: str) -> None:
        self.upload_tokens_used.append(header)
        if header not in self._upload_tokens:
            raise RefusalError(401, "expired_auth_token", "the token is too old")

    def store(self, name: str, body: bytes, content_type: str, sha1: str, info: dict[str, str]) -> dict[str, Any]:
        with self._lock:
            self.versions.setdefault(name, []).append(Stored(body, content_type, sha1, info))
            self._n_issued += 1
        return {
            **self.locks(),
            "fileId": f"4_z{BUCKET_ID}_f{self._n_issued}",
            "fileName": name,
            "accountId": ACCOUNT,
            "bucketId": BUCKET_ID,
            "contentLength": len(body),
            "contentSha1": sha1,
            "contentType": content_type,
            "fileInfo": info,
        }

    def may_download(self, name: str, header: str, query: str) -> bool:
        if self.bucket_type == "allPublic":
            return True
        token = header or next(iter(parse_qs(query).get("Authorization", [])), "")
        return token in self._account_tokens or name.startswith(self._download_tokens.get(token, "\0"))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    b2: FakeB2

    def do_POST(self) -> None:
        path = urlsplit(self.path).path
        kind = path.split("/")[1]
        call = {"upload": "upload", "part": "upload_part"}.get(kind, path.rsplit("/", 1)[-1])
        fault = self.b2.take_fault(call)
        if fault.deaf:
            self.b2.closing.wait()
            self.close_connection = True
            return
        body = self._read_body(fault)
        if body is None:
            return
        if fault.silent:
            self.b2.closing.wait()
            self.close_connection = True
            return
        try:
            if fault.status:
                raise RefusalError(fault.status, fault.code, fault.message)
            answer = self._work(call, body)
        except RefusalError as refusal:
            self._answer(
                refusal.status,
                {"status": refusal.status, "code": refusal.code, "message": refusal.message},
                fault.retry_after,
            )
            return
        if fault.lost:
            self._reset()
            return
        if fault.lie:
            answer["contentSha1"] = "0" * 40
        if fault.drip:
            self._drip()
        self._answer(200, b"<html>busy</html>" if fault.garbage else answer)

    def _read_body(self, fault: Fault) -> bytes | None:
        length = int(self.headers.get("Content-Length", "0"))
        if fault.cut:
            self.rfile.read(length // 2)
            self._reset()
            return None
        body = self.rfile.read(length)
        return body if len(body) == length else None

    def _work(self, call: str, body: bytes) -> dict[str, Any]:
        header = self.headers.get("Authorization", "")
        if call == "upload":
            return self._upload(header, body)
        if call == "upload_part":
            return self._upload_part(header, body)
        if call != "b2_authorize_account":
            self.b2.check_account(header)
        if not self.path.startswith("/b2api/v4/"):
            raise RefusalError(404, "not_found")
        answer: dict[str, Any] = getattr(self.b2, call)(header, json.loads(body))
        return answer

    def _upload(self, header: str, body: bytes) -> dict[str, Any]:
        self.b2.check_upload(header)
        body, sha1 = self._checked(body)
        name = unquote(self.headers["X-Bz-File-Name"])
        self.b2.require("writeFiles", name)
        info = {
            key[len("x-bz-info-") :]: unquote(value)
            for key, value in self.headers.items()
            if key.lower().startswith("x-bz-info-")
        }
        return self.b2.store(name, body, self.headers["Content-Type"], sha1, info)

    def _upload_part(self, header: str, body: bytes) -> dict[str, Any]:
        self.b2.check_upload(header)
        body, sha1 = self._checked(body)
        file_id, number = self.path.split("/")[2], int(self.headers["X-Bz-Part-Number"])
        self.b2.unfinished[file_id].parts[number] = body
        self.b2.part_numbers.append(number)
        return {"fileId": file_id, "partNumber": number, "contentLength": len(body), "contentSha1": sha1}

    def _checked(self, body: bytes) -> tuple[bytes, str]:
        announced = self.headers["X-Bz-Content-Sha1"]
        if announced == "hex_digits_at_end":
            body, announced = body[:-40], body[-40:].decode()
        sha1 = hashlib.sha1(body).hexdigest()
        if announced != sha1:
            raise RefusalError(400, "bad_request", "Sha1 did not match data received")
        return body, sha1

    def do_GET(self) -> None:
        fault = self.b2.take_fault("download")
        parts = urlsplit(self.path)
        name = unquote(parts.path.removeprefix(f"/file/{quote(self.b2.bucket)}/"))
        if fault.status:
            self._answer(fault.status, {"status": fault.status, "code": fault.code, "message": ""})
        elif not self.b2.may_download(name, self.headers.get("Authorization", ""), parts.query):
            self._answer(401, {"status": 401, "code": "unauthorized", "message": ""})
        elif name not in self.b2.versions:
            self._answer(404, {"status": 404, "code": "not_found", "message": ""})
        else:
            found = self.b2.newest(name)
            self._answer(200, found.body, content_type=found.content_type)

    def do_HEAD(self) -> None:
        self.do_GET()

    def _answer(
        self,
        status: int,
        answer: dict[str, Any] | bytes,
        retry_after: str | None = None,
        content_type: str = "application/json",
    ) -> None:
        body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        if retry_after is not None:
            self.send_header("Retry-After", retry_after)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _drip(self) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\n")
        while not self.b2.closing.wait(0.02):
            self.wfile.write(b"X-Drip: 1\r\n")

    def _reset(self) -> None:
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def log_message(self, format: str, *args: object) -> None:
        """Keep the test's output clean."""
