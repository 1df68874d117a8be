"""The operator's tools for mkv: rebuild, rebalance, verify, status, bench, backup, token.

Everything a tool needs to know of keys, paths, records, the ring, the index and the volumes is in mkv.py; here is only
what it takes to walk, compare, copy and report. Theory of operation:

1.  Walking. A folder /aa/bb/ holds all versions of all keys whose hash begins with aabb, on every volume. So the tools
    walk the 65,536 folders in order, on all volumes in step, a few folders at a time, and memory never grows with the
    number of keys. Folders are read as nginx's autoindex JSON, strictly: a folder that is not there is empty; anything
    else that is not a whole listing is a failure. A timeout is never read as absence (I8).
2.  Reading. Listings, sidecars and small blobs are many and small: GETs are pipelined on kept connections (Getter).
3.  rebuild takes the index alone (INDEX.lock), so no server and no other tool has it open. Each folder is merged by
    itself: of each key the highest version that has a sound sidecar with its blob beside it becomes the record; older
    versions become garbage. One sidecar is read for each version, the others count if they have the same size. The
    result is a new file, INDEX.new, checked, then swapped in with one rename; the old one stays as INDEX.<date>.
4.  What was deleted stays deleted (I4): if the old index can be read, its garbage is carried over, and a version that
    is garbage there without being the record's is never adopted. Without an old index the sidecars alone decide.
5.  Moving replicas (rebalance, verify --repair) never locks a key. A batch of keys goes through: claim, copy, commit.
    Claim, one transaction: if a record is still what the plan saw, the copies to be made enter the garbage, due in a
    week and a half. Copy: the bytes are read from one replica, checked against the digest, written blob first, then
    sidecar. Commit, one transaction: if the record is still the same and the claims still stand, the record moves to
    its new volumes, the claims leave the garbage, dropped replicas enter it; else the copies are due for deletion.
6.  So whatever moment a tool is killed at (I7), a copy that no record names is in the garbage, for the server to
    delete, for a DELETE to find, for rebuild to ignore. The next run takes over the claims of a dead one: only one
    tool moves replicas at a time (INDEX.tools). A copy is never made where other garbage waits: the server may be
    deleting just there. rebalance waits for that, or leaves it to a later run.
7.  No tool drops the last good replica (I8): a move reads one replica in full and finds its digest right, and that one
    stays or its copy does, before anything is dropped.
8.  verify notes the path of every record in a scratch file beside the index, then walks the folders and compares. The
    store is in use: whatever looks wrong is looked up again before it counts. Orphans are noted, and removed at the
    end, only if every listing succeeded, only if older than --grace, and by entering the garbage in a transaction that
    looks the record up once more.
9.  A corrupt replica is uploaded as /corrupt/<its name> on its volume, where no tool looks, before its place is taken:
    then the good bytes are PUT to the same path. That is no overwriting of a blob in place (a volume renames a whole
    file there), and no new version: the path names the version, and the version's digest names the bytes.

After an old backup of the index was restored, run rebuild, not verify --repair: to verify, what is not in the index is
an orphan. Exit codes: 0 done, 1 something is left or failed, 2 usage. Ctrl-C is safe; the same command goes on.

Reading order: plans (pure), reading volumes, moving replicas, rebuild, rebalance, verify, status, bench, backup,
token, command line.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import logging
import math
import os
import random
import re
import secrets
import shutil
import signal
import sqlite3
import sys
import time
from collections import Counter, defaultdict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from aiohttp import ClientError, ClientSession, ClientTimeout, TCPConnector

from mkv import (
    ALL_KEYS,
    COLUMNS,
    GARBAGE,
    HEX_DIGEST,
    OPERATIONS,
    SMALL_BLOB,
    STEM,
    Config,
    ConfigError,
    Hasher,
    Index,
    MkvError,
    Record,
    Ring,
    SqliteThread,
    State,
    Store,
    Token,
    Transaction,
    Upload,
    Volume,
    VolumeClient,
    VolumeDown,
    VolumeError,
    VolumeTimeout,
    VolumeUnexpected,
    Wire,
    WrongDigest,
    add_settings,
    after_prefix,
    decode_sidecar,
    encode_sidecar,
    get_all,
    load_config,
    lock_file,
    new_loop,
    parse_path,
    prepare_index,
    read_totals,
    record_of_row,
    retry_delay_s,
    run_embedded,
    sidecar_path,
    sync_folder,
)

T = TypeVar("T")
File = tuple[int, str]  # (size, mtime as listed); the size is -1 for what is no plain file
Files = dict[str, File]  # one folder on one volume: name -> file

# == Plans ============================================================================================================
# What is to be done, from what is known. Pure: no clock, no I/O.


class ToolError(Exception):
    """Why a tool cannot do its work: one line for the operator, exit code 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One thing that is not as it should be."""

    kind: str
    volume: str = ""
    path: str = ""
    key: str = ""
    detail: str = ""

    def __str__(self) -> str:
        key = f"key {json.dumps(self.key)}" if self.key else ""
        place = self.path.encode("utf-8", "backslashreplace").decode()
        return f"{self.kind}: {' '.join(filter(None, (self.volume, place, key, self.detail)))}"


@dataclass(slots=True)
class Version:
    """What all volumes hold of one version of one key. `stem` is its path without extension."""

    stem: str
    sidecars: dict[str, File] = field(default_factory=dict)  # volume -> file
    blobs: dict[str, Files] = field(default_factory=dict)  # volume -> path -> file

    @property
    def volumes(self) -> list[str]:
        return sorted(self.sidecars.keys() | self.blobs.keys())

    def blob_size(self, volume: str, path: str) -> int | None:
        file = self.blobs.get(volume, {}).get(path)
        return file and file[0]


def parse_listing(body: bytes) -> Files:
    """Read a folder in nginx's autoindex JSON; raises ValueError if it is cut short or anything else."""
    try:
        rows = json.loads(body.decode("utf-8", "surrogateescape"))  # nginx passes any name of a file on as it is
        return {str(row["name"]): (int(row["size"]) if row["type"] == "file" else -1, row["mtime"]) for row in rows}
    except (TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"not a listing: {error}") from None


def group_files(found: Mapping[str, Mapping[str, Files]]) -> tuple[dict[str, Version], list[Case]]:
    """Sort the files found (volume -> folder -> files) by version; name what mkv never wrote."""
    versions: dict[str, Version] = {}
    foreign = []
    for volume, folders in found.items():
        for folder, files in folders.items():
            for name, file in files.items():
                path = folder + name
                parsed = parse_path(path) if file[0] >= 0 else None
                if parsed is None:
                    left = re.fullmatch(r"(.*)\.\d{10}", path)
                    kind = "nginx leftover" if left and parse_path(left[1]) else "foreign file"
                    foreign.append(Case(kind=kind, volume=volume, path=path))
                    continue
                version = versions.get(path[:STEM]) or versions.setdefault(path[:STEM], Version(path[:STEM]))
                if parsed[2] == "key":
                    version.sidecars[volume] = file
                else:
                    version.blobs.setdefault(volume, {})[path] = file
    return versions, foreign


def order_versions(versions: Iterable[Version]) -> dict[str, list[Version]]:
    """Return the versions of each key (by its hash) that have a sidecar or an older sibling with one, highest first."""
    by_hash: dict[str, list[Version]] = defaultdict(list)
    for version in sorted(versions, key=lambda v: v.stem, reverse=True):
        by_hash[version.stem[:-20]].append(version)
    return by_hash


@dataclass(slots=True, kw_only=True)
class Verdict:
    """What rebuild makes of one version: its record, or none and why it is `dead` (garbage) or not to be had."""

    record: Record | None = None
    dead: bool = False
    revived: tuple[str, ...] = ()  # volumes whose garbage entry for this path is wrong
    cases: list[Case] = field(default_factory=list)


def judge_version(
    version: Version, sidecars: Mapping[str, Record | str], garbage: Collection[str], was_record: Callable[[Record], bool]
) -> Verdict:
    """Decide whether a version can be a record. `sidecars`: volume -> what was read there, or what is wrong with it.

    `garbage` are the volumes where the old index says that it is garbage; that kills it, unless `was_record`.
    """
    path = f"{version.stem}.key"
    bad = {volume: wrong for volume, wrong in sidecars.items() if isinstance(wrong, str)}
    cases = [Case(kind="bad sidecar", volume=v, path=path, detail=wrong) for v, wrong in bad.items()]
    readings = {r for r in sidecars.values() if isinstance(r, Record)}
    if len(readings) > 1:
        names = " ".join(v for v in sidecars if v not in bad)
        return Verdict(cases=[*cases, Case(kind="contradicting sidecars", volume=names, path=path)])
    if not readings:
        return Verdict(cases=cases)
    record = readings.pop()
    if garbage and not was_record(record):
        return Verdict(dead=True, cases=cases)
    whole = []
    for volume in sorted(version.sidecars.keys() - bad.keys()):
        size = version.blob_size(volume, record.path)
        if size == record.size:
            whole.append(volume)
        elif size is None:
            cases.append(Case(kind="sidecar without blob", volume=volume, path=path, key=record.key))
        else:
            detail = f"has {size} bytes, its sidecar says {record.size}"
            cases.append(Case(kind="wrong size", volume=volume, path=record.path, key=record.key, detail=detail))
    volumes = tuple(v for v in whole if v not in garbage) or tuple(whole)
    revived = tuple(v for v in volumes if v in garbage)  # a restored backup's garbage: never drop the last replica
    return Verdict(record=replace(record, volumes=volumes) if volumes else None, revived=revived, cases=cases)


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """How a record gets to the volumes `keep` and `copy`. If `left` says why, nothing can be done now."""

    record: Record
    sources: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    copy: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()
    left: str = ""

    @property
    def after(self) -> Record:
        return replace(self.record, volumes=tuple(sorted(self.keep + self.copy)))

    @property
    def meanwhile(self) -> Record:
        """The record between claim and commit: without the volumes that get the blob anew because theirs is bad."""
        return replace(self.record, volumes=tuple(v for v in self.record.volumes if v not in self.copy))


def plan_move(record: Record, target: Sequence[str], states: Mapping[str, State]) -> Move | None:
    """Bring a record to the volumes the ring names; None if it is there.

    Only volumes that are up are written to, only those that are not down are read. If there is nothing to copy, one
    of the replicas that stay must be read and found good before others are dropped.
    """
    copy = tuple(v for v in target if v not in record.volumes)
    keep = tuple(v for v in record.volumes if v in target)
    drop = tuple(v for v in record.volumes if v not in target)
    if not copy and not drop:
        return None
    readable = [v for v in (record.volumes if copy else keep) if states.get(v, State.DOWN) is not State.DOWN]
    if unfit := [f"{v} is {states[v].value}" for v in copy if states[v] is not State.UP]:
        return Move(record=record, left=", ".join(unfit))
    if not readable:
        return Move(record=record, left=f"none of {', '.join(record.volumes)} can be read")
    turn = int(record.version[-4:], 16) % len(readable)  # spreads the reading, the same way each time
    sources = tuple(readable[turn:] + readable[:turn])
    return Move(record=record, sources=sources, keep=keep, copy=copy, drop=drop)


def plan_batches(moves: Iterable[T], size_of: Callable[[T], int]) -> list[list[T]]:
    """Group what is small, by number and bytes; what is large goes alone."""
    batches: list[list[T]] = []
    room = 0
    for move in moves:
        size = size_of(move)
        if size > SMALL_BLOB or not batches or size > room or len(batches[-1]) == BATCH_KEYS:
            batches.append([])
            room = 0 if size > SMALL_BLOB else BATCH_BYTES
        batches[-1].append(move)
        room -= size
    return batches


BATCH_KEYS = 64
BATCH_BYTES = 4 * 1024 * 1024


def check_replicas(record: Record, version: Version, listed: Collection[str]) -> dict[str, str]:
    """Compare a record with the files of its version: volume -> what is wrong, for the volumes that were listed."""
    faults = {}
    for volume in record.volumes:
        size = version.blob_size(volume, record.path)
        if volume not in listed:
            continue
        if size is None:
            faults[volume] = "missing"
        elif size != record.size:
            faults[volume] = "wrong size"
        elif volume not in version.sidecars:
            faults[volume] = "missing sidecar"
    return faults


@dataclass(frozen=True, slots=True, kw_only=True)
class Stray:
    """Files of one version on one volume that no record accounts for."""

    volume: str
    stem: str
    paths: tuple[str, ...]  # blobs; the sidecar is beside them or alone
    sidecar: bool


def find_strays(
    versions: Iterable[Version], records: Mapping[str, Record], garbage: Collection[tuple[str, str]], before_s: float
) -> tuple[list[Stray], int]:
    """Return what neither a record (by stem) nor the garbage (volume, stem) accounts for, and how many are too young."""
    strays, young = [], 0
    for version in versions:
        record = records.get(version.stem)
        for volume in version.volumes:
            blobs = dict(version.blobs.get(volume, {}))
            sidecar = version.sidecars.get(volume)
            if record and volume in record.volumes:
                blobs.pop(record.path, None)
                sidecar = None
            if (volume, version.stem) in garbage or not (blobs or sidecar):
                continue
            files = [*blobs.values(), *([sidecar] if sidecar else [])]
            if max(written_s(version.stem), *(modified_s(file) for file in files)) > before_s:
                young += 1
            else:
                paths = tuple(sorted(blobs)) or (version.stem,)
                strays.append(Stray(volume=volume, stem=version.stem, paths=paths, sidecar=sidecar is not None))
    return strays, young


def written_s(stem: str) -> float:
    return int(stem[-20:-4], 16) / 1e9


def modified_s(file: File) -> float:
    try:
        return parsedate_to_datetime(file[1]).timestamp()
    except (ValueError, TypeError):
        return math.inf  # so that it counts as young


def name_stray(stray: Stray, key: str, record: Record | None) -> str:
    """Say what a stray is, from its sidecar's key (empty if it has none that is sound) and that key's record."""
    if not stray.sidecar:
        return "unfinished write"
    if record is None:
        return "orphan"
    if record.path[:STEM] == stray.stem:
        return "extra replica"
    return "stale version" if stray.stem[-20:] < record.version else "orphan"


# == Reading volumes ==================================================================================================

AHEAD = 6  # batches under way at once
BATCH_FILES = 4000  # files in one batch of folders, about
SIDECAR_BYTES = 64 * 1024  # no sidecar is larger: a key has 1024 bytes


async def read_answer(wire: Wire) -> tuple[int, bytes]:
    """Read one answer with its body; raises ConnectionError or asyncio.IncompleteReadError if it is cut short."""
    reader = wire._reader
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    if not head.startswith(b"http/1."):
        raise ConnectionResetError("the answer is not HTTP")
    if b"\r\nconnection: close" in head:
        wire.reusable = False
    if (at := head.find(b"\r\ncontent-length:")) >= 0:
        return int(head[9:12]), await reader.readexactly(int(head[at + 17 : head.index(b"\r", at + 2)]))
    if b"\r\ntransfer-encoding: chunked" not in head:
        raise ConnectionResetError("the answer has no length")
    chunks = []
    while size := int((await reader.readuntil(b"\r\n")).partition(b";")[0], 16):
        chunks.append((await reader.readexactly(size + 2))[:-2])
    await reader.readexactly(2)
    return int(head[9:12]), b"".join(chunks)


class Getter:
    """Small GETs from one volume, pipelined on kept connections: a tenth of the CPU of a general client."""

    def __init__(self, client: VolumeClient) -> None:
        self.client, self.name = client, client.volume.name
        self._idle: list[Wire] = []

    async def get(self, paths: Sequence[str]) -> list[tuple[int, bytes]]:
        """Return (status, body) for each path; raises VolumeError unless all are answered in full."""
        answers: list[tuple[int, bytes]] = []
        while len(answers) < len(paths):
            with self.client._watch("GET"):
                await self._read_some(paths, answers)
        return answers

    async def _read_some(self, paths: Sequence[str], answers: list[tuple[int, bytes]]) -> None:
        """Ask for the rest of `paths` on one connection. One that gave some answers may end, or a kept one without any."""
        loop, before = asyncio.get_running_loop(), len(answers)
        kept = self._idle.pop() if self._idle else None
        async with asyncio.timeout(self.client.timeout_s) as deadline:
            wire = kept or await self.client._connect()
            try:
                wire.writer.write(b"".join(self.client._request("GET", path, "", "") for path in paths[before:]))
                while len(answers) < len(paths) and wire.reusable:
                    answers.append(await read_answer(wire))
                    deadline.reschedule(loop.time() + self.client.timeout_s)
            except (OSError, asyncio.IncompleteReadError):
                wire.abort()
                if kept is None and len(answers) == before:
                    raise
            except ValueError:
                raise ConnectionResetError("the answer is not HTTP") from None
            finally:
                if wire.usable and len(answers) == len(paths):
                    self._idle.append(wire)
                else:
                    wire.abort()

    async def list(self, folders: Sequence[str]) -> list[Files]:
        """Return each folder's files; raises VolumeError unless all of them are known for sure."""
        listings: list[Files] = []
        for folder, (status, body) in zip(folders, await self.get(folders), strict=True):
            if status == 404 and folder != "/":
                listings.append({})
                continue
            if status != 200:
                raise VolumeUnexpected(self.name, f"the listing of {folder} was answered {status}")
            try:
                listings.append(parse_listing(body))
            except ValueError as error:
                raise VolumeUnexpected(self.name, f"the listing of {folder} is broken: {error}") from None
        return listings

    def close(self) -> None:
        while self._idle:
            self._idle.pop().abort()


async def ahead(jobs: AsyncIterator[Awaitable[T]], at_once: int) -> AsyncIterator[T]:
    """Carry out `jobs`, some at once; yield their results in order."""
    running: deque[asyncio.Future[T]] = deque()
    try:
        async for job in jobs:
            running.append(asyncio.ensure_future(job))
            if len(running) >= at_once:
                yield await running.popleft()
        while running:
            yield await running.popleft()
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


@dataclass(frozen=True, slots=True)
class Folders:
    """A run of folders, and which of them are on which volume."""

    names: Sequence[str]
    on: Mapping[str, Sequence[str]]

    @property
    def span(self) -> tuple[str, str]:
        """The range of paths that are in them."""
        return self.names[0], after_prefix(self.names[-1]) or ""


class Walk:
    """The folders of all volumes, in order and in step. `failed` hears of each listing that is not to be had."""

    def __init__(self, getters: Mapping[str, Getter], failed: Callable[[str, VolumeError], None]) -> None:
        self._getters, self._failed, self._at_once = getters, failed, 64
        self.foreign: list[Case] = []
        self.done = 0.0  # the share of the folders that were handed out

    async def _list(self, volume: str, folders: Sequence[str]) -> list[Files] | None:
        try:
            return await self._getters[volume].list(folders)
        except VolumeError as error:
            self._failed(volume, error)
            return None

    async def _list_each(self, on: Mapping[str, Sequence[str]]) -> dict[str, dict[str, Files]]:
        listings = await asyncio.gather(*(self._list(volume, folders) for volume, folders in on.items()))
        return {v: dict(zip(on[v], files, strict=True)) for v, files in zip(on, listings, strict=True) if files is not None}

    def _descend(self, found: Mapping[str, Mapping[str, Files]]) -> dict[str, list[str]]:
        """Return volume -> the folders one level deeper; note everything else that is there."""
        deeper: dict[str, list[str]] = {}
        for volume, folders in found.items():
            deeper[volume] = []
            for folder, files in folders.items():
                for name, (size, _) in files.items():
                    if size < 0 and re.fullmatch("[0-9a-f]{2}", name):
                        deeper[volume].append(f"{folder}{name}/")
                    elif (folder, name) != ("/", "corrupt"):
                        self.foreign.append(Case(kind="foreign file", volume=volume, path=folder + name))
        return deeper

    async def top(self) -> dict[str, list[str]]:
        """Return volume -> the folders /aa/ that it has."""
        return self._descend(await self._list_each({volume: ("/",) for volume in self._getters}))

    async def runs(
        self, top: Mapping[str, Sequence[str]], more: Callable[[str], Awaitable[set[str]]] | None = None
    ) -> AsyncIterator[Folders]:
        """Yield all folders /aa/bb/, in runs short enough for memory. `more` names further ones below a folder /aa/."""
        for number in range(256):
            self.done = number / 256
            first = f"/{number:02x}/"
            on = self._descend(await self._list_each({v: (first,) for v, folders in top.items() if first in folders}))
            names = sorted(set().union(*on.values(), await more(first) if more else ()))
            while names:
                run, names = names[: self._at_once], names[self._at_once :]
                yield Folders(run, {v: [one for one in folders if one in set(run)] for v, folders in on.items()})

    async def list_run(self, run: Folders) -> dict[str, dict[str, Files]]:
        """List a run: volume -> folder -> files; a volume that failed is left out."""
        found = await self._list_each({v: folders for v, folders in run.on.items() if folders})
        files = sum(len(files) for folders in found.values() for files in folders.values())
        self._at_once = max(1, min(256, len(run.names) * BATCH_FILES // (files + 1)))
        return found


async def read_sidecars(getters: Mapping[str, Getter], wanted: Sequence[tuple[str, str]]) -> list[Record | str]:
    """Read the sidecars (volume, path): each its record, or what is wrong with it. Raises VolumeError."""
    by_volume: dict[str, list[int]] = defaultdict(list)
    for i, (volume, _) in enumerate(wanted):
        by_volume[volume].append(i)
    results: list[Record | str] = [""] * len(wanted)

    async def read(volume: str, numbers: list[int]) -> None:
        answers = await getters[volume].get([wanted[i][1] for i in numbers])
        for i, (status, body) in zip(numbers, answers, strict=True):
            if status not in (200, 404):
                raise VolumeUnexpected(volume, f"GET {wanted[i][1]} was answered {status}")
            try:
                results[i] = decode_sidecar(body, wanted[i][1]) if status == 200 else "it is not there any more"
            except ValueError as error:
                results[i] = str(error)

    await asyncio.gather(*(read(volume, numbers) for volume, numbers in by_volume.items()))
    return results


# == Moving replicas ==================================================================================================
# Claim, copy, commit: points 5 to 7 of the theory of operation.

CLAIM_S = 1e6  # when a claim is due; also how a claim is told from other garbage, which is due within a day
CLAIMED_S = 1e5


def garbage_at(tx: Transaction, path: str) -> dict[str, float]:
    """Return volume -> due of the garbage at `path`."""
    return dict(tx._db.execute("SELECT volume, due FROM garbage WHERE path = ?", (path,)))


def set_record(tx: Transaction, before: Record, after: Record) -> None:
    if before != after:
        tx.remove(before)
        tx.insert(after)


def claim(tx: Transaction, move: Move, now: float) -> str:
    """Enter the copies that `move` will make in the garbage; return why it must not begin, if so."""
    record, path = move.record, move.record.path
    if tx.get(record.key) != record:
        return "changed"
    due = garbage_at(tx, path)
    if any(due[volume] < now + CLAIMED_S for volume in move.copy if volume in due):
        return "waiting"  # the server may be deleting there just now
    set_record(tx, record, move.meanwhile)
    tx.settle_garbage([(volume, path) for volume in due if volume in move.copy], [], now)  # a dead run's claims
    tx.add_garbage(path, move.copy, now, CLAIM_S)
    return ""


def commit(tx: Transaction, move: Move, copied: bool, now: float, delay_s: float) -> str:
    """Move the record if nothing has come between, else leave the copies to the garbage; return why not, if so."""
    path = move.record.path
    due = garbage_at(tx, path)
    changed = tx.get(move.record.key) != move.meanwhile or any(due.get(v, 0) < now + CLAIMED_S for v in move.copy)
    if changed or not copied:
        tx.settle_garbage([], [(volume, path, 0) for volume in move.copy], now)
        return "changed" if changed else "failed"
    set_record(tx, move.meanwhile, move.after)
    tx.settle_garbage([(volume, path) for volume in move.copy], [], now)
    tx.add_garbage(path, move.drop, now, delay_s)
    return ""


def release_claims(tx: Transaction, now: float) -> None:
    """Hand the claims of dead runs that nobody took over to the server's garbage collection."""
    rows = tx._db.execute("SELECT volume, path, 0 FROM garbage WHERE due > ?", (now + CLAIMED_S,)).fetchall()
    tx.settle_garbage([], rows, now)


class Pace:
    """Holds the bytes a second down to a limit (0: none)."""

    def __init__(self, rate: float) -> None:
        self._rate, self._free_at = rate, 0.0

    async def take(self, size: int) -> None:
        if self._rate:
            now = time.monotonic()
            self._free_at = max(now, self._free_at) + size / self._rate
            await asyncio.sleep(self._free_at - size / self._rate - now)


class Mover:
    """Reads, checks and copies replicas through a Store's clients. `note` hears of every replica that is not good."""

    def __init__(self, store: Store, session: ClientSession, pace: Pace, note: Callable[[Case], None]) -> None:
        self._store, self._session, self._pace, self._note = store, session, pace, note
        self.clients = store.view.clients
        self.getters = {name: Getter(client) for name, client in self.clients.items()}
        self.bytes = 0

    async def read_blobs(self, wanted: Sequence[tuple[str, Record]]) -> list[bytes | str]:
        """Read small blobs, (volume, record): each the good bytes, or what is wrong: "missing", "corrupt", else why."""
        by_volume: dict[str, list[int]] = defaultdict(list)
        results: list[bytes | str] = [""] * len(wanted)
        for i, (volume, _) in enumerate(wanted):
            by_volume[volume].append(i)

        async def read(volume: str, numbers: list[int]) -> None:
            try:
                answers = await self.getters[volume].get([wanted[i][1].path for i in numbers])
            except VolumeError as error:
                answers = []
                for i in numbers:
                    results[i] = str(error)
            for i, (status, body) in zip(numbers, answers, strict=False):
                good = status == 200 and hashlib.sha256(body).hexdigest() == wanted[i][1].digest
                wrong = {200: "corrupt", 404: "missing"}.get(status, f"GET was answered {status}")
                results[i] = body if good else wrong

        await asyncio.gather(*(read(volume, numbers) for volume, numbers in by_volume.items()))
        return results

    async def stream(self, record: Record, source: str, targets: Sequence[str] = ()) -> str:
        """Read a blob from `source`, checking it, into `targets`; return what is wrong with it. Raises VolumeError.

        The last piece is held back until the digest is known to be right, so that no target ever has a wrong blob.
        """
        uploads: list[Upload] = []
        hasher, held = Hasher({"sha256": bytes.fromhex(record.digest)}), b""
        try:
            async with self.clients[source].read(self._session, record.path) as response:
                if response.status == 404:
                    return "missing"
                for target in targets:
                    uploads.append(await self.clients[target].start_upload(record.path, record.size))
                async for chunk in response.content.iter_chunked(SMALL_BLOB):
                    await self._pace.take(len(chunk) * max(1, len(uploads)))
                    hasher.update(chunk)
                    if hasher.size > record.size:
                        return "corrupt"
                    if held:
                        await asyncio.gather(*(upload.send(held) for upload in uploads))
                    held = chunk
            hasher.finish()
            await asyncio.gather(*(upload.send(held) for upload in uploads))
            await asyncio.gather(*(upload.finish() for upload in uploads))
            return ""
        except WrongDigest:
            return "corrupt"
        finally:
            for upload in uploads:
                upload.abort()

    async def check(self, wanted: Sequence[tuple[str, Record]]) -> list[str]:
        """Read replicas, (volume, record), in full: each "" if it is good, else what is wrong with it."""
        results = [""] * len(wanted)
        for numbers in plan_batches(range(len(wanted)), lambda i: wanted[i][1].size):
            record = wanted[numbers[0]][1]
            if record.size <= SMALL_BLOB:
                await self._pace.take(sum(wanted[i][1].size for i in numbers))
                blobs = await self.read_blobs([wanted[i] for i in numbers])
                for i, blob in zip(numbers, blobs, strict=True):
                    results[i] = blob if isinstance(blob, str) else ""
            else:
                try:
                    results[numbers[0]] = await self.stream(record, wanted[numbers[0]][0])
                except VolumeError as error:
                    results[numbers[0]] = str(error)
            self.bytes += sum(wanted[i][1].size for i in numbers)
        return results

    async def move(self, moves: Sequence[Move]) -> dict[str, str]:
        """Carry a batch out (one large blob, or small ones); return key -> why it was not done, or ""."""
        index, now, delay_s = self._store.index, time.time(), self._store.view.config.garbage_delay
        outcome = dict(zip([m.record.key for m in moves], await index.write(lambda tx: [claim(tx, m, now) for m in moves]), strict=True))
        begun = [m for m in moves if not outcome[m.record.key]]
        failed = dict.fromkeys((m.record.key for m in begun), "interrupted")
        try:
            if begun and begun[0].record.size > SMALL_BLOB:
                failed = {m.record.key: await self._copy_large(m) for m in begun}
            else:
                failed = await self._copy_small(begun)
        finally:
            now = time.time()
            work = lambda tx: [commit(tx, m, not failed[m.record.key], now, delay_s) for m in begun]  # noqa: E731
            for move, why in zip(begun, await index.write(work), strict=True):
                outcome[move.record.key] = failed[move.record.key] if why == "failed" else why
        self.bytes += sum(m.record.size * len(m.copy) for m in begun if not outcome[m.record.key])
        return outcome

    def _note_bad(self, move: Move, volume: str, wrong: str) -> None:
        self._note(Case(kind=wrong if wrong in ("missing", "corrupt") else "unreadable", volume=volume,
                        path=move.record.path, key=move.record.key, detail="" if wrong in ("missing", "corrupt") else wrong))  # fmt: skip

    async def _copy_small(self, moves: Sequence[Move]) -> dict[str, str]:
        """Return key -> why its copies were not made, or "". Sources are tried in turn, for all keys at once."""
        blobs: dict[str, bytes] = {}
        turn, missing = 0, list(moves)
        while missing := [m for m in missing if m.record.key not in blobs and turn < len(m.sources)]:
            results = await self.read_blobs([(m.sources[turn], m.record) for m in missing])
            for move, blob in zip(missing, results, strict=True):
                if isinstance(blob, bytes):
                    blobs[move.record.key] = blob
                else:
                    self._note_bad(move, move.sources[turn], blob)
            turn += 1
        failed = {m.record.key: "" if m.record.key in blobs else "no good replica could be read" for m in moves}
        by_volume: dict[str, list[Move]] = defaultdict(list)
        for move in moves:
            for volume in move.copy if move.record.key in blobs else ():
                by_volume[volume].append(move)
        await self._pace.take(sum(len(blobs[m.record.key]) for group in by_volume.values() for m in group))
        for errors in await asyncio.gather(*(self._put(volume, group, blobs) for volume, group in by_volume.items())):
            failed |= errors
        return failed

    async def _put(self, volume: str, moves: Sequence[Move], blobs: Mapping[str, bytes]) -> dict[str, str]:
        """Write blobs and sidecars to one volume, together if it takes them, else one by one; return key -> error."""
        client, errors = self.clients[volume], {}
        groups: list[Sequence[Move]] = [moves]
        while groups:
            group = groups.pop()
            files = {}
            for move in group:
                files[move.record.path] = blobs[move.record.key]
                files[sidecar_path(move.record.path)] = encode_sidecar(move.record)
            try:
                await client.put(files, timeout_s=client.timeout_s * (1 + len(group) / 8))
            except VolumeError as error:
                if len(group) > 1:
                    groups = [[move] for move in group]
                    continue
                errors[group[0].record.key] = str(error)
                if isinstance(error, VolumeDown | VolumeTimeout):
                    errors |= {m.record.key: str(error) for rest in groups for m in rest}
                    break
        return errors

    async def _copy_large(self, move: Move) -> str:
        for source in move.sources:
            try:
                wrong = await self.stream(move.record, source, move.copy)
                if not wrong:
                    sidecar = {sidecar_path(move.record.path): encode_sidecar(move.record)}
                    await asyncio.gather(*(self.clients[volume].put(sidecar) for volume in move.copy))
                    return ""
            except VolumeError as error:
                if error.volume != source:
                    return str(error)
                wrong = str(error)
            self._note_bad(move, source, wrong)
        return "no good replica could be read"

    async def set_aside(self, volume: str, path: str) -> None:
        """Copy a file to /corrupt/ on its own volume; raises VolumeError."""
        client = self.clients[volume]
        async with client.read(self._session, path) as response:
            upload = await client.start_upload(f"/corrupt/{path.rpartition('/')[2]}", None)
            try:
                async for chunk in response.content.iter_chunked(SMALL_BLOB):
                    await upload.send(chunk)
                await upload.finish()
            finally:
                upload.abort()

    async def close(self) -> None:
        await self._store.index.write(lambda tx: release_claims(tx, time.time()))
        for getter in self.getters.values():
            getter.close()
