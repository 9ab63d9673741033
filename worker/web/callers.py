"""Who may call: pages of other sites never, callers on this machine without a key, all others with it.

A page of another site can send a POST to localhost, and with a name of its own that resolves to this machine (DNS
rebinding) it could also read the answers. Knows Flask's requests and the settings.
"""

from __future__ import annotations

import hmac
import ipaddress
import re
import socket
from urllib.parse import urlsplit

from flask import Request
from werkzeug.exceptions import Forbidden, Unauthorized

from worker.config import Settings

# Set in the request's environment once the caller has shown the key or is on this machine.
TRUSTED = "musetalk.trusted"

_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::\d{1,5})?")
_LOOPBACK_NAMES = {"localhost", "localhost.localdomain", "ip6-localhost", "ip6-loopback"}


def check(request: Request, settings: Settings, *, is_open: bool) -> None:
    """Let the caller pass, and note whether it is trusted; `is_open` routes refuse only pages of other sites.

    Raises Forbidden for a page of another site and for an unknown name of this server, Unauthorized without the key.
    """
    _check_origin(request)
    key = settings.internal_api_key
    has_key = bool(key) and _has_key(request, key)
    is_local = _is_local(request)
    request.environ[TRUSTED] = has_key or (is_local and is_known_host(request.environ.get("HTTP_HOST"), settings))
    if is_open or has_key:
        return
    if key and not is_local:
        raise Unauthorized("the header X-Internal-API-Key must contain this worker's INTERNAL_API_KEY")
    if not is_known_host(request.environ.get("HTTP_HOST"), settings):
        raise Forbidden(
            "this server does not know the name it was called by; send the key, or add the name to ALLOWED_HOSTS"
        )


def _check_origin(request: Request) -> None:
    """Raise Forbidden when a browser says that the page belongs to another site."""
    origin = request.headers.get("Origin")
    if origin is None:
        return
    try:
        place = urlsplit(origin).netloc
    except ValueError:
        raise Forbidden from None
    if place != request.host:
        raise Forbidden


def _has_key(request: Request, key: str) -> bool:
    given = request.headers.get("X-Internal-API-Key", "")
    return hmac.compare_digest(given.encode("utf-8", "surrogateescape"), key.encode())


def _is_local(request: Request) -> bool:
    """Whether the caller is on this machine; a request that a proxy on this machine forwards is not."""
    if any(name in request.headers for name in ("Forwarded", "X-Forwarded-For", "X-Real-IP")):
        return False
    try:
        address = ipaddress.ip_address((request.remote_addr or "").split("%", 1)[0])
    except ValueError:
        return False
    # A socket for both families reports an IPv4 caller as ::ffff:127.0.0.1.
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)


def is_known_host(header: str | None, settings: Settings) -> bool:
    """Whether the Host header names this server; None (no header) is no browser.

    An address always does: a page can choose the name under which it reaches this machine, but not the address.
    """
    if header is None:
        return True
    match = _HOST.fullmatch(header)
    if match is None:
        return False
    name = match[1].strip("[]").rstrip(".").lower()
    try:
        ipaddress.ip_address(name)
    except ValueError:
        pass
    else:
        return True
    own = {*_LOOPBACK_NAMES, socket.gethostname().lower(), (urlsplit(settings.public_base_url).hostname or "")}
    return name in own or name.endswith(".localhost") or any(_matches(name, rule) for rule in settings.allowed_hosts)


def _matches(name: str, rule: str) -> bool:
    rule = rule.lower().rstrip(".")
    return name.endswith(rule[1:]) if rule.startswith("*.") and len(rule) > 2 else name == rule
