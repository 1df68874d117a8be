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
    version: Version,
    sidecars: Mapping[str, Record | str],
    garbage: Collection[str],
    was_record: Callable[[Record], bool],
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
            with self.client.watch("GET"):
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
        return {
            v: dict(zip(on[v], files, strict=True)) for v, files in zip(on, listings, strict=True) if files is not None
        }

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


def claim(tx: Transaction, move: Move) -> str:
    """Enter the copies that `move` will make in the garbage; return why it must not begin, if so."""
    record, path = move.record, move.record.path
    if tx.get(record.key) != record:
        return "changed"
    due = garbage_at(tx, path)
    if any(due[volume] < time.time() + CLAIMED_S for volume in move.copy if volume in due):
        return "waiting"  # the server may be deleting there just now
    set_record(tx, record, move.meanwhile)
    tx.settle_garbage([(volume, path) for volume in due if volume in move.copy], [])  # a dead run's claims
    tx.add_garbage(path, move.copy, CLAIM_S)
    return ""


def commit(tx: Transaction, move: Move, copied: bool, delay_s: float) -> str:
    """Move the record if nothing has come between, else leave the copies to the garbage; return why not, if so."""
    path = move.record.path
    due = garbage_at(tx, path)
    changed = tx.get(move.record.key) != move.meanwhile or any(
        due.get(v, 0) < time.time() + CLAIMED_S for v in move.copy
    )
    if changed or not copied:
        tx.settle_garbage([], [(volume, path, 0) for volume in move.copy])
        return "changed" if changed else "failed"
    set_record(tx, move.meanwhile, move.after)
    tx.settle_garbage([(volume, path) for volume in move.copy], [])
    tx.add_garbage(path, move.drop, delay_s)
    return ""


def release_claims(tx: Transaction) -> None:
    """Hand the claims of dead runs that nobody took over to the server's garbage collection."""
    rows = tx._db.execute("SELECT volume, path, 0 FROM garbage WHERE due > ?", (time.time() + CLAIMED_S,)).fetchall()
    tx.settle_garbage([], rows)


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
        index, delay_s = self._store.index, self._store.view.config.garbage_delay
        outcome = dict(
            zip([m.record.key for m in moves], await index.write(lambda tx: [claim(tx, m) for m in moves]), strict=True)
        )
        begun = [m for m in moves if not outcome[m.record.key]]
        failed = dict.fromkeys((m.record.key for m in begun), "interrupted")
        try:
            if begun and begun[0].record.size > SMALL_BLOB:
                failed = {m.record.key: await self._copy_large(m) for m in begun}
            else:
                failed = await self._copy_small(begun)
        finally:
            work = lambda tx: [commit(tx, m, not failed[m.record.key], delay_s) for m in begun]  # noqa: E731
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
                await client.put(files)
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
            if response.status == 404:
                return
            upload = await client.start_upload(f"/corrupt/{path.rpartition('/')[2]}", None)
            try:
                async for chunk in response.content.iter_chunked(SMALL_BLOB):
                    await upload.send(chunk)
                await upload.finish()
            finally:
                upload.abort()

    def close(self) -> None:
        for getter in self.getters.values():
            getter.close()


# == Running ==========================================================================================================
# What the tools have in common: volumes, store, report, progress.


class Report:
    """Counts cases by kind and keeps the first of each; all of them if told to."""

    FIRST = 10

    def __init__(self, keep_all: bool = False) -> None:
        self.counts: Counter[str] = Counter()
        self.cases: list[Case] = []
        self._keep_all = keep_all

    def add(self, case: Case) -> None:
        self.counts[case.kind] += 1
        if self._keep_all or self.counts[case.kind] <= self.FIRST:
            self.cases.append(case)

    def facts(self) -> dict[str, Any]:
        return {"found": dict(sorted(self.counts.items())), "cases": [asdict(case) for case in self.cases]}

    def lines(self) -> Iterator[str]:
        for kind, count in sorted(self.counts.items()):
            yield f"{count} x {kind}"
            first = [case for case in self.cases if case.kind == kind][: self.FIRST]
            yield from (f"  {str(case).partition(': ')[2]}" for case in first)
            if count > len(first):
                yield f"  and {count - len(first)} more"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a tool hands to the command line: an exit code, a summary for --json, and lines for people."""

    code: int = 0
    facts: Mapping[str, Any] = field(default_factory=dict)
    lines: Sequence[str] = ()


def show_bytes(size: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


class Progress:
    """Shows `text` (and the time left, from `done`, a share of the whole) on stderr while the block runs."""

    def __init__(self, text: Callable[[], str], done: Callable[[], float]) -> None:
        self._text, self._done, self._began = text, done, time.monotonic()
        self._live = sys.stderr.isatty()

    @property
    def elapsed_s(self) -> float:
        return max(1e-6, time.monotonic() - self._began)

    async def _show(self) -> None:
        while True:
            await asyncio.sleep(0.2 if self._live else 5)
            done = self._done()
            left = f", {self.elapsed_s * (1 - done) / done:.0f} s left" if done > 0 else ""
            line = f"{done:4.0%} {self._text()}{left}"
            print(
                f"\r\x1b[K{line}" if self._live else line, end="" if self._live else "\n", file=sys.stderr, flush=True
            )

    async def __aenter__(self) -> Progress:
        self._task = asyncio.create_task(self._show())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])
        if self._live:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


@contextlib.asynccontextmanager
async def open_volumes(config: Config) -> AsyncIterator[Config]:
    """Run the embedded volumes if none are configured (a server may do so too: they are only folders)."""
    if config.volumes:
        yield config
        return
    if not Path(config.data, "volume1").is_dir():
        raise ToolError(f"no volumes are configured, and there are no embedded ones in {config.data}")
    async with run_embedded(config) as config:
        yield config


def lock_alone(path: str, reason: str) -> int:
    try:
        return lock_file(path, exclusive=True)
    except BlockingIOError:
        raise ToolError(reason) from None


@contextlib.asynccontextmanager
async def open_store(config: Config, moving: bool = False) -> AsyncIterator[Store]:
    """Open volumes and index beside a server that may be running; `moving` replicas is for one tool at a time."""
    if not Path(config.db).is_file():
        raise ToolError(f"there is no index at {config.db} (rebuild makes one from the volumes)")
    async with open_volumes(config) as config:
        lock = lock_alone(f"{config.db}.tools", "another rebalance or verify --repair is running") if moving else None
        store = Store(config, leader=False)
        try:
            await store.start()
            yield store
        finally:
            await store.close()
            if lock is not None:
                os.close(lock)


@contextlib.asynccontextmanager
async def open_mover(store: Store, moving: bool, rate: float, note: Callable[[Case], None]) -> AsyncIterator[Mover]:
    async with ClientSession(connector=TCPConnector(limit=0), auto_decompress=False) as session:
        mover = Mover(store, session, Pace(rate), note)
        try:
            yield mover
        finally:
            mover.close()
            if moving:
                await store.index.write(release_claims)


async def read_pages(index: Index) -> AsyncIterator[list[Record]]:
    """Yield all records in the order of their keys, in pages."""
    after, query = "", f"SELECT {COLUMNS} FROM record WHERE key > ? ORDER BY key LIMIT 1000"
    while page := await index.read(lambda db: [record_of_row(row) for row in db.execute(query, (after,))]):
        yield page
        after = page[-1].key


def read_garbage(db: sqlite3.Connection, span: tuple[str, str]) -> list[tuple[str, str]]:
    """Return (volume, path) of the garbage in a range of paths."""
    return list(db.execute("SELECT volume, path FROM garbage WHERE path >= ? AND path < ?", span))


# == rebuild ==========================================================================================================


class OldIndex:
    """The index that is to be replaced, as far as it can be read."""

    def __init__(self, path: str) -> None:
        self.path, self._thread = path, SqliteThread(path, False)
        self.readable = False
        self.trouble = ""

    async def open(self) -> None:
        """Find out whether its garbage can be honoured; bring its write-ahead log into it."""
        if not Path(self.path).is_file():
            return
        try:
            version = await self._thread.run(lambda db: db.execute("PRAGMA user_version").fetchone()[0])
            await self._thread.run(prepare_index if version else lambda db: None)
            await self._thread.run(lambda db: db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall())
            check = await self._thread.run(lambda db: db.execute("PRAGMA quick_check(1)").fetchone()[0])
            self.readable = bool(version) and check == "ok"
            self.trouble = "" if self.readable else f"it is damaged: {check}" if version else "it is empty"
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError as error:
            self.trouble = str(error)

    async def read(self, query: Callable[[sqlite3.Connection], T], otherwise: T) -> T:
        return await self._thread.run(query) if self.readable else otherwise

    async def close(self) -> None:
        await self._thread.close()


def remove_index(path: str) -> None:
    for suffix in ("", "-wal", "-shm", "-journal", ".lock"):
        Path(path + suffix).unlink(missing_ok=True)


def keep_old_index(path: str, readable: bool) -> str:
    """Give the index a second, dated name, with its log if that could not be brought in; return that name."""
    stamp = time.strftime("%Y%m%dT%H%M%S")
    name = next(n for n in (f"{path}.{stamp}{'-' * bool(i)}{i or ''}" for i in range(1000)) if not Path(n).exists())
    for suffix in ("",) if readable else ("", "-wal"):
        if Path(path + suffix).exists():
            try:
                os.link(path + suffix, name + suffix)
            except OSError:  # a file system without hard links
                shutil.copy2(path + suffix, name + suffix)
    for suffix in ("-wal", "-shm"):  # the log of the old index must never be applied to the new one
        Path(path + suffix).unlink(missing_ok=True)
    sync_folder(Path(path).absolute().parent)
    return name


def add_all_garbage(rows: Iterable[tuple[str, str]], tx: Transaction) -> None:
    for volume, path in rows:
        tx.add_garbage(path, [volume])


class Rebuild:
    """Makes the new index of one store, folder by folder."""

    def __init__(self, getters: Mapping[str, Getter], old: OldIndex, new: Index, report: Report) -> None:
        self._getters, self._old, self._new, self._report = getters, old, new, report
        self.walk = Walk(getters, self._fail)
        self.keys = self.bytes = self.garbage = 0

    def _fail(self, volume: str, error: VolumeError) -> None:
        raise error

    async def check_volumes(self, allowed: Collection[str]) -> dict[str, list[str]]:
        """List the top of every volume; raise ToolError if one is there, but empty where the old index knows of blobs."""
        top = await self.walk.top()
        for name, (blobs, _) in (await self._old.read(read_totals, {})).items():
            if blobs > 0 and name not in (ALL_KEYS, GARBAGE, *allowed) and not top.get(name):
                state = "is empty" if name in top else "is not configured"
                raise ToolError(
                    f"volume {name} {state}, but the old index has {blobs} blobs there (--allow-missing {name})"
                )
        return top

    async def carry_garbage(self) -> None:
        """Take the old index's garbage over, due at once: nobody is reading."""
        query = "SELECT path, volume FROM garbage WHERE (path, volume) > (?, ?) ORDER BY path, volume LIMIT 10000"
        after: tuple[str, str] = ("", "")
        while rows := await self._old.read(lambda db: list(db.execute(query, after)), []):
            await self._new.write(partial(add_all_garbage, [(volume, path) for path, volume in rows]))
            after = rows[-1]

    async def run(self, top: Mapping[str, Sequence[str]]) -> None:
        async def jobs() -> AsyncIterator[Awaitable[list[tuple[Verdict, list[tuple[str, str]]]]]]:
            async for run in self.walk.runs(top):
                yield self._merge(run)

        results: list[tuple[Verdict, list[tuple[str, str]]]] = []
        writing: asyncio.Future[None] | None = None
        async for merged in ahead(jobs(), AHEAD):
            results += merged
            if len(results) >= 1000 and (writing is None or writing.done()):
                if writing:
                    writing.result()
                writing, results = self._new.write(partial(self._write, results)), []
        if writing:
            await writing
        await self._new.write(partial(self._write, results))

    def _write(self, results: list[tuple[Verdict, list[tuple[str, str]]]], tx: Transaction) -> None:
        for verdict, garbage in results:
            if verdict.record:
                tx.insert(verdict.record)
                self.keys += 1
                self.bytes += verdict.record.size
                tx.settle_garbage([(volume, verdict.record.path) for volume in verdict.revived], [])
            for volume, path in garbage:
                tx.add_garbage(path, [volume])
            self.garbage += len(garbage)

    async def _merge(self, run: Folders) -> list[tuple[Verdict, list[tuple[str, str]]]]:
        """Decide on all keys of a run: of each a verdict with a record, or none, and (volume, path) that are garbage."""
        found = await self.walk.list_run(run)
        versions, foreign = group_files(found)
        garbage: dict[str, set[str]] = defaultdict(set)
        for volume, path in await self._old.read(lambda db: read_garbage(db, run.span), []):
            garbage[path[:STEM]].add(volume)
        for case in foreign:
            self._report.add(case)
        left = order_versions(versions.values())
        results = []
        while left:
            verdicts = await self._judge([queue[0] for queue in left.values()], garbage)
            for queue, verdict in zip(list(left.values()), verdicts, strict=True):
                for case in verdict.cases:
                    self._report.add(case)
                version = queue.pop(0)
                dead = list_files([version]) if verdict.dead else []
                if verdict.record:
                    dead = list_files(older for older in queue if older.sidecars)
                    self._note_unfinished(version for version in queue if not version.sidecars)
                    queue.clear()
                results.append((verdict, dead))
            left = {h: queue for h, queue in left.items() if queue}
        return results

    def _note_unfinished(self, versions: Iterable[Version]) -> None:
        for version in versions:
            for volume, path in list_files([version]):
                self._report.add(Case(kind="blob without sidecar", volume=volume, path=path))

    async def _judge(self, versions: Sequence[Version], garbage: Mapping[str, set[str]]) -> list[Verdict]:
        """Read one sidecar of each version; all of them if it is bad or another has a different size."""
        readings: dict[str, dict[str, Record | str]] = {v.stem: {} for v in versions}
        for rest in (False, True):
            wanted = []
            for v in versions:
                names = sorted(v.sidecars, key=lambda name: (name not in v.blobs, name))
                turn = int(v.stem[-4:], 16) % max(1, len(v.blobs.keys() & v.sidecars.keys()))
                done = readings[v.stem]
                sizes = {size for size, _ in v.sidecars.values()}
                if not rest:
                    wanted += [(name, v) for name in names[turn : turn + 1]]
                elif len(sizes) > 1 or any(isinstance(one, str) for one in done.values()):
                    wanted += [(name, v) for name in names if name not in done]
            for name, v in [(n, v) for n, v in wanted if v.sidecars[n][0] > SIDECAR_BYTES]:
                readings[v.stem][name] = "it is too large"
                wanted.remove((name, v))
            results = await read_sidecars(self._getters, [(name, f"{v.stem}.key") for name, v in wanted])
            for (name, v), result in zip(wanted, results, strict=True):
                readings[v.stem][name] = result
        keys = [
            r.key for v in versions if v.stem in garbage for r in readings[v.stem].values() if isinstance(r, Record)
        ]
        old = (
            {r.key: r for r in await self._old.read(partial(get_all, keys), []) if isinstance(r, Record)}
            if keys
            else {}
        )
        was_record = lambda record: record.key in old and old[record.key].version == record.version  # noqa: E731
        self._note_unfinished(
            replace(v, blobs={name: files for name, files in v.blobs.items() if name not in v.sidecars}, sidecars={})
            for v in versions
        )
        return [judge_version(v, readings[v.stem], garbage.get(v.stem, ()), was_record) for v in versions]


def list_files(versions: Iterable[Version]) -> list[tuple[str, str]]:
    """Return (volume, path) of every blob of `versions`, and of every sidecar without one."""
    return [(volume, path) for v in versions for volume in v.volumes for path in v.blobs.get(volume, [v.stem])]


def check_new_index(db: sqlite3.Connection, keys: int, size: int) -> None:
    """Raise ToolError unless the new index is sound and holds what was read."""
    soundness = db.execute("PRAGMA integrity_check(1)").fetchone()[0]
    rows = tuple(db.execute("SELECT count(*), coalesce(sum(size), 0) FROM record").fetchone())
    if soundness != "ok" or not (rows == (keys, size) == read_totals(db).get(ALL_KEYS, (0, 0))):
        raise ToolError(f"the new index is not what was read ({soundness}, {rows}); the old one stays")


async def rebuild(config: Config, options: argparse.Namespace) -> Outcome:
    """Make a new index from the volumes and swap it in, or change nothing."""
    Path(config.db).parent.mkdir(parents=True, exist_ok=True)
    report, fresh = Report(options.json), f"{config.db}.new"
    lock = lock_alone(f"{config.db}.lock", f"{config.db} is in use by a server or a tool: stop it first")
    old, new = OldIndex(config.db), Index(fresh)
    getters: dict[str, Getter] = {}
    try:
        await old.open()
        remove_index(fresh)
        await new.open()
        async with open_volumes(config) as config:
            clients = Store(config, leader=False).view.clients
            if unknown := set(options.allow_missing) - clients.keys() - (await old.read(read_totals, {})).keys():
                raise ToolError(f"--allow-missing: there is no volume {', '.join(sorted(unknown))}")
            getters |= {name: Getter(client) for name, client in clients.items() if name not in options.allow_missing}
            work = Rebuild(getters, old, new, report)
            progress = Progress(lambda: f"{work.keys} keys, {show_bytes(work.bytes)}", lambda: work.walk.done)
            async with progress:
                top = await work.check_volumes(options.allow_missing)
                await work.carry_garbage()
                await work.run(top)
        for case in work.walk.foreign:
            report.add(case)
        if report.counts["contradicting sidecars"]:
            return Outcome(
                code=1,
                facts={"done": False, **report.facts()},
                lines=["nothing was changed: of contradicting sidecars, move the wrong ones away", *report.lines()],
            )
        await new.read(lambda db: check_new_index(db, work.keys, work.bytes))
        await new.close()
        await old.close()
        kept = keep_old_index(config.db, not old.trouble) if Path(config.db).is_file() else ""
        os.replace(fresh, config.db)
        sync_folder(Path(config.db).absolute().parent)
    finally:
        for getter in getters.values():
            getter.close()
        await new.close()
        await old.close()
        remove_index(fresh)
        os.close(lock)
    seconds = progress.elapsed_s
    facts = {
        "done": True,
        "keys": work.keys,
        "bytes": work.bytes,
        "garbage": work.garbage,
        "seconds": round(seconds, 3),
    }
    lines = [
        f"{config.db} rebuilt: {work.keys} keys, {show_bytes(work.bytes)}, {work.keys / seconds:.0f} keys a second"
    ]
    if kept:
        lines.append(f"the old index is {kept}")
    if old.trouble:
        lines.append(f"its garbage could not be honoured ({old.trouble}): what was deleted of late may be back")
    return Outcome(
        facts=facts | {"old_index": kept, "trouble": old.trouble} | report.facts(), lines=[*lines, *report.lines()]
    )


# == rebalance ========================================================================================================

GARBAGE_PATIENCE_S = 15.0  # beyond garbage_delay: how long the server may take to delete what is in the way


class Rebalance:
    """Brings every key to where the ring says."""

    def __init__(self, store: Store, mover: Mover | None, concurrency: int) -> None:
        self._store, self._mover, self._concurrency = store, mover, concurrency
        self.keys = self.checked = self.moved = self.changed = self.dropped = 0
        self.pairs: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
        self.left: Counter[str] = Counter()

    @property
    def waiting(self) -> int:
        return self.left["garbage waits there"]

    async def one_pass(self) -> None:
        """Plan, and unless this is a dry run move, every key once."""
        self.left.clear()
        totals = await self._store.index.read(read_totals)
        self.keys, self.checked = totals.get(ALL_KEYS, (0, 0))[0], 0
        async for _ in ahead(self._jobs(), self._concurrency):
            pass

    async def _jobs(self) -> AsyncIterator[Awaitable[None]]:
        view, states = self._store.view, self._store.health.states
        pending: list[Move] = []
        async for page in read_pages(self._store.index):
            self.checked += len(page)
            for record in page:
                move = plan_move(record, view.ring.place(record.key, view.config.replicas), states)
                if move and move.left:
                    self.left[move.left] += 1
                elif move:
                    pending.append(move)
            *whole, pending = plan_batches(pending, lambda m: m.record.size) or [[]]
            for batch in whole:
                yield self._do(batch)
        if pending:
            yield self._do(pending)

    async def _do(self, batch: Sequence[Move]) -> None:
        outcome = await self._mover.move(batch) if self._mover else {}
        for move in batch:
            why = outcome.get(move.record.key, "")
            if not why:
                self._count(move)
            elif why == "changed":  # by a client, whose write goes where the ring says
                self.changed += 1
            else:
                self.left["garbage waits there" if why == "waiting" else why] += 1

    def _count(self, move: Move) -> None:
        self.moved += 1
        self.dropped += len(move.drop)
        for target in move.copy:
            pair = self.pairs[move.sources[0], target]
            pair[0] += 1
            pair[1] += move.record.size

    def facts(self) -> dict[str, Any]:
        pairs = [{"from": a, "to": b, "replicas": n, "bytes": size} for (a, b), (n, size) in sorted(self.pairs.items())]
        replicas, size = (sum(pair[i] for pair in self.pairs.values()) for i in (0, 1))
        counts = {"keys": self.keys, "moved": self.moved, "replicas": replicas, "bytes": size, "dropped": self.dropped}
        return counts | {
            "changed": self.changed,
            "left": self.left.total(),
            "why_left": dict(self.left),
            "pairs": pairs,
        }


async def run_passes(work: Rebalance, patience_s: float) -> None:
    """Go over the keys until none is left, or none of those left can be moved; garbage in the way gets some time."""
    least, since = math.inf, time.monotonic()
    while True:
        moved = work.moved
        await work.one_pass()
        if work.waiting < least:
            least, since = work.waiting, time.monotonic()
        if not work.left or (work.moved == moved and not work.waiting) or time.monotonic() - since > patience_s:
            return
        await asyncio.sleep(1)


async def rebalance(config: Config, options: argparse.Namespace) -> Outcome:
    """Move and copy replicas until every key is where the ring says, beside a running server; or say what that takes."""
    report = Report(options.json)
    async with open_store(config, moving=not options.dry_run) as store, contextlib.AsyncExitStack() as stack:
        mover = None
        if not options.dry_run:
            mover = await stack.enter_async_context(open_mover(store, True, options.limit_rate * 1e6, report.add))
        work = Rebalance(store, mover, options.concurrency)
        progress = Progress(
            lambda: (
                f"{work.moved} keys moved, {show_bytes(mover.bytes if mover else 0)}, {work.left.total()} left, "
                f"{show_bytes((mover.bytes if mover else 0) / progress.elapsed_s)}/s"
            ),
            lambda: work.checked / max(1, work.keys),
        )
        async with progress:
            if mover:
                await run_passes(work, min(config.garbage_delay, 60) + GARBAGE_PATIENCE_S)
            else:
                await work.one_pass()
    facts, seconds = work.facts(), progress.elapsed_s
    verb = "to move" if options.dry_run else "moved"
    lines = [
        f"{facts['from']} -> {facts['to']}: {facts['replicas']} replicas, {show_bytes(facts['bytes'])}"
        for facts in facts["pairs"]
    ]
    lines.append(
        f"{work.keys} keys, {work.moved} {verb}: {facts['replicas']} replicas copied, {show_bytes(facts['bytes'])}, "
        f"{work.dropped} dropped"
        + (f"; {work.moved / seconds:.0f} keys and {show_bytes(facts['bytes'] / seconds)} a second" if mover else "")
    )
    lines += [f"left {count}: {why}" for why, count in work.left.items()]
    code = 1 if work.left else 0
    facts = {"dry_run": options.dry_run} | facts | {"seconds": round(seconds, 3)} | report.facts()
    return Outcome(code=code, facts=facts, lines=[*lines, *report.lines()])


# == verify ===========================================================================================================

SCRATCH = """CREATE TABLE want (path TEXT PRIMARY KEY, key TEXT NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE stray (volume TEXT NOT NULL, path TEXT NOT NULL, kind TEXT NOT NULL) STRICT"""
HARMLESS = ("foreign file", "nginx leftover")  # reported; no reason for exit code 1


class Verify:
    """Compares the index with the volumes, and with --repair makes them agree."""

    def __init__(
        self, store: Store, mover: Mover, scratch: SqliteThread, report: Report, options: argparse.Namespace
    ) -> None:
        self._store, self._mover, self._scratch, self._report = store, mover, scratch, report
        self._deep, self._repair = options.deep, options.repair
        self._before_s = time.time() - options.grace
        self.walk = Walk(mover.getters, self._fail)
        self.failed: dict[str, VolumeError] = {}
        self.keys = self.replicas = self.young = self.restored = self.removed = 0

    def _fail(self, volume: str, error: VolumeError) -> None:
        self.failed.setdefault(volume, error)

    async def run(self) -> None:
        await self._scratch.run(
            lambda db: [db.execute(one) for one in ("PRAGMA synchronous = OFF", *SCRATCH.split(";"))]
        )
        async for page in read_pages(self._store.index):
            rows = [(record.path, record.key) for record in page]
            await self._scratch.run(lambda db: write_rows(db, "INSERT INTO want VALUES (?, ?)", rows))
        async for _ in ahead(self._jobs(await self.walk.top()), AHEAD):
            pass
        for case in self.walk.foreign:
            self._report.add(case)
        for volume, error in self.failed.items():
            self._report.add(Case(kind="failed listing", volume=volume, detail=str(error)))
        if self._repair and not self.failed:
            await self._remove_strays()

    async def _jobs(self, top: Mapping[str, Sequence[str]]) -> AsyncIterator[Awaitable[None]]:
        async def wanted(first: str) -> set[str]:
            query = "SELECT DISTINCT substr(path, 1, 7) FROM want WHERE path >= ? AND path < ?"
            return {
                row[0]
                for row in await self._scratch.run(lambda db: list(db.execute(query, (first, after_prefix(first)))))
            }

        async for run in self.walk.runs(top, wanted):
            yield self._compare(run)

    async def _compare(self, run: Folders) -> None:
        """Check one run of folders. The garbage is looked at before and after: what was deleted meanwhile is no stray."""
        garbage = set(await self._store.index.read(lambda db: read_garbage(db, run.span)))
        found = await self.walk.list_run(run)
        listed = self._mover.clients.keys() - self.failed.keys()
        query = "SELECT path, key FROM want WHERE path >= ? AND path < ?"
        wanted = await self._scratch.run(lambda db: list(db.execute(query, run.span)))
        keys = [key for _, key in wanted]
        current = await self._store.index.read(partial(get_all, keys))
        garbage |= set(await self._store.index.read(lambda db: read_garbage(db, run.span)))
        versions, foreign = group_files(found)
        for case in foreign:
            self._report.add(case)
        records = {
            r.path[:STEM]: r
            for (path, _), r in zip(wanted, current, strict=True)
            if isinstance(r, Record) and r.path == path
        }
        await self._check(records, versions, listed)
        stems = {(volume, path[:STEM]) for volume, path in garbage}
        strays, young = find_strays(versions.values(), records, stems, self._before_s)
        self.young += young
        await self._note_strays(strays)

    async def _check(
        self, records: Mapping[str, Record], versions: Mapping[str, Version], listed: Collection[str]
    ) -> None:
        """Find what is wrong with the replicas of `records`; note it, or repair it."""
        self.keys += len(records)
        self.replicas += sum(len(record.volumes) for record in records.values())
        faults: dict[str, dict[str, str]] = {}
        for stem, record in records.items():
            version = versions.get(stem) or Version(stem)
            faults[stem] = check_replicas(record, version, listed)
            if unknown := set(record.volumes) - self._mover.clients.keys():
                faults[stem] |= dict.fromkeys(unknown, "not configured")
        await self._check_sidecars(records, versions, listed, faults)
        if self._deep:
            wanted = [
                (v, r)
                for stem, r in records.items()
                for v in r.volumes
                if v in listed and faults[stem].get(v) in (None, "missing sidecar", "bad sidecar")
            ]
            for (volume, record), wrong in zip(wanted, await self._mover.check(wanted), strict=True):
                if wrong:
                    faults[record.path[:STEM]][volume] = (
                        wrong if wrong in ("missing", "corrupt") else f"unreadable: {wrong}"
                    )
        faulty = [records[stem] for stem, wrong in faults.items() if wrong]
        for record, now in zip(
            faulty, await asyncio.gather(*(self._store.index.get(r.key) for r in faulty)), strict=True
        ):
            if now == record:  # else a client, or a repair, came between
                await self._settle(record, faults[record.path[:STEM]])

    async def _check_sidecars(
        self,
        records: Mapping[str, Record],
        versions: Mapping[str, Version],
        listed: Collection[str],
        faults: dict[str, dict[str, str]],
    ) -> None:
        """Read the sidecars whose size is not what it would be today, with --deep all; note the bad ones."""
        wanted = []
        for stem, record in records.items():
            size = len(encode_sidecar(record))
            for volume in record.volumes:
                if volume in listed and volume not in faults[stem]:
                    there = versions[stem].sidecars[volume][0]
                    if there > SIDECAR_BYTES:
                        faults[stem][volume] = "bad sidecar"
                    elif self._deep or there != size:
                        wanted.append((volume, record))
        try:
            results = await read_sidecars(self._mover.getters, [(volume, sidecar_path(r.path)) for volume, r in wanted])
        except VolumeError as error:
            return self._fail(error.volume, error)
        for (volume, record), result in zip(wanted, results, strict=True):
            if isinstance(result, str) or replace(result, volumes=record.volumes) != record:
                faults[record.path[:STEM]][volume] = "bad sidecar"

    async def _settle(self, record: Record, faults: Mapping[str, str]) -> None:
        """Repair one record if told to; note each fault, and whether it is repaired."""
        repaired = await self._restore(record, faults) if self._repair else set()
        for volume, wrong in faults.items():
            kind, _, detail = wrong.partition(": ")
            if volume in repaired:
                self.restored += 1
                detail = "repaired"
            self._report.add(Case(kind=kind, volume=volume, path=record.path, key=record.key, detail=detail))
        if not set(record.volumes) - {v for v, wrong in faults.items() if not wrong.endswith("sidecar")} - repaired:
            self._report.add(Case(kind="no good replica", path=record.path, key=record.key))

    async def _restore(self, record: Record, faults: Mapping[str, str]) -> set[str]:
        """Make replicas good again from a good one; return the volumes where that succeeded."""
        states = self._store.health.states
        unmarked = [v for v, wrong in faults.items() if wrong.endswith("sidecar")]
        bad = [
            v for v, wrong in faults.items() if wrong in ("missing", "corrupt", "wrong size") and states[v] is State.UP
        ]
        sources = [v for v in record.volumes if v not in faults or v in unmarked]
        checked = await self._mover.check([(v, record) for v in unmarked])
        good = {v for v, wrong in zip(unmarked, checked, strict=True) if not wrong}
        repaired = {volume for volume in good if await self._mark(record, volume)}
        try:
            for volume in [v for v in bad if faults[v] != "missing"]:
                await self._mover.set_aside(volume, record.path)
        except VolumeError as error:
            self._report.add(Case(kind="not set aside", volume=error.volume, path=record.path, detail=str(error)))
            return repaired
        if bad and sources:
            keep = tuple(v for v in record.volumes if v not in bad)
            move = Move(record=record, sources=tuple(sources), keep=keep, copy=tuple(bad))
            if not (await self._mover.move([move]))[record.key]:
                repaired |= set(bad)
        return repaired

    async def _mark(self, record: Record, volume: str) -> bool:
        """Write the sidecar beside a blob that is good; take it back if the key was deleted meanwhile."""
        try:
            await self._mover.clients[volume].put({sidecar_path(record.path): encode_sidecar(record)})
        except VolumeError:
            return False
        return await self._store.index.write(lambda tx: remove_stray(tx, record.key, record.path, volume) == "")

    async def _note_strays(self, strays: Sequence[Stray]) -> None:
        wanted = [(stray.volume, f"{stray.stem}.key") for stray in strays if stray.sidecar]
        try:
            results = iter(await read_sidecars(self._mover.getters, wanted))
        except VolumeError as error:
            return self._fail(error.volume, error)
        rows = []
        for stray in strays:
            sidecar = next(results) if stray.sidecar else ""
            key = sidecar.key if isinstance(sidecar, Record) else ""
            record = await self._store.index.get(key) if key else None
            if record and record.path[:STEM] == stray.stem and stray.volume in record.volumes:
                continue  # written since the records were noted
            kind = name_stray(stray, key, record)
            rows += [(stray.volume, path, kind) for path in stray.paths]
            for path in stray.paths:
                self._report.add(Case(kind=kind, volume=stray.volume, path=path, key=key))
        if rows:
            await self._scratch.run(lambda db: write_rows(db, "INSERT INTO stray VALUES (?, ?, ?)", rows))

    async def _remove_strays(self) -> None:
        """Put the strays in the garbage. Each one's sidecar is read again, and its key's record in the transaction."""
        after = 0
        while rows := await self._scratch.run(
            lambda db: list(
                db.execute("SELECT rowid, volume, path FROM stray WHERE rowid > ? ORDER BY rowid LIMIT 500", (after,))
            )
        ):
            sidecars = await read_sidecars(
                self._mover.getters, [(volume, sidecar_path(path)) for _, volume, path in rows]
            )
            now = time.time()
            strays = [
                (s.key if isinstance(s, Record) else "", path, volume)
                for (_, volume, path), s in zip(rows, sidecars, strict=True)
            ]
            self.removed += sum(
                await self._store.index.write(lambda tx: [bool(remove_stray(tx, *stray)) for stray in strays])
            )
            after = rows[-1][0]


def write_rows(db: sqlite3.Connection, query: str, rows: Iterable[tuple[str, ...]]) -> None:
    with db:
        db.execute("BEGIN")
        db.executemany(query, rows)


def remove_stray(tx: Transaction, key: str, path: str, volume: str) -> str:
    """Put `path` on `volume` in the garbage unless the record of `key` is it; return why, "" if it stays."""
    current = tx.get(key) if key else None
    if current and current.path[:STEM] == path[:STEM] and volume in current.volumes:
        return ""
    tx.add_garbage(path, [volume])
    return "no record names it"


async def verify(config: Config, options: argparse.Namespace) -> Outcome:
    """Check every replica of every record, and every file on every volume; with --repair, restore and clean up."""
    report, scratch_file = Report(options.json), f"{config.db}.verify"
    async with open_store(config, moving=options.repair) as store:
        async with open_mover(store, options.repair, options.limit_rate * 1e6, report.add) as mover:
            remove_index(scratch_file)
            scratch = SqliteThread(scratch_file, False)
            work = Verify(store, mover, scratch, report, options)
            progress = Progress(
                lambda: f"{work.keys} keys, {work.replicas} replicas, {show_bytes(mover.bytes)} read",
                lambda: work.walk.done,
            )
            try:
                async with progress:
                    await work.run()
            finally:
                await scratch.close()
                remove_index(scratch_file)
    wrong = sum(count for kind, count in report.counts.items() if kind not in HARMLESS) - work.restored - work.removed
    facts = {"keys": work.keys, "replicas": work.replicas, "bytes_read": mover.bytes, "young": work.young, "restored": work.restored,
             "removed": work.removed, "left": wrong, "seconds": round(progress.elapsed_s, 3)}  # fmt: skip
    lines = [
        f"{work.keys} keys, {work.replicas} replicas checked, {show_bytes(mover.bytes)} read; {work.restored} restored, {work.removed} removed, {wrong} left"
    ]
    if work.young:
        lines.append(f"{work.young} that no record names are younger than --grace: they may be writes under way")
    return Outcome(code=1 if wrong else 0, facts=facts | report.facts(), lines=[*report.lines(), *lines])


# == status, backup, token ============================================================================================


def share_ideally(volumes: Sequence[Volume], replicas: int, keys: int = 10000) -> dict[str, float]:
    """Return the share of all replicas that the ring gives each volume, from a sample of keys."""
    ring = Ring(volumes)
    counts = Counter(name for i in range(keys) for name in ring.place(f"sample {i}", replicas))
    return {v.name: counts[v.name] / max(1, counts.total()) for v in volumes}


async def fetch_status(url: str, token: str) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        async with ClientSession(timeout=ClientTimeout(total=30), headers=headers) as session:
            async with session.get(f"{url.rstrip('/')}/-/status") as response:
                if response.status != 200:
                    raise ToolError(f"{url}/-/status was answered {response.status}: {(await response.text())[:200]}")
                return dict(await response.json())
    except (ClientError, TimeoutError, ValueError) as error:
        raise ToolError(f"{url}: {error or type(error).__name__}") from None


async def status(config: Config, options: argparse.Namespace) -> Outcome:
    """Show volumes and totals, from a running server or from the index and the volumes."""
    if options.url:
        facts = await fetch_status(options.url, options.token)
    else:
        async with open_store(config) as store:
            facts = await store.status()
    known = [Volume(name=v["name"], url=v["url"], weight=v["weight"], zone=v["zone"]) for v in facts["volumes"]]
    ideal = share_ideally(known, config.replicas)
    blobs = max(1, sum(v["blobs"] for v in facts["volumes"]))
    lines = [f"{'volume':20} {'state':9} {'blobs':>10} {'bytes':>10} {'share':>7} {'ideal':>7}"]
    for v in facts["volumes"]:
        v |= {"share": round(v["blobs"] / blobs, 4), "ideal": round(ideal[v["name"]], 4)}
        shown = show_bytes(v["bytes"])
        lines.append(f"{v['name']:20} {v['state']:9} {v['blobs']:10} {shown:>10} {v['share']:7.1%} {v['ideal']:7.1%}")
    lines.append(f"{facts['keys']} keys, {show_bytes(facts['bytes'])}; {facts['garbage']} replicas wait to be deleted")
    return Outcome(code=0 if all(v["state"] == "up" for v in facts["volumes"]) else 1, facts=facts, lines=lines)


def copy_index(target: str, db: sqlite3.Connection) -> int:
    """Copy the index as it is at this moment to `target`, checked; return its number of keys."""
    copy = sqlite3.connect(target)
    try:
        db.backup(copy)  # in one step: one snapshot, and writers go on
        copy.execute("PRAGMA journal_mode = DELETE")
        if (soundness := copy.execute("PRAGMA integrity_check(1)").fetchone()[0]) != "ok":
            raise ToolError(f"the copy is damaged, and so is the index: {soundness}")
        return int(copy.execute("SELECT count(*) FROM record").fetchone()[0])
    finally:
        copy.close()


async def backup(config: Config, options: argparse.Namespace) -> Outcome:
    """Copy the index to a file while the server runs; the file appears whole or not at all."""
    if not Path(config.db).is_file():
        raise ToolError(f"there is no index at {config.db}")
    part, index = f"{options.file}.tmp", Index(config.db)
    remove_index(part)
    await index.open()
    try:
        keys = await index.read(partial(copy_index, part))
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.replace(part, options.file)
        sync_folder(Path(options.file).absolute().parent)
    finally:
        await index.close()
        remove_index(part)
    size = Path(options.file).stat().st_size
    facts = {"file": options.file, "keys": keys, "bytes": size}
    return Outcome(facts=facts, lines=[f"{options.file}: {keys} keys, {show_bytes(size)}"])


async def token(config: Config, options: argparse.Namespace) -> Outcome:
    """Make a token: print its secret, which is kept nowhere, and the table for the configuration."""
    secret = secrets.token_urlsafe(32)
    allow = tuple(one for part in options.allow for one in part.replace(",", " ").split())
    made = Token(
        name=options.name, sha256=hashlib.sha256(secret.encode()).hexdigest(), allow=allow, prefix=options.prefix
    )
    quote = lambda text: json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")  # noqa: E731
    lines = [
        secret,
        "",
        "[[token]]",
        f"name = {quote(made.name)}",
        f'sha256 = "{made.sha256}"',
        f"allow = {json.dumps(allow)}",
    ]
    if made.prefix:
        lines.append(f"prefix = {quote(made.prefix)}")
    return Outcome(facts={"secret": secret, "token": asdict(made)}, lines=lines)


# == bench ============================================================================================================


class Latencies:
    """Counts of latencies in steps of 2 %, so that memory is bounded."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()

    def add(self, seconds: float) -> None:
        self._counts[round(math.log(max(seconds, 1e-6)) / math.log(1.02))] += 1

    def quantile_ms(self, q: float) -> float:
        rank, seen = q * self._counts.total(), 0
        for step in sorted(self._counts):
            seen += self._counts[step]
            if seen >= rank:
                return round(1000 * 1.02**step, 3)
        return 0.0


class Bench:
    """One run against one server: phases of equal requests, `concurrency` at a time."""

    def __init__(self, session: ClientSession, url: str, options: argparse.Namespace) -> None:
        self._session, self._base, self._options = (
            session,
            f"{url.rstrip('/')}/mkv-bench-{secrets.token_hex(4)}/",
            options,
        )
        self._noise = random.randbytes(options.size)
        self.written = self.done = 0
        self.phase = ""

    def _body(self, number: int) -> bytes:
        return (number.to_bytes(8) + self._noise[8:])[: self._options.size]

    async def _request(self, method: str, number: int) -> str:
        """Make one request; return what is wrong with its answer, or ""."""
        data = self._body(number) if method == "PUT" else None
        try:
            async with self._session.request(
                method, f"{self._base}{number}", data=data, allow_redirects=method == "GET"
            ) as response:
                body = await response.read()
        except (ClientError, TimeoutError, OSError) as error:
            return type(error).__name__
        if response.status not in {"PUT": (201, 204), "DELETE": (204,)}.get(method, (200,)):
            return f"status {response.status}"
        return "wrong bytes" if method == "GET" and body != self._body(number) else ""

    async def run(self, method: str) -> dict[str, Any]:
        """Run one phase: --count requests, or as many as --duration allows; DELETE removes all that was written."""
        options, latencies, errors = self._options, Latencies(), Counter[str]()
        self.phase, self.done, began = method, 0, time.perf_counter()
        count = options.count if method == "PUT" else self.written
        timed = bool(options.duration) and method != "DELETE"

        async def work() -> None:
            while (time.perf_counter() - began < options.duration) if timed else self.done < count:
                number = self.done if method == "PUT" or not timed else self.done % max(1, self.written)
                self.done += 1
                if method == "PUT":
                    self.written = self.done  # also if it fails: it may have been written
                sent = time.perf_counter()
                if wrong := await self._request(method, number):
                    errors[wrong] += 1
                latencies.add(time.perf_counter() - sent)

        async with asyncio.TaskGroup() as group:
            for _ in range(options.concurrency):
                group.create_task(work())
        seconds = max(1e-6, time.perf_counter() - began)
        facts: dict[str, Any] = {
            "requests": self.done,
            "seconds": round(seconds, 3),
            "per_second": round(self.done / seconds, 1),
        }
        facts |= {
            "mb_per_second": round(self.done * options.size / seconds / 1e6, 2) if method in ("PUT", "GET") else 0.0
        }
        facts |= {f"p{q:g}_ms": latencies.quantile_ms(q / 100) for q in (50, 90, 99, 99.9)}
        return facts | {"errors": errors.total(), "why": dict(errors)}


async def bench(config: Config, options: argparse.Namespace) -> Outcome:
    """Measure PUT, GET (redirect followed, bytes verified), HEAD and DELETE; remove what was written, whatever happens."""
    headers = {"Authorization": f"Bearer {options.token}"} if options.token else {}
    results: dict[str, dict[str, Any]] = {}
    connector = TCPConnector(limit=0)
    async with ClientSession(
        connector=connector, headers=headers, timeout=ClientTimeout(total=60), auto_decompress=False
    ) as session:
        work = Bench(session, options.url, options)
        async with Progress(lambda: f"{work.phase} {work.done}", lambda: len(results) / 4):
            try:
                for method in ("PUT", "GET", "HEAD"):
                    results[method] = await work.run(method)
            finally:
                results["DELETE"] = await work.run("DELETE")
    lines = [f"{options.size} bytes, {options.concurrency} at a time"]
    lines.append(
        f"{'':6} {'requests':>9} {'a second':>9} {'MB/s':>8} {'p50 ms':>8} {'p90 ms':>8} {'p99 ms':>8} {'p99.9 ms':>8} {'errors':>7}"
    )
    for method, r in results.items():
        lines.append(
            f"{method:6} {r['requests']:9} {r['per_second']:9} {r['mb_per_second']:8} {r['p50_ms']:8} {r['p90_ms']:8} "
            f"{r['p99_ms']:8} {r['p99.9_ms']:8} {r['errors']:7}"
        )
    lines += [f"{method}: {count} x {why}" for method, r in results.items() for why, count in r["why"].items()]
    code = 1 if any(r["errors"] for r in results.values()) else 0
    return Outcome(code=code, facts={"size": options.size, "concurrency": options.concurrency, **results}, lines=lines)


# == Command line =====================================================================================================

SETTINGS = ("db", "data", "volumes", "replicas", "volume_timeout")
TOOLS: Mapping[str, Callable[[Config, argparse.Namespace], Awaitable[Outcome]]] = {
    "rebuild": rebuild, "rebalance": rebalance, "verify": verify, "status": status,
    "bench": bench, "backup": backup, "token": token,
}  # fmt: skip


def number(kind: type[T], low: float) -> Callable[[str], T]:
    def parse(text: str) -> T:
        value: Any = kind(text)  # type: ignore[call-arg]
        if not low <= value < math.inf:
            raise argparse.ArgumentTypeError(f"must be at least {low}, not {text}")
        return value  # type: ignore[no-any-return]

    parse.__name__ = kind.__name__
    return parse


def make_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(prog="mkv_tools.py", description="The operator's tools for mkv.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="|".join(TOOLS))

    def add(name: str, help: str, more: str = "") -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help, description=f"{help}. {more}")
        if name != "token":
            add_settings(command, SETTINGS)
        command.add_argument("--json", action="store_true", help="print one JSON object on stdout")
        return command

    def add_rate(command: argparse.ArgumentParser) -> None:
        command.add_argument(
            "--limit-rate",
            metavar="MB/S",
            type=number(float, 0),
            default=0.0,
            help="read or copy no faster (default: no limit)",
        )

    one = add(
        "rebuild",
        "make the index anew from the volumes; the server must not run",
        "The old index stays as INDEX.<date>. If it can be read, its garbage is honoured: what was deleted stays deleted; without it "
        "the sidecars alone decide. Any volume that cannot be read in full means exit 1 and nothing changed.",
    )
    one.add_argument(
        "--allow-missing", metavar="NAME", action="append", default=[], help="do without this volume; may be repeated"
    )
    one = add("rebalance", "bring every key to the volumes where the ring says, while the server runs")
    one.add_argument("--dry-run", action="store_true", help="print what would be moved, and move nothing")
    one.add_argument(
        "--concurrency",
        metavar="N",
        type=number(int, 1),
        default=4,
        help="batches of blobs under way at once (default: 4)",
    )
    add_rate(one)
    one = add(
        "verify",
        "compare index and volumes, while the server runs",
        "After restoring a backup of the index run rebuild first.",
    )
    one.add_argument("--deep", action="store_true", help="read every replica and check its digest")
    one.add_argument(
        "--repair", action="store_true", help="restore bad replicas from good ones; remove what no record names"
    )
    one.add_argument(
        "--grace",
        metavar="S",
        type=number(float, 0),
        default=3600.0,
        help="s; what is younger is left alone (default: 3600)",
    )
    add_rate(one)
    one = add("status", "show volumes and totals, from a server or from the index")
    one.add_argument(
        "url", metavar="URL", nargs="?", default="", help="of the server (default: look at index and volumes)"
    )
    one.add_argument("--token", metavar="SECRET", default="", help="of a token that allows admin")
    one = add("bench", "measure a running server: PUT, GET, HEAD, DELETE")
    one.add_argument("url", metavar="URL")
    one.add_argument("--size", metavar="BYTES", type=number(int, 0), default=4096, help="of each blob (default: 4096)")
    one.add_argument(
        "--concurrency", metavar="N", type=number(int, 1), default=16, help="requests at once (default: 16)"
    )
    one.add_argument(
        "--count", metavar="N", type=number(int, 1), default=1000, help="requests of each kind (default: 1000)"
    )
    one.add_argument(
        "--duration", metavar="S", type=number(float, 0), default=0.0, help="s for each kind, instead of --count"
    )
    one.add_argument("--token", metavar="SECRET", default="", help="of a token that allows read, write and delete")
    add("backup", "copy the index to a file, while the server runs").add_argument("file", metavar="FILE")
    one = add("token", "make a token: prints its secret, and what goes into the configuration")
    one.add_argument("name", metavar="NAME", help="who it is for")
    one.add_argument("--allow", metavar="OPERATION", nargs="+", required=True, help=f"some of {', '.join(OPERATIONS)}")
    one.add_argument("--prefix", default="", help="the keys it is confined to (default: all)")
    return parser


async def run(options: argparse.Namespace) -> Outcome:
    """Run one tool; SIGTERM ends it as SIGINT does."""
    task = asyncio.current_task()
    assert task
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    names = {"db", "data", "replicas", "volume", "volume_timeout"}
    flags = {name: value for name, value in vars(options).items() if name in names and value is not None}
    config = load_config(getattr(options, "config", ""), flags)
    return await TOOLS[options.command](config, options)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    options = make_parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="mkv: %(message)s")
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    try:
        with asyncio.Runner(loop_factory=new_loop) as runner:
            outcome = runner.run(run(options))
    except ConfigError as error:
        print(*(f"mkv: {fault}" for fault in error.faults), sep="\n", file=sys.stderr)
        return 2
    except (ToolError, MkvError, sqlite3.Error, OSError) as error:
        print(f"mkv: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("mkv: interrupted; the store is consistent, and the same command goes on", file=sys.stderr)
        return 1
    print(json.dumps(outcome.facts) if options.json else "\n".join(outcome.lines))
    return outcome.code


if __name__ == "__main__":
    sys.exit(main())
