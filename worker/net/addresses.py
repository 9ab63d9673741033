"""Check of download addresses: parse strictly, resolve the name, check every result. Knows no HTTP.

The threat is a job that names an address inside our network: the cloud's metadata service, the worker itself, a
neighbour. A name is refused if any of its addresses is not public. The caller dials exactly the addresses that were
checked, so a second lookup cannot return another one. Spellings that two parsers read differently (userinfo, zones,
octal or short IPv4, backslashes) are refused and never interpreted.
"""

from __future__ import annotations

import ipaddress
import re
import socket
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from urllib.parse import quote, urlsplit

import idna

from musetalk.errors import DownloadError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolver = Callable[[str, int], Sequence[str]]

# Signed addresses have one to two kilobytes; servers refuse more than eight.
MAX_URL_LENGTH = 8192
DEFAULT_PORTS = {"http": 80, "https": 443}

# Refused even where private networks are allowed: cloud metadata, and addresses that no media host can have.
_ALWAYS_REFUSED = {
    "169.254.0.0/16": "link-local (cloud metadata)",
    "100.100.100.200/32": "cloud metadata",
    "168.63.129.16/32": "cloud host service",  # Azure's, although the address is a public one
    "192.0.0.0/24": "protocol assignment",
    "0.0.0.0/8": "unspecified",
    "192.0.2.0/24": "documentation",
    "198.51.100.0/24": "documentation",
    "203.0.113.0/24": "documentation",
    "192.88.99.0/24": "6to4 relay",
    "224.0.0.0/4": "multicast",
    "240.0.0.0/4": "reserved",
    "fd00:ec2::254/128": "cloud metadata",
    "fe80::/10": "link-local",
    "fec0::/10": "site-local",
    "ff00::/8": "multicast",
    "::/128": "unspecified",
    "64:ff9b:1::/48": "local NAT64",
    "100::/64": "discard",
    "100:0:0:1::/64": "discard",
    "2001::/32": "Teredo",
    "2001:2::/48": "benchmark",
    "2001:10::/28": "overlay identifier",
    "2001:20::/28": "overlay identifier",
    "2001:db8::/32": "documentation",
    "2002::/16": "6to4",
    "3fff::/20": "documentation",
    "5f00::/16": "segment routing",
}
# Refused unless private networks are allowed.
_PRIVATE = {
    "127.0.0.0/8": "loopback",
    "10.0.0.0/8": "private",
    "172.16.0.0/12": "private",
    "192.168.0.0/16": "private",
    "100.64.0.0/10": "carrier-grade NAT",
    "198.18.0.0/15": "benchmark",
    "::1/128": "loopback",
    "fc00::/7": "unique local",
}
# Listed here, because `ipaddress.is_global` differs between patch releases of Python.
_NETWORKS = [(ipaddress.ip_network(net), why, False) for net, why in _ALWAYS_REFUSED.items()] + [
    (ipaddress.ip_network(net), why, True) for net, why in _PRIVATE.items()
]
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
# IANA assigns public IPv6 addresses from this block only.
_GLOBAL_V6 = ipaddress.IPv6Network("2000::/3")
_IETF_V6 = ipaddress.IPv6Network("2001::/23")

_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
# RFC 3986, section 3.3 and 3.4, with the brackets that every client sends; and a percent sign that escapes nothing.
_NOT_IN_REQUEST_LINE = re.compile(r"[^!#$%&'()*+,\-./0-9:;=?@A-Z\[\]_a-z~]|%(?![0-9A-Fa-f]{2})")
_NUMBER = re.compile(r"(0x[0-9a-f]*|[0-9]+)")


@dataclass(frozen=True)
class Target:
    """The parts of an http(s) address: `host` is ASCII, lower case, without brackets or trailing dot.

    `path` is path and query as they go into the request line: byte for byte as given, because hosts sign that text.
    """

    scheme: str
    host: str
    port: int
    path: str

    @property
    def is_literal(self) -> bool:
        """Whether the host is an IP address instead of a name."""
        return ":" in self.host or _is_number(self.host)

    @property
    def authority(self) -> str:
        """Host with the port where it is not the scheme's own: the value of the Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def url(self) -> str:
        """The address, rebuilt from the checked parts."""
        return f"{self.scheme}://{self.authority}{self.path}"


def parse_target(url: str) -> Target:
    """Split an http(s) address into checked parts, without its fragment.

    Raises DownloadError for another scheme and for every spelling that two parsers could read as different hosts.
    """
    if len(url) > MAX_URL_LENGTH:
        raise _refused(f"it has {len(url)} characters; {MAX_URL_LENGTH} are allowed", url)
    # urlsplit drops tabs and line ends without an error; another parser would end the host there.
    if any(unicodedata.category(character) in {"Cc", "Cs", "Zl", "Zp"} for character in url):
        raise _refused("it contains control characters", url)
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise _refused("it is malformed", url) from None
    if parts.scheme not in DEFAULT_PORTS:
        raise _refused("its scheme is neither http nor https", url)
    # Browsers read a backslash as a slash, so that the host would end there.
    if "@" in parts.netloc or "\\" in parts.netloc:
        raise _refused("it must not contain a user name or a backslash", url)
    if not host or port == 0:
        raise _refused("it has no host" if not host else "its port is 0", url)
    path = _request_path(url)
    return Target(parts.scheme, _normal_host(host, "[" in parts.netloc, url), port or DEFAULT_PORTS[parts.scheme], path)


def _request_path(url: str) -> str:
    """Path and query of an address as given; only what a request line cannot contain is escaped."""
    rest = re.sub(r"^\s*[^:/?#]+://[^/?#]*", "", url).split("#", 1)[0].rstrip(" ")
    path = rest if rest.startswith("/") else f"/{rest}"
    return _NOT_IN_REQUEST_LINE.sub(lambda match: quote(match[0], safe=""), path)


def _normal_host(host: str, bracketed: bool, url: str) -> str:
    """Return the host in one spelling: IPv6 as ipaddress writes it, names in ASCII (IDNA 2008, UTS 46 mapping)."""
    if bracketed or ":" in host:
        try:
            if "%" in host:
                raise ValueError("zone")
            return str(ipaddress.IPv6Address(host))
        except ValueError:
            raise _refused("its IPv6 host is malformed or has a zone", url) from None
    try:
        name = host.lower() if host.isascii() else idna.encode(host, uts46=True).decode("ascii")
    except idna.IDNAError:
        raise _refused("its host is not a valid name", url) from None
    name = name.removesuffix(".")
    if _is_number(name):
        try:
            return str(ipaddress.IPv4Address(name))
        except ValueError:
            raise _refused("its IPv4 host is not written as four decimal numbers", url) from None
    if len(name) > 253 or not all(_LABEL.fullmatch(label) for label in name.split(".")):
        raise _refused("its host is not a valid name", url)
    return name


def _is_number(name: str) -> bool:
    """Whether some parsers would read the name as an IPv4 address (its last label is a number)."""
    return bool(_NUMBER.fullmatch(name.rsplit(".", 1)[-1]))


def refusal(address: str, *, allow_private: bool = False) -> str | None:
    """Return the reason not to dial this IP address, or None; `address` may have a zone.

    For IPv4 inside IPv6 the inner address is checked if the network would translate it (mapped, NAT64). Tunnelled forms
    (6to4, Teredo, ISATAP, IPv4-compatible) are refused.
    """
    try:
        parsed = ipaddress.ip_address(address.split("%", 1)[0])
    except ValueError:
        return "unreadable"
    inner = _inner_ipv4(parsed)
    if inner is not None:
        return refusal(str(inner), allow_private=allow_private)
    for network, why, is_private in _NETWORKS:
        if parsed.version == network.version and parsed in network:
            return None if is_private and allow_private else why
    if isinstance(parsed, ipaddress.IPv6Address):
        return _refusal_of_ipv6(parsed)
    return None


def _inner_ipv4(address: Address) -> ipaddress.IPv4Address | None:
    """IPv4 address that a packet to this IPv6 address reaches through the system or a NAT64 gateway, or None."""
    if isinstance(address, ipaddress.IPv4Address):
        return None
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped


def _refusal_of_ipv6(address: ipaddress.IPv6Address) -> str | None:
    if address not in _GLOBAL_V6:
        return "not public"
    if address in _IETF_V6:
        return "protocol assignment"
    # The middle of the interface id marks ISATAP; the two masked bits are flags (RFC 5214).
    if (int(address) >> 32) & 0xFCFFFFFF == 0x00005EFE:
        return "ISATAP"
    return None


def resolve_host(host: str, port: int) -> list[str]:
    """Return all addresses of a name in the system's order, without duplicates; raises OSError if there is none."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def is_listed(target: Target, allowed_hosts: Sequence[str]) -> bool:
    """Whether the list has the host: `host`, `host:port`, `*.suffix` (not the suffix itself) or `*.suffix:port`."""
    for entry in allowed_hosts:
        name, port = _split_entry(entry.strip().lower())
        if port not in {None, target.port}:
            continue
        if target.host == name or (name.startswith("*.") and target.host.endswith(name[1:]) and len(name) > 2):
            return True
    return False


def _split_entry(entry: str) -> tuple[str, int | None]:
    name, colon, port = entry.rpartition(":")
    if not colon or not port.isdigit() or (":" in name and not name.endswith("]")):
        name, port = entry, ""
    name = name.strip("[]").removesuffix(".")
    return name, int(port) if port else None


def check_target(target: Target, *, allow_private: bool, allowed_hosts: Sequence[str]) -> bool:
    """Whether private addresses may be dialled for this target.

    Raises DownloadError if there is a list of hosts without this one, or if the port is below 1024 and neither 80 nor
    443. A listed host may have any port, and any port is allowed with private addresses.
    """
    listed = is_listed(target, allowed_hosts)
    if allowed_hosts and not listed:
        raise _refused("its host is not in DOWNLOAD_ALLOWED_HOSTS", target.url)
    if target.port < 1024 and target.port not in DEFAULT_PORTS.values() and not (listed or allow_private):
        raise _refused(f"port {target.port} is not allowed; use 80, 443 or 1024 and above", target.url)
    return allow_private or listed


def check_addresses(target: Target, addresses: Sequence[str], *, allow_private: bool) -> None:
    """Raise DownloadError unless every address of the target may be dialled."""
    for address in addresses:
        why = refusal(address, allow_private=allow_private)
        if why is not None:
            is_private = refusal(address, allow_private=True) is None
            hint = "; DOWNLOAD_ALLOWED_HOSTS or ALLOW_PRIVATE_NETWORKS=1 permits it" if is_private else ""
            raise _refused(f"its host leads to a {why} address{hint}", target.url)


def redact_url(url: str) -> str:
    """Reduce an address to what logs and errors may show: scheme, host, port and a plain file name."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        return "(malformed address)"
    if parts.scheme == "file":
        return "file:…"
    if parts.scheme not in DEFAULT_PORTS or not host:
        return f"{parts.scheme[:20]}:…" if parts.scheme else "(malformed address)"
    host = f"[{host}]" if ":" in host else host
    last = parts.path.rsplit("/", 1)[-1]
    # Users recognise a file by its name; a last part without an extension may be a token.
    name = last if re.fullmatch(r"[\w.-]{1,80}\.\w{1,5}", last, re.ASCII) else ""
    skipped = "/" if parts.path.count("/") <= 1 and (name or not last) else "/…/"
    return f"{parts.scheme}://{host[:253]}{f':{port}' if port else ''}{skipped}{name}"


# Words of a page that may be a signature or a token: long, and not plain letters.
_TOKEN = re.compile(r"(?=[A-Za-z_+/=-]*\d)[A-Za-z0-9_+/=.%-]{20,}")
_ADDRESS = re.compile(r"https?://[^\s\"'<>]+", re.IGNORECASE)


def redact_text(text: str) -> str:
    """What logs and errors may show of a stranger's text: addresses without their queries, nothing like a token."""
    return _TOKEN.sub("***", _ADDRESS.sub(lambda match: redact_url(match[0]), text))


def _refused(why: str, url: str) -> DownloadError:
    return DownloadError(f"the address was refused: {why}", url=redact_url(url))
