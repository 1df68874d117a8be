"""mkv: a distributed key-value store for blobs, in one file.

An index server (this module, with SQLite or PostgreSQL) knows where each key lives; volume
servers (stock nginx with WebDAV, or the embedded volume near the end) hold the bytes as plain
files. Whoever reads the bytes never passes through Python.

    PUT /key  -- body --> index server --> volume A   (blob, then .key sidecar)
                              |      '---> volume B
                              v
                        SQLite index: key -> version, volumes, size, digest
    GET /key  --> index server -- 302 --> the client reads the blob from volume A or B

On a volume, with h = sha256(key as UTF-8) in hex and version = 16 hex digits of nanoseconds + 4
that say who drew it:

    /h[0:2]/h[2:4]/h-version.ext      the blob
    /h[0:2]/h[2:4]/h-version.key      its sidecar: what it is, as JSON
    /h[0:2]/h[2:4]/h-version~tag.*    the same, where something was written a second time
    /h[0:2]/h[2:4]/h-version.del      a tombstone: this version is dead, whatever sidecar turns up
    /mkv-volume.key                   whose volume this is: store, name, a random number, as JSON

The sidecar is written after its blob and deleted before it: it is the commit mark on the volume. A
blob without a sidecar is an unfinished write; a sidecar without a blob is nothing. The index can
be rebuilt from the sidecars. A tombstone is there only while a volume that should delete a sidecar
does not answer, or may not have carried out a late write.

    PUT /key      201 new, 204 replaced      400 408 412 413 415 422 501 503 504 507
    GET /key      302 to a volume            304 404 412 503
    HEAD /key     200 from the index alone   304 404 412
    DELETE /key   204                        404 412 503 504
    GET /?prefix=&delimiter=&start=&limit=   200 JSON, 400 429
    GET /-/ (a page for browsers) /-/livez /-/readyz /-/status /-/metrics
    everywhere    400 405 414 421 431 501 505, with tokens 401 403
                  408 to whoever sends too slowly, 413 to a length that no blob can have

Rules that make cases impossible, so that no code has to count them:

    R1  A place, which is a path on a volume, is written once, by one request that is sent once. It
        is deleted some day, and nobody comes back to it: what has to be written again gets a tag.
        So a DELETE that comes late, or twice, hits nothing alive.
    R2  The commit orders. Whoever commits, its claims still standing, becomes the record, whatever
        its version. What is dead and has a higher version than what lives is buried before the
        answer, from the lowest version up: its sidecars are deleted, or `min_replicas` volumes get
        a tombstone. So a rebuild takes nothing that was replaced, deleted or refused.
    R3  Versions only rise, and the index knows which it has given out. So whoever holds a whole
        copy of it, however old, knows what is dead of all that it knew: what was drawn, and is in
        no record and no claim.
    R4  Volumes know who they are, and the index who it has seen. One that shows another identity,
        or none any more, is down until a person settles it (mkv_tools.py adopt).
    R5  Nobody acts on authority that has run out. Owners have random numbers; a PUT to a place is
        not sent once its owner's lease has ended. What stays true, a DELETE, a tombstone, may be
        sent at any time, by anybody.

Invariants (the tests cite them):

    I1  201 or 204 to a PUT: `replicas` volumes (at least `min_replicas`) have blob and sidecar,
        the record is on disk.
    I2  Anything else to a PUT but 504 leaves the key as it was, and what was written is buried
        before the answer. 504: it may have happened, or what it wrote or replaced may come back.
    I3  An acknowledged key reads back byte for byte while one volume of its record is up.
    I4  What was deleted, replaced or refused does not come back: not after a crash, not by rebuild
        with the index or any older copy, nor, while a volume with the tombstone is there, without.
        A PUT that got no answer may have happened, or happen then.
    I5  A reader gets one whole version, never a mix and never a short blob.
    I6  Rebuild from the volumes alone gives the same records, row for row, or fails and changes
        nothing.
    I7  Every tool can be killed at any step and run again.
    I8  No tool deletes the last good replica of a record. A timeout is never read as absence.
    I9  Memory is bounded by the number of connections, never by the size of a blob.
    I10 Bad input gets a 4xx with a reason, never a 5xx and never a change.
    I11 All answers about a key have an order that explains them, in which no request comes before
        one that was answered before it was sent. One without an answer (or 504) may have happened
        or not, 412, 429, 503 and 507 have not.

Why that holds without a lock on any key: blobs are immutable, every path names one version, and
the index decides, in one transaction that also notes as dead what it replaces. Whoever writes to a
volume claims the place in the index before, so what a crash leaves there is known.

What no index and no tombstone can cover: what a reader saw of a commit that was not answered yet
when the index was lost may be undone; what a volume carries out more than a day after it hung, or
more than five minutes after the connection to it broke or the server was killed, is covered by a
copy of the index only; nor does a process see a pause between its look at its lease and the system
call that sends.

Not here: POSIX, erasure coding, consensus between index servers, access lists per blob.

Reading order: as below. Up to "wire format" everything is pure (no clock, no randomness, no I/O),
and who has read that far knows all policy; the rest carries it out. A section whose banner says
that it is optional registers itself: it can be cut out of a copy, from its banner to the next."""

from __future__ import annotations

import os
import sys

try:  # before anything that Python 3.10 lacks
    if sys.version_info < (3, 11):  # noqa: UP036 - who copies this file has no pip that looks
        raise ImportError(f"this is Python {sys.version.split()[0]}")
    import aiohttp

    if tuple(map(int, aiohttp.__version__.split(".")[:2])) < (3, 14):
        raise ImportError(f"this is aiohttp {aiohttp.__version__}")
except ImportError as error:
    needs = "Python 3.11 or later and aiohttp 3.14 or later (pip install 'aiohttp>=3.14')"
    needs = f"mkv needs {needs}: {error}"
    if os.path.basename(sys.argv[0]) in ("mkv.py", "mkv", "mkv_tools.py", "mkv-tools"):
        print(needs, file=sys.stderr)
        sys.exit(2)
    raise ImportError(needs) from error

import argparse
import asyncio
import base64
import bisect
import contextlib
import enum
import errno
import fcntl
import hashlib
import hmac
import io
import json
import logging
import math
import mmap
import random
import re
import resource
import select
import signal
import socket
import sqlite3
import stat
import struct
import termios
import time
import tomllib
from collections import Counter, defaultdict, deque
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from collections.abc import Set as AbstractSet
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime
from email.utils import formatdate, parsedate_to_datetime
from functools import lru_cache, partial
from http import HTTPStatus
from itertools import chain, groupby, islice
from pathlib import Path
from types import MappingProxyType
from typing import (
    IO,
    Any,
    ClassVar,
    Concatenate,
    Generic,
    NamedTuple,
    NoReturn,
    ParamSpec,
    Protocol,
    Self,
    TypeVar,
    cast,
)
from urllib.parse import parse_qsl, quote, unquote_to_bytes, urlencode, urlsplit

from aiohttp import (
    ClientConnectorError,
    ClientError,
    ClientHandlerType,
    ClientOSError,
    ClientRequest,
    ClientResponse,
    ClientSession,
    ClientTimeout,
    ConnectionTimeoutError,
    DummyCookieJar,
    HttpVersion11,
    ServerDisconnectedError,
    TCPConnector,
    web,
)
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http_exceptions import HttpProcessingError
from yarl import URL as AnyURL

__version__ = "1.0.0"
__all__ = [
    "Blob", "Client", "Config", "ConfigError", "MkvError", "Ring", "Stored", "Token", "Volume",
    "create_app",
]  # fmt: skip

log = logging.getLogger("mkv")
access_log = logging.getLogger("mkv.access")
T = TypeVar("T")
P = ParamSpec("P")
Answer = tuple[int, bytes]  # of a volume: status, body
Place = tuple[str, str]  # (volume, path)

# == Errors =======================================================================================
# Everything mkv refuses on purpose, with its HTTP answer. Operations raise these; one function,
# `explain`, renders them.


# What an owner of claims in the index is. One that moves replicas wants no other such one, one
# that rebuilds nobody.
SERVER, TOOL, MOVER, REBUILDER = "server", "tool", "mover", "rebuilder"
IN_THE_WAY = {
    SERVER: "it is in use by a server: stop that first",
    TOOL: "it is in use by a tool: stop that first",
    MOVER: "another rebalance or verify --repair is running",
    REBUILDER: "it is being rebuilt by mkv_tools.py",
}


# fmt: off
class MkvError(Exception):
    """Base of all errors raised on purpose: `status`, `title` and `headers` of the HTTP answer;
    str() is its detail."""

    status: ClassVar[int] = 500
    title: ClassVar[str] = "Internal Server Error"
    headers: Mapping[str, str] = {}

    def __init__(self, detail: str = "", **headers: str) -> None:
        super().__init__(detail or self.title)
        if headers:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            self.headers = {**self.headers, **named}

class BadRequest(MkvError): status, title = 400, "Bad Request"
class Unauthorized(MkvError):
    status, title, headers = 401, "Unauthorized", {"WWW-Authenticate": 'Bearer realm="mkv"'}
class Forbidden(MkvError): status, title = 403, "Forbidden"
class NotFound(MkvError): status, title = 404, "Not Found"
class MethodNotAllowed(MkvError): status, title = 405, "Method Not Allowed"
class TooSlow(MkvError): status, title = 408, "Request Timeout"
class PreconditionFailed(MkvError): status, title = 412, "Precondition Failed"
class TooLarge(MkvError): status, title = 413, "Content Too Large"
class TargetTooLong(MkvError): status, title = 414, "URI Too Long"
class UnsupportedEncoding(MkvError):
    status, title, headers = 415, "Unsupported Media Type", {"Accept-Encoding": "identity"}
class Misdirected(MkvError): status, title = 421, "Misdirected Request"
class WrongDigest(MkvError): status, title = 422, "Unprocessable Content"
class TooManyRequests(MkvError): status, title = 429, "Too Many Requests"
class HeadTooLarge(MkvError): status, title = 431, "Request Header Fields Too Large"
class UnknownCoding(MkvError): status, title = 501, "Not Implemented"
class Unavailable(MkvError):
    status, title, headers = 503, "Service Unavailable", {"Retry-After": "2"}
class Unfinished(MkvError): status, title = 504, "Gateway Timeout"
class UnknownVersion(MkvError): status, title = 505, "HTTP Version Not Supported"
class Full(MkvError): status, title = 507, "Insufficient Storage"

class ConfigError(MkvError):
    """A configuration that cannot be used; `faults` names every fault, each as "place: reason"."""

    def __init__(self, faults: Iterable[str]) -> None:
        self.faults = tuple(faults)
        super().__init__("\n".join(self.faults))

class VolumeError(Unavailable):
    """One request to one volume failed; `volume` is its name. What was sent may still be carried
    out for `doubt_s` seconds; None: nothing was sent."""

    def __init__(self, volume: str, detail: str, doubt_s: float | None = None) -> None:
        super().__init__(f"volume {volume}: {detail}")
        self.volume = volume
        self.doubt_s = doubt_s

class VolumeDown(VolumeError): """Nobody answers there, or the connection broke."""
class VolumeTimeout(VolumeError):
    """No progress within `volume_timeout`. Never to be read as absence."""
class VolumeFull(VolumeError):
    """A PUT was answered 507, or 500, which is what nginx says on a full disk."""
class VolumeUnexpected(VolumeError): """An answer that a volume should not give, such as 403."""

class IndexFailed(Unavailable):
    """The index could not be read or written, say on a full disk: nothing was done."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"the index: {reason}")
        self.reason = reason

class IndexDamaged(IndexFailed):
    """It is no index, one of another schema, or a damaged one."""
class IndexLost(IndexFailed): """The connection to it broke."""
class Occupied(IndexFailed):
    """An owner of this `role` is in the way, at least until its lease ends."""

    def __init__(self, role: str, until_s: float) -> None:
        super().__init__(IN_THE_WAY[role])
        self.until_s = until_s

class IndexUnsure(Unfinished):
    """The connection to the index broke in a commit, and there was no other in time to ask what
    has become of it."""
class VolumeBlameless(VolumeError): """The request failed, which says nothing of the volume."""
# fmt: on

# == Configuration ================================================================================
# One frozen Config, checked as a whole: whatever is wrong is named at once. A field below is at
# the same time a TOML key, a flag (dashes for underscores) and a row of the README's table.

URL = re.compile(
    r"https?://(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::([1-9][0-9]{0,4}))?(?:/[!-~]*)?"
)
ORIGIN = re.compile(r"https?://[a-z0-9._:\[\]-]+")  # as browsers send it: in lower case, no path
VOLUME_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,62}")
PLACE = re.compile(VOLUME_NAME.pattern + "(~[0-9a-f]{8})?")
SECRET = re.compile(r"[!#%-Z^-z|~]*")  # what nginx.conf and a header can hold as it is
LOOPBACK = re.compile(r"localhost|::1|127(\.[0-9]{1,3}){3}")
OPERATIONS = ("read", "write", "create", "delete", "list", "admin")
EMBEDDED_VOLUMES = 3
# What a reload cannot change.
RESTART_ONLY = ("host", "port", "data", "db", "workers", "lease", "log_format")


def setting(
    default: T, help: str, low: float = 0, high: float = float("inf"), secret: bool = False
) -> T:
    """Declare a setting: its default, what it means (with its unit) and its bounds."""
    made: T = field(
        default=default, repr=not secret, metadata={"help": help, "low": low, "high": high}
    )
    return made


@dataclass(frozen=True, slots=True)
class Checked:
    """Base of what is configured: checks itself when made, and raises ConfigError with all faults
    at once."""

    def __post_init__(self) -> None:
        faults = list[str]()
        wrong_type = False
        for spec in fields(self):
            kind = type(spec.default)
            given = getattr(self, spec.name)
            bounds = spec.metadata
            if kind is float and type(given) is int:  # a whole number is taken for a float
                self._set(spec.name, given := float(given))
            if type(given) is not kind and bounds:
                faults.append(
                    f"{spec.name}: must be "
                    f"{kind.__name__}{f', not {given!r}' if spec.repr else ''}"
                )
                wrong_type = True
            elif kind is str and "\0" in given:
                faults.append(f"{spec.name}: must have no NUL")
            elif kind in (int, float) and not bounds["low"] <= given <= bounds["high"]:
                faults.append(
                    f"{spec.name}: must be {bounds['low']} to {bounds['high']}, not {given}"
                )
        if faults := faults if wrong_type else faults + list(self._contradictions()):
            raise ConfigError(faults)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _contradictions(self) -> Iterator[str]:
        """Complete what was left out, and yield what is wrong although each field has the right
        type."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True, kw_only=True)
class Volume(Checked):
    """One volume server; raises ConfigError."""

    name: str = setting(
        "", "what records and the ring call it; never reuse a name for another disk"
    )
    url: str = setting("", "where the index server reaches it")
    public_url: str = setting("", "where clients reach it (default: url)")
    weight: float = setting(1.0, "its share of new blobs; 0 drains it", 0, 100)
    zone: str = setting(
        "", "replicas go to distinct zones while zones last (default: a zone of its own)"
    )

    def _contradictions(self) -> Iterator[str]:
        if not VOLUME_NAME.fullmatch(self.name):
            yield (
                "name: must be 1 to 63 of A-Z a-z 0-9 . _ : - and begin with no sign, not "
                f"{self.name!r}"
            )
        for which, url in (("url", self.url), ("public_url", self.public_url or self.url)):
            if not (found := URL.fullmatch(url)) or int(found[1] or 80) > 65535:
                yield f"{which}: must be http(s)://host[:port][/path], not {url!r}"
            self._set(which, url.rstrip("/"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Token(Checked):
    """Who shows the secret with this SHA-256 may do what `allow` lists, on keys that begin with
    `prefix`."""

    name: str = setting("", "who it is, for the log")
    sha256: str = setting("", "of the secret, in hex", secret=True)
    allow: tuple[str, ...] = ()
    prefix: str = setting("", "the keys it is confined to (default: all)")

    def _contradictions(self) -> Iterator[str]:
        if not self.name:
            yield "name: is missing"
        if not re.fullmatch(r"[0-9a-f]{64}", self.sha256) and self.name != "anonymous":
            yield (
                "sha256: must be the 64 hex digits of the secret's SHA-256 (mkv_tools.py "
                "token makes one)"
            )
        listed = tuple(self.allow) if isinstance(self.allow, list | tuple) else ()
        if not listed or any(one not in OPERATIONS for one in listed):
            yield f"allow: must list some of {', '.join(OPERATIONS)}, not {self.allow!r}"
        self._set("allow", listed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config(Checked):
    """Everything that can be set; raises ConfigError with all faults at once. Times are seconds,
    sizes bytes."""

    host: str = setting("127.0.0.1", "address to listen on")
    port: int = setting(3000, "port to listen on; 0 picks a free one", 0, 65535)
    data: str = setting("mkv-data", "folder of the index and of the embedded volumes")
    db: str = setting(
        "", "file of the index (default: index.db in the data folder), or postgresql://... of one"
    )
    volumes: tuple[Volume, ...] = ()
    replicas: int = setting(2, "volumes that hold each blob", 1, 32)
    min_replicas: int = setting(
        0, "volumes that must have a blob before a PUT succeeds (0: replicas)", 0, 32
    )
    workers: int = setting(1, "processes that serve", 1, 256)
    lease: float = setting(
        15.0, "s without a sign of life after which others clear up after a process", 1, 3600
    )
    volume_timeout: float = setting(
        5.0, "s without progress after which a volume is given up", 0.1, 3600
    )
    slow_after: float = setting(
        0.5,
        "s without an answer after which a small PUT goes to one more volume (0: never)",
        0,
        3600,
    )
    garbage_delay: float = setting(
        10.0, "s that replaced and deleted blobs stay, for readers under way", 0, 86400
    )
    max_blob_size: int = setting(0, "bytes a blob may have (0: no limit)")
    max_uploads: int = setting(512, "uploads at once in one process; more get 503", 1)
    max_connections: int = setting(4096, "connections of one client address to one process", 1)
    header_timeout: float = setting(
        10.0, "s for the headers of a request, once they or the connection begin", 0.1, 3600
    )
    # Less than client_body_timeout of nginx.conf: else nginx gives up first, and counts as down.
    body_timeout: float = setting(
        30.0, "s without a byte of the body after which it is refused", 0.1, 50
    )
    min_body_rate: float = setting(1024.0, "bytes/s that a body must average after 30 s")
    send_timeout: float = setting(
        30.0, "s of reading its answer at min_body_rate or less that drop a client", 0.1, 3600
    )
    keepalive_timeout: float = setting(
        60.0, "s after which an idle connection is closed", 1, 86400
    )
    list_rate: float = setting(
        200.0, "list requests a second of one client to one process (0: no limit)"
    )
    list_burst: int = setting(1000, "list requests that a client may make at once", 1)
    drain: float = setting(30.0, "s that requests under way get at shutdown")
    log_format: str = setting("text", "text or json")
    access_log: bool = setting(True, "write one line a request")
    volume_secret: str = setting(
        "", "what volumes ask for before they write, delete or list", secret=True
    )
    link_secret: str = setting(
        "", "signs redirects, so that volumes serve nobody without one", secret=True
    )
    link_ttl: float = setting(3600.0, "s that a signed redirect is valid", 1, 1e9)
    read: str = setting(
        "redirect",
        "redirect: readers are sent to a volume; accel: an nginx in front reads for them",
    )
    cors_origins: str = setting(
        "", "origins of browser applications, with blanks between them; * for all (none: no CORS)"
    )
    insecure: bool = setting(False, "listen beyond loopback without any token")
    tokens: tuple[Token, ...] = ()
    anonymous: Token | None = None

    def _contradictions(self) -> Iterator[str]:
        self._set("db", self.db or f"{self.data}/index.db")
        self._set("min_replicas", self.min_replicas or self.replicas)
        if self.min_replicas > self.replicas:
            yield f"min_replicas: {self.min_replicas} is more than replicas ({self.replicas})"
        writable = sum(v.weight > 0 for v in self.volumes) if self.volumes else EMBEDDED_VOLUMES
        if writable < self.min_replicas:
            yield (
                f"replicas: {self.min_replicas} needed for a PUT, but only {writable} "
                "volume(s) take new blobs"
            )
        names = [v.name for v in self.volumes]
        urls = [v.url for v in self.volumes]
        unique = {
            "volume: name": names,
            "volume: url": urls,
            "token: name": [token.name for token in self.tokens],
        }
        for what, given in unique.items():
            if twice := sorted({one for one in given if given.count(one) > 1}):
                yield f"{what} {', '.join(twice)} is given twice"
        if self.log_format not in ("text", "json"):
            yield f"log_format: must be text or json, not {self.log_format!r}"
        if self.read not in ("redirect", "accel"):
            yield f"read: must be redirect or accel, not {self.read!r}"
        for origin in self.cors_origins.split():
            if origin != "*" and not ORIGIN.fullmatch(origin):
                yield f"cors_origins: must be * or http(s)://host[:port], not {origin!r}"
        for secret in ("volume_secret", "link_secret"):
            if not SECRET.fullmatch(getattr(self, secret)):
                yield (
                    f"{secret}: only printable ASCII without blanks, quotes, backslash, $, "
                    "braces or brackets"
                )
        if self.link_secret and not self.volume_secret:
            yield (
                "link_secret: needs a volume_secret, else anybody could list, write and "
                "delete on the volumes"
            )
        if not (self.tokens or self.insecure or LOOPBACK.fullmatch(self.host)):
            yield (
                f"host: {self.host} is reachable from outside; set up a [[token]] or say insecure"
            )


def is_url(db: str) -> bool:
    """Whether that is the URL of an index, not the file of one."""
    return "://" in db


def hide_secrets(db: str) -> str:
    """Return what may be shown of where an index is: of a URL no password, and none of its
    options."""
    if not is_url(db):
        return db
    scheme, _, rest = db.partition("://")
    place, _, options = rest.partition("?")
    if "@" in options:  # a password has one of the two signs in it: who knows where it begins
        return f"{scheme}://..."
    user, at, place = place.rpartition("@")
    user = user.partition(":")[0]
    return f"{scheme}://{user}{at}{place}"


def parse_config(
    text: str, place: str = "config", flags: Mapping[str, Any] | None = None
) -> Config:
    """Make a Config from TOML `text` and `flags` (they win); raises ConfigError with the place of
    each fault."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError([f"{place}: {error}"]) from None
    flags = dict(flags or {})
    faults = list[str]()

    def build(kind: type[T], given: object, where: str, **fixed: object) -> list[T]:
        """Return [kind(**given, **fixed)], or [] and note the faults."""
        if not isinstance(given, dict):  # without its value, which may be a secret
            faults.append(f"{where.rstrip('.')}: must be a table")
            return []
        make = cast(Any, kind)
        known = {spec.name for spec in fields(make)} - fixed.keys()
        faults.extend(
            f"{where}{name}: there is no such setting" for name in given if name not in known
        )
        try:
            return [
                make(**fixed, **{name: value for name, value in given.items() if name in known})
            ]
        except ConfigError as error:
            faults.extend(f"{where}{fault}" for fault in error.faults)
            return []

    def build_all(kind: type[T], singular: str) -> tuple[T, ...]:
        if not isinstance(listed := table.pop(singular, []), list):
            faults.append(f"{place}: {singular}: must be [[{singular}]], an array of tables")
            listed = []
        built = (build(kind, one, f"{place}: {singular}[{i}].") for i, one in enumerate(listed, 1))
        return tuple(thing for things in built for thing in things)

    volumes = build_all(Volume, "volume")
    tokens = build_all(Token, "token")
    rule = table.pop("anonymous", None)
    rules = (
        []
        if rule is None
        else build(Token, rule, f"{place}: anonymous.", name="anonymous", sha256="")
    )
    if chosen := flags.pop("volume", None):
        built = (build(Volume, parse_volume_flag(flag), f"--volume {flag}: ") for flag in chosen)
        volumes = tuple(volume for volumes in built for volume in volumes)
    kinds: dict[str, Any] = {spec.name: type(spec.default) for spec in fields(Config)}
    for name, given in flags.items():
        with contextlib.suppress(ValueError):  # Config says what is wrong with it
            flags[name] = kinds[name](given)
    nested = {"volumes": volumes, "tokens": tokens, "anonymous": rules[0] if rules else None}
    config = build(Config, table | flags, f"{place}: ", **nested)
    for name in flags:
        faults = [
            fault.replace(f"{place}: {name}: ", f"--{name.replace('_', '-')}: ")
            for fault in faults
        ]
    if faults:
        raise ConfigError(faults)
    return config[0]


def reload_config(old: Config, new: Config) -> Config:
    """Return `new`, but with what only a restart can change, and embedded volumes, as they
    were."""
    names: tuple[str, ...] = (
        RESTART_ONLY if new.volumes else (*RESTART_ONLY, "volumes", "volume_secret", "link_secret")
    )
    return replace(new, **{name: getattr(old, name) for name in names})


def parse_volume_flag(flag: str) -> dict[str, str]:
    """Split [NAME=]URL; without a name it is the URL's host:port, so that the order of flags means
    nothing."""
    name, separator, url = flag.partition("=")
    if not separator or "/" in name:
        name = flag.rstrip("/").partition("://")[2].replace("/", "-")
        url = flag
    return {"name": name, "url": url}


# == Keys and paths ===============================================================================
# A key is the user's, a path is on a volume. Pure; blob_path and parse_path are inverses. Pinned
# by golden vectors.

MAX_KEY_BYTES = 1024
END_OF_TIME_NS = 2**62  # in 2116; every version is below, so that a higher one fits its digits
PATH = re.compile(
    r"/([0-9a-f]{2})/([0-9a-f]{2})/(\1\2[0-9a-f]{60})-([0-9a-f]{20})(?:~[0-9a-f]{8})?"
    r"(?:\.([a-z0-9]{1,8}))?"
)
STEM = len("/aa/bb/") + 64 + len("-") + 20
HOST = re.compile(r"([A-Za-z0-9._~!$&'()*+,;=%-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]*)?")
BAD_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")
DEFAULT_TYPE = "application/octet-stream"
# Media type -> file extension. It shows who looks at a volume what a file is, and says what a blob
# is that comes without a type. (By it nginx with an earlier nginx.conf tells the type.)
EXTENSIONS = {
    "text/html": "html", "text/css": "css", "text/plain": "txt", "text/xml": "xml",
    "application/json": "json",
    "application/javascript": "js", "application/wasm": "wasm", "application/pdf": "pdf",
    "application/zip": "zip",
    "application/x-7z-compressed": "7z", "application/java-archive": "jar",
    "application/xhtml+xml": "xhtml",
    "application/vnd.apple.mpegurl": "m3u8", "application/atom+xml": "atom",
    "application/rss+xml": "rss",
    "application/rtf": "rtf", "application/msword": "doc", "application/vnd.ms-excel": "xls",
    "application/vnd.openxmlformats-officedocument.wordprocessingml.document": "docx",
    "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet": "xlsx",
    "image/png": "png", "image/jpeg": "jpg", "image/gif": "gif", "image/webp": "webp",
    "image/avif": "avif",
    "image/svg+xml": "svg", "image/tiff": "tif", "image/x-icon": "ico", "image/x-ms-bmp": "bmp",
    "font/woff": "woff", "font/woff2": "woff2", "audio/mpeg": "mp3", "audio/ogg": "ogg",
    "audio/x-m4a": "m4a",
    "video/mp4": "mp4", "video/webm": "webm", "video/mpeg": "mpeg", "video/quicktime": "mov",
    "video/mp2t": "ts",
    "video/x-msvideo": "avi", "video/3gpp": "3gp", "video/x-m4v": "m4v", "video/x-flv": "flv",
    "video/x-ms-wmv": "wmv",
}  # fmt: skip
# A link says type and name, and what it says is signed, as it stands there. So it holds only what
# no client encodes or decodes by itself. nginx.conf reads it with the same expressions.
ESCAPES = 12  # that it reads in a type, and in a name
PLAIN_IN_TYPE = "!$*+,/:;=?@"  # beside letters, digits and _.-~; the rest is ( and two hex digits
TYPE_IN_LINK = re.compile(
    r"(?=[^&]+/[^&])[!-%'*-~]*"
    rf"(?:\((?:2[0235-9]|3[CE]|5[B-E]|60|7[B-D])[!-%'*-~]*){{0,{ESCAPES}}}"
)
ESCAPE_IN_TYPE = re.compile(r"\((..)")
PLAIN_IN_NAME = re.compile(r"[A-Za-z0-9_.~!$-]+")  # the rest is % and two hex digits
FICKLE_IN_NAME = re.compile(r"%(2[5789AC]|3[AF]|40)")  # some clients decode these: encoded twice
TWICE_IN_NAME = re.compile(r"%25(?=[0-9A-F]{2})")
NAME_IN_LINK = re.compile(r"[A-Za-z0-9_.~!$%-]+")
NOT_IN_NAME = re.compile(r"[\x00-\x1f\x7f\\]")
MAX_NAME_BYTES = 255  # of a file, in all usual file systems
MEDIA_TYPE = re.compile(r"[!-~]+/[!-~][ -~]*")
MAX_MEDIA_TYPE = 255  # bytes with parameters; what an earlier version wrote may have more
MEDIA_TYPES = {ext: media_type for media_type, ext in EXTENSIONS.items()} | {
    "jpeg": "image/jpeg",
    "htm": "text/html",
}


def check_key(key: str) -> str:
    """Return `key` if it may name a blob, else raise BadRequest."""
    try:
        size = len(key.encode())
    except UnicodeEncodeError:
        raise BadRequest("the key is not valid UTF-8") from None
    if not 1 <= size <= MAX_KEY_BYTES or "\0" in key:
        raise BadRequest(f"a key has 1 to {MAX_KEY_BYTES} bytes and no NUL; this one has {size}")
    if key.startswith("-/"):
        raise BadRequest(
            "keys that begin with -/ are refused: /-/ is the page, and has livez, readyz, status "
            "and metrics"
        )
    return key


# As in RFC 9112, 3.2.2, but without a user's name.
ABSOLUTE_TARGET = re.compile(r"https?://([^/?]+)(/[^?]*)?(\?.*)?", re.IGNORECASE | re.DOTALL)


def split_target(target: str, prefix: str = "", host: str = "") -> tuple[str, str]:
    """Split a raw request target (RFC 9112, 3.2) into its raw path, without `prefix`, and its raw
    query; raises BadRequest, NotFound, and Misdirected if it names another host than `host`."""
    if not target.startswith("/"):
        absolute = ABSOLUTE_TARGET.fullmatch(target)
        if absolute is None or not HOST.fullmatch(absolute[1]):
            raise BadRequest("this target is no path")
        if host and host.lower() != absolute[1].lower():
            raise Misdirected("the target names another host than Host does")
        target = (absolute[2] or "/") + (absolute[3] or "")
    path, _, query = target.partition("?")
    if not path.startswith(prefix + "/"):
        raise NotFound("nothing here")
    return path[len(prefix) :], query


def key_of_path(raw_path: str) -> str:
    """Decode the raw path of a request into its key: `//`, `..`, `%2F` and `+` are just
    characters."""
    if "%" in raw_path and BAD_ESCAPE.search(raw_path):
        raise BadRequest("a % in the path is not followed by two hex digits")
    try:
        return check_key(
            unquote_to_bytes(raw_path.encode("utf-8", "surrogateescape")).decode()[1:]
        )
    except UnicodeDecodeError:
        raise BadRequest("the key is not valid UTF-8") from None


@lru_cache(4096)  # one request asks several times
def hash_key(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def key_stem(key: str) -> str:
    """Return what the paths of all versions of a key begin with."""
    h = hash_key(key)
    return f"/{h[:2]}/{h[2:4]}/{h}-"


def blob_path(key: str, version: str, ext: str) -> str:
    return f"{key_stem(key)}{version}{'.' if ext else ''}{ext}"


def place_path(path: str, place: str) -> str:
    """Return where on its volume the blob of the version at `path` lies at `place`."""
    _, sign, tag = place.partition("~")
    return f"{path[:STEM]}~{tag}{path[STEM:]}" if sign else path


def split_path(path: str) -> tuple[str, str]:
    """Undo place_path: return the path without its tag, and the tag with its sign, "" if it has
    none."""
    stem = stem_of(path)
    return path[:STEM] + path[len(stem) :], stem[STEM:]


def stem_of(path: str) -> str:
    """Return a path without extension: what a blob and its sidecar have in common."""
    return path.partition(".")[0]


def volume_of(place: str) -> str:
    return place.partition("~")[0]


@lru_cache(4096)  # most places have no tag, so many records share theirs
def volumes_of(places: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(map(volume_of, places))


def sidecar_path(path: str) -> str:
    """Return the path of the sidecar beside the blob at `path`."""
    return f"{stem_of(path)}.key"


def tombstone_path(path: str) -> str:
    """Return the path of the tombstone that says that the version of the blob at `path` is
    dead."""
    return f"{path[:STEM]}.del"


def version_of(path: str) -> str:
    return path[STEM - 20 : STEM]


def parse_path(path: str) -> tuple[str, str, str] | None:
    """Return (hash of the key, version, extension) of a blob's, a sidecar's or a tombstone's path,
    else None."""
    found = PATH.fullmatch(path)
    return (found[3], found[4], found[5] or "") if found else None


def version_ns(version: str) -> int:
    """Return the time in a version, in Unix nanoseconds."""
    return int(version[:16], 16)


def make_version(at_ns: int, tag: str) -> str:
    """Return the version drawn at `at_ns` by the owner with this tag; raises Unavailable from the
    year 2116 on."""
    if at_ns >= END_OF_TIME_NS:
        raise Unavailable("the clock of the index, or a version in it, is beyond the year 2116")
    return f"{at_ns:016x}{tag}"


def version_s(version: str) -> int:
    """Return the same in whole seconds, as HTTP tells times."""
    return version_ns(version) // 10**9


@lru_cache(64)  # all that is written in one second has one
@lru_cache(64)
def http_date(time_s: int) -> str:
    return formatdate(time_s, usegmt=True)


def media_type_of(content_type: str | None, key: str) -> tuple[str, str]:
    """Return (content type, extension) for a blob; without a Content-Type the key's own ending
    decides."""
    if content_type is None:
        content_type = MEDIA_TYPES.get(key.rpartition(".")[2].lower(), DEFAULT_TYPE)
    elif len(content_type) > MAX_MEDIA_TYPE or not MEDIA_TYPE.fullmatch(content_type):
        most = f"at most {MAX_MEDIA_TYPE} printable ASCII characters"
        raise BadRequest(f"Content-Type is no media type of {most}")
    return content_type, EXTENSIONS.get(content_type.partition(";")[0].strip().lower(), "")


@lru_cache(4096)  # every redirect asks
def name_in_link(key: str, dialect: int) -> str:
    """Return the name of a download, as a link to a volume of that dialect holds it: the key's
    last part, without what no file name may hold; "" if that leaves none."""
    name = NOT_IN_NAME.sub("_", key[key.rfind("/") + 1 :])
    if name in ("", ".", "..") or len(name.encode()) > MAX_NAME_BYTES:
        return ""
    if dialect == 1:
        return quote(name, safe="")
    encoded = quote(name, safe="!$")
    if len(FICKLE_IN_NAME.findall(encoded)) > ESCAPES:
        return FICKLE_IN_NAME.sub("_", encoded)
    return FICKLE_IN_NAME.sub(r"%25\1", encoded)


@lru_cache(4096)  # there are few
def type_in_link(content_type: str) -> str:
    """Return a type as a link holds it: octet-stream, if it holds more than can be read there."""
    encoded = quote(content_type, safe=PLAIN_IN_TYPE).replace("%", "(")
    if len(content_type) > MAX_MEDIA_TYPE or not TYPE_IN_LINK.fullmatch(encoded):
        return DEFAULT_TYPE
    return encoded


def served_type(argument: str) -> str:
    """Return the Content-Type that a link asks for, as nginx.conf does."""
    if not TYPE_IN_LINK.fullmatch(argument):
        return DEFAULT_TYPE
    return ESCAPE_IN_TYPE.sub(lambda found: chr(int(found[1], 16)), argument)


def argument_of(query: str, name: str) -> str:
    """Return an argument as it stands in a query, as nginx does: the first, "" for none."""
    found = re.search(rf"(?:^|&){name}=([^&]*)", query, re.IGNORECASE)
    return found[1] if found else ""


def disposition_of(query: str) -> str:
    """Return the Content-Disposition that a link asks for, as nginx.conf does: "" for none. What
    is in the link stays encoded, so no header can be made of it."""
    name = argument_of(query, "name")
    kind = "attachment" if argument_of(query, "download") else "inline"
    if PLAIN_IN_NAME.fullmatch(name):
        return f'{kind}; filename="{name}"'
    encoded, count = TWICE_IN_NAME.subn("%", name)
    if count > ESCAPES or not NAME_IN_LINK.fullmatch(name):
        return ""
    return f"{kind}; filename*=UTF-8''{encoded}"  # RFC 8187


def after_prefix(prefix: str) -> str | None:
    """Return the first string that sorts after all that begin with `prefix`; None if there is
    none."""
    prefix = prefix.rstrip("\U0010ffff")
    if not prefix:
        return None
    last = ord(prefix[-1]) + 1
    return prefix[:-1] + chr(0xE000 if last == 0xD800 else last)  # no surrogates in UTF-8


# == Ring =========================================================================================
# Consistent hashing with virtual nodes. It depends on names, weights and zones, never on the order
# of the list.

VIRTUAL_NODES = 256  # for weight 1.0


ARCS_KNOWN = 16384  # points from which the first volumes need not be found again
ARC_NAMES = 8  # of these


class Ring:
    """Where a key belongs. Immutable; volumes of weight 0 are not on it. `zones` is volume name ->
    zone."""

    def __init__(self, volumes: Iterable[Volume]) -> None:
        nodes = {v.name: max(1, round(VIRTUAL_NODES * v.weight)) for v in volumes if v.weight > 0}
        points = sorted(
            (hash_key(f"{name}#{i}")[:16], name) for name, n in nodes.items() for i in range(n)
        )
        self.zones = {v.name: v.zone or f"volume {v.name}" for v in volumes if v.weight > 0}
        self._points = [point for point, _ in points]
        self._names = [name for _, name in points]
        self._first = dict[int, tuple[str, ...]]()  # from a point: known ones

    def order(self, key: str) -> Iterator[str]:
        """Yield all volumes clockwise from the key's point, each once."""
        start = bisect.bisect_right(self._points, hash_key(key)[:16])
        first = self._first.get(start)
        if first is None:
            if len(self._first) >= ARCS_KNOWN:
                self._first.clear()
            first = tuple(islice(self._walk(start), ARC_NAMES))
            self._first[start] = first
        yield from first
        if len(first) < len(self.zones):
            yield from islice(self._walk(start), ARC_NAMES, None)

    def _walk(self, start: int) -> Iterator[str]:
        """Yield each volume once, clockwise from the node at `start`."""
        seen = set[str]()
        for i in range(len(self._names)):
            name = self._names[(start + i) % len(self._names)]
            if name not in seen:
                seen.add(name)
                yield name
                if len(seen) == len(self.zones):
                    return

    def place(
        self, key: str, replicas: int, fits: Callable[[str], bool] = lambda name: True
    ) -> tuple[str, ...]:
        """Return the first `replicas` volumes (of those that fit) in ring order, of distinct zones
        if they last."""
        chosen = list[str]()
        spare = list[str]()
        zones = set[str]()
        for name in self.order(key):
            if not fits(name):
                continue
            zone = self.zones[name]
            if zone in zones:
                spare.append(name)
                continue
            zones.add(zone)
            chosen.append(name)
            if len(chosen) == replicas:
                break
        return tuple((chosen + spare)[:replicas])


# == Records, sidecars, tombstones ================================================================
# A key's row in the index, and its sidecar: the same facts as JSON. A tombstone says that a
# version is dead. A place is where on a volume a replica lies: the volume's name, then ~tag if
# there is one in its path. An identity says which volume of which store a disk is.

MAX_SIDECAR_BYTES = 64 * 1024  # no sidecar is larger: a key has 1024 bytes
SIDECAR_FIELDS = {
    "key": str,
    "version": str,
    "size": int,
    "digest": str,
    "content_type": str,
    "ext": str,
}


class Record(NamedTuple):
    """What the index knows of a key. `places` are sorted, so that a rebuild gives the same row,
    and at most one is on each volume. A tuple, since each GET makes one, and a dataclass takes
    twice as long to make."""

    key: str
    version: str
    places: tuple[str, ...]
    size: int
    digest: str
    content_type: str
    ext: str

    @property
    def volumes(self) -> tuple[str, ...]:
        """The names of the volumes that have a replica."""
        return volumes_of(self.places)

    @property
    def etag(self) -> str:
        return f'"{self.digest}"'

    @property
    def path(self) -> str:
        """Its path where the place has no tag."""
        return blob_path(self.key, self.version, self.ext)

    def path_on(self, volume: str) -> str:
        """Return its path on a volume that has it."""
        for place in self.places:
            if volume_of(place) == volume:
                return place_path(self.path, place)
        raise KeyError(volume)

    @property
    def modified_s(self) -> int:
        """When it was written, in whole Unix seconds, by the clock of the index."""
        return version_s(self.version)

    @property
    def modified(self) -> str:
        """The same, as HTTP writes it."""
        return http_date(self.modified_s)


def encode_sidecar(record: Record) -> bytes:
    return json.dumps(
        {name: getattr(record, name) for name in SIDECAR_FIELDS}, ensure_ascii=False
    ).encode()


def encode_tombstone(path: str, places: Collection[str]) -> bytes:
    """Say on a volume that the version of the blob at `path` is dead, though `places` may still
    show its sidecar."""
    return json.dumps({"blob": path, "volumes": sorted(places)}).encode()


def decode_tombstone(data: bytes, path: str) -> tuple[str, tuple[str, ...]]:
    """Read the tombstone found at `path`: the blob's path without a tag, and the places; raises
    ValueError."""
    try:
        facts = json.loads(data)
    except (ValueError, RecursionError):
        raise ValueError("it is not JSON") from None
    blob = facts.get("blob") if isinstance(facts, dict) else None
    if type(blob) is not str or parse_path(blob) is None or tombstone_path(blob) != path:
        raise ValueError("it names another version than its path")
    places = facts.get("volumes")
    if type(places) is not list or not all(
        type(place) is str and PLACE.fullmatch(place) for place in places
    ):
        raise ValueError("it names no volumes")
    return split_path(blob)[0], tuple(places)


IDENTITY_PATH = "/mkv-volume.key"  # no dot-file: nginx.conf and rsync leave those out
MAX_IDENTITY_BYTES = 1024


class Identity(NamedTuple):
    """Which volume a disk is. The number is drawn when this is written, so that an earlier disk of
    the same name is told apart."""

    store: str  # the store's id, drawn with its index
    volume: str
    number: str


def encode_identity(identity: Identity) -> bytes:
    return json.dumps(identity._asdict()).encode()


def decode_identity(data: bytes) -> Identity:
    """Read what was found at IDENTITY_PATH; raises ValueError."""
    if len(data) > MAX_IDENTITY_BYTES:
        raise ValueError(f"it has more than {MAX_IDENTITY_BYTES} bytes")
    try:
        facts = json.loads(data)
    except (ValueError, RecursionError):
        raise ValueError("it is not JSON" if data else "it is empty") from None
    if not isinstance(facts, dict) or facts.keys() != set(Identity._fields):
        raise ValueError("its fields are not those of an identity")
    identity = Identity(**facts)
    numbers = (identity.store, identity.number)
    if any(type(one) is not str or not re.fullmatch("[0-9a-f]{32}", one) for one in numbers):
        raise ValueError("store or number is malformed")
    if type(identity.volume) is not str or not VOLUME_NAME.fullmatch(identity.volume):
        raise ValueError("volume is no name")
    return identity


def lists_blobs(listing: bytes) -> bool:
    """Return whether a volume whose root is listed so has a folder of blobs; raises ValueError."""
    try:
        entries = json.loads(listing)
    except (ValueError, RecursionError):
        raise ValueError("it is not JSON") from None
    if type(entries) is not list or any(not isinstance(one, dict) for one in entries):
        raise ValueError("it is no list of entries")
    return any(re.fullmatch("[0-9a-f]{2}", str(one.get("name"))) for one in entries)


def decode_sidecar(data: bytes, path: str) -> Record:
    """Read the sidecar found at `path` (places empty); raises ValueError with what is wrong with
    it."""
    if len(data) > MAX_SIDECAR_BYTES:
        raise ValueError(f"it has more than {MAX_SIDECAR_BYTES} bytes")
    try:
        facts = json.loads(data)
    except (ValueError, RecursionError):
        raise ValueError("it is not JSON" if data else "it is empty") from None
    if not isinstance(facts, dict) or any(
        type(facts.get(name)) is not kind for name, kind in SIDECAR_FIELDS.items()
    ):
        raise ValueError("a field is missing or of the wrong type")
    record = Record(places=(), **{name: facts[name] for name in SIDECAR_FIELDS})
    try:
        check_key(record.key)
    except BadRequest as error:
        raise ValueError(str(error)) from None
    if not MEDIA_TYPE.fullmatch(record.content_type):
        raise ValueError("content_type is no media type")
    if not 0 <= record.size < 2**63 or not re.fullmatch(r"[0-9a-f]{64}", record.digest):
        raise ValueError("size or digest is malformed")
    blob = record.path
    if parse_path(blob) is None or sidecar_path(blob) != split_path(path)[0]:
        raise ValueError("it names another key or version than its path")
    if version_ns(record.version) >= END_OF_TIME_NS:
        raise ValueError("its version is far in the future")
    return record


# == Decisions ====================================================================================
# All policy, as pure functions and tables: they are given what is known and return what is to be
# done.

Verdict = enum.Enum("Verdict", "PROCEED NOT_MODIFIED FAILED")  # of a request's conditions
Step = enum.Enum("Step", "COMMIT WRITE_MORE ROLL_BACK")  # what a PUT does next


class Conditions(NamedTuple):
    """The conditional headers of a request (RFC 9110, 13.1); ETags in quotes, "*" for any."""

    if_match: tuple[str, ...] | None = None
    if_none_match: tuple[str, ...] | None = None
    modified_since_s: float | None = None
    unmodified_since_s: float | None = None


UNCONDITIONAL = Conditions()


def parse_etags(header: str) -> tuple[str, ...]:
    """Read If-Match or If-None-Match; raises BadRequest."""
    if header.strip() == "*":
        return ("*",)
    if not re.fullmatch(r'[\s,]*((W/)?"[^"]*"\s*(,[\s,]*|$))+', header):
        raise BadRequest(f"{header!r} is neither * nor a list of quoted ETags")
    return tuple(re.findall(r'(?:W/)?"[^"]*"', header))


def decide_conditions(
    conditions: Conditions, record: Record | None, reading: bool = False
) -> Verdict:
    """Evaluate the conditions against the current record in the order of RFC 9110, 13.2.2. Dates
    are compared for equality, as nginx does: a key's may go back."""
    c = conditions
    etag = record.etag if record else None
    modified_s = record.modified_s if record else None
    if c.if_match is not None:
        if etag is None or not {"*", etag} & {*c.if_match}:  # strong comparison: W/ never matches
            return Verdict.FAILED
    elif (
        c.unmodified_since_s is not None
        and modified_s is not None
        and modified_s != c.unmodified_since_s
    ):
        return Verdict.FAILED
    if c.if_none_match is not None:
        if etag is not None and {"*", etag, f"W/{etag}"} & {*c.if_none_match}:
            return Verdict.NOT_MODIFIED if reading else Verdict.FAILED
    elif (
        reading
        and c.modified_since_s is not None
        and modified_s is not None
        and modified_s == c.modified_since_s
    ):
        return Verdict.NOT_MODIFIED
    return Verdict.PROCEED


def judge_read(record: Record | None, conditions: Conditions) -> tuple[Record, Verdict]:
    """Return the record that a read found, and whether the client has it already. Raises NotFound,
    PreconditionFailed."""
    if record is None:
        raise NotFound("no such key")
    if conditions is UNCONDITIONAL:
        return record, Verdict.PROCEED
    verdict = decide_conditions(conditions, record, reading=True)
    if verdict is Verdict.FAILED:
        raise PreconditionFailed("the key is not what the condition asks for")
    return record, verdict


def parse_conditions(headers: Mapping[str, str]) -> Conditions:
    """Read the conditional headers (names in lower case); a date that is none is ignored (RFC
    9110, 13.1.3). Raises BadRequest."""
    if headers.keys().isdisjoint(CONDITIONAL):
        return UNCONDITIONAL
    given: dict[str, Any] = {}
    for header, name in (("if-match", "if_match"), ("if-none-match", "if_none_match")):
        if header in headers:
            given[name] = parse_etags(headers[header])
    for header, name in (
        ("if-modified-since", "modified_since_s"),
        ("if-unmodified-since", "unmodified_since_s"),
    ):
        if header in headers:
            with contextlib.suppress(ValueError, OverflowError):
                given[name] = parsedate_to_datetime(headers[header]).timestamp()
    return Conditions(**given) if given else UNCONDITIONAL


CONDITIONAL = frozenset(("if-match", "if-none-match", "if-modified-since", "if-unmodified-since"))
DIGESTS = {
    "repr-digest": "Repr-Digest",
    "content-digest": "Content-Digest",
    "content-md5": "Content-MD5",
}


def parse_digests(headers: Mapping[str, str]) -> dict[str, bytes]:
    """Return hashlib name -> expected digest from Repr-Digest, Content-Digest (RFC 9530) and
    Content-MD5 (RFC 1864); names of headers are in lower case."""
    expected: dict[str, bytes] = {}
    for name_in_lower, header in DIGESTS.items():
        if (text := headers.get(name_in_lower)) is None:
            continue
        given = re.findall(r"(?:^|,)\s*(sha-256|sha-512)=:([^:]*):\s*(?=,|$)", text)
        if header == "Content-MD5":
            given = [("md5", text.strip())]
        if not given:
            raise BadRequest(f"{header}: needs sha-256=:BASE64: or sha-512=:BASE64:, not {text!r}")
        for name, value in given:
            try:
                digest = base64.b64decode(value, validate=True)
            except ValueError:
                digest = b""
            if len(digest) != {"sha-256": 32, "sha-512": 64, "md5": 16}[name]:
                raise BadRequest(f"{header}: {value!r} is no {name} digest in base64")
            if expected.setdefault(name.replace("-", ""), digest) != digest:
                raise WrongDigest(f"{header}: contradicts another digest")
    return expected


class State(enum.Enum):
    """up: reads and writes; readonly: answers reads, refuses writes (full disk, lost permission);
    down: neither."""

    UP = "up"
    READONLY = "readonly"
    DOWN = "down"


# What a request tells of its volume. ANSWERED: a HEAD or a DELETE was, which says nothing of
# writes. STORED: a PUT was. REFUSED: a PUT or DELETE met an error. UNREACHABLE: no connection, no
# answer in time, or one that no volume gives.
Event = enum.Enum("Event", "ANSWERED STORED REFUSED UNREACHABLE")

# A PUT says all of a volume's state. ANSWERED brings back one that was down, but not its writes: a
# write probe follows.
AFTER_A_PUT = {
    Event.STORED: State.UP,
    Event.REFUSED: State.READONLY,
    Event.UNREACHABLE: State.DOWN,
}
STATE_AFTER: Mapping[State, Mapping[Event, State]] = {
    State.UP: {Event.ANSWERED: State.UP, **AFTER_A_PUT},
    State.READONLY: {Event.ANSWERED: State.READONLY, **AFTER_A_PUT},
    State.DOWN: {Event.ANSWERED: State.READONLY, **AFTER_A_PUT},
}
States = Mapping[str, State]  # of the volumes, by name


class Standing(enum.Enum):
    """What is known of who a volume is. right: the index has seen this identity there. new: too
    little yet. unwritten: it is the right one, but its identity cannot be written. refused: it is
    another one, or may be; a person has to settle that."""

    RIGHT = "right"
    NEW = "new"
    UNWRITTEN = "unwritten"
    REFUSED = "refused"


# What a volume is at best, whatever requests say. Only a probe that reads another identity ends
# that.
AT_BEST = {
    Standing.RIGHT: State.UP,
    Standing.NEW: State.DOWN,
    Standing.UNWRITTEN: State.READONLY,
    Standing.REFUSED: State.DOWN,
}


class Finding(NamedTuple):
    """How a volume stands, and why if that is not as it should be."""

    standing: Standing
    reason: str = ""


def decide_state(before: State, event: Event, standing: Standing) -> State:
    after = STATE_AFTER[before][event]
    if standing is Standing.RIGHT:
        return after
    return max(after, AT_BEST[standing], key=list(State).index)


def judge_identity(
    found: Identity | str | None, store: str, name: str, seen: str | None
) -> Finding:
    """Say what it means to find this where volume `name` of `store` should be: an identity, what
    is wrong with one, or none. `seen` is the number that the index has seen there. New is what it
    has not seen, and is this volume or has no identity."""
    if isinstance(found, str):
        return Finding(Standing.REFUSED, f"its {IDENTITY_PATH} cannot be used: {found}")
    if found is None and seen:
        why = f"it has lost its {IDENTITY_PATH}: a disk that is not mounted, or another one"
        return Finding(Standing.REFUSED, f"{why}; adopt it if it is to be {name}")
    if found is None:
        return Finding(Standing.NEW, "it has no identity yet")
    if found.store != store and not seen:
        why = f"its files are of store {found.store}, not {store}"
        words = "they belong to another index: rebuild, or adopt"
        return Finding(Standing.REFUSED, f"{why}; {words}")
    if found.store != store:
        return Finding(Standing.REFUSED, f"it is {found.volume} of another store, {found.store}")
    if found.volume != name:
        why = f"by its {IDENTITY_PATH} it is volume {found.volume}"
        words = "exchanged addresses, a new name, or two names for one disk"
        return Finding(Standing.REFUSED, f"{why}: {words}")
    if seen and found.number != seen:
        why = "another disk had this name since, or has it"
        return Finding(Standing.REFUSED, f"its identity is not the one last seen: {why}; adopt")
    return Finding(Standing.RIGHT) if seen else Finding(Standing.NEW, "it was not seen before")


def plan_write(
    ring: Ring, key: str, replicas: int, states: States, done: Collection[str],
    failed: Collection[str],
    slow: Collection[str] = (),
) -> tuple[str, ...]:  # fmt: skip
    """Return the volumes to write to next: where the ring puts the key among those up, less what
    is done or failed. Those that are slow come last, and only if the others are too few."""

    def is_usable(name: str) -> bool:
        return states.get(name) is State.UP and name not in failed

    def is_swift(name: str) -> bool:
        return is_usable(name) and name not in slow

    names = ring.place(key, replicas, is_swift)
    if len(names) < replicas:
        others = ring.place(key, len(ring.zones), is_usable)
        names += tuple(name for name in others if name not in names)
    return tuple(name for name in names if name not in done)[: replicas - len(done)]


def decide_write(done: int, left: int, replicas: int, min_replicas: int) -> Step:
    """Say what `done` good replicas and `left` volumes still to try mean."""
    if done + left < min_replicas:
        return Step.ROLL_BACK
    return Step.WRITE_MORE if done < replicas and left else Step.COMMIT


def explain_refusal(
    states: States, ring: Ring, needed: int, failed: Mapping[str, VolumeError]
) -> MkvError:
    """Say why a PUT finds too few volumes: Full if enough are alive but refuse writes, else
    Unavailable."""
    refusing = {name for name, state in states.items() if state is State.READONLY}
    refusing |= {
        name for name, error in failed.items() if isinstance(error, VolumeFull | VolumeUnexpected)
    }
    alive = refusing | {
        name for name, state in states.items() if state is State.UP and name not in failed
    }
    seen = [
        f"{name} {state.value}{'' if name in ring.zones else ' (drained)'}"
        for name, state in states.items()
    ]
    detail = f"{needed} replicas needed, too few volumes take writes: {', '.join(seen)}"
    detail += "".join(f"; {error}" for error in failed.values())
    return (
        Full(detail)
        if refusing and len(alive & ring.zones.keys()) >= needed
        else Unavailable(detail)
    )


RANGE = re.compile(r"bytes=[0-9, -]{1,500}")


def decide_range(headers: Mapping[str, str], record: Record) -> str:
    """Return the Range that a volume is to be asked for, "" for all of the blob: If-Range (RFC
    9110, 13.1.5) is decided here, since no volume knows the ETag."""
    part = headers.get("range", "")
    known = headers.get("if-range", record.etag)
    if not RANGE.fullmatch(part) or known not in (record.etag, record.modified):
        return ""
    return part


def choose_replica(
    names: Iterable[str], states: States, turn: int, slow: Collection[str] = ()
) -> str | None:
    """Return the volume to read from: one of these that is not down, by turns. Those that are slow
    are for lack of others."""
    alive = [name for name in names if states.get(name, State.DOWN) is not State.DOWN]
    if slow:
        alive = [name for name in alive if name not in slow] or alive
    return alive[turn % len(alive)] if alive else None


def retry_delay_s(waited_s: float) -> float:
    """How long garbage that has waited for so long waits until it is tried again: doubling from
    1 s to an hour."""
    return min(max(waited_s, 1.0), 3600.0)


# How long what was sent and not answered may still be carried out: by a volume that did not answer
# in time, and after the connection to it broke or whoever sent it was killed.
HUNG_S = 24 * 3600.0
BROKEN_S = 300.0
ANSWERED = 0.0
Sent = Mapping[str, float]  # place -> for so many seconds may what was sent there still come


class Dead(NamedTuple):
    """A place to be deleted: no record names it, nor ever will. Times are seconds of the index's
    own clock. The fields are in the order of the columns."""

    path: str  # of the blob; or of a tombstone that nobody needs any more
    volume: str
    due_s: float  # when its readers are done, or it is to be looked at again
    since_s: float  # when it died
    doubt_s: float | None = None  # until when what was never answered may still come
    owner: int | None = None  # who has claimed it and may be writing there
    key: str = ""  # "": not known

    @property
    def is_tombstone(self) -> bool:
        return self.path.endswith(".del")

    def is_gone(self, found: bool | None, asked_s: float) -> bool:
        """Whether nothing is there nor will be, once its volume was asked at `asked_s` to delete
        it: its sidecar was `found`, was not there, or (None) there was no answer. It was sent once
        only, so if it was found no other will come."""
        if found is None:
            return False
        settled = self.owner is None and (self.doubt_s is None or self.doubt_s <= asked_s)
        return found or settled


class Burial(NamedTuple):
    """What must not come back although the index may be lost, from the lowest version up: how many
    of `asked_s`, and which volumes have tombstones of them (by their paths)."""

    rows: Sequence[Dead]
    tombstones: Mapping[str, Collection[str]]
    asked_s: float  # by the clock of the index

    def by_version(self) -> Iterator[list[Dead]]:
        for _, rows in groupby(self.rows, lambda row: version_of(row.path)):
            yield list(rows)


class Reach(NamedTuple):
    """What a burial can count on: the volumes that answer, how many of them take tombstones, and
    how many tombstones a version needs."""

    answering: Collection[str]
    takers: int
    copies: int


@dataclass(slots=True)
class Pending:
    """What is on volumes, or may come there, and in no record, of one key.

    A claim says that its owner is about to write: it is there before the first byte, and goes in
    the transaction that commits the record. So what a crash leaves on the volumes is known.
    """

    claims: dict[tuple[str, int], tuple[str, ...]]  # (path without tag, owner) -> places
    dead: dict[Place, Dead]
    tombstones: dict[str, set[str]]  # path -> volumes that have it
    key: str = ""  # as far as rows tell: an earlier edition's do not

    def copy(self) -> Pending:
        tombstones = {path: set(volumes) for path, volumes in self.tombstones.items()}
        return Pending(dict(self.claims), dict(self.dead), tombstones, self.key)

    def become(self, other: Pending) -> None:
        self.claims = other.claims
        self.dead = other.dead
        self.tombstones = other.tombstones

    def rows(self) -> set[tuple[str, tuple[Any, ...]]]:
        """Return all of it as (table, row)."""
        claims = {
            ("claim", (*claim, " ".join(places), self.key))
            for claim, places in self.claims.items()
        }
        dead = {("dead", tuple(row)) for row in self.dead.values()}
        marked = {
            ("tombstone", (path, volume))
            for path, volumes in self.tombstones.items()
            for volume in volumes
        }
        return claims | dead | marked

    def claimed_at(self, path: str) -> set[str]:
        """Return the places that are claimed for the version at `path`."""
        return {place for (at, _), places in self.claims.items() if at == path for place in places}

    def end_write(
        self, path: str, claimed: AbstractSet[str], sent: Sent, named: Collection[str],
        now_s: float, key: str,
    ) -> None:  # fmt: skip
        """End what was claimed at `path`, since its owner is done: a record names the places in
        `named`, the others to which something was sent are dead. It says so even if nothing is
        known of its claims any more."""
        for (at, owner), places in list(self.claims.items()):
            if at == path and not claimed.isdisjoint(places):
                del self.claims[at, owner]
        for place in claimed:
            if place not in sent:
                self.dead.pop((volume_of(place), place_path(path, place)), None)
        for place, doubt in sent.items():
            if place in named:
                continue
            until_s = now_s + doubt if doubt else None
            row = Dead(place_path(path, place), volume_of(place), now_s, now_s, until_s, None, key)
            self.dead[row.volume, row.path] = row
        self.release_tombstones(path, key, now_s)

    def kill_places(
        self, path: str, places: Iterable[str], due_s: float, now_s: float, key: str,
        owner: int | None = None,
    ) -> None:  # fmt: skip
        """Places that a record named, or that `owner` has claimed, are dead now."""
        for place in places:
            row = Dead(place_path(path, place), volume_of(place), due_s, now_s, None, owner, key)
            self.dead.setdefault((row.volume, row.path), row)

    def kill_version(self, record: Record, due_s: float, now_s: float) -> None:
        """The version of `record` is dead: what it names, and what somebody claims for it."""
        path = record.path
        self.kill_places(path, record.places, due_s, now_s, record.key)
        for (at, owner), places in list(self.claims.items()):
            if at == path:
                self.kill_places(path, places, due_s, now_s, record.key, owner)
                del self.claims[at, owner]

    def above(self, version: str, asked_s: float) -> Burial:
        """Return all that is dead of higher versions than `version`, which lives ("": none)."""
        rows = [
            row
            for row in self.dead.values()
            if version_of(row.path) > version and not row.is_tombstone
        ]
        rows.sort(key=lambda row: version_of(row.path))
        known = {path: frozenset(volumes) for path, volumes in self.tombstones.items()}
        return Burial(rows, known, asked_s)

    def settle(self, row: Dead, found: bool | None, asked_s: float, now_s: float) -> None:
        """Note what a volume said when it was asked to delete `row`, as that was at `asked_s`. If
        it is not gone it is looked at again, ever more seldom; soon, if it has changed
        meanwhile."""
        place = (row.volume, row.path)
        current = self.dead.get(place)
        if current is None:
            return
        if found or (current == row and row.is_gone(found, asked_s)):
            del self.dead[place]
            if not row.is_tombstone:
                self.release_tombstones(row.path, row.key, now_s)
            return
        waited_s = now_s - current.since_s if current == row else 0.0
        due_s = now_s + retry_delay_s(waited_s)
        if current.doubt_s is not None and now_s < current.doubt_s:
            due_s = min(due_s, current.doubt_s)
        self.dead[place] = current._replace(due_s=due_s)

    def release_tombstones(self, path: str, key: str, now_s: float) -> None:
        """Have the tombstones of the version at `path` deleted if nothing of it is dead, or can
        become dead, any more."""
        version = version_of(path)
        left = any(
            version_of(one.path) == version and not one.is_tombstone for one in self.dead.values()
        )
        left = left or any(version_of(at) == version for at, _ in self.claims)
        if not left:
            path = tombstone_path(path)
            for volume in self.tombstones.pop(path, ()):
                self.dead[volume, path] = Dead(path, volume, now_s, now_s, None, None, key)

    def disown(self, owner: int, now_s: float) -> None:
        """An owner is taken for dead: what it has claimed is, too. Volumes may still carry out
        what it has sent."""
        until_s = now_s + BROKEN_S
        for (path, claimer), places in list(self.claims.items()):
            if claimer == owner:
                del self.claims[path, claimer]
                self.kill_places(path, places, now_s, now_s, self.key, owner)
        for place, row in self.dead.items():
            if row.owner == owner:
                doubt_s = max(until_s, row.doubt_s or 0.0)
                self.dead[place] = row._replace(doubt_s=doubt_s, owner=None)

    def end_doubt(self, volume: str, path: str, doubt_s: float | None) -> None:
        """What was in doubt at the sidecar or blob `path` has been answered after all (None), or
        cannot come any more after `doubt_s`."""
        for place, row in self.dead.items():
            if row.volume == volume and stem_of(row.path) == stem_of(path) and row.doubt_s:
                until_s = None if doubt_s is None else min(row.doubt_s, doubt_s)
                self.dead[place] = row._replace(doubt_s=until_s)


def can_be_buried(burial: Burial, reach: Reach) -> bool:
    """Whether all of it can be deleted, or get tombstones, if the volumes are what they seem."""
    if reach.takers >= reach.copies:
        return True
    return all(
        len(burial.tombstones.get(tombstone_path(row.path), ())) >= reach.copies
        or row.is_gone(False if row.volume in reach.answering else None, burial.asked_s)
        for row in burial.rows
    )


def must_be_buried(row: Dead, burial: Burial, copies: int) -> bool:
    """Whether `row`, which is above what lives, may not just be deleted: something of a lower
    version is dead too, and could take its place in a rebuild."""
    version = version_of(row.path)
    return any(
        version_of(other.path) < version
        and len(burial.tombstones.get(tombstone_path(other.path), ())) < copies
        for other in burial.rows
    )


def is_unconditional(conditions: Conditions) -> bool:
    """Whether a write under these conditions goes through whatever the key is."""
    return (
        conditions.if_match is None
        and conditions.if_none_match is None
        and conditions.unmodified_since_s is None
    )


def only_if_absent(conditions: Conditions) -> Conditions:
    """Return conditions that hold if these do and there is no such key. That is decided where all
    races are, in the transaction of the commit."""
    return conditions._replace(if_none_match=("*",))


ANY_TAG = "*"
SEEN_TAG = "-"  # of no version


class Drawn(NamedTuple):
    """The first and the highest version that one owner has drawn, and the tag of all of them.
    What an index of an earlier edition had drawn has any tag. If the first is above the highest,
    it only says that versions up to there have been seen."""

    tag: str
    first_ns: int
    highest_ns: int


def authorize(
    tokens: Collection[Token],
    anonymous: Token | None,
    authorization: str | None,
    operation: str,
    key: str,
) -> str:
    """Return the name of who may do `operation` on `key` (for a list: its prefix); raises
    Unauthorized or Forbidden. The secret is compared with every token's, in constant time, so that
    an answer's delay tells nothing."""
    rule = anonymous
    if authorization is not None and tokens:
        scheme, _, secret = authorization.partition(" ")
        shown = hashlib.sha256(secret.strip().encode("utf-8", "surrogateescape")).hexdigest()
        matching = [token for token in tokens if hmac.compare_digest(shown, token.sha256)]
        if scheme.lower() != "bearer" or not matching:
            raise Unauthorized("this token is not known here")
        rule = matching[0]
    elif rule is None:
        if tokens:
            raise Unauthorized("a token is needed: Authorization: Bearer SECRET")
        return ""
    if operation in rule.allow and (operation == "admin" or key.startswith(rule.prefix)):
        return rule.name
    limits = ", ".join(rule.allow) + (
        f" keys that begin with {rule.prefix!r}" if rule.prefix else ""
    )
    raise (Unauthorized if rule is anonymous else Forbidden)(f"{rule.name} may only {limits}")


def take_token(tokens: float, elapsed_s: float, rate: float, burst: int) -> tuple[float, float]:
    """Take one from a token bucket; return (what is left in it, seconds to wait: 0 if there was
    one)."""
    tokens = min(float(burst), tokens + elapsed_s * rate)
    return (tokens - 1, 0.0) if tokens >= 1 else (tokens, (1 - tokens) / rate)


@lru_cache(4096)  # for half of link_ttl the same link is asked for
def sign_link(subject: str, secret: str, expires_s: int) -> str:
    """Return the query that nginx's secure_link checks: an MD5 over expiry, what else the link
    says, and the secret, bound to all three."""
    signed = f"{expires_s}{subject} {secret}".encode("utf-8", "surrogateescape")
    digest = hashlib.md5(signed, usedforsecurity=False).digest()
    return f"?md5={base64.urlsafe_b64encode(digest).decode().rstrip('=')}&expires={expires_s}"


def subject_of_link(path: str, media_type: str, name: str) -> str:
    """Return what is signed of a link beside its expiry: its path on the volume, and type and name
    as they stand there. No argument holds an "&", and each path begins with "/", so no two links
    have one subject. A link without a type is one of dialect 1, and its name is not signed."""
    return f"&{media_type}&{name}&{path}" if media_type else path


def make_link(
    url: str, record: Record, dialect: int, secret: str, ttl_s: float, now_s: float
) -> str:
    """Return the link to the blob at `url`, on a volume of that dialect: with its type (but not in
    dialect 1) and the download's name, signed if there is a secret."""
    media_type = type_in_link(record.content_type) if dialect > 1 else ""
    name = name_in_link(record.key, dialect)
    query = ""
    if secret:
        # The volume checks the path that it is asked for, so that of the whole URL counts.
        path = "/" + url.split("/", 3)[3]
        subject = subject_of_link(path, media_type, name)
        query = sign_link(subject, secret, link_expiry(now_s, ttl_s))
    if media_type:
        query += f"&type={media_type}"
    if name:
        query += f"&name={name}"
    if media_type and record.modified_s > now_s:
        query += "&undated=1"  # no Last-Modified is later than now (RFC 9110, 8.8.2.1)
    return f"{url}?{query[1:]}" if query else url


def link_expiry(now_s: float, ttl_s: float) -> int:
    """Return when a link made now expires, in Unix seconds: rounded, so that the same link is made
    for half of `ttl_s` and caches know it again. It is good for at least the other half."""
    step_s = int(ttl_s / 2) or 1
    latest_s = int(now_s + ttl_s)
    return latest_s - latest_s % step_s


def decide_cors(origins: str, origin: str, exposed: str) -> dict[str, str]:
    """Return the headers (CORS, fetch.spec.whatwg.org) that let a page of `origin` see an answer,
    if it is among `origins`. No cookie counts here, so all may be told with *."""
    listed = origins.split()
    if "*" in listed:
        return {"Access-Control-Allow-Origin": "*", "Access-Control-Expose-Headers": exposed}
    headers = {"Vary": "Origin"} if listed else {}
    if origin in listed:
        headers["Access-Control-Allow-Origin"] = origin
        headers["Access-Control-Expose-Headers"] = exposed
    return headers


class ListQuery(NamedTuple):
    prefix: str = ""
    delimiter: str = ""
    start: str = ""
    limit: int = 1000

    def group_of(self, key: str) -> str:
        """Return what the group of a key begins with, up to a delimiter after the prefix; "" if it
        is in none."""
        cut = key.find(self.delimiter, len(self.prefix)) if self.delimiter else -1
        return key[: cut + len(self.delimiter)] if cut >= 0 else ""


def parse_list_query(query: str) -> ListQuery:
    """Read the query of a list request strictly; raises BadRequest."""
    try:
        pairs = (
            parse_qsl(query, keep_blank_values=True, strict_parsing=True, errors="strict")
            if query
            else []
        )
        sizes = [len(value.encode()) for _, value in pairs]
    except ValueError:
        raise BadRequest("the query is malformed or not UTF-8") from None
    given = dict(pairs)
    if len(given) < len(pairs) or not given.keys() <= {"prefix", "delimiter", "start", "limit"}:
        raise BadRequest("a list takes prefix, delimiter, start and limit, each once")
    limit = given.pop("limit", "1000")
    if not re.fullmatch(r"[0-9]{1,5}", limit) or not 1 <= int(limit) <= 10000:
        raise BadRequest(f"limit must be 1 to 10000, not {limit!r}")
    if max(sizes, default=0) > MAX_KEY_BYTES or any("\0" in value for value in given.values()):
        raise BadRequest(f"no value in the query has more than {MAX_KEY_BYTES} bytes, or NUL")
    return ListQuery(**given, limit=int(limit))


# == Wire format ==================================================================================
# HTTP/1.x (RFC 9112) over bytes: pure and bounded. What a client sends is read strictly: what two
# parsers could read in two ways is refused, so that a proxy in front and this one see the same
# requests. What a volume sends beyond a bound is refused.

MAX_HEAD = 32 * 1024  # bytes of a request's head
MAX_TARGET = 8000  # of these in its target
MAX_FIELDS = 100  # header lines; HAProxy takes 101, with 16 KiB in all
CHUNK_LINE_BYTES = 256  # the size of a chunk and its extensions
# Each chunk costs as much time as a kilobyte: chunks must not be tiny, nor framing (sizes and
# extensions) be more than the body.
MIN_CHUNK = 64  # bytes on average
FREE_CHUNKS = 1000  # of any size
FREE_FRAMING = 512 * 1024  # bytes

TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]++"
FIRST_LINE = (  # a fragment (#) is never sent
    rb"(" + TOKEN + rb") ([!\"$-~]{1,%d}+) HTTP/1\.([0-9])\r\n" % MAX_TARGET
)
REQUEST_LINE = re.compile(FIRST_LINE)
REQUEST_HEAD = re.compile(FIRST_LINE + rb"((?:" + TOKEN + rb":[\t -~\x80-\xff]*+\r\n)*+)\r\n")
OTHER_VERSION = re.compile(TOKEN + rb" [!-~]++ HTTP/[02-9](?:\.[0-9])?\r\n")
EMPTY_LINES = re.compile(rb"(?:\r\n)*+")
REQUEST_START = re.compile(rb"(" + TOKEN + rb") ([!-~]{1,1024})")
GIVEN_ID = re.compile(rb"\nx-request-id:[ \t]*([A-Za-z0-9._-]{1,128})[ \t]*\r", re.IGNORECASE)
# METHODS are those that a client may ask for; others share one label in the metrics.
METHODS = ("GET", "HEAD", "PUT", "DELETE", "POST", "OPTIONS", "PATCH")
METHOD_STARTS = tuple(f"{method} ".encode() for method in METHODS)
# What stands twice in a head has no second meaning.
ONLY_ONCE = (
    "host", "content-length", "transfer-encoding", "expect", "authorization", "content-type",
    "if-modified-since", "if-unmodified-since", "range", "if-range", "content-range",
)  # fmt: skip
LENGTH = re.compile(r"[0-9]{1,15}")
DIGITS = re.compile(r"[0-9]+")

# Heads that need not be read again: of one client, and of the answers of a second, most are alike.
HEADS_KNOWN = 64
ANSWER_HEAD_BYTES = 16 * 1024  # of the head of a volume's answer
INTERIM_ANSWERS = 10  # 1xx before the answer proper

TEXT = rb"[^\x00-\x08\x0a-\x1f\x7f]*+"  # what may stand in a line: no control characters but tabs
CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,12})[ \t]*(?:;" + TEXT + rb")?\r\n")
ANSWER_HEAD = re.compile(
    rb"HTTP/1\.([01]) ([1-5][0-9]{2})(?: " + TEXT + rb")?\r\n"
    rb"(?:[!#$%&'*+.^_`|~0-9A-Za-z-]++:" + TEXT + rb"\r\n)*+\r\n"
)  # fmt: skip
FRAMING = re.compile(rb"\n(content-length|transfer-encoding|connection):([^\r]*)", re.IGNORECASE)
DIALECT = re.compile(rb"\nmkv-dialect: *2 *\r", re.IGNORECASE)


class Fields(NamedTuple):
    """What the header lines of a request say, for whoever reads its body and answers it."""

    headers: Mapping[str, str]  # names in lower case; what stands twice is joined by ", "
    length: int | None  # bytes of the body; None: chunked, or in a coding that is not known
    expects: bool  # the client waits to be asked for the body
    connection: str  # what the answer says of it: "close", "keep-alive", or nothing


class RequestHead(NamedTuple):
    """The head of a request."""

    method: str
    target: str
    fields: Fields


def may_begin_request(data: bytes) -> bool:
    """Whether what begins with `data` can be a request of a known method; empty lines may precede
    it."""
    data = data[EMPTY_LINES.match(data).end() :]  # type: ignore[union-attr] # it always matches
    return data == b"\r" or any(start.startswith(data[: len(start)]) for start in METHOD_STARTS)


def may_become_head(data: bytes) -> bool:
    """Whether `data`, in which no head ends, can be the beginning of one."""
    if b"\n" in data:
        return REQUEST_LINE.match(data) is not None and len(data) <= MAX_HEAD
    return len(data) <= MAX_TARGET and (data == b"\r" or re.match(TOKEN, data) is not None)


@lru_cache(HEADS_KNOWN)
def parse_fields(text: bytes, minor: bytes) -> Fields:
    """Read the well-formed header lines of a request in HTTP/1.`minor`; raises BadRequest,
    HeadTooLarge, TooLarge."""
    headers = dict[str, str]()
    lines = text.decode("utf-8", "surrogateescape").split("\r\n")
    lines.pop()  # behind the last line
    if len(lines) > MAX_FIELDS:
        raise HeadTooLarge(f"a request has at most {MAX_FIELDS} header lines")
    for line in lines:
        name, _, value = line.partition(":")
        name = name.lower()
        value = value.strip(" \t")
        if name not in headers:
            headers[name] = value
        elif name in ONLY_ONCE:
            raise BadRequest(f"there are two {name}")
        else:
            headers[name] += f", {value}"
    is_old = minor == b"0"
    host = headers.get("host")
    if host is None and not is_old:
        raise BadRequest("there is no Host")
    if host and not HOST.fullmatch(host):
        raise BadRequest("Host is malformed")
    options = {one.strip(" \t").lower() for one in headers.get("connection", "").split(",")}
    connection = ""
    if headers.get("transfer-encoding", "chunked").lower() != "chunked":
        connection = "close"  # nobody knows where the body ends
    elif "close" in options or (is_old and "keep-alive" not in options):
        connection = "close"
    elif is_old:
        connection = "keep-alive"
    expects = not is_old and headers.get("expect", "").lower() == "100-continue"
    length = parse_length(headers, is_old)
    return Fields(MappingProxyType(headers), length, expects, connection)


def parse_length(headers: Mapping[str, str], is_old: bool) -> int | None:
    """Return how many bytes a body has, None if chunks say so; raises BadRequest, TooLarge."""
    length = headers.get("content-length")
    if "transfer-encoding" in headers:
        if length is not None:
            raise BadRequest("a body has no Content-Length beside a Transfer-Encoding")
        if is_old:
            raise BadRequest("HTTP/1.0 has no Transfer-Encoding")
        return None
    if length is None:
        return 0
    if not DIGITS.fullmatch(length):
        raise BadRequest("Content-Length is malformed")
    if len(length) > 19:
        raise TooLarge("no blob has as many bytes as Content-Length says")
    return int(length)


def parse_request_head(head: bytes) -> RequestHead:
    """Read the head of a request, with its empty line; raises MkvError."""
    found = REQUEST_HEAD.fullmatch(head) if len(head) <= MAX_HEAD else None
    if found is None:
        raise fault_of_head(head)
    return RequestHead(found[1].decode(), found[2].decode(), parse_fields(found[4], found[3]))


def fault_of_head(head: bytes) -> MkvError:
    """Say why this is no head of a request."""
    if len(head.partition(b"\n")[0]) > MAX_TARGET:
        return TargetTooLong(f"a target has at most {MAX_TARGET} bytes")
    if OTHER_VERSION.match(head):
        return UnknownVersion("only HTTP/1.0 and HTTP/1.1 are known here")
    if not REQUEST_LINE.match(head):
        return BadRequest("the first line is none of an HTTP request")
    if len(head) > MAX_HEAD:
        return HeadTooLarge(f"the head of a request has at most {MAX_HEAD} bytes")
    return BadRequest("a header line is malformed")


def salvage_head(data: bytes) -> RequestHead:
    """Return what log and answer can say of a request that is refused unread; its body never
    ends."""
    found = REQUEST_START.match(data)
    method, target = (found[1].decode(), found[2].decode()) if found else ("", "")
    given = GIVEN_ID.search(data)
    headers = {"x-request-id": given[1].decode()} if given else {}
    return RequestHead(method, target, Fields(headers, None, False, "close"))


class AnswerHead(NamedTuple):
    """What the head of an answer says; `size` is that of the body, None for a chunked one;
    `dialect` that of nginx.conf on the volume."""

    status: int
    size: int | None
    reusable: bool
    dialect: int = 1


@lru_cache(HEADS_KNOWN)
def parse_answer_head(head: bytes) -> AnswerHead:
    """Read the head of an answer strictly, but not to a HEAD; raises ValueError."""
    found = ANSWER_HEAD.fullmatch(head) if len(head) <= ANSWER_HEAD_BYTES else None
    if found is None:
        raise ValueError("what it answers is not HTTP")
    status = int(found[2])
    size: int | None = None
    chunked = False
    reusable = found[1] == b"1"
    for name, text in FRAMING.findall(head):
        value = text.decode("latin-1").strip(" \t").lower()
        match name.lower():
            case b"connection":
                reusable = reusable and "close" not in value
            case b"transfer-encoding" if value == "chunked" and not chunked:
                chunked = True
            case b"content-length" if LENGTH.fullmatch(value) and size in (None, int(value)):
                size = int(value)
            case _:
                raise ValueError("the length of its answer is malformed or given twice")
    if chunked and size is not None:
        raise ValueError("its answer has two lengths")
    if status < 200 or status in (204, 304):
        size = 0
    elif size is None and not chunked:
        raise ValueError("its answer has no length")
    return AnswerHead(status, size, reusable, 2 if DIALECT.search(head) else 1)


def drop_location(head: bytes) -> bytes:
    """Return the head of an answer without its Location. That says nothing which counts here, but
    makes the answer to each PUT another one."""
    before, name, after = head.partition(b"\r\nLocation: ")
    value, _, behind = after.partition(b"\r\n")
    if name and value.isascii() and value.decode().isprintable():
        return before + b"\r\n" + behind
    return head


WRONG_END = "a chunk is longer than its size, or a trailer follows the last"


class ChunkDecoder:
    """Takes the framing off a chunked body (RFC 9112, 7.1) as it comes. Extensions are skipped,
    trailers refused: a digest there would be ignored in silence. With `frugal`, refuses framing
    that outweighs the body."""

    def __init__(self, frugal: bool = False) -> None:
        self.done = False
        self._frugal = frugal
        self._left = 0  # bytes of this chunk
        self._line = b""  # the beginning of a line
        self._ends_chunk = False  # the line that comes next
        self._ends_body = False
        self._chunks = 0
        self._size = 0  # bytes of the body
        self._framing = 0  # bytes around them

    def decode(self, data: bytes) -> tuple[bytes, bytes]:
        """Return what is of the body in `data`, and what comes behind the body; raises ValueError
        if it is malformed."""
        data = self._line + data
        self._line = b""
        pieces = list[bytes]()
        at = 0
        while at < len(data) and not self.done:
            if self._left:
                piece = data[at : at + self._left]
                pieces.append(piece)
                at += len(piece)
                self._left -= len(piece)
                self._size += len(piece)
                self._ends_chunk = not self._left
                continue
            end = data.find(b"\n", at) + 1
            if (end or len(data)) - at > CHUNK_LINE_BYTES:
                raise ValueError("the size of a chunk is too long")
            if not end:
                self._line = data[at:]
                if (self._ends_chunk or self._ends_body) and not b"\r\n".startswith(self._line):
                    raise ValueError(WRONG_END)
                return b"".join(pieces), b""
            self._take_line(data[at:end])
            at = end
        return b"".join(pieces), data[at:]

    def _take_line(self, line: bytes) -> None:
        """Read the line between two chunks."""
        self._framing += len(line)
        if self._ends_chunk or self._ends_body:
            if line != b"\r\n":
                raise ValueError(WRONG_END)
            self.done = self._ends_body
            self._ends_chunk = False
            return
        found = CHUNK_LINE.fullmatch(line)
        if found is None:
            raise ValueError("the size of a chunk is malformed")
        self._left = int(found[1], 16)
        self._ends_body = not self._left
        if self._frugal and self._left:
            self._chunks += 1
            self._weigh(self._size + self._left)

    def _weigh(self, size: int) -> None:
        if self._chunks > FREE_CHUNKS and size < MIN_CHUNK * self._chunks:
            raise ValueError(f"it has chunks of less than {MIN_CHUNK} bytes on average")
        if self._framing > size + FREE_FRAMING:
            raise ValueError("its chunk headers outweigh it")


# bytes; when aiohttp 3.14's parser in Python has to pause within a larger one, it may wait for
# ever
CHUNK_BYTES = 16 * 1024


def encode_chunks(data: bytes) -> bytes:
    """Return a part of a body as chunks."""
    pieces = [data[at : at + CHUNK_BYTES] for at in range(0, len(data), CHUNK_BYTES)]
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)


def encode_response_head(
    status: int, headers: Mapping[str, str], date: str, connection: str
) -> bytes:
    """Return the head of a response; raises ValueError if a header would become two."""
    lines = [STATUS_LINES[status]]
    for name, value in headers.items():
        lines.append(f"{name}: {value}")
    lines.append(f"Date: {date}")
    if connection:
        lines.append(f"Connection: {connection}")
    text = "\r\n".join(lines)
    if text.count("\n") >= len(lines) or text.count("\r") >= len(lines):
        raise ValueError("a line break in a header")
    return f"{text}\r\n\r\n".encode("latin-1")


REASONS = {status.value: status.phrase for status in HTTPStatus}
REASONS |= {
    413: "Content Too Large",
    414: "URI Too Long",
    422: "Unprocessable Content",
}  # RFC 9110
STATUS_LINES = {status: f"HTTP/1.1 {status} {reason}" for status, reason in REASONS.items()}


class AnswerReader:
    """Reads the answers that come on one connection, one after the other."""

    def __init__(self) -> None:
        self.reusable = True  # more answers can follow
        self.dialect = 1  # that the last answer showed
        self._data = b""  # what has come
        self._at = 0  # how much of it has been read
        self._interim = 0  # answers before the next one proper
        self._head: AnswerHead | None = None  # of the answer that `read` is about
        self._left = 0  # bytes of its body that are to come
        self._chunks: ChunkDecoder | None = None
        self._body = bytearray()

    @property
    def unread(self) -> int:
        """How many bytes have come and are not read."""
        return len(self._data) - self._at

    @property
    def is_clean(self) -> bool:
        """Whether nothing has come but what was asked for."""
        return self._head is None and self._at == len(self._data)

    def feed(self, data: bytes) -> None:
        self._data = self._data[self._at :] + data
        self._at = 0

    def read(self, limit: int) -> Answer | None:
        """Return the next answer, None if it is not whole yet; raises ValueError.

        A body longer than `limit` is cut off after one byte more, and then no other can follow.
        """
        if self._head is None:
            self._head = self.read_head()
            if self._head is None:
                return None
        head = self._head
        if head.size == 0:
            self._head = None
            return head.status, b""
        piece = self.read_piece()
        while piece:
            self._body += piece
            if len(self._body) > limit:
                self.reusable = False
                break
            piece = self.read_piece()
        if piece is None:
            return None
        body = bytes(self._body[: limit + 1])
        self._head = None
        self._body.clear()
        return head.status, body

    def read_head(self) -> AnswerHead | None:
        """Return the head of the next answer, past those that are interim; None if it is not whole
        yet. Raises ValueError."""
        while True:
            end = self._data.find(b"\r\n\r\n", self._at) + 4
            if end < 4:
                if self.unread > ANSWER_HEAD_BYTES:
                    raise ValueError("the head of its answer does not end")
                return None
            size = end - self._at
            if size > ANSWER_HEAD_BYTES:
                raise ValueError("the head of its answer is too long")
            head = parse_answer_head(drop_location(self._data[self._at : end]))
            self._at = end
            if head.status >= 200:
                break
            self._interim += 1
            if head.status == 101 or self._interim > INTERIM_ANSWERS:
                raise ValueError("it sends interim answers only")
        self._interim = 0
        self.reusable = self.reusable and head.reusable
        self.dialect = head.dialect
        self._left = head.size or 0
        self._chunks = ChunkDecoder() if head.size is None else None
        return head

    def read_piece(self) -> bytes | None:
        """Return what has come of the body; b"" at its end, None if more is to come. Raises
        ValueError."""
        if self._chunks is None:
            piece = self._data[self._at : self._at + self._left]
            self._at += len(piece)
            self._left -= len(piece)
            return piece or (None if self._left else b"")
        if self._chunks.done:
            return b""
        piece, self._data = self._chunks.decode(self._data[self._at :])
        self._at = 0
        return piece or (b"" if self._chunks.done else None)


# == Session ======================================================================================
# One connection to what holds the index, for one thread at a time: here to a file of SQLite, which
# the processes of one machine share. All else that can hold an index is a subclass in a section of
# its own, in ENGINES by the scheme of its URL. What they say in other words are the names in
# capitals that Session begins with; the rest is one text of SQL, with parameters ?1, ?2 and so on.
#
# What is on a volume and in no record is in one of three tables: `claim` has one row a PUT, from
# before the first byte until the commit; `dead` has the places that are to be deleted; `tombstone`
# the versions that are noted as dead on a volume. See Pending for what that means.
#
# Whoever claims is an owner: a row with a random number, so that no two can have one, that says
# until when it is alive. Each transaction renews it, and one is made long before it ends. Anybody
# may end the lease of one that is late: its claims are dead then. If it lives after all, its next
# commit finds that. `seq` counts the transactions of an owner.
#
# `drawn` says which versions this index has given out: a row for each owner that drew any, with
# the tag in which they end. So a whole copy of the index, however old, tells what is dead of all
# that it knew: a version that was drawn, and that no record and no claim in the copy names.
#
# Times in `dead` and `owner` are of the index's own clock. Here that runs with the machine's
# monotonic clock: a step of the wall clock neither hastens nor delays a deletion; after a boot it
# goes on from the wall clock.

SCHEMA_VERSION = 4
RECORDS = """
CREATE TABLE record (key TEXT PRIMARY KEY, version TEXT NOT NULL, volumes TEXT NOT NULL,
    size INTEGER NOT NULL,
    digest TEXT NOT NULL, content_type TEXT NOT NULL, ext TEXT NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE total (name TEXT PRIMARY KEY, blobs INTEGER NOT NULL,
    bytes INTEGER NOT NULL) STRICT, WITHOUT ROWID;
"""
PENDING = """
CREATE TABLE claim (path TEXT NOT NULL, owner INTEGER NOT NULL, places TEXT NOT NULL,
    key TEXT NOT NULL, PRIMARY KEY (path, owner)) STRICT, WITHOUT ROWID;
CREATE TABLE dead (path TEXT NOT NULL, volume TEXT NOT NULL, due REAL NOT NULL,
    since REAL NOT NULL, doubt REAL, owner INTEGER, key TEXT NOT NULL,
    PRIMARY KEY (path, volume)) STRICT, WITHOUT ROWID;
CREATE INDEX dead_due ON dead (volume, due);
CREATE INDEX dead_since ON dead (since);
CREATE INDEX dead_owner ON dead (owner) WHERE owner IS NOT NULL;
CREATE TABLE tombstone (path TEXT NOT NULL, volume TEXT NOT NULL,
    PRIMARY KEY (path, volume)) STRICT, WITHOUT ROWID;
"""
OWNERS = """
CREATE TABLE owner (id INTEGER PRIMARY KEY, role TEXT NOT NULL, until REAL NOT NULL,
    seq INTEGER NOT NULL) STRICT, WITHOUT ROWID;
"""
DRAWN = """
CREATE TABLE drawn (tag TEXT PRIMARY KEY, first INTEGER NOT NULL,
    highest INTEGER NOT NULL) STRICT, WITHOUT ROWID;
CREATE INDEX drawn_highest ON drawn (highest);
"""
# The number that was seen on each volume; the store's own id has the name ''.
IDENTITIES = """
CREATE TABLE identity (name TEXT PRIMARY KEY, number TEXT NOT NULL) STRICT, WITHOUT ROWID;
"""
TABLES = RECORDS + PENDING + OWNERS + DRAWN + IDENTITIES
CLOCK = """
CREATE TABLE clock (boot TEXT NOT NULL, ahead REAL NOT NULL) STRICT;
INSERT INTO clock VALUES ('', 0);
"""
STORE_ID = ""
KEEP_IDENTITY = "INSERT INTO identity VALUES (?1, ?2) ON CONFLICT (name) DO NOTHING"
REPLACE_IDENTITY = """INSERT INTO identity VALUES (?1, ?2)
    ON CONFLICT (name) DO UPDATE SET number = excluded.number"""
COLUMNS = "key, version, volumes, size, digest, content_type, ext"
DEAD_COLUMNS = "path, volume, due, since, doubt, owner, key"
COPY = "copy"  # in place of a boot, in an index that is a copy: rebuild reads it, nobody serves it
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # proc(5)
WAL_BYTES = 16 * 1024 * 1024
WRITERS_S = 30.0  # for other processes that write
ROWS_AT_ONCE = 100  # so that statements of all sizes stay prepared
LAST_KEY = "\U0010ffff" * MAX_KEY_BYTES  # after all keys
# What is pending on the keys whose paths begin with what is given.
PENDING_QUERY = f"""WITH given AS (GIVEN)
    SELECT 'claim', path, places, 0.0, 0.0, 0.0, owner, key FROM given CROSS JOIN claim
        WHERE path >= value AND path < value || '~'
    UNION ALL SELECT 'dead', {DEAD_COLUMNS} FROM given CROSS JOIN dead
        WHERE path >= value AND path < value || '~'
    UNION ALL SELECT 'tombstone', path, volume, 0.0, 0.0, 0.0, 0, '' FROM given
        CROSS JOIN tombstone WHERE path >= value AND path < value || '~'"""
SCAN = f"SELECT {COLUMNS} FROM record WHERE key >= ?1 AND key < ?2 ORDER BY key LIMIT ?3"
# The same, from a key to the next one that is not in its group: ?4 characters are before the
# delimiter ?5, and ?6 comes after it. No character comes before ?7 in a key.
SCAN_GROUPS = f"""WITH RECURSIVE found(at, number) AS (
    SELECT (SELECT key FROM record WHERE key >= ?1 AND key < ?2 ORDER BY key LIMIT 1), 1
    UNION ALL
    SELECT (
        SELECT key FROM record
        WHERE key < ?2 AND key >= CASE FIND(substr(at, ?4 + 1), ?5)
            WHEN 0 THEN at || ?7
            ELSE substr(at, 1, ?4 + FIND(substr(at, ?4 + 1), ?5) - 1) || ?6 END
        ORDER BY key LIMIT 1
    ), number + 1
    FROM found WHERE number < ?3 AND at IS NOT NULL
) SELECT {COLUMNS} FROM found JOIN record ON key = at ORDER BY number"""
Row = tuple[Any, ...]
Query = tuple[str, Sequence[Any]]
KEY_STEM = STEM - 20  # as key_stem


def record_of_row(row: Iterable[Any]) -> Record:
    key, version, places, size, digest, content_type, ext = row
    return Record(key, version, tuple(places.split()), size, digest, content_type, ext)


def row_of_record(record: Record) -> Row:
    return (*record[:2], " ".join(record.places), *record[3:])


@lru_cache(1024)
def placeholders(width: int, count: int) -> str:
    """Return SQL for `count` rows of `width` parameters."""
    rows = [range(i * width + 1, (i + 1) * width + 1) for i in range(count)]
    return ",".join(f"({','.join(f'?{number}' for number in row)})" for row in rows)


def draw_number() -> str:
    """Return a store's id, or the number of an identity."""
    return f"{random.getrandbits(128):032x}"


class Session:
    """A connection to the index in the file `db`. It raises what `explain` makes an error of mkv.
    While it is used, which is from `enter` to `leave`, that holds a shared lock on `db`.lock, and
    whoever replaces the index takes that alone."""

    NOW = "(SELECT ahead + monotonic() FROM clock)"  # by the index's own clock
    IS_COPY = f"SELECT 1 FROM clock WHERE boot = '{COPY}'"
    GIVEN = "SELECT value FROM json_each(?1)"  # what a parameter lists
    FIND = "instr"
    PACKED = f"json_group_array(json_array({COLUMNS}))"  # many rows as one: see run_many
    # How a transaction begins that writes, durable or not; it ends with what time it is. A commit
    # that is not synced is synced with the next one that is: the log is one file.
    BEGIN: ClassVar[Mapping[bool, Sequence[str]]] = {
        True: ("PRAGMA synchronous = FULL", "BEGIN IMMEDIATE", f"SELECT {NOW}"),
        False: ("PRAGMA synchronous = NORMAL", "BEGIN IMMEDIATE", f"SELECT {NOW}"),
    }

    is_remote = False  # others may be on other machines: leases keep them away, no lock
    waits_s: float | None = None  # for an answer, before it is interrupted

    def __init__(self, db: str, is_readonly: bool = False) -> None:
        self.name = db  # for people, without any secret
        # Wherever links lead: who locks, or replaces, one file must not do that under two names.
        self.place = os.path.realpath(db)
        self.is_readonly = is_readonly
        self.db: sqlite3.Connection
        self._has_db = False
        self._lock = -1

    @property
    def is_open(self) -> bool:
        return self._has_db

    @property
    def uri(self) -> str:
        return f"{Path(self.place).as_uri()}?mode={'ro' if self.is_readonly else 'rwc'}"

    def beside(self) -> str:
        """Return where a new index is made that is to take the place of this one."""
        return f"{self.place}.new"

    def connect(self) -> None:
        """Open it, if it is not open."""
        if self.is_open:
            return
        self.db = sqlite3.connect(
            self.uri, uri=True, timeout=WRITERS_S, isolation_level=None, cached_statements=1024
        )
        self._has_db = True
        try:
            self.run("PRAGMA cache_size = -32768")
            # A log that grew beside a long reader shrinks again.
            self.run(f"PRAGMA journal_size_limit = {WAL_BYTES}")
            self.db.create_function("monotonic", 0, self.read_monotonic)
        except sqlite3.Error:  # the file is no database
            self.close()
            raise

    def close(self) -> None:
        """May be called twice."""
        if self._has_db:
            self.db.close()
        self._has_db = False

    def interrupt(self) -> None:
        """On another thread: have what is waited for fail."""

    def explain(self, error: Exception) -> Exception:
        """Return what goes out of the index for an error: those of the engine stay inside."""
        if isinstance(error, sqlite3.OperationalError):  # busy, out of space, no permission
            return IndexFailed(str(error))
        return IndexDamaged(str(error)) if isinstance(error, sqlite3.Error) else error

    # -- what is said --

    def ask(self, queries: Sequence[Query]) -> list[list[Row]]:
        """Return all rows of each query, in few round trips."""
        return [self.db.execute(query, values).fetchall() for query, values in queries]

    def select(self, query: str, values: Sequence[Any] = ()) -> list[Row]:
        return self.ask([(query, values)])[0]

    def run(self, statement: str, values: Sequence[Any] = ()) -> None:
        """Carry a statement out, at the latest when something is selected or committed."""
        self.db.execute(statement, values)

    def run_many(self, statement: str, rows: Sequence[Row]) -> None:
        """The same, with all these rows of values in the place of ROWS: one step for many, since
        in each step SQLite gives up the GIL, and a busy event loop is slow to return it."""
        for start in range(0, len(rows), ROWS_AT_ONCE):
            piece = rows[start : start + ROWS_AT_ONCE]
            values = placeholders(len(piece[0]), len(piece))
            self.run(statement.replace("ROWS", values), list(chain.from_iterable(piece)))

    def look_up_query(self, keys: Iterable[str]) -> Query:
        query = f"SELECT {self.PACKED} FROM record WHERE key IN ({self.GIVEN})"
        return query, [json.dumps([*keys])]

    def look_up(self, keys: Iterable[str]) -> dict[str, Record]:
        """Return the records of `keys`."""
        return records_of(self.select(*self.look_up_query(keys)))

    def pending_query(self, starts: Iterable[str]) -> Query:
        return PENDING_QUERY.replace("GIVEN", self.GIVEN), [json.dumps([*starts])]

    def read_pending(self, starts: Iterable[str]) -> dict[str, Pending]:
        """Return, by their stems, what is pending on the keys whose paths begin with `starts`."""
        return pending_of(self.select(*self.pending_query(starts)))

    def scan(self, query: ListQuery) -> Iterator[Row]:
        """Yield the records that a list asks for, few more than are taken; of each group of keys
        only the first, in a few steps, however many there are."""
        following: str | None = max(query.prefix, query.start)
        end = after_prefix(query.prefix) or LAST_KEY
        after = after_prefix(query.delimiter)
        count = 16
        group = ""
        while following is not None:
            values: list[Any] = [following, end, count]
            if after:
                values += [len(query.prefix), query.delimiter, after, "\1"]
            statement = SCAN_GROUPS.replace("FIND", self.FIND) if after else SCAN
            rows = self.select(statement, values)
            for row in rows:
                before = group
                group = query.group_of(row[0])
                if not group or group != before:
                    yield row
            if len(rows) < count:
                return
            following = after_prefix(group) if group else f"{rows[-1][0]}\1"
            count = min(1024, 4 * count)

    def read_monotonic(self) -> float:
        return time.monotonic()

    def read_clock(self) -> float:
        """Return the time by the index's own clock, in seconds."""
        ((now_s,),) = self.select(f"SELECT {self.NOW}")
        return float(now_s)

    def wall_ns(self, now_s: float) -> int:
        """Return what `now_s` by that clock is in Unix nanoseconds."""
        return time.time_ns()

    # -- transactions --

    def begin(self, durable: bool, queries: Sequence[Query]) -> tuple[float, list[list[Row]]]:
        """Begin a transaction that writes, once no other does: until its end, none will. Return
        the time by the index's own clock, and what the queries find. If it is not to be `durable`,
        the next one that is takes it to the disk."""
        self.connect()
        begin = [(statement, ()) for statement in self.BEGIN[durable]]
        answers = self.ask([*begin, *queries])
        turn = answers[len(begin) - 1]
        if not turn:
            raise IndexFailed("another index has just taken its place")
        return turn[0][0], answers[len(begin) :]

    def commit(self, lease: Lease | None = None) -> None:
        """Carry out all that was run, for the owner with this lease; return when it is on disk, if
        it is to be."""
        self.db.execute("COMMIT")

    def roll_back(self) -> None:
        """End a transaction in which something failed, as if it had never begun; never raises."""
        with contextlib.suppress(sqlite3.Error):
            self.db.rollback()

    # -- a new one, an old one --

    def prepare(self) -> None:
        """Make the tables of a new index, bring an older one to this schema; raises what `explain`
        turns into IndexDamaged if it cannot be used."""
        self.connect()
        self._log_ahead()
        with self.db:
            self.run("BEGIN IMMEDIATE")  # two processes may both find it new
            ((version,),) = self.select("PRAGMA user_version")
            if version == 0:
                self.make_tables(TABLES + CLOCK)
            elif version != SCHEMA_VERSION:
                migration_from(version)(self)
            self.set_clock("dead")
            if version != SCHEMA_VERSION:
                self.run(f"PRAGMA user_version = {SCHEMA_VERSION}")

    def _log_ahead(self) -> None:
        deadline = time.monotonic() + WRITERS_S
        while True:
            try:
                return self.run("PRAGMA journal_mode = WAL")
            except sqlite3.OperationalError as error:
                # Of two processes that find it new, SQLite lets one not even wait.
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
            time.sleep(0.02)

    def make_tables(self, tables: str) -> None:
        for statement in tables.split(";"):
            if statement.strip():
                self.run(statement)
        self.run(KEEP_IDENTITY, (STORE_ID, draw_number()))

    def set_clock(self, table: str) -> None:
        """Have the clock go on after a boot. One that was not set yet takes back nothing that is
        in `table`."""
        boot = BOOT_ID.read_text().strip() if BOOT_ID.exists() else f"unknown, as of {time.time()}"
        ((latest,),) = self.select(f"SELECT coalesce(max(since), 0) FROM {table}")
        ahead = max(time.time(), latest) - time.monotonic()
        self.run("UPDATE clock SET ahead = ?2 WHERE boot <> ?1", (boot, ahead))
        self.run("UPDATE clock SET boot = ?1 WHERE boot NOT IN (?1, ?2)", (boot, COPY))

    def enter(self) -> None:
        """Keep away who wants the index alone; raises ConfigError."""
        try:
            Path(self.place).parent.mkdir(parents=True, exist_ok=True)
            self._lock = lock_file(f"{self.place}.lock", exclusive=False)
        except BlockingIOError:
            raise ConfigError([f"db: {self.name} is being rebuilt by mkv_tools.py"]) from None
        except OSError as error:
            raise ConfigError([f"db: {self.name}: {error}"]) from None

    def leave(self) -> None:
        """May be called twice."""
        if self._lock >= 0:
            os.close(self._lock)
        self._lock = -1


ENGINES: dict[str, type[Session]] = {}  # by the schemes of URLs
MIGRATIONS: dict[int, Callable[[Session], None]] = {}  # from earlier schemas


def make_session(db: str, is_readonly: bool = False) -> Session:
    """Return a session, not yet open, with the index at `db`; raises ConfigError."""
    scheme, separator, _ = db.partition("://")
    if not separator:
        return Session(db, is_readonly)
    if scheme not in ENGINES:
        raise ConfigError([f"db: this mkv.py has nothing for {scheme}://"])
    return ENGINES[scheme](db, is_readonly)


def migration_from(schema: int) -> Callable[[Session], None]:
    if schema not in MIGRATIONS:
        known = " and ".join(map(str, [SCHEMA_VERSION, *MIGRATIONS]))
        raise IndexDamaged(f"its schema is {schema}, this mkv knows {known}")
    return MIGRATIONS[schema]


def records_of(rows: Iterable[Row]) -> dict[str, Record]:
    """Return what Session.look_up asks for."""
    ((text,),) = rows
    return {row[0]: record_of_row(row) for row in json.loads(text or "[]")}


def pending_of(rows: Iterable[Row]) -> dict[str, Pending]:
    """Return what PENDING_QUERY has found, by the stems of keys."""
    found = dict[str, Pending]()
    for table, *row in rows:
        pending = found.setdefault(row[0][:KEY_STEM], Pending({}, {}, {}))
        pending.key = pending.key or row[6]
        if table == "claim":
            path, places, *_, owner, _ = row
            pending.claims[path, owner] = tuple(places.split())
        elif table == "dead":
            dead = Dead(*row)
            pending.dead[dead.volume, dead.path] = dead
        else:
            path, volume, *_ = row
            pending.tombstones.setdefault(path, set()).add(volume)
    return found


def lock_file(path: str, exclusive: bool) -> int:
    """Lock `path`, which is made if missing, until the file descriptor returned is closed; raises
    BlockingIOError."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(fd, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise
    return fd


# == Index ========================================================================================
# Sessions behind threads: one writes, a few read. Calls that wait meanwhile go together: they
# share one hop to the thread, and mutations one transaction. What these say that they will ask for
# is read as it begins, they are carried out on what is in memory, and at the end all is written.
# So a batch is two round trips, to begin and to commit, whatever it holds. A transaction knows
# nothing of the one before it.
#
# What a transaction has written is durable when it is answered, but for those that only claim, put
# off or settle: they are on disk with the next one that is. What a power cut takes of them is the
# claim of a PUT that nobody was answered.
#
# The face that all use: Index (`get`, `read` with a function of a session, `write` with a function
# of a transaction) and those functions. The tools have more of them, and replace an index.

ALL_KEYS, GARBAGE = "", "*"  # rows of `total` that are no volume's
RENEWALS = 3  # of a lease, before it would end
LONGEST_LEASE_S = 3600.0
BATCH = 1000  # calls in one hop: bounds how long the others wait
RECONNECT_S = 10.0  # how long a write waits for another connection in place of one that broke
RECONNECT_EVERY_S = 0.1
LIST_BYTES = 4 * 1024 * 1024  # of a page, whatever its limit: slow readers keep pages in memory
# Of these for all but the entries: `next` may have 6 bytes for each of a key.
LIST_FRAME = 8 * 1024
RECORD_PAGE = 1000
DUE_ROWS = 500  # that are deleted in one go
LAST_VERSION = "g"  # no version is above that
TAG_DIGITS = 4
TAGS = 16**TAG_DIGITS
# For Session.run_many. A row of Pending is deleted by its first two values. (Of VALUES without the
# SELECT around it SQLite makes a scan of the whole table.)
GONE = "SELECT * FROM (VALUES ROWS) AS gone"
DELETE_PENDING = {
    "claim": f"DELETE FROM claim WHERE (path, owner) IN ({GONE})",
    "dead": f"DELETE FROM dead WHERE (path, volume) IN ({GONE})",
    "tombstone": f"DELETE FROM tombstone WHERE (path, volume) IN ({GONE})",
}
ADD_PLACES = """INSERT INTO claim VALUES ROWS ON CONFLICT (path, owner) DO UPDATE
    SET places = claim.places || ' ' || excluded.places"""
WRITE_RECORD = """INSERT INTO record VALUES ROWS ON CONFLICT (key)
    DO UPDATE SET version = excluded.version, volumes = excluded.volumes, size = excluded.size,
    digest = excluded.digest, content_type = excluded.content_type, ext = excluded.ext"""
ADD_TOTAL = """INSERT INTO total VALUES ROWS ON CONFLICT (name) DO UPDATE
    SET blobs = total.blobs + excluded.blobs, bytes = total.bytes + excluded.bytes"""
WRITE_DRAWN = """INSERT INTO drawn VALUES ROWS
    ON CONFLICT (tag) DO UPDATE SET highest = excluded.highest"""


def awake_s() -> float:
    """Return the time by a clock that no step of the wall clock moves, and that goes on while the
    machine sleeps, as others' do (clock_gettime(2))."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclass(slots=True, kw_only=True, eq=False)
class Lease:
    """Who this process is to the index, and until when that holds. One that has ended is never
    renewed: another one takes its place."""

    role: str = TOOL
    seconds: float = 15.0
    owner: int = 0  # the number of its row; 0: it has none yet
    seq: int = 0  # of its last transaction
    tag: str = ""  # at the end of the versions that it draws; "": it has drawn none
    highest_ns: int = 0  # of these
    renewed_s: float = -math.inf  # by awake_s; later renewals than that do no harm

    def is_due(self) -> bool:
        return awake_s() > self.renewed_s + self.seconds / RENEWALS

    def has_ended(self) -> bool:
        """Whether others may take it for dead, so that it must write to no place any more (R5)."""
        return awake_s() >= self.renewed_s + self.seconds


class Transaction:
    """What a mutation may do: the records, what is pending, and with both, always, the totals.

    It works on what it has read, in memory; `flush` writes what has become different.
    """

    def __init__(self, session: Session, lease: Lease) -> None:
        self.session = session
        self.lease = lease  # another one, if this one has ended
        self.now_s = 0.0
        self._records = dict[str, Record | None]()
        self._pending = dict[str, Pending]()  # by the stems of keys
        # What is stored of these, and claims of keys of which nothing was read.
        self._stored_records = dict[str, Record | None]()
        self._stored_rows = dict[str, set[tuple[str, Row]]]()
        self._claims = list[Row]()
        self._blobs = Counter[str]()  # that came or went, and their bytes: see `total`
        self._bytes = Counter[str]()
        self._wall_ns = 0
        self._highest_ns = 0  # that was drawn
        self._drawn: Drawn | None = None  # of these, by this transaction
        self._renewed_s = -math.inf

    def begin(
        self, keys: Collection[str] = (), paths: Iterable[str] = (), durable: bool = True
    ) -> None:
        """Wait for the turn to write, and read what belongs to keys and paths; raises Occupied if
        another owner does not allow it."""
        session = self.session
        stems = {path[:KEY_STEM] for path in paths}.union(map(key_stem, keys))
        is_due = self.lease.is_due()
        asked_s = awake_s()
        renew = f"""UPDATE owner SET until = {session.NOW} + ?2, seq = seq + 1 WHERE id = ?1
            RETURNING seq"""
        queries: list[Query] = [
            (renew, (self.lease.owner, self.lease.seconds)),
            ("SELECT max(highest) FROM drawn", ()),
        ]
        if stems:  # else it only claims
            queries += [session.look_up_query(keys), session.pending_query(stems)]
        self.now_s, (renewed, highest, *found) = session.begin(durable, queries)
        self._wall_ns = session.wall_ns(self.now_s)
        self._highest_ns = highest[0][0] or 0
        if found:
            records, pending = found
            self._take_records(keys, records_of(records))
            self._take_pending(stems, pending_of(pending))
        self._renewed_s = asked_s if is_due else self.lease.renewed_s
        if renewed:
            self.lease.seq = renewed[0][0]
        else:
            self._register(asked_s)
        if is_due:
            self._end_leases()

    def end(self) -> Lease:
        """Hear that it is committed; return the lease under which the next one begins."""
        self.lease.renewed_s = self._renewed_s
        if self._drawn:
            self.lease.tag = self._drawn.tag
            self.lease.highest_ns = self._drawn.highest_ns
        return self.lease

    def _take_records(self, keys: Iterable[str], found: Mapping[str, Record]) -> None:
        for key in keys:
            self._records[key] = found.get(key)
            self._stored_records[key] = found.get(key)

    def _take_pending(self, stems: Iterable[str], found: Mapping[str, Pending]) -> None:
        for stem in stems:
            pending = found.get(stem) or Pending({}, {}, {})
            self._pending[stem] = pending
            self._stored_rows[stem] = pending.rows()

    # -- records --

    def get(self, key: str) -> Record | None:
        if key not in self._records:
            self._take_records([key], self.session.look_up([key]))
        return self._records[key]

    def insert(self, record: Record) -> None:
        if self.get(record.key) is not None:
            raise ValueError(f"{record.key!r} has a record already")
        self._records[record.key] = record

    def remove(self, record: Record) -> None:
        if self.get(record.key) is not None:
            self._records[record.key] = None

    # -- what is pending --

    def pending_at(self, path: str) -> Pending:
        """Return what is pending on the key that a path belongs to: to be read, and changed."""
        stem = path[:KEY_STEM]
        if stem not in self._pending:
            self.read_pending([stem])
        return self._pending[stem]

    def pending_of(self, key: str) -> Pending:
        return self.pending_at(key_stem(key))

    def read_pending(self, paths: Iterable[str]) -> None:
        """Read what is not known yet of the keys that paths belong to."""
        stems = {path[:KEY_STEM] for path in paths} - self._pending.keys()
        if stems:
            self._write_claims()
            self._take_pending(stems, self.session.read_pending(stems))

    def draw_path(self, key: str, ext: str) -> str:
        """Return the path of a new version of `key`, higher than all that were ever drawn."""
        # What it has drawn itself counts, too: a database that failed over may have lost it.
        at_ns = max(self._wall_ns, self._highest_ns + 1, self.lease.highest_ns + 1)
        if self._drawn is None:
            self._drawn = Drawn(self.lease.tag or self._choose_tag(), at_ns, at_ns)
        version = make_version(at_ns, self._drawn.tag)
        self._highest_ns = at_ns
        self._drawn = self._drawn._replace(highest_ns=at_ns)
        return blob_path(key, version, ext)

    def _choose_tag(self) -> str:
        """Return a tag that no owner has had; once half of them are used, that of longest ago."""
        rows = self.session.select("SELECT tag FROM drawn ORDER BY highest")
        taken = [tag for (tag,) in rows]
        if len(taken) > TAGS // 2:
            oldest: str = next(tag for tag in taken if len(tag) == TAG_DIGITS)
            return oldest
        while (tag := f"{random.getrandbits(16):04x}") in taken:
            pass
        return tag

    def claim(self, key: str, path: str, places: Iterable[str]) -> None:
        """Note that this owner is about to write there. Of the key nothing need be read."""
        names = tuple(places)
        mine = (path, self.lease.owner)
        pending = self._pending.get(path[:KEY_STEM])
        if pending is None:
            self._claims.append((*mine, " ".join(names), key))
        else:
            pending.key = key
            pending.claims[mine] = pending.claims.get(mine, ()) + names

    # -- writing --

    def flush(self) -> None:
        """Write what has changed."""
        self._write_records()
        self._write_claims()
        self._write_pending()
        names = [name for name in self._blobs if self._blobs[name] or self._bytes[name]]
        totals = [(name, self._blobs[name], self._bytes[name]) for name in names]
        self.session.run_many(ADD_TOTAL, totals)
        self._blobs.clear()
        self._bytes.clear()
        if self._drawn:
            self.session.run_many(WRITE_DRAWN, [self._drawn])

    def _write_records(self) -> None:
        gone = list[Row]()
        new = list[Row]()
        for key, record in self._records.items():
            stored = self._stored_records[key]
            if record == stored:
                continue
            self._stored_records[key] = record
            if stored is not None:
                self._count(stored, -1)
            if record is None:
                gone.append((key,))
            else:
                self._count(record, 1)
                new.append(row_of_record(record))
        self.session.run_many(f"DELETE FROM record WHERE key IN ({GONE})", gone)
        self.session.run_many(WRITE_RECORD, new)

    def _count(self, record: Record, sign: int) -> None:
        for name in (ALL_KEYS, *record.volumes):
            self._blobs[name] += sign
            self._bytes[name] += sign * record.size

    def _write_claims(self) -> None:
        self.session.run_many(ADD_PLACES, self._claims)
        self._claims = []

    def _write_pending(self) -> None:
        gone = set[tuple[str, Row]]()
        new = set[tuple[str, Row]]()
        for stem, pending in self._pending.items():
            rows = pending.rows()
            stored = self._stored_rows[stem]
            gone |= stored - rows
            new |= rows - stored
            self._stored_rows[stem] = rows
        for table, delete in DELETE_PENDING.items():
            before = [row[:2] for name, row in gone if name == table]
            after = [row for name, row in new if name == table]
            self.session.run_many(delete, before)
            self.session.run_many(f"INSERT INTO {table} VALUES ROWS", after)
            if table == "dead":
                self._blobs[GARBAGE] += len(after) - len(before)

    # -- owners --

    def _register(self, asked_s: float) -> None:
        """Become an owner, with a number that nobody else has; raises Occupied if another one does
        not allow that."""
        ended = self.lease
        self.check_others(ended.role)
        if ended.owner:
            log.warning("the lease of this process had ended: what it was writing is given up")
        # should the commit not be heard, nobody can be taken for this one
        owner = random.getrandbits(62)
        self.lease = Lease(role=ended.role, seconds=ended.seconds, owner=owner, seq=1)
        self._renewed_s = asked_s
        values = (owner, ended.role, self.now_s + ended.seconds, 1)
        self.session.run("INSERT INTO owner VALUES (?1, ?2, ?3, ?4)", values)

    def check_others(self, role: str) -> None:
        """Raise Occupied if somebody is in the way of who wants to be this."""
        query = "SELECT role, until FROM owner WHERE id <> ?1"
        for other, until_s in self.session.select(query, (self.lease.owner,)):
            if is_in_the_way(role, other) and self._is_alive(until_s):
                raise Occupied(other, until_s)

    def _is_alive(self, until_s: float) -> bool:
        """Whether that is no lease that has ended, nor one that a clock has set which was
        wrong."""
        return self.now_s <= until_s <= self.now_s + LONGEST_LEASE_S

    def _end_leases(self) -> None:
        """End the leases of those that are late."""
        for number, until_s in self.session.select("SELECT id, until FROM owner"):
            if not self._is_alive(until_s) and number != self.lease.owner:
                self.end_lease(number)

    def end_lease(self, owner: int) -> None:
        """Remove an owner. What it has claimed is dead; the volumes may still carry out what they
        were sent."""
        query = (
            "SELECT path FROM claim WHERE owner = ?1 UNION SELECT path FROM dead WHERE owner = ?1"
        )
        self.flush()
        paths = [path for (path,) in self.session.select(query, (owner,))]
        self.read_pending(paths)
        for path in paths:
            self.pending_at(path).disown(owner, self.now_s)
        self.session.run("DELETE FROM owner WHERE id = ?1", (owner,))

    def retire(self) -> None:
        """Give up the lease: the last act of an owner."""
        self.end_lease(self.lease.owner)


def is_in_the_way(role: str, other: str) -> bool:
    """Whether an owner may not be what it wants because of another one."""
    return REBUILDER in (role, other) or role == other == MOVER


# -- mutations --


def commit_put(
    tx: Transaction, record: Record, conditions: Conditions, claimed: AbstractSet[str], sent: Sent,
    delay_s: float, reach: Reach,
) -> tuple[bool, Burial]:  # fmt: skip
    """Make `record` the key's record, whatever its version (R2); return whether the key is new,
    and what is to be buried before the answer. If it raises, nothing has changed."""
    key = record.key
    current = tx.get(key)
    pending = tx.pending_of(key)
    if decide_conditions(conditions, current) is not Verdict.PROCEED:
        raise PreconditionFailed("the key has changed meanwhile")
    if not record.places or not pending.claimed_at(record.path) >= claimed:
        raise Unavailable("the server stood still for too long: send it again")
    after = pending.copy()
    after.end_write(record.path, claimed, sent, record.places, tx.now_s, key)
    if current is not None:
        after.kill_version(current, tx.now_s + delay_s, tx.now_s)
    burial = after.above(record.version, tx.now_s)
    check_reach(burial, reach)
    pending.become(after)
    if current is not None:
        tx.remove(current)
    tx.insert(record)
    return current is None, burial


def commit_delete(
    tx: Transaction, key: str, conditions: Conditions, delay_s: float, reach: Reach
) -> tuple[bool, Burial]:
    """Delete the record; return whether there was one, and what is to be buried before the answer,
    also if there was none: an unfinished DELETE is finished then. If it raises, nothing has
    changed."""
    current = tx.get(key)
    pending = tx.pending_of(key)
    if current is None:
        return False, pending.above("", tx.now_s)
    if decide_conditions(conditions, current) is not Verdict.PROCEED:
        raise PreconditionFailed("the key is not what the condition asks for")
    after = pending.copy()
    after.kill_version(current, tx.now_s + delay_s, tx.now_s)
    burial = after.above("", tx.now_s)
    check_reach(burial, reach)
    pending.become(after)
    tx.remove(current)
    return True, burial


def check_reach(burial: Burial, reach: Reach) -> None:
    """Raise Unavailable if it may turn out that not all can be buried."""
    if not can_be_buried(burial, reach):
        raise Unavailable(
            "too few volumes are up to note what is deleted, for those that are down"
        )


def refuse_put(
    tx: Transaction, key: str, path: str, claimed: AbstractSet[str], sent: Sent
) -> Burial:
    """End a PUT that is refused, or was given up: what it has written at `path` is dead. Return
    what is to be buried before the answer. Once the PUT is committed, nothing happens."""
    current = tx.get(key)
    pending = tx.pending_of(key)
    if current is not None and current.path == path:
        return pending.above(LAST_VERSION, tx.now_s)
    pending.end_write(path, claimed, sent, (), tx.now_s, key)
    living = current.version if current is not None else ""
    return pending.above(living if living < version_of(path) else LAST_VERSION, tx.now_s)


def expect_tombstones(tx: Transaction, path: str, volumes: Iterable[str]) -> list[str]:
    """Note that a tombstone is about to be written to these volumes, and return those to which it
    may be: where an earlier one is being deleted, that could hit this one. Unless it is noted that
    it was written, it is to be deleted: so none stays that nobody knows of."""
    dead = tx.pending_at(path).dead
    fit = list[str]()
    for volume in volumes:
        before = dead.get((volume, path))
        if before is None or before.doubt_s is not None:
            due_s = tx.now_s + BROKEN_S
            dead[volume, path] = Dead(path, volume, due_s, tx.now_s, tx.now_s + HUNG_S)
            fit.append(volume)
    return fit


def note_buried(
    tx: Transaction, found: Iterable[Dead], tombstones: Iterable[tuple[str, str]]
) -> None:
    """Note which sidecars were there when they were deleted, so that no other comes, and which
    tombstones (path, volume) have been written."""
    for row in found:
        dead = tx.pending_at(row.path).dead
        place = (row.volume, row.path)
        if place in dead:
            dead[place] = dead[place]._replace(doubt_s=None, owner=None)
    for path, volume in tombstones:
        pending = tx.pending_at(path)
        pending.dead.pop((volume, path), None)
        pending.tombstones.setdefault(path, set()).add(volume)
        pending.release_tombstones(path, "", tx.now_s)  # if the collector was faster


def settle_dead(tx: Transaction, answers: Mapping[Dead, bool | None], asked_s: float) -> None:
    """Note what volumes said when they were asked, at `asked_s` or later, to delete what is dead:
    see Dead.is_gone."""
    for row, found in answers.items():
        tx.pending_at(row.path).settle(row, found, asked_s, tx.now_s)


def end_doubts(tx: Transaction, volume: str, paths: Iterable[str], answered: bool) -> None:
    """Note that a volume that hung has answered PUTs at `paths`, or that it cannot any more."""
    until_s = None if answered else tx.now_s + BROKEN_S
    for path in paths:
        tx.pending_at(path).end_doubt(volume, path, until_s)


def keep_identity(tx: Transaction, name: str, number: str, anew: bool = False) -> None:
    """Note the number that volume `name` shows. If one was noted before, that stays unless this is
    to be kept `anew`."""
    tx.session.run(REPLACE_IDENTITY if anew else KEEP_IDENTITY, (name, number))


# -- reads --


def get_all(session: Session, keys: list[str]) -> list[Record | None]:
    found = session.look_up(keys)
    return [found.get(key) for key in keys]


def list_keys(session: Session, query: ListQuery) -> bytes:
    """Return one page of keys and common prefixes, as JSON of at most LIST_BYTES: a range scan
    that seeks past each common prefix."""
    keys, prefixes = list[str](), list[str]()  # each as it is sent
    room = LIST_BYTES - LIST_FRAME
    following: str | None = None
    for record in map(record_of_row, session.scan(query)):
        prefix = query.group_of(record.key)
        entry = json.dumps(prefix or describe(record))
        room -= len(entry) + len(", ")
        if room < 0 or len(keys) + len(prefixes) == query.limit:
            following = record.key
            break
        if prefix:
            prefixes.append(entry)
        else:
            keys.append(entry)
    page = f'{{"keys": [{", ".join(keys)}], "prefixes": [{", ".join(prefixes)}], '
    page += f'"next": {json.dumps(following)}}}\n'
    return page.encode()


def describe(record: Record) -> dict[str, Any]:
    """Return what a list says of a key."""
    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.modified_s))
    facts = {"key": record.key, "size": record.size, "etag": record.etag}
    return facts | {"content_type": record.content_type, "modified": when}


class Due(NamedTuple):
    """What is to be deleted on a volume: its rows, what else is pending on their keys and lives of
    them, and when that was so by the clock of the index."""

    rows: list[Dead]
    pending: Mapping[str, Pending]  # by the stems of keys
    records: Mapping[str, Record]
    asked_s: float

    def burial_of(self, row: Dead) -> Burial:
        """Return what is dead of the key of a row, above what lives of it."""
        pending = self.pending[row.path[:KEY_STEM]]
        living = self.records.get(pending.key)
        return pending.above(living.version if living else "", self.asked_s)

    def is_known(self, row: Dead) -> bool:
        """Whether it is known what lives of the key of a row. Else nothing is buried: it could be
        of the version that lives."""
        return bool(self.pending[row.path[:KEY_STEM]].key)


def select_due(session: Session, volume: str) -> Due:
    """Return some of what is due on a volume, the oldest first."""
    query = f"""SELECT {DEAD_COLUMNS} FROM dead WHERE volume = ?1 AND due <= ?2
        ORDER BY due LIMIT {DUE_ROWS}"""
    now_s = session.read_clock()
    rows = [Dead(*row) for row in session.select(query, (volume, now_s))]
    pending = session.read_pending({row.path[:KEY_STEM] for row in rows})
    records = session.look_up({one.key for one in pending.values()} - {""})
    return Due(rows, pending, records, now_s)


def select_records(session: Session, after: str) -> list[Record]:
    """Return a page of all records, in the order of their keys."""
    query = f"SELECT {COLUMNS} FROM record WHERE key > ?1 ORDER BY key LIMIT {RECORD_PAGE}"
    return [record_of_row(row) for row in session.select(query, (after,))]


def select_identities(session: Session) -> dict[str, str]:
    """Return name -> number of each volume that was ever seen, and the store's own id as
    STORE_ID."""
    return dict(session.select("SELECT name, number FROM identity"))


def read_garbage_age(session: Session) -> float:
    """Return for how many seconds the oldest garbage has waited, 0 if there is none."""
    ((oldest,),) = session.select("SELECT min(since) FROM dead")
    return max(0.0, session.read_clock() - oldest) if oldest is not None else 0.0


def read_totals(session: Session) -> dict[str, tuple[int, int]]:
    """Return name -> (blobs, bytes) for each volume, ALL_KEYS (keys and their bytes) and
    GARBAGE."""
    rows = session.select("SELECT name, blobs, bytes FROM total")
    return {name: (blobs, size) for name, blobs, size in rows}


def is_collector(session: Session, owner: int) -> bool:
    """Return whether `owner` is the one of all that serve which deletes garbage: the living one
    with the lowest number. Two at once do no harm."""
    query = f"SELECT min(id) FROM owner WHERE role = '{SERVER}' AND until > {session.NOW}"
    return session.select(query) == [(owner,)]


def is_being_rebuilt(session: Session) -> bool:
    query = f"SELECT 1 FROM owner WHERE role = '{REBUILDER}' AND until > {session.NOW}"
    return bool(session.select(query))


# -- threads --


class Worker:
    """One thread, and the session that it alone uses."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._executor = ThreadPoolExecutor(1, "mkv-index")
        self._turn = asyncio.Lock()  # so that who waits for another's work interrupts nobody
        self._is_closed = False

    async def run(
        self, act: Callable[Concatenate[Session, P], T], *given: P.args, **named: P.kwargs
    ) -> T:
        """Return what `act` does with the session, in one hop to the thread; raises
        IndexFailed."""
        call = partial(act, self._session, *given, **named)
        return await self._hop(partial(self._carry_out, call))

    async def _hop(self, call: Callable[[], T]) -> T:
        async with self._turn:
            job = asyncio.get_running_loop().run_in_executor(self._executor, call)
            while self._session.waits_s is not None:
                done, _ = await asyncio.wait([job], timeout=self._session.waits_s)
                if done:
                    break
                self._session.interrupt()
            return await job

    def _carry_out(self, call: Callable[[], T], is_again: bool = False) -> T:
        """Who reads does so again if the connection breaks."""
        session = self._session
        try:
            if session.is_readonly:
                session.connect()
            return call()
        except Exception as error:
            failure = session.explain(error)
            if is_again or not (session.is_readonly and isinstance(failure, IndexLost)):
                raise failure from None
        return self._carry_out(call, is_again=True)

    async def close(self) -> None:
        """Finish what is queued, then close. May be called twice."""
        if not self._is_closed:
            await self._hop(self._session.close)
            self._executor.shutdown()
            self._is_closed = True


class Batcher(Generic[T]):
    """Lets the items that wait share one hop to the thread. `carry_out(session, items)` returns
    their answers; `observe` hears how many go together."""

    def __init__(
        self, worker: Worker, carry_out: Callable[[Session, list[T]], list[Any]],
        observe: Callable[[int], None],
    ) -> None:  # fmt: skip
        self._worker = worker
        self._carry_out = carry_out
        self._observe = observe
        self._waiting: list[tuple[T, Callable[[Any], None]]] = []
        self._serving: asyncio.Task[None] | None = None

    def call(self, item: T) -> asyncio.Future[Any]:
        """Answer an item. That goes on to its end even if whoever awaits it is cancelled."""
        future = asyncio.get_running_loop().create_future()
        self.ask(item, partial(settle_future, future))
        return future

    def ask(self, item: T, hear: Callable[[Any], None]) -> None:
        """Have `hear` called with the answer, or an exception; it must not raise."""
        self._waiting.append((item, hear))
        if self._serving is None:  # it begins with what else is asked in this turn of the loop
            self._serving = asyncio.get_running_loop().create_task(self._serve())

    async def _serve(self) -> None:
        while self._waiting:
            batch = self._waiting[:BATCH]
            del self._waiting[:BATCH]
            self._observe(len(batch))
            items = [item for item, _ in batch]
            try:
                answers = await self._worker.run(self._carry_out, items)
            except Exception as error:  # say a full disk: nobody's was carried out
                answers = [error] * len(batch)
            for (_, hear), answer in zip(batch, answers, strict=True):
                hear(answer)
        self._serving = None

    async def close(self) -> None:
        if self._serving:
            await asyncio.wait([self._serving])  # not cancelled with whoever waits here
        await self._worker.close()


def settle_future(future: asyncio.Future[Any], answer: Any) -> None:
    if future.done():
        return  # it was cancelled meanwhile, and carried out all the same
    if isinstance(answer, Exception):
        future.set_exception(answer)
    else:
        future.set_result(answer)


class Mutation(NamedTuple):
    """What is to be done in a transaction, the keys and paths that it will ask for, and whether it
    must be on disk when it is answered."""

    act: Callable[[Transaction], Any]
    keys: Collection[str] = ()
    paths: Collection[str] = ()
    durable: bool = True


class Writer:
    """Carries mutations out, many in one transaction. `lease` is that of the last one that was
    committed."""

    def __init__(self, lease: Lease) -> None:
        self.lease = lease

    def carry_out(self, session: Session, mutations: list[Mutation]) -> list[Any]:
        """Carry all mutations out in one transaction; what one raises is its answer. If that is no
        refusal, it may have done half its work: then nothing was done, and each gets a transaction
        of its own; but a full disk, say, is nobody's fault, and the answer of all."""
        try:
            return self._write(session, mutations)
        except IndexDamaged as error:
            failure: Exception = error
        except (IndexFailed, IndexUnsure) as error:
            return [error] * len(mutations)
        except StopIteration as error:
            failure = RuntimeError(repr(error))  # a future refuses the one itself
        except Exception as error:
            failure = error
        if len(mutations) == 1:
            return [failure]
        log.debug("a batch failed: %r", failure)
        return [self.carry_out(session, [mutation])[0] for mutation in mutations]

    def _write(self, session: Session, mutations: list[Mutation]) -> list[Any]:
        """Do so, and again where the connection breaks and nothing was committed. Raises
        IndexFailed if nothing was done, IndexUnsure if that is not to be found out."""
        deadline_s = math.inf
        while True:
            tx = Transaction(session, self.lease)
            try:
                answers = act_together(mutations, tx)
                session.commit(tx.lease)
            except Exception as error:
                failure = session.explain(error)
                session.roll_back()
                if not isinstance(failure, IndexLost) or time.monotonic() > deadline_s:
                    raise failure from None
            else:
                self.lease = tx.end()
                return answers
            deadline_s = min(deadline_s, time.monotonic() + RECONNECT_S)
            time.sleep(RECONNECT_EVERY_S)


def act_together(mutations: list[Mutation], tx: Transaction) -> list[Any]:
    """Carry mutations out, all but the commit; return the answers, refusals among them."""
    keys = set[str]().union(*(one.keys for one in mutations))
    paths = set[str]().union(*(one.paths for one in mutations))
    tx.begin(keys, paths, any(one.durable for one in mutations))
    answers = list[Any]()
    for mutation in mutations:
        try:
            answers.append(mutation.act(tx))
        except MkvError as error:
            answers.append(error)
    tx.flush()
    return answers


class Index:
    """The index at `db`. Every await returns after the fact: a write is on disk. While it is
    open, nobody can replace it. Who writes becomes an owner by that, with this `role` and for
    `lease_s` at a time; `renew` has to be called often enough."""

    def __init__(
        self,
        db: str,
        observe: Callable[[str, int], None] = lambda kind, size: None,
        role: str = TOOL,
        lease_s: float = 15.0,
    ) -> None:
        self.session = make_session(db)  # that writes
        self.name = self.session.name
        self._work = Writer(Lease(role=role, seconds=lease_s))
        self._alone = Worker(self.session)
        self._writer = Batcher(self._alone, self._work.carry_out, partial(observe, "write"))
        workers = [Worker(make_session(db, is_readonly=True)) for _ in range(5)]
        self._getter = Batcher(workers.pop(), get_all, partial(observe, "get"))
        self._readers = deque(workers[:2])
        self._listers = deque(workers[2:])

    async def open(self) -> None:
        """Open or create it; raises ConfigError if it cannot be used."""
        self.session.enter()
        await self.prepare()
        if await self.read(Session.select, self.session.IS_COPY):
            reason = "it is a copy, which may lack what came after it: run rebuild"
            raise ConfigError([f"db: {self.name}: {reason}"])
        if await self.read(is_being_rebuilt):
            raise ConfigError([f"db: {self.name} is being rebuilt by mkv_tools.py"])

    async def prepare(self) -> None:
        try:
            await self._alone.run(lambda session: session.prepare())
        except IndexFailed as error:
            if self.session.is_remote and not isinstance(error, IndexDamaged):
                raise  # it may answer later
            raise ConfigError([f"db: {self.name}: {error.reason}"]) from None

    # -- the lease --

    @property
    def lease(self) -> Lease:
        return self._work.lease

    async def renew(self) -> None:
        """Renew the lease, if it is time to, and end those of others that are late; raises
        IndexFailed."""
        if self.lease.is_due():
            await self.write(lambda tx: None, durable=False)

    async def renew_for_ever(self) -> None:
        while True:
            await asyncio.sleep(self.lease.seconds / RENEWALS / 2)
            try:
                await self.renew()
            except (IndexFailed, IndexUnsure) as error:
                log.error("%s; the lease of this process is not renewed", error)

    def disown(self) -> None:
        """Forget the lease: it ends by itself."""
        self._work.lease = Lease(role=self.lease.role, seconds=self.lease.seconds)

    # -- reads and writes --

    def get(self, key: str) -> asyncio.Future[Record | None]:
        """Look a record up."""
        return self._getter.call(key)

    def ask(self, key: str, hear: Callable[[Record | Exception | None], None]) -> None:
        """Look a record up; `hear` is called with it, or with an IndexFailed, and must not
        raise."""
        self._getter.ask(key, hear)

    async def read(
        self, query: Callable[Concatenate[Session, P], T], *given: P.args, **named: P.kwargs
    ) -> T:
        """Return what `query` finds, on a thread of its own kind: a long one delays no lookup;
        raises IndexFailed."""
        self._readers.rotate()
        return await self._readers[0].run(query, *given, **named)

    async def list_page(self, query: ListQuery) -> bytes:
        """Return a page as JSON, made on other threads: lists that wait delay no `read`."""
        self._listers.rotate()
        return await self._listers[0].run(list_keys, query)

    def write(
        self,
        mutation: Callable[[Transaction], T],
        keys: Collection[str] = (),
        paths: Collection[str] = (),
        durable: bool = True,
    ) -> asyncio.Future[T]:
        """Carry `mutation` out in a transaction that it may share with others; answer once that is
        on disk, if it is to be `durable`. What it will ask for, all that belongs to `keys` and
        `paths`, is read together for all of them; it may ask for more. An MkvError that it raises
        is passed on and undoes nothing; anything else is passed on too, and then nothing of it was
        done."""
        return self._writer.call(Mutation(mutation, keys, paths, durable))

    async def close(self) -> None:
        """Finish what is queued, give up the lease, close. May be called twice."""
        if self.lease.owner:
            with contextlib.suppress(IndexFailed, IndexUnsure):  # then it ends in time
                await self.write(Transaction.retire)
            self.disown()
        # SQLite's last connection checkpoints
        await self._getter.close()
        for worker in (*self._readers, *self._listers):
            await worker.close()
        await self._writer.close()
        self.session.leave()


# == Volume client ================================================================================
# What goes to a volume or comes from it is small, or a stream. The small requests of all clients
# share a few kept connections, the lines, and with them system calls: what waits while all are
# busy goes out together on the next that is free, and is answered in its order. A large blob has
# a connection of its own.
#
# Nobody waits for a volume alone. One timer a volume finds out which lines have not answered for
# `slow_after`, and tells whoever waits, and on which there has been no progress for
# `volume_timeout`. What was sent over such a line has failed, and may still come: its answers
# are listened for, with nobody waiting. What was sent over a line that broke goes again over
# another, once and alone, so that what breaks lines breaks no other request; but never what writes
# to places (R1).

# Bytes; up to here a body is held in memory, and another volume can still take it.
SMALL_BLOB = 256 * 1024
LINES = 4  # to a volume
# Under way on a line: when 32 wait, an embedded volume (aiohttp 3.14) may read no more.
LINE_REQUESTS = 24
NO_COPY = 8 * 1024  # bytes; to copy less costs less than to write it apart
LATE_LOOK_S = 0.1  # if the timer is later than that, this process is to blame
LINE_BYTES = 1024 * 1024  # that go out together on a line; what belongs together may be more
UPLOAD_BUFFER = 128 * 1024  # bytes an upload may have waiting for each volume
DOWNLOAD_BUFFER = 256 * 1024  # bytes of a blob that is read may wait here
KERNEL_BUFFER = 256 * 1024  # behind these; half of that makes uploads a fifth slower
MAX_LATE = 256  # connections to a volume that hangs on which its answers are still awaited
# s, s, times
KEEP_ALIVE = {socket.TCP_KEEPIDLE: 60, socket.TCP_KEEPINTVL: 60, socket.TCP_KEEPCNT: 5}
# Bytes/s of what a volume may still be writing to disk when it has all bytes of a blob.
SLOWEST_DISK = 8 * 1024 * 1024
BROKEN = (OSError, EOFError, ValueError)
GOOD = (200, 201, 204)
BAD_REQUESTS = (400, 411, 413, 414, 431)  # what a volume says if it does not like the request
OUT_OF_FILES = (errno.EMFILE, errno.ENFILE)  # here, so that nobody could be connected to
ANSWER_BYTES = 64 * 1024  # of the body of an answer to PUT, DELETE and HEAD; nobody reads it


class Exchange:
    """Requests that go to one volume together and in this order, such as those that PUT a blob
    and its sidecar. `hear_end` is called when all are answered, or have failed, `hear_slow` when
    there is no answer for a while."""

    __slots__ = (
        "answers", "began_s", "doubt_s", "error", "hear_end", "hear_slow", "is_abandoned",
        "is_probe", "is_slow", "lease", "limit", "method", "paths", "requests", "sent", "size",
        "through", "volume", "waits_since_s",
    )  # fmt: skip

    def __init__(
        self, volume: str, method: str, paths: Sequence[str],
        requests: Sequence[Sequence[bytes]], limit: int,
        hear_end: Callable[[Exchange], None], hear_slow: Callable[[Exchange], None],
        lease: Lease | None = None,
        is_probe: bool = False,
    ) -> None:  # fmt: skip
        self.volume = volume
        self.is_probe = is_probe  # it finds out who the volume is, or how
        self.method = method
        # Of who writes to places: it is sent once, and not after that has ended.
        self.lease = lease
        # For how long it may still be carried out, once it is over; None: nothing was sent.
        self.doubt_s: float | None = None
        self.paths = paths
        self.requests = requests  # each in pieces
        self.limit = limit  # bytes of the body of each answer
        self.hear_end = hear_end
        self.hear_slow = hear_slow
        self.size = sum(sum(map(len, request)) for request in requests)
        self.answers = list[Answer]()
        self.error: VolumeError | None = None
        self.sent = 0  # how many times some of it was
        self.through = 0  # how many requests were answered when it was sent last
        self.began_s = 0.0
        self.waits_since_s = 0.0  # to be sent
        self.is_slow = False
        self.is_abandoned = False  # nobody waits for it any more

    @property
    def goes_alone(self) -> bool:
        """Whether it shares no batch: what it is answered may be long, or a line broke when it
        was sent."""
        return self.method == "GET" or self.sent > 0


class LeaseEnded(OSError):
    """What was claimed may be taken for dead by now, so nothing more is written there."""

    def __init__(self) -> None:
        super().__init__("the lease of this process has ended")


def ignore(_: Exchange) -> None:
    pass


def count_untaken(transport: asyncio.Transport) -> int:
    """Return how many bytes the other side has not taken yet: those that wait here and those in
    the kernel, which takes more only once a third of its own are gone."""
    kernel: socket.socket = transport.get_extra_info("socket")
    untaken = transport.get_write_buffer_size()
    with contextlib.suppress(OSError, ValueError):  # only Linux says what waits in its kernel
        answer = fcntl.ioctl(kernel.fileno(), termios.TIOCOUTQ, bytes(4))
        untaken += int.from_bytes(answer, sys.byteorder)
    return untaken


class Wire(asyncio.Protocol):
    """A connection to a volume."""

    transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.set_write_buffer_limits(high=UPLOAD_BUFFER)
        self._kernel = self.transport.get_extra_info("socket")
        self._kernel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, KERNEL_BUFFER)
        self._written = 0

    def write(self, data: bytes) -> None:
        self._written += len(data)
        self.transport.write(data)

    def write_all(self, pieces: Sequence[bytes]) -> None:
        """Write with one call; large pieces are not copied for that."""
        self._written += sum(map(len, pieces))
        joined = list[bytes]()
        small = list[bytes]()
        for piece in pieces:
            if len(piece) < NO_COPY:
                small.append(piece)
                continue
            joined += (b"".join(small), piece)
            small.clear()
        joined.append(b"".join(small))
        self.transport.writelines(joined)

    @property
    def waiting(self) -> int:
        """How many bytes wait in this process."""
        return self.transport.get_write_buffer_size()

    @property
    def taken(self) -> int:
        """How many bytes of all that were written have reached the other machine."""
        return self._written - count_untaken(self.transport)

    @property
    def is_closed(self) -> bool:
        return self.transport.is_closing()

    def keep_alive(self) -> None:
        """Have the kernel find out whether the other machine is still there (tcp(7))."""
        self._kernel.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in KEEP_ALIVE.items():
            self._kernel.setsockopt(socket.IPPROTO_TCP, option, value)

    def abort(self) -> None:
        self.transport.abort()

    def eof_received(self) -> None:
        self.end(EOFError("it hung up before it answered"))

    def connection_lost(self, exc: Exception | None) -> None:
        """Read what the volume said before it broke the connection off: if a write met the reset,
        the kernel still has it."""
        if exc and not self.transport.get_extra_info("ssl_object"):
            with contextlib.suppress(OSError, RuntimeError):
                unread = os.read(self._kernel.fileno(), ANSWER_HEAD_BYTES + ANSWER_BYTES)
                if unread:
                    self.data_received(unread)
        self.end(exc or EOFError("it hung up before it answered"))

    def end(self, reason: Exception) -> None:
        """Note that nothing more will come, and why."""
        raise NotImplementedError


class Line(Wire):
    """A kept connection for small requests."""

    def __init__(self, client: VolumeClient) -> None:
        self._client = client
        self._reader = AnswerReader()
        self._loop = asyncio.get_running_loop()
        self._ended = False
        self._is_late = False  # it hung, and what comes now is for nobody who waits
        self._taken = 0
        self._unsent = deque[Sequence[bytes]]()  # requests
        self._under_way = 0  # requests that have been sent and not answered
        self.is_used = False
        self.is_kept = False  # it was idle since it was used, and may have broken then
        self.waiting_for = deque[Exchange]()  # sent and not answered
        self.answered_s = 0.0  # when there was an answer last, or nothing to answer
        self.progress_s = 0.0  # the same for any byte that came or was taken

    def send(self, batch: Sequence[Exchange]) -> None:
        """Send what belongs to the exchanges and has no answer yet. The line must be idle."""
        for exchange in batch:
            exchange.sent += 1
            exchange.through = len(exchange.answers)
            self._unsent.extend(exchange.requests[exchange.through :])
        self.is_kept = self.is_used
        self.is_used = True
        self.waiting_for.extend(batch)
        self.answered_s = time.monotonic()
        self.progress_s = self.answered_s
        self._send_more()

    def _send_more(self) -> None:
        """Send as much as may be under way."""
        count = min(LINE_REQUESTS - self._under_way, len(self._unsent))
        if count <= 0:
            return
        if any(one.lease and one.lease.has_ended() for one in self.waiting_for):
            self.end(LeaseEnded())
            return
        pieces = list[bytes]()
        for _ in range(count):
            pieces += self._unsent.popleft()
        self._under_way += count
        if max(map(len, pieces)) < NO_COPY:
            self.write(b"".join(pieces))
        else:
            self.write_all(pieces)

    def data_received(self, data: bytes) -> None:
        if self._ended:
            return
        self.progress_s = time.monotonic()
        self.answered_s = self.progress_s
        self._client.note_answer(self.progress_s)
        self._reader.feed(data)
        try:
            while self.waiting_for:
                exchange = self.waiting_for[0]
                answer = self._reader.read(exchange.limit)
                if answer is None:
                    if self._is_late and not self._under_way:
                        self.end(EOFError())  # the rest was never sent
                    else:
                        self._send_more()
                    return
                self._take(exchange, answer)
                if not self._reader.reusable:
                    self._hand_over()
                    return
        except ValueError as error:
            self.end(error)
            return
        if not self._reader.is_clean or self._is_late:
            self.end(ValueError("it answers what nobody asked"))
        else:
            self._client.take_back(self)

    def _take(self, exchange: Exchange, answer: Answer) -> None:
        status, body = answer
        count = len(exchange.answers)
        self._under_way -= 1
        path = exchange.paths[count]
        is_get = exchange.method == "GET"
        if not is_get and len(body) > ANSWER_BYTES:
            raise ValueError("its answer does not end")
        if status in GOOD:  # what answers in its place may be another server
            self._client.hear_dialect(self._reader.dialect)
        elif exchange.error is None and (not is_get or path == IDENTITY_PATH):
            exchange.error = self._client.judge(exchange.method, path, status)
        exchange.answers.append(answer)
        if count + 1 < len(exchange.paths):
            return
        exchange.doubt_s = ANSWERED
        self.waiting_for.popleft()
        if self._is_late:
            self._client.hear_late(exchange)
        else:
            self._client.finish(exchange)

    def look(self, now_s: float, slow_after_s: float, timeout_s: float) -> None:
        """See whether the volume has become slow, or hangs."""
        taken = self.taken
        if taken != self._taken:
            self._taken = taken
            self.progress_s = now_s
        if now_s - self.progress_s >= timeout_s:
            self._client.give_up(self)
        elif slow_after_s and now_s - self.answered_s >= slow_after_s:
            for exchange in tuple(self.waiting_for):
                self._client.note_slow(exchange, now_s)

    def listen_late(self) -> None:
        """Go on for a day, so that it is known when what was sent has come, or cannot come any
        more."""
        self._is_late = True
        self._unsent.clear()
        self.keep_alive()
        self._timer = self._loop.call_later(HUNG_S, self.end, TimeoutError())

    def _hand_over(self) -> None:
        """Close in good order: what has no answer was not, and will not be, carried out."""
        if self._is_late:
            self.end(EOFError())
            return
        self._ended = True
        self.abort()
        for exchange in self.waiting_for:
            exchange.sent -= 1
        self._client.lose(self, None)

    def end(self, reason: Exception) -> None:
        if self._ended:
            return
        self._ended = True
        self.abort()
        if self._is_late:
            self._timer.cancel()
            self._client.end_late(self)
        else:
            self._client.lose(self, reason)

    def close(self) -> None:
        """Drop the connection, and with it whatever waits."""
        self._ended = True
        if self._is_late:
            self._timer.cancel()
        self.abort()


class Stream(Wire):
    """A connection for one large blob, there or back."""

    def __init__(self) -> None:
        self._reader = AnswerReader()
        self._lost: Exception | None = None  # why there is no connection any more
        self._is_full = False  # too much waits to be sent
        self._is_paused = False  # too much waits to be read
        self._news: asyncio.Future[None] | None = None  # for who reads
        self._room: asyncio.Future[None] | None = None  # for who writes

    def data_received(self, data: bytes) -> None:
        self._reader.feed(data)
        if self._reader.unread > DOWNLOAD_BUFFER and not self.is_closed:
            self._is_paused = True
            self.transport.pause_reading()
        wake(self._news)

    def end(self, reason: Exception) -> None:
        self._lost = self._lost or reason
        wake(self._news)
        wake(self._room)

    def pause_writing(self) -> None:
        self._is_full = True

    def resume_writing(self) -> None:
        self._is_full = False
        wake(self._room)

    async def drain(self) -> None:
        """Wait until there is room for more, or the connection is closed."""
        while self._is_full and not self._lost:
            self._room = asyncio.get_running_loop().create_future()
            await self._room

    async def read_head(self) -> AnswerHead:
        """Raises BROKEN."""
        while True:
            head = self._reader.read_head()
            if head is not None:
                return head
            await self._wait_for_news()

    async def read_piece(self) -> bytes:
        """Return what has come of the body, b"" at its end. Raises BROKEN if it is cut short."""
        while True:
            piece = self._reader.read_piece()
            if piece is not None:
                return piece
            await self._wait_for_news()

    async def read_status(self) -> int:
        """Read an answer whose body nobody needs. Raises BROKEN."""
        while True:
            answer = self._reader.read(ANSWER_BYTES)
            if answer is not None:
                break
            await self._wait_for_news()
        status, body = answer
        if len(body) > ANSWER_BYTES:
            raise ValueError("its answer does not end")
        return status

    async def _wait_for_news(self) -> None:
        if self._lost:
            raise self._lost
        if self._is_paused and not self.is_closed:
            self._is_paused = False
            self.transport.resume_reading()
        self._news = asyncio.get_running_loop().create_future()
        await self._news


def wake(waiter: asyncio.Future[None] | None) -> None:
    if waiter is not None and not waiter.done():
        waiter.set_result(None)


class Patience:
    """An `async with` that raises TimeoutError when `timeout_s` pass in which the volume takes
    no byte. That a write waits says nothing: Linux finds a socket writable only once much of
    its buffer is free."""

    def __init__(self, wire: Wire, timeout_s: float) -> None:
        self._wire = wire
        self._timeout_s = timeout_s
        self._taken = -1
        self._loop = asyncio.get_running_loop()
        self._deadline = asyncio.timeout(None)

    async def __aenter__(self) -> Self:
        await self._deadline.__aenter__()
        self._since = self._loop.time()
        self._timer = self._loop.call_later(self._timeout_s / 4, self._look)
        return self

    async def __aexit__(self, *raised: Any) -> None:
        self._timer.cancel()
        await self._deadline.__aexit__(*raised)

    def _look(self) -> None:
        taken = self._wire.taken
        if taken != self._taken:
            self._taken = taken
            self._since = self._loop.time()
        left_s = self._since + self._timeout_s - self._loop.time()
        if left_s > 0:
            self._timer = self._loop.call_later(min(left_s, self._timeout_s / 4), self._look)
        else:
            self._deadline.reschedule(self._loop.time())


class VolumeClient:
    """Talks to one volume. `notice(event, reason)` hears how it went; `measure(method, seconds,
    error)` how long; `hear_slow(yes)` when it has not answered for a while, and when it does
    again; `hear_dialect(number)` with each good answer which one it showed; `hear_late` of PUTs
    that nobody waits for any more, (paths, whether they were answered). While `refusal` says why
    it is not the volume that it should be, it is sent probes and nothing else."""

    def __init__(
        self, volume: Volume, secret: str, timeout_s: float, notice: Callable[[Event, str], None],
        measure: Callable[[str, float, str], None],
        hear_late: Callable[[list[str], bool], Awaitable[None]] | None = None,
        slow_after_s: float = 0.0, hear_slow: Callable[[bool], None] = lambda yes: None,
        hear_dialect: Callable[[int], None] = lambda number: None,
        refusal: Callable[[], str] = str,
    ) -> None:  # fmt: skip
        self.volume = volume
        self._refusal = refusal
        self.facts = (volume, secret, timeout_s, slow_after_s)
        self.timeout_s = timeout_s
        self._slow_after_s = slow_after_s
        self._notice = notice
        self._measure = measure
        self._tell_late = hear_late
        self._tell_slow = hear_slow
        self.hear_dialect = hear_dialect
        parts = urlsplit(volume.url)
        self._ssl = parts.scheme == "https" or None
        self._host = parts.hostname or ""
        self._base = parts.path
        self._port = parts.port or (443 if self._ssl else 80)
        self._head = f"Host: {parts.netloc}\r\n" + (
            f"Mkv-Volume-Secret: {secret}\r\n" if secret else ""
        )
        self._queue = deque[Exchange]()  # what waits for a free line
        self._lines = set[Line]()
        self._idle = list[Line]()  # of these
        self._late = set[Line]()  # that hung
        self._tasks = set[asyncio.Task[None]]()  # that tell what came late
        self._is_pumping = False
        self._connecting: asyncio.Task[None] | None = None
        self._is_closed = False
        self._timer: asyncio.TimerHandle | None = None
        self._answered_s = float("-inf")  # when it did so last
        self._is_slow = False  # it has not answered for a while

    # -- what is asked --

    def send(self, exchange: Exchange) -> None:
        """Send it as soon as a line is free; `hear_end` is called when it is over."""
        exchange.began_s = time.monotonic()
        exchange.waits_since_s = exchange.began_s
        if not exchange.is_probe and self._refusal():
            exchange.error = VolumeDown(self.volume.name, self._refusal())
            asyncio.get_running_loop().call_soon(self.finish, exchange)
            return
        self._queue.append(exchange)
        self._wake()

    def send_files(
        self, files: Mapping[str, bytes], trail: str,
        hear_end: Callable[[Exchange], None], hear_slow: Callable[[Exchange], None],
        lease: Lease | None = None,
        is_probe: bool = False,
    ) -> Exchange:  # fmt: skip
        """Store small files, path -> bytes, in that order. With the lease under which their places
        are claimed they are sent once, and not after it has ended (R1, R5)."""
        requests = []
        for path, body in files.items():
            head = self._request("PUT", path, trail, f"Content-Length: {len(body)}\r\n")
            requests.append((head, body))
        exchange = Exchange(
            self.volume.name, "PUT", tuple(files), requests, ANSWER_BYTES, hear_end, hear_slow,
            lease, is_probe,
        )  # fmt: skip
        self.send(exchange)
        return exchange

    def abandon(self, exchange: Exchange) -> None:
        """Wait for it no longer. What has not been sent will not be."""
        exchange.is_abandoned = True
        if exchange in self._queue:
            self._queue.remove(exchange)
            if exchange.sent:
                self.hear_late(exchange)
        else:
            exchange.requests = ()  # which would keep memory

    async def put(
        self, files: Mapping[str, bytes], trail: str = "", lease: Lease | None = None,
        is_probe: bool = False,
    ) -> None:  # fmt: skip
        """Store small files as send_files does. Raises VolumeError unless all are answered for."""
        over = asyncio.get_running_loop().create_future()
        hear_end = partial(resolve, over)
        exchange = self.send_files(files, trail, hear_end, ignore, lease, is_probe)
        await self._wait(exchange, over)

    async def delete(self, paths: Iterable[str], trail: str = "") -> list[bool]:
        """Delete files in that order; return which of them were there. Raises VolumeError."""
        answers = await self._exchange("DELETE", tuple(paths), trail)
        return [status != 404 for status, _ in answers]

    async def probe(self) -> None:
        """See whether the volume takes writes; raises VolumeError."""
        await self.put({PROBE_PATH: PROBE_BODY}, is_probe=True)

    async def read_identity(self) -> Identity | str | None:
        """Return who the volume is, or what is wrong with what says so, or None: only a whole 404
        says that nothing does. Raises VolumeError."""
        ((status, body),) = await self.look_at([IDENTITY_PATH], MAX_IDENTITY_BYTES)
        if status == 404:
            return None
        try:
            return decode_identity(body)
        except ValueError as error:
            return str(error)

    async def write_identity(self, identity: Identity) -> None:
        """May be sent twice. Raises VolumeError."""
        await self.put({IDENTITY_PATH: encode_identity(identity)}, is_probe=True)

    async def look_at(self, paths: Sequence[str], limit: int) -> list[Answer]:
        """Do the same as `get` to find out who the volume is."""
        return await self._exchange("GET", paths, limit=limit, is_probe=True)

    @property
    def is_whole_server(self) -> bool:
        """Whether the volume has all paths there, and not only those below one."""
        return not self._base

    async def get(self, paths: Iterable[str], limit: int) -> list[Answer]:
        """Read small files or listings; return (status, body) of each, whole, but a body longer
        than `limit` bytes cut off after one byte more: the caller, who knows what it should be,
        finds this file bad, and not the whole volume. Raises VolumeError."""
        return await self._exchange("GET", tuple(paths), limit=limit)

    async def _exchange(
        self, method: str, paths: Sequence[str], trail: str = "", limit: int = ANSWER_BYTES,
        is_probe: bool = False,
    ) -> list[Answer]:  # fmt: skip
        if not paths:
            return []
        requests = [(self._request(method, path, trail),) for path in paths]
        over = asyncio.get_running_loop().create_future()
        hear_end = partial(resolve, over)
        exchange = Exchange(
            self.volume.name, method, paths, requests, limit, hear_end, ignore, None, is_probe
        )
        self.send(exchange)
        return (await self._wait(exchange, over)).answers

    async def _wait(self, exchange: Exchange, over: asyncio.Future[None]) -> Exchange:
        try:
            await over
        except asyncio.CancelledError:
            self.abandon(exchange)
            raise
        if exchange.error:
            raise exchange.error
        return exchange

    def _request(self, method: str, path: str, trail: str = "", framing: str = "") -> bytes:
        is_blob = method == "PUT" and not path.endswith((".key", ".del"))
        parsed = parse_path(path) if is_blob else None
        if parsed is not None:
            # nginx keeps it as the blob's time, and shows that as Last-Modified. (The time of a
            # sidecar tells verify when it was written.)
            trail += f"Date: {http_date(version_s(parsed[1]))}\r\n"
        return f"{method} {self._base}{path} HTTP/1.1\r\n{self._head}{trail}{framing}\r\n".encode()

    # -- lines --

    def _wake(self) -> None:
        if not self._is_pumping:
            self._is_pumping = True
            # What this turn of the loop brings goes together.
            asyncio.get_running_loop().call_soon(self._pump)

    def _pump(self) -> None:
        """Send what waits, as far as lines are idle; open one more if that is not enough."""
        self._is_pumping = False
        while self._queue and self._idle:
            share = -(-len(self._queue) // len(self._idle))
            line = self._idle.pop()
            if line.is_used and self._queue[0].sent:
                # A second time only over a new line, which cannot have broken unseen.
                self._lines.discard(line)
                line.close()
            elif batch := self._take_batch(share):
                line.send(batch)
            else:
                self._idle.append(line)
        if self._queue and len(self._lines) < LINES and self._connecting is None:
            self._connecting = asyncio.get_running_loop().create_task(self._open_line())
        if self._timer is None and self._is_busy:
            self._set_timer()

    def _take_batch(self, most: int) -> list[Exchange]:
        """Take from the queue what goes out together on one line."""
        first = self._queue.popleft()
        if first.lease and first.lease.has_ended():
            self._fail([first], LeaseEnded())
            return []
        batch = [first]
        size = first.size
        count = len(first.paths)
        while self._queue and len(batch) < most and not first.goes_alone:
            following = self._queue[0]
            size += following.size
            count += len(following.paths)
            ended = following.lease is not None and following.lease.has_ended()
            if following.goes_alone or ended or size > LINE_BYTES or count > LINE_REQUESTS:
                break
            batch.append(self._queue.popleft())
        return batch

    async def _open_line(self) -> None:
        """Connect, for all that wait."""
        line = Line(self)
        try:
            await self._connect(line)
            if line.is_closed:
                raise EOFError("it hung up at once")
        except BROKEN as error:
            if len(self._lines) == len(self._idle):  # else these will be free
                self._fail_all(error)
        else:
            self._lines.add(line)
            self.take_back(line)
        finally:
            self._connecting = None

    async def _connect(self, wire: Wire) -> None:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(self.timeout_s):
            try:
                await loop.create_connection(lambda: wire, self._host, self._port, ssl=self._ssl)
            except OSError:
                # Without a free file a look-up may fail with any words. This says the right ones.
                socket.socket(socket.AF_UNIX).close()
                raise

    def take_back(self, line: Line) -> None:
        """Hear that a line is free."""
        if line.is_closed:
            self._lines.discard(line)
        elif self._is_closed and not self._queue:
            self._lines.discard(line)
            line.close()
        else:
            self._idle.append(line)
        if self._queue:
            self._wake()

    def lose(self, line: Line, reason: Exception | None) -> None:
        """Hear that a line is closed, in good order if there is no reason. What it has no answer
        for goes elsewhere, if that is the first time, or some of it was answered; but not what is
        written to places."""
        self._lines.discard(line)
        if line in self._idle:
            self._idle.remove(line)
        if not line.waiting_for:
            self._wake()
            return
        if reason:
            self._drop_idle()  # they may have broken, too
        again = list[Exchange]()
        failed = list[Exchange]()
        for exchange in line.waiting_for:
            is_second = exchange.sent > 1 and exchange.through == len(exchange.answers)
            # Behind a last answer nothing is carried out (RFC 9112, 9.6).
            exchange.doubt_s = BROKEN_S if reason else ANSWERED
            if exchange.is_abandoned:
                self.hear_late(exchange)
            elif exchange.error or exchange.lease or (reason and is_second):
                failed.append(exchange)
            else:
                exchange.waits_since_s = time.monotonic()
                again.append(exchange)
        line.waiting_for.clear()
        self._queue.extendleft(reversed(again))
        # A kept line may have broken long ago: that says nothing of the volume.
        is_news = reason is not None and not line.is_kept
        self._fail(failed, reason or EOFError("it hung up before it answered"), silent=not is_news)
        self._wake()

    def give_up(self, line: Line) -> None:
        """Hear that there is no progress on a line."""
        self._lines.discard(line)
        self._drop_idle()  # the network may have forgotten the other kept connections, too
        for exchange in line.waiting_for:
            exchange.doubt_s = HUNG_S
        self._fail(line.waiting_for, TimeoutError())
        is_heard = any(map(self._is_heard, line.waiting_for))
        if is_heard and len(self._late) < MAX_LATE and not self._is_closed:
            self._late.add(line)
            line.listen_late()
        else:
            line.close()
        self._wake()

    def end_late(self, line: Line) -> None:
        """Hear that a line that hung is closed: nothing more of what was sent over it will be
        carried out."""
        self._late.discard(line)
        for exchange in line.waiting_for:
            self.hear_late(exchange)

    def _fail_all(self, error: Exception) -> None:
        """Fail all that waits to be sent."""
        waiting = tuple(self._queue)
        self._queue.clear()
        self._fail(waiting, error)

    def _fail(
        self, exchanges: Iterable[Exchange], reason: Exception, silent: bool = False
    ) -> None:
        """Fail these; health hears that once, or not at all."""
        told = silent
        for exchange in exchanges:
            exchange.requests = ()
            if exchange.error is None:
                exchange.error = self._explain(exchange.method, reason)
                self.finish(exchange, silent=told)
                told = True
            else:
                self.finish(exchange)

    def finish(self, exchange: Exchange, silent: bool = False) -> None:
        """Tell whoever waits that it is over."""
        error = exchange.error
        if error:
            error.doubt_s = exchange.doubt_s
        elif exchange.is_probe and exchange.method == "GET":
            silent = True  # what it means is for whoever asked
        seconds = time.monotonic() - exchange.began_s
        self._report(exchange.method, seconds, error, silent)
        if exchange.is_abandoned and not isinstance(error, VolumeTimeout):
            self.hear_late(exchange)
        exchange.hear_end(exchange)

    def _drop_idle(self) -> None:
        for line in self._idle:
            self._lines.discard(line)
            line.close()
        self._idle.clear()

    def close(self) -> None:
        """Close the connections on which nobody waits; what is under way goes on, and is not kept
        after it."""
        self._is_closed = True
        self.note_answer(self._answered_s)  # whether it is slow is nobody's concern any more
        self._drop_idle()
        for line in self._late.union(self._lines):
            if all(exchange.is_abandoned for exchange in line.waiting_for) or line in self._late:
                line.close()
                self._lines.discard(line)
        self._late.clear()
        for task in self._tasks:
            task.cancel()
        if self._connecting and not self._queue:
            self._connecting.cancel()

    # -- what is slow, or comes late --

    @property
    def _is_busy(self) -> bool:
        return bool(self._queue) or len(self._lines) > len(self._idle)

    def _set_timer(self) -> None:
        pause_s = self.timeout_s / 4
        if self._slow_after_s:
            pause_s = min(pause_s, self._slow_after_s / 4)
        self._look_s = time.monotonic() + pause_s
        self._is_late = False
        self._timer = asyncio.get_running_loop().call_later(pause_s, self._look)

    def _look(self) -> None:
        now_s = time.monotonic()
        if now_s - self._look_s > LATE_LOOK_S and not self._is_late:
            # This process stood still. What came meanwhile is read before anybody is blamed.
            self._is_late = True
            self._timer = asyncio.get_running_loop().call_later(LATE_LOOK_S, self._look)
            return
        busy = self._lines.difference(self._idle)
        for line in busy:
            line.look(now_s, self._slow_after_s, self.timeout_s)
        if self._queue:
            progress_s = max((line.progress_s for line in busy), default=0.0)
            if now_s - max(progress_s, self._queue[0].waits_since_s) >= self.timeout_s:
                self._fail_all(TimeoutError())
        if self._slow_after_s:
            for exchange in tuple(self._queue):
                if now_s - max(exchange.began_s, self._answered_s) >= self._slow_after_s:
                    self.note_slow(exchange, now_s)
        self._timer = None
        if self._is_busy:
            self._set_timer()

    def note_slow(self, exchange: Exchange, now_s: float) -> None:
        """Hear that there is no answer to it yet."""
        if exchange.is_slow:
            return
        exchange.is_slow = True
        if not self._is_closed and now_s - self._answered_s >= self._slow_after_s:
            self._is_slow = True
            self._tell_slow(True)
        exchange.hear_slow(exchange)

    def note_answer(self, now_s: float) -> None:
        """Hear that the volume answers."""
        self._answered_s = now_s
        if self._is_slow:
            self._is_slow = False
            self._tell_slow(False)

    def _is_heard(self, exchange: Exchange) -> bool:
        """Whether it matters when its answers come."""
        return exchange.lease is not None and self._tell_late is not None

    def hear_late(self, exchange: Exchange) -> None:
        """Hear that something nobody waits for is over: what is answered of it has come, and the
        rest will not."""
        if self._tell_late is None or self._is_closed or not self._is_heard(exchange):
            return
        count = len(exchange.answers) if exchange.sent else len(exchange.paths)
        sidecars = [path for path in exchange.paths[:count] if path.endswith(".key")]
        others = list(exchange.paths[count:])
        telling = self._tell(self._tell_late, sidecars, others)
        task = asyncio.get_running_loop().create_task(telling)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _tell(
        self,
        tell: Callable[[list[str], bool], Awaitable[None]],
        answered: list[str],
        others: list[str],
    ) -> None:
        await tell(answered, True)
        await tell(others, False)

    # -- how it went --

    def judge(self, method: str, path: str, status: int) -> VolumeError | None:
        """Return what is wrong if `status` is the answer."""
        may_be_absent = method == "DELETE" or path == IDENTITY_PATH
        if status in GOOD or (may_be_absent and status == 404):
            return None
        kind: type[VolumeError] = (
            VolumeFull if method == "PUT" and status in (500, 507) else VolumeUnexpected
        )
        if method == "GET" and status >= 500:
            kind = VolumeDown  # whoever cannot read is no use
        is_probe = path in (IDENTITY_PATH, PROBE_PATH)  # with which nothing can be wrong
        if status in BAD_REQUESTS and not is_probe:
            kind = VolumeBlameless
        return kind(self.volume.name, f"{method} {path} was answered {status}")

    def check(self, method: str, path: str, status: int) -> None:
        """Raise the VolumeError that `status` means, if any."""
        error = self.judge(method, path, status)
        if error:
            raise error

    def _explain(self, method: str, error: Exception) -> VolumeError:
        """Return the VolumeError that an exception means."""
        if isinstance(error, VolumeError):
            return error
        if isinstance(error, TimeoutError):
            return VolumeTimeout(self.volume.name, f"{method}: no progress in time", HUNG_S)
        is_ours = isinstance(error, LeaseEnded) or getattr(error, "errno", None) in OUT_OF_FILES
        kind = VolumeBlameless if is_ours else VolumeDown
        return kind(self.volume.name, f"{method}: {error or type(error).__name__}", BROKEN_S)

    def _report(
        self, method: str, seconds: float, error: VolumeError | None, silent: bool = False
    ) -> None:
        """Tell metrics, and health unless it has been told."""
        event = Event.STORED if method == "PUT" else Event.ANSWERED
        if isinstance(error, VolumeDown | VolumeTimeout):
            event = Event.UNREACHABLE
        elif error:
            event = Event.REFUSED
        if not isinstance(error, VolumeBlameless) and not silent:
            self._notice(event, str(error or ""))
        if error or method != "SEND":  # a piece of a PUT, which is measured at its end
            self._measure(method, seconds, type(error).__name__ if error else "")

    @contextlib.contextmanager
    def watch(self, method: str) -> Iterator[None]:
        """Turn what can happen to a stream into a VolumeError, and tell health and metrics,
        unless it is cancelled."""
        began = time.perf_counter()
        failure: VolumeError | None = None
        try:
            yield
        except (VolumeError, *BROKEN) as error:
            failure = self._explain(method, error)
        self._report(method, time.perf_counter() - began, failure)
        if failure:
            raise failure from None

    # -- streams --

    async def _open_stream(self) -> Stream:
        if reason := self._refusal():
            raise VolumeDown(self.volume.name, reason)
        wire = Stream()
        await self._connect(wire)
        return wire

    async def stream(self, path: str) -> AsyncGenerator[bytes, None]:
        """Read a blob of any size in pieces; raises NotFound and VolumeError."""
        with self.watch("GET"):
            wire = await self._open_stream()
            try:
                wire.write(self._request("GET", path))
                async with asyncio.timeout(self.timeout_s):
                    head = await wire.read_head()
                if head.status == 404:
                    raise NotFound(path)
                self.check("GET", path, head.status)
                while True:
                    async with asyncio.timeout(self.timeout_s):
                        piece = await wire.read_piece()
                    if not piece:
                        break
                    yield piece
            finally:
                wire.abort()

    async def start_upload(
        self, path: str, size: int | None, trail: str = "", lease: Lease | None = None
    ) -> Upload:
        """Open a connection for one large blob of `size` bytes (None: not known), unless the lease
        under which its place is claimed has ended; raises VolumeError."""
        with self.watch("CONNECT"):
            wire = await self._open_stream()
            if lease is not None and lease.has_ended():
                wire.abort()
                raise LeaseEnded
        framing = (
            "Transfer-Encoding: chunked\r\n" if size is None else f"Content-Length: {size}\r\n"
        )
        wire.write(self._request("PUT", path, trail, framing))
        return Upload(self, wire, path, size is None, lease)


def resolve(over: asyncio.Future[None], _: Exchange) -> None:
    wake(over)


class Upload:
    """One large blob on its way to one volume, unless `lease` ends before it has all of it."""

    def __init__(
        self, client: VolumeClient, wire: Stream, path: str, chunked: bool, lease: Lease | None
    ) -> None:
        self._client = client
        self._lease = lease
        self._wire = wire
        self._path = path
        self._chunked = chunked
        self._size = 0
        self._answer = asyncio.ensure_future(self._read_answer())

    async def _read_answer(self) -> int:
        """Wait for the volume's word, which may come early: a full disk does not wait for the
        whole blob. When it has come, or cannot come any more, nothing more is sent."""
        try:
            return await self._wire.read_status()
        finally:
            self._wire.abort()

    async def send(self, chunk: bytes) -> None:
        """Send a piece; wait if more than UPLOAD_BUFFER would wait. Raises VolumeError."""
        self._size += len(chunk)
        framed = encode_chunks(chunk) if self._chunked else chunk
        has_ended = self._has_ended()
        if not has_ended and self._write(framed) and self._wire.waiting <= UPLOAD_BUFFER:
            return
        with self._client.watch("SEND"):
            if has_ended:
                raise LeaseEnded
            async with Patience(self._wire, self._client.timeout_s):
                await self._wire.drain()
                if self._wire.is_closed:
                    self._client.check("PUT", self._path, await self._answer)
                    raise self._too_early()

    def _has_ended(self) -> bool:
        return self._lease is not None and self._lease.has_ended()

    def _write(self, data: bytes) -> bool:
        """Write unless the connection is closed; return whether it is open."""
        if self._wire.is_closed:
            return False
        self._wire.write(data)
        return True

    async def finish(self) -> None:
        """End the blob and wait for the volume's word that it has it; raises VolumeError. Before
        that the volume keeps nothing of it."""
        with self._client.watch("PUT"):
            if self._chunked and self._has_ended():
                raise LeaseEnded
            complete = not self._chunked or self._write(b"0\r\n\r\n")
            last_sync_s = min(self._size, SYNC_EVERY) / SLOWEST_DISK
            async with Patience(self._wire, self._client.timeout_s + last_sync_s):
                self._client.check("PUT", self._path, await self._answer)
            if not complete:
                raise self._too_early()

    def _too_early(self) -> VolumeUnexpected:
        why = f"PUT {self._path} was answered before it had the whole blob"
        return VolumeUnexpected(self._client.volume.name, why)

    def abort(self) -> None:
        """Drop the connection; unfinished, the volume keeps nothing. May be called twice."""
        if not self._answer.cancel() and not self._answer.cancelled():
            self._answer.exception()  # it has been, or need not be, looked at
        self._wire.abort()


# == Health =======================================================================================
# Requests tell what they saw of a volume, and of the processes of a server one probes all volumes.
# STATE_AFTER decides, this section only carries it out. What one process finds out all others
# hear, so that a request finds what it needs in its own memory.
#
# A probe first reads who the volume is. Until that is the one that the index has seen there, the
# volume is down, whatever requests say, and no request is sent to it. A process hears from others
# that it is so, but not that it is over: each reads that for itself, since its configuration may
# have another address.

PROBE_PATH = "/.mkv-probe"  # in no listing
PROBE_BODY = bytes(64 * 1024)  # large enough that a full disk refuses it
PROBE_EVERY_S = 1.0
WRITE_PROBE_EVERY_S = 10.0  # also how long a full volume is left alone
LOOK_AGAIN_S = 0.2  # after it was written, or met first, an identity is read once more
SAMPLE = 8  # replicas by which a volume without an identity is known,
SAMPLE_PAGES = 100  # and pages of records that are read to find some of them
ROOT_BYTES = 1024 * 1024  # of the listing of a volume's root, which has 256 folders
PROBER_SILENT_S = 5.0  # then others probe, too: it may be stopped, or dead
PROBED = "probed"  # what a process says that probes
PIPE_BYTES = 256 * 1024  # of what other processes say; one reads within milliseconds, or hangs


def open_pipes(count: int) -> list[tuple[int, int]]:
    """Return a pipe for each process of a server, (where it reads, where the others write)."""
    pipes = [os.pipe() for _ in range(count)]
    for end in chain.from_iterable(pipes):
        os.set_blocking(end, False)
        with contextlib.suppress(OSError):  # more than the user may have
            fcntl.fcntl(end, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    return pipes


class Peers:
    """The other processes of a server, none without `pipes`. What is said to them are lines, at
    most PIPE_BUF at once, so that they come whole (pipe(7)). What finds no room is lost: all that
    counts is said again soon."""

    def __init__(self, pipes: Sequence[tuple[int, int]] = (), mine: int = 0) -> None:
        self.is_first = not pipes or mine == 0
        self._mine = pipes[mine][0] if pipes else -1
        self._others = [entry for number, (_, entry) in enumerate(pipes) if number != mine]

    def tell(self, lines: Iterable[str]) -> None:
        """Say something to all others."""
        pieces = join_lines([f"{line}\n".encode() for line in lines], select.PIPE_BUF)
        for entry in self._others:
            with contextlib.suppress(BlockingIOError):
                for piece in pieces:
                    os.write(entry, piece)

    def hear(self) -> list[str]:
        """Return what others have said since."""
        try:
            return os.read(self._mine, PIPE_BYTES).decode().splitlines()
        except BlockingIOError:
            return []

    def listen(self, hear: Callable[[], None]) -> None:
        """Have `hear` called whenever something has been said."""
        if self._others:
            self.hear()  # what a process with this number before did not live to hear
            asyncio.get_running_loop().add_reader(self._mine, hear)

    def close(self) -> None:
        if self._others:
            asyncio.get_running_loop().remove_reader(self._mine)


UNKNOWN = Finding(Standing.NEW, "it has not said who it is")


async def take_for_right(client: VolumeClient) -> Finding:
    return Finding(Standing.RIGHT)


class Health:
    """The state of each volume, kept by name. `identify` finds out who a volume is."""

    def __init__(
        self, peers: Peers | None = None, clock: Callable[[], float] = time.monotonic,
        identify: Callable[[VolumeClient], Awaitable[Finding]] = take_for_right,
    ) -> None:  # fmt: skip
        self.states: dict[str, State] = {}
        self.findings: dict[str, Finding] = {}  # of volumes that are not known to be right
        self._identify = identify
        # have not answered for `slow_after`: up, but for small PUTs others come first
        self.slow = set[str]()
        # by which nginx.conf its volumes go; not there until it is known
        self.dialects = dict[str, int]()
        self._peers = peers or Peers()
        self._clock = clock
        self._next_write = dict[str, float]()
        self._heard_s = clock()  # when another process said what it probes

    def is_down(self, name: str) -> bool:
        return self.states.get(name, State.DOWN) is State.DOWN

    def notice(self, name: str, event: Event, reason: str) -> None:
        before = self.states.get(name)
        after = decide_state(before or State.DOWN, event, self.standing(name))
        if after is not before:
            self._change(name, after, reason)

    def _change(self, name: str, after: State, reason: str) -> None:
        self._set(name, after)
        level = logging.INFO if after is State.UP else logging.WARNING
        log.log(level, "volume %s is %s%s", name, after.value, reason and f" ({reason})")
        self._peers.tell([self._describe(name)])

    def standing(self, name: str) -> Standing:
        finding = self.findings.get(name)
        return finding.standing if finding else Standing.RIGHT

    def refusal(self, name: str) -> str:
        """Return why nothing may be sent to a volume but probes, or ""."""
        finding = self.findings.get(name)
        if finding is None or AT_BEST[finding.standing] is not State.DOWN:
            return ""
        return finding.reason

    def note(self, name: str, finding: Finding) -> None:
        """Hear who a volume is."""
        if finding == self.findings.get(name):
            return
        if finding.standing is Standing.RIGHT:
            # Its state is for the request that follows.
            self.findings.pop(name, None)
            return
        self.findings[name] = finding
        best = AT_BEST[finding.standing]
        if finding.standing is Standing.NEW and self.is_down(name):
            self.states[name] = best  # that it does not answer is in the log
        else:
            self._change(name, best, finding.reason)

    def _set(self, name: str, state: State) -> None:
        if self.states.get(name) is State.DOWN and state is not State.DOWN:
            # Whether it takes writes again is asked at the next probe.
            self._next_write.pop(name, None)
        self.states[name] = state

    def note_slow(self, name: str, is_slow: bool) -> None:
        if is_slow and name not in self.slow:
            self.slow.add(name)
            log.info("volume %s is slow, others come first", name)
        elif not is_slow and name in self.slow:
            self.slow.discard(name)
            log.info("volume %s answers again", name)
        else:
            return
        self._peers.tell([self._describe(name)])

    def note_dialect(self, name: str, dialect: int) -> None:
        """Hear by which nginx.conf a volume goes: 1 is that of an earlier version of mkv."""
        if dialect != self.dialects.get(name):
            self._set_dialect(name, dialect)
            self._peers.tell([self._describe(name)])

    def _set_dialect(self, name: str, dialect: int) -> None:
        before = self.dialects.get(name)
        self.dialects[name] = dialect
        if dialect == before or not self._peers.is_first:
            return  # one line a server
        if dialect == 1:
            log.warning(
                "volume %s goes by an earlier version: replace nginx.conf (or mkv.py) there", name
            )
        elif before is not None:
            log.info("volume %s goes by this version's nginx.conf", name)

    def forget(self, name: str) -> None:
        """Hear that a volume is configured no longer."""
        self.states.pop(name, None)
        self.dialects.pop(name, None)
        self.findings.pop(name, None)
        self.slow.discard(name)

    def _describe(self, name: str) -> str:
        state = self.states.get(name, State.DOWN)
        pace = "slow" if name in self.slow else "swift"
        line = f"{name} {state.value} {pace} {self.dialects.get(name, 0)}"
        finding = self.findings.get(name)
        if finding is None or finding.standing is Standing.NEW:  # which each finds out for itself
            return line
        return f"{line} {finding.standing.value} {finding.reason}"

    def _hear(self, names: Collection[str]) -> None:
        """Take over what other processes have found out of the volumes `names`."""
        for line in self._peers.hear():
            if line == PROBED:
                self._heard_s = self._clock()
                continue
            name, state, pace, dialect, *finding = line.split(" ", 5)
            if name not in names:
                continue
            (self.slow.add if pace == "slow" else self.slow.discard)(name)
            if dialect != "0":
                self._set_dialect(name, int(dialect))
            if finding:
                self.findings[name] = Finding(Standing(finding[0]), finding[1])
            if finding or name not in self.findings:
                self._set(name, State(state))

    @property
    def _is_prober(self) -> bool:
        """Whether this process probes: the first does, and others while nobody is heard to."""
        return self._peers.is_first or self._clock() - self._heard_s > PROBER_SILENT_S

    async def probe(self, client: VolumeClient) -> Finding | None:
        """Probe one volume: who it is, and if that is right, now and then, and whenever it was
        down, whether it writes. Return who it is, None if it does not say."""
        name = client.volume.name
        finding = None
        try:
            finding = await self._identify(client)
            now = self._clock()
            write = self.is_down(name) or now >= self._next_write.get(name, 0.0)
            self.note(name, finding)
            if write and finding.standing is Standing.RIGHT:
                self._next_write[name] = now + WRITE_PROBE_EVERY_S
                await client.probe()
            else:
                self.notice(name, Event.ANSWERED, "")
        except VolumeError:
            return finding  # the client has told `notice`
        except IndexFailed as error:
            log.error("%s; who volume %s is cannot be found out", error, name)
            return None
        except Exception:
            log.exception("unexpected error in a probe of volume %s", name)
            return None
        self.note_slow(name, False)  # as another process may have found it
        return finding

    async def run(self, clients: Callable[[], Mapping[str, VolumeClient]]) -> None:
        """Listen to other processes and probe all volumes, for ever; one that hangs does not delay
        the others' probes."""
        running: dict[str, asyncio.Task[Finding | None]] = {}
        self._heard_s = self._clock()
        self._peers.listen(lambda: self._hear(clients()))
        try:
            async with asyncio.TaskGroup() as group:
                while True:
                    is_prober = self._is_prober
                    if is_prober:
                        self._peers.tell([*map(self._describe, clients()), PROBED])
                    for name, client in clients().items():
                        last = running.get(name)
                        is_due = is_prober or name in self.findings
                        if is_due and (last is None or last.done()):
                            running[name] = group.create_task(self.probe(client))
                    await asyncio.sleep(PROBE_EVERY_S)
        finally:
            self._peers.close()


class Identities:
    """Finds out who volumes are, for Health, and gives new ones their identity.

    What the index has not seen is taken in only by one process of a server, by one volume after
    another, and read once more before it counts: so who has overwritten it meanwhile, under
    another name of the same disk or on another server, is seen."""

    def __init__(self, index: Index, takes_in: bool) -> None:
        self._index = index
        self._takes_in = takes_in
        self._seen: dict[str, str] = {}  # what the index has
        self._read_s = -math.inf  # when that was read
        self._reading = asyncio.Lock()
        self._writing = asyncio.Lock()
        self._waits = dict[str, tuple[float, Finding]]()  # until when what was found stands
        # What is written twice is the same, so that it does not matter which comes last.
        self._drawn = dict[str, str]()

    async def identify(self, client: VolumeClient) -> Finding:
        """Say who a volume is; raises VolumeError, IndexFailed."""
        found = await client.read_identity()
        await self._read_index()
        finding = self._judge(client, found)
        if finding.standing is Standing.NEW and self._takes_in:
            finding = await self._take_in(client, found)
        return finding

    def _judge(self, client: VolumeClient, found: Identity | str | None) -> Finding:
        name = client.volume.name
        store = self._seen.get(STORE_ID, "")
        return judge_identity(found, store, name, self._seen.get(name))

    async def _read_index(self) -> None:
        """Read what the index has seen, unless that was done just now: `adopt`, or another
        process, may have changed it."""
        async with self._reading:
            if time.monotonic() - self._read_s > LOOK_AGAIN_S:
                self._seen = await self._index.read(select_identities)
                self._read_s = time.monotonic()

    async def _take_in(self, client: VolumeClient, found: Identity | str | None) -> Finding:
        """Take in a volume that the index has not seen, if it is the right one; what prevents it
        is looked at again after a while."""
        name = client.volume.name
        if found is not None:
            return await self._look_again(client)
        until_s, finding = self._waits.get(name, (-math.inf, UNKNOWN))
        if time.monotonic() < until_s:
            return finding
        finding = await self._give_identity(client)
        if finding.standing is Standing.NEW:
            return await self._look_again(client)
        self._waits[name] = (time.monotonic() + WRITE_PROBE_EVERY_S, finding)
        return finding

    async def _give_identity(self, client: VolumeClient) -> Finding:
        """Write an identity where none is, unless it may be another volume. What is there then is
        new."""
        doubt = await self._doubt(client)
        if doubt:
            reason = f"it has no identity, and {doubt}; adopt it if it is the right one"
            return Finding(Standing.REFUSED, reason)
        async with self._writing:
            if await client.read_identity() is not None:  # by another name of the same disk
                return UNKNOWN
            name = client.volume.name
            number = self._drawn.setdefault(name, draw_number())
            try:
                await client.write_identity(Identity(self._seen[STORE_ID], name, number))
            except (VolumeFull, VolumeUnexpected) as error:
                return Finding(Standing.UNWRITTEN, f"its identity cannot be written: {error}")
        return UNKNOWN

    async def _look_again(self, client: VolumeClient) -> Finding:
        """Read an identity once more, and note that it was seen."""
        await asyncio.sleep(LOOK_AGAIN_S)
        found = await client.read_identity()
        finding = self._judge(client, found)
        if finding.standing is not Standing.NEW or not isinstance(found, Identity):
            return finding
        try:
            keep = partial(keep_identity, name=found.volume, number=found.number)
            await self._index.write(keep)
        except (IndexFailed, IndexUnsure) as error:
            return Finding(Standing.UNWRITTEN, f"that it was seen cannot be noted: {error}")
        # Another server may have been first.
        self._seen = await self._index.read(select_identities)
        return self._judge(client, found)

    async def _doubt(self, client: VolumeClient) -> str:
        """Return why a volume without an identity may be another one than it should be, or ""."""
        name = client.volume.name
        blobs, _ = (await self._index.read(read_totals)).get(name, (0, 0))
        if blobs:
            sample = await self._find_some(name)
            right = await count_right(client, sample)
            if 2 * right > len(sample):
                return ""
            return f"of {len(sample)} replicas that should be there, {right} are"
        ((status, body),) = await client.look_at(["/"], ROOT_BYTES)
        if status == 404 and not client.is_whole_server:
            return ""
        try:
            if status != 200:
                raise ValueError(f"it was answered {status}")
            return "it has blobs that no record names" if lists_blobs(body) else ""
        except ValueError as error:
            return f"its root has no listing: {error}"

    async def _find_some(self, volume: str) -> list[Record]:
        """Return some records that name a volume."""
        found = list[Record]()
        after = ""
        for _ in range(SAMPLE_PAGES):
            page = await self._index.read(select_records, after)
            found += [record for record in page if volume in record.volumes]
            if len(found) >= SAMPLE or not page:
                break
            after = page[-1].key
        return found[:SAMPLE]


async def count_right(client: VolumeClient, records: Sequence[Record]) -> int:
    """Return of how many records a volume has the sidecar, with the right size; raises
    VolumeError."""
    paths = [sidecar_path(record.path_on(client.volume.name)) for record in records]
    answers = await client.look_at(paths, MAX_SIDECAR_BYTES)
    count = 0
    for record, path, (status, body) in zip(records, paths, answers, strict=True):
        with contextlib.suppress(ValueError):
            count += status == 200 and decode_sidecar(body, path).size == record.size
    return count


# == Metrics ======================================================================================
# Counters in memory that all worker processes share: a process writes only its own region, a
# scrape adds up all regions, and what a process that died had counted stays. Names and labels by
# the Prometheus conventions.

CELL = 256  # bytes a sample: its value as a double, then its name with labels
REGION = 4096 * CELL  # bytes a process
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 0.5, 2.5, 10.0, 60.0)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
FAMILIES = {
    "mkv_build_info": ("gauge", "Version of mkv and of Python; always 1."),
    "mkv_http_requests_total": ("counter", "Requests answered."),
    "mkv_http_request_duration_seconds": (
        "histogram",
        "Time from a request's headers to its answer.",
    ),
    "mkv_http_requests_in_flight": ("gauge", "Requests being answered."),
    "mkv_received_bytes_total": ("counter", "Bytes of blobs received from clients."),
    "mkv_volume_requests_total": ("counter", "Requests sent to a volume."),
    "mkv_volume_errors_total": ("counter", "Requests to a volume that failed."),
    "mkv_volume_request_duration_seconds": ("histogram", "Time of a request to a volume."),
    "mkv_volume_state": ("gauge", "1 for the state that the volume is in."),
    "mkv_volume_identity_refused": (
        "gauge",
        "1 if the volume is another one than it should be, or may be.",
    ),
    "mkv_volume_blobs": ("gauge", "Blobs that the index says are on the volume."),
    "mkv_volume_bytes": ("gauge", "Bytes that the index says are on the volume."),
    "mkv_keys": ("gauge", "Keys in the index."),
    "mkv_bytes": ("gauge", "Bytes of all keys, each counted once."),
    "mkv_replicas_missing": ("gauge", "Replicas that keys have less than `replicas`, in all."),
    "mkv_garbage_pending": ("gauge", "Replicas that wait to be deleted."),
    "mkv_garbage_oldest_age_seconds": ("gauge", "How long the oldest garbage has waited."),
    "mkv_samples_dropped_total": (
        "counter",
        "Sum of what found no place in memory: too many volumes.",
    ),
    "mkv_index_batch_size": ("histogram", "Calls that shared one hop to the index."),
}


class Metrics:
    """Counters and histograms of this process, in region `mine` of `shared` memory."""

    def __init__(self, shared: mmap.mmap | None = None, mine: int = 0) -> None:
        self._shared = shared or mmap.mmap(-1, REGION)
        self._doubles = memoryview(self._shared).cast("d")
        self._region = mine * REGION
        self._histograms = dict[tuple[str, str], list[int]]()
        # counter and labels of each kind of answer
        self._requests = dict[tuple[str, int], tuple[str, str]]()
        # A predecessor in this region may have died: go on where it was.
        self._cells = dict(self._samples(self._region))
        self._in_flight = self._cell("mkv_http_requests_in_flight")
        self._doubles[self._in_flight] = 0.0

    def _samples(self, region: int) -> Iterator[tuple[str, int]]:
        for offset in range(region, region + REGION, CELL):
            if not (name := self._shared[offset + 8 : offset + CELL].rstrip(b"\0").decode()):
                return
            yield name, offset // 8

    def _cell(self, name: str) -> int:
        """Return where the number called `name` is in memory, in words of 8 bytes."""
        if name not in self._cells:
            # Labels are bounded: it is full with some hundred volumes, and then the last cell
            # counts for all that came too late.
            used = min(len(self._cells), REGION // CELL - 1)
            offset = self._region + used * CELL
            if used == REGION // CELL - 1:
                name = "mkv_samples_dropped_total"
            self._shared[offset + 8 : offset + 8 + len(name)] = name.encode()
            self._cells[name] = offset // 8
        return self._cells[name]

    def add(self, name: str, amount: float = 1.0) -> None:
        self._doubles[self._cell(name)] += amount

    def observe(
        self, name: str, labels: str, value: float, bounds: tuple[float, ...] = SECONDS
    ) -> None:
        """Add `value` to a histogram; `labels` are as in the text format, without braces."""
        cells = self._histograms.get((name, labels))
        if cells is None:
            cells = self._histograms[name, labels] = self._make_histogram(name, labels, bounds)
        self._doubles[cells[bisect.bisect_left(bounds, value)]] += 1.0
        self._doubles[cells[-1]] += value

    def _make_histogram(self, name: str, labels: str, bounds: tuple[float, ...]) -> list[int]:
        """Return the cells of the buckets, each of which counts what no lower one does, and of the
        sum."""
        names = [
            f'{name}_bucket{{{labels},le="{bound}"}}' for bound in (*map(float, bounds), "+Inf")
        ]
        return [self._cell(one) for one in (*names, f"{name}_sum{{{labels}}}")]

    def count_in_flight(self, change: int) -> None:
        self._doubles[self._in_flight] += change

    def count_request(self, method: str, status: int, seconds: float) -> None:
        """Count a request that has been answered."""
        names = self._requests.get((method, status))
        if names is None:
            labels = f'method="{method}",status="{status}"'
            names = self._requests[method, status] = f"mkv_http_requests_total{{{labels}}}", labels
        counter, labels = names
        self.add(counter)
        self.observe("mkv_http_request_duration_seconds", labels, seconds)

    def render(self, gauges: Mapping[str, float]) -> str:
        """Return the Prometheus text format: the sums over all processes, and `gauges` (name with
        labels -> value)."""
        samples = defaultdict[str, float](float, gauges)
        for region in range(0, len(self._shared), REGION):
            for name, cell in self._samples(region):
                samples[name] += self._doubles[cell]
        lines = defaultdict[str, list[str]](list)
        for name, value in add_up_buckets(samples).items():
            bare = name.partition("{")[0]
            lines[bare if bare in FAMILIES else bare.rpartition("_")[0]].append(
                f"{name} {value:.15g}\n"
            )
        families = ((name, *FAMILIES[name], "".join(found)) for name, found in lines.items())
        return "".join(
            f"# HELP {name} {about}\n# TYPE {name} {kind}\n{found}"
            for name, kind, about, found in families
        )


BUCKET = re.compile(r'([a-z_]+)_bucket\{(.*),le="([^"]*)"\}')


def add_up_buckets(samples: Mapping[str, float]) -> dict[str, float]:
    """Return the samples of histograms as Prometheus wants them: a bucket also counts what lower
    ones do, and there is a count of all."""
    after = dict(samples)
    histograms = defaultdict[str, list[tuple[float, str]]](list)
    for name in samples:
        found = BUCKET.fullmatch(name)
        if found:
            histograms[f"{found[1]}_count{{{found[2]}}}"].append((float(found[3]), name))
    for count, buckets in histograms.items():
        total = 0.0
        for _, name in sorted(buckets):
            total += samples[name]
            after[name] = total
        after[count] = total
    return after


class AccessLog:
    """Writes the lines of requests to a file descriptor, those of a few milliseconds by few calls:
    each is short enough that the lines of several processes do not mix in a pipe (pipe(7)). What
    cannot be written waits, up to a bound, and what is over that is lost."""

    def __init__(self, fd: int, as_json: bool) -> None:
        self._fd = fd
        self._format = format_json if as_json else format_text
        self._lines = list[str]()
        self._waiting = deque[bytes]()  # whole lines, but for the first if it was cut off
        self._is_due = False

    def note(self, facts: dict[str, Any]) -> None:
        self._lines.append(self._format(time.time(), "info", "request", facts))
        if not self._is_due:
            self._is_due = True
            asyncio.get_running_loop().call_later(ACCESS_LOG_S, self.flush)

    def flush(self) -> None:
        """Write what fits into the pipe, and keep the rest for the next time."""
        self._is_due = False
        lines = [f"{line}\n".encode("utf-8", "backslashreplace") for line in self._lines]
        self._lines.clear()
        if len(self._waiting) < ACCESS_LOG_PIECES:
            self._waiting.extend(join_lines(lines, select.PIPE_BUF))
        with contextlib.suppress(OSError):
            while self._waiting:
                piece = self._waiting[0]
                self._waiting[0] = piece[os.write(self._fd, piece) :]
                if self._waiting[0]:
                    break
                self._waiting.popleft()


def join_lines(lines: Iterable[bytes], size: int) -> list[bytes]:
    """Join lines to pieces of at most `size` bytes, unless one is longer."""
    pieces = list[bytes]()
    piece = b""
    for line in lines:
        if piece and len(piece) + len(line) > size:
            pieces.append(piece)
            piece = b""
        piece += line
    return [*pieces, piece] if piece else pieces


ACCESS_LOG_S = 0.005
ACCESS_LOG_PIECES = 256  # that wait for a disk that is full, some 1 MB
PLAIN = re.compile(r"[!#-~]+").fullmatch  # what needs no quotes in a log line
PLAIN_LINE = re.compile(r"[!#-~ ]+").fullmatch


def format_time(at_s: float) -> str:
    second = int(at_s)
    return f"{format_second(second)}.{int((at_s - second) * 1000):03d}Z"


@lru_cache(2)
def format_second(second: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))


def format_json(at_s: float, level: str, message: str, facts: Mapping[str, Any]) -> str:
    """Return a line of the log as JSON."""
    return json.dumps({"time": format_time(at_s), "level": level, "message": message, **facts})


def format_text(at_s: float, level: str, message: str, facts: Mapping[str, Any]) -> str:
    """Return a line of the log as text with key=value; what clients send is escaped."""
    start = f"{format_time(at_s)} {level} {message}"
    line = "".join([f" {name}={value}" for name, value in facts.items()])
    if line.count(" ") == len(facts) and PLAIN_LINE(line) and "= " not in f"{line} ":
        return start + line
    for name, value in facts.items():
        if type(value) is str and not PLAIN(value):
            value = json.dumps(value)
        start += f" {name}={value}"
    return start


def log_access(facts: dict[str, Any]) -> None:
    """Write the line of a request where the application's other lines go."""
    access_log.info("request", extra={"facts": facts})


# == Store ========================================================================================
# The operations: look up, decide, act. They return values and raise MkvErrors, and know nothing of
# HTTP.

DELETE_PATIENCE_S = 1.0  # how long the acknowledgement of a DELETE waits for the volumes
MEETING_PATIENCE_S = 2.0  # how long a start or a reload waits for the first probe of a new volume


class View(NamedTuple):
    """What a configuration comes to. A request takes the view once; a reload swaps it as a
    whole."""

    config: Config
    ring: Ring
    clients: Mapping[str, VolumeClient]


class Draft(NamedTuple):
    """What a PUT asks for; `size` is None for a chunked body, `digests` is hashlib name -> what
    the client expects."""

    key: str
    content_type: str
    ext: str
    size: int | None
    conditions: Conditions = UNCONDITIONAL
    digests: Mapping[str, bytes] = {}


class Hasher:
    """SHA-256 of a blob, and whatever else the client wants verified, in one pass."""

    def __init__(self, expected: Mapping[str, bytes]) -> None:
        self._expected = expected
        self.size = 0
        self._hashes = {
            name: hashlib.new(name, usedforsecurity=False) for name in {"sha256", *expected}
        }

    def update(self, chunk: bytes) -> None:
        self.size += len(chunk)
        for one in self._hashes.values():
            one.update(chunk)

    def finish(self) -> str:
        """Return the SHA-256 in hex; raises WrongDigest."""
        for name, digest in self._expected.items():
            if (found := self._hashes[name].digest()) != digest:
                raise WrongDigest(
                    f"the body's {name} is {found.hex()}, the header says {digest.hex()}"
                )
        return self._hashes["sha256"].hexdigest()


class Write:
    """One PUT on its way to its volumes. Its path is drawn with its first claim. On each volume it
    has one place, and another one if the connection broke: no place is written twice (R1)."""

    def __init__(self, view: View, health: Health, draft: Draft, trail: str, index: Index) -> None:
        self._view = view
        self._health = health
        self._trail = trail
        self._index = index
        self._hasher = Hasher(draft.digests)
        self.draft = draft
        self.path = ""
        self.claimed = set[str]()  # places
        self.sent = dict[str, float]()  # of these, where it was sent to: see Sent
        self.marked = set[str]()  # of these, where its sidecar was sent to
        self.done = list[str]()  # where all of it is
        self.failed = dict[str, VolumeError]()  # by volume
        self._lease: Lease | None = None  # under which it has claimed
        self._place_on = dict[str, str]()  # volume -> place
        self._under_way = dict[str, Exchange]()  # by place
        self._is_news = False
        self._waiter: asyncio.Future[None] | None = None

    def plan(self, done: Iterable[str]) -> tuple[str, ...]:
        """Return the volumes to try next, none if those of the places in `done` are enough; raises
        Unavailable or Full with the reason."""
        config = self._view.config
        ring = self._view.ring
        health = self._health
        key = self.draft.key
        has = set(map(volume_of, done))
        names = plan_write(
            ring, key, config.replicas, health.states, has, self.failed, health.slow
        )
        step = decide_write(len(has), len(names), config.replicas, config.min_replicas)
        if step is Step.ROLL_BACK:
            raise explain_refusal(health.states, ring, config.min_replicas, self.failed)
        return names if step is Step.WRITE_MORE else ()

    async def _claim(self, names: Collection[str]) -> list[str]:
        """Note in the index that something may come to a new place on each volume; only then it
        may be sent. Return the places."""
        places = [name if name not in self._place_on else new_place(name) for name in names]
        self._place_on |= zip(names, places, strict=True)
        self.claimed.update(places)
        claim = self._claim_more if self.path else self._claim_first
        await self._index.write(partial(claim, places), durable=False)
        return places

    def _claim_first(self, places: Collection[str], tx: Transaction) -> None:
        self.path = tx.draw_path(self.draft.key, self.draft.ext)
        self._claim_more(places, tx)

    def _claim_more(self, places: Collection[str], tx: Transaction) -> None:
        self._lease = tx.lease
        tx.claim(self.draft.key, self.path, places)

    async def store_small(self, blob: bytes) -> Record:
        """Send blob and sidecar together. Whoever fails is replaced by the next volume in ring
        order; whoever is slow is helped by it, and the first to answer count. Return the record
        to commit; raises MkvError."""
        self._hasher.update(blob)
        digest = self._finish_body()
        replicas = self._view.config.replicas
        try:
            while len(self.done) < replicas:
                names = self._plan_small()
                if names:
                    self._send(await self._claim(names), blob, digest)
                elif not self._under_way:
                    break
                await self._wait_for_news()
        finally:
            self._abandon()
        if len(self.done) > replicas:  # two at once
            has = {volume_of(place): place for place in self.done}
            best = self._view.ring.place(self.draft.key, replicas, has.__contains__)
            self.done = [has[name] for name in best]
        return self._make_record(digest)

    def _plan_small(self) -> tuple[str, ...]:
        """Return the volumes to send to now; raises Unavailable or Full when there is nothing to
        wait for."""
        if not self._under_way:
            return self.plan(self.done)
        config = self._view.config
        health = self._health
        done = set(map(volume_of, self.done))
        under_way = {one.volume: one.is_slow for one in self._under_way.values()}
        slow = {name for name, is_slow in under_way.items() if is_slow}
        names = plan_write(
            self._view.ring, self.draft.key, config.replicas, health.states,
            (done | under_way.keys()) - slow, slow.union(self.failed), health.slow,
        )  # fmt: skip
        hoped = len(done) + len(under_way)
        if hoped + len(names) < config.min_replicas:
            return ()  # it will fail, and what is under way is waited for
        missing = max(0, config.replicas - hoped)
        helpers = [name for name in names[missing:] if name not in health.slow]
        return (*names[:missing], *helpers)

    def _send(self, places: Iterable[str], blob: bytes | None, digest: str) -> None:
        """Send the sidecar, and before it the blob if it is not there yet."""
        sidecar = encode_sidecar(self._make_record(digest))
        for place in places:
            path = place_path(self.path, place)
            files = {} if blob is None else {path: blob}
            files[sidecar_path(path)] = sidecar
            self.marked.add(place)
            client = self._view.clients[volume_of(place)]
            hear_end = partial(self._hear_end, place, blob is not None)
            self._under_way[place] = client.send_files(
                files, self._trail, hear_end, self._hear_slow, self._lease
            )

    def _hear_end(self, place: str, is_whole: bool, exchange: Exchange) -> None:
        if self._under_way.pop(place, None) is None:  # nobody waits for it any more
            if exchange.doubt_s == ANSWERED:
                self.sent[place] = ANSWERED
            return
        name = exchange.volume
        error = exchange.error
        if exchange.doubt_s is not None:
            self.sent[place] = exchange.doubt_s
        if error is None:
            self.done.append(place)
        elif not (is_whole and place == name and exchange.doubt_s == BROKEN_S):
            self.failed[name] = error
        # else a kept connection may have broken long ago: once more, at another place
        if error or not self._under_way or len(self.done) >= self._view.config.replicas:
            self._tell_news()

    def _hear_slow(self, _: Exchange) -> None:
        """A helper may be wanted."""
        self._tell_news()

    def _tell_news(self) -> None:
        self._is_news = True
        wake(self._waiter)

    async def _wait_for_news(self) -> None:
        """Wait until there is something to decide, since this was called last."""
        if not self._is_news:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        self._is_news = False

    def _abandon(self) -> None:
        """Wait for nobody any more. What has been sent may still come; the index will hear of
        it."""
        under_way = self._under_way
        self._under_way = {}
        for place, exchange in under_way.items():
            self._view.clients[exchange.volume].abandon(exchange)
            if exchange.sent:
                self.sent[place] = HUNG_S

    async def store_large(self, chunk: bytes, body: AsyncIterator[bytes]) -> Record:
        """Stream to all at once, as fast as the slowest takes it. Before the first byte a volume
        can be replaced. Return the record to commit; raises MkvError."""
        uploads = dict[str, Upload]()  # by place
        try:
            while names := self.plan(uploads):
                uploads |= await self._each(await self._claim(names), self._start_upload)
            chunk = chunk or await anext(body, b"")
            while chunk:
                self._hasher.update(chunk)
                for place, upload in list(uploads.items()):
                    try:
                        await upload.send(chunk)
                    except VolumeError as error:
                        self.failed[volume_of(place)] = error
                        self._drop_failed(uploads)
                chunk = await anext(body, b"")
            digest = self._finish_body()
            # From here on a volume may have all of it, and store it whenever it wakes.
            self.sent |= dict.fromkeys(uploads, HUNG_S)
            self.sent |= await self._each(uploads, lambda place: self._finish(uploads[place]))
            self._drop_failed(uploads)
            self._send(uploads, None, digest)
            while self._under_way:
                await self._wait_for_news()
            self._drop_failed(uploads)
            return self._make_record(digest)
        finally:
            self._abandon()
            for upload in uploads.values():
                upload.abort()

    async def _start_upload(self, place: str) -> Upload:
        client = self._view.clients[volume_of(place)]
        path = place_path(self.path, place)
        upload = await client.start_upload(path, self.draft.size, self._trail, self._lease)
        self.sent[place] = ANSWERED  # as long as it has no end, the volume keeps nothing
        return upload

    async def _finish(self, upload: Upload) -> float:
        await upload.finish()
        return ANSWERED

    async def _each(
        self, places: Collection[str], act: Callable[[str], Awaitable[T]]
    ) -> dict[str, T]:
        """Act on all places at once; note the failures, return place -> result of the others."""
        results = await asyncio.gather(*map(act, places), return_exceptions=True)
        good = {}
        for place, result in zip(places, results, strict=True):
            if isinstance(result, VolumeError):
                self.failed[volume_of(place)] = result
            elif isinstance(result, BaseException):
                raise result
            else:
                good[place] = result
        return good

    def _drop_failed(self, uploads: dict[str, Upload]) -> None:
        """Go on without those that failed if the others are enough; raises Unavailable."""
        for place in [place for place in uploads if volume_of(place) in self.failed]:
            uploads.pop(place).abort()
        if len(uploads) < self._view.config.min_replicas:
            why = "; ".join(map(str, self.failed.values()))
            raise Unavailable(f"{why}; a large blob cannot begin anew elsewhere: send it again")

    def _finish_body(self) -> str:
        """Return the digest of the body that is now complete; raises BadRequest, WrongDigest."""
        expected = self.draft.size
        size = self._hasher.size
        if expected not in (None, size):
            raise BadRequest(f"the body has {size} bytes, Content-Length says {expected}")
        return self._hasher.finish()

    def _make_record(self, digest: str) -> Record:
        draft = self.draft
        return Record(
            key=draft.key, version=version_of(self.path), places=tuple(sorted(self.done)),
            size=self._hasher.size,
            digest=digest, content_type=draft.content_type, ext=draft.ext,
        )  # fmt: skip


def new_place(volume: str) -> str:
    """Return a place on a volume that nobody has had."""
    return f"{volume}~{random.getrandbits(32):08x}"


async def hold_small(body: AsyncIterator[bytes], size: int | None) -> tuple[bytes, bool]:
    """Read a body of `size` bytes (None: not known) if it is small; return its beginning, and
    whether that is all."""
    held = bytearray()
    if size is not None and size > SMALL_BLOB:
        return b"", False
    while chunk := await anext(body, b""):
        held += chunk
        if len(held) > SMALL_BLOB:
            return bytes(held), False
    return bytes(held), True


def no_replica(record: Record) -> Unavailable:
    return Unavailable(f"no volume that holds this key is up: {', '.join(record.volumes)}")


def find_unconfigured(
    totals: Mapping[str, tuple[int, int]], configured: Collection[str]
) -> list[dict[str, Any]]:
    """Return the volumes that records name and the configuration does not, with what is there."""
    return [
        {"name": name, "blobs": blobs, "bytes": size}
        for name, (blobs, size) in sorted(totals.items())
        if blobs and name not in configured and name not in (ALL_KEYS, GARBAGE)
    ]


class Store:
    """The store of one process: index, volumes, health. Start it, use it, close it."""

    def __init__(
        self, config: Config, metrics: Metrics | None = None, role: str = SERVER,
        peers: Peers | None = None,
    ) -> None:  # fmt: skip
        self.metrics = metrics or Metrics()
        self._role = role
        self._is_first = peers is None or peers.is_first  # of the processes of a server
        observe = partial(self.metrics.observe, "mkv_index_batch_size", bounds=SIZES)
        self.index = Index(
            config.db, lambda kind, size: observe(f'kind="{kind}"', size), role, config.lease
        )
        identities = Identities(self.index, takes_in=self._is_first)
        self.health = Health(peers, identify=identities.identify)
        self.stopping = False
        self.uploads = 0
        self.in_flight = 0
        self.note_access: Callable[[dict[str, Any]], None] = log_access
        self._tasks = list[asyncio.Task[None]]()
        self._list_tokens = dict[str, tuple[float, float]]()
        self._undiscarded = list[Write]()  # whose end the index could not be told: for later
        self.view = self._make_view(config, {})

    def count_in_flight(self, change: int) -> None:
        self.in_flight += change
        self.metrics.count_in_flight(change)

    def _make_view(self, config: Config, before: Mapping[str, VolumeClient]) -> View:
        """Return the view of a configuration. Clients whose facts are as before stay, with their
        lines."""
        clients = {}
        for volume in config.volumes:
            name = volume.name
            client = before.get(volume.name)
            facts = (volume, config.volume_secret, config.volume_timeout, config.slow_after)
            if client is None or client.facts != facts:
                client = VolumeClient(
                    volume, config.volume_secret, config.volume_timeout,
                    partial(self.health.notice, name), partial(self._measure, name),
                    partial(self._hear_late, name),
                    config.slow_after, partial(self.health.note_slow, name),
                    partial(self.health.note_dialect, name),
                    partial(self.health.refusal, name),
                )  # fmt: skip
            clients[name] = client
        return View(config, Ring(config.volumes), clients)

    def _measure(self, volume: str, method: str, seconds: float, failure: str) -> None:
        self.metrics.add(f'mkv_volume_requests_total{{volume="{volume}",method="{method}"}}')
        self.metrics.observe("mkv_volume_request_duration_seconds", f'volume="{volume}"', seconds)
        if failure:
            self.metrics.add(f'mkv_volume_errors_total{{volume="{volume}",error="{failure}"}}')

    async def _hear_late(self, volume: str, paths: list[str], answered: bool) -> None:
        if paths:
            # If that fails, it is looked at until the doubt has passed.
            with contextlib.suppress(IndexFailed, IndexUnsure):
                end = partial(end_doubts, volume=volume, paths=paths, answered=answered)
                await self.index.write(end, paths=paths, durable=False)

    async def start(self) -> None:
        """Open the index, probe every volume once, start the background tasks; raises
        ConfigError."""
        await self.index.open()
        await self._meet(self.view.clients.values())
        self._tasks = [asyncio.create_task(self.health.run(lambda: self.view.clients))]
        try:
            await self.index.renew()
        except (IndexFailed, IndexUnsure) as error:  # a full disk: reads go on
            log.error("%s; what the last run left on the volumes waits until it can", error)
        self._tasks.append(asyncio.create_task(self.index.renew_for_ever()))
        if self._role == SERVER:
            self._tasks.append(asyncio.create_task(self._collect_for_ever()))
        await self._name_unconfigured()

    async def _meet(self, clients: Iterable[VolumeClient]) -> None:
        """Probe volumes that are new. One that does not say soon who it is counts as down until
        it does."""
        meetings = {
            asyncio.create_task(self._meet_one(client)): client.volume.name for client in clients
        }
        if not meetings:
            return
        await asyncio.wait(meetings, timeout=MEETING_PATIENCE_S)
        for task, name in meetings.items():
            if not task.done() or not task.result():
                task.cancel()
                self.health.note(name, UNKNOWN)

    async def _meet_one(self, client: VolumeClient) -> bool:
        """Return whether a volume has said who it is. If it is new, another process may be taking
        it in just now."""
        while True:
            finding = await self.health.probe(client)
            if finding is None or finding.standing is not Standing.NEW:
                return finding is not None
            await asyncio.sleep(LOOK_AGAIN_S)

    async def close(self) -> None:
        """Stop the tasks, flush and close the index."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for client in self.view.clients.values():
            client.close()
        await self.index.close()

    async def reload(self, config: Config) -> None:
        """Use `config` for new requests from now on; what needs a restart stays, and the log says
        so."""
        old = self.view
        asked = config
        config = reload_config(old.config, config)
        new = self._make_view(config, old.clients)
        await self._meet({*new.clients.values()} - {*old.clients.values()})
        self.view = new
        for client in {*old.clients.values()} - {*new.clients.values()}:
            client.close()
        for name in old.clients.keys() - new.clients.keys():
            self.health.forget(name)
        names = [spec.name for spec in fields(config)]
        changed = [name for name in names if getattr(config, name) != getattr(old.config, name)]
        refused = [
            name
            for name in names
            if getattr(config, name) != getattr(asked, name) and name != "volumes"
        ]
        more = f"; needs a restart: {', '.join(refused)}" if refused else ""
        log.info("configuration reloaded, changed: %s%s", ", ".join(changed) or "nothing", more)
        await self._name_unconfigured()

    async def _name_unconfigured(self) -> None:
        """Say in the log which volumes records name that nobody can read from."""
        if self._role != SERVER or not self._is_first:
            return  # one process is enough
        try:
            totals = await self.index.read(read_totals)
        except IndexFailed as error:
            log.error("%s", error)
            return
        words = "the index names volume %s, which is not configured: %d blobs, %d bytes are there"
        for one in find_unconfigured(totals, self.view.clients):
            log.warning(words, one["name"], one["blobs"], one["bytes"])

    # -- what clients ask for --

    def locate(self, record: Record) -> str:
        """Return the URL from which a client can read the blob now; raises Unavailable."""
        clients = self.view.clients
        health = self.health
        turn = random.getrandbits(16)
        name = choose_replica(record.volumes, health.states, turn, health.slow)
        if name is not None and name not in clients:  # late news of one that is not configured now
            known = [name for name in record.volumes if name in clients]
            name = choose_replica(known, health.states, turn, health.slow)
        if name is None:
            raise no_replica(record)
        return self._link(name, clients[name].volume.public_url, record)

    def locate_inside(self, record: Record) -> tuple[str, str]:
        """Return the URL from which a proxy can read the blob now, and one to try after that, on
        another volume if there is one; raises Unavailable."""
        clients = self.view.clients
        health = self.health
        names = [name for name in record.volumes if name in clients]
        random.shuffle(names)
        names.sort(key=lambda name: (health.is_down(name), name in health.slow))
        if not names or health.is_down(names[0]):
            raise no_replica(record)
        links = [self._link(name, clients[name].volume.url, record) for name in names]
        return links[0], links[1 % len(links)]

    def _link(self, name: str, base: str, record: Record) -> str:
        """Return the URL of a blob on the volume `name`, which is reached at `base`."""
        config = self.view.config
        dialect = self.health.dialects.get(name, 1)
        url = base + record.path_on(name)
        return make_link(url, record, dialect, config.link_secret, config.link_ttl, time.time())

    async def put(
        self, draft: Draft, body: AsyncIterator[bytes], trail: str,
        is_heard: Callable[[], bool] = lambda: True,
    ) -> tuple[Record, bool]:  # fmt: skip
        """Store `body` under the key; return its record and whether the key is new. Durable when
        it returns (I1). If it raises, but for Unfinished, or is cancelled before the commit, the
        key is as it was and what was written is buried (I2). So it is if nobody waits for the
        answer any more, lest a PUT that was given up lands on top of its own repetition."""
        view = self.view
        if not is_unconditional(draft.conditions):
            current = await self.index.get(draft.key)
            if decide_conditions(draft.conditions, current) is not Verdict.PROCEED:
                raise PreconditionFailed("the key is not what the condition asks for")
        write = Write(view, self.health, draft, trail, self.index)
        write.plan(())  # says no before the body is asked for
        begin, whole = await hold_small(body, draft.size)
        try:
            record = await (write.store_small(begin) if whole else write.store_large(begin, body))
            if not is_heard():
                raise BadRequest("the client has hung up")
            commit = partial(
                commit_put, record=record, conditions=draft.conditions, claimed=write.claimed,
                sent=dict(write.sent), delay_s=view.config.garbage_delay, reach=self._reach(view),
            )  # fmt: skip
            is_new, burial = await self.index.write(commit, keys=[draft.key])
        except BaseException as error:
            # A commit that was asked for and not heard of may have come about.
            is_sure = not isinstance(error, IndexUnsure | asyncio.CancelledError)
            is_buried = not write.claimed or await self._discard(view, write, trail, is_sure)
            if not is_buried and isinstance(error, MkvError):
                raise Unfinished(f"{error}; what was written may come back") from error
            raise
        if not await self._bury(view, burial, trail):
            raise Unfinished("it is stored, but what it replaces may come back")
        return record, is_new

    def _reach(self, view: View) -> Reach:
        """Return what the volumes can be counted on for."""
        states = self.health.states
        up = [name for name in view.clients if states.get(name) is State.UP]
        answering = [name for name in view.clients if not self.health.is_down(name)]
        return Reach(frozenset(answering), len(up), view.config.min_replicas)

    async def _discard(self, view: View, write: Write, trail: str, is_sure: bool) -> bool:
        """Bury what a failed PUT has written (I2), and return whether that succeeded. Its blobs
        are left to the collector. `is_sure`: no commit of it can come about."""
        try:
            burial = await self._refuse(write)
        except (IndexFailed, IndexUnsure) as error:
            log.error("%s; what was written for %r is deleted later", error, write.draft.key)
            self._undiscarded.append(write)
            if not is_sure:
                return not write.sent
            pending = Pending({}, {}, {})
            pending.end_write(write.path, write.claimed, write.sent, (), 0.0, write.draft.key)
            burial = pending.above("", 0.0)
        # Where no sidecar was sent there is nothing that a rebuild could take.
        unmarked = {
            (volume_of(place), place_path(write.path, place))
            for place in write.claimed - write.marked
        }
        rows = [row for row in burial.rows if (row.volume, row.path) not in unmarked]
        return await self._bury(view, burial._replace(rows=rows), trail)

    async def _refuse(self, write: Write) -> Burial:
        # If it was cancelled, its claim may have been carried out, and its path drawn, only just
        # now: so that is looked at in the transaction.
        return await self.index.write(
            lambda tx: refuse_put(tx, write.draft.key, write.path, write.claimed, write.sent),
            keys=[write.draft.key],
        )

    async def delete(self, key: str, conditions: Conditions, trail: str) -> None:
        """Delete the key. When it returns, the record is gone, and the sidecars from all volumes
        that answer; for the others there are tombstones (I4). Raises Unfinished if volumes fail
        just then."""
        view = self.view
        commit = partial(
            commit_delete, key=key, conditions=conditions, delay_s=view.config.garbage_delay,
            reach=self._reach(view),
        )  # fmt: skip
        was_there, burial = await self.index.write(commit, keys=[key])
        if not await self._bury(view, burial, trail):
            raise Unfinished(
                "the key is deleted, but too few volumes could note that for those that did not "
                "answer"
            )
        if not was_there:
            raise NotFound("no such key")

    async def _bury(self, view: View, burial: Burial, trail: str = "") -> bool:
        """Delete the sidecars of what is dead from all volumes that answer, and where that cannot
        be done soon, or proves nothing, put tombstones of the version on others. It goes from the
        lowest version up and stops where one fails, so that a rebuild in between takes none that
        was replaced by another. Return whether all is done."""
        found = list[Dead]()
        tombstones = list[tuple[str, str]]()
        is_done = True
        for rows in burial.by_version():
            grave = Grave(view, self.health, self.index, rows, burial, trail)
            is_done = await grave.dig()
            found += grave.found
            tombstones += grave.tombstones
            if not is_done:
                break
        if found or tombstones:
            try:
                await self.index.write(
                    lambda tx: note_buried(tx, found, tombstones),
                    paths={row.path for row in burial.rows}, durable=False,
                )  # fmt: skip
            except (IndexFailed, IndexUnsure) as error:
                log.error("%s; what was buried will be once more", error)
                return is_done and not tombstones  # which would be deleted as unknown
        return is_done

    async def list(self, query: ListQuery) -> bytes:
        """Return one page as JSON."""
        return await self.index.list_page(query)

    def limit_lists(self, client: str, now: float) -> None:
        """Count a list request of `client`; raises TooManyRequests."""
        config = self.view.config
        known = self._list_tokens
        if config.list_rate:
            if len(known) > 10_000:
                known.clear()  # which only forgives
            tokens, then = known.get(client, (float(config.list_burst), now))
            tokens, wait_s = take_token(tokens, now - then, config.list_rate, config.list_burst)
            known[client] = tokens, now
            if wait_s:
                raise TooManyRequests(
                    "too many list requests", Retry_After=str(max(1, round(wait_s)))
                )

    async def check_ready(self) -> None:
        """Raise Unavailable unless the index answers and some volume is alive."""
        await self.index.get("")
        if self.stopping or all(map(self.health.is_down, self.view.clients)):
            raise Unavailable("shutting down" if self.stopping else "no volume is up")

    async def status(self) -> dict[str, Any]:
        totals = await self.index.read(read_totals)
        keys, size = totals.get(ALL_KEYS, (0, 0))
        garbage, _ = totals.get(GARBAGE, (0, 0))
        there = sum(
            count for name, (count, _) in totals.items() if name not in (ALL_KEYS, GARBAGE)
        )
        volumes = list[dict[str, Any]]()
        for name, client in self.view.clients.items():
            blobs, its_size = totals.get(name, (0, 0))
            state = self.health.states.get(name, State.DOWN).value
            dialect = self.health.dialects.get(name)
            facts = {"state": state, "dialect": dialect, "blobs": blobs, "bytes": its_size}
            if finding := self.health.findings.get(name):
                facts |= {"identity": finding.standing.value, "reason": finding.reason}
            volumes.append(asdict(client.volume) | facts)
        return {
            "version": __version__,
            "keys": keys,
            "bytes": size,
            "garbage": garbage,
            "replicas_missing": max(0, keys * self.view.config.replicas - there),
            "volumes": volumes,
            "unconfigured": find_unconfigured(totals, self.view.clients),
        }

    async def render_metrics(self) -> str:
        status = await self.status()
        oldest_s = await self.index.read(read_garbage_age)
        gauges: dict[str, float] = {
            f'mkv_build_info{{version="{__version__}",python="{sys.version.split()[0]}"}}': 1,
            "mkv_keys": status["keys"], "mkv_bytes": status["bytes"],
            "mkv_replicas_missing": status["replicas_missing"],
            "mkv_garbage_pending": status["garbage"],
            "mkv_garbage_oldest_age_seconds": oldest_s,
        }  # fmt: skip
        for volume in status["volumes"]:
            label = f'volume="{volume["name"]}"'
            gauges |= {
                f"mkv_volume_{what}{{{label}}}": volume[what] for what in ("blobs", "bytes")
            }
            refused = volume.get("identity") == Standing.REFUSED.value
            gauges[f"mkv_volume_identity_refused{{{label}}}"] = refused
            gauges |= {
                f'mkv_volume_state{{{label},state="{s.value}"}}': s.value == volume["state"]
                for s in State
            }
        return self.metrics.render(gauges)

    # -- garbage --

    async def _collect_for_ever(self) -> None:
        while True:
            try:
                await self._discard_late()
                while await self._collects() and await self.collect_garbage():
                    pass
            except Exception as error:
                log.error("garbage waits: %s: %s", type(error).__name__, error)
            await asyncio.sleep(1.0)

    async def _collects(self) -> bool:
        return await self.index.read(is_collector, self.index.lease.owner)

    async def _discard_late(self) -> None:
        """Tell the index of the PUTs that were given up while it could not be reached."""
        while self._undiscarded:
            write = self._undiscarded[0]
            await self._refuse(write)
            self._undiscarded.remove(write)

    async def collect_garbage(self) -> int:
        """Delete what is due on every volume that is not down; return how many places. Can be
        killed at any step, and several at once do no harm: no place is ever written again (R1)."""
        view = self.view
        alive = [client for name, client in view.clients.items() if not self.health.is_down(name)]
        return sum(await asyncio.gather(*(self._collect_on(one, view) for one in alive)))

    async def _collect_on(self, client: VolumeClient, view: View) -> int:
        """Delete what is due on one volume, four at a time; return how many answered."""
        due = await self.index.read(select_due, client.volume.name)
        waiting = iter(due.rows)
        answers = dict[Dead, bool | None]()

        async def collect() -> None:
            for row in waiting:
                answers[row] = None
                if self.health.is_down(row.volume):
                    continue
                burial = due.burial_of(row)
                if not row.is_tombstone and must_be_buried(row, burial, view.config.min_replicas):
                    below = [
                        one for one in burial.rows if version_of(one.path) < version_of(row.path)
                    ]
                    if not due.is_known(row) or not await self._bury(
                        view, burial._replace(rows=below)
                    ):
                        continue
                paths = [row.path] if row.is_tombstone else [sidecar_path(row.path), row.path]
                with contextlib.suppress(VolumeError):
                    answers[row] = (await client.delete(paths))[0]

        await asyncio.gather(*(collect() for _ in range(4)))
        if answers:
            settle = partial(settle_dead, answers=answers, asked_s=due.asked_s)
            await self.index.write(settle, paths={row.path for row in answers}, durable=False)
        return sum(found is not None for found in answers.values())


class Grave:
    """One version of a key that is buried: its sidecars are deleted, or tombstones say that it is
    dead. `found` are the rows whose sidecar was there, `tombstones` what was written (path,
    volume)."""

    def __init__(
        self, view: View, health: Health, index: Index, rows: list[Dead], burial: Burial,
        trail: str,
    ) -> None:  # fmt: skip
        self._view = view
        self._health = health
        self._index = index
        self._rows = rows
        self._asked_s = burial.asked_s
        self._trail = trail
        self._path = tombstone_path(rows[0].path)
        self._has = set(burial.tombstones.get(self._path, ()))  # volumes that have one
        self._answers = dict[Dead, bool]()
        self.found = list[Dead]()
        self.tombstones = list[tuple[str, str]]()

    async def dig(self) -> bool:
        """Return whether it is buried."""
        at = defaultdict[str, list[Dead]](list)
        for row in self._rows:
            if row.volume in self._view.clients and not self._health.is_down(row.volume):
                at[row.volume].append(row)
        deletes = [asyncio.create_task(self._delete(rows)) for rows in at.values()]
        is_buried = False
        try:
            # The second time as long as the volumes' own timeouts.
            for patience_s in (DELETE_PATIENCE_S, None):
                if deletes:
                    await asyncio.wait(deletes, timeout=patience_s)
                is_buried = self._is_gone() or await self._mark()
                if is_buried or all(task.done() for task in deletes):
                    break
        finally:
            for task in deletes:
                task.cancel()  # the garbage follows
        return is_buried

    def _is_gone(self) -> bool:
        return all(row.is_gone(self._answers.get(row), self._asked_s) for row in self._rows)

    async def _delete(self, rows: list[Dead]) -> None:
        """Delete sidecars from one volume."""
        client = self._view.clients[rows[0].volume]
        with contextlib.suppress(VolumeError):
            found = await client.delete([sidecar_path(row.path) for row in rows], self._trail)
            self._answers |= zip(rows, found, strict=True)
            self.found += [row for row, was_there in zip(rows, found, strict=True) if was_there]

    async def _mark(self) -> bool:
        """Put tombstones on volumes that are up, if possible others than those that may show the
        version; return whether there are enough of them."""
        copies = self._view.config.min_replicas
        left = [
            row for row in self._rows if not row.is_gone(self._answers.get(row), self._asked_s)
        ]
        silent = {row.volume for row in left if row not in self._answers}
        doubted = {row.volume for row in left}
        places = [row.volume + split_path(row.path)[1] for row in left]
        body = encode_tombstone(split_path(left[0].path)[0], places)
        states = self._health.states
        fit = [
            name
            for name in self._view.clients
            if states.get(name) is State.UP and name not in silent and name not in self._has
        ]
        waiting = sorted(fit, key=lambda name: (name in doubted, hash_key(name + self._path)))

        async def put(name: str) -> None:
            with contextlib.suppress(VolumeError):
                await self._view.clients[name].put({self._path: body})
                self._has.add(name)
                self.tombstones.append((self._path, name))

        while waiting and len(self._has) < copies:
            missing = copies - len(self._has)
            await asyncio.gather(*map(put, await self._expect(waiting[:missing])))
            waiting = waiting[missing:]
        return len(self._has) >= copies

    async def _expect(self, names: Sequence[str]) -> list[str]:
        """Note where tombstones are about to be written; return where they may be."""
        expect = partial(expect_tombstones, path=self._path, volumes=names)
        try:
            return await self._index.write(expect, paths=[self._path], durable=False)
        except (IndexFailed, IndexUnsure) as error:
            log.error("%s; no tombstone is written that nobody would know of", error)
            return []


# == Page =========================================================================================
# What a browser shows at /-/: the state of the store, and its keys. One document without anything
# from elsewhere. Nothing that comes from the store is ever taken for HTML: all of it is put there
# as text, and the policy sent along lets no other script run. It talks to the API like any client.

PAGE_STYLE = """
:root { color-scheme: light dark; --back: #f6f7f9; --card: #fff; --text: #1b1f27; --dim: #626b7b;
  --line: #dfe3ea; --accent: #2256c9; --good: #14804a; --warn: #9a6200; --bad: #c22f2f; }
@media (prefers-color-scheme: dark) { :root { --back: #14171c; --card: #1d2129; --text: #e7eaf0;
  --dim: #9aa3b3; --line: #333a46; --accent: #82aaff; --good: #58c98b; --warn: #e3b04b;
  --bad: #ff8080; } }
* { box-sizing: border-box; }
[hidden] { display: none !important; }
body { margin: 0; background: var(--back); color: var(--text);
  font: 15px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
header { display: flex; flex-wrap: wrap; align-items: center; gap: .4rem 1rem;
  padding: .6rem 1.2rem; background: var(--card); border-bottom: 1px solid var(--line); }
h1 { font-size: 1.2rem; margin: 0; letter-spacing: .02em; }
h2 { font-size: 1rem; margin: 0 0 .6rem; }
nav { display: flex; gap: .3rem; flex: 1; }
nav a { padding: .45rem .8rem; border-radius: .5rem; color: var(--dim); text-decoration: none; }
nav a[aria-current="true"] { background: var(--back); color: var(--text); font-weight: 600; }
main { max-width: 72rem; margin: 0 auto; padding: 1.2rem; }
.dim { color: var(--dim); }
p:empty { margin: 0; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .7rem;
  padding: 1rem; margin-bottom: 1rem; overflow-x: auto; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: 1rem;
  margin-bottom: 1rem; }
.tiles .card { margin: 0; }
.figure { font-size: 1.45rem; font-weight: 600; font-variant-numeric: tabular-nums; }
svg { display: block; width: 100%; height: 2rem; }
td svg { width: 3.5rem; height: 1.3rem; }
td > span { display: inline-flex; align-items: center; gap: .5rem; vertical-align: middle; }
.trend { white-space: nowrap; }
polyline { fill: none; stroke: var(--accent); stroke-width: 1.5;
  vector-effect: non-scaling-stroke; }
.bad polyline { stroke: var(--bad); }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 500; color: var(--dim); font-size: .85rem; }
th, td { padding: .45rem .6rem; border-bottom: 1px solid var(--line); }
tbody tr:last-child td { border-bottom: 0; }
.number { text-align: right; white-space: nowrap; }
.name { overflow-wrap: anywhere; min-width: 9rem; }
.state { font-weight: 600; }
.state > span::before { content: "\\25cf "; }
.up { color: var(--good); } .readonly { color: var(--warn); } .down { color: var(--bad); }
meter { width: 4rem; }
button, .button, input { font: inherit; color: inherit; border: 1px solid var(--line);
  border-radius: .5rem; padding: .4rem .8rem; background: var(--card); min-height: 2.4rem; }
button, .button { cursor: pointer; }
button:hover, .button:hover { border-color: var(--accent); }
button.plain { border: 0; background: none; padding: .2rem 0; color: var(--accent);
  text-align: left; overflow-wrap: anywhere; }
button.main { background: var(--accent); border-color: var(--accent); color: var(--card); }
button.danger { color: var(--bad); }
:focus-visible, .button:focus-within { outline: 3px solid var(--accent); outline-offset: 2px; }
.bar { display: flex; flex-wrap: wrap; gap: .6rem; align-items: center; margin-bottom: .8rem; }
.bar input { flex: 1; min-width: 10rem; }
.actions { white-space: nowrap; text-align: right; }
.button { position: relative; overflow: hidden; }
.button input { position: absolute; inset: 0; width: 100%; opacity: 0; }
#drop.over { outline: 3px dashed var(--accent); outline-offset: -6px; }
#uploads:not(:empty) { margin-bottom: .8rem; max-height: 40vh; overflow: auto; }
.upload { display: grid; grid-template-columns: 1fr 8rem 11rem auto; gap: .6rem;
  align-items: center; padding: .2rem 0; overflow-wrap: anywhere; }
progress { width: 100%; accent-color: var(--accent); }
#notice { position: fixed; inset: auto 1rem 1rem; margin: 0 auto; width: fit-content;
  max-width: 92vw; background: var(--text); color: var(--back); padding: .6rem 1rem;
  border-radius: .5rem; overflow-wrap: anywhere; }
dialog { border: 1px solid var(--line); border-radius: .8rem; padding: 1.2rem; width: 38rem;
  max-width: 94vw; background: var(--card); color: var(--text); }
dialog::backdrop { background: #0008; }
dialog img { display: block; max-width: 100%; max-height: 55vh; margin: 0 auto .8rem;
  border-radius: .4rem; }
dl { display: grid; grid-template-columns: auto 1fr; gap: .2rem .8rem; margin: 0 0 1rem; }
dt { color: var(--dim); } dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 44rem) {
  main { padding: .7rem; }
  #version { display: none; }
  td > span { flex-wrap: wrap; justify-content: flex-end; min-width: 0; overflow-wrap: anywhere; }
  thead { position: absolute; left: -99rem; }
  tr { display: block; padding: .5rem 0; border-bottom: 1px solid var(--line); }
  tbody tr:last-child { border-bottom: 0; }
  td { display: flex; justify-content: space-between; gap: 1rem; border: 0; padding: .15rem 0; }
  td[data-label]::before { content: attr(data-label); color: var(--dim); }
  .upload { grid-template-columns: 1fr auto; }
}
"""

PAGE_BODY = """
<header>
  <h1>mkv</h1>
  <nav aria-label="views"><a href="#state">State</a><a href="#keys=">Keys</a></nav>
  <span id="version" class="dim"></span>
  <button id="sign-in">Token</button>
</header>
<main>
  <section id="state" aria-label="state" hidden>
    <p id="silence" class="down" role="alert"></p>
    <div id="tiles" class="tiles"></div>
    <div class="card">
      <h2>Volumes</h2>
      <table><thead><tr><th>name<th>state<th>zone<th class="number">share of bytes
        <th class="number">bytes<th>growth<th class="number">blobs<th>requests/s<th>errors/s
      </tr></thead><tbody id="volumes"></tbody></table>
      <p id="unconfigured" class="down"></p>
    </div>
  </section>
  <section id="keys" aria-label="keys" hidden>
    <div class="card" id="drop">
      <form class="bar" id="where">
        <button type="button" id="upwards" aria-label="one folder up">&uarr;</button>
        <input id="prefix" aria-label="prefix of the keys" placeholder="all keys"
          autocomplete="off" autocapitalize="off" spellcheck="false">
        <button>Show</button>
        <label class="button">Upload<input type="file" id="files" multiple></label>
      </form>
      <div id="uploads"></div>
      <table><thead><tr><th>key<th class="number">size<th>type<th>changed<th></tr></thead>
        <tbody id="list"></tbody></table>
      <p id="remark" class="dim" role="status"></p>
      <button id="more" hidden>More</button>
    </div>
  </section>
</main>
<dialog id="details" aria-label="a key"></dialog>
<dialog id="sure" aria-label="delete a key"></dialog>
<dialog id="token" aria-label="token">
  <form id="token-form">
    <h2>Token</h2>
    <p id="refusal" role="alert"></p>
    <p class="dim">It is kept until this tab is closed, and sent to this server only.</p>
    <div class="bar"><input type="password" id="secret" aria-label="secret of the token"
      autocomplete="off" pattern="[ -~]*"><button class="main">Use it</button>
      <button type="button" id="not-now">Not now</button></div>
  </form>
</dialog>
<div id="notice" role="status" hidden></div>
<noscript>This page needs JavaScript.</noscript>
"""

PAGE_SCRIPT = r"""
"use strict";
const REFRESH_MS = 2000, PATIENCE_MS = 4000, SAMPLES = 120, UPLOADS_AT_ONCE = 3;
const base = location.pathname.replace(/-\/$/, "");
const at = id => document.getElementById(id);

// -- making what is seen: text is only ever text --

function make(tag, attributes = {}, ...children) {
  const is_drawn = tag === "svg" || tag === "polyline";
  const space = is_drawn ? "http://www.w3.org/2000/svg" : "http://www.w3.org/1999/xhtml";
  const element = document.createElementNS(space, tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

// Whatever a key holds, it shows: what is invisible or turns text around, too, and blanks that a
// reader would not count. No two keys look the same but by their letters.
function show(text) {
  const odd = /(?! )[\p{C}\p{Z}]|^ | $| (?= )|\\(?=u)/gu;
  return text.replace(odd, c => "\\u" + c.codePointAt(0).toString(16).padStart(4, "0"));
}

function say(text) {
  at("notice").textContent = text;
  at("notice").hidden = false;
  clearTimeout(say.timer);
  say.timer = setTimeout(() => { at("notice").hidden = true; }, 6000);
}

function bytes(count) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
  let unit = 0;
  let value = Math.abs(count);
  while (value >= 1024 && unit < units.length - 1) { value /= 1024; unit += 1; }
  const digits = unit === 0 || value >= 100 ? 0 : 1;
  return `${count < 0 ? "\u2212" : ""}${value.toFixed(digits)} ${units[unit]}`;
}

const count = value => value.toLocaleString("en");
const rate = value => value >= 100 || value === 0 ? value.toFixed(0) : value.toFixed(1);

function plot(values, label, write) {
  const most = Math.max(...values, 0);
  const least = Math.min(...values, 0);
  const step = 100 / (Math.max(values.length, SAMPLES / 4) - 1);
  const points = values.map((value, i) => {
    const x = 100 - (values.length - 1 - i) * step;
    const y = 22 - 20 * (value - least) / (most - least || 1);
    return `${x.toFixed(1)},${y.toFixed(1)}`;
  });
  const told = `${label}: now ${write(newest(values))}, at most ${write(most)}`;
  return make("svg",
    { viewBox: "0 0 100 24", preserveAspectRatio: "none", role: "img", "aria-label": told },
    make("polyline", { points: points.join(" ") }));
}

// -- talking to the server --

function headers(more = {}) {
  const secret = sessionStorage.getItem("mkv-token");
  return secret ? { ...more, Authorization: `Bearer ${secret}` } : more;
}

// The whole key is one part of the path, so that no browser takes // or .. for something else.
const url = key => base + encodeURIComponent(key);

async function ask(path, options = {}) {
  const asked = { redirect: "manual", cache: "no-store", ...options };
  asked.headers = headers(options.headers);
  const answer = await fetch(path, asked);
  if (!answer.ok) {
    const problem = await answer.json().catch(() => ({}));
    const error = new Error(problem.detail || `the server answers ${answer.status}`);
    error.status = answer.status;
    if (error.status === 401) ask_for_token(error.message);
    throw error;
  }
  return answer;
}

function ask_for_token(reason) {
  at("refusal").textContent = reason;
  if (!at("token").open) at("token").showModal();
}

at("sign-in").onclick = () => ask_for_token("");
at("not-now").onclick = () => at("token").close();
at("token-form").onsubmit = event => {
  event.preventDefault();
  sessionStorage.setItem("mkv-token", at("secret").value.trim());
  at("secret").value = "";
  at("token").close();
  route();
};

// -- state --

let looks = [];  // when, and figures by their names; the newest is the last
let timer = 0;

// The sum of a metric's samples, or of those only that have such a label.
function total(metrics, name, label = "") {
  let sum = 0;
  for (const [, labels, value] of metrics.matchAll(RegExp(`^${name}\\{(.*)\\} (.*)$`, "gm"))) {
    if (labels.includes(label)) sum += Number(value);
  }
  return sum;
}

async function look() {
  const soon = { signal: AbortSignal.timeout(PATIENCE_MS) };
  const [state, metrics] = await Promise.all([
    ask(base + "-/status", soon).then(answer => answer.json()),
    ask(base + "-/metrics", soon).then(answer => answer.text()),
  ]);
  const figures = {
    keys: state.keys,
    bytes: state.bytes,
    garbage: state.garbage,
    requests: total(metrics, "mkv_http_requests_total"),
    errors: total(metrics, "mkv_http_requests_total", 'status="5'),
  };
  for (const one of state.volumes) {
    const its = `volume="${one.name}"`;
    figures["bytes " + one.name] = one.bytes;
    figures["requests " + one.name] = total(metrics, "mkv_volume_requests_total", its);
    figures["errors " + one.name] = total(metrics, "mkv_volume_errors_total", its);
  }
  looks = [...looks.slice(-SAMPLES), { at: performance.now(), figures }];
  return state;
}

const levels = name => looks.map(one => one.figures[name]);
const newest = values => values[values.length - 1] || 0;

// What has come a second, from one look to the next. A counter that falls has begun anew.
function rates(name, may_fall = false) {
  const changes = looks.slice(1).map((now, i) => {
    const change = now.figures[name] - looks[i].figures[name];
    return change < 0 && !may_fall ? NaN : change / ((now.at - looks[i].at) / 1000);
  });
  return changes.filter(Number.isFinite);
}

function tile(title, values, write, kind = "") {
  return make("div", { class: `card ${kind}` }, make("div", { class: "dim" }, title),
    make("div", { class: "figure" }, write(newest(values))), plot(values, title, write));
}

function cell(label, kind, ...children) {
  return make("td", { "data-label": label, class: kind }, make("span", {}, ...children));
}

function trend(label, values, write, kind = "") {
  return cell(label, `trend ${kind}`, plot(values, label, write), write(newest(values)));
}

const bad_if_any = values => newest(values) ? "bad" : "";

function volume_row(one, all_bytes, all_weight) {
  const share = all_bytes ? one.bytes / all_bytes : 0;
  const fair = all_weight ? one.weight / all_weight : 0;
  const percent = value => `${(100 * value).toFixed(1)} %`;
  const meter = make("meter", { value: share, title: `ideal: ${percent(fair)}` });
  const errors = rates("errors " + one.name);
  const advice = one.dialect === 1 ? ", replace nginx.conf" : "";
  const state = one.reason ? show(`${one.state}: ${one.reason}`) : one.state + advice;
  return make("tr", {},
    cell("name", "name", show(one.name)),
    cell("state", `state ${one.state}`, state),
    cell("zone", "", show(one.zone || "\u2013")),
    cell("share of bytes", "number", meter, `${percent(share)} of ${percent(fair)}`),
    cell("bytes", "number", bytes(one.bytes)),
    trend("growth", rates("bytes " + one.name, true), value => `${bytes(value)}/s`),
    cell("blobs", "number", count(one.blobs)),
    trend("requests/s", rates("requests " + one.name), rate),
    trend("errors/s", errors, rate, bad_if_any(errors)));
}

function draw(state) {
  const errors = rates("errors");
  at("version").textContent = `version ${state.version}`;
  at("tiles").replaceChildren(
    tile("keys", levels("keys"), count),
    tile("bytes", levels("bytes"), bytes),
    tile("garbage", levels("garbage"), count),
    tile("requests/s", rates("requests"), rate),
    tile("errors/s", errors, rate, bad_if_any(errors)),
  );
  const sum = name => state.volumes.reduce((so_far, one) => so_far + one[name], 0);
  const rows = state.volumes.map(one => volume_row(one, sum("bytes"), sum("weight")));
  at("volumes").replaceChildren(...rows);
  const lost = state.unconfigured.map(one => `${one.name} (${count(one.blobs)} blobs)`);
  at("unconfigured").textContent = lost.length
    ? `Keys are also on volumes that the configuration does not name: ${lost.join(", ")}` : "";
}

async function watch() {
  clearTimeout(timer);
  if (at("state").hidden) return;
  try {
    if (!document.hidden) {
      draw(await look());
      at("silence").textContent = "";
    }
  } catch (error) {
    at("silence").textContent = `The server does not say how it is: ${error.message}`;
    if (error.status === 401 || error.status === 403) return;  // until there is another token
  }
  clearTimeout(timer);
  timer = setTimeout(watch, REFRESH_MS);
}

// -- keys --

let prefix = "";
let following = "";
let generation = 0;

function go_to(where) {
  const hash = "#keys=" + encodeURIComponent(where);
  if (location.hash === hash) list();
  else location.hash = hash;
}

function folder_row(name) {
  const open = make("button", { class: "plain", onclick: () => go_to(name) },
    make("bdi", {}, show(name.slice(prefix.length))));
  return make("tr", { class: "folder" }, make("td", { class: "name", colspan: 5 }, open));
}

function key_row(one) {
  const name = make("bdi", {}, show(one.key.slice(prefix.length) || one.key));
  const open = make("button", { class: "plain", onclick: () => open_details(one) }, name);
  const fetch_it = make("button", { onclick: () => download(one) }, "Download");
  const remove = make("button", { class: "danger", onclick: () => ask_to_delete(one) }, "Delete");
  for (const button of [fetch_it, remove]) {
    button.setAttribute("aria-label", `${button.textContent} ${show(one.key)}`);
  }
  return make("tr", { class: "key" },
    make("td", { class: "name" }, open),
    cell("size", "number", bytes(one.size)),
    cell("type", "name", show(one.content_type)),
    cell("changed", "", new Date(one.modified).toLocaleString()),
    make("td", { class: "actions" }, fetch_it, " ", remove));
}

async function list(start = "") {
  const mine = ++generation;
  const asked = new URLSearchParams({ prefix, delimiter: "/", limit: "200", start });
  const query = asked.toString().replaceAll("+", "%20");
  try {
    const page = await (await ask(`${base}?${query}`)).json();
    if (mine !== generation) return;
    const rows = [...page.prefixes.map(folder_row), ...page.keys.map(key_row)];
    if (start) at("list").append(...rows);
    else at("list").replaceChildren(...rows);
    following = page.next;
    at("more").hidden = following === null;
    const is_empty = at("list").childElementCount === 0;
    at("remark").textContent = is_empty ? "No keys here. Drop files to upload them." : "";
  } catch (error) {
    if (mine === generation) at("remark").textContent = error.message;
  }
}

at("more").onclick = () => list(following);
at("where").onsubmit = event => {
  event.preventDefault();
  go_to(at("prefix").value);
};
at("upwards").onclick = () => go_to(prefix.replace(/[^/]*\/?$/, ""));

// -- reading a key: no image and no download shows a token, so ask for the link first --

async function link_to(one) {
  if (one.key === "." || one.key === "..") throw new Error("no browser can ask for this key");
  const answer = await ask(url(one.key), { headers: { Accept: "text/uri-list" } });
  const link = new URL((await answer.text()).trim(), location.href);
  if (link.origin !== location.origin || !sessionStorage.getItem("mkv-token")) return link.href;
  const blob = await (await ask(link.href)).blob();
  return URL.createObjectURL(blob);
}

async function download(one) {
  try {
    let link = await link_to(one);
    if (!link.startsWith("blob:")) link += (link.includes("?") ? "&" : "?") + "download=1";
    const name = one.key.slice(one.key.lastIndexOf("/") + 1);
    // In a tab of its own: what a volume says instead must not take the place of this page.
    const beside = { target: "_blank", rel: "noopener" };
    make("a", { href: link, download: name, ...beside }).click();
    if (link.startsWith("blob:")) setTimeout(() => URL.revokeObjectURL(link), 60000);
  } catch (error) {
    say(error.message);
  }
}

async function open_details(one) {
  const facts = make("dl");
  const rows = { size: `${count(one.size)} bytes`, type: one.content_type,
    changed: new Date(one.modified).toLocaleString(), "SHA-256": one.etag.slice(1, -1) };
  for (const [name, value] of Object.entries(rows)) {
    facts.append(make("dt", {}, name), make("dd", {}, show(value)));
  }
  const dialog = at("details");
  const close = make("button", { onclick: () => dialog.close() }, "Close");
  const fetch_it = make("button", { class: "main", onclick: () => download(one) }, "Download");
  const remove = make("button", { class: "danger", onclick: () => ask_to_delete(one) }, "Delete");
  const title = make("h2", { class: "name" }, make("bdi", {}, show(one.key)));
  dialog.replaceChildren(title, facts, make("div", { class: "bar" }, fetch_it, remove, close));
  dialog.showModal();
  if (!one.content_type.startsWith("image/")) return;
  try {
    const image = make("img", { alt: show(one.key), src: await link_to(one) });
    image.onload = () => URL.revokeObjectURL(image.src);  // it has been read
    image.onerror = () => image.replaceWith("This image cannot be shown.");
    title.after(image);
  } catch (error) {
    say(error.message);
  }
}

function ask_to_delete(one) {
  const dialog = at("sure");
  const remove = async () => {
    dialog.close();
    at("details").close();
    try {
      await ask(url(one.key), { method: "DELETE", headers: { "If-Match": one.etag } });
      say(`Deleted ${show(one.key)}`);
    } catch (error) {
      say(error.status === 412 ? "It has changed meanwhile, and stays." : error.message);
    }
    list();
  };
  dialog.replaceChildren(
    make("h2", { class: "name" }, "Delete ", make("bdi", {}, show(one.key)), "?"),
    make("p", { class: "dim" }, "It cannot be brought back."),
    make("div", { class: "bar" },
      make("button", { class: "danger", onclick: remove }, "Delete it"),
      make("button", { autofocus: "", onclick: () => dialog.close() }, "Keep it")));
  dialog.showModal();
}

// -- uploads --

const waiting = new Set();
let under_way = 0;

function upload(files) {
  for (const file of files) {
    const row = make("div", { class: "upload" });
    at("uploads").append(row);
    enqueue(file, prefix + file.name, row, { "If-None-Match": "*" });
  }
}

function enqueue(file, key, row, conditions) {
  const label = `upload of ${show(key)}`;
  const bar = make("progress", { max: file.size || 1, value: 0, "aria-label": label });
  const done = make("span", { class: "dim" }, "waits");
  const button = make("button", {}, "Cancel");
  const job = { file, key, row, conditions, bar, done, button };
  button.onclick = () => { waiting.delete(job); row.remove(); };
  row.replaceChildren(make("bdi", {}, show(key)), bar, done, button);
  waiting.add(job);
  start_uploads();
}

function start_uploads() {
  for (const job of waiting) {
    if (under_way >= UPLOADS_AT_ONCE) return;
    waiting.delete(job);
    under_way += 1;
    send(job);
  }
}

function send({ file, key, row, conditions, bar, done, button }) {
  const request = new XMLHttpRequest();
  request.open("PUT", url(key));
  for (const [name, value] of Object.entries(headers(conditions))) {
    request.setRequestHeader(name, value);
  }
  done.textContent = "begins";
  button.onclick = () => request.abort();
  request.upload.onprogress = event => {
    bar.value = event.loaded;
    done.textContent = `${bytes(event.loaded)} of ${bytes(file.size)}`;
  };
  request.onloadend = () => {
    under_way -= 1;
    button.textContent = "Close";
    button.onclick = () => row.remove();
    done.textContent = outcome(request.status, request.responseText);
    if (request.status === 201 || request.status === 204) {
      bar.value = bar.max;
      setTimeout(button.onclick, 4000);
    } else if (request.status === 412) {
      button.textContent = "Replace";
      button.onclick = () => enqueue(file, key, row, {});
    } else if (request.status === 401) {
      ask_for_token(done.textContent);
    }
    start_uploads();
    if (!waiting.size) list();  // once for many
  };
  request.send(file);
}

function outcome(status, text) {
  if (status === 201 || status === 204) return "stored";
  if (status === 412) return "is there already";
  if (status === 0) return "cut off";
  try { return JSON.parse(text).detail; } catch { return `refused with ${status}`; }
}

at("files").onchange = event => {
  upload([...event.target.files]);
  event.target.value = "";
};
// Files may be dropped anywhere: whatever misses would take the place of the page.
for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, event => {
    if (!event.dataTransfer.types.includes("Files")) return;
    event.preventDefault();
    at("drop").classList.toggle("over", kind === "dragenter" || kind === "dragover");
    if (kind === "drop" && !at("keys").hidden) drop([...event.dataTransfer.items]);
  });
}

function drop(items) {
  const files = items.filter(item => item.kind === "file");
  const is_folder = item => Boolean(item.webkitGetAsEntry?.()?.isDirectory);
  if (files.some(is_folder)) say("Folders are for mkv_tools.py put; files are uploaded.");
  upload(files.filter(item => !is_folder(item)).map(item => item.getAsFile()));
}

addEventListener("beforeunload", event => {
  if (under_way || waiting.size) event.preventDefault();
});

// -- which view --

function route() {
  const hash = location.hash.slice(1);
  const shows_keys = hash.startsWith("keys=");
  at("state").hidden = shows_keys;
  at("keys").hidden = !shows_keys;
  for (const link of document.querySelectorAll("nav a")) {
    link.setAttribute("aria-current", link.hash === (shows_keys ? "#keys=" : "#state"));
  }
  if (!shows_keys) {
    watch();
    return;
  }
  try { prefix = decodeURIComponent(hash.slice("keys=".length)); } catch { prefix = ""; }
  at("prefix").value = prefix;
  at("upwards").disabled = prefix === "";
  at("list").replaceChildren();  // what is there is of another prefix, or by another token
  at("more").hidden = true;
  list();
}

addEventListener("hashchange", route);
document.addEventListener("visibilitychange", () => { if (!document.hidden) watch(); });
route();
"""


def source_of(text: str) -> str:
    """Return what a Content-Security-Policy calls a script or a style with this text."""
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


PAGE = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>mkv</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,"><style>{PAGE_STYLE}</style></head>
<body>{PAGE_BODY}<script>{PAGE_SCRIPT}</script></body></html>
""".encode()
PAGE_POLICY = (
    f"default-src 'none'; script-src {source_of(PAGE_SCRIPT)}; style-src {source_of(PAGE_STYLE)}; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; "
    "img-src 'self' blob: data:"
)


def image_source(url: str) -> str:
    """Return what a policy calls the place of `url`. It has no words for an IPv6 address or a
    name with _: then it allows all places."""
    parts = urlsplit(url)
    can_be_said = re.fullmatch(r"[A-Za-z0-9.:-]+", parts.netloc)
    return f"{parts.scheme}://{parts.netloc}" if can_be_said else f"{parts.scheme}:"


def page_headers(config: Config) -> dict[str, str]:
    """Return what is sent with the page: images come from where redirects lead, nothing else from
    anywhere. A proxy that reads for the page hides the volumes, so it is not told where they
    are."""
    images = set[str]()
    if config.read == "redirect":
        images = {image_source(one.public_url) for one in config.volumes}
    return {
        "Content-Type": "text/html; charset=utf-8",
        "Content-Security-Policy": " ".join([PAGE_POLICY, *sorted(images)]),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Opener-Policy": "same-origin",
    }


# == Requests and responses =======================================================================
# Handlers take a request value and return a response value, and know no server: what serves them
# fills and renders these. Errors become answers in one place.

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
TRACEPARENT = re.compile(  # by the W3C
    r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}"
)
RATE_GRACE_S = 30.0  # before min_body_rate counts: a connection may be slow to start
JSON_TYPE = "application/json; charset=utf-8"
LINK_TYPE = "text/uri-list"  # RFC 2483; who accepts just that gets the link instead of a redirect
HEALTH_CHECKS = ("/-/livez", "/-/readyz")  # asked every few seconds: no line while all is well
MAX_SIZE = 2**62  # bytes of a blob; nginx has 63 bits for a Content-Length, aiohttp's parser 64


class Body(Protocol):
    """The body of a request, as it comes. A client that waits to be asked is asked by the first
    read."""

    async def read(self, timeout_s: float) -> bytes:
        """Return what has come since, nothing at the end. Raises BadRequest if it is cut short or
        malformed, TooSlow if nothing comes for `timeout_s`."""

    def is_abandoned(self) -> bool:
        """Whether the client has hung up: nobody will hear the answer."""


class NoBody:
    """The body of a request that has none, or none that is read."""

    async def read(self, timeout_s: float) -> bytes:
        return b""

    def is_abandoned(self) -> bool:
        return False


NO_BODY = NoBody()


class Request(NamedTuple):
    """What a client asks for."""

    method: str
    target: str  # as it was sent (RFC 9112, 3.2)
    # names in lower case; what is given more than once is joined by ", "
    headers: Mapping[str, str]
    peer: str  # the client's address
    length: int | None  # bytes of the body; None: chunked
    body: Body
    prefix: str = ""  # where in another application the store is, such as "/blobs"


@dataclass(slots=True)
class Response:
    """What a client is answered. The answer to HEAD has a Content-Length of its own, and no
    body."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


def explain(error: MkvError, request_id: str) -> Response:
    """Render an error as problem details (RFC 9457)."""
    detail = json.dumps(str(error))
    body = f'{{"title": "{error.title}", "status": {error.status}, "detail": {detail}, '
    body += f'"request_id": "{request_id}"}}\n'
    headers = {
        **error.headers,
        "Content-Type": "application/problem+json",
        "X-Request-ID": request_id,
        "Server": "mkv",
    }
    return Response(error.status, headers, body.encode())


def explain_all(error: BaseException, request_id: str) -> Response:
    """Render whatever went wrong; what no client is to blame for goes into the log."""
    if isinstance(error, asyncio.CancelledError):
        return explain(Unavailable("the server stops"), request_id)
    if isinstance(error, IndexFailed):
        log.error("%s", error)
    if isinstance(error, MkvError):
        return explain(error, request_id)
    log.error("unexpected error, request %s", request_id, exc_info=error)
    return explain(
        MkvError("this is a bug in mkv; its log has more under this request_id"), request_id
    )


def draw_request_id() -> str:
    return f"{random.getrandbits(64):016x}"


class Call:
    """One request on its way: its handlers, and what the log says of it. From `begin` to `finish`
    it is under way."""

    path = ""
    query = ""
    key = ""
    prefix = ""  # of a list
    who = ""
    only_creates = False  # by whoever may not write keys that are there
    volumes: tuple[str, ...] = ()
    size = 0
    trace = ""

    def __init__(self, store: Store, request: Request) -> None:
        self.store = store
        self.request = request
        headers = request.headers
        given = headers.get("x-request-id")
        self.id = given if given and REQUEST_ID.fullmatch(given) else draw_request_id()
        trace = headers.get("traceparent")
        if trace and TRACEPARENT.fullmatch(trace):
            self.trace = trace
        self._began = time.perf_counter()
        store.count_in_flight(1)

    @property
    def trail(self) -> str:
        """Header lines that tell volumes which request is behind theirs."""
        return f"X-Request-ID: {self.id}\r\n" + (
            f"traceparent: {self.trace}\r\n" if self.trace else ""
        )

    async def answer(self) -> Response:
        """Carry the request out; raises nothing but CancelledError."""
        try:
            handler = self.begin()
            response = await handler(self)
        except Exception as error:
            return self.finish(explain_all(error, self.id))
        except BaseException:
            self.store.count_in_flight(-1)
            raise
        return self.finish(response)

    def begin(self) -> Handler:
        """Check who asks for what; return who handles it."""
        request = self.request
        method = request.method
        headers = request.headers
        if "expect" in headers and headers["expect"].lower() != "100-continue":
            raise BadRequest("Expect: only 100-continue is known here")
        if request.length is None and headers["transfer-encoding"].lower() != "chunked":
            raise UnknownCoding("Transfer-Encoding: only chunked is known here")
        if request.target == "*" and method == "OPTIONS":  # of the server as a whole
            return Call.tell_options
        self.path, self.query = split_target(
            request.target, request.prefix, headers.get("host", "")
        )
        found = ON_PATH.get(self.path)
        if found is not None and not (self.path == "/" and method in ("PUT", "DELETE")):
            handler, operation = found
            check_method(method, ON_REPORT)
            if method == "OPTIONS":
                return Call.tell_options
            if operation == "list":
                self.prefix = parse_list_query(self.query).prefix
            scope = self.prefix
        else:
            check_method(method, ON_KEY)
            handler, operation = ON_KEY[method]
            if method in ("PUT", "DELETE") and "?" in request.target:  # readers do no harm
                raise BadRequest("a key ends where a query begins: write ? as %3F")
            scope = self.key = key_of_path(self.path)
        config = self.store.view.config
        if operation:
            shown = headers.get("authorization")
            try:
                self.who = authorize(config.tokens, config.anonymous, shown, operation, scope)
            except (Unauthorized, Forbidden):
                if operation != "write":
                    raise
                self.who = authorize(config.tokens, config.anonymous, shown, "create", scope)
                self.only_creates = True
        return handler

    def read(self, found: Record | None) -> Response:
        """Answer a GET or HEAD of a key."""
        record, verdict = judge_read(found, parse_conditions(self.request.headers))
        self.volumes = record.volumes
        headers = {"ETag": record.etag, "Mkv-Volumes": ",".join(record.volumes)}
        accel = self.store.view.config.read == "accel"
        if accel:  # who reads sees the blob at the URL of the key, where another may come
            headers["Cache-Control"] = "private, no-cache"
        if verdict is Verdict.NOT_MODIFIED:
            return Response(304, headers)
        if self.request.method == "GET":
            link = self.request.prefix + self.path if accel else self.store.locate(record)
            if self.request.headers.get("accept") == LINK_TYPE:
                headers["Content-Type"] = LINK_TYPE
                return Response(200, headers, f"{link}\r\n".encode())
            if accel:
                return self._let_proxy_read(record, headers)
            headers["Location"] = link
            return Response(302, headers)
        headers["Content-Length"] = str(record.size)
        headers["Content-Type"] = served_type(type_in_link(record.content_type))
        if record.modified_s <= time.time():
            headers["Last-Modified"] = record.modified
        if accel:
            headers["Accept-Ranges"] = "bytes"
        headers["Repr-Digest"] = (
            f"sha-256=:{base64.b64encode(bytes.fromhex(record.digest)).decode()}:"
        )
        return Response(200, headers)

    def _let_proxy_read(self, record: Record, headers: dict[str, str]) -> Response:
        """Answer a GET so that an nginx in front reads the blob, as README.md's does."""
        link, other = self.store.locate_inside(record)
        headers["Location"] = link
        headers["Mkv-Other"] = other
        headers["X-Accel-Redirect"] = "@mkv_volume"
        headers["Mkv-Range"] = decide_range(self.request.headers, record)
        if record.modified_s <= time.time():
            headers["Last-Modified"] = record.modified
        return Response(302, headers)

    async def put(self) -> Response:
        store = self.store
        draft = self._read_draft()
        if store.uploads >= store.view.config.max_uploads:
            raise Unavailable("too many uploads at once")
        store.uploads += 1
        try:
            record, created = await store.put(draft, self._read_body(), self.trail, self.is_heard)
        except PreconditionFailed:
            if self.only_creates and self.request.headers.get("if-none-match") != "*":
                # Not 412, which is for conditions that the client has set. It tells no more than
                # that: whether those held would say something of a blob that it may not read.
                raise Forbidden(f"{self.who} may only create keys that are not there") from None
            raise
        finally:
            store.uploads -= 1
        self.volumes = record.volumes
        return Response(201 if created else 204, {"ETag": record.etag})

    def is_heard(self) -> bool:
        """Whether the client still waits for the answer."""
        return not self.request.body.is_abandoned()

    def _read_draft(self) -> Draft:
        """Read the headers of a PUT; raises BadRequest, UnsupportedEncoding, TooLarge."""
        headers = self.request.headers
        size = self.request.length
        limit = self.store.view.config.max_blob_size
        if headers.get("content-encoding", "identity").lower() != "identity":
            raise UnsupportedEncoding("Content-Encoding is refused: a blob is stored as it is")
        if "content-range" in headers:
            raise BadRequest(
                "Content-Range is refused: a blob is written as a whole (RFC 9110, 14.5)"
            )
        if size and size > (limit or MAX_SIZE):
            raise TooLarge(f"a blob has at most {limit or MAX_SIZE} bytes")
        content_type, ext = media_type_of(headers.get("content-type"), self.key)
        conditions = parse_conditions(headers)
        if self.only_creates:
            conditions = only_if_absent(conditions)
        return Draft(self.key, content_type, ext, size, conditions, parse_digests(headers))

    async def _read_body(self) -> AsyncIterator[bytes]:
        """Yield the body as it comes; raises BadRequest if it is cut short, TooSlow, TooLarge."""
        body = self.request.body
        began = time.monotonic()
        while chunk := await body.read(self.store.view.config.body_timeout):
            config = self.store.view.config
            self.size += len(chunk)
            self.store.metrics.add("mkv_received_bytes_total", len(chunk))
            if config.max_blob_size and self.size > config.max_blob_size:
                raise TooLarge(f"a blob has at most {config.max_blob_size} bytes")
            elapsed_s = time.monotonic() - began
            if elapsed_s > RATE_GRACE_S and self.size < config.min_body_rate * elapsed_s:
                raise TooSlow(f"the body comes with less than {config.min_body_rate:g} bytes/s")
            yield chunk

    async def delete(self) -> Response:
        await self.store.delete(self.key, parse_conditions(self.request.headers), self.trail)
        return Response(204)

    async def list(self) -> Response:
        self.store.limit_lists(self.request.peer, time.monotonic())
        body = await self.store.list(parse_list_query(self.query))
        self.size = len(body)
        return Response(200, {"Content-Type": JSON_TYPE}, body)

    async def show_page(self) -> Response:
        return Response(200, page_headers(self.store.view.config), PAGE)

    async def report(self) -> Response:
        plain = {"Content-Type": "text/plain; charset=utf-8"}
        match self.path:
            case "/-/livez":
                return Response(200, plain, b"alive\n")
            case "/-/readyz":
                await self.store.check_ready()
                return Response(200, plain, b"ready\n")
            case "/-/status":
                status = json.dumps(await self.store.status()) + "\n"
                return Response(200, {"Content-Type": JSON_TYPE}, status.encode())
        body = (await self.store.render_metrics()).encode()
        return Response(200, {"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}, body)

    async def tell_options(self) -> Response:
        """Answer OPTIONS, which a browser sends before what a page of another origin asks for.
        That needs no token: a browser shows none then."""
        allowed = ", ".join(sorted(ON_REPORT if self.path in ON_PATH else ON_KEY))
        headers = {"Allow": allowed}
        origins = self.store.view.config.cors_origins
        told = decide_cors(origins, self.request.headers.get("origin", ""), RESPONSE_HEADERS)
        if "Access-Control-Allow-Origin" in told:
            headers["Access-Control-Allow-Methods"] = allowed
            headers["Access-Control-Allow-Headers"] = REQUEST_HEADERS
            headers["Access-Control-Max-Age"] = "7200"  # s; Chromium keeps it no longer
        return Response(204, headers)

    def finish(self, response: Response) -> Response:
        """Complete the answer; count the request and write its line."""
        store = self.store
        config = store.view.config
        seconds = time.perf_counter() - self._began
        method = self.request.method
        store.count_in_flight(-1)
        response.headers["X-Request-ID"] = self.id
        response.headers["Server"] = "mkv"
        response.headers.setdefault("Cache-Control", "no-store")  # it may change any time
        if config.cors_origins:
            origin = self.request.headers.get("origin", "")
            response.headers |= decide_cors(config.cors_origins, origin, RESPONSE_HEADERS)
        store.metrics.count_request(
            method if method in METHODS else "other", response.status, seconds
        )
        is_health_check = response.status == 200 and self.path in HEALTH_CHECKS
        if config.access_log and not is_health_check:
            store.note_access(self.describe(response.status, seconds))
        return response

    def describe(self, status: int, seconds: float) -> dict[str, Any]:
        """Return what the access log says."""
        facts: dict[str, Any] = {
            "id": self.id, "client": self.request.peer, "method": self.request.method,
            "key": self.key or self.path or self.request.target.partition("?")[0],
            "status": status, "bytes": self.size, "ms": round(seconds * 1000, 2),
        }  # fmt: skip
        if self.prefix:
            facts["prefix"] = self.prefix
        if self.volumes:
            facts["volumes"] = ",".join(self.volumes)
        if self.who:
            facts["token"] = self.who
        if self.trace:
            facts["trace"] = self.trace
        return facts


def check_method(method: str, allowed: Iterable[str]) -> None:
    """Raise MethodNotAllowed unless `method` is among these."""
    if method not in allowed:
        names = ", ".join(sorted(allowed))
        raise MethodNotAllowed(f"this resource answers {names}", Allow=names)


async def read_key(call: Call) -> Response:
    return call.read(await call.store.index.get(call.key))


Handler = Callable[[Call], Awaitable[Response]]
Route = tuple[Handler, str]  # and what a token must allow (none: open)
ON_PATH: Mapping[str, Route] = {
    "/": (Call.list, "list"), "/-/livez": (Call.report, ""), "/-/readyz": (Call.report, ""),
    "/-/status": (Call.report, "admin"), "/-/metrics": (Call.report, "admin"),
    "/-/": (Call.show_page, ""),
}  # fmt: skip
ON_REPORT = ("GET", "HEAD", "OPTIONS")
ON_KEY: Mapping[str, Route] = {
    "GET": (read_key, "read"), "HEAD": (read_key, "read"), "PUT": (Call.put, "write"),
    "DELETE": (Call.delete, "delete"), "OPTIONS": (Call.tell_options, ""),
}  # fmt: skip
# What browser applications of other origins may send, and see.
REQUEST_HEADERS = (
    "Accept, Authorization, Content-Digest, Content-MD5, Content-Type, If-Match, "
    "If-Modified-Since, If-None-Match, If-Range, If-Unmodified-Since, Range, Repr-Digest, "
    "traceparent, X-Request-ID"
)
RESPONSE_HEADERS = "Allow, ETag, Mkv-Volumes, Repr-Digest, Retry-After, X-Request-ID"


# == Server =======================================================================================
# Serves clients over HTTP/1.x. A client's requests are answered one after the other, in the order
# in which they came; what a connection may do next is the table below, and nothing else. A handler
# knows nothing of this: it reads a body, and returns an answer.
#
# Every limit is looked up when it begins to count, so a reload changes it for all connections:
#
#   FRESH, IDLE   `header_timeout` for the first request to begin, `keepalive_timeout` for another;
#                 then the connection is closed without a word, as if it had not been there
#   HEAD          `header_timeout` from its first byte, MAX_HEAD bytes; then 408 or 431
#   BODY          `body_timeout` while somebody reads the body, BODY_BUFFER bytes that wait;
#                 nothing while nobody does: that volumes are slow is not the client's fault
#   ANSWER        nothing: the work is bounded by the limits on volumes and index
#   LINGER        LINGER_S. An answer that leaves a body unread is the last. To close at once would
#                 be a reset, which may overtake it: so we say that nothing more comes, and throw
#                 away what the client sends until it has heard
#
# and in all of them `send_timeout`: a client that takes hardly anything of its answers is dropped,
# and none of its requests is begun before it has taken them. One timer looks after all deadlines.

BODY_BUFFER = 128 * 1024  # bytes of a body that wait before a client must
LINGER_S = 2.0
LINGER_PAUSE_S = 0.005  # after each read: so it costs little, and comes to 100 MB at most
RESET = struct.pack("ii", 1, 0)  # to close by one (socket(7))
AT_ONCE = 16  # requests of one client that are answered before others get their turn
SWEEP_S = 0.1  # between two looks at all deadlines
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class Stage(enum.IntEnum):  # of Int: what is looked up by it is found without a call
    """Where a connection is."""

    FRESH = enum.auto()  # nothing has come yet
    IDLE = enum.auto()  # nothing of the next request has come
    HEAD = enum.auto()  # a part of its head has
    BODY = enum.auto()  # it is under way, and its body is not whole
    ANSWER = enum.auto()  # it is under way, and its body is whole
    LINGER = enum.auto()  # its answer was the last
    LOST = enum.auto()  # there is no connection any more


class Move(enum.IntEnum):
    """What happens to a connection."""

    BEGIN = enum.auto()  # the first bytes of a head
    ASK = enum.auto()  # a head is whole, or refused
    ASK_ALL = enum.auto()  # a head is whole, and there is no body
    FILL = enum.auto()  # the body is whole
    GO_ON = enum.auto()  # the answer is written, another request may follow
    END = enum.auto()  # the answer is written, it was the last
    LOSE = enum.auto()  # the transport has closed


MOVES: Mapping[Stage, Mapping[Move, Stage]] = {
    Stage.FRESH: {
        Move.BEGIN: Stage.HEAD,
        Move.ASK: Stage.BODY,
        Move.ASK_ALL: Stage.ANSWER,
        Move.LOSE: Stage.LOST,
    },
    Stage.IDLE: {
        Move.BEGIN: Stage.HEAD,
        Move.ASK: Stage.BODY,
        Move.ASK_ALL: Stage.ANSWER,
        Move.LOSE: Stage.LOST,
    },
    Stage.HEAD: {Move.ASK: Stage.BODY, Move.ASK_ALL: Stage.ANSWER, Move.LOSE: Stage.LOST},
    Stage.BODY: {Move.FILL: Stage.ANSWER, Move.END: Stage.LINGER, Move.LOSE: Stage.LOST},
    Stage.ANSWER: {Move.GO_ON: Stage.IDLE, Move.END: Stage.LINGER, Move.LOSE: Stage.LOST},
    Stage.LINGER: {Move.LOSE: Stage.LOST},
    Stage.LOST: {},
}
AWAITED = (Stage.IDLE, Stage.FRESH, Stage.HEAD)  # a request is
UNDER_WAY = (Stage.BODY, Stage.ANSWER)


def drop_connection(transport: asyncio.Transport) -> None:
    """End a connection by a reset: else the kernel keeps what nobody takes."""
    kernel: socket.socket = transport.get_extra_info("socket")
    kernel.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    transport.abort()


class ClientBody:
    """The body of the request that is under way on a connection."""

    def __init__(self, connection: Connection, fields: Fields) -> None:
        self.is_whole = fields.length == 0
        self._connection = connection
        self._left = fields.length or 0  # bytes
        self._chunks = ChunkDecoder(frugal=True) if fields.length is None else None
        self._waits_to_be_asked = fields.expects
        self._held = list[bytes]()
        self._failure: MkvError | None = None
        self._waiter: asyncio.Future[None] | None = None

    def feed(self, data: bytes) -> bytes:
        """Take what is of the body in `data`; return what comes behind it."""
        if self._failure is not None:
            return b""
        try:
            piece, rest = self._chunks.decode(data) if self._chunks else self._cut(data)
        except ValueError as error:
            self.fail(BadRequest(f"the body's chunks are malformed: {error}"))
            return b""
        if rest and not may_begin_request(rest):
            self.fail(BadRequest("the body is longer than its length"))
            return b""
        if piece:
            self._held.append(piece)
        self.is_whole = self._chunks.done if self._chunks else not self._left
        wake(self._waiter)
        if not self.is_whole and sum(map(len, self._held)) > BODY_BUFFER:
            self._connection.pause_reading()
        return rest

    def _cut(self, data: bytes) -> tuple[bytes, bytes]:
        piece = data[: self._left]
        self._left -= len(piece)
        return piece, data[len(piece) :]

    def fail(self, error: MkvError) -> None:
        """Let whoever reads have this, unless all is there."""
        if not self.is_whole and self._failure is None:
            self._failure = error
            wake(self._waiter)

    def is_abandoned(self) -> bool:
        return self._connection.has_hung_up

    async def read(self, timeout_s: float) -> bytes:
        if self._waits_to_be_asked:
            self._waits_to_be_asked = False
            if not self._held:
                self._connection.write(CONTINUE)
        while self._failure is None and not self._held and not self.is_whole:
            self._waiter = asyncio.get_running_loop().create_future()
            self._connection.wait_for_body(timeout_s)
            await self._waiter
            self._waiter = None
            self._connection.deadline_s = math.inf
        if self._failure is not None:
            raise self._failure
        piece = b"".join(self._held)
        self._held.clear()
        return piece


class Connection(asyncio.Protocol):
    """A client's connection."""

    def __init__(self, server: Server) -> None:
        self.deadline_s = math.inf  # of the loop's clock
        self._server = server
        self._stage = Stage.FRESH
        self._peer = ""
        self._buffer = b""  # what no request has taken yet
        self._body: ClientBody | None = None  # of the request under way
        self._is_serving = False  # within serve_next
        self._is_reading = True
        self._is_writable = True
        self._has_ended = False  # the client sends nothing more
        self._untaken = 0  # bytes that the client had not taken when that was looked at

    @property
    def has_hung_up(self) -> bool:
        return self._stage is Stage.LOST or self._has_ended

    @property
    def is_idle(self) -> bool:
        return self._stage not in UNDER_WAY

    def _move(self, move: Move) -> None:
        self._stage = MOVES[self._stage][move]

    # -- what the transport says --

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=0)  # see pause_writing
        self._peer = (transport.get_extra_info("peername") or ("",))[0]
        self._wait(self._server.config.header_timeout)
        if not self._server.admit(self, self._peer):
            self._transport.close()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._move(Move.LOSE)
        self._server.forget(self, self._peer)
        if self._body is not None:
            self._body.fail(BadRequest("the body was cut short: the client has gone"))

    def eof_received(self) -> bool:
        """Hear that nothing more comes; return whether there is still something to be said."""
        self._has_ended = True
        if self._body is not None:
            self._body.fail(BadRequest("the body was cut short"))
        return self._stage in UNDER_WAY or (self._stage is Stage.IDLE and bool(self._buffer))

    def data_received(self, data: bytes) -> None:
        if self._stage is Stage.LINGER:
            self.pause_reading()
            self._server.loop.call_later(LINGER_PAUSE_S, self.resume_reading)
            return
        if self._stage is Stage.BODY:
            data = self._feed(data)
        self._buffer += data
        self.serve_next()
        if len(self._buffer) > MAX_HEAD:  # until one of the requests that wait there is answered
            self.pause_reading()

    def _feed(self, data: bytes) -> bytes:
        """Give the body its part of what has come; return the rest."""
        assert self._body is not None
        rest = self._body.feed(data)
        if self._body.is_whole:
            self._move(Move.FILL)
        return rest

    def pause_writing(self) -> None:
        """Watch the client: some of its answer could not be sent at once."""
        self._is_writable = False
        self._untaken = count_untaken(self._transport)
        self._wait(self._server.config.send_timeout)

    def resume_writing(self) -> None:
        self._is_writable = True
        if self._stage is Stage.IDLE:
            self._wait(self._server.config.keepalive_timeout)
            self.serve_next()

    # -- requests --

    def serve_next(self) -> None:
        """Begin with the requests that are there, one after the other, unless one is under way."""
        if self._is_serving:
            return
        self._is_serving = True
        for _ in range(AT_ONCE):
            if not self._take_request():
                break
        else:
            self._server.loop.call_soon(self.serve_next)
        self._is_serving = False

    def _take_request(self) -> bool:
        """Begin with the next request; return whether another could be looked for."""
        if not self._buffer or self._stage not in AWAITED or not self._is_writable:
            return False
        if self._buffer.startswith(b"\r\n"):  # RFC 9112, 2.2
            self._buffer = EMPTY_LINES.sub(b"", self._buffer, 1)
            return True
        end = self._buffer.find(b"\r\n\r\n") + 4
        if end < 4 and may_become_head(self._buffer):
            self._wait_for_head()
            return False
        try:
            head = parse_request_head(self._buffer[:end] if end >= 4 else self._buffer)
        except MkvError as error:
            self._refuse(error)
            return False
        self._buffer = self._buffer[end:]
        self._begin(head)
        return True

    def _wait_for_head(self) -> None:
        if self._has_ended:
            self._transport.close()
        elif self._stage is Stage.FRESH:  # its time began with the connection
            self._move(Move.BEGIN)
        elif self._stage is Stage.IDLE:
            self._move(Move.BEGIN)
            self._wait(self._server.config.header_timeout)

    def _refuse(self, error: MkvError) -> None:
        """Answer what is no request, or not a whole one in time: nobody knows where it ends."""
        head = salvage_head(self._buffer)
        self._buffer = b""
        self._move(Move.ASK)
        self.deadline_s = math.inf
        request = Request(head.method, head.target, head.fields.headers, self._peer, None, NO_BODY)
        call = Call(self._server.store, request)
        self._respond(call, head, explain_all(error, call.id))

    def _begin(self, head: RequestHead) -> None:
        fields = head.fields
        self._move(Move.ASK if fields.length != 0 else Move.ASK_ALL)
        self.deadline_s = math.inf
        body: Body = NO_BODY
        if fields.length != 0 or head.method == "PUT":
            self._body = body = ClientBody(self, fields)
            if self._buffer and fields.length != 0:
                self._buffer = self._feed(self._buffer)
        request = Request(
            head.method, head.target, fields.headers, self._peer, fields.length, body
        )
        call = Call(self._server.store, request)
        try:
            handler = call.begin()
        except Exception as error:
            self._respond(call, head, explain_all(error, call.id))
            return
        if handler is read_key:  # by a callback: a task would cost more than all the rest
            self._server.store.index.ask(call.key, partial(self._found, call, head))
        else:
            self._server.start(self._work(call, head, handler))

    def _found(self, call: Call, head: RequestHead, found: Record | Exception | None) -> None:
        """Do what read_key does after its lookup."""
        try:
            if isinstance(found, Exception):
                raise found
            response = call.read(found)
        except Exception as error:
            response = explain_all(error, call.id)
        self._respond(call, head, response)

    async def _work(self, call: Call, head: RequestHead, handler: Handler) -> None:
        try:
            response = await handler(call)
        except (Exception, asyncio.CancelledError) as error:
            response = explain_all(error, call.id)
        self._respond(call, head, response)

    def _respond(self, call: Call, head: RequestHead, response: Response) -> None:
        """Send the answer, and go on with the next request, if one may follow."""
        response = call.finish(response)
        if self._stage is Stage.LOST:
            return
        connection = head.fields.connection
        may_go_on = self._stage is Stage.ANSWER and not self._server.store.stopping
        if not may_go_on or (self._has_ended and not self._buffer):
            connection = "close"
        if response.status not in (204, 304):
            response.headers.setdefault("Content-Length", str(len(response.body)))
        date = http_date(int(time.time()))
        data = encode_response_head(response.status, response.headers, date, connection)
        if head.method != "HEAD":
            data += response.body
        self._wait(self._server.config.keepalive_timeout)
        self._transport.write(data)
        if connection == "close":
            self._end()
            return
        self._move(Move.GO_ON)
        self._body = None
        if not self._is_reading:
            self.resume_reading()
        self.serve_next()

    def _end(self) -> None:
        """Close once the answer is on its way."""
        is_all_read = self._stage is Stage.ANSWER and not self._buffer
        self._buffer = b""
        self._move(Move.END)
        if is_all_read or self._has_ended:
            self._transport.close()
            return
        self._transport.write_eof()
        self.resume_reading()
        self._wait(LINGER_S)

    # -- patience --

    def _wait(self, timeout_s: float) -> None:
        self.deadline_s = self._server.loop.time() + timeout_s

    def wait_for_body(self, timeout_s: float) -> None:
        if not self._is_reading:
            self.resume_reading()
        self._wait(timeout_s)

    def run_out(self) -> None:
        """Do what is to be done when the deadline has passed."""
        if not self._is_writable:
            self._check_reader()
        elif self._stage in UNDER_WAY:
            self.deadline_s = math.inf
            if self._body is not None:
                wait_s = self._server.config.body_timeout
                self._body.fail(TooSlow(f"no byte of the body for {wait_s:g} s"))
        elif self._stage is Stage.HEAD:
            wait_s = self._server.config.header_timeout
            self._refuse(TooSlow(f"the head of the request is not whole after {wait_s:g} s"))
        elif self._stage is Stage.LINGER:
            self._transport.abort()
        else:
            self._transport.close()

    def _check_reader(self) -> None:
        """Drop a client that has taken hardly anything since this was looked at."""
        config = self._server.config
        before = self._untaken
        self._untaken = count_untaken(self._transport)
        if before - self._untaken <= config.min_body_rate * config.send_timeout:
            drop_connection(self._transport)
        else:
            self._wait(config.send_timeout)

    def pause_reading(self) -> None:
        if self._is_reading:
            self._is_reading = False
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        if not self._is_reading and not self._transport.is_closing():
            self._is_reading = True
            self._transport.resume_reading()

    def write(self, data: bytes) -> None:
        if self._stage is not Stage.LOST:
            self._transport.write(data)

    def close(self) -> None:
        """Close now if no request is under way."""
        if self.is_idle:
            self._transport.close()


class Server:
    """All connections of a process, and what they share."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.loop = asyncio.get_running_loop()
        self._opened = defaultdict[str, int](int)  # connections of each client
        self._connections = set[Connection]()
        self._tasks = set[asyncio.Task[None]]()
        self._sweep()

    @property
    def config(self) -> Config:
        return self.store.view.config

    def connect(self) -> Connection:
        return Connection(self)

    def __len__(self) -> int:
        return len(self._connections)

    def admit(self, connection: Connection, peer: str) -> bool:
        """Count a connection; return whether the client may have so many."""
        self._connections.add(connection)
        self._opened[peer] += 1
        return self._opened[peer] <= self.config.max_connections

    def forget(self, connection: Connection, peer: str) -> None:
        self._connections.remove(connection)
        self._opened[peer] -= 1
        if not self._opened[peer]:
            del self._opened[peer]

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        """Run the work on a request, and hold on to it."""
        task = self.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _sweep(self) -> None:
        """Give up the connections whose deadline has come."""
        now_s = self.loop.time()
        for one in [one for one in self._connections if one.deadline_s <= now_s]:
            one.run_out()
        self._timer = self.loop.call_later(SWEEP_S, self._sweep)

    async def drain(self) -> None:
        """Wait until no request is under way, at most as long as the configuration says."""
        began_s = self.loop.time()
        while (waited_s := self.loop.time() - began_s) < self.config.drain:
            if not self.store.in_flight and (waited_s > 0.5 or not self._connections):
                break  # kept connections had time to hear `Connection: close`
            await asyncio.sleep(0.01)

    async def close(self) -> None:
        """Close all connections; what is still under way is cut off."""
        self._timer.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for one in self._connections:
            one.close()


# == aiohttp application ==========================================================================
# The store inside another application: the same handlers, behind aiohttp's own server and limits.

STORE = web.AppKey("store", Store)
CUT_SHORT = (
    ConnectionError, ClientError, HttpProcessingError, web.PayloadAccessError,
    web.RequestPayloadError
)  # fmt: skip


class WebBody:
    """The body of a request that aiohttp has parsed."""

    def __init__(self, request: web.Request) -> None:
        self._request = request
        self._waits_to_be_asked = (
            request.version == HttpVersion11
            and request.headers.get("Expect", "").lower() == "100-continue"
        )

    async def read(self, timeout_s: float) -> bytes:
        try:
            if self._waits_to_be_asked:
                self._waits_to_be_asked = False
                await self._request.writer.write(CONTINUE)
                self._request.writer.output_size = 0  # the answer proper has not begun
            async with asyncio.timeout(timeout_s):
                return await self._request.content.readany()
        except TimeoutError:
            raise TooSlow(f"no byte of the body for {timeout_s:g} s") from None
        except (OSError, *CUT_SHORT) as error:
            raise BadRequest(f"the body was cut short: {error}") from None

    def is_abandoned(self) -> bool:
        return self._request.transport is None or self._request.transport.is_closing()


def to_request(request: web.Request) -> Request:
    """Return aiohttp's request as ours."""
    headers = dict[str, str]()
    for name, value in request.headers.items():
        name = name.lower()
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    length = None if "transfer-encoding" in headers else request.content_length or 0
    resource = request.match_info.route.resource
    prefix = resource.canonical.removesuffix("/{key}") if resource is not None else ""
    peer = request.remote or ""
    return Request(
        request.method, request.raw_path, headers, peer, length, WebBody(request), prefix
    )


async def dispatch(request: web.Request) -> web.StreamResponse:
    store = request.app[STORE]
    response = await Call(store, to_request(request)).answer()
    answer = web.Response(
        status=response.status, body=response.body or None, headers=response.headers
    )
    if store.stopping:
        answer.force_close()
    return answer


@web.middleware
async def answer_without_path(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Answer what aiohttp's router has no handler for: a target that is no path."""
    try:
        return await handler(request)
    except web.HTTPException:
        return await dispatch(request)


async def expect_nothing(request: web.Request) -> None:
    """Leave 100 Continue to WebBody, so that a PUT that is refused is refused before its body is
    sent."""


@contextlib.asynccontextmanager
async def open_store(
    config: Config, metrics: Metrics | None = None, peers: Peers | None = None
) -> AsyncIterator[Store]:
    """Run a store; without volumes in `config` it runs embedded ones, too."""
    async with contextlib.AsyncExitStack() as stack:
        if not config.volumes:
            config = await stack.enter_async_context(run_embedded(config))
        store = Store(config, metrics, peers=peers)
        stack.push_async_callback(store.close)
        await store.start()
        yield store


def create_app(config: Config) -> web.Application:
    """Make the store as an aiohttp application; it opens and closes with it. Serve it, or add it
    to another one:

        app.add_subapp("/blobs/", create_app(Config(db="index.db", volumes=(...))))

    Without volumes it runs embedded ones under config.data. Raises ConfigError at startup if the
    index cannot be used. Any number of processes may share an index."""

    async def run_store(app: web.Application) -> AsyncIterator[None]:
        async with open_store(config) as app[STORE]:
            yield

    app = web.Application(middlewares=[answer_without_path])
    app.router.add_route("*", "/{key:[\\s\\S]*}", dispatch, expect_handler=expect_nothing)
    app.cleanup_ctx.append(run_store)
    return app


# == Migration (optional) =========================================================================
# From the index of the second edition, schema 3, to this one, in one transaction, while nobody
# else uses it. What was claimed is dead, and may still be written; what is kept or made anew has
# no row now, since a record names it. All versions up to the highest were drawn by anybody.

OLD_ROWS = 10_000  # in one page
RELEASE_TOMBSTONES = """INSERT INTO dead SELECT path, volume, ?1, ?1, NULL, NULL, ''
    FROM tombstone WHERE NOT EXISTS (SELECT 1 FROM dead
        WHERE dead.path >= substr(tombstone.path, 1, ?2)
        AND dead.path < substr(tombstone.path, 1, ?2) || '~~')"""
IN_ONE_FILE = ("DROP TABLE pending",)  # there is a copy of all
IN_A_DATABASE = (
    "ALTER TABLE pending RENAME TO pending_of_schema_3",  # a way back
    "ALTER TABLE meta DROP COLUMN epoch",
    "ALTER TABLE meta ADD COLUMN is_copy BOOLEAN NOT NULL DEFAULT false",
)


def migrate(session: Session) -> None:
    """Make the tables that are new, and bring over what is pending; raises Occupied."""
    if not session.is_remote:
        session.set_clock("pending")
    check_unused(session)
    if not session.is_remote:
        keep_copy(session)
    now_s = session.read_clock()
    session.make_tables(PENDING + DRAWN + IDENTITIES)
    after = ("", "")
    query = f"""SELECT path, volume, state, due, since, doubt FROM pending
        WHERE (path, volume) > (?1, ?2) ORDER BY path, volume LIMIT {OLD_ROWS}"""
    while rows := session.select(query, after):
        pending = Pending({}, {}, {})
        for row in rows:
            note_old_row(pending, row, now_s)
        for table, new in sorted(pending.rows()):
            session.run_many(f"INSERT INTO {table} VALUES ROWS", [new])
        after = rows[-1][:2]
    session.run(RELEASE_TOMBSTONES, (now_s, STEM))
    session.run("""DELETE FROM tombstone WHERE EXISTS (SELECT 1 FROM dead
        WHERE dead.path = tombstone.path AND dead.volume = tombstone.volume)""")
    session.run("DELETE FROM total WHERE name = ?1", (GARBAGE,))
    session.run("INSERT INTO total SELECT ?1, count(*), 0 FROM dead", (GARBAGE,))
    session.run("DELETE FROM owner")
    versions = f"""SELECT max(version) FROM (SELECT version FROM record
        UNION ALL SELECT substr(path, {STEM - 19}, 20) FROM pending) AS drawn_before"""
    ((highest,),) = session.select(versions)
    if highest is not None:
        session.run_many(WRITE_DRAWN, [(ANY_TAG, 0, version_ns(highest))])
    for statement in IN_A_DATABASE if session.is_remote else IN_ONE_FILE:
        session.run(statement)


MIGRATIONS[3] = migrate


def note_old_row(pending: Pending, row: Row, now_s: float) -> None:
    path, volumes, state, due_s, since_s, doubt_s = row
    for volume in volumes.split():
        if state in ("claimed", "overtaken", "bound", "copying"):
            dead = Dead(path, volume, now_s, now_s, now_s + BROKEN_S)
            pending.dead[volume, path] = dead
        elif state in ("garbage", "watched", "deleting"):
            dead = Dead(path, volume, now_s if due_s is None else due_s, since_s, doubt_s)
            pending.dead[volume, path] = dead
        elif state == "mark" and doubt_s is None:
            pending.tombstones.setdefault(path, set()).add(volume)


def check_unused(session: Session) -> None:
    """Raise Occupied if an owner of the second edition is alive."""
    owners = f"SELECT role, until FROM owner WHERE role <> 'gone' AND until > {session.NOW}"
    for role, until_s in session.select(owners):
        raise Occupied(role, until_s)


def keep_copy(session: Session) -> None:
    """Copy an index in a file, which nobody else can change now, to a file of its own beside
    it. However often that is begun, there is one copy, and it is whole."""
    target = f"{session.place}.schema3"
    part = f"{target}.part"
    with (
        contextlib.closing(sqlite3.connect(session.place)) as source,
        contextlib.closing(sqlite3.connect(part)) as copy,
    ):
        source.backup(copy)
    os.replace(part, target)
    words = "the index %s is brought from schema 3 to %d; a copy is kept as %s"
    log.warning(words, session.place, SCHEMA_VERSION, target)


# == PostgreSQL (optional) ========================================================================
# The index in one schema of a database, for index servers on any number of machines. It needs
# psycopg, which is imported only then. Who uses it is known by its lease. The clock is that of the
# database's machine.
#
# A transaction that writes begins with an UPDATE of the one row of `meta`, its turn: that is what
# BEGIN IMMEDIATE is to SQLite, at any isolation level, for absent keys too, and nobody can wait in
# a ring. It is two round trips, whatever it holds: what is run is kept until something is asked or
# committed, and all that is one message with many statements. A message is read as a whole before
# anything of it is done. So a session that stands still has either not taken its turn, or it is
# idle in its transaction, and the database ends that: others get the turn within seconds. (In a
# pipeline of messages it could stand between two, where no timeout of PostgreSQL 15 finds it.)
#
# If the connection breaks in a commit, only the index knows what has become of it. Each
# transaction counts its owner's `seq` up; who connects again waits for its turn, by when that of
# the broken connection is over, and reads it.

SCHEMA_NAME = re.compile("[a-z_][a-z0-9_]{0,39}")
META = """
CREATE TABLE meta (schema INTEGER NOT NULL, turn INTEGER NOT NULL, closed BOOLEAN NOT NULL,
    is_copy BOOLEAN NOT NULL DEFAULT false);
INSERT INTO meta VALUES (0, 0, false);
"""
# What is written again and again needs room beside it, and its dead rows go soon.
STORAGE = """
ALTER TABLE meta SET (fillfactor = 10);
ALTER TABLE owner SET (fillfactor = 10);
ALTER TABLE total SET (fillfactor = 10);
ALTER TABLE claim SET (autovacuum_vacuum_scale_factor = 0.02);
ALTER TABLE dead SET (autovacuum_vacuum_scale_factor = 0.02);
ALTER TABLE drawn SET (fillfactor = 10);
"""
IN_POSTGRES = {
    "TEXT": 'TEXT COLLATE "C"',  # the order of bytes, whatever the database has
    "INTEGER": "BIGINT",
    "REAL": "DOUBLE PRECISION",
    " STRICT, WITHOUT ROWID": "",
}
CONNECTING: Mapping[str, Any] = {  # unless the URL says otherwise
    "connect_timeout": 5,
    "keepalives_idle": 5, "keepalives_interval": 2, "keepalives_count": 3,
    "tcp_user_timeout": 10_000,  # ms without an acknowledgement that break the connection
    "application_name": "mkv",
}  # fmt: skip
SETTINGS = {
    "idle_in_transaction_session_timeout": "5s",
    "lock_timeout": f"{WRITERS_S:.0f}s",
    "enable_seqscan": "off",  # each statement has one good plan, whatever the tables hold just now
    "jit": "off",
}
START = "BEGIN ISOLATION LEVEL READ COMMITTED"
CLOCK_NOW = "extract(epoch FROM clock_timestamp())::float8"
TAKE_TURN = f"UPDATE meta SET turn = turn + 1 WHERE NOT closed RETURNING {CLOCK_NOW}"
READER_WAITS_S = 10.0  # for an answer of the database
WRITER_WAITS_S = WRITERS_S + 10.0  # in which a turn may come late
WRONG_ORDER = """SELECT attrelid::regclass || '.' || attname, collname
    FROM pg_attribute JOIN pg_collation ON pg_collation.oid = attcollation
    JOIN pg_class ON pg_class.oid = attrelid
    WHERE relnamespace = to_regnamespace(?1) AND relkind = 'r' AND collname NOT IN ('C', 'POSIX')
    ORDER BY 1 LIMIT 1"""


def split_schema(db: str) -> tuple[str, str]:
    """Return a URL of PostgreSQL as libpq takes it, and the schema that it names, or mkv."""
    schemas = re.findall(r"[?&]schema=([^&]*)", db)
    url = re.sub(r"(?<=[?&])schema=[^&]*&?", "", db).rstrip("?&")
    return url, schemas[-1] if schemas else "mkv"


def load_psycopg() -> Any:
    """Raises ConfigError."""
    try:
        import psycopg
    except ImportError as error:
        reason = f"PostgreSQL needs psycopg 3.2 (pip install 'mkv-store[postgres]'): {error}"
        raise ConfigError([f"db: {reason}"]) from None
    return psycopg


def fill_in(cursor: Any, query: str, values: Sequence[Any]) -> str:
    """Return a query with its values in it, quoted as libpq does."""
    named = {str(i): value for i, value in enumerate(values, 1)}
    text: str = cursor.mogrify(in_psycopg(query), named)
    return text


@lru_cache(256)
def in_psycopg(query: str) -> str:
    """Return a query with %(1)s for ?1."""
    return re.sub(r"\?([0-9]+)", r"%(\1)s", query.replace("%", "%%"))


class PostgresSession(Session):
    """A connection to the index in one schema of a database."""

    NOW = CLOCK_NOW
    IS_COPY = "SELECT 1 FROM meta WHERE is_copy"
    GIVEN = "SELECT json_array_elements_text(?1::json) AS value"
    FIND = "strpos"
    PACKED = f"json_agg(json_build_array({COLUMNS}))::text"
    BEGIN: ClassVar = {
        True: (START, TAKE_TURN),
        False: (START, "SET LOCAL synchronous_commit = off", TAKE_TURN),
    }
    is_remote = True

    def __init__(self, db: str, is_readonly: bool = False) -> None:
        super().__init__(db, is_readonly)
        self._psycopg = load_psycopg()
        self._url, self.place = split_schema(db)
        if not SCHEMA_NAME.fullmatch(self.place):
            reason = "schema must be 1 to 40 of a-z 0-9 _, and begin with no digit"
            raise ConfigError([f"db: {reason}"])
        self.name = f"{hide_secrets(db)} (schema {self.place})"
        try:
            given = self._psycopg.conninfo.conninfo_to_dict(self._url)
        except self._psycopg.Error:  # which may show the password
            raise ConfigError([f"db: {self.name}: libpq cannot read this URL"]) from None
        self._secrets = [str(given[name]) for name in ("password", "sslpassword") if name in given]
        self.parameters = {**CONNECTING, "client_encoding": "UTF8", **given}
        self._connection: Any = None
        self._socket: socket.socket | None = None  # the connection's, to interrupt it
        self._kept: list[Query] = []  # what is to be run

    def beside(self) -> str:
        sign = "&" if "?" in self._url else "?"
        return f"{self._url}{sign}schema={self.place}_new"

    @property
    def waits_s(self) -> float:  # type: ignore[override]
        return READER_WAITS_S if self.is_readonly else WRITER_WAITS_S

    @property
    def is_open(self) -> bool:
        return self._connection is not None and not self._connection.closed

    def connect(self) -> None:
        if self.is_open:
            return
        self.close()
        self._connection = self._psycopg.connect(
            **self.parameters, autocommit=True, cursor_factory=self._psycopg.ClientCursor
        )  # fmt: skip
        self._socket = socket.socket(fileno=os.dup(self._connection.fileno()))
        try:
            self._set_up()
        except Exception:
            self.close()
            raise

    def _set_up(self) -> None:
        """Set what is good for this connection, and see what cannot be set."""
        settings = SETTINGS | {"search_path": self.place}
        settings["default_transaction_read_only"] = "on" if self.is_readonly else "off"
        set_one = "SELECT set_config(?1, ?2, false)"
        facts = """SELECT current_setting('synchronous_commit'),
            current_setting('server_encoding'), pg_is_in_recovery()"""
        *_, ((commits, encoding, is_replica),) = self.ask(
            [*((set_one, pair) for pair in settings.items()), (facts, ())]
        )
        if commits == "off":
            raise IndexDamaged("synchronous_commit is off: what is acknowledged could be lost")
        if encoding != "UTF8":
            raise IndexDamaged(f"the database's encoding is {encoding}, not UTF8")
        if is_replica:
            raise IndexDamaged("this is a read replica, which takes no writes")

    def close(self) -> None:
        self._kept = []
        if self._connection is not None:
            self._connection.close()
        if self._socket is not None:
            self._socket.close()

    def interrupt(self) -> None:
        """A database that stands still counts as lost."""
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def explain(self, error: Exception) -> Exception:
        psycopg = self._psycopg
        if not isinstance(error, psycopg.Error):
            return error
        reason = error.diag.message_primary or " ".join(str(error).split())
        for secret in self._secrets:
            reason = reason.replace(secret, "***")
        failures = (psycopg.OperationalError, psycopg.InterfaceError, psycopg.InternalError)
        if not isinstance(error, failures):
            return IndexDamaged(reason)
        return IndexFailed(reason) if self.is_open else IndexLost(reason)

    def ask(self, queries: Sequence[Query]) -> list[list[Row]]:
        """In one message, with what was kept."""
        said = [*self._kept, *queries]
        self._kept = []
        answers = list[list[Row]]()
        try:
            with self._connection.cursor() as cursor:
                cursor.execute(";".join(fill_in(cursor, *query) for query in said))
                for _ in said:
                    answers.append(cursor.fetchall() if cursor.description else [])
                    cursor.nextset()
        except self._psycopg.Error as error:
            if not self.is_open or error.diag.severity_nonlocalized in ("FATAL", "PANIC"):
                self.close()  # the backend ends
            raise
        return answers[len(said) - len(queries) :]

    def run(self, statement: str, values: Sequence[Any] = ()) -> None:
        self._kept.append((statement, values))

    def wall_ns(self, now_s: float) -> int:
        return round(now_s * 1e9)

    def commit(self, lease: Lease | None = None) -> None:
        """If it breaks, find out what has become of it; raises IndexLost if nothing was done,
        IndexUnsure if that is not to be found out."""
        asked_s = time.monotonic()
        try:
            self.ask([("COMMIT", ())])
        except self._psycopg.Error as error:
            if self.is_open or lease is None:
                raise
            self._find_outcome(lease, error, asked_s)

    def _find_outcome(self, lease: Lease, broken: Exception, asked_s: float) -> None:
        deadline_s = time.monotonic() + RECONNECT_S
        while True:
            try:
                self.connect()
                read = ("SELECT seq FROM owner WHERE id = ?1", (lease.owner,))
                in_turn: list[Query] = [(START, ()), (TAKE_TURN, ()), read, ("COMMIT", ())]
                rows = self.ask(in_turn)[in_turn.index(read)]
                break
            except Exception as error:
                self.close()
                if time.monotonic() > deadline_s:
                    reason = self.explain(error)
                    raise IndexUnsure(f"whether that was done is not known: {reason}") from None
            time.sleep(RECONNECT_EVERY_S)
        could_end = time.monotonic() - asked_s > lease.seconds / 2
        if not rows and (lease.seq > 1 or could_end):
            # Others have taken it for dead meanwhile, and what it had done last is forgotten.
            raise IndexUnsure("whether that was done is not known any more")
        if rows != [(lease.seq,)]:
            raise IndexLost(f"the connection broke before the commit: {broken}")

    def roll_back(self) -> None:
        self._kept = []
        try:
            self.ask([("ROLLBACK", ())])
        except self._psycopg.Error:
            self.close()

    def prepare(self) -> None:
        self.connect()
        # One after another, of several that find it new.
        lock = "SELECT pg_advisory_xact_lock(hashtext('mkv ' || ?1))"
        self.ask([("BEGIN", ()), (lock, (self.place,))])
        try:
            if not self.select("SELECT 1 WHERE to_regnamespace(?1) IS NOT NULL", (self.place,)):
                self.run(f"CREATE SCHEMA {self.place}")
            if not self.select("SELECT 1 WHERE to_regclass('meta') IS NOT NULL"):
                self.make_tables(TABLES + META + STORAGE)
                self.run("UPDATE meta SET schema = ?1", (SCHEMA_VERSION,))
            ((version,),) = self.select("SELECT schema FROM meta")
            if version != SCHEMA_VERSION:
                self.run(TAKE_TURN)  # nobody writes meanwhile
                migration_from(version)(self)
                self.run("UPDATE meta SET schema = ?1", (SCHEMA_VERSION,))
            for column, order in self.select(WRONG_ORDER, (self.place,)):
                reason = f"{column} has the collation {order}: it must be C, the order of bytes"
                raise IndexDamaged(reason)
            self.commit()
        except Exception:
            self.roll_back()
            raise

    def make_tables(self, tables: str) -> None:
        for sqlite, postgres in IN_POSTGRES.items():
            tables = tables.replace(sqlite, postgres)
        super().make_tables(tables)

    def enter(self) -> None:
        """Nothing to do: whoever writes is an owner, and a rebuild is one, too."""


ENGINES |= {"postgresql": PostgresSession, "postgres": PostgresSession}


# == Embedded volume ==============================================================================
# The volume server for machines without nginx: the same dialect, over plain files. It syncs file
# and folder before 201.

SYNC_EVERY = 64 * 1024 * 1024  # bytes: so that the last sync of a large blob is short
WRITE_SIZE = 1024 * 1024  # bytes handed to a thread at once
LISTING_BYTES = 16 * 1024 * 1024  # of one folder, some 88,000 files; a volume has 65,536 folders
BODY_PATIENCE = 2  # times body_timeout: the index server is the first to give up a client
EMBEDDED_CONNECTIONS = 65_536  # to a server's own volumes: on loopback it is itself a client
VOLUME_METHODS = "DELETE, GET, HEAD, OPTIONS, PUT"
# A blob is a stranger's: a browser must neither guess its type nor run what is in it.
SAFETY = {"X-Content-Type-Options": "nosniff", "Content-Security-Policy": "sandbox"}
DIALECT_2 = {"Mkv-Dialect": "2"}  # it does as this version's nginx.conf
# A path names one version, so what is there never changes; it is for whoever got the link.
FOR_EVER = "private, max-age=31536000, immutable"
IS_BLOB = re.compile(
    r"/[0-9a-f]{64}-[0-9a-f]{20}(?!.*\.(?:key|del)\Z)(?:~[0-9a-f]{8})?(?:\.[a-z0-9]{1,8})?"
)
# For `cors_origins`. Whoever has a link may read by it, from wherever: it holds no cookie.
VOLUME_CORS = {
    "Access-Control-Allow-Origin": "*",
    "Access-Control-Allow-Headers": "*, Authorization",
    "Access-Control-Expose-Headers": "*",
}


def time_of(date: str) -> int | None:
    """Return the Unix time of a header's date; None if it is none that a clock can show."""
    try:
        return int(parsedate_to_datetime(date).timestamp())
    except (ValueError, OverflowError):
        return None


class StoredFile(web.FileResponse):
    """A file as nginx serves it with `etag off`: an ETag means nothing here, only dates do, and
    most are compared for equality. It is the index server's, and has been compared there."""

    def __init__(self, file: Path, modified_s: int, headers: dict[str, str]) -> None:
        super().__init__(file, headers=headers)
        self._modified_s = modified_s

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        given = request.headers
        headers = {}
        part = given.get("Range", "")
        known_s = time_of(given["If-Range"]) if "If-Range" in given else self._modified_s
        # If it is another, the client may have a part of another version. One part is enough.
        is_one = part.startswith("bytes=") and part.isascii() and "," not in part
        if is_one and known_s == self._modified_s:
            headers["Range"] = part
        if time_of(given.get("If-Modified-Since", "")) == self._modified_s:
            headers["If-Modified-Since"] = given["If-Modified-Since"]
        if time_of(given.get("If-Unmodified-Since", "")) is not None:
            headers["If-Unmodified-Since"] = given["If-Unmodified-Since"]
        return await super().prepare(request.clone(headers=headers))


def headers_of_blob(path: str, query: str) -> dict[str, str]:
    """Return what nginx.conf adds to a file that is read: what it is, how long to keep it, and its
    name."""
    headers = {"Content-Type": served_type(argument_of(query, "type"))}
    if IS_BLOB.fullmatch(path, path.rfind("/")):
        headers["Cache-Control"] = FOR_EVER
    disposition = disposition_of(query)
    if disposition:
        headers["Content-Disposition"] = disposition
    return headers


class EmbeddedVolume:
    """Serves `folder`: PUT, DELETE, GET with Range, HEAD, listings as nginx's autoindex JSON."""

    def __init__(
        self, folder: Path, volume_secret: str = "", link_secret: str = "",
        body_timeout_s: float = 60.0,
    ) -> None:  # fmt: skip
        self._root = folder.resolve()
        self._secret = volume_secret.encode()
        self._link_secret = link_secret
        self._body_timeout_s = body_timeout_s
        try:
            (self._root / ".tmp").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError([f"{self._root}: {error.strerror}"]) from None
        # Left by a crash; a tool may serve the same folder, so not the young.
        for left in (self._root / ".tmp").iterdir():
            if time.time() - left.stat().st_mtime > 86400:
                left.unlink(missing_ok=True)

    async def answer(self, request: web.Request) -> web.StreamResponse:
        try:
            raw_path, query = split_target(request.raw_path)
            path = unquote_to_bytes(raw_path.encode("utf-8", "surrogateescape")).decode()
            if request.method == "OPTIONS":
                return web.Response(status=204, headers={"Allow": VOLUME_METHODS})
            self._admit(request, path, query)
            return await self._act(request, path, query, self._locate(path))
        except (MkvError, UnicodeDecodeError, *CUT_SHORT) as error:
            return web.Response(status=getattr(error, "status", 400), text=f"{error}\n")
        except web.HTTPException as error:
            return web.Response(status=error.status, text=error.text, headers=error.headers)
        except OSError as error:
            status = status_of(error, request.method)
            if status >= 500:
                log.error(
                    "volume %s: %s %r: %s", self._root, request.method, request.raw_path, error
                )
            return web.Response(status=status, text=f"{error.strerror}\n")

    def _admit(self, request: web.Request, path: str, query: str) -> None:
        """Ask for the volume's secret, or for reading a blob for a signed link, as nginx.conf
        does."""
        shown = request.headers.get("Mkv-Volume-Secret", "").encode("utf-8", "surrogateescape")
        if not self._secret or hmac.compare_digest(shown, self._secret):
            return
        if (
            request.method not in ("GET", "HEAD")
            or path.endswith(("/", ".key", ".del"))
            or path == PROBE_PATH
        ):
            raise Forbidden("the volume's secret is needed")
        if self._link_secret:
            given = argument_of(query, "expires")
            expires = int(given) if re.fullmatch("[0-9]{1,15}", given) else 0
            claimed = f"?md5={argument_of(query, 'md5')}&expires={given}"
            arguments = argument_of(query, "type"), argument_of(query, "name")
            subject = subject_of_link(path, *arguments)
            signed = sign_link(subject, self._link_secret, expires)
            if not hmac.compare_digest(
                signed.encode(), claimed.encode("utf-8", "surrogateescape")
            ):
                raise Forbidden("a signed link is needed")
            if expires < time.time():
                raise web.HTTPGone(text="the link has expired\n")

    def _locate(self, path: str) -> Path:
        """Return the file that `path` names, which is in the folder, whatever links and dots say;
        raises MkvError."""
        parts = path.split("/")
        if "\0" in path or ".." in parts or not self._holds(path):
            raise BadRequest("the path leaves the volume")
        if path != PROBE_PATH and any(part.startswith(".") for part in parts):
            raise NotFound("dot-files are the volume's own")
        return self._root / path[1:]

    def _holds(self, path: str) -> bool:
        try:
            return (self._root / path[1:]).resolve().is_relative_to(self._root)
        except RuntimeError:  # links that lead to each other
            return False

    async def _act(
        self, request: web.Request, path: str, query: str, file: Path
    ) -> web.StreamResponse:
        """Do what the method says, as nginx does."""
        folder = path.endswith("/")
        match request.method:
            case "PUT" if folder:
                raise web.HTTPConflict(text="a name cannot end in a slash\n")
            case "PUT" if "Content-Range" in request.headers:
                raise web.HTTPNotImplemented(text="no partial PUT\n")
            case "PUT":
                return web.Response(status=204 if await self._put(request, file) else 201)
            case "DELETE" if not folder:
                if request.content_length or "Transfer-Encoding" in request.headers:
                    raise UnsupportedEncoding("a DELETE has no body")
                await asyncio.to_thread(file.unlink)
                await asyncio.to_thread(sync_folder, file.parent)
                return web.Response(status=204)
            case "GET" | "HEAD" if folder:
                return web.Response(
                    body=await asyncio.to_thread(list_folder, file),
                    content_type="application/json",
                )
            case "GET" | "HEAD":
                modified_s = await asyncio.to_thread(modified_of, file)
                return StoredFile(file, modified_s, headers_of_blob(path, query))
        raise web.HTTPMethodNotAllowed(
            request.method, ["GET", "HEAD", "PUT"] + ["DELETE"] * (not folder)
        )

    async def _put(self, request: web.Request, target: Path) -> bool:
        """Stream the body to a temporary file, sync it, move it to `target`; return whether it
        replaced a file."""
        temporary = self._root / ".tmp" / f"{random.getrandbits(64):016x}"
        unsynced = 0  # bytes
        pending = bytearray()
        try:
            with await asyncio.to_thread(open, temporary, "wb", 0) as file:
                while chunk := await self._read(request):
                    pending += chunk
                    if len(pending) >= WRITE_SIZE:
                        unsynced += len(pending)
                        is_due = unsynced >= SYNC_EVERY
                        await asyncio.to_thread(write_file, file, bytes(pending), is_due)
                        unsynced %= SYNC_EVERY
                        pending = bytearray()
                await asyncio.to_thread(write_file, file, bytes(pending), True)
            modified_s = time_of(request.headers.get("Date", ""))
            if modified_s is None:
                modified_s = int(time.time())
            await asyncio.to_thread(os.utime, temporary, (modified_s, modified_s))
            return await asyncio.to_thread(move_file, temporary, target)
        finally:
            temporary.unlink(missing_ok=True)

    async def _read(self, request: web.Request) -> bytes:
        """Return what has come of the body, nothing at its end; raises TooSlow."""
        try:
            async with asyncio.timeout(self._body_timeout_s):
                return await request.content.readany()
        except TimeoutError:
            raise TooSlow(f"no byte of the body for {self._body_timeout_s:g} s") from None


def status_of(error: OSError, method: str) -> int:
    """Return the status that a file which cannot be had, or written, is answered with."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return 507
    if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
        return 400
    if error.errno in (errno.ENOTDIR, errno.EISDIR, errno.EEXIST):  # a file where a folder is
        return 409 if method == "PUT" else 404
    return 404 if error.errno == errno.ENOENT and method != "PUT" else 500


def modified_of(file: Path) -> int:
    """Return a file's time, as aiohttp shows it; raises NotFound."""
    if not file.is_file():
        raise NotFound("not found")
    return math.ceil(file.stat().st_mtime)


def write_file(file: Any, data: bytes, sync: bool) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]
    if sync:
        os.fsync(file.fileno())


def move_file(source: Path, target: Path) -> bool:
    """Rename, then sync every folder that is new or has changed; return whether it replaced a
    file."""
    new = [folder for folder in target.parents if not folder.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    replaced = target.exists()
    os.replace(source, target)
    for folder in (target.parent, *(one.parent for one in new)):
        sync_folder(folder)
    return replaced


def sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def list_folder(folder: Path) -> bytes:
    """Return the folder as nginx's autoindex_format json does, an entry a line, without dot-files;
    raises FileNotFoundError, OSError if the listing would be longer than LISTING_BYTES."""
    lines = list[str]()
    size = 0
    with os.scandir(folder) as entries:
        for entry in entries:
            facts = None if entry.name.startswith(".") else look_at(entry)
            if facts is None:
                continue
            row: dict[str, Any] = {"name": entry.name, "type": "other"}
            if stat.S_ISDIR(facts.st_mode):
                row["type"] = "directory"
            elif stat.S_ISREG(facts.st_mode):
                row |= {"type": "file", "size": facts.st_size}
            lines.append(json.dumps(row | {"mtime": formatdate(facts.st_mtime, usegmt=True)}))
            size += len(lines[-1]) + len(",\n")
            if size > LISTING_BYTES:
                raise OSError(errno.EFBIG, "too many files in one folder")
    lines.sort()  # by name, which comes first
    return "[\n{}\n]\n".format(",\n".join(lines)).encode()


def look_at(entry: os.DirEntry[str]) -> os.stat_result | None:
    """Return what an entry of a folder is, None if it is gone by now. A link that leads nowhere is
    just a link."""
    for follow in (True, False):
        try:
            return entry.stat(follow_symlinks=follow)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ELOOP):
                raise
    return None


async def harden(
    more: Mapping[str, str], request: web.BaseRequest, response: web.StreamResponse
) -> None:
    """Add to every answer what nginx.conf adds, and take from it what nginx.conf turns off."""
    response.headers.update(more)
    response.headers.pop("ETag", None)
    if argument_of(request.rel_url.raw_query_string, "undated"):
        response.headers.pop("Last-Modified", None)


def embed_volumes(config: Config) -> tuple[Config, dict[Path, socket.socket]]:
    """Return `config` with embedded volumes under config.data in it, and for each its folder and a
    socket that listens for it."""
    folders = dict[Path, socket.socket]()
    volumes = list[Volume]()
    for number in range(1, EMBEDDED_VOLUMES + 1):
        name = f"volume{number}"
        listener = listen("127.0.0.1", 0)
        folders[Path(config.data, name)] = listener
        volumes.append(Volume(name=name, url=f"http://127.0.0.1:{listener.getsockname()[1]}"))
    return replace(config, volumes=tuple(volumes)), folders


class VolumeConnection(asyncio.Protocol):
    """A connection to an embedded volume: aiohttp's, within limits on how many a client has and
    how long the head of its first request takes."""

    def __init__(
        self, serve: Callable[[], asyncio.Protocol], config: Config, opened: Counter[str]
    ) -> None:
        self._behind = serve()
        self._config = config
        self._opened = opened
        self._heard = b""  # of the first head

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._client = (transport.get_extra_info("peername") or ("",))[0]
        self._opened[self._client] += 1
        loop = asyncio.get_running_loop()
        self._impatience = loop.call_later(self._config.header_timeout, transport.close)
        self._behind.connection_made(transport)
        if self._opened[self._client] > self._config.max_connections:
            transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._impatience.cancel()
        self._opened[self._client] -= 1
        if not self._opened[self._client]:
            del self._opened[self._client]
        self._behind.connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if not self._impatience.cancelled():
            self._heard = self._heard[-3:] + data
            if b"\r\n\r\n" in self._heard:
                self._impatience.cancel()
        self._behind.data_received(data)

    def eof_received(self) -> bool | None:
        return self._behind.eof_received()

    def pause_writing(self) -> None:
        self._behind.pause_writing()

    def resume_writing(self) -> None:
        self._behind.resume_writing()


@contextlib.asynccontextmanager
async def serve_volumes(
    folders: Mapping[Path, socket.socket], config: Config, max_connections: int
) -> AsyncIterator[None]:
    """Serve folders as volumes, each on its socket; `max_connections` are of one client."""
    config = replace(config, max_connections=max_connections)
    patience_s = BODY_PATIENCE * config.body_timeout
    more = SAFETY | DIALECT_2 | (VOLUME_CORS if config.cors_origins else {})
    loop = asyncio.get_running_loop()
    runners = list[web.AppRunner]()
    servers = list[asyncio.Server]()
    try:
        for folder, listener in folders.items():
            volume = EmbeddedVolume(folder, config.volume_secret, config.link_secret, patience_s)
            app = web.Application()
            app.router.add_route("*", "/{path:[\\s\\S]*}", volume.answer)
            app.on_response_prepare.append(partial(harden, more))
            runner = web.AppRunner(
                app, access_log=None, shutdown_timeout=5, auto_decompress=False,
                keepalive_timeout=config.keepalive_timeout,
            )  # fmt: skip
            runners.append(runner)
            await runner.setup()
            serve = cast(web.Server, runner.server)
            connect = partial(VolumeConnection, serve, config, Counter[str]())
            servers.append(await loop.create_server(connect, sock=listener, backlog=1024))
        yield
    finally:
        for server in servers:
            server.close()
        await asyncio.gather(*(runner.cleanup() for runner in runners))


@contextlib.asynccontextmanager
async def run_embedded(config: Config) -> AsyncIterator[Config]:
    """Run the embedded volumes under config.data; yield the configuration with them in it."""
    ready, folders = embed_volumes(config)
    async with serve_volumes(folders, config, EMBEDDED_CONNECTIONS):
        yield ready


# == Client =======================================================================================
# For programs that use a store, on aiohttp's client. What the README asks of every client it does
# by itself: it keeps its connections, follows redirects without showing a volume its token, asks
# again when a volume dies or a blob has moved, goes on by Range where it was, tries again what was
# refused for now, and checks every digest.
#
# A write that got no answer may have been carried out. Where repeating it could do harm (it has a
# condition, or its bytes are gone) the caller decides: Unanswered.

PATIENCE_S = 30.0  # for how long what fails for now is tried again
NO_PROGRESS_S = 30.0  # after which the other side is given up
IDLE_S = 45.0  # of a kept connection; less than keepalive_timeout
FIRST_PAUSE_S = 0.05  # before the second attempt; then twice as long each time
LONGEST_PAUSE_S = 2.0
ASK_AROUND = 16  # redirects to find another replica than a bad one
BAD_READS = 8  # of a blob, each with another digest than it should have, before it counts as lost
PIECE_BYTES = 64 * 1024  # of a body that is sent, at once
FILE_BYTES = 1024 * 1024  # that are handed to a thread at once
KERNEL_BYTES = 4 * 1024 * 1024  # that may have left this process and not this machine,
SLOWEST_LINK = 64 * 1024  # and bytes a second at which they do
PAGE_BYTES = 2 * LIST_BYTES  # no answer of the server itself has more
# What reading an answer can raise that is not as mkv's are.
NOT_AS_MKV = (
    ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError,
)  # fmt: skip


class Unreachable(Unavailable):
    """Nobody answers, or the connection broke off. `sent`: the request may have arrived."""

    def __init__(self, detail: str, sent: bool) -> None:
        super().__init__(detail)
        self.headers = {}  # nobody has said when to try again
        self.sent = sent


class Unanswered(MkvError):
    """A write got no answer: it may have been carried out, or may be yet."""


class Changed(PreconditionFailed):
    """The key was replaced or deleted while it was read."""


class Corrupt(MkvError):
    """Bytes have not the digest that they should have, whatever volume they are read from."""


class Strange(MkvError):
    """Something was answered that no mkv answers."""

    title = "which no mkv answers"


FOR_NOW = (Unavailable, TooManyRequests)  # what is worth another attempt
REFUSALS: Mapping[int, type[MkvError]] = {
    kind.status: kind
    for kind in (
        BadRequest, Unauthorized, Forbidden, NotFound, MethodNotAllowed, TooSlow,
        PreconditionFailed, TooLarge, TargetTooLong, UnsupportedEncoding, Misdirected, WrongDigest,
        TooManyRequests, HeadTooLarge, UnknownCoding, Unavailable, Unfinished, UnknownVersion,
        Full,
    )
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Blob:
    """What the index says of a key; or a common prefix in a list (`is_prefix`), of which there is
    only the name, in `key`."""

    key: str
    size: int = 0  # bytes
    digest: str = ""  # SHA-256 in hex
    content_type: str = ""
    modified_s: float = 0.0  # Unix time
    volumes: tuple[str, ...] = ()  # a list does not say
    is_prefix: bool = False

    @property
    def etag(self) -> str:
        """What `if_match` takes."""
        return f'"{self.digest}"'


class Stored(NamedTuple):
    """What became of a PUT."""

    digest: str  # SHA-256 in hex
    is_new: bool  # there was no such key before

    @property
    def etag(self) -> str:
        """What `if_match` takes."""
        return f'"{self.digest}"'


Data = bytes | bytearray | memoryview | os.PathLike[str] | IO[bytes] | AsyncIterable[bytes]
Hear = Callable[[int], None]  # of bytes that have come, or were sent


def hear_nothing(_: int) -> None:
    pass


class Client:
    """A store, for programs.

        async with Client("http://127.0.0.1:3000", token="...") as store:
            await store.put("photos/cat.png", Path("cat.png"))
            data = await store.get("photos/cat.png")
            async for blob in store.list("photos/"):
                print(blob.key, blob.size)

    Keys are strings, any that the store takes; the client encodes them. All may be called many
    times at once. What fails for now (503, 429, nobody answers, a volume dies) is tried again,
    with pauses, or when `Retry-After` says, until it has failed for `patience_s` seconds; what
    makes no progress for `timeout_s` has failed. What fails for good raises the MkvError that the
    answer names, with its detail (NotFound, PreconditionFailed, Forbidden, Full, ...), or one of
    Unreachable, Unanswered, Changed, Corrupt, Strange.

    `token` is the secret; no volume ever sees it. Connections are kept until the client is closed:
    one to the server and one to each volume if one thing is asked after the other, else as many
    as are needed. A Client belongs to one event loop."""

    def __init__(
        self, url: str, *, token: str = "",
        patience_s: float = PATIENCE_S, timeout_s: float = NO_PROGRESS_S,
    ) -> None:  # fmt: skip
        if not URL.fullmatch(url):
            raise ConfigError([f"url: must be http(s)://host[:port][/path], not {url!r}"])
        self.url = url.rstrip("/")
        self.patience_s = patience_s
        self._timeout_s = timeout_s
        self._credentials = {"Authorization": f"Bearer {token}"} if token else {}
        self._session: ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = ClientSession(
            connector=TCPConnector(limit=0, keepalive_timeout=IDLE_S),
            timeout=ClientTimeout(connect=self._timeout_s, sock_read=self._timeout_s),
            headers={"Accept-Encoding": "identity", "User-Agent": f"mkv/{__version__}"},
            skip_auto_headers=("Content-Type",),  # the server knows better
            cookie_jar=DummyCookieJar(),
            auto_decompress=False,
            middlewares=(send_once,),
        )
        return self

    async def __aexit__(self, *raised: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections. May be called twice."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    # -- what programs ask for --

    async def put(
        self, key: str, data: Data, *, content_type: str | None = None,
        if_match: str | None = None, if_none_match: str | None = None,
        hear: Hear = hear_nothing,
    ) -> Stored:  # fmt: skip
        """Store `data` under `key`: bytes, a path, an open binary file (from where it is on), or
        an async iterator of bytes. Durable when it returns.

        Without a `content_type` the key's ending decides. `if_none_match="*"` only creates,
        `if_match=blob.etag` only replaces just that: else PreconditionFailed.

        The digest is sent where it can be known before (bytes, and files that can be read twice),
        and what was stored is compared with what was sent in any case: Corrupt. What can be read
        twice is sent again if need be, but under a condition only if it cannot have been carried
        out: else Unanswered. If it is sent again without one, `is_new` may be False though it was
        this call that made the key. `hear` is told how many bytes were sent, as they are, and a
        negative number if they are sent again."""
        headers = dict[str, str]()
        for name, value in (
            ("Content-Type", content_type),
            ("If-Match", if_match),
            ("If-None-Match", if_none_match),
        ):
            if value is not None:
                headers[name] = value
        source = Source(data)
        try:
            await in_thread(source.open)
            return await self._put(key, source, headers, hear)
        finally:
            await in_thread(source.close)

    async def get(self, key: str) -> bytes:
        """Return the whole blob, in memory, its digest checked. If a replica is bad another one is
        read; Corrupt if none is good."""
        retries = Retries(self.patience_s)
        avoid = set[str]()
        bad_reads = 0
        while True:
            download = Download(self, key, hasher=Hasher({}), avoid=avoid)
            try:
                return b"".join([piece async for piece in download.read()])
            except Corrupt:
                bad_reads += 1
                if not download.sources or bad_reads >= BAD_READS:
                    raise
                avoid |= download.sources
            except Changed as error:
                await retries.pause(error)

    async def stream(
        self, key: str, start: int = 0, end: int | None = None
    ) -> AsyncGenerator[bytes, None]:
        """Yield the blob, or its bytes from `start` to before `end`, in pieces. What lies beyond
        its end is not there, as in a slice.

        All pieces are of one version, over however many connections; if that is gone before all
        were read, Changed. After the last piece of a whole blob its digest is checked: Corrupt
        says that what was yielded is wrong. Whoever may stop early had better close it:
        `async with contextlib.aclosing(store.stream(key)) as pieces`."""
        if start < 0 or (end is not None and end < 0):
            raise ValueError("start and end count from the beginning")
        if start == 0 and end is None:
            download = Download(self, key, hasher=Hasher({}))
        else:  # no digest would tell that a replica is too short
            blob = await self.head(key)
            download = Download(self, key, start, end, digest=blob.digest, size=blob.size)
        async with contextlib.aclosing(download.read()) as pieces:
            async for piece in pieces:
                yield piece

    async def get_to(
        self, key: str, path: str | os.PathLike[str], *, hear: Hear = hear_nothing
    ) -> Blob:
        """Download into the file `path`, which appears, or is replaced, whole, checked and synced,
        or not at all; return what it is.

        What was cut off, even by a kill, goes on where it was, the next time: until it is whole it
        is kept beside, in `.mkv-*.part`. One download into a file at a time, else Unavailable.
        `hear` is told how many bytes have come, as they do, first how many had come before, and a
        negative number if they have to come again."""
        retries = Retries(self.patience_s)
        avoid = set[str]()
        bad_reads = 0
        while True:
            blob = await self.head(key)
            part = PartFile(Path(path))
            try:
                await in_thread(part.open)
                await self._fill(blob, part, avoid, hear)
                await in_thread(part.finish)
                return blob
            except Corrupt:
                await in_thread(part.remove)
                if part.is_fresh:  # else what was there before may be to blame
                    bad_reads += 1
                    if not part.sources or bad_reads >= BAD_READS:
                        raise
                    avoid |= part.sources
                hear(-part.heard)
            except Changed as error:
                await in_thread(part.remove)
                hear(-part.heard)
                await retries.pause(error)
            finally:
                part.close()

    async def head(self, key: str) -> Blob:
        """Return what the index says of the key; raises NotFound."""
        headers, _ = await self._ask("HEAD", target_of(key))
        try:
            return Blob(
                key=key,
                size=int(headers["Content-Length"]),
                digest=digest_of(headers["ETag"]),
                content_type=headers["Content-Type"],
                # Without a date it is, by the server's clock, not of the past.
                modified_s=parsedate_to_datetime(
                    headers.get("Last-Modified") or headers["Date"]
                ).timestamp(),
                volumes=tuple(headers["Mkv-Volumes"].split(",")),
            )
        except NOT_AS_MKV as error:
            raise Strange(f"the answer to HEAD of {key!r} lacks something: {error!r}") from None

    async def delete(self, key: str, *, if_match: str | None = None) -> None:
        """Delete the key; raises NotFound, PreconditionFailed. It is asked for until it is certain
        that nothing brings the key back. If one request got no answer and the next finds nothing,
        it is deleted; with `if_match` a request that gets no answer is Unanswered."""
        headers = {"If-Match": if_match} if if_match is not None else {}
        retries = Retries(self.patience_s)
        doubt = False  # whether it may have been carried out
        while True:
            try:
                await self._ask_once("DELETE", target_of(key), headers)
                return
            except NotFound:
                if doubt:
                    return
                raise
            except Unfinished as error:
                doubt = True
                await retries.pause(error)
            except FOR_NOW as error:
                doubt = doubt or may_have_arrived(error)
                if doubt and headers:
                    raise Unanswered(str(error)) from error
                await retries.pause(error, doubt)
            except MkvError as error:
                if doubt:
                    raise Unanswered(f"{error}; an attempt before had no answer") from error
                raise

    async def list(
        self, prefix: str = "", delimiter: str = "", start: str = ""
    ) -> AsyncGenerator[Blob, None]:
        """Yield all keys that begin with `prefix`, from `start` on, in the order of their bytes,
        over all pages, each as it is when its page is read. With `delimiter` all keys that share
        what comes before it after the prefix are one, with `is_prefix`."""
        following: str | None = start
        while following is not None:
            query = {"prefix": prefix, "delimiter": delimiter, "start": following}
            _, body = await self._ask("GET", target_of_list(query))
            try:
                found, following = read_page(body, following)
            except NOT_AS_MKV as error:
                raise Strange(f"what was answered is no list: {error!r}") from None
            for blob in found:
                yield blob

    async def status(self) -> dict[str, Any]:
        """Return what /-/status says."""
        _, body = await self._ask("GET", "/-/status")
        try:
            return dict(json.loads(body))
        except NOT_AS_MKV as error:
            raise Strange(f"what was answered is no status: {error!r}") from None

    # -- requests --

    @contextlib.asynccontextmanager
    async def send(
        self, method: str, url: str, headers: Mapping[str, str], **options: Any
    ) -> AsyncIterator[ClientResponse]:
        """Send one request, once, following no redirect; raises Unreachable, BadRequest."""
        if self._session is None:
            raise RuntimeError("a Client is used within `async with`")
        with told_plainly(method, url):
            try:
                response = await self._session.request(
                    method,
                    AnyURL(url, encoded=True),
                    headers=headers,
                    allow_redirects=False,
                    **options,
                )
            except ValueError as error:  # a host that cannot be, or a header
                raise BadRequest(
                    f"{method} {without_query(url)} cannot be sent: {error}"
                ) from None
            async with response:
                yield response

    @contextlib.asynccontextmanager
    async def send_to_server(
        self, method: str, target: str, headers: Mapping[str, str], **options: Any
    ) -> AsyncIterator[ClientResponse]:
        """Do the same with the token."""
        headers = {**headers, **self._credentials}
        async with self.send(method, self.url + target, headers, **options) as response:
            yield response

    async def _ask_once(
        self, method: str, target: str, headers: Mapping[str, str] = {}
    ) -> tuple[Mapping[str, str], bytes]:
        """Return headers and body of a good answer; raises the MkvError that it names."""
        async with self.send_to_server(method, target, headers) as response:
            body = await read_body(response)
        if response.status not in (200, 204):
            raise error_of(response, body)
        return response.headers, body

    async def _ask(self, method: str, target: str) -> tuple[Mapping[str, str], bytes]:
        """Do the same with patience, for what changes nothing."""
        retries = Retries(self.patience_s)
        while True:
            try:
                return await self._ask_once(method, target)
            except FOR_NOW as error:
                await retries.pause(error)

    async def _put(
        self, key: str, source: Source, headers: Mapping[str, str], hear: Hear
    ) -> Stored:
        is_bound = not headers.keys().isdisjoint(("If-Match", "If-None-Match"))
        retries = Retries(self.patience_s)
        doubt = False  # whether it may have been carried out
        while True:
            try:
                return await self._put_once(key, source, headers, is_bound, hear)
            except (*FOR_NOW, Unfinished) as error:
                doubt = doubt or may_have_arrived(error)
                is_over = (is_bound and doubt) or source.is_spent
                if is_over and doubt:
                    raise Unanswered(str(error)) from error
                if is_over:
                    raise
                await retries.pause(error, doubt)
            except MkvError as error:
                if doubt:
                    raise Unanswered(f"{error}; an attempt before had no answer") from error
                raise

    async def _put_once(
        self, key: str, source: Source, headers: Mapping[str, str], is_bound: bool, hear: Hear
    ) -> Stored:
        given = dict(headers)
        if source.digest:
            encoded = base64.b64encode(bytes.fromhex(source.digest)).decode()
            given["Repr-Digest"] = f"sha-256=:{encoded}:"
        if source.size is not None:
            given["Content-Length"] = str(source.size)
        # Nothing is carried out before all of its body has come, unless there is none. Who waits
        # to be asked for it knows that it was not; if that does not matter it is not worth a round
        # trip.
        asks = source.size is None or source.size > (0 if is_bound else SMALL_BLOB)
        last_s = self._timeout_s + KERNEL_BYTES / SLOWEST_LINK
        options = {"timeout": ClientTimeout(connect=self._timeout_s, sock_read=last_s)}
        feed = Feed(source, self._timeout_s, hear)
        try:
            async with (
                feed.patience,
                self.send_to_server(
                    "PUT", target_of(key), given, data=feed.pieces(), expect100=asks, **options
                ) as response,
            ):
                feed.patience.reschedule(None)
                body = await read_body(response)
        except (Unreachable, TimeoutError) as error:
            hear(-feed.heard)
            if feed.failure is not None:
                raise feed.failure from None
            sent = feed.has_begun or source.size == 0
            why = str(error) or f"PUT {key!r}: no progress in {self._timeout_s:g} s"
            raise Unreachable(why, sent and may_have_arrived(error)) from None
        if response.status not in (201, 204):
            hear(-feed.heard)
            raise error_of(response, body)
        stored = Stored(digest_of_answer(response), response.status == 201)
        if stored.digest != (source.digest or feed.digest):
            raise Corrupt(f"what is stored under {key!r} is not what was sent")
        return stored

    async def _fill(self, blob: Blob, part: PartFile, avoid: set[str], hear: Hear) -> None:
        """Read what the file lacks."""
        part.heard = part.size
        hear(part.size)
        download = Download(
            self, blob.key, part.size, digest=blob.digest, size=blob.size, hasher=part.hasher,
            avoid=avoid,
        )  # fmt: skip
        part.sources = download.sources
        held = bytearray()
        async with contextlib.aclosing(download.read()) as pieces:
            async for piece in pieces:
                hear(len(piece))
                part.heard += len(piece)
                held += piece
                if len(held) >= FILE_BYTES:
                    await in_thread(part.write, bytes(held))
                    held.clear()
        await in_thread(part.write, bytes(held))


async def send_once(request: ClientRequest, handler: ClientHandlerType) -> ClientResponse:
    """Keep aiohttp from sending a request again by itself, as it does with PUT and DELETE when a
    connection breaks: under a condition the second time says that the first did not happen."""
    try:
        return await handler(request)
    except ClientConnectorError:
        raise
    except (ClientOSError, ServerDisconnectedError) as error:
        raise Unreachable(f"{request.method} {request.url.path}: {error}", sent=True) from None


@contextlib.contextmanager
def told_plainly(method: str, url: str) -> Iterator[None]:
    """Raise Unreachable for whatever can happen to a connection; a link's signature is not in its
    words."""
    try:
        yield
    except (ClientError, OSError, EOFError, TimeoutError) as error:
        plain = without_query(url)
        told = str(error).replace(url.removeprefix(plain), "") or type(error).__name__
        sent = not isinstance(error, ClientConnectorError | ConnectionTimeoutError)
        raise Unreachable(f"{method} {plain}: {told}", sent) from None


def may_have_arrived(error: Exception) -> bool:
    """Whether what failed so may have been carried out: a server that says no has done nothing."""
    if isinstance(error, Unreachable):
        return error.sent
    return isinstance(error, TimeoutError | Unfinished)


async def in_thread(work: Callable[..., T], *arguments: Any) -> T:
    """Run `work` on a thread. It runs to its end even if whoever awaits it is cancelled, however
    often, and that one waits: so nobody closes the files that it uses."""
    running = asyncio.get_running_loop().run_in_executor(None, partial(work, *arguments))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        while not running.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([running])
        running.exception()  # which nobody will ask for
        raise


def target_of(key: str) -> str:
    return "/" + quote(check_key(key), safe="")


def target_of_list(query: Mapping[str, str]) -> str:
    try:
        return "/?" + urlencode({name: value for name, value in query.items() if value})
    except UnicodeEncodeError:
        raise BadRequest("the prefix is not valid UTF-8") from None


def digest_of(etag: str) -> str:
    """Return the digest that an ETag is; raises ValueError."""
    if not re.fullmatch('"[0-9a-f]{64}"', etag):
        raise ValueError(f"{etag} is no ETag of mkv")
    return etag[1:-1]


def digest_of_answer(response: ClientResponse) -> str:
    try:
        return digest_of(response.headers["ETag"])
    except (KeyError, ValueError) as error:
        raise Strange(f"{response.method} {response.url.path}: no digest, {error!r}") from None


async def read_body(response: ClientResponse) -> bytes:
    """Return an answer of the server itself, whose size is bounded."""
    body = bytearray()
    while piece := await response.content.readany():
        body += piece
        if len(body) > PAGE_BYTES:
            raise Strange("what is answered does not end")
    return bytes(body)


def error_of(response: ClientResponse, body: bytes) -> MkvError:
    """Return the error that an answer names."""
    status = response.status
    kind = REFUSALS.get(status, MkvError if status >= 500 else Strange)
    told = f"{response.method} {response.url.path} was answered {status} {kind.title}"
    if response.content_type != "application/problem+json":
        if status in (502, 503, 504):  # a proxy, which does not say how far it came
            return Unreachable(told, sent=True)
        return kind(told)
    with contextlib.suppress(*NOT_AS_MKV):
        problem = json.loads(body)  # HEAD has none
        told = f"{problem['detail']} (request {problem['request_id']})"
    wait = response.headers.get("Retry-After", "")
    return kind(told, Retry_After=wait) if wait else kind(told)


def read_page(body: bytes, start: str) -> tuple[list[Blob], str | None]:
    """Read a page of a list: its keys and common prefixes in the order of their bytes, and where
    the next begins. Raises many an error if it is none."""
    page = json.loads(body)
    found = [Blob(key=name, is_prefix=True) for name in page["prefixes"]]
    for row in page["keys"]:
        found.append(
            Blob(
                key=row["key"],
                size=int(row["size"]),
                digest=digest_of(row["etag"]),
                content_type=str(row["content_type"]),
                modified_s=datetime.fromisoformat(row["modified"]).timestamp(),
            )
        )
    following = page["next"]
    if following is not None and following.encode() <= start.encode():
        raise ValueError("the next page is not behind this one")
    found.sort(key=lambda blob: blob.key.encode())
    return found, following


class Retries:
    """Says when to try again what failed, and when to give up."""

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self._deadline_s = 0.0
        self._count = 0  # failures since there was progress

    def note_progress(self) -> None:
        self._count = 0

    async def pause(self, error: MkvError, doubt: bool = False) -> None:
        """Wait before the next attempt. If it is too late for that raise `error`; with `doubt`,
        which says that it may have been carried out all the same, Unanswered."""
        now_s = time.monotonic()
        if not self._count:
            self._deadline_s = now_s + self._patience_s
        pause_s = min(FIRST_PAUSE_S * 2 ** min(self._count, 10), LONGEST_PAUSE_S) * random.uniform(
            0.5, 1
        )
        wanted = error.headers.get("Retry-After", "")
        if re.fullmatch("[0-9]{1,9}", wanted):  # seconds; nobody here gives a date
            pause_s = max(pause_s, float(wanted))
        if now_s + pause_s > self._deadline_s:
            if doubt:
                raise Unanswered(str(error)) from error
            raise error
        self._count += 1
        await asyncio.sleep(pause_s)


class Download:
    """One version of a blob, or a part of it, that is read over as many connections as it takes.
    `avoid` are URLs of bad replicas; `sources` become those that were read from, "" for a proxy
    in front of the server that sends the blob itself."""

    def __init__(
        self, client: Client, key: str, start: int = 0, end: int | None = None, *,
        digest: str = "", size: int | None = None,
        hasher: Hasher | None = None, avoid: Collection[str] = (),
    ) -> None:  # fmt: skip
        self._client = client
        self._key = key
        self._at = start
        self._end = end
        self._digest = digest  # of the version, once that is known
        self._size = size  # of the whole blob, once that is known
        self._hasher = hasher  # if all of it will have been read
        self._avoid = avoid
        self.sources = set[str]()

    async def read(self) -> AsyncGenerator[bytes, None]:
        """Yield what is missing; raises Changed, and Corrupt at the end."""
        retries = Retries(self._client.patience_s)
        while not self._is_done():
            try:
                async with self._open() as response:
                    async for piece in response.content.iter_any():
                        self._at += len(piece)
                        if self._hasher:
                            self._hasher.update(piece)
                        retries.note_progress()
                        yield piece
            except FOR_NOW as error:
                await retries.pause(error)
        if self._hasher and self._hasher.finish() != self._digest:
            raise Corrupt(f"{self._key!r}: what was read has not the digest that it should have")

    def _is_done(self) -> bool:
        if self._end is not None and self._at >= self._end:
            return True
        return self._size is not None and self._at >= self._size

    @contextlib.asynccontextmanager
    async def _open(self) -> AsyncIterator[ClientResponse]:
        """Begin an answer with what is missing; raises Unavailable if there is none now."""
        headers = dict[str, str]()
        if self._at or self._end is not None:
            headers["Range"] = f"bytes={self._at}-{'' if self._end is None else self._end - 1}"
        target = target_of(self._key)
        for _ in range(ASK_AROUND):
            async with self._client.send_to_server("GET", target, headers) as response:
                if response.status in (200, 206, 416):
                    self.sources.add("")
                    await self._compare(response)
                    self._check(response)
                    yield response
                    return
                link = await self._read_redirect(response)
            source = without_query(link)
            if source in self._avoid:
                continue
            self.sources.add(source)
            async with self._client.send("GET", link, headers) as response:
                self._check(response)
                yield response
                return
        raise Corrupt(f"{self._key!r}: no replica that can be read is good")

    async def _read_redirect(self, response: ClientResponse) -> str:
        """Return where the version that was begun is to be read."""
        body = await read_body(response)
        if response.status != 302:
            error = error_of(response, body)
            if isinstance(error, NotFound) and self._digest:
                raise Changed("the key was deleted while it was read")
            raise error
        link = response.headers.get("Location", "")
        if not URL.fullmatch(link):
            raise Strange(f"a redirect leads to {without_query(link)!r}")
        await self._compare(response)
        return link

    async def _compare(self, response: ClientResponse) -> None:
        """Raise Changed unless it is still the version that was begun."""
        if "ETag" in response.headers:
            digest = digest_of_answer(response)
        else:  # a proxy does not pass it on
            digest = (await self._client.head(self._key)).digest
        if self._digest and self._digest != digest:
            raise Changed("the key was replaced while it was read")
        self._digest = digest

    def _check(self, response: ClientResponse) -> None:
        """Raise Unreachable unless just what is missing comes."""
        length = response.content_length
        if self._size is None and response.status == 200:
            self._size = length
        size = self._size or 0
        end = size if self._end is None else min(self._end, size)
        told = ""
        if response.status == 206:
            told = response.headers.get("Content-Range", "")
        elif response.status == 200:
            told = f"bytes 0-{(length or 0) - 1}/{length}"
        if told != f"bytes {self._at}-{end - 1}/{size}" or length != end - self._at:
            what = f"GET {without_query(str(response.url))} was answered {response.status}"
            raise Unreachable(f"{what}, and not with what is missing", sent=True)


def without_query(url: str) -> str:
    """Return a URL without what differs from one signed link to the next."""
    return url.partition("?")[0]


class PartFile:
    """What has come of a blob, beside the file that it will become. For one download at a time; it
    stays when that is cut off. If the key has another blob by then, the digest will tell, and all
    is read anew. All but `close` is for a thread."""

    def __init__(self, target: Path) -> None:
        self.size = 0  # bytes that have come
        self.heard = 0  # bytes that were told
        self.is_fresh = True  # nothing of it is from an earlier download
        self.sources = set[str]()
        self.hasher = Hasher({})
        self._target = target
        name = hashlib.sha256(os.fsencode(target.name)).hexdigest()[:32]  # which may be too long
        self._path = target.parent / f".mkv-{name}.part"
        self._fd = -1

    def open(self) -> None:
        """Go on with what is there; raises Unavailable if another download does just that, and
        OSError, rather now than in the end, where no file can be put."""
        if self._target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(self._target))
        if self._path.is_symlink():
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(self._path))
        while not self._lock():
            pass
        while piece := os.read(self._fd, FILE_BYTES):
            self.hasher.update(piece)
        self.size = self.hasher.size
        self.is_fresh = not self.size

    def _lock(self) -> bool:
        """Return whether the file that is now locked is still there under its name."""
        self.close()
        try:
            self._fd = lock_file(str(self._path), exclusive=True)
        except BlockingIOError:
            raise Unavailable(f"another download into {self._target} is under way") from None
        with contextlib.suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(self._fd), os.stat(self._path))
        return False

    def write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self._fd, view) :]
        self.size += len(data)

    def remove(self) -> None:
        """Forget what has come: it is wrong."""
        os.unlink(self._path)

    def finish(self) -> None:
        """Make it the file, for good."""
        os.fsync(self._fd)
        os.replace(self._path, self._target)
        sync_folder(self._target.parent)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Source:
    """The bytes of a PUT. Of what can be read twice, size and digest are known before they are
    sent; of what comes once, a flow or a pipe, nothing is."""

    def __init__(self, data: Data) -> None:
        self.size: int | None = None
        self.digest = ""  # SHA-256 in hex
        self.is_spent = False  # it comes once, and was begun
        self._data = data
        self._file: IO[bytes] = io.BytesIO()
        self._start = 0

    def open(self) -> None:
        """Find out what can be known; raises TypeError, OSError. For a thread."""
        data = self._data
        if isinstance(data, AsyncIterable):
            return
        if isinstance(data, bytes | bytearray | memoryview):
            self._file = io.BytesIO(data)
        elif isinstance(data, os.PathLike):
            self._file = open(data, "rb")  # noqa: SIM115
        elif hasattr(data, "read"):
            self._file = data
        else:
            raise TypeError(
                f"data is bytes, a Path, a file or an async iterator, not {type(data)}"
            )
        if self._file.seekable():
            self._start = self._file.tell()
            hasher = Hasher({})
            while piece := self._read(FILE_BYTES):
                hasher.update(piece)
            self.digest = hasher.finish()
            self.size = hasher.size

    def close(self) -> None:
        """Close the file, unless it was given. For a thread."""
        if self._file is not self._data:
            self._file.close()

    async def pieces(self) -> AsyncIterator[bytes]:
        """Yield all of it, from its beginning."""
        self.is_spent = not self.digest
        if isinstance(self._data, AsyncIterable):
            async for piece in self._data:
                yield bytes(piece)
            return
        if self.digest:
            await in_thread(self._file.seek, self._start)
        sent = 0
        while sent != self.size:
            most = FILE_BYTES if self.size is None else min(FILE_BYTES, self.size - sent)
            piece = await in_thread(self._read, most)
            if not piece and self.size is None:
                return
            if not piece:
                raise OSError(errno.EIO, "the file has become shorter meanwhile")
            sent += len(piece)
            yield piece

    def _read(self, size: int) -> bytes:
        piece = self._file.read(size)
        if not isinstance(piece, bytes):
            raise TypeError(f"the file gives {type(piece)}: open it as a binary one")
        return piece


class Feed:
    """Hands the bytes of a PUT to aiohttp, and sees whether the server takes them. As long as the
    source is waited for, nobody else is to blame."""

    def __init__(self, source: Source, timeout_s: float, hear: Hear) -> None:
        self._source = source
        self._timeout_s = timeout_s
        self._hear = hear
        self._loop = asyncio.get_running_loop()
        self.patience = asyncio.timeout(timeout_s)
        self.has_begun = False
        self.heard = 0  # bytes
        self.failure: Exception | None = None  # of the source
        self.digest = ""

    async def pieces(self) -> AsyncIterator[bytes]:
        self.has_begun = True
        hasher = Hasher({})
        try:
            self.patience.reschedule(None)
            async for data in self._source.pieces():
                if not self._source.digest:
                    hasher.update(data)
                for at in range(0, len(data), PIECE_BYTES):
                    piece = data[at : at + PIECE_BYTES]
                    self.patience.reschedule(self._loop.time() + self._timeout_s)
                    yield piece
                    self._hear(len(piece))
                    self.heard += len(piece)
                self.patience.reschedule(None)
        except Exception as error:
            self.failure = error
            raise
        self.digest = hasher.finish()


# == Command line =================================================================================
# The only part that reads arguments and the environment, prints, handles signals and starts
# processes.

new_loop: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop
with contextlib.suppress(ImportError):
    from uvloop import new_event_loop as new_loop


class LogFormatter(logging.Formatter):
    """One line an entry, as text with key=value or as JSON; what clients send is escaped either
    way."""

    def __init__(self, as_json: bool) -> None:
        super().__init__()
        self._format = format_json if as_json else format_text

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        if record.exc_info:
            message += "\n" + self.formatException(record.exc_info)
        facts: dict[str, Any] = getattr(record, "facts", {})
        return self._format(record.created, record.levelname.lower(), message, facts)


def set_up_logging(config: Config) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(LogFormatter(config.log_format == "json"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.getLogger("asyncio").setLevel(logging.ERROR)
    logging.getLogger("aiohttp.server").addFilter(is_no_clients_fault)


def is_no_clients_fault(record: logging.LogRecord) -> bool:
    """Whether a line of aiohttp's server is to be written. One about a request that is no HTTP is
    not: it holds what was sent. Nor is one about a client that has gone."""
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, HttpProcessingError | ConnectionError)


def notify_systemd(message: str) -> None:
    """Tell systemd, if it runs us, READY=1 and the like (sd_notify(3))."""
    if address := os.environ.get("NOTIFY_SOCKET", ""):
        with (
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notifier,
            contextlib.suppress(OSError),
        ):
            notifier.connect("\0" + address[1:] if address.startswith("@") else address)
            notifier.send(message.encode())


def listen(host: str, port: int) -> socket.socket:
    """Bind a listening socket; raises ConfigError."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, TypeError, UnicodeError) as error:  # not only OSError: of names
        reason = getattr(error, "strerror", None) or error
        raise ConfigError([f"port: cannot listen on {host}:{port}: {reason}"]) from None


def load_config(file: str, flags: Mapping[str, Any]) -> Config:
    """Read the TOML file (none if its name is empty), then the flags; raises ConfigError."""
    try:
        text = Path(file).read_text(encoding="utf-8") if file else ""
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"--config: {error}"]) from None
    return parse_config(text, file or "config", flags)


def print_faults(error: ConfigError) -> None:
    print(*(f"mkv: {fault}" for fault in error.faults), sep="\n", file=sys.stderr)


def announce_others(db: str) -> None:
    """Say so in the log if another server has this index. Its lock is held, and inherited by the
    workers, until all of this one is gone."""
    if is_url(db):
        return  # that is what it is for
    try:
        Path(db).parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(f"{os.path.realpath(db)}.serve", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError:
        return  # opening the index says what is wrong
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        log.warning("another server has the index %s, too: one of them should be stopped", db)
    fcntl.flock(fd, fcntl.LOCK_SH)


def greet(config: Config, listener: socket.socket, embedded: bool) -> str:
    host = f"[{config.host}]" if ":" in config.host else config.host
    url = f"http://{host}:{listener.getsockname()[1]}"
    volumes = " ".join(f"{volume.name}={volume.url}" for volume in config.volumes)
    volumes += f" (embedded, under {config.data})" if embedded else ""
    trial = suggest_trial(config, url)
    db = hide_secrets(config.db)
    return f"mkv is ready on {url} (index {db})\nvolumes: {volumes}\ntry: {trial}\n"


def suggest_trial(config: Config, url: str) -> str:
    """Return a command that stores a blob and reads it, as whoever may do both."""
    rules = [rule for rule in (config.anonymous, *config.tokens) if rule is not None]
    able = [rule for rule in rules if {"read", "write"}.issubset(rule.allow)]
    if rules and not able:
        return f"curl {url}/-/readyz (no token may both write and read)"
    shown = ""
    if able and able[0] is not config.anonymous:
        shown = '-H "Authorization: Bearer $MKV_TOKEN" '
    prefix = able[0].prefix if able else ""
    target = f"{shown}{url}/{quote(prefix)}hello"
    return f"curl -T README.md {target} && curl -L {target}"


async def wait_for_stop(
    greeting: str = "", reload: Callable[[], Awaitable[None]] | None = None
) -> None:
    """Print `greeting` once signals are heard; return at SIGTERM or SIGINT, a second one ends the
    process; `reload` at SIGHUP. Tells systemd of all that, and keeps its watchdog content."""
    loop = asyncio.get_running_loop()
    signals = asyncio.Queue[int]()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        loop.add_signal_handler(number, signals.put_nowait, number)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
    print(greeting, end="", flush=True)
    notify_systemd("READY=1")
    watchdog_s = int(os.environ.get("WATCHDOG_USEC", 0)) / 2e6 or None
    stop = False
    while not stop:
        with contextlib.suppress(TimeoutError):
            stop = await asyncio.wait_for(signals.get(), watchdog_s) != signal.SIGHUP
            if reload and not stop:
                await reload()
        notify_systemd("WATCHDOG=1")
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, os._exit, 1)
    notify_systemd("STOPPING=1")


async def serve_store(
    config: Config,
    listener: socket.socket,
    reread: Callable[[], Config],
    metrics: Metrics,
    number: int,
    embedded: bool,
    peers: Peers | None = None,
) -> None:
    """Serve the store on `listener` until a signal, then let the requests under way finish.
    Process 0 greets."""
    async with open_store(config, metrics, peers) as store:
        entries = AccessLog(sys.stderr.fileno(), store.view.config.log_format == "json")
        store.note_access = entries.note
        await serve_clients(store, listener, reread, number, embedded)
        entries.flush()
    log.info("stopped")


async def serve_clients(
    store: Store, listener: socket.socket, reread: Callable[[], Config], number: int,
    embedded: bool,
) -> None:  # fmt: skip
    server = Server(store)
    loop = asyncio.get_running_loop()
    accepting = await loop.create_server(server.connect, sock=listener, backlog=1024)

    async def reload() -> None:
        notify_systemd(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
        try:
            await store.reload(reread())
        except Exception as error:  # whatever it is, the store goes on
            log.error(
                "configuration not reloaded, everything stays: %s", str(error).replace("\n", "; ")
            )
        notify_systemd("READY=1")

    await wait_for_stop(
        greet(store.view.config, listener, embedded) if number == 0 else "", reload
    )
    log.info("stopping, requests under way: %d", store.in_flight)
    store.stopping = True  # not ready first, then no new connections, then the requests under way
    with contextlib.suppress(BlockingIOError):
        while True:  # who has connected already is not turned away
            await loop.connect_accepted_socket(server.connect, listener.accept()[0])
    accepting.close()
    await server.drain()
    await server.close()


def supervise(config: Config, listener: socket.socket, reread: Callable[[], Config]) -> int:
    """Fork the workers, and one process (number -1) for embedded volumes; start again who dies;
    return the exit code. They share the listening socket and the metrics. This process runs no
    event loop: it only waits for signals."""
    # Nobody writes: its end of file tells the others that this process is gone.
    parent_r, parent_w = os.pipe()
    folders = dict[Path, socket.socket]()  # of embedded volumes
    if not config.volumes:
        config, folders = embed_volumes(config)
    shared = mmap.mmap(-1, config.workers * REGION)
    pipes = open_pipes(config.workers)
    children = dict[int, int]()
    stopping = False
    code = 0
    watched = {signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
    signal.pthread_sigmask(signal.SIG_BLOCK, watched)

    async def work(number: int) -> None:
        asyncio.get_running_loop().add_reader(parent_r, os._exit, 1)
        if number != 0:
            os.environ.pop("NOTIFY_SOCKET", None)
        if number < 0:
            listener.close()  # whoever holds it keeps it listening
            async with serve_volumes(folders, config, EMBEDDED_CONNECTIONS):
                return await wait_for_stop()
        peers = Peers(pipes, number)
        metrics = Metrics(shared, number)
        await serve_store(config, listener, reread, metrics, number, bool(folders), peers)

    def start(number: int) -> None:
        if pid := os.fork():
            children[pid] = number
            return
        os.close(parent_w)
        os.setsid()  # the terminal's Ctrl-C is for this process to pass on
        # A SIGHUP that comes while it starts waits until it can be heard.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, watched - {signal.SIGHUP})
        run(work(number))

    for number in range(-1 if folders else 0, config.workers):
        start(number)
    while children:
        heard = signal.sigwait(watched)
        passed_on = 0
        if heard == signal.SIGHUP:
            passed_on = signal.SIGHUP
            with contextlib.suppress(ConfigError):  # the workers say what is wrong
                config = reload_config(config, reread())
        elif heard != signal.SIGCHLD:
            passed_on = signal.SIGKILL if stopping else signal.SIGTERM
            stopping = True
            listener.close()
        # One SIGCHLD may stand for several.
        while children and (ended := os.waitpid(-1, os.WNOHANG))[0]:
            worker = children.pop(ended[0])
            status = os.waitstatus_to_exitcode(ended[1])
            if status == 2:  # it has said what is wrong with the configuration or the index
                stopping = True
                code = 2
                if passed_on != signal.SIGKILL:
                    passed_on = signal.SIGTERM
            elif not stopping:
                log.error("worker %d ended with %d, starting it again", worker, status)
                time.sleep(1)
                start(worker)
        only_volumes = set(children.values()) == {-1}  # they go last: requests under way need them
        for pid, worker in children.items():
            if passed_on == signal.SIGKILL or (passed_on and worker >= 0):
                os.kill(pid, passed_on)
            elif stopping and only_volumes:
                os.kill(pid, signal.SIGTERM)
    return code


async def serve_one_volume(config: Config, folder: str) -> None:
    """Serve an embedded volume on its own until a signal."""
    listener = listen(config.host, config.port)
    url = f"http://{config.host}:{listener.getsockname()[1]}"
    async with serve_volumes({Path(folder): listener}, config, config.max_connections):
        await wait_for_stop(f"mkv volume is ready on {url} (files in {folder})\n")


def run(main: Awaitable[None]) -> NoReturn:
    """Run to the end and end the process: by os._exit, so that nothing that a shutdown cut off can
    hold it up."""

    async def begin() -> None:
        await main

    code = 0
    try:
        asyncio.Runner(loop_factory=new_loop).run(begin())
    except ConfigError as error:
        print_faults(error)
        code = 2
    except IndexFailed as error:  # a database that does not answer
        log.error("%s", error)
        code = 1
    except Exception:
        log.exception("unexpected error")
        code = 1
    sys.stdout.flush()
    os._exit(code)


def add_settings(
    parser: argparse.ArgumentParser, names: Collection[str],
    defaults: Mapping[str, Any] = {}, abouts: Mapping[str, str] = {},
) -> None:  # fmt: skip
    """Give `parser` --config and a flag for each setting in `names`; flags not given are None. In
    its help, `defaults` and `abouts` stand for Config's own."""
    parser.add_argument(
        "--config", metavar="FILE", default="", help="TOML file with the same names; flags beat it"
    )
    for spec in fields(Config):
        flag = f"--{spec.name.replace('_', '-')}"
        about = abouts.get(spec.name, spec.metadata.get("help", ""))
        if spec.name not in names:
            continue
        if spec.name == "volumes":
            parser.add_argument(
                "--volume", metavar="[NAME=]URL", action="append", help="a volume; may be repeated"
            )
        elif isinstance(spec.default, bool):
            parser.add_argument(
                flag, action=argparse.BooleanOptionalAction, default=None, help=about
            )
        elif spec.metadata:
            about += f" [{defaults.get(spec.name, spec.default)}]"
            parser.add_argument(flag, metavar=type(spec.default).__name__.upper(), help=about)


# Of the `volume` command. It has no tokens, so `insecure` means something else there: see below.
VOLUME_DEFAULTS: dict[str, Any] = {"port": "3001", "insecure": True}
VOLUME_ABOUTS = {
    "insecure": "listen beyond loopback without a volume_secret",
    "body_timeout": "as the index server has it; a body that comes no further gets twice as long",
}
NOT_UTF8 = re.compile("[\ud800-\udfff]")  # what Python makes of a byte that is not
VOLUME_SETTINGS = (
    "host", "port", "log_format", "insecure",
    "max_connections", "header_timeout", "body_timeout", "keepalive_timeout",
)  # fmt: skip


def prepare_streams() -> None:
    """Let output be UTF-8, whatever the locale says. Give standard streams that were closed at the
    start to nobody else: a log would go into a socket, or into the index."""
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "r+"))  # noqa: SIM115 - for good
        elif isinstance(stream, io.TextIOWrapper) and name != "stdin":
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")


def parse_arguments(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None
) -> argparse.Namespace:
    """Parse a command line, all of it UTF-8, whatever the locale says; exits with 2 if it is
    wrong. None stands for the process's own: where the locale has another encoding, Python has
    read it by that, and would name files so, too. Then the process starts over, in UTF-8 mode."""
    if arguments is None and sys.getfilesystemencoding() != "utf-8":
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    prepare_streams()
    arguments = sys.argv[1:] if arguments is None else arguments
    for number, argument in enumerate(arguments, 1):
        if NOT_UTF8.search(argument):
            parser.error(f"argument {number} is not valid UTF-8: {argument!a}")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="mkv.py", description="A distributed key-value store for blobs."
    )
    parser.add_argument("--version", action="version", version=f"mkv {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="serve|volume")
    # Secrets on a command line are public.
    settings = [spec.name for spec in fields(Config) if spec.repr]
    add_settings(commands.add_parser("serve", help="run the index server"), settings)
    volume = commands.add_parser(
        "volume", help="run one volume server, for machines without nginx"
    )
    volume.add_argument("folder", metavar="DIR", help="where its files are")
    add_settings(volume, VOLUME_SETTINGS, VOLUME_DEFAULTS, VOLUME_ABOUTS)
    flags = {
        name: value
        for name, value in vars(parse_arguments(parser, arguments)).items()
        if value is not None
    }
    command = flags.pop("command")
    file = flags.pop("config", "")
    folder = flags.pop("folder", "")
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until it is listened for
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # each connection is an open file
    try:
        config = load_config(file, flags if command == "serve" else VOLUME_DEFAULTS | flags)
        set_up_logging(config)
        if command == "volume":
            if not (
                config.volume_secret or flags.get("insecure") or LOOPBACK.fullmatch(config.host)
            ):
                raise ConfigError(
                    [
                        f"host: {config.host} is reachable from outside; set volume_secret or "
                        "say insecure"
                    ]
                )
            run(serve_one_volume(config, folder))
        listener = listen(config.host, config.port)
        reread = partial(load_config, file, flags)
        announce_others(config.db)
        if config.workers > 1:
            return supervise(config, listener, reread)
        run(serve_store(config, listener, reread, Metrics(), 0, not config.volumes))
    except ConfigError as error:
        print_faults(error)
        return 2


if __name__ == "__main__":
    sys.exit(main())
