"""The tools for mkv: rebuild, rebalance, verify, status, bench, backup, move-index, forget, token
for whoever runs a store; put, get, ls, rm, import for whoever uses one.

What a tool has to know of keys, paths, records, the ring, the index and the volumes is in mkv.py;
here is only what it takes to walk, compare, copy and report. Theory of operation:

1.  Walking. A folder /aa/bb/ holds all versions of all keys whose hash begins with aabb, on every
    volume. The tools walk the 65,536 folders in order, on all volumes in step, a few at a time:
    memory does not grow with the number of keys. Listings (nginx's autoindex JSON) are read
    strictly: a folder that is not there is empty, anything else that is not a whole listing is a
    failure. A timeout is never read as absence (I8).
2.  Reading. Listings, sidecars and small blobs are many and small: GETs are pipelined
    (VolumeClient.get). Each has a bound, whatever a volume sends: LISTING_BYTES for the folders
    that are read at once, MAX_SIDECAR_BYTES, SMALL_BLOB. Large blobs are streamed.
3.  rebuild takes the index alone (INDEX.lock; in PostgreSQL by its lease): no server and no other
    tool has it open. A folder
    is merged by itself: of each key the highest version with a sound sidecar and its blob beside
    it becomes the record, older versions become garbage. The result is a new file, INDEX.new,
    checked, then put in place with one rename; the old index stays as INDEX.<date>.
4.  It believes no single sidecar: all are read. Where those of a version are not all sound and the
    same, the blobs beside them are read too, and the sidecar that a blob agrees with, in size and
    digest, is right; a replica of other bytes is left out. A version that has a sidecar and a
    blob, and is neither settled so nor dead (older than the record, or garbage of the old index),
    ends it: all of them are named, and nothing is changed. A blob that no volume has a sidecar of
    is an unfinished write. What the old index had and the new one lacks is reported; no file is
    left that could bring it back.
5.  What was deleted stays deleted (I4): if the old index can be read, its garbage is carried over,
    and a version that is garbage there without being the record's is never adopted. Without an old
    index the sidecars alone decide. A volume that it has blobs on must be there and not be empty,
    lest a disk that is not mounted counts as read.
6.  Moving replicas (rebalance, verify --repair) locks no key. A batch of keys goes through claim,
    copy, commit. Claim, one transaction: if a record still is what the plan saw, the places to be
    written are claimed. Copy: read one replica, check its digest, write blob, then sidecar.
    Commit, one transaction: if nothing came between, the record gets its new volumes, the claims
    end and dropped replicas become garbage; else the copies do, and the key is left to the client.
7.  A bad replica is made anew in its place. Its record stands there all the time, so a repair that
    fails, or is killed, leaves it as it was. If a DELETE or a PUT comes between, this place, or
    one that is being copied to, is garbage in doubt: that nothing is there does not settle it,
    since it may yet be written here. The doubt ends when the tool says that it has written.
8.  So whenever a tool is killed (I7), a copy that no record names is claimed: for a DELETE to
    find, for rebuild to ignore. The next run takes over the claims of a dead one (only one tool
    moves at a time: INDEX.tools, or a lease), and makes garbage of what it has no use for, but not
    of what was being made anew, where the record stands. Nothing is ever copied where garbage is
    due, since the server may be deleting just there, nor where a DELETE was not answered and may
    come late: rebalance waits a while for that, then leaves the key to a later run.
9.  No tool drops the last good replica (I8): a move reads one replica in full and finds its digest
    right, and that one or its copies stay. No place that a record names becomes garbage.
10. verify notes the path of every record in a scratch database of its own, then walks the folders
    and compares. The store is in use: what looks wrong is looked up again before it
    counts. A record with fewer replicas than `replicas` gets more where a PUT would write now.
    Strays are noted and removed at the end: only if no volume failed, only if older than --grace
    by version and by mtime, and by entering the garbage in a transaction that looks the record up
    once more. No PUT can still commit one: its claim would be there.
11. A corrupt replica is first uploaded as /corrupt/<its name> on its volume, where no tool looks.
    Then the good bytes are PUT to its path. That is no overwriting of a blob in place (a volume
    renames a whole file there) and no new version: a path names a version, and the version's
    digest names the bytes.

After restoring a backup of the index, run rebuild, not verify --repair: to verify, what is not in
the index is a stray. Exit codes: 0 done; 1 something is left or failed; 2 wrong usage, or a
configuration or an index that cannot be used. Ctrl-C is safe: the same command goes on.

Reading order: plans (pure), reading volumes, moving replicas, running, tool after tool, command
line."""

from __future__ import annotations

import signal
import sys

# Run as a program: a Ctrl-C during the imports ends it, without a traceback.
if sys.argv[0].endswith(("mkv_tools.py", "mkv-tools")) and (
    signal.getsignal(signal.SIGINT) is signal.default_int_handler
):
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import asyncio
import bisect
import contextlib
import errno
import hashlib
import json
import logging
import math
import multiprocessing
import os
import random
import re
import secrets
import sqlite3
import stat
import tempfile
import time
from collections import Counter, defaultdict, deque
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from email.utils import parsedate_to_datetime
from functools import partial
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import SplitResult, quote, urlsplit

# fmt: off
# isort: off
from mkv import (
    ALL_KEYS, BROKEN_OFF, CLAIMS, COPYING, EMBEDDED_VOLUMES, END_OF_TIME_NS, GARBAGE, HUNG,
    LISTING_BYTES, MAX_SIDECAR_BYTES, OPERATIONS, PATIENCE_S, SMALL_BLOB, STEM, TOOL, URL, Answer,
    Blob, Client, Config, ConfigError, Corrupt, Forbidden, Full, Hasher, Index, IndexDamaged,
    IndexFailed, MkvError, NotFound, Pending, PendingState, PreconditionFailed, Record,
    Replacement, Ring, State, States, Store, Token, Transaction, Unanswered, Unauthorized,
    Unavailable, Unreachable,
    Upload, Volume, VolumeClient, VolumeDown, VolumeError, VolumeTimeout, VolumeUnexpected,
    WrongDigest, add_settings, after_prefix, check_key, decode_mark, decode_sidecar,
    encode_sidecar, hide_secrets, is_postgres, load_config, media_type_of, new_loop, open_engine,
    parse_path, print_faults, run_embedded, sidecar_path, version_ns,
    NOT_AS_MKV, NOT_UTF8, parse_arguments, read_body,
)
from aiohttp import ClientResponse  # only now: mkv says what is missing
# isort: on
# fmt: on

T = TypeVar("T")
File = tuple[int, str]  # (size, mtime as listed); the size is -1 for what is no plain file
Files = dict[str, File]  # by name or path
Found = dict[str, Files]  # volume -> path -> file
Place = tuple[str, str]  # (volume, path)
Names = tuple[str, ...]  # of volumes
Replica = tuple[str, Record]  # (volume, record)
Sidecars = Mapping[str, Record | str]  # volume -> what its sidecar says, or what is wrong with it
Digests = Mapping[Place, str]  # of blobs, "" for one that has not as many bytes as were listed
Answered = Answer | VolumeError
Clients = Mapping[str, VolumeClient]
On = Mapping[str, Sequence[str]]  # volume -> folders that it has
More = Callable[[Sequence[str]], Awaitable[Iterable[str]]]  # folders /aa/ -> folders below
Work = Callable[[list[str], On], Awaitable[None]]  # on a run of folders

# == Plans ========================================================================================
# What is to be done, from what is known. Pure: no clock, no I/O.

BATCH_KEYS = 48
BATCH_BYTES = 4 * 1024 * 1024  # small blobs that are moved together


class Case(NamedTuple):
    """Something found."""

    kind: str
    volume: str = ""
    path: str = ""
    key: str = ""
    detail: str = ""


Judgement = tuple[Record | None, list[Case]]  # of a version


@dataclass(slots=True)
class Version:
    """What all volumes hold of one version of one key. `stem` is its path without extension."""

    stem: str
    sidecars: Files = field(default_factory=dict)  # volume -> file
    blobs: dict[str, Files] = field(default_factory=dict)  # volume -> path -> file
    marks: Files = field(default_factory=dict)  # volume -> file

    @property
    def places(self) -> list[Place]:
        """Every blob of it, and every sidecar without a blob, as its garbage entries name it."""
        volumes = sorted(self.sidecars.keys() | self.blobs.keys())
        return [
            (volume, path) for volume in volumes for path in self.blobs.get(volume, [self.stem])
        ]

    def path_of(self, record: Record) -> str:
        """Return the path of a record of this version without hashing its key once more."""
        return f"{self.stem}.{record.ext}" if record.ext else self.stem

    def size(self, volume: str, path: str) -> int | None:
        file = self.blobs.get(volume, {}).get(path)
        return file and file[0]


def make_pair(row: dict[str, Any]) -> tuple[str, File]:
    """Return (name, file) of an entry of a listing; raises ValueError."""
    name = row.get("name")
    kind = row.get("type")
    mtime = row.get("mtime")
    size = row.get("size")
    if type(name) is not str or not name or "/" in name:
        raise ValueError("an entry has no name")
    if type(kind) is not str or type(mtime) is not str:
        raise ValueError("an entry has no type or no mtime")
    if kind != "file":
        return name, (-1, mtime)
    if type(size) is not int or not 0 <= size < 2**63:
        raise ValueError("a file has no size")
    return name, (size, mtime)


# It makes each entry a pair as soon as it is read: as dicts they would take ten times their bytes.
ENTRIES = json.JSONDecoder(object_hook=make_pair)


def parse_listing(body: bytes) -> Files:
    """Read a folder in nginx's autoindex JSON; raises ValueError if it is cut short or anything
    else."""
    text = body.decode("utf-8", "surrogateescape")  # nginx passes any name of a file on as it is
    try:
        pairs = ENTRIES.decode(text)
    except RecursionError:
        raise ValueError("it is nested") from None
    if type(pairs) is not list or any(type(pair) is not tuple for pair in pairs):
        raise ValueError("it is no list of entries")
    return dict(pairs)


def group_files(found: Found) -> tuple[dict[str, Version], list[Case]]:
    """Sort what was found by version (stem -> version); name what mkv never wrote."""
    versions = dict[str, Version]()
    foreign = list[Case]()
    for volume, files in found.items():
        for path, file in files.items():
            parsed = parse_path(path) if file[0] >= 0 else None
            if parsed is None:
                # Of a move between file systems that was cut off.
                left = re.fullmatch(r"(.*)\.\d{10}", path)
                foreign.append(
                    Case(
                        "nginx leftover" if left and parse_path(left[1]) else "foreign file",
                        volume,
                        path,
                    )
                )
                continue
            version = versions.get(path[:STEM]) or versions.setdefault(
                path[:STEM], Version(path[:STEM])
            )
            if parsed[2] == "key":
                version.sidecars[volume] = file
            elif parsed[2] == "del":
                version.marks[volume] = file
            else:
                version.blobs.setdefault(volume, {})[path] = file
    return versions, foreign


def find_doubts(version: Version, read: Sidecars) -> list[Place]:
    """Return the blobs whose bytes have to say which sidecar is right: none if all are sound and
    say the same."""
    if len(set(read.values())) == 1:
        return []
    places = set[Place]()
    for record in {sidecar for sidecar in read.values() if isinstance(sidecar, Record)}:
        path = version.path_of(record)
        places |= {(volume, path) for volume in read if version.size(volume, path) == record.size}
    return sorted(places)


def judge_beside(version: Version, record: Record, volume: str, digests: Digests) -> str:
    """Return what is wrong with the blob beside a sidecar: by its size, and its digest if it was
    read."""
    path = version.path_of(record)
    size = version.size(volume, path)
    if size is None:
        return "sidecar without blob"
    if size != record.size:
        return "wrong size"
    digest = digests.get((volume, path), record.digest)
    return "" if digest == record.digest else "corrupt"


def choose_record(version: Version, read: Sidecars, digests: Digests) -> Record | None:
    """Return the record, without volumes, that a blob agrees with; None if there is none, or if
    blobs contradict each other. No blob can tell the content type: most sidecars decide, else the
    extension."""
    votes = Counter(sidecar for sidecar in read.values() if isinstance(sidecar, Record))
    proved = []
    for record in votes:
        if "" in (judge_beside(version, record, volume, digests) for volume in read):
            proved.append(record)
    if len({record.digest for record in proved}) != 1:
        return None

    def rank(record: Record) -> tuple[int, bool, str, str]:
        fits = media_type_of(record.content_type, record.key)[1] == record.ext
        return -votes[record], not fits, record.content_type, record.ext

    return min(proved, key=rank)


def tell_apart(record: Record, others: Collection[Record]) -> str:
    """Say what was decided where sidecars differ."""
    told = []
    for name in ("size", "digest", "content_type", "ext"):
        mine = getattr(record, name)
        theirs = {getattr(other, name) for other in others} - {mine}
        told += [f"{name} is {mine!r}, not {one!r}" for one in sorted(theirs)]
    return "; ".join(told)


def judge_version(version: Version, read: Sidecars, digests: Digests) -> Judgement:
    """Return the record that sidecars and the blobs beside them make, None if they make none, and
    what is wrong with them. `digests` are those of the blobs that find_doubts names."""
    path = f"{version.stem}.key"
    record = choose_record(version, read, digests)
    volumes = list[str]()
    others = dict[str, Record]()
    cases = list[Case]()
    for volume, sidecar in sorted(read.items()):
        if isinstance(sidecar, str):
            cases.append(Case("bad sidecar", volume, path, "", sidecar))
        elif record and sidecar != record:
            others[volume] = sidecar
        told = record or sidecar
        if isinstance(told, str):
            continue
        blob = version.path_of(told)
        match judge_beside(version, told, volume, digests):
            case "":
                volumes.append(volume)
            case "sidecar without blob" as wrong:
                cases.append(Case(wrong, volume, path, told.key))
            case "wrong size" as wrong:
                detail = f"{version.size(volume, blob)} bytes instead of {told.size}"
                cases.append(Case(wrong, volume, blob, told.key, detail))
            case wrong:
                cases.append(Case(wrong, volume, blob, told.key))
    if record is None:
        return None, cases
    if others:
        detail = tell_apart(record, others.values())
        cases.append(Case("contradicting sidecars", " ".join(others), path, record.key, detail))
    return record._replace(volumes=tuple(volumes)), cases


def name_unusable(version: Version, read: Sidecars) -> Case:
    """Say why a version that has blobs and sidecars makes no record."""
    sidecars = {sidecar for sidecar in read.values() if isinstance(sidecar, Record)}
    keys = {sidecar.key for sidecar in sidecars}
    if not sidecars:
        detail = "no sidecar can be used"
    elif len(sidecars) == 1:
        detail = "no blob fits its sidecar"
    else:
        detail = "sidecars contradict each other, and no blob decides"
    volumes = " ".join(sorted(read.keys() | version.blobs.keys()))
    return Case("unusable version", volumes, f"{version.stem}.key", min(keys, default=""), detail)


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """How a record gets to the volumes `keep` and `copy`; on some of `copy` it may stand already,
    with a bad replica that is made anew. If `left` says why, nothing can be done now."""

    record: Record
    sources: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    copy: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()
    left: str = ""

    @property
    def after(self) -> Record:
        return self.record._replace(volumes=tuple(sorted(self.keep + self.copy)))


def plan_move(record: Record, target: Sequence[str], states: Mapping[str, State]) -> Move | None:
    """Bring a record to the volumes that the ring names; None if it is there.

    Only volumes that are up are written to, only those that are not down are read. If there is
    nothing to copy, one of the replicas that stay must be read and found good before others are
    dropped.
    """
    copy = tuple(v for v in target if v not in record.volumes)
    keep = tuple(v for v in record.volumes if v in target)
    drop = tuple(v for v in record.volumes if v not in target)
    if not copy and not drop:
        return None
    readable = [
        v
        for v in (record.volumes if copy else keep)
        if states.get(v, State.DOWN) is not State.DOWN
    ]
    if unfit := [f"{v} is {states[v].value}" for v in copy if states[v] is not State.UP]:
        return Move(record=record, left=", ".join(unfit))
    if not readable:
        return Move(record=record, left=f"none of {', '.join(record.volumes)} can be read")
    # Spreads the reading, the same way each time.
    turn = int(record.version[-4:], 16) % len(readable)
    sources = (*readable[turn:], *readable[:turn])
    return Move(record=record, sources=sources, keep=keep, copy=copy, drop=drop)


def plan_more(record: Record, sources: Names, ring: Ring, replicas: int, states: States) -> Move:
    """Make up for the replicas that a record lacks, from `sources` to where a PUT would write
    now."""

    def fits(volume: str) -> bool:
        return states.get(volume) is State.UP or volume in record.volumes

    target = ring.place(record.key, replicas, fits)
    more = [v for v in target if v not in record.volumes]
    copy = tuple(more[: replicas - len(record.volumes)])
    alive = tuple(v for v in sources if states.get(v, State.DOWN) is not State.DOWN)
    if not alive:
        return Move(record=record, left="none of them can be read")
    if not copy:
        return Move(record=record, left="no other volume is up")
    return Move(record=record, sources=alive, keep=record.volumes, copy=copy)


def plan_batches(items: Iterable[T], size_of: Callable[[T], int]) -> list[list[T]]:
    """Group what is small, by number and bytes; what is large goes alone."""
    batches = list[list[T]]()
    room = -1
    for item in items:
        size = size_of(item)
        if size > min(room, SMALL_BLOB) or len(batches[-1]) == BATCH_KEYS:
            batches.append([])
            room = size - 1 if size > SMALL_BLOB else BATCH_BYTES
        batches[-1].append(item)
        room -= size
    return batches


def judge_blob(answer: Answer | VolumeError, record: Record) -> bytes | str:
    """Return the bytes of a replica if they are good, else what is wrong."""
    if isinstance(answer, VolumeError):
        return f"unreadable: {answer}"
    if answer[0] == 200:
        return answer[1] if hashlib.sha256(answer[1]).hexdigest() == record.digest else "corrupt"
    return "missing" if answer[0] == 404 else f"unreadable: GET was answered {answer[0]}"


def judge_replica(record: Record, version: Version, volume: str) -> str:
    """Return what is wrong with a replica, as far as a listing can tell."""
    size = version.size(volume, record.path)
    if size is None:
        return "missing"
    if size != record.size:
        return "wrong size"
    if volume not in version.sidecars:
        return "missing sidecar"
    return ""


def find_strays(
    versions: Iterable[Version],
    records: Mapping[str, Record],
    garbage: Collection[Place],
    before_s: float,
) -> tuple[list[Place], int]:
    """Return what neither a record (by stem) nor the garbage (volume, stem) names; how many are
    too young to tell."""
    strays = list[Place]()
    young = 0
    for version in versions:
        record = records.get(version.stem)
        for volume, path in version.places:
            ours = (
                record
                and volume in record.volumes
                and (path == record.path or path == version.stem)
            )
            if not ours and (volume, version.stem) not in garbage:
                files = (version.blobs.get(volume, {}).get(path), version.sidecars.get(volume))
                times = [modified_s(file) for file in files if file]
                written_ns = version_ns(version.stem[-20:])
                if written_ns < END_OF_TIME_NS:  # else it would never be old enough
                    times.append(written_ns / 1e9)
                if max(times) > before_s:
                    young += 1
                else:
                    strays.append((volume, path))
    return strays, young


def find_stray_marks(
    versions: Iterable[Version], known: Collection[Place], before_s: float
) -> list[Place]:
    """Return the marks that the index does not know and that are not young, say of a crash."""
    found = [
        (v, f"{version.stem}.del", file)
        for version in versions
        for v, file in version.marks.items()
    ]
    return [
        (v, path)
        for v, path, file in found
        if (v, path) not in known and modified_s(file) <= before_s
    ]


def modified_s(file: File) -> float:
    try:
        return parsedate_to_datetime(file[1]).timestamp()
    except (ValueError, TypeError):
        return math.inf  # so that it counts as young


def name_stray(path: str, sidecar: Record | str, record: Record | None) -> str:
    """Say what a stray is, from its sidecar and from the current record of that sidecar's key."""
    if isinstance(sidecar, str) or record is None:
        return "unfinished write" if isinstance(sidecar, str) else "orphan"
    if record.path[:STEM] == path[:STEM]:
        return "extra replica"
    return "stale version" if path[:STEM][-20:] < record.version else "orphan"


# == Reading volumes ==============================================================================
# Many small GETs, pipelined, from all volumes at once.

STRIDE = 8  # folders /aa/ that are looked into together
AHEAD = 6  # runs of folders under way at once
RUN_FILES = 4000  # files in one run, about
SIDECARS_AT_ONCE = 1500  # bounds the memory for what is larger than a sidecar should be


async def list_folders(client: VolumeClient, folders: Sequence[str]) -> Files:
    """Return path -> file of all that is in `folders`, from at most LISTING_BYTES in all; raises
    VolumeError unless it is known for sure."""
    files: Files = {}
    share = LISTING_BYTES // len(folders)
    room = LISTING_BYTES
    answers = await client.get(folders, share)
    for folder, answer in zip(folders, answers, strict=True):
        if len(answer[1]) > share and room > share:
            (answer,) = await client.get([folder], room)
        room -= len(answer[1])
        try:
            if room < 0:
                raise ValueError(f"more than {LISTING_BYTES} bytes, at once with those before it")
            files |= read_listing(answer, folder)
        except ValueError as error:
            raise VolumeUnexpected(
                client.volume.name, f"no listing of {folder}: {error}"
            ) from None
    return files


def read_listing(answer: Answer, folder: str) -> Files:
    """Return path -> file of a folder, none if it is not there; raises ValueError if in doubt."""
    status, body = answer
    if status == 404 and folder != "/":
        return {}
    if status != 200:
        raise ValueError(f"it was answered {status}")
    return {folder + name: file for name, file in parse_listing(body).items()}


async def get_each(clients: Clients, wanted: Sequence[Place], limit: int) -> list[Answered]:
    """GET each place, from all volumes at once; what a volume fails at is the answer of all that
    was asked of it. What has more than `limit` bytes is cut off after one more."""
    numbers: dict[str, list[int]] = defaultdict(list)
    answers: dict[int, Answered] = {}
    for i, (volume, _) in enumerate(wanted):
        numbers[volume].append(i)

    async def get(volume: str) -> None:
        try:
            paths = [wanted[i][1] for i in numbers[volume]]
            bodies = await clients[volume].get(paths, limit)
            answers.update(zip(numbers[volume], bodies, strict=True))
        except VolumeError as error:
            answers.update(dict.fromkeys(numbers[volume], error))

    await asyncio.gather(*map(get, numbers))
    return [answers[i] for i in range(len(wanted))]


async def read_sidecars(clients: Clients, wanted: Sequence[Place]) -> list[Record | str]:
    """Read sidecars: each its record, or what is wrong with it. Raises VolumeError."""
    results: list[Record | str] = []
    for start in range(0, len(wanted), SIDECARS_AT_ONCE):
        places = wanted[start : start + SIDECARS_AT_ONCE]
        answers = await get_each(clients, places, MAX_SIDECAR_BYTES)
        known: dict[tuple[str, Answer], Record | str] = {}
        for (volume, path), answer in zip(places, answers, strict=True):
            if isinstance(answer, VolumeError):
                raise answer
            if (path, answer) not in known:  # else it is what another volume has
                known[path, answer] = judge_sidecar(answer, volume, path)
            results.append(known[path, answer])
    return results


def judge_sidecar(answer: Answer, volume: str, path: str) -> Record | str:
    """Return the record in a sidecar, or what is wrong with it; raises VolumeUnexpected if in
    doubt."""
    status, body = answer
    if status == 404:
        return "it is not there"
    if status != 200:
        raise VolumeUnexpected(volume, f"GET {path} was answered {status}")
    try:
        return decode_sidecar(body, path)
    except ValueError as error:
        return str(error)


async def read_digest(client: VolumeClient, path: str, size: int) -> str:
    """Return the digest of a blob, "" if it has not `size` bytes; raises VolumeError."""
    hasher = hashlib.sha256()
    left = size
    try:
        async with contextlib.aclosing(client.stream(path)) as pieces:
            async for piece in pieces:
                hasher.update(piece)
                left -= len(piece)
                if left < 0:
                    break
    except NotFound:
        return ""
    except VolumeError as error:
        raise VolumeUnexpected(error.volume, f"{path} cannot be read: {error}") from None
    return hasher.hexdigest() if left == 0 else ""


async def run_all(jobs: AsyncIterator[Awaitable[None]], at_once: int) -> None:
    """Carry out `jobs`, some at once; if one fails, end the others."""
    running: deque[asyncio.Future[None]] = deque()
    try:
        async for job in jobs:
            running.append(asyncio.ensure_future(job))
            if len(running) >= at_once:
                await running.popleft()
        while running:
            await running.popleft()
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


def cut_out_each(on: On, run: Sequence[str]) -> On:
    """Return which folders, from the first to the last of `run`, each volume has; all are in
    order."""
    cut = {}
    for volume, folders in on.items():
        start = bisect.bisect_left(folders, run[0])
        end = bisect.bisect_right(folders, run[-1])
        cut[volume] = folders[start:end]
    return cut


class Walk:
    """The folders of all volumes, in order and in step. `failed` hears of each listing that is not
    to be had."""

    def __init__(
        self, clients: Clients, report: Report, failed: Callable[[VolumeError], None]
    ) -> None:
        self._clients = clients
        self._report = report
        self._failed = failed
        self._at_once = 1  # folders in a run; what they hold decides on the next
        self.done = 0.0  # the share of the folders that are behind

    async def _list(self, on: On) -> Found:
        """List folders; a volume that fails is left out, and one that has none of them, too."""
        found: Found = {}

        async def fill(volume: str, folders: Sequence[str]) -> None:
            try:
                found[volume] = await list_folders(self._clients[volume], folders)
            except VolumeError as error:
                self._failed(error)

        await asyncio.gather(*(fill(volume, folders) for volume, folders in on.items() if folders))
        return found

    def _descend(self, found: Found) -> dict[str, list[str]]:
        """Return volume -> the folders one level deeper; note whatever else is there."""
        deeper: dict[str, list[str]] = {volume: [] for volume in found}
        for volume, files in found.items():
            for path, (size, _) in files.items():
                if size < 0 and re.fullmatch("(/[0-9a-f]{2}){1,2}", path):
                    deeper[volume].append(f"{path}/")
                elif path != "/corrupt":
                    self._report.add(Case("foreign file", volume, path))
        return {volume: sorted(folders) for volume, folders in deeper.items()}

    async def start(self) -> None:
        """Find out which folders /aa/ each volume has: `top`."""
        self.top = self._descend(await self._list({volume: ["/"] for volume in self._clients}))

    async def run(self, work: Work, more: More | None = None) -> None:
        """Do `work` on all folders /aa/bb/, in runs short enough for memory: it is given the
        names, and which of them each volume has. `more` names further ones below some folders
        /aa/."""

        async def jobs() -> AsyncIterator[Awaitable[None]]:
            for number in range(0, 256, STRIDE):
                self.done = number / 256
                firsts = [f"/{i:02x}/" for i in range(number, number + STRIDE)]
                above = cut_out_each(self.top, firsts)
                on = self._descend(await self._list(above))
                names = sorted(set().union(*on.values(), await more(firsts) if more else ()))
                while names:
                    run = names[: self._at_once]
                    names = names[self._at_once :]
                    yield work(run, cut_out_each(on, run))

        await run_all(jobs(), AHEAD)

    async def list_run(self, on: On) -> Found:
        found = await self._list(on)
        names = max([1, *map(len, on.values())])
        files = sum(map(len, found.values()))
        fitting = RUN_FILES * names // (names + files)
        self._at_once = max(1, min(256 * STRIDE, 8 * self._at_once, fitting))
        return found


# == Moving replicas ==============================================================================
# Claim, copy, commit: points 6 to 9 of the theory of operation.

INTERRUPTED = "interrupted"
REASONS = {"waiting": "garbage waits where they go; the server deletes it"}  # for people


def claim(tx: Transaction, move: Move) -> str:
    """Claim where `move` will write; return why it must not begin, if so."""
    record = move.record
    if tx.get(record.key) != record:
        return "changed"
    rows = [row for row in tx.pending_below(record.path).values() if row.volume in move.copy]
    if any(
        row.state is PendingState.DELETING or (row.due_s is not None and row.due_s <= tx.now_s)
        for row in rows
    ):
        return "waiting"  # the server may be deleting there just now, or a DELETE may still come
    remade = set(record.volumes).intersection(move.copy)
    tx.claim(record.path, remade, PendingState.REMAKING)
    tx.claim(record.path, set(move.copy) - remade, PendingState.COPYING)
    return ""


def commit(
    tx: Transaction, move: Move, failed: str, delay_s: float, sent: Mapping[str, int] | None = None
) -> str:
    """Move the record if nothing failed or came between, else leave the copies to the garbage;
    return why, if so. In no case does a place that the record names become garbage. `sent`: how
    many times the sidecar may have been sent to a volume; once, if nothing is said."""
    if failed == INTERRUPTED:
        return failed  # the claims stay, for the next run to take over
    sent = sent or {}
    before = move.record
    after = move.after
    path = before.path
    claimed = {row.volume for row in tx.pending_below(path).values() if row.state in CLAIMS}
    current = tx.get(before.key)
    doubts = dict.fromkeys(claimed.difference(move.copy), BROKEN_OFF)  # of a run that was killed
    for volume in move.copy:
        times = sent.get(volume, 1)
        if failed or times > 1:
            doubts[volume] = (HUNG if failed else BROKEN_OFF)._replace(sidecars=times)
    if current != before or not claimed.issuperset(move.copy):
        named = current.volumes if current and current.path == path else ()
        tx.end_claims(path, named, doubts)
        if not failed:
            once = [volume for volume in move.copy if sent.get(volume, 1) == 1]
            tx.end_copies(path, {volume: 3 if volume in before.volumes else 0 for volume in once})
        return "changed"
    tx.end_claims(path, before.volumes if failed else after.volumes, doubts)
    if failed:
        return failed
    if after != before:
        tx.remove(before)
        tx.insert(after)
    tx.add_garbage(path, move.drop, delay_s)
    return ""


async def in_step(acts: Iterable[Awaitable[None]]) -> None:
    """Await all to their end, then raise what the first that failed did: none goes on by
    itself."""
    for error in await asyncio.gather(*acts, return_exceptions=True):
        if error:
            raise error


class Mover:
    """Reads, checks and copies replicas through a Store's clients, at most `rate` bytes a second
    (0: no limit).

    Every replica that turns out not to be good goes into the report.
    """

    def __init__(self, store: Store, rate: float, report: Report) -> None:
        self._store = store
        self._rate = rate
        self._report = report
        self.clients = store.view.clients
        self.bytes = 0
        self._free_at = 0.0
        # key -> volume -> how many times the sidecar was sent there, or may have been before
        self._sent = defaultdict[str, dict[str, int]](dict)

    async def _pace(self, size: int) -> None:
        self.bytes += size
        if self._rate:
            wait_s = self._free_at - time.monotonic()
            self._free_at += max(0.0, -wait_s) + size / self._rate
            await asyncio.sleep(max(0.0, wait_s))

    async def read_blobs(self, wanted: Sequence[tuple[str, Record]]) -> list[bytes | str]:
        """Read small replicas, (volume, record): each its good bytes, or what is wrong with it."""
        places = [(volume, record.path) for volume, record in wanted]
        answers = await get_each(self.clients, places, SMALL_BLOB)
        return [
            judge_blob(answer, record) for answer, (_, record) in zip(answers, wanted, strict=True)
        ]

    async def stream(self, record: Record, source: str, targets: Sequence[str] = ()) -> str:
        """Read a replica of any size from `source`, checking it, into `targets`; return what is
        wrong with it.

        The last piece is held back until the digest is known to be right, so that no target ever
        has a wrong blob. Raises VolumeError if a target fails.
        """
        uploads = list[Upload]()
        hasher = Hasher({"sha256": bytes.fromhex(record.digest)})
        held = b""

        try:
            for target in targets:
                uploads.append(await self.clients[target].start_upload(record.path, record.size))
            async with contextlib.aclosing(self.clients[source].stream(record.path)) as chunks:
                async for chunk in chunks:
                    await self._pace(len(chunk) * max(1, len(uploads)))
                    hasher.update(chunk)
                    if hasher.size > record.size:
                        return "corrupt"
                    if held:
                        await in_step(upload.send(held) for upload in uploads)
                    held = chunk
            hasher.finish()
            await in_step(upload.send(held) for upload in uploads)
            await in_step(upload.finish() for upload in uploads)
            return ""
        except WrongDigest:
            return "corrupt"
        except NotFound:
            return "missing"
        except VolumeError as error:
            if error.volume != source:
                raise
            return f"unreadable: {error}"
        finally:
            for upload in uploads:
                upload.abort()

    async def check(self, wanted: Sequence[tuple[str, Record]]) -> list[str]:
        """Read replicas, (volume, record), in full: each "" if it is good, else what is wrong with
        it."""
        results: list[str] = []
        for batch in plan_batches(wanted, lambda one: one[1].size):
            if batch[0][1].size > SMALL_BLOB:
                results.append(await self.stream(batch[0][1], batch[0][0]))
            else:
                await self._pace(sum(record.size for _, record in batch))
                results += [
                    "" if isinstance(blob, bytes) else blob
                    for blob in await self.read_blobs(batch)
                ]
        return results

    async def move(self, moves: Sequence[Move]) -> dict[str, str]:
        """Carry a batch out (one large blob, or small ones); return key -> why it was not done, or
        ""."""
        index = self._store.index
        delay_s = self._store.view.config.garbage_delay
        keys = [move.record.key for move in moves]
        claims = await index.write(partial(self._claim, moves), keys)
        outcome = {move.record.key: why for move, why in zip(moves, claims, strict=True)}
        begun = [move for move in moves if not outcome[move.record.key]]
        failed = {move.record.key: INTERRUPTED for move in begun}
        try:
            if begun:
                failed |= await (
                    self._copy_large if begun[0].record.size > SMALL_BLOB else self._copy_small
                )(begun)
        finally:
            ends = await index.write(partial(self._commit, begun, failed, delay_s), keys)
            for move in begun:
                self._sent.pop(move.record.key, None)
        return outcome | {move.record.key: why for move, why in zip(begun, ends, strict=True)}

    def _claim(self, moves: Sequence[Move], tx: Transaction) -> list[str]:
        results = []
        for move in moves:
            why = claim(tx, move)
            results.append(why)
            if why:
                continue
            for row in tx.pending_below(move.record.path).values():
                if row.state in CLAIMS and row.doubt_s is not None:
                    self._sent[move.record.key][row.volume] = 1  # by whoever is in doubt
        return results

    def _commit(
        self, moves: Sequence[Move], failed: Mapping[str, str], delay_s: float, tx: Transaction
    ) -> list[str]:
        results = []
        for move in moves:
            key = move.record.key
            results.append(commit(tx, move, failed[key], delay_s, self._sent.get(key, {})))
        return results

    async def _copy_small(self, moves: Sequence[Move]) -> dict[str, str]:
        """Return key -> why its copies were not made, or "". Sources are tried in turn, for all
        keys at once."""
        blobs: dict[str, bytes] = {}
        for turn in range(max(len(move.sources) for move in moves)):
            left = [m for m in moves if m.record.key not in blobs and turn < len(m.sources)]
            results = await self.read_blobs([(m.sources[turn], m.record) for m in left])
            for move, blob in zip(left, results, strict=True):
                if isinstance(blob, bytes):
                    blobs[move.record.key] = blob
                else:
                    self._note_bad(move, move.sources[turn], blob)
        failed = {
            m.record.key: "" if m.record.key in blobs else "no good replica could be read"
            for m in moves
        }
        writes: dict[str, list[Record]] = defaultdict(list)
        for move in moves:
            for volume in move.copy if move.record.key in blobs else ():
                writes[volume].append(move.record)
        await self._pace(sum(record.size for records in writes.values() for record in records))
        for errors in await asyncio.gather(
            *(self._put(volume, writes[volume], blobs) for volume in writes)
        ):
            failed |= errors
        return failed

    async def _put(
        self, volume: str, records: Sequence[Record], blobs: Mapping[str, bytes]
    ) -> dict[str, str]:
        """Write blobs and sidecars to one volume, together if it takes them, else one by one;
        return key -> error."""
        files: dict[str, bytes] = {}
        for record in records:
            files |= {
                record.path: blobs[record.key],
                sidecar_path(record.path): encode_sidecar(record),
            }
        try:
            self._note_sent(volume, records, await self.clients[volume].put(files))
        except VolumeError as error:
            self._note_sent(volume, records, error.sent)
            if len(records) == 1 or isinstance(error, VolumeDown | VolumeTimeout):
                return {record.key: str(error) for record in records}
            each = [await self._put(volume, [record], blobs) for record in records]
            return {key: error for errors in each for key, error in errors.items()}
        return {}

    async def _copy_large(self, moves: Sequence[Move]) -> dict[str, str]:
        (move,) = moves
        record = moves[0].record
        try:
            for source in move.sources:
                wrong = await self.stream(record, source, move.copy)
                if not wrong:
                    await in_step(self._put_sidecar(volume, record) for volume in move.copy)
                    return {record.key: ""}
                self._note_bad(move, source, wrong)
            return {record.key: "no good replica could be read"}
        except VolumeError as error:
            return {record.key: str(error)}

    async def _put_sidecar(self, volume: str, record: Record) -> None:
        sent = await self.clients[volume].put({sidecar_path(record.path): encode_sidecar(record)})
        self._note_sent(volume, [record], sent)

    def _note_sent(self, volume: str, records: Iterable[Record], sent: int) -> None:
        for record in records:
            times = self._sent[record.key]
            times[volume] = times.get(volume, 0) + sent

    def _note_bad(self, move: Move, volume: str, wrong: str) -> None:
        kind, _, detail = wrong.partition(": ")
        self._report.add(Case(kind, volume, move.record.path, move.record.key, detail))

    async def set_aside(self, volume: str, path: str) -> None:
        """Copy a file to /corrupt/ on its own volume; raises VolumeError."""
        upload = await self.clients[volume].start_upload(
            f"/corrupt/{path.rpartition('/')[2]}", None
        )
        try:
            async with contextlib.aclosing(self.clients[volume].stream(path)) as chunks:
                async for chunk in chunks:
                    await upload.send(chunk)
            await upload.finish()
        except NotFound:
            pass  # nothing to set aside
        finally:
            upload.abort()


# == Running ======================================================================================
# What the tools have in common: report, progress, volumes, store.


class Report:
    """What a tool found and did: cases by kind, the first of each or all; facts for --json; lines
    for people."""

    FIRST = 10
    IN_FULL = ("unusable version", "lost key")  # each is the operator's to see to
    FULL = 100_000

    def __init__(self, keep_all: bool) -> None:
        self._keep_all = keep_all
        self._cases = defaultdict[str, list[Case]](list)
        self.counts = Counter[str]()
        self._began = time.monotonic()
        self.facts = dict[str, Any]()
        self.lines = list[str]()
        self.code = 0
        self.is_silent = False  # its output has been written
        self.interrupted = "the store is consistent, and the same command goes on"  # after Ctrl-C

    @property
    def seconds(self) -> float:
        return max(1e-6, time.monotonic() - self._began)

    def add(self, *cases: Case) -> None:
        for case in cases:
            self.counts[case.kind] += 1
            most = self.FULL if case.kind in self.IN_FULL else self.FIRST
            if self._keep_all or self.counts[case.kind] <= most:
                self._cases[case.kind].append(case)

    def as_json(self) -> str:
        cases = [case._asdict() for each in self._cases.values() for case in each]
        found = {"seconds": round(self.seconds, 3), "found": self.counts, "cases": cases}
        return json.dumps(self.facts | found)

    def as_text(self) -> str:
        lines = []
        for kind, count in sorted(self.counts.items()):
            lines.append(f"{count} x {kind}")
            cases = self._cases[kind]
            for case in cases:
                words = (case.volume, case.path, case.key and json.dumps(case.key), case.detail)
                lines.append("  " + "  ".join(word for word in words if word))
            if count > len(cases):
                lines.append(f"  and {count - len(cases)} more (--json lists them)")
        return "\n".join(show_text(line) for line in lines + self.lines)


def show_text(text: str) -> str:
    """Return `text` as it may go to a terminal, whoever gave it: with escapes, as in JSON, for
    what cannot be printed."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else escape(ord(one)) for one in text)


def escape(code: int) -> str:
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def show_bytes(size: float) -> str:
    power = min(4, int(math.log(max(size, 1), 1000)))
    return f"{size / 1000**power:.{1 if power else 0}f} {('B', 'KB', 'MB', 'GB', 'TB')[power]}"


@contextlib.asynccontextmanager
async def show_progress(
    report: Report, text: Callable[[], str], done: Callable[[], float]
) -> AsyncIterator[None]:
    """Meanwhile show `text` and the time left, from the share `done`, on stderr: live on a
    terminal, else in lines."""
    live = sys.stderr.isatty()

    async def show() -> None:
        while True:
            await asyncio.sleep(0.2 if live else 5)
            share = done()
            left = f", {report.seconds * (1 - share) / share:.0f} s left" if share > 0 else ""
            line = f"{share:4.0%} {text()}{left}"
            print(f"\r\x1b[K{line}" if live else f"{line}\n", end="", file=sys.stderr, flush=True)

    task = asyncio.create_task(show())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])
        print("\r\x1b[K" if live else "", end="", file=sys.stderr, flush=True)


class ToolError(Exception):
    """Why a tool cannot do its work: one line for the operator, exit code 1."""


@contextlib.asynccontextmanager
async def open_volumes(config: Config) -> AsyncIterator[Config]:
    """Run the embedded volumes if none are configured (a server may do so too: they are only
    folders)."""
    if config.volumes:
        yield config
    elif Path(config.data, "volume1").is_dir():
        async with run_embedded(config) as config:
            yield config
    else:
        reason = f"none are configured, and there are no embedded ones in {config.data}"
        raise ConfigError([f"volumes: {reason}"])


def check_index(path: str) -> None:
    """Raise ConfigError if there is no index."""
    engine = open_engine(path)
    if not engine.exists():
        raise ConfigError([f"db: there is no index at {engine.name} (rebuild can make one)"])


@contextlib.asynccontextmanager
async def open_store(config: Config, moving: bool = False) -> AsyncIterator[Store]:
    """Open volumes and index beside a server that may be running; `moving` replicas is for one
    tool at a time."""
    check_index(config.db)
    async with contextlib.AsyncExitStack() as stack:
        config = await stack.enter_async_context(open_volumes(config))
        store = Store(config, role=TOOL)
        stack.push_async_callback(store.close)
        await store.start()
        if moving:
            await store.index.lock_tools()
        try:
            yield store
        except BaseException:
            if moving:
                store.index.disown()  # what it has claimed is for the next run to take over
            raise
        if moving:
            await store.index.end_other_tools()


# == rebuild ======================================================================================


ALIVE = (PendingState.KEPT, PendingState.REMAKING, PendingState.MARK)  # no garbage, nor will be


def places_of_garbage(rows: Iterable[Pending]) -> list[Place]:
    """Return the places of what is garbage, or may become it."""
    return [(row.volume, row.path) for row in rows if row.state not in ALIVE]


def carry_over(rows: Sequence[Pending], age_s: float, tx: Transaction) -> None:
    """Take over what is pending in an index whose clock is `age_s` behind. What is garbage, or may
    be, is due at once, since nobody reads."""
    for row in rows:
        doubt_s = None if row.doubt_s is None else row.doubt_s + age_s
        if row.state in CLAIMS:
            doubt_s = tx.now_s + BROKEN_OFF.seconds
        if row.state is PendingState.MARK:
            after = row
        elif row.state in ALIVE:
            after = row._replace(state=PendingState.KEPT, owner=None)
            after = after._replace(due_s=doubt_s, doubt_s=doubt_s)
        else:
            state = row.state if row.state is PendingState.DELETING else PendingState.GARBAGE
            after = row._replace(state=state, owner=None, attempts=0)
            after = after._replace(due_s=tx.now_s, since_s=tx.now_s, doubt_s=doubt_s)
        tx.change({}, {(row.volume, row.path): after})


@dataclass(slots=True, kw_only=True)
class Mark:
    """What the marks of a dead version say: the blob's path, the volumes that have a mark, and
    those that may still show its sidecar."""

    path: str
    volumes: list[str]
    doubted: set[str] = field(default_factory=set)


class Rebuild:
    """Makes the new index of one store, run by run."""

    def __init__(self, clients: Clients, indexes: Replacement, report: Report) -> None:
        self._clients = clients
        self._indexes = indexes
        self._old = indexes.old
        self._new = indexes.new
        self._report = report
        self.walk = Walk(clients, report, self._fail)
        self.keys = self.bytes = self.garbage = self.left_out = 0

    def _fail(self, error: VolumeError) -> None:
        raise error

    async def run(self, allowed: Collection[str]) -> None:
        """Carry the old garbage over, due at once, since nobody reads; decide on the keys of all
        folders; see what has become of the old keys."""
        await self.walk.start()
        totals = await self._old.totals() if self._old else {}
        self._check_volumes(totals, allowed)
        if self._old:
            await self._carry_over(self._old)
        await self.walk.run(self._merge)
        await self._new.write(Transaction.release_all_marks)
        if not self._report.counts["unusable version"]:  # which end it anyway
            await self._find_lost(set(allowed))

    async def _carry_over(self, old: Index) -> None:
        age_s = await self._new.now_s() - await old.now_s()
        async for pending in old.read_pending():
            self.garbage += len(places_of_garbage(pending))
            paths = [row.path for row in pending]
            await self._new.write(partial(carry_over, pending, age_s), paths=paths)

    def _check_volumes(
        self, totals: Mapping[str, tuple[int, int]], allowed: Collection[str]
    ) -> None:
        """Raise ToolError for an empty or unknown volume that the old index has blobs on."""
        for name, (blobs, _) in totals.items():
            if (
                blobs > 0
                and name not in (ALL_KEYS, GARBAGE, *allowed)
                and not self.walk.top.get(name)
            ):
                state = "is empty" if name in self.walk.top else "is not configured"
                raise ToolError(
                    f"volume {name} {state}, but the old index has {blobs} blobs there "
                    "(--allow-missing)"
                )

    async def _find_lost(self, allowed: set[str]) -> None:
        """Report the keys of the old index that the new one lacks, or has in an older version."""
        async for page in self._indexes.lost():
            for record, is_older in page:
                if allowed.issuperset(record.volumes):
                    self.left_out += 1
                    continue
                detail = "an older version is there" if is_older else ""
                names = " ".join(record.volumes)
                self._report.add(Case("lost key", names, record.path, record.key, detail))

    def _write(
        self,
        records: Collection[Record],
        garbage: Collection[Place],
        alive: Iterable[Place],
        tx: Transaction,
    ) -> None:
        for volume, path in garbage:
            tx.add_garbage(path, [volume])
        insert_all(records, tx)
        for volume, path in alive:
            tx.keep(path, [volume])

    def _write_marks(self, marks: Mapping[str, Mark], tx: Transaction) -> None:
        """Note what marks say: a volume that is not read now may still have the dead version."""
        for mark in marks.values():
            tx.add_garbage(mark.path, mark.doubted, 0.0, dict.fromkeys(mark.doubted, HUNG))
            tx.add_marks([mark.path], mark.volumes, ())

    async def _merge(self, run: list[str], on: On) -> None:
        """Decide on all keys of a run: from the highest version down, the first that is sound and
        not garbage."""
        versions, cases = group_files(await self.walk.list_run(on))
        read = await self._read(versions.values())
        garbage: dict[str, set[str]] = defaultdict(set)  # stem -> volumes
        pending = await self._old.pending_between(run[0], run[-1]) if self._old else []
        for volume, path in places_of_garbage(pending):
            garbage[path[:STEM]].add(volume)
        marks = await self._read_marks(versions.values())
        adopted = dict[str, Record]()  # by the hash of the key
        dead = list[Place]()
        alive = list[Place]()
        for stem in sorted(versions, reverse=True):
            version = versions[stem]
            key_hash = stem[:-20]
            for volume in sorted(version.blobs.keys() - version.sidecars.keys() - garbage[stem]):
                for path in version.blobs[volume]:
                    cases.append(Case("blob without sidecar", volume, path))
            if not version.sidecars:  # an unfinished write
                continue
            if key_hash in adopted or stem in marks:
                dead += version.places
                continue
            digests = await self._read_blobs(version, read[stem])
            record, more = judge_version(version, read[stem], digests)
            cases += more
            if record and garbage[stem]:
                record = await self._judge_garbage(record, garbage[stem])
                dead += [] if record.volumes else version.places
                alive += [(volume, record.path) for volume in record.volumes]
            if record and record.volumes:
                adopted[key_hash] = record
            elif record is None and version.blobs:
                if garbage[stem].issuperset(version.blobs):
                    dead += version.places
                else:
                    cases.append(name_unusable(version, read[stem]))
        await self._new.write(partial(self._write_marks, marks), paths=marks)
        keys = [record.key for record in adopted.values()]
        paths = [path for _, path in (*dead, *alive)]
        await self._new.write(partial(self._write, adopted.values(), dead, alive), keys, paths)
        self.garbage += len(dead)
        self.keys += len(adopted)
        self.bytes += sum(record.size for record in adopted.values())
        self._report.add(*cases)

    async def _read_marks(self, versions: Collection[Version]) -> dict[str, Mark]:
        """Return stem -> mark of the versions that are dead. That it has a mark is enough; what
        the mark says only tells where else to look. An index that names such a version is a copy
        from before that."""
        marks = dict[str, Mark]()
        for version in versions:
            if not version.marks:
                continue
            path = f"{version.stem}.del"
            places = [(volume, path) for volume in version.marks]
            found = Mark(path=version.stem, volumes=sorted(version.marks))
            for (volume, _), answer in zip(
                places, await get_each(self._clients, places, MAX_SIDECAR_BYTES), strict=True
            ):
                if isinstance(answer, VolumeError):
                    raise answer
                try:
                    found.path, doubted = decode_mark(answer[1], path)
                    found.doubted.update(doubted)
                except ValueError as error:
                    found.doubted.update(self._clients)
                    self._report.add(Case("bad mark", volume, path, "", str(error)))
            marks[version.stem] = found
        return marks

    async def _read(self, versions: Collection[Version]) -> dict[str, dict[str, Record | str]]:
        """Read all sidecars: return stem -> volume -> sidecar."""
        read: dict[str, dict[str, Record | str]] = {version.stem: {} for version in versions}
        wanted = list[Place]()
        for version in versions:
            wanted += [(volume, f"{version.stem}.key") for volume in version.sidecars]
        sidecars = await read_sidecars(self._clients, wanted)
        for (volume, path), sidecar in zip(wanted, sidecars, strict=True):
            read[path[:STEM]][volume] = sidecar
        return read

    async def _read_blobs(self, version: Version, read: Sidecars) -> Digests:
        """Return the digests of the blobs that have to decide."""
        digests = dict[Place, str]()
        for volume, path in find_doubts(version, read):
            size = version.size(volume, path) or 0
            digests[volume, path] = await read_digest(self._clients[volume], path, size)
        return digests

    async def _judge_garbage(self, record: Record, dead: Collection[str]) -> Record:
        """Return a record that is garbage on some volumes without these. If the old index has no
        such record, without all. If it names volumes that have it no more, it is older than the
        volumes: with all."""
        (old,) = await self._old.get_many([record.key]) if self._old else [None]
        if old is None or old.version != record.version:
            return record._replace(volumes=())
        if not set(record.volumes).issuperset(old.volumes):
            return record
        standing = tuple(volume for volume in record.volumes if volume not in dead)
        return record._replace(volumes=standing or record.volumes)


async def rebuild(config: Config, options: argparse.Namespace, report: Report) -> None:
    """Make a new index from the volumes and swap it in, or change nothing."""
    indexes = Replacement(config.db)
    async with contextlib.AsyncExitStack() as stack:
        config = await stack.enter_async_context(open_volumes(config))
        stack.push_async_callback(indexes.close)
        await indexes.open()
        known = {volume.name for volume in config.volumes}
        if indexes.old:
            known.update(await indexes.old.totals())
        unknown = sorted(set(options.allow_missing) - (known - {ALL_KEYS, GARBAGE}))
        if unknown:
            raise ConfigError(f"--allow-missing {name}: no such volume" for name in unknown)
        clients = Store(config).view.clients
        clients = {
            name: client for name, client in clients.items() if name not in options.allow_missing
        }
        for client in clients.values():
            stack.callback(client.close)
        work = Rebuild(clients, indexes, report)
        progress = show_progress(
            report, lambda: f"{work.keys} keys, {show_bytes(work.bytes)}", lambda: work.walk.done
        )
        async with progress:
            await work.run(options.allow_missing)
        damage = indexes.damage
        report.facts = {
            "keys": work.keys,
            "bytes": work.bytes,
            "garbage": work.garbage,
            "damage": damage,
        }
        report.facts["left_out"] = work.left_out
        unusable = report.counts["unusable version"]
        if unusable:
            report.lines = [f"nothing was changed: {unusable} versions cannot be used, see above"]
            report.lines += ["mend their sidecars, or move both away, and run this again"]
            report.code = 1
            return
        kept = await indexes.finish(work.keys, work.bytes)
    report.facts["old_index"] = kept
    rate = work.keys / report.seconds
    report.lines = [
        f"{indexes.name} rebuilt: {work.keys} keys, {show_bytes(work.bytes)}, {rate:.0f} keys a "
        "second"
    ]
    report.lines += [f"the old index is {kept}"] if kept else []
    report.lines += (
        [f"its garbage was lost ({damage}): what was deleted of late may be back"]
        if damage
        else []
    )
    if work.left_out:
        report.lines.append(f"{work.left_out} keys are only on the volumes that were left out")
    lost = report.counts["lost key"]
    if lost:
        report.lines.append(f"{lost} keys of the old index are lost or older now, see above")
        report.code = 1


# == rebalance ====================================================================================

GARBAGE_PATIENCE_S = (
    15.0  # beyond garbage_delay: how long the server may take to delete what is in the way
)


class Rebalance:
    """Brings every key to where the ring says; without a mover it only counts what that takes."""

    def __init__(self, store: Store, mover: Mover | None, concurrency: int) -> None:
        self._store = store
        self._mover = mover
        self._concurrency = concurrency
        self.keys = self.checked = self.moved = self.changed = self.dropped = 0
        self.pairs: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
        self.left: Counter[str] = Counter()

    async def run(self, patience_s: float) -> None:
        """Go over the keys until those left cannot be moved; garbage that is in the way gets some
        time."""
        since = time.monotonic()
        while True:
            before = self.moved
            await self._pass()
            if self.moved > before:
                since = time.monotonic()
            stuck = self.moved == before and not self.left["waiting"]
            if not self._mover or not self.left or stuck or time.monotonic() - since > patience_s:
                return
            await asyncio.sleep(1)

    async def _pass(self) -> None:
        self.left.clear()
        totals = await self._store.index.totals()
        self.keys = totals.get(ALL_KEYS, (0, 0))[0]
        self.checked = 0
        await run_all(self._jobs(), self._concurrency)

    async def _jobs(self) -> AsyncIterator[Awaitable[None]]:
        """Yield batches of moves that can go at once, over all records."""
        view = self._store.view
        states = self._store.health.states
        pending = list[Move]()
        async for page in self._store.index.read_records():
            self.checked += len(page)
            for record in page:
                move = plan_move(record, view.ring.place(record.key, view.config.replicas), states)
                if move and move.left:
                    self.left[move.left] += 1
                elif move:
                    pending.append(move)
            *batches, pending = plan_batches(pending, lambda move: move.record.size) or [[]]
            for batch in batches:
                yield self._carry_out(batch)
        if pending:
            yield self._carry_out(pending)

    async def _carry_out(self, batch: Sequence[Move]) -> None:
        outcome = await self._mover.move(batch) if self._mover else {}
        for move in batch:
            why = outcome.get(move.record.key)
            if why == "changed":  # by a client, whose write went where the ring says
                self.changed += 1
            elif why:
                self.left[why] += 1
            else:
                self.moved += 1
                self.dropped += len(move.drop)
                for target in move.copy:
                    pair = self.pairs[move.sources[0], target]
                    pair[0] += 1
                    pair[1] += move.record.size


async def rebalance(config: Config, options: argparse.Namespace, report: Report) -> None:
    """Bring every key to the volumes that the ring names, beside a running server; or only say
    what that takes."""
    async with open_store(config, not options.dry_run) as store:
        mover = Mover(store, options.limit_rate * 1e6, report)
        work = Rebalance(store, None if options.dry_run else mover, options.concurrency)

        def text() -> str:
            if options.dry_run:
                return f"{work.checked} keys, {work.moved} to be moved, {work.left.total()} left"
            speed = show_bytes(mover.bytes / report.seconds)
            copied = f"{show_bytes(mover.bytes)} copied, {speed}/s"
            return f"{work.moved} keys moved, {work.left.total()} left, {copied}"

        async with show_progress(report, text, lambda: work.checked / max(1, work.keys)):
            await work.run(min(config.garbage_delay, 60) + GARBAGE_PATIENCE_S)
    pairs = [
        {"from": a, "to": b, "replicas": n, "bytes": size}
        for (a, b), (n, size) in sorted(work.pairs.items())
    ]
    count, size = (sum(pair[i] for pair in work.pairs.values()) for i in (0, 1))
    report.facts = {
        "keys": work.keys,
        "moved": work.moved,
        "replicas": count,
        "bytes": size,
        "dropped": work.dropped,
    }
    report.facts |= {
        "changed": work.changed,
        "left": work.left.total(),
        "why_left": work.left,
        "pairs": pairs,
    }
    report.facts["dry_run"] = options.dry_run
    report.lines = [
        f"{a} -> {b}: {n} replicas, {show_bytes(size)}"
        for (a, b), (n, size) in sorted(work.pairs.items())
    ]
    replicas = f"{count} replicas, {show_bytes(size)}"
    if options.dry_run:
        line = f"{work.moved} to be moved: {replicas} to copy, {work.dropped} to drop"
    else:
        rate = work.moved / report.seconds
        speed = f"{rate:.0f} keys and {show_bytes(size / report.seconds)} a second"
        line = f"{work.moved} moved: {replicas} copied, {work.dropped} dropped; {speed}"
    report.lines.append(f"{work.keys} keys, {line}")
    for reason, count in work.left.items():
        report.lines.append(f"left {count}: {REASONS.get(reason, reason)}")
    report.code = 1 if work.left else 0


# == verify =======================================================================================

HARMLESS = ("foreign file", "nginx leftover")  # reported; no reason for exit code 1


Stray = tuple[str, str, str]  # (key, volume, path)
NOTES = """CREATE TABLE noted (path TEXT PRIMARY KEY, key TEXT NOT NULL) STRICT, WITHOUT ROWID;
    CREATE TABLE stray (key TEXT NOT NULL, volume TEXT NOT NULL, path TEXT NOT NULL) STRICT"""


class Notes:
    """What one run of verify notes: the path of each record, and what is to be removed. It is in a
    scratch database of its own, a file without a name that goes with it, on its own thread."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "mkv-notes")
        self._db: sqlite3.Connection | None = None

    async def _run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._work, work)

    def _work(self, work: Callable[[sqlite3.Connection], T]) -> T:
        if self._db is None:
            self._db = sqlite3.connect("", isolation_level=None)
            self._db.executescript(NOTES)
        return work(self._db)

    async def _insert(self, query: str, rows: Iterable[tuple[str, ...]]) -> None:
        def insert(db: sqlite3.Connection) -> None:
            with db:
                db.execute("BEGIN")
                db.executemany(query, rows)

        await self._run(insert)

    async def _select(self, query: str, *values: str | int | None) -> list[Any]:
        return await self._run(lambda db: db.execute(query, values).fetchall())

    async def add_records(self, records: Iterable[Record]) -> None:
        rows = [(record.path, record.key) for record in records]
        await self._insert("INSERT INTO noted VALUES (?, ?)", rows)

    async def add_strays(self, strays: Iterable[Stray]) -> None:
        await self._insert("INSERT INTO stray VALUES (?, ?, ?)", strays)

    async def folders(self, firsts: Sequence[str]) -> list[str]:
        """Return the folders /aa/bb/ below some /aa/ that stand in a row, where records are."""
        query = "SELECT DISTINCT substr(path, 1, 7) FROM noted WHERE path >= ? AND path < ?"
        return [row[0] for row in await self._select(query, firsts[0], after_prefix(firsts[-1]))]

    async def records_in(self, first: str, last: str) -> list[tuple[str, str]]:
        """Return (path, key) of what was noted in a range of folders."""
        query = "SELECT path, key FROM noted WHERE path >= ? AND path < ?"
        return await self._select(query, first, after_prefix(last))

    async def strays(self) -> AsyncIterator[list[Stray]]:
        """Yield them in pages."""
        query = "SELECT rowid, * FROM stray WHERE rowid > ? ORDER BY rowid LIMIT 500"
        after = 0
        while rows := await self._select(query, after):
            yield [(key, volume, path) for _, key, volume, path in rows]
            after = rows[-1][0]

    async def close(self) -> None:
        if self._db is not None:
            await self._run(sqlite3.Connection.close)
        self._pool.shutdown()


def is_named(record: Record | None, volume: str, path: str) -> bool:
    """Whether the record stands on that volume with the version that `path` names."""
    return record is not None and record.path[:STEM] == path[:STEM] and volume in record.volumes


def remove_strays(rows: Iterable[Stray], tx: Transaction) -> int:
    """Put each (key, volume, path) in the garbage unless the key's record names it; return how
    many."""
    strays = [
        (volume, path) for key, volume, path in rows if not is_named(tx.get(key), volume, path)
    ]
    for volume, path in strays:
        if path.endswith(".del"):
            tx.add_marks([path], [volume], ())
        else:
            tx.add_garbage(path, [volume])
    return len(strays)


class Verify:
    """Compares the index with the volumes, and with --repair makes them agree."""

    def __init__(
        self, store: Store, mover: Mover, notes: Notes, report: Report, deep: bool
    ) -> None:
        self._store = store
        self._mover = mover
        self._notes = notes
        self._report = report
        self._deep = deep
        self.walk = Walk(mover.clients, report, self._fail)
        self.failed: set[str] = set()
        self.keys = self.replicas = self.bytes = self.young = self.repaired = 0

    def _fail(self, error: VolumeError) -> None:
        if error.volume not in self.failed:
            self.failed.add(error.volume)
            self._report.add(Case("failed volume", error.volume, "", "", str(error)))

    async def run(self, repair: bool, grace_s: float) -> None:
        self._repair = repair
        self._before_s = time.time() - grace_s
        async for page in self._store.index.read_records():
            await self._notes.add_records(page)
        await self.walk.start()
        await self.walk.run(self._compare, self._notes.folders)
        if repair and not self.failed:
            await self._remove_strays()

    async def _read_noted(self, first: str, last: str) -> dict[str, Record]:
        """Return, by stem, the records in a range of folders that are still as they were noted."""
        noted = await self._notes.records_in(first, last)
        current = await self._store.index.get_many([key for _, key in noted])
        records = dict[str, Record]()
        for (path, _), record in zip(noted, current, strict=True):
            if record is not None and record.path == path:
                records[path[:STEM]] = record
        return records

    async def _compare(self, run: list[str], on: On) -> None:
        """Check a run of folders. The garbage is read before and after: what was deleted meanwhile
        is no stray."""
        span = (run[0], run[-1])
        try:
            pending = await self._store.index.pending_between(*span)
            versions, cases = group_files(await self.walk.list_run(on))
            records = await self._read_noted(*span)
            pending += await self._store.index.pending_between(*span)
            self._report.add(*cases)
            await self._check(records.values(), versions)
            dead = {(volume, path[:STEM]) for volume, path in places_of_garbage(pending)}
            marks = {(row.volume, row.path) for row in pending if row.state is PendingState.MARK}
            strays, young = find_strays(versions.values(), records, dead, self._before_s)
            self.young += young
            await self._note_strays(strays)
            stray_marks = find_stray_marks(versions.values(), marks, self._before_s)
            await self._note_stray_marks(stray_marks)
        except VolumeError as error:
            self._fail(error)

    async def _check(self, records: Collection[Record], versions: Mapping[str, Version]) -> None:
        """Find what is wrong with the replicas of `records`; settle what still is when it has been
        found."""
        self.keys += len(records)
        self.replicas += sum(len(record.volumes) for record in records)
        self.bytes += sum(record.size * len(record.volumes) for record in records)
        # Record -> volume -> what is wrong.
        faults: dict[Record, dict[str, str]] = defaultdict(dict)
        doubtful: list[Replica] = []
        for record in records:
            version = versions.get(record.path[:STEM]) or Version("")
            size = len(encode_sidecar(record))
            for volume in record.volumes:
                if volume not in self._mover.clients:
                    faults[record][volume] = "not configured"
                elif volume not in self.failed:
                    if wrong := judge_replica(record, version, volume):
                        faults[record][volume] = wrong
                    elif (
                        self._deep or version.sidecars[volume][0] != size
                    ):  # of another make, or cut short
                        doubtful.append((volume, record))
        places = [(volume, sidecar_path(record.path)) for volume, record in doubtful]
        for (volume, record), sidecar in zip(
            doubtful, await read_sidecars(self._mover.clients, places), strict=True
        ):
            if isinstance(sidecar, str) or sidecar._replace(volumes=record.volumes) != record:
                faults[record][volume] = "bad sidecar"
        if self._deep:
            doubtful += [
                (v, record)
                for record in faults
                for v in faults[record]
                if faults[record][v] == "missing sidecar"
            ]
            for (volume, record), wrong in zip(
                doubtful, await self._mover.check(doubtful), strict=True
            ):
                if wrong:
                    faults[record][volume] = wrong
        replicas = self._store.view.config.replicas
        short = {record for record in records if len(record.volumes) < replicas}
        suspects = [record for record in records if record in faults or record in short]
        keys = [record.key for record in suspects]
        current = await self._store.index.get_many(keys)
        good = dict[Record, Names]()
        for record, now in zip(suspects, current, strict=True):
            if record == now:  # else a client came between
                good[record] = await self._settle(record, faults[record])
        await self._make_up({record: where for record, where in good.items() if record in short})

    async def _settle(self, record: Record, faults: Mapping[str, str]) -> Names:
        """Repair a record's replicas if told to, and note each fault; return the volumes where
        they are good now."""
        repaired = await self._restore(record, faults) if self._repair else set()
        self.repaired += len(repaired)
        for volume, wrong in faults.items():
            kind, _, detail = wrong.partition(": ")
            detail = "repaired" if volume in repaired else detail
            self._report.add(Case(kind, volume, record.path, record.key, detail))
        if all(
            volume in faults and not faults[volume].endswith("sidecar")
            for volume in record.volumes
        ):
            self._report.add(Case("no good replica", "", record.path, record.key))
        return tuple(v for v in record.volumes if v not in faults or v in repaired)

    async def _make_up(self, short: Mapping[Record, Names]) -> None:
        """Note the records that have too few replicas, and copy them, if told to, from where they
        are good."""
        view = self._store.view
        replicas = view.config.replicas
        states = self._store.health.states
        moves = [plan_more(r, good, view.ring, replicas, states) for r, good in short.items()]
        outcome = {move.record.key: move.left for move in moves}
        if self._repair:
            possible = [move for move in moves if not move.left]
            for batch in plan_batches(possible, lambda move: move.record.size):
                outcome |= await self._mover.move(batch)
        for move in moves:
            record = move.record
            why = outcome[record.key]
            if why == "changed":  # by a client
                continue
            if self._repair and not why:
                record = move.after
            count = len(record.volumes)
            detail = f"{count} of {replicas}"
            if count >= replicas:
                self.repaired += 1
                detail = "repaired"
            elif why:
                detail += f", {REASONS.get(why, why)}"
            self._report.add(Case("too few replicas", "", record.path, record.key, detail))

    async def _restore(self, record: Record, faults: Mapping[str, str]) -> set[str]:
        """Make replicas good from good ones; return the volumes where that succeeded."""
        states = self._store.health.states
        unmarked = [volume for volume, wrong in faults.items() if wrong.endswith("sidecar")]
        checked = await self._mover.check([(volume, record) for volume in unmarked])
        repaired = {
            v
            for v, wrong in zip(unmarked, checked, strict=True)
            if not wrong and await self._mark(record, v)
        }
        sources = tuple(v for v in record.volumes if v not in faults or v in unmarked)
        beyond = {
            v for v, wrong in faults.items() if wrong in ("missing", "wrong size", "corrupt")
        }
        bad = tuple(v for v in record.volumes if v in beyond and states[v] is State.UP)
        if bad and sources:
            try:
                for volume in bad:
                    await self._mover.set_aside(volume, record.path)
            except VolumeError as error:
                self._report.add(
                    Case("not set aside", error.volume, record.path, record.key, str(error))
                )
                return repaired
            keep = tuple(v for v in record.volumes if v not in bad)
            outcome = await self._mover.move(
                [Move(record=record, sources=sources, keep=keep, copy=bad)]
            )
            repaired |= set() if outcome[record.key] else set(bad)
        return repaired

    async def _mark(self, record: Record, volume: str) -> bool:
        """Write the sidecar beside a blob that is good; have it deleted if the key was deleted
        meanwhile."""
        path = record.path
        try:
            await self._mover.clients[volume].put({sidecar_path(path): encode_sidecar(record)})
        except VolumeError:
            return False
        return not await self._store.index.write(
            partial(remove_strays, [(record.key, volume, path)]), keys=[record.key]
        )

    async def _note_strays(self, strays: Sequence[Place]) -> None:
        """Report what no record names, and note it for removal."""
        sidecars = await read_sidecars(
            self._mover.clients, [(volume, sidecar_path(path)) for volume, path in strays]
        )
        keys = [sidecar.key if isinstance(sidecar, Record) else "" for sidecar in sidecars]
        current = await self._store.index.get_many(keys)
        noted = list[Stray]()
        for (volume, path), sidecar, key, record in zip(
            strays, sidecars, keys, current, strict=True
        ):
            # One that is named was written since the records were noted.
            if not is_named(record, volume, path):
                self._report.add(Case(name_stray(path, sidecar, record), volume, path, key))
                noted.append((key, volume, path))
        await self._notes.add_strays(noted)

    async def _note_stray_marks(self, marks: Sequence[Place]) -> None:
        self._report.add(*(Case("leftover mark", volume, path) for volume, path in marks))
        await self._notes.add_strays([("", volume, path) for volume, path in marks])

    async def _remove_strays(self) -> None:
        """Put the strays in the garbage: each one's record is looked up again in the
        transaction."""
        async for strays in self._notes.strays():
            keys = [key for key, _, _ in strays if key]
            paths = [path for _, _, path in strays]
            remove = partial(remove_strays, strays)
            self.repaired += await self._store.index.write(remove, keys, paths)


async def verify(config: Config, options: argparse.Namespace, report: Report) -> None:
    """Check every replica of every record, and every file on every volume; with --repair, restore
    and clean up."""
    async with open_store(config, options.repair) as store:
        mover = Mover(store, options.limit_rate * 1e6, report)
        notes = Notes()
        work = Verify(store, mover, notes, report, options.deep)
        progress = show_progress(report, lambda: tell_extent(work, mover), lambda: work.walk.done)
        try:
            async with progress:
                await work.run(options.repair, options.grace)
        finally:
            await notes.close()
    left = (
        sum(count for kind, count in report.counts.items() if kind not in HARMLESS) - work.repaired
    )
    report.facts = {
        "keys": work.keys,
        "replicas": work.replicas,
        "bytes": work.bytes,
        "bytes_read": mover.bytes,
        "young": work.young,
    }
    report.facts |= {"repaired": work.repaired, "left": left}
    report.lines = [f"{tell_extent(work, mover)}: {tell_faults(work.repaired, left)}"]
    if work.young:
        report.lines.append(
            f"{work.young} files that no record names are younger than --grace: left alone"
        )
    report.code = 1 if left else 0


def tell_extent(work: Verify, mover: Mover) -> str:
    read = f", {show_bytes(mover.bytes)} read" if mover.bytes else ""
    return f"{work.keys} keys, {work.replicas} replicas of {show_bytes(work.bytes)}{read}"


def tell_faults(repaired: int, left: int) -> str:
    if repaired:
        return f"{repaired} faults repaired, {left} left"
    return f"{left} faults" if left else "no faults"


# == status, backup, forget, token ================================================================


def share_ideally(volumes: Sequence[Volume], replicas: int) -> dict[str, float]:
    """Return the share of all replicas that the ring gives each volume, from a sample of keys."""
    ring = Ring(volumes)
    counts = Counter(name for i in range(10000) for name in ring.place(f"sample {i}", replicas))
    return {v.name: counts[v.name] / max(1, counts.total()) for v in volumes}


async def status(config: Config, options: argparse.Namespace, report: Report) -> None:
    """Show volumes and totals, from a running server or from the index and the volumes."""
    if options.url:
        async with open_client(options.url, options, patience_s=2.0) as client:
            facts = await client.status()
    else:
        async with open_store(config) as store:
            facts = await store.status()
    volumes = facts["volumes"]
    known = [
        Volume(name=v["name"], url=v["url"], weight=v["weight"], zone=v["zone"]) for v in volumes
    ]
    ideal = share_ideally(known, config.replicas)
    blobs = max(1, sum(v["blobs"] for v in volumes))
    report.lines = [
        f"{'volume':20} {'state':9} {'blobs':>10} {'bytes':>10} {'share':>7} {'ideal':>7}"
    ]
    for v in volumes:
        v |= {"share": round(v["blobs"] / blobs, 4), "ideal": round(ideal[v["name"]], 4)}
        row = f"{v['name']:20} {v['state']:9} {v['blobs']:10} {show_bytes(v['bytes']):>10} "
        report.lines.append(row + f"{v['share']:7.1%} {v['ideal']:7.1%}")
    unconfigured = facts.get("unconfigured", [])  # an older server does not say
    for v in unconfigured:
        report.lines.append(
            f"{v['name']:20} {'unknown':9} {v['blobs']:10} {show_bytes(v['bytes']):>10}  "
            "the index names it, the configuration does not"
        )
    waiting = f"{facts['garbage']} replicas wait to be deleted"
    report.lines.append(f"{facts['keys']} keys, {show_bytes(facts['bytes'])}; {waiting}")
    report.facts = facts
    report.code = 0 if all(v["state"] == "up" for v in volumes) and not unconfigured else 1


def authorization(options: argparse.Namespace) -> dict[str, str]:
    secret = read_token(options)
    return {"Authorization": f"Bearer {secret}"} if secret else {}


def open_client(url: str, options: argparse.Namespace, patience_s: float = PATIENCE_S) -> Client:
    return Client(url, token=read_token(options), patience_s=patience_s)


def read_token(options: argparse.Namespace) -> str:
    """Return the secret in --token-file or MKV_TOKEN, "" if there is none: a command line is
    public."""
    place = "MKV_TOKEN"
    text = os.environ.get("MKV_TOKEN", "")
    if options.token_file:
        place = options.token_file
        text = Path(place).read_bytes().decode("utf-8", "surrogateescape")
    if NOT_UTF8.search(text):
        raise ConfigError([f"{place} is not valid UTF-8"])
    words = text.split()
    if len(words) > 1 or (options.token_file and not words):
        raise ToolError(f"{place} must hold one secret and nothing else")
    return words[0] if words else ""


async def backup(config: Config, options: argparse.Namespace, report: Report) -> None:
    """Copy the index to a file while the server runs; the file appears whole or not at all."""
    index = Index(config.db)
    check_index(config.db)
    index.check_target(options.file)
    await index.open()
    part = options.file + COPYING
    whole = max(1, size_of(config.db))

    def tell() -> str:
        return f"{show_bytes(size_of(part))} copied"

    try:
        async with show_progress(report, tell, lambda: min(1.0, size_of(part) / whole)):
            keys = await index.copy_to(options.file)
    finally:
        await index.close()
    size = size_of(options.file)
    report.facts = {"file": options.file, "keys": keys, "bytes": size}
    report.lines = [f"{options.file}: {keys} keys, {show_bytes(size)}"]


def size_of(path: str) -> int:
    """Return the bytes of a file, 0 if it is not there."""
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return 0


async def move_index(config: Config, options: argparse.Namespace, report: Report) -> None:
    """Copy an index to another engine, or another place, while nobody uses either; check the
    copy."""
    check_index(options.source)
    source = Replacement(options.source)
    target = Replacement(options.target)
    async with contextlib.AsyncExitStack() as stack:
        for one in (source, target):
            stack.push_async_callback(one.close)
            await one.open()
        if source.old is None:
            raise ConfigError([f"FROM: {source.name}: {source.damage}"])
        if target.damage or (target.old and await count_keys(target.old)):
            raise ConfigError([f"TO: there is an index at {target.name}, and it is not empty"])
        copying = IndexCopy(source.old, target.new)
        copying.whole = await count_keys(source.old)
        async with show_progress(report, copying.text, copying.share):
            await copying.copy()
            await copying.check()
        await target.finish(copying.keys, copying.size)
    report.facts = {"keys": copying.keys, "bytes": copying.size, "pending": copying.pending}
    report.lines = [
        f"{target.name}: {copying.keys} keys, {show_bytes(copying.size)}, and {copying.pending} "
        "rows pending",
        f"{source.name} is as it was: let no server use it from now on",
    ]


async def count_keys(index: Index) -> int:
    keys, _ = (await index.totals()).get(ALL_KEYS, (0, 0))
    return keys


class IndexCopy:
    """A copy of one index's rows into another, and how far it is."""

    def __init__(self, source: Index, target: Index) -> None:
        self._source = source
        self._target = target
        self.whole = 0  # keys there are
        self.keys = 0
        self.size = 0  # bytes of their blobs
        self.pending = 0
        self.checked = 0  # keys

    def text(self) -> str:
        return f"{self.keys} keys copied, {self.checked} checked"

    def share(self) -> float:
        return min(1.0, (self.keys + self.checked) / max(1, 2 * self.whole))

    async def copy(self) -> None:
        async for records in self._source.read_records():
            named = [record.key for record in records]
            await self._target.write(partial(insert_all, records), keys=named)
            self.keys += len(records)
            self.size += sum(record.size for record in records)
        age_s = await self._target.now_s() - await self._source.now_s()
        async for pending in self._source.read_pending():
            paths = [row.path for row in pending]
            await self._target.write(partial(carry_over, pending, age_s), paths=paths)
            self.pending += len(pending)

    async def check(self) -> None:
        """Raise ToolError unless both have the same records, and as many rows pending."""
        copies = self._target.read_records()
        async for records in self._source.read_records():
            if await anext(copies, []) != records:
                raise ToolError("the copy is not the same: TO stays as it was")
            self.checked += len(records)
        count = 0
        async for pending in self._target.read_pending():
            count += len(pending)
        if await anext(copies, []) or count != self.pending:
            raise ToolError("the copy has more, or less, than there was: TO stays as it was")


def insert_all(records: Iterable[Record], tx: Transaction) -> None:
    for record in records:
        tx.insert(record)


async def forget(config: Config, options: argparse.Namespace, report: Report) -> None:
    """Give up what waits to be deleted on a volume that will not come back."""
    name = options.name
    index = Index(config.db)
    embedded = {f"volume{i}" for i in range(1, EMBEDDED_VOLUMES + 1)}
    configured = {volume.name for volume in config.volumes} or embedded
    if name in configured:
        reason = "is in the configuration: take it out, reload, rebalance, then forget it"
        raise ConfigError([f"NAME: {name} {reason}"])
    check_index(config.db)
    await index.open()
    try:
        totals = await index.totals()
        waiting = await index.unclaimed_on(name)
        if name in (ALL_KEYS, GARBAGE) or not (name in totals or waiting):
            raise ConfigError([f"NAME: the index knows no volume {name}"])
        blobs, _ = totals.get(name, (0, 0))
        if blobs:
            raise ToolError(f"{blobs} records still name {name}: rebalance first")
        count = 0
        while waiting:
            paths = [path for _, path in waiting]
            await index.write(partial(Transaction.forget, places=waiting), paths=paths)
            count += len(waiting)
            waiting = await index.unclaimed_on(name)
    finally:
        await index.close()
    report.facts = {"volume": name, "forgotten": count}
    report.lines = [f"{name}: {count} replicas that waited to be deleted are forgotten"]


async def token(config: Config, options: argparse.Namespace, report: Report) -> None:
    """Make a token: print its secret, which is kept nowhere, and the table for the
    configuration."""
    secret = secrets.token_urlsafe(32)
    allow = [one for part in options.allow for one in part.split(",") if one]
    digest = hashlib.sha256(secret.encode()).hexdigest()
    made = asdict(
        Token(name=options.name, sha256=digest, allow=tuple(allow), prefix=options.prefix)
    )
    quoted = {
        name: json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        for name, value in made.items()
    }
    report.facts = {"secret": secret, "token": made}
    report.lines = [
        secret,
        "",
        "[[token]]",
        *(f"{name} = {value}" for name, value in quoted.items() if made[name]),
    ]


# == put, get, ls, rm, import =====================================================================
# Copying, for people, over mkv's Client. Files, or keys, are gone through one after the other and
# dealt with many at once, so memory grows neither with their number (of files: in one folder) nor
# with their size. Each is compared first: what has the same size and digest there already is left
# alone. What fails is named, and the rest goes on, unless the server fails again and again or
# there is no more room.

FAILURES_IN_A_ROW = 50  # of the server: then nothing will succeed
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
PART_NAME = re.compile(r"\.mkv-[0-9a-f]{32}\.part")  # of a download that was cut off
AT_ONCE_BYTES = 1024 * 1024  # of a blob that import holds in memory
IMPORT_PAGE = 1000  # keys
IMPORT_LONGEST_PAGE = 1_000_000  # the original gives no more
IMPORT_ATTEMPTS = 3


class Local(NamedTuple):
    """A file here, and the key that it is, or becomes."""

    path: Path
    key: str
    size: int


class Copying:
    """What put, get, rm and import have in common: counts, and how far they are."""

    def __init__(self, report: Report, verb: str) -> None:
        self._report = report
        self._verb = verb  # what is done with a key: "copied"
        self.total = 0  # files or keys
        self.total_bytes = 0
        self.is_counted = False
        self.done = Counter[str]()  # what became of them
        self.bytes = 0  # that were moved
        self.passed_bytes = 0  # of files that are done with
        self._failures = 0

    def hear(self, count: int) -> None:
        self.bytes += count

    def count(self, size: int) -> None:
        self.total += 1
        self.total_bytes += size

    def end(self, became: str, size: int = 0) -> None:
        self.done[became] += 1
        self.passed_bytes += size
        self._failures = 0

    def fail(self, key: str, path: str, error: Exception | str, size: int = 0) -> None:
        """Note that one could not be dealt with; raises ToolError if no other will be."""
        self.done["failed"] += 1
        self.passed_bytes += size
        detail = str(error) or type(error).__name__
        self._report.add(Case("failed", "", path, key, detail))
        is_full = isinstance(error, OSError) and error.errno in NO_ROOM
        if is_full or isinstance(error, Unauthorized | Forbidden | Full):
            raise ToolError(f"{key or path}: {detail}")
        # What is wrong with one key or file alone says nothing of the next.
        if isinstance(error, MkvError) and error.status >= 500 and not isinstance(error, Corrupt):
            self._failures += 1
        if self._failures >= FAILURES_IN_A_ROW:
            raise ToolError(f"{self._failures} failures in a row, the last one: {detail}")

    def share(self) -> float:
        """Return how much is done, 0 until all is counted."""
        if not self.is_counted:
            return 0.0
        if not self.total_bytes:
            return min(1.0, self.done.total() / max(1, self.total))
        return min(1.0, self.passed_bytes / self.total_bytes)

    def text(self) -> str:
        speed = f"{show_bytes(self.bytes / self._report.seconds)}/s"
        known = f" of {self.total}" if self.is_counted else ""
        size = f", {show_bytes(self.passed_bytes)} of {show_bytes(self.total_bytes)}"
        size = size if self.is_counted and self.total_bytes else ""
        return f"{self.done.total()}{known} done{size}, {show_bytes(self.bytes)} moved, {speed}"

    def finish(self) -> None:
        """Say in the report what was done."""
        failed = self.done["failed"]
        facts = {"bytes": self.bytes, "failed": failed} | dict(self.done)
        words = []
        for became in (self._verb, "same", "there", "gone", "failed"):
            if self.done[became] or became == self._verb:
                words.append(f"{self.done[became]} {BECAME.get(became, became)}")
        speed = f"{show_bytes(self.bytes / self._report.seconds)}/s"
        moved = f"; {show_bytes(self.bytes)}, {speed}" if self.bytes else ""
        self._report.facts = {self._verb: 0} | facts
        self._report.lines = [", ".join(words) + moved]
        self._report.code = 1 if failed else 0


BECAME = {  # for people
    "same": "the same already", "there": "there already, not compared", "gone": "gone already",
}  # fmt: skip


async def work_through(
    items: AsyncIterator[T], act: Callable[[T], Awaitable[None]], at_once: int
) -> None:
    """Act on each item, some at once; if one raises, end the others."""
    lock = asyncio.Lock()

    async def work() -> None:
        while True:
            async with lock:
                try:
                    item = await anext(items)
                except StopAsyncIteration:
                    return
            await act(item)

    workers = [asyncio.create_task(work()) for _ in range(at_once)]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)


@contextlib.asynccontextmanager
async def counting(copying: Copying, sizes: AsyncIterator[int]) -> AsyncIterator[None]:
    """Meanwhile find out how much there is, for the progress."""

    async def count() -> None:
        async for size in sizes:
            copying.count(size)
        copying.is_counted = True

    task = asyncio.create_task(count())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)  # whoever copies meets the same error


async def each(found: Iterator[T], at_once: int = 256) -> AsyncIterator[T]:
    """Yield what an iterator that waits for disks gives, from a thread."""
    while batch := await asyncio.to_thread(lambda: list(islice(found, at_once))):
        for one in batch:
            yield one


def digest_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


async def is_same(path: Path, size: int, blob: Blob) -> bool:
    """Whether a file of `size` bytes holds just that blob."""
    return size == blob.size and await asyncio.to_thread(digest_file, path) == blob.digest


# -- put --


def walk_files(given: str, prefix: str) -> Iterator[Local | tuple[str, str]]:
    """Yield the files at a path that was given, or (path, why it has no key). Of a folder the name
    is part of the keys unless the path ends with a slash; links to folders are not followed."""
    if not given:  # an unset variable of a shell, and not the folder here
        yield given, "an empty path"
        return
    top = os.path.normpath(given)
    base = (
        ""
        if given.endswith("/") or os.path.basename(top) in ("", ".", "..")
        else (os.path.basename(top) + "/")
    )
    if not os.path.isdir(top):
        yield look_at_file(top, prefix + os.path.basename(top))
        return
    waiting = [(top, prefix + base)]
    while waiting:
        folder, start = waiting.pop()
        try:
            with os.scandir(folder) as entries:
                names = sorted(entry.name for entry in entries)
        except OSError as error:
            yield folder, str(error)
            continue
        folders = []
        for name in names:
            path = os.path.join(folder, name)
            if os.path.isdir(path) and os.path.islink(path):
                yield path, "a link to a folder is not followed"
            elif os.path.isdir(path):
                folders.append((path, f"{start}{name}/"))
            elif not PART_NAME.fullmatch(name):
                yield look_at_file(path, start + name)
        waiting += reversed(folders)


def look_at_file(path: str, key: str) -> Local | tuple[str, str]:
    try:
        facts = os.stat(path)
        if not stat.S_ISREG(facts.st_mode):
            return path, "it is no file"
        return Local(Path(path), check_key(key), facts.st_size)
    except (OSError, MkvError) as error:
        return path, str(error)


def walk_all(paths: Iterable[str], prefix: str) -> Iterator[Local | tuple[str, str]]:
    for path in paths:
        yield from walk_files(path, prefix)


def check_apart(paths: Sequence[str], prefix: str) -> None:
    """Raise ConfigError if two files would become one key. What has come is noted in a scratch
    database, on disk if it is much."""
    with contextlib.closing(sqlite3.connect("")) as taken:
        taken.execute("CREATE TABLE taken (key TEXT PRIMARY KEY, path BLOB) WITHOUT ROWID")
        for found in walk_all(paths, prefix):
            if isinstance(found, Local):
                row = (found.key, os.fsencode(found.path))
                added = taken.execute(
                    "INSERT INTO taken VALUES (?, ?) ON CONFLICT DO NOTHING", row
                )
                if not added.rowcount:
                    line = "SELECT path FROM taken WHERE key = ?"
                    (other,) = taken.execute(line, (found.key,)).fetchone()
                    both = f"{os.fsdecode(other)} and {found.path}"
                    raise ConfigError([f"put: {both} would become one key, {found.key}"])


async def put(config: Config, options: argparse.Namespace, report: Report) -> None:
    """Store files and folders."""
    copying = Copying(report, "copied")
    if len(options.paths) > 1:
        await asyncio.to_thread(check_apart, options.paths, options.prefix)

    async def act(found: Local | tuple[str, str]) -> None:
        if not isinstance(found, Local):
            copying.fail("", *found)
            return
        try:
            copying.end(await put_file(client, found, copying), found.size)
        except (MkvError, OSError, ValueError) as error:
            copying.fail(found.key, str(found.path), error, found.size)

    async def sizes() -> AsyncIterator[int]:
        async for found in each(walk_all(options.paths, options.prefix)):
            yield found.size if isinstance(found, Local) else 0

    async with (
        open_client(options.url, options) as client,
        counting(copying, sizes()),
        show_progress(report, copying.text, copying.share),
    ):
        found = each(walk_all(options.paths, options.prefix))
        await work_through(found, act, options.concurrency)
    copying.finish()


async def put_file(client: Client, local: Local, copying: Copying) -> str:
    """Store one file unless it is there; return what became of it. Who may only create cannot
    look, and does not have to: that changes nothing."""
    only_create = None
    try:
        blob = await client.head(local.key)
        if await is_same(local.path, local.size, blob):
            return "same"
    except NotFound:
        pass
    except Forbidden:
        only_create = "*"
    try:
        await client.put(local.key, local.path, if_none_match=only_create, hear=copying.hear)
    except PreconditionFailed:
        return "there"
    return "copied"


# -- get --


def find_place(folder: Path, key: str) -> Path:
    """Return the file that a key becomes below `folder`; raises ToolError for one that would lead
    elsewhere, whatever it says and whatever links are there."""
    parts = key.split("/")
    if any(part in ("", ".", "..") or "\0" in part or PART_NAME.fullmatch(part) for part in parts):
        raise ToolError("it cannot be the name of a file")
    place = folder
    for part in parts[:-1]:
        place = place / part
        if place.is_symlink():
            raise ToolError(f"{place} is a link")
    return place / parts[-1]


def ignores_case(folder: Path) -> bool:
    """Whether a file there answers to names in other letters, too."""
    with tempfile.NamedTemporaryFile(prefix=".mkv-Case-", dir=folder) as file:
        return (folder / Path(file.name).name.swapcase()).exists()


async def get(config: Config, options: argparse.Namespace, report: Report) -> None:
    """Fetch keys, or all that begin with a prefix."""
    copying = Copying(report, "copied")
    keys, out = options.keys, options.output
    prefix = keys[0] if len(keys) == 1 and (not keys[0] or keys[0].endswith("/")) else None
    if prefix is not None and not out:
        raise ConfigError(["-o: say into which folder the keys that begin so are to go"])
    if out == "-":
        await write_out(keys, options, report)
        return
    into_folder = prefix is not None or len(keys) > 1 or not out or os.path.isdir(out)
    folder = Path(out or ".")
    folds = False  # names that differ in case only are one
    taken = set[str]()  # files, where two keys may become one

    async def act(blob: Blob) -> None:
        try:
            if prefix is not None:
                path = find_place(folder, blob.key[len(prefix) :])
            elif into_folder:
                path = find_place(folder, blob.key.rpartition("/")[2])
            else:
                path = folder
            name = str(path).casefold() if folds else str(path)
            if name in taken:
                raise ToolError(f"another key becomes {path}")
            if folds or prefix is None:
                taken.add(name)
            copying.end(await get_file(client, blob, path, copying), blob.size)
        except (MkvError, OSError, ToolError, ValueError) as error:
            copying.fail(blob.key, "", error, blob.size)

    async def blobs(count: bool) -> AsyncIterator[Blob]:
        if prefix is not None:
            async for blob in client.list(prefix):
                yield blob
            return
        for key in keys:
            try:
                yield await client.head(key)
            except MkvError as error:
                if not count:
                    copying.fail(key, "", error)

    async def sizes() -> AsyncIterator[int]:
        async for blob in blobs(count=True):
            yield blob.size

    if into_folder:
        folder.mkdir(parents=True, exist_ok=True)
        folds = await asyncio.to_thread(ignores_case, folder)
    async with (
        open_client(options.url, options) as client,
        counting(copying, sizes()),
        show_progress(report, copying.text, copying.share),
    ):
        await work_through(blobs(count=False), act, options.concurrency)
    copying.finish()


async def get_file(client: Client, blob: Blob, path: Path, copying: Copying) -> str:
    """Fetch one key unless it is there; return what became of it."""
    size = path.stat().st_size if path.is_file() and not path.is_symlink() else -1
    if await is_same(path, size, blob):
        return "same"
    path.parent.mkdir(parents=True, exist_ok=True)
    await client.get_to(blob.key, path, hear=copying.hear)
    return "copied"


async def write_out(keys: Sequence[str], options: argparse.Namespace, report: Report) -> None:
    """Write blobs to standard output, one after the other."""
    report.is_silent = True
    async with open_client(options.url, options) as client:
        for key in keys:
            async for piece in client.stream(key):
                sys.stdout.buffer.write(piece)
    sys.stdout.buffer.flush()


# -- ls, rm --


async def ls(config: Config, options: argparse.Namespace, report: Report) -> None:
    """List keys, a line each."""
    report.is_silent = True
    async with open_client(options.url, options) as client:
        async for blob in client.list(options.prefix):
            when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(blob.modified_s))
            if options.json:
                facts = {"key": blob.key, "size": blob.size, "digest": blob.digest}
                line = json.dumps(facts | {"content_type": blob.content_type, "modified": when})
            elif options.long:
                line = f"{blob.size:15} {when} {show_text(blob.content_type):25} "
                line += show_text(blob.key)
            else:
                line = show_text(blob.key)
            print(line)


async def rm(config: Config, options: argparse.Namespace, report: Report) -> None:
    """Delete keys, or all that begin with a prefix."""
    copying = Copying(report, "deleted")
    if (options.prefix is None) == (not options.keys):
        raise ConfigError(["rm: takes either keys or --prefix"])
    if options.prefix == "":  # an unset variable of a shell
        raise ConfigError(["rm: --prefix is empty, which would be all keys"])

    async def keys() -> AsyncIterator[str]:
        for key in options.keys:
            yield key
        if options.prefix is not None:
            async for blob in client.list(options.prefix):
                yield blob.key

    async def act(key: str) -> None:
        try:
            await client.delete(key)
            copying.end("deleted")
        except MkvError as error:
            if isinstance(error, NotFound) and options.prefix is not None:
                copying.end("gone")
            else:
                copying.fail(key, "", error)

    async with open_client(options.url, options) as client:
        if options.prefix is not None and not options.yes:
            count = size = 0
            async for blob in client.list(options.prefix):
                count += 1
                size += blob.size
            told = f"{count} keys of {show_bytes(size)} begin with {json.dumps(options.prefix)}"
            raise ConfigError([f"rm: {told}: say --yes to delete them"])
        async with show_progress(report, copying.text, copying.share):
            await work_through(keys(), act, options.concurrency)
    copying.finish()


# -- import --


class Original:
    """A store of the Go original, minikeyvalue: its lists, `GET /prefix?list&start=&limit=` with
    {"keys": [...], "next": ""}, where keys begin with a slash; its redirects; its Content-Md5,
    which is in hex."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def _ask(self, target: str) -> bytes:
        for attempt in range(IMPORT_ATTEMPTS):
            try:
                async with self._client.send("GET", self._client.url + target, {}) as response:
                    body = await read_body(response)
                    if response.status == 200:
                        return body
                    raise ToolError(f"{self._client.url}{target} was answered {response.status}")
            except Unreachable:
                if attempt + 1 == IMPORT_ATTEMPTS:
                    raise
                await asyncio.sleep(1)
        raise AssertionError

    async def keys(self, prefix: str) -> AsyncIterator[str]:
        """Yield all keys that begin with `prefix`, without their first slash. One that is no UTF-8
        is listed with U+FFFD in it, and no page can begin there: then the page is made longer."""
        start = ""
        limit = IMPORT_PAGE
        while True:
            query = f"list&limit={limit}" + (f"&start={quote(start)}" if start else "")
            body = await self._ask(f"/{quote(prefix)}?{query}")
            try:
                page = json.loads(body)
                names = [name.removeprefix("/") for name in page["keys"]]
                following = page["next"]
                if following and following.encode() <= start.encode():
                    raise ValueError("the next page is not behind this one")
            except NOT_AS_MKV as error:
                raise ToolError(f"{self._client.url} lists no keys: {error!r}") from None
            if following and "\ufffd" in following:
                limit *= 2
                if limit > IMPORT_LONGEST_PAGE:
                    raise ToolError(f"{self._client.url} has too many keys that are no UTF-8")
                continue
            for name in names:
                yield name
            if not following:
                return
            start = following
            limit = IMPORT_PAGE

    @contextlib.asynccontextmanager
    async def open(self, key: str) -> AsyncIterator[Incoming]:
        """Begin to read a key; raises NotFound, Unreachable."""
        async with contextlib.AsyncExitStack() as stack:
            url = f"{self._client.url}/{quote(key)}"
            response = await stack.enter_async_context(self._client.send("GET", url, {}))
            md5 = response.headers.get("Content-Md5", "")
            if response.status == 302:
                await read_body(response)
                url = response.headers.get("Location", "")
                response = await stack.enter_async_context(self._client.send("GET", url, {}))
            if response.status == 404:
                raise NotFound(f"{url} was answered 404")
            if response.status != 200:
                raise Unreachable(f"{url} was answered {response.status}", sent=True)
            yield Incoming(response, md5)


class Incoming:
    """A blob that is read from the original."""

    def __init__(self, response: ClientResponse, md5: str) -> None:
        self._response = response
        self._md5 = md5
        self.size = response.content_length

    async def read(self) -> AsyncIterator[bytes]:
        """Yield its pieces; raises Corrupt at the end if they are not what the original says."""
        hasher = hashlib.md5(usedforsecurity=False)
        async for piece in self._response.content.iter_any():
            hasher.update(piece)
            yield piece
        if self._md5 and hasher.hexdigest() != self._md5:
            raise Corrupt("its bytes have not the MD5 that the original says")


async def import_store(config: Config, options: argparse.Namespace, report: Report) -> None:
    """Copy all keys of a minikeyvalue."""
    copying = Copying(report, "copied")

    async def act(key: str) -> None:
        for attempt in range(1, IMPORT_ATTEMPTS + 1):
            try:
                became, size = await import_key(original, client, key, options.by_size, copying)
                copying.end(became, size)
                return
            except MkvError as error:
                may_pass = isinstance(error, Unavailable | Unanswered)
                if attempt == IMPORT_ATTEMPTS or not may_pass:
                    copying.fail(key, "", error)
                    return
            await asyncio.sleep(1)

    async def sizes() -> AsyncIterator[int]:
        async for _ in original.keys(options.prefix):
            yield 0

    async with Client(options.source) as reader, open_client(options.url, options) as client:
        original = Original(reader)
        async with counting(copying, sizes()), show_progress(report, copying.text, copying.share):
            await work_through(original.keys(options.prefix), act, options.concurrency)
    copying.finish()


async def import_key(
    original: Original, client: Client, key: str, by_size: bool, copying: Copying
) -> tuple[str, int]:
    """Copy one key unless it is there; return what became of it, and its bytes. What is small, or
    has the same size there, is read as a whole first, or only for its digest."""
    check_key(key)
    blob = None
    with contextlib.suppress(NotFound):
        blob = await client.head(key)
    async with original.open(key) as incoming:
        size = incoming.size or 0
        if blob is not None and incoming.size == blob.size:
            if by_size:
                return "same", size
            hasher = Hasher({})
            async for piece in incoming.read():
                hasher.update(piece)
            if hasher.finish() == blob.digest:
                return "same", size
        elif incoming.size is not None and size <= AT_ONCE_BYTES:
            held = b"".join([piece async for piece in incoming.read()])
            await client.put(key, held, hear=copying.hear)
            return "copied", size
        else:
            await client.put(key, incoming.read(), hear=copying.hear)
            return "copied", size
    async with original.open(key) as incoming:  # of the same size, but other bytes
        await client.put(key, incoming.read(), hear=copying.hear)
        return "copied", size


# == bench ========================================================================================
# Several processes ask, each over kept connections: what is to be measured is the server. How much
# of their time they were busy is in the report, since from some rate on they are the limit.
#
# They speak HTTP over plain streams, at 65 us a request, and not by Client, whose 235 us are more
# than the server takes to answer: it would be Client that is measured.

BENCH_PROCESSES = max(1, (os.cpu_count() or 2) // 2)  # the other half is for the server
BENCH_PHASES = ("PUT", "GET", "READ", "HEAD")  # and then DELETE
BENCH_METHODS = {"READ": "GET"}  # if not as the phase is called
BENCH_STATUSES = {"PUT": 201, "GET": 302, "READ": 302, "HEAD": 200, "DELETE": 204}
BENCH_TIMEOUT_S = 60.0
BENCH_BUSY = 0.9  # from here on the server may be able to do more
GIVE_UP_AFTER = 100  # failures in a row
TELL_EVERY_S = 0.2
HEAD_BYTES = 64 * 1024
LOCATION = re.compile(rb"\r\nlocation: *([^\r]*)", re.IGNORECASE)
CONTENT_LENGTH = re.compile(rb"\r\ncontent-length: *([0-9]{1,15})\r", re.IGNORECASE)


class Latencies:
    """Counts latencies in steps of 2 %, so that memory is bounded."""

    def __init__(self) -> None:
        self.counts: Counter[int] = Counter()

    def add(self, seconds: float) -> None:
        self.counts[round(math.log(max(seconds, 1e-6), 1.02))] += 1

    def quantile_ms(self, q: float) -> float:
        rank = q * self.counts.total()
        seen = 0
        for step in sorted(self.counts):
            seen += self.counts[step]
            if seen >= rank:
                return round(1000 * 1.02**step, 2)
        return 0.0


class BenchPlan(NamedTuple):
    """What one process of a bench is to do."""

    url: str  # of the server, with the prefix of the keys of this process
    secret: str  # header line, or nothing
    size: int  # bytes of a blob
    concurrency: int
    requests: int  # of a phase
    duration_s: float  # of a phase, instead


@dataclass
class BenchPhase:
    """What came of a phase, in one process or, added up, in all. Rates and latencies are of the
    requests that succeeded."""

    done: int = 0
    seconds: float = 0.0
    busy_s: float = 0.0  # CPU time of this side
    errors: Counter[str] = field(default_factory=Counter)
    latencies: Latencies = field(default_factory=Latencies)

    def add(self, other: BenchPhase) -> None:
        self.done += other.done
        self.seconds = max(self.seconds, other.seconds)
        self.busy_s += other.busy_s
        self.errors += other.errors
        self.latencies.counts += other.latencies.counts

    def facts(self, size: int, processes: int) -> dict[str, Any]:
        good = self.latencies.counts.total()
        seconds = max(1e-6, self.seconds)
        facts: dict[str, Any] = {"requests": self.done, "a_second": round(good / seconds, 1)}
        facts["mb_a_second"] = round(good * size / 1e6 / seconds, 2)
        for q in (50, 90, 99, 99.9):
            facts[f"p{q:g}_ms"] = self.latencies.quantile_ms(q / 100)
        facts["errors"] = self.errors.total()
        facts["busy"] = round(self.busy_s / seconds / processes, 2)
        return facts | {"why": self.errors}


class BenchConnection:
    """A kept connection to one server."""

    def __init__(self, host: str, port: int, is_tls: bool) -> None:
        self._place = (host, port)
        self._is_tls = is_tls
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, head: bytes, body: bytes) -> tuple[int, bytes, bytes]:
        """Return status, Location and body of the answer; raises OSError, EOFError, ValueError,
        TimeoutError."""
        answered = False
        try:
            async with asyncio.timeout(BENCH_TIMEOUT_S):
                if self._streams is None:
                    self._streams = await asyncio.open_connection(
                        *self._place, ssl=self._is_tls or None, limit=HEAD_BYTES
                    )
                reader, writer = self._streams
                writer.write(head + body)
                await writer.drain()
                answer = await reader.readuntil(b"\r\n\r\n")
                length = CONTENT_LENGTH.search(answer)
                size = int(length[1]) if length and not head.startswith(b"HEAD ") else 0
                content = await reader.readexactly(size)
            answered = b"\r\nConnection: close\r\n" not in answer
        except asyncio.LimitOverrunError:
            raise ValueError("the head of the answer does not end") from None
        finally:
            if not answered:
                self.close()
        found = LOCATION.search(answer)
        return int(answer[9:12]), found[1] if found else b"", content

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].transport.abort()
            self._streams = None


class BenchClient:
    """One of the clients of a bench: makes one request after the other."""

    def __init__(self, plan: BenchPlan) -> None:
        self._plan = plan
        self._noise = random.Random(plan.size).randbytes(plan.size)
        self._connections = dict[str, BenchConnection]()  # by scheme, host and port
        self._base = urlsplit(plan.url)

    def _body(self, i: int) -> bytes:
        return (i.to_bytes(8, "big") + self._noise[8:])[: self._plan.size]

    async def request(self, phase: str, i: int) -> str:
        """Make one request; return what is wrong with its answer, or ""."""
        method = BENCH_METHODS.get(phase, phase)
        sent = self._body(i) if phase == "PUT" else b""
        lines = self._plan.secret
        if phase == "PUT":
            lines += f"Content-Length: {len(sent)}\r\n"
        try:
            base = self._base
            target = f"{base.path}{i}"
            status, location, _ = await self._ask(base, method, target, lines, sent)
            if status != BENCH_STATUSES[phase]:
                return f"status {status}"
            return await self._read(location, i) if phase == "READ" else ""
        except (OSError, EOFError, ValueError) as error:  # TimeoutError is an OSError
            return type(error).__name__

    async def _read(self, location: bytes, i: int) -> str:
        """Read the blob and compare it."""
        url = urlsplit(location.decode())
        target = url.path + (f"?{url.query}" if url.query else "")
        status, _, body = await self._ask(url, "GET", target, "", b"")
        if status != 200:
            return f"status {status} of a volume"
        return "" if body == self._body(i) else "wrong bytes"

    async def _ask(
        self, url: SplitResult, method: str, target: str, lines: str, body: bytes
    ) -> tuple[int, bytes, bytes]:  # fmt: skip
        place = f"{url.scheme}://{url.netloc}"
        if place not in self._connections:
            is_tls = url.scheme == "https"
            port = url.port or (443 if is_tls else 80)
            self._connections[place] = BenchConnection(url.hostname or "", port, is_tls)
        head = f"{method} {target} HTTP/1.1\r\nHost: {url.netloc}\r\n{lines}\r\n".encode()
        return await self._connections[place].ask(head, body)

    def close(self) -> None:
        for connection in self._connections.values():
            connection.close()


class BenchPart:
    """The work of one process: a phase whenever it is told to. Counts go back now and then, a
    BenchPhase at the end of each."""

    def __init__(self, plan: BenchPlan, orders: Connection) -> None:
        self._plan = plan
        self._orders = orders
        self._clients = [BenchClient(plan) for _ in range(plan.concurrency)]
        self._written = 0
        self._is_stopped = False
        self._over = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def serve(self) -> None:
        """Do what is ordered, until nobody can order anything more."""
        asyncio.get_running_loop().add_reader(self._orders.fileno(), self._hear)
        await self._over.wait()
        for client in self._clients:
            client.close()

    def _hear(self) -> None:
        try:
            order = self._orders.recv()
        except (EOFError, OSError):
            self._over.set()
            return
        if order == "stop":
            self._is_stopped = True
        else:
            self._is_stopped = False
            self._task = asyncio.create_task(self._run(order))

    async def _run(self, phase: str) -> None:
        """Run one phase: so many requests, or as many as its time allows; DELETE removes all that
        was written. When it is stopped, what is under way ends first: no PUT comes after
        DELETE."""
        plan = self._plan
        result = BenchPhase()
        began = time.perf_counter()
        cpu_s = time.process_time()
        told_s = began
        failed = 0  # in a row
        timed = plan.duration_s and phase != "DELETE"
        count = plan.requests if phase == "PUT" else self._written

        def goes_on() -> bool:
            if self._is_stopped or failed >= GIVE_UP_AFTER:
                return False
            return time.perf_counter() - began < plan.duration_s if timed else result.done < count

        async def work(client: BenchClient) -> None:
            nonlocal failed, told_s
            while goes_on():
                i = result.done
                result.done += 1
                if phase == "PUT":
                    self._written = result.done  # also what fails may be there
                else:
                    i %= max(1, self._written)
                sent = time.perf_counter()
                wrong = await client.request(phase, i)
                now = time.perf_counter()
                if wrong:
                    result.errors[wrong] += 1
                    failed += 1
                else:
                    result.latencies.add(now - sent)
                    failed = 0
                if now - told_s > TELL_EVERY_S:
                    told_s = now
                    self._orders.send(result.done)

        await asyncio.gather(*map(work, self._clients))
        result.seconds = time.perf_counter() - began
        result.busy_s = time.process_time() - cpu_s
        self._orders.send(result)


def run_bench_part(plan: BenchPlan, orders: Connection) -> None:
    """Be one process of a bench. A Ctrl-C is for the first process to hear, which says stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    async def serve() -> None:
        await BenchPart(plan, orders).serve()

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(serve())


class Bench:
    """One run against one server, of several processes."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self.prefix = f"mkv-bench-{secrets.token_hex(4)}/"
        self.processes = min(options.processes, options.concurrency, options.count)
        self.phase = ""
        self.cut_off = False  # was not even let end what was under way: a second Ctrl-C
        self._orders = list[Connection]()
        self._done = list[int]()  # of each process

    @property
    def done(self) -> int:
        """How many requests of this phase there were."""
        return sum(self._done)

    def start(self) -> None:
        """Start the processes."""
        options = self._options
        secret = "".join(f"{name}: {text}\r\n" for name, text in authorization(options).items())
        context = multiprocessing.get_context("spawn")
        heard = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which a process begins with
        try:
            for number in range(self.processes):
                ours, theirs = context.Pipe()
                plan = BenchPlan(
                    f"{options.url.rstrip('/')}/{self.prefix}{number}/",
                    secret,
                    options.size,
                    share(options.concurrency, number, self.processes),
                    share(options.count, number, self.processes),
                    options.duration,
                )
                context.Process(target=run_bench_part, args=(plan, theirs), daemon=True).start()
                theirs.close()
                self._orders.append(ours)
        finally:
            signal.signal(signal.SIGINT, heard)

    async def run(self, phase: str) -> BenchPhase:
        """Run one phase. If it is cancelled, what is under way ends first."""
        self.phase = phase
        self._done = [0] * self.processes
        for orders in self._orders:
            orders.send(phase)
        parts = asyncio.gather(*map(self._hear, range(self.processes)))
        try:
            await asyncio.shield(parts)
        except asyncio.CancelledError:
            self.cut_off = True
            for orders in self._orders:
                orders.send("stop")
            await parts
            self.cut_off = False
            raise
        total = BenchPhase()
        for part in parts.result():
            total.add(part)
        return total

    async def _hear(self, number: int) -> BenchPhase:
        """Listen to a process until its phase is over."""
        loop = asyncio.get_running_loop()
        orders = self._orders[number]
        over = loop.create_future()

        def hear() -> None:
            try:
                said = orders.recv()
            except (EOFError, OSError):
                said = ToolError("a process of this bench has died")
            if isinstance(said, int):
                self._done[number] = said
            elif not over.done():
                over.set_result(said)

        loop.add_reader(orders.fileno(), hear)
        try:
            result = await over
        finally:
            loop.remove_reader(orders.fileno())
        if isinstance(result, ToolError):
            raise result
        assert isinstance(result, BenchPhase)
        self._done[number] = result.done
        return result

    def close(self) -> None:
        for orders in self._orders:
            orders.close()


def share(total: int, number: int, count: int) -> int:
    """Return what number `number` of `count` has of a total that is dealt out."""
    return total // count + (number < total % count)


async def bench(config: Config, options: argparse.Namespace, report: Report) -> None:
    """Measure PUT, GET (the redirect), READ (redirect followed, bytes verified), HEAD and DELETE;
    remove what was written, come what may."""
    if not URL.fullmatch(options.url):
        raise ToolError(f"{options.url} is no http(s)://host[:port][/path]")
    results: dict[str, BenchPhase] = {}
    work = Bench(options)
    report.interrupted = f"keys that begin with {work.prefix} may be left on the server"
    left = True
    phases = len(BENCH_PHASES) + 1
    work.start()
    try:
        async with show_progress(
            report, lambda: f"{work.phase} {work.done}", lambda: len(results) / phases
        ):
            try:
                for phase in BENCH_PHASES:
                    results[phase] = await work.run(phase)
                    if not results[phase].latencies.counts:
                        break  # the server is dead
            finally:
                if not work.cut_off:
                    removal = await work.run("DELETE")
                    results["DELETE"] = removal
                    # what had failed to be written is not there
                    left = bool(removal.errors.keys() - {"status 404"})
                    if not left:
                        report.interrupted = "what was written is removed"
    finally:
        work.close()
    facts = {
        phase: result.facts(options.size if phase in ("PUT", "READ") else 0, work.processes)
        for phase, result in results.items()
    }
    report.lines = describe_bench(facts, work.processes)
    if left:
        report.lines.append(f"keys that begin with {work.prefix} may be left on the server")
    report.facts = {"size": options.size, "concurrency": options.concurrency, **facts}
    report.facts |= {"prefix": work.prefix, "processes": work.processes}
    report.code = 1 if any(one["errors"] for one in facts.values()) else 0


def describe_bench(facts: Mapping[str, Mapping[str, Any]], processes: int) -> list[str]:
    """Return the table, what went wrong, and where this end was the limit."""
    names = (
        "requests", "a_second", "mb_a_second", "p50_ms", "p90_ms", "p99_ms", "p99.9_ms",
        "errors", "busy",
    )  # fmt: skip
    lines = [" " * 6 + "".join(f"{name:>12}" for name in names)]
    for phase, row in facts.items():
        lines.append(f"{phase:6}" + "".join(f"{row[name]:12}" for name in names))
    for phase, row in facts.items():
        lines += [f"{phase}: {count} x {why}" for why, count in row["why"].items()]
    limited = [phase for phase, row in facts.items() if row["busy"] >= BENCH_BUSY]
    if limited:
        lines.append(
            f"{', '.join(limited)}: the {processes} process(es) of this bench were the limit; the "
            "server may do more (--processes)"
        )
    return lines


# == Command line =================================================================================

Run = Callable[[Config, argparse.Namespace, Report], Awaitable[None]]
Argument = tuple[tuple[str, ...], Mapping[str, Any]]  # what argparse's add_argument takes


class Command(NamedTuple):
    run: Run
    about: str
    arguments: Sequence[Argument] = ()
    settings: Sequence[str] = ()  # of the configuration; those without talk to a server only
    details: str = ""  # what only who uses it wants to know


def argument(*names: str, **options: Any) -> Argument:
    return names, options


def at_least(kind: type[int] | type[float], low: float) -> Callable[[str], float]:
    """Return a type for argparse."""

    def number(text: str) -> float:
        value = kind(text)
        if not low <= value < math.inf:
            raise argparse.ArgumentTypeError(f"must be at least {low}, not {text}")
        return value

    return number


ALL_SETTINGS = ("db", "data", "volumes", "replicas", "volume_timeout")
COUNT = at_least(int, 1)
SECONDS = at_least(float, 0)
SERVER = argument("url", metavar="URL", help="of the server")
TOKEN_FILE = argument(
    "--token-file", metavar="FILE", default="",
    help="holds the secret of a token [take it from $MKV_TOKEN]",
)  # fmt: skip
KEYS_AT_ONCE = argument(
    "--concurrency", metavar="N", type=COUNT, default=16, help="keys at once [16]"
)
LIMIT_RATE = argument(
    "--limit-rate", metavar="MB/S", type=SECONDS, default=0.0,
    help="of reading or copying [no limit]",
)  # fmt: skip
FULL_FOLDER = (
    f"A folder of a volume whose listing has more than {LISTING_BYTES // 2**20} MiB (some 88,000 "
    "files; a volume has 65,536 folders) counts as unreadable."
)

COMMANDS: Mapping[str, Command] = {
    "rebuild": Command(
        rebuild,
        "Make the index anew from the volumes; the server must not run. The old one stays, as "
        "INDEX.<date>. If it can be read, its garbage is honoured: what was deleted stays "
        "deleted; else sidecars alone decide. If any volume cannot be read in full, nothing "
        "changes.",
        [argument(
            "--allow-missing", metavar="NAME", action="append", default=[],
            help="do without this volume",
        )],
        ALL_SETTINGS,
        "It reads every sidecar, and of blobs only their size, unless the sidecars of a version "
        "differ or one is bad: then the blob's own digest decides, and the case is reported. If "
        "none agrees with a blob, or the version is far in the future (2116), it ends with exit "
        "code 1, names all such versions and changes nothing. Mend the sidecar, or move it away "
        "with its blob, and run it again. A blob without any sidecar is an unfinished write and "
        "stops nothing. Each key of the old index that is not on the volumes, or only in an older "
        "version, is reported as `lost key`, with exit code 1; the new index is in place all the "
        f"same, since no file is left that could bring the key back. {FULL_FOLDER}",
    ),
    "rebalance": Command(
        rebalance,
        "Bring every key to the volumes where the ring says, while the server runs.",
        [
            argument(
                "--dry-run", action="store_true",
                help="print what would be moved, and move nothing",
            ),
            argument(
                "--concurrency", metavar="N", type=COUNT, default=8,
                help="batches under way at once [8]",
            ),
            LIMIT_RATE,
        ],
        ALL_SETTINGS,
        "Change the volumes in the configuration and reload the server (kill -HUP) before: one "
        "that still has the old set would go on placing blobs by it. A key that a client changes "
        "meanwhile, or that has garbage waiting where its copy would go, is left alone: run it "
        "again until it exits with 0, and also after it was killed, since what it had copied "
        "waits for that.",
    ),
    "verify": Command(
        verify,
        "Compare index and volumes, while the server runs. After a restored backup, rebuild "
        "first.",
        [
            argument(
                "--deep", action="store_true", help="read every replica and check its digest"
            ),
            argument(
                "--repair", action="store_true",
                help="restore bad replicas; remove what no record names",
            ),
            argument(
                "--grace", metavar="S", type=SECONDS, default=3600.0,
                help="s; younger files are left alone [3600]",
            ),
            LIMIT_RATE,
        ],
        ALL_SETTINGS,
        "A record with fewer replicas than `replicas` is a fault (exit code 1), also one that a "
        "PUT left behind with a lower `min_replicas`. A repair that fails leaves the record as it "
        "was. --grace 0 is for a store that nobody writes to: an upload under way looks like an "
        f"unfinished write. {FULL_FOLDER}",
    ),
    "status": Command(
        status,
        "Show volumes and totals, from a running server or from index and volumes.",
        [
            argument(
                "url", metavar="URL", nargs="?", default="",
                help="of the server [look at index and volumes]",
            ),
            TOKEN_FILE,
        ],
        ALL_SETTINGS,
    ),
    "put": Command(
        put,
        "Store files and folders, many at once. What is there already, by size and digest, is "
        "left alone: so the same command goes on, and copies what has changed. A folder's name is "
        "part of the keys unless its path ends with a slash. If two files would become one key, "
        "nothing is stored.",
        [
            SERVER,
            argument("paths", metavar="PATH", nargs="+", help="a file or a folder"),
            argument("--prefix", default="", help="what the keys begin with"),
            KEYS_AT_ONCE,
            TOKEN_FILE,
        ],
    ),
    "get": Command(
        get,
        "Fetch keys, or all that begin with a prefix (one that ends with a slash, or an empty "
        "one) into a folder, many at once. What is here already is left alone, what was cut off "
        "goes on. Nothing is written outside of the folder, whatever keys say.",
        [
            SERVER,
            argument("keys", metavar="KEY", nargs="+", help="a key, or a PREFIX/"),
            argument(
                "-o", "--output", metavar="FILE", default="",
                help="a file or a folder [the last part of the key, here]; - for standard output",
            ),
            KEYS_AT_ONCE,
            TOKEN_FILE,
        ],
    ),
    "ls": Command(
        ls,
        "List the keys that begin with a prefix. --json: an object a line.",
        [
            SERVER,
            argument("prefix", metavar="PREFIX", nargs="?", default="", help="[all keys]"),
            argument("-l", "--long", action="store_true", help="with size, time and type"),
            TOKEN_FILE,
        ],
    ),
    "rm": Command(
        rm,
        "Delete keys, or with --prefix and --yes all that begin so.",
        [
            SERVER,
            argument("keys", metavar="KEY", nargs="*", help="a key"),
            argument("--prefix", metavar="P", help="all keys that begin so"),
            argument("--yes", action="store_true", help="really"),
            KEYS_AT_ONCE,
            TOKEN_FILE,
        ],
    ),
    "import": Command(
        import_store,
        "Copy a whole store of minikeyvalue, the Go original, while it runs. Run it again to go "
        "on, or to fetch what has come since.",
        [
            argument("source", metavar="URL-OF-MINIKEYVALUE", help="of the Go original's server"),
            SERVER,
            argument("--prefix", default="", help="only keys that begin so"),
            argument(
                "--by-size", action="store_true",
                help="take keys of the same size for the same, and do not read them to compare",
            ),
            KEYS_AT_ONCE,
            TOKEN_FILE,
        ],
    ),
    "bench": Command(
        bench,
        "Measure a running server: PUT, GET (the redirect), READ (with the blob, which is "
        "compared), HEAD, DELETE.",
        [
            SERVER,
            argument(
                "--size", metavar="BYTES", type=at_least(int, 0), default=4096,
                help="of each blob [4096]",
            ),
            argument(
                "--concurrency", metavar="N", type=COUNT, default=16, help="requests at once [16]"
            ),
            argument(
                "--count", metavar="N", type=COUNT, default=1000,
                help="requests of each kind [1000]",
            ),
            argument(
                "--duration", metavar="S", type=SECONDS, default=0.0,
                help="s for each kind, instead of --count",
            ),
            argument(
                "--processes", metavar="N", type=COUNT, default=BENCH_PROCESSES,
                help=f"that ask [{BENCH_PROCESSES}]",
            ),
            TOKEN_FILE,
        ],
    ),
    "backup": Command(
        backup,
        "Copy the index to a file, while the server runs.",
        [argument("file", metavar="FILE", help="where the copy goes; replaced if it is there")],
        ("db", "data"),
        "It refuses a FILE that is the index or belongs to it, whatever link leads there.",
    ),
    "move-index": Command(
        move_index,
        "Copy an index from one engine to the other, while no server and no tool uses either, and "
        "check the copy.",
        [
            argument("source", metavar="FROM", help="the index: a file, or postgresql://..."),
            argument("target", metavar="TO", help="where it goes: a file, or postgresql://..."),
        ],
    ),
    "forget": Command(
        forget,
        "Give up what waits to be deleted on a volume that will not come back. Only for a disk "
        "that is lost or wiped: else a rebuild brings back what is dead there.",
        [argument("name", metavar="NAME", help="of the volume, which is no longer configured")],
        ("db", "data", "volumes", "replicas"),
        "Until then garbage of a volume that is no longer configured stays in the index, for the "
        "day when the volume comes back, and so does the alert about old garbage.",
    ),
    "token": Command(
        token,
        "Make a token: prints its secret, and the table for the configuration.",
        [
            argument("name", metavar="NAME", help="who it is for"),
            argument(
                "--allow", metavar="OPERATION", nargs="+", required=True,
                help=f"some of {', '.join(OPERATIONS)}",
            ),
            argument("--prefix", default="", help="the keys it is confined to [all]"),
        ],
    ),
}  # fmt: skip


def make_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(
        prog="mkv_tools.py", description="The operator's tools for mkv."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="|".join(COMMANDS))
    for name, command in COMMANDS.items():
        made = commands.add_parser(
            name, allow_abbrev=False, help=command.about.partition(".")[0],
            description=command.about, epilog=command.details,
        )  # fmt: skip
        if command.settings:
            add_settings(made, command.settings)
        made.add_argument("--json", action="store_true", help="print one JSON object")
        for names, options in command.arguments:
            made.add_argument(*names, **options)
    return parser


async def run(options: argparse.Namespace, report: Report) -> None:
    """Run one tool; SIGTERM ends it as SIGINT does."""
    if task := asyncio.current_task():
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    flags = {
        name: value
        for name, value in vars(options).items()
        if name in (*ALL_SETTINGS, "volume") and value is not None
    }
    config = load_config(getattr(options, "config", ""), flags)
    if not is_postgres(config.db):  # for temporary tables
        os.environ.setdefault("SQLITE_TMPDIR", str(Path(config.db).absolute().parent))
    db = hide_secrets(config.db)
    try:
        await COMMANDS[options.command].run(config, options, report)
    except IndexDamaged as error:
        raise ConfigError([f"db: {db}: {error.reason}"]) from None
    except IndexFailed as error:  # a full disk, say
        raise ToolError(f"{db}: {error.reason}") from None
    except sqlite3.Error as error:
        raise ToolError(f"a scratch database: {error}") from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # the imports are over
        signal.signal(signal.SIGINT, signal.default_int_handler)
    options = parse_arguments(make_parser(), arguments)
    logging.basicConfig(level=logging.CRITICAL)  # what volumes do is in the report
    report = Report(options.json)
    try:
        with asyncio.Runner() as runner:  # measured: uvloop makes no tool faster
            runner.run(run(options, report))
        if not report.is_silent:
            print(report.as_json() if options.json else report.as_text())
        print(end="", flush=True)  # while it is known what to do if nobody reads on
        return report.code
    except ConfigError as error:
        print_faults(error)
        return 2
    except BrokenPipeError:  # whoever reads has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ToolError, MkvError, OSError) as error:
        print(f"mkv: {show_text(str(error))}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        print(f"mkv: interrupted; {report.interrupted}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
