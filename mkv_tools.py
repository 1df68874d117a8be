"""The tools for mkv: rebuild, rebalance, verify, discard, status, adopt, bench, backup,
move-index, forget, token for whoever runs a store; put, get, ls, rm, import for whoever uses one.

What a tool has to know of keys, paths, records, the ring, the index and the volumes is in mkv.py;
here is only what it takes to walk, compare, copy and report, and to copy and replace an index.
Theory of operation:

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
    it becomes the record, unless it is known to be dead; older versions are dead. The result is a
    new file, INDEX.new, checked, then put in place with one rename; the old index stays as
    INDEX.<date>.
4.  It believes no single sidecar: all are read. Where those of a version are not all sound and the
    same, or two places of it are on one volume, the blobs beside them are read too, and the
    sidecar that a blob agrees with, in size and digest, is right; a replica of other bytes is left
    out, and so is the second one on a volume. A version that has a sidecar and a blob, and is
    neither settled so nor dead, ends it: all of them are named, and nothing is changed. A blob
    that no volume has a sidecar of is an unfinished write.
5.  What was deleted stays deleted (I4). A version is dead if a volume has a tombstone of it: an
    index that names it is older than the volumes. It is also dead if the old index, however old,
    has drawn it and neither a record nor a claim there names it (R3): so restored disks, disks
    that were away for months and writers that slept bring nothing back. For that the old index
    must be whole (integrity, as many records as its totals say, rows of `drawn` that can be); one
    that is not only says what its rows of `dead` say. Without one the sidecars alone decide.
    What the old index claims is undecided: the volumes decide, and what is not adopted is dead
    with the doubt of an owner whose lease has ended. Where it calls a place dead, that is adopted
    only as the last good replica of the version that its record names. A place on a volume that
    is not read (--allow-missing) stays in its record, and a record that is on such volumes alone
    stays as it is; a volume that the old index has blobs on must else be there and not be empty,
    lest a disk that is not mounted counts as read. What the old index had and the new one lacks
    is reported. The new one hands on all rows of `drawn`, and draws no version below any that was
    seen in a file. Whatever is found to be dead is noted as that, due at once since nobody reads.
6.  Moving replicas (rebalance, verify --repair) locks no key. A batch of keys goes through claim,
    copy, commit. Claim, one transaction: if a record still is what the plan saw, the new places
    are claimed. Copy: read one replica, check its digest, write blob, then sidecar, once, and not
    after the lease has ended. Commit, one transaction: if nothing came between, the record gets
    its new places, the claims end and what it drops is dead. Else the copies are dead, and those
    above what lives are buried at once, as by a PUT that is refused, whoever has ended the claims
    meanwhile. If they cannot be buried, the key is reported and left.
7.  A copy goes to a place that nobody has had (R1), that of a bad replica or sidecar, too. So the
    record stands as it was until all is written; a DELETE that is late hits nothing alive; and a
    copy whose connection broke is tried again at another place, in the next pass.
8.  No tool drops the last good replica (I8): a move reads one replica in full and finds its digest
    right, and that one or its copies stay. A tool that is killed leaves claims (I7), which are
    dead once its lease ends, or the next tool begins (only one moves at a time: INDEX.tools, or a
    lease). Bad bytes stay where they are until garbage_delay is over.
9.  verify notes the path of every record in a scratch database of its own, then walks the folders
    and compares. The store is in use: what looks wrong is looked up again before it counts. A
    record whose replicas are bad, or too few, is mended by one plan: a good place of its version
    that no record names is adopted, wherever it lies, once it was read in full; else there are
    new places, on the volumes that have the bad ones, or where a PUT would write now.
10. That no record names a file says little: the index may be new, old or another's. It is litter
    only if the index has drawn its version (R3), or the version lives, and neither record, claim
    nor dead row names the place. The rest is an "unknown version": named, and deleted by
    nothing but `discard`. A tombstone of a version that lives says that the index is older than
    the volumes. Litter is removed at the end, by entering it as dead in a transaction that looks
    the record up once more: only if it is older than --grace by version and by mtime, its key's
    own replicas are good and were read in full, and nothing speaks against it (explain_keeping).
11. Volumes know who they are (mkv-volume.key). To a tool that opens the store, one that is another
    than it should be counts as down: its client sends nothing there. rebuild looks for itself: by
    the store's id and the numbers of the old index, if that has seen any volume; else all must
    show one store, whose index the new one then is. `adopt` settles what they refuse.

A copy of the index (backup, the source of move-index) says that it is one: only rebuild takes it,
as the old index, and makes a live one. pg_dump and cp make copies that do not say so. Exit codes:
0 done; 1 something is left or failed; 2 wrong usage, or a configuration or an index that cannot be
used. Ctrl-C is safe: the same command goes on.

Reading order: plans (pure), the index, reading volumes, moving replicas, running, tool after tool,
command line."""

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
import enum
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
import shutil
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
from itertools import groupby, islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import SplitResult, quote, urlsplit

# fmt: off
# isort: off
from mkv import (
    ALL_KEYS, ANSWERED, ANY_TAG, BROKEN_S, COPY, EMBEDDED_VOLUMES, END_OF_TIME_NS, GARBAGE,
    HUNG_S, IDENTITY_PATH, IN_THE_WAY, KEY_STEM, LAST_VERSION, LISTING_BYTES, MAX_SIDECAR_BYTES,
    MOVER, NOT_AS_MKV, NOT_UTF8, OPERATIONS, PATIENCE_S, REBUILDER, RECORD_PAGE, SEEN_TAG,
    SMALL_BLOB, STEM, STORE_ID, TOOL, URL, WRITE_DRAWN, Answer, Blob, Burial, Client, Config,
    ConfigError, Corrupt, Dead, Drawn, Exchange, Forbidden, Full, Hasher, Identity, Index,
    IndexDamaged, IndexFailed, Lease, MkvError, NotFound, Occupied, Pending, Place,
    PreconditionFailed, Record, Ring, Sent, Session, Standing, State, States, Store, Token,
    Transaction, Unanswered, Unauthorized, Unavailable, Unreachable, Upload, Volume, VolumeClient,
    VolumeError, VolumeUnexpected, WrongDigest, add_settings, after_prefix, check_key,
    decode_sidecar, decode_tombstone, draw_number, encode_sidecar, find_unconfigured, get_all,
    hide_secrets, is_url, judge_identity, keep_identity, load_config,
    lock_file, make_session, media_type_of, new_loop, new_place, note_buried, parse_arguments,
    parse_path, place_path, print_faults, read_body, read_totals, record_of_row, run_embedded,
    select_identities, select_records, sidecar_path, split_path, stem_of, sync_folder,
    tombstone_path, version_ns, version_of, volume_of,
)
from aiohttp import ClientResponse  # only now: mkv says what is missing
# isort: on
# fmt: on

T = TypeVar("T")
File = tuple[int, str]  # (size, mtime as listed); the size is -1 for what is no plain file
Files = dict[str, File]  # by name or path
Found = dict[str, Files]  # volume -> path -> file
Places = tuple[str, ...]  # each a volume's name, with ~tag if its path has one
Replica = tuple[str, Record]  # (place, record)
Draw = Callable[[str], str]  # volume -> a place on it that nobody has had
Sidecars = Mapping[str, Record | str]  # place -> what its sidecar says, or what is wrong
Digests = Mapping[Place, str]  # of blobs, "" for one that has not as many bytes as listed
Shown = Identity | str | None  # of a volume: its identity, what is wrong with it, or none
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
    """What all volumes hold of one version of one key. `stem` is its path without tag and
    extension; a place is a volume's name, with ~tag if there is one in the path."""

    stem: str
    sidecars: Files = field(default_factory=dict)  # place -> file
    blobs: dict[str, Files] = field(default_factory=dict)  # place -> path -> file
    tombstones: Files = field(default_factory=dict)  # volume -> file

    @property
    def places(self) -> list[Place]:
        """Every blob of it, and every sidecar without a blob, as (volume, path) of the blob."""
        places = sorted(self.sidecars.keys() | self.blobs.keys())
        return [
            (volume_of(place), path)
            for place in places
            for path in self.blobs.get(place, [place_path(self.stem, place)])
        ]

    def others(self, named: Places) -> set[str]:
        """Return the places of its files but for those that are `named`."""
        return (self.sidecars.keys() | self.blobs.keys()).difference(named)

    def beside(self, named: Places) -> Iterator[tuple[str, str, tuple[File, ...]]]:
        """Yield (volume, path, files) of what is at other places than those `named`: a blob, its
        sidecar, or both; and of the tombstones."""
        others = self.others(named)
        for volume, path in self.places:
            place = volume + split_path(path)[1]
            if place in others:
                files = (self.blobs.get(place, {}).get(path), self.sidecars.get(place))
                yield volume, path, tuple(file for file in files if file)
        for volume, file in self.tombstones.items():
            yield volume, tombstone_path(self.stem), (file,)

    def is_young(self, files: Iterable[File], before_s: float) -> bool:
        """Whether it was drawn, or one of the files written, after `before_s`."""
        drawn_ns = version_ns(version_of(self.stem))
        if before_s < drawn_ns / 1e9 and drawn_ns < END_OF_TIME_NS:  # else it is for ever
            return True
        return any(modified_s(file) > before_s for file in files)

    def without(self, places: Collection[str]) -> Version:
        """Return the version without what is at some places."""
        sidecars = {place: one for place, one in self.sidecars.items() if place not in places}
        blobs = {place: one for place, one in self.blobs.items() if place not in places}
        return Version(self.stem, sidecars, blobs, self.tombstones)

    def path_of(self, record: Record) -> str:
        """Return the path of a record of this version without hashing its key once more."""
        return f"{self.stem}.{record.ext}" if record.ext else self.stem

    def size(self, place: str, path: str) -> int | None:
        file = self.blobs.get(place, {}).get(path)
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


def tag_of(path: str) -> str:
    """Return the tag in a path with its sign, "" if it has none."""
    return stem_of(path)[STEM:] if path[STEM : STEM + 1] == "~" else ""


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
            place = volume + tag_of(path)
            if parsed[2] == "key":
                version.sidecars[place] = file
            elif parsed[2] == "del":
                version.tombstones[volume] = file
            else:
                version.blobs.setdefault(place, {})[path] = file
    return versions, foreign


def is_crowded(read: Sidecars) -> bool:
    """Whether a volume has several places of the version."""
    return len(set(map(volume_of, read))) < len(read)


def find_doubts(version: Version, read: Sidecars, in_full: bool = False) -> list[Place]:
    """Return the blobs whose bytes have to say which sidecar is right, or which of two places on
    one volume is: none if all sidecars are sound and say the same, unless asked for `in_full`."""
    if len(set(read.values())) == 1 and not is_crowded(read) and not in_full:
        return []
    wanted = set[Place]()
    for record in {sidecar for sidecar in read.values() if isinstance(sidecar, Record)}:
        for place in read:
            path = place_path(version.path_of(record), place)
            if version.size(place, path) == record.size:
                wanted.add((volume_of(place), path))
    return sorted(wanted)


def judge_beside(version: Version, record: Record, place: str, digests: Digests) -> str:
    """Return what is wrong with the blob beside a sidecar: by its size, and its digest if it was
    read."""
    path = place_path(version.path_of(record), place)
    size = version.size(place, path)
    if size is None:
        return "sidecar without blob"
    if size != record.size:
        return "wrong size"
    if digests.get((volume_of(place), path), record.digest) != record.digest:
        return "corrupt"
    return ""


def choose_record(version: Version, read: Sidecars, digests: Digests) -> Record | None:
    """Return the record, without places, that a blob agrees with; None if there is none, or if
    blobs contradict each other. No blob can tell the content type: most sidecars decide, else the
    extension."""
    votes = Counter(sidecar for sidecar in read.values() if isinstance(sidecar, Record))
    proved = []
    for record in votes:
        if "" in (judge_beside(version, record, place, digests) for place in read):
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


def judge_version(
    version: Version, read: Sidecars, digests: Digests, named: Collection[str] = ()
) -> Judgement:
    """Return the record that sidecars and the blobs beside them make, None if they make none, and
    what is wrong with them. Of several good places on one volume it gets the one that is `named`,
    else the first. `digests` are those of the blobs that find_doubts names."""
    record = choose_record(version, read, digests)
    good = dict[str, str]()  # volume -> place
    others = dict[str, Record]()
    cases = list[Case]()
    order = sorted(read)
    if is_crowded(read):
        order.sort(key=lambda place: place not in named)
    for place in order:
        sidecar = read[place]
        volume = volume_of(place)
        if isinstance(sidecar, str):
            path = sidecar_path(place_path(version.stem, place))
            cases.append(Case("bad sidecar", volume, path, "", sidecar))
        elif record and sidecar != record:
            others[place] = sidecar
        told = record or sidecar
        if isinstance(told, str):
            continue
        wrong = judge_beside(version, told, place, digests)
        if not wrong:
            good.setdefault(volume, place)
            continue
        path = place_path(version.path_of(told), place)
        detail = ""
        if wrong == "sidecar without blob":
            path = sidecar_path(path)
        if wrong == "wrong size":
            detail = f"{version.size(place, path)} bytes instead of {told.size}"
        cases.append(Case(wrong, volume, path, told.key, detail))
    if record is None:
        return None, cases
    if others:
        detail = tell_apart(record, others.values())
        path = f"{version.stem}.key"
        cases.append(Case("contradicting sidecars", " ".join(others), path, record.key, detail))
    return record._replace(places=tuple(sorted(good.values()))), cases


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
    places = " ".join(sorted(read.keys() | version.blobs.keys()))
    return Case("unusable version", places, f"{version.stem}.key", min(keys, default=""), detail)


@dataclass(slots=True, kw_only=True)
class Remembered:
    """What the old index remembers of a run of folders. Only one that is whole has records and
    what was drawn: what it has drawn, and neither its record nor a claim names, is dead (R3)."""

    drawn: Mapping[str, Drawn]  # by tag
    keys: dict[str, str] = field(default_factory=dict)  # stem of a key -> key, as sidecars say
    records: dict[str, Record | None] = field(default_factory=dict)  # of these
    dead: dict[str, set[str]] = field(default_factory=dict)  # stem of a version -> places
    claimed: dict[str, set[str]] = field(default_factory=dict)  # the same; the volumes decide

    def names(self, stem: str) -> Record | None:
        """Return the record, if it is of this version."""
        record = self.records.get(stem[:KEY_STEM])
        return record if record and record.version == version_of(stem) else None

    def is_dead(self, stem: str) -> bool:
        """Whether it knows that a version is dead: it cannot if no sidecar says of which key."""
        if stem[:KEY_STEM] not in self.records or stem in self.claimed or self.names(stem):
            return False
        version = version_of(stem)
        tags = (ANY_TAG, version[16:])
        return is_drawn(version, [self.drawn[tag] for tag in tags if tag in self.drawn])


@dataclass(slots=True)
class Tombstone:
    """What the tombstones of a dead version say: the blob's path, the volumes that have one, and
    the places that may still show its sidecar."""

    path: str
    volumes: Collection[str]
    places: set[str] = field(default_factory=set)

    def write(self, key: str, tx: Transaction) -> None:
        """Note it in an index: volumes that are not read now may still have the dead version, and
        others may get it yet."""
        path = tombstone_path(self.path)
        pending = tx.pending_at(path)
        until_s = tx.now_s + HUNG_S
        for place in self.places:
            at = volume_of(place), place_path(self.path, place)
            if at not in pending.dead or pending.dead[at].owner is not None:
                pending.dead[at] = Dead(at[1], at[0], tx.now_s, tx.now_s, until_s, None, key)
        for volume in self.volumes:
            pending.dead.pop((volume, path), None)
        pending.tombstones.setdefault(path, set()).update(self.volumes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """How a record gets to other places. Those in `keep` are on their volumes already, those in
    `copy` are new, those in `drop` are dead once the record names the others. If `left` says why,
    nothing can be done now."""

    record: Record
    sources: Places = ()  # to read from, in this order; any place of the record's version
    keep: Places = ()
    copy: Places = ()
    drop: Places = ()
    left: str = ""

    @property
    def after(self) -> Record:
        return self.record._replace(places=tuple(sorted(self.keep + self.copy)))


def is_readable(place: str, states: States) -> bool:
    return states.get(volume_of(place), State.DOWN) is not State.DOWN


def plan_move(
    record: Record, target: Sequence[str], states: States, draw: Draw = new_place
) -> Move | None:
    """Bring a record to the volumes that the ring names; None if it is there.

    Only volumes that are up are written to, only those that are not down are read. If there is
    nothing to copy, one of the replicas that stay must be read and found good before others are
    dropped.
    """
    has = record.volumes
    wanted = tuple(v for v in target if v not in has)
    if not wanted and len(has) == len(target):
        return None
    keep = tuple(place for place in record.places if volume_of(place) in target)
    drop = tuple(place for place in record.places if volume_of(place) not in target)
    if unfit := [f"{v} is {states[v].value}" for v in wanted if states[v] is not State.UP]:
        return Move(record=record, left=", ".join(unfit))
    readable = [place for place in record.places if is_readable(place, states)]
    if not wanted:
        readable = [place for place in readable if place in keep]
    if not readable:
        return Move(record=record, left=f"none of {', '.join(has)} can be read")
    # Spreads the reading, the same way each time.
    turn = int(record.version[-4:], 16) % len(readable)
    sources = (*readable[turn:], *readable[:turn])
    copy = tuple(map(draw, wanted))
    return Move(record=record, sources=sources, keep=keep, copy=copy, drop=drop)


# What is wrong with a replica that another one takes the place of.
MENDABLE = ("missing", "wrong size", "corrupt", "missing sidecar", "bad sidecar")


def plan_mend(
    record: Record, faults: Mapping[str, str], spare: Places, others: Places,
    ring: Ring, replicas: int, states: States, draw: Draw = new_place,
) -> Move:  # fmt: skip
    """Give a record good replicas for those that are bad, place -> what is wrong, and for those
    that it lacks. What is good already and no record names, `spare`, comes first; then a new place
    on the volume that has the bad one; then where a PUT would write now. `others` may be good
    enough to be read."""
    bad = [place for place in record.places if faults.get(place) in MENDABLE]
    good = [place for place in record.places if place not in bad]
    count = max(replicas, len(record.places)) - len(good)
    taken = set(map(volume_of, good))
    adopted = list[str]()
    for place in spare:
        if len(adopted) < count and volume_of(place) not in taken:
            adopted.append(place)
            taken.add(volume_of(place))
    here = [v for v in map(volume_of, bad) if v not in taken and states.get(v) is State.UP]
    taken.update(map(volume_of, bad))
    fits = {v for v in ring.zones if states.get(v) is State.UP or v in taken}
    target = ring.place(record.key, count + len(taken), fits.__contains__)
    elsewhere = [v for v in target if v not in taken]
    wanted = (here + elsewhere)[: count - len(adopted)]
    # What stays bad is still named: its volume may get well.
    replaced = set(map(volume_of, adopted)).union(wanted)
    whole = len(adopted) + len(wanted) == count
    drop = tuple(place for place in bad if whole or volume_of(place) in replaced)
    keep = tuple(place for place in record.places if place not in drop) + tuple(adopted)
    # Of a bad sidecar the blob may be good.
    beside = [place for place in bad if faults[place].endswith("sidecar")]
    readable = [place for place in good if place not in faults]
    readable += [*spare, *beside, *others]
    sources = tuple(place for place in readable if is_readable(place, states))
    if not sources:
        return Move(record=record, left="none of them can be read")
    if not replaced:
        return Move(record=record, left="no other volume is up")
    copy = tuple(map(draw, wanted))
    return Move(record=record, sources=sources, keep=keep, copy=copy, drop=drop)


def judge_identities(shown: Mapping[str, Shown], seen: Mapping[str, str]) -> tuple[str, list[str]]:
    """Return the id of the store that volumes are of, "" if none has one, and what is wrong with
    their identities. `seen` is what their index has seen: where it has seen no volume, its own id
    says nothing, and all must be of one store."""
    stores = {one.store for one in shown.values() if isinstance(one, Identity)}
    faults = list[str]()
    knows_any = seen.keys() > {STORE_ID}
    if not knows_any and len(stores) > 1:
        faults.append(f"the volumes are of several stores: {', '.join(sorted(stores))}")
    store = seen[STORE_ID] if knows_any else min(stores, default="")
    for name, one in sorted(shown.items()):
        if one is None and name not in seen:
            continue  # of an edition that gave none, or new
        finding = judge_identity(one, store, name, seen.get(name))
        if finding.standing is Standing.REFUSED:
            faults.append(f"volume {name}: {finding.reason}")
    return store, faults


def explain_adoption(shown: Mapping[str, Shown], name: str, store: str) -> str:
    """Return why a volume cannot be adopted: it is another configured one."""
    found = shown[name]
    if not isinstance(found, Identity):
        return ""
    same = [other for other, one in shown.items() if one == found and other != name]
    if same:
        return f"{' and '.join(same)} shows the same identity: two names for one disk, or a copy"
    if found.store == store and found.volume in shown.keys() - {name}:
        return f"it is {found.volume}, which is configured elsewhere: mend the addresses"
    return ""


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


def judge_replica(record: Record, version: Version, place: str) -> str:
    """Return what is wrong with a replica, as far as a listing can tell."""
    size = version.size(place, place_path(version.path_of(record), place))
    if size is None:
        return "missing"
    if size != record.size:
        return "wrong size"
    if place not in version.sidecars:
        return "missing sidecar"
    return ""


class Expected(NamedTuple):
    """What the index says that there is in some folders."""

    records: Mapping[str, Record]  # by the stem of their version
    claimed: Collection[str]  # stems of versions: somebody may be writing them
    dead: Collection[Place]  # volume, and the path without extension; or with .del
    drawn: Sequence[Drawn]

    def names(self, volume: str, path: str) -> bool:
        """Whether a claim or a dead row says what is there."""
        place = (volume, path if path.endswith(".del") else stem_of(path))
        return place in self.dead or path[:STEM] in self.claimed


def collect_expected(
    records: Mapping[str, Record], pending: Iterable[Pending], drawn: Sequence[Drawn]
) -> Expected:
    claimed = set[str]()
    dead = set[Place]()
    for one in pending:
        claimed.update(path[:STEM] for path, _ in one.claims)
        for volume, path in one.dead:
            dead.add((volume, path if path.endswith(".del") else stem_of(path)))
        for path, volumes in one.tombstones.items():
            dead.update((volume, path) for volume in volumes)
    return Expected(records, claimed, dead, drawn)


# LITTER is dead for sure. EXTRA is of a version that lives, and may be good for something. UNKNOWN
# was written by an index that this one does not know. CONTRADICTION is a tombstone of a version
# that lives here.
Kind = enum.Enum("Kind", "LITTER EXTRA UNKNOWN CONTRADICTION")


class Stray(NamedTuple):
    """A blob, a sidecar without one, or a tombstone, that the index does not know."""

    volume: str
    path: str
    kind: Kind
    files: tuple[File, ...]


def find_strays(
    versions: Iterable[Version], expected: Expected, before_s: float
) -> tuple[list[Stray], int]:
    """Return what neither record, claim nor dead row names, and how much of it is too young to
    tell.

    No version is litter because no record names it: the index may be new, old or another's. It
    must be known to have drawn it.
    """
    strays = list[Stray]()
    young = 0
    for version in versions:
        record = expected.records.get(version.stem)
        named = record.places if record else ()
        if not version.tombstones and not version.others(named):
            continue
        if record is not None:
            kind = Kind.EXTRA
        elif is_drawn(version_of(version.stem), expected.drawn):
            kind = Kind.LITTER
        else:
            kind = Kind.UNKNOWN
        for volume, path, files in version.beside(named):
            if path.endswith(".del") and record is not None:
                strays.append(Stray(volume, path, Kind.CONTRADICTION, files))
            elif expected.names(volume, path):
                continue
            elif version.is_young(files, before_s):
                young += 1
            else:
                strays.append(Stray(volume, path, kind, files))
    return strays, young


class Beside(NamedTuple):
    """What else there is of a version that lives, beside the places of its record. Blobs have the
    right size, as far as a listing can tell."""

    has_extra: bool = False  # something that the index does not know
    spare: Places = ()  # of that, what may be good enough to be adopted
    others: Places = ()  # what may be good enough to be read: it is dead, or has no sidecar


def look_beside(version: Version, record: Record, expected: Expected) -> Beside:
    has_extra = False
    spare = list[str]()
    others = list[str]()
    for place in sorted(version.others(record.places)):
        blob = place_path(version.path_of(record), place)
        is_extra = not expected.names(volume_of(place), blob)
        has_extra = has_extra or is_extra
        if version.size(place, blob) == record.size:
            if is_extra and place in version.sidecars:
                spare.append(place)
            else:
                others.append(place)
    return Beside(has_extra, tuple(spare), tuple(others))


def modified_s(file: File) -> float:
    try:
        return parsedate_to_datetime(file[1]).timestamp()
    except (ValueError, TypeError):
        return math.inf  # so that it counts as young


def name_stray(path: str, sidecar: Record | str, record: Record | None) -> str:
    """Say what litter is, from its sidecar and from the current record of that sidecar's key."""
    if path.endswith(".del"):
        return "leftover tombstone"
    if isinstance(sidecar, str) or record is None:
        return "unfinished write" if isinstance(sidecar, str) else "orphan"
    if record.version == version_of(path):
        return "extra replica"
    return "stale version" if version_of(path) < record.version else "orphan"


def explain_keeping(
    litter: int, keys: int, bad: int, failed: Collection[str], unconfigured: Collection[str],
    contradictions: int,
) -> str:  # fmt: skip
    """Return why no litter may be removed now, "" if it may."""
    if contradictions:
        return "the index is older than the volumes: run rebuild"
    if failed:
        return f"not all could be read of {', '.join(sorted(failed))}"
    if unconfigured:
        return f"records name volumes that are not configured: {', '.join(unconfigured)}"
    if bad:
        return f"{bad} keys have no good replica, and it may be among them"
    if litter > keys:
        return (
            f"{litter} files that no record names are more than the {keys} keys that there are: "
            "is this the right index?"
        )
    return ""


def is_sound(row: Drawn) -> bool:
    """Whether an index can have drawn what this row says."""
    is_tag = row.tag in (ANY_TAG, SEEN_TAG) or re.fullmatch("[0-9a-f]{4}", row.tag)
    return bool(is_tag) and row.first_ns >= 0 and 0 <= row.highest_ns < END_OF_TIME_NS


def is_drawn(version: str, drawn: Iterable[Drawn]) -> bool:
    """Whether an index has given this version out, as its rows of what was drawn say."""
    at_ns = version_ns(version)
    return any(
        row.tag in (ANY_TAG, version[16:]) and row.first_ns <= at_ns <= row.highest_ns
        for row in drawn
    )


# == The index ====================================================================================
# What servers do not need: pages of all that is in an index, a copy of it, and a new one in its
# place.

PENDING_PAGE = 10_000  # places
FORGET_ROWS = 5000  # in one transaction, so that a server does not wait long
INDEX_SUFFIXES = ("", "-wal", "-shm", "-journal", ".lock")  # of the files of an index
COPYING = ".tmp"  # at the end of a copy's name while it is made
TOOL_SUFFIXES = (".tools", ".serve")  # of locks beside it
MARK_AS_COPY = f"UPDATE clock SET boot = '{COPY}'"


def select_dead(session: Session, volume: str) -> list[Place]:
    """Return some of what is dead on a volume, and of the tombstones that it has."""
    query = """SELECT volume, path FROM dead WHERE volume = ?1
        UNION SELECT volume, path FROM tombstone WHERE volume = ?1 LIMIT ?2"""
    return session.select(query, (volume, FORGET_ROWS))


def select_drawn(session: Session) -> list[Drawn]:
    """Return which versions the index has given out."""
    return [Drawn(*row) for row in session.select("SELECT tag, first, highest FROM drawn")]


def select_pending(session: Session, first: str) -> dict[str, Pending]:
    """Return a page of all that is pending, of the keys whose paths are not before `first`."""
    pieces = [
        f"""SELECT * FROM (SELECT DISTINCT path FROM {table} WHERE path >= ?1
            ORDER BY path LIMIT {PENDING_PAGE}) AS one"""
        for table in ("claim", "dead", "tombstone")
    ]
    query = f"{' UNION '.join(pieces)} ORDER BY path LIMIT {PENDING_PAGE}"
    paths = session.select(query, (first,))
    pending = session.read_pending({path[:KEY_STEM] for (path,) in paths})
    return dict(sorted(pending.items()))


async def read_records(index: Index) -> AsyncIterator[list[Record]]:
    """Yield all records in the order of their keys, in pages, each as it is at its moment."""
    after = ""
    while page := await index.read(select_records, after):
        yield page
        after = page[-1].key


async def read_pending(index: Index) -> AsyncIterator[dict[str, Pending]]:
    """Yield all that is pending, by the stems of keys, in pages."""
    first = ""
    while page := await index.read(select_pending, first):
        yield page
        first = f"{max(page)}~"


def insert_all(tx: Transaction, records: Iterable[Record]) -> None:
    for record in records:
        tx.insert(record)


def note_drawn(tx: Transaction, rows: Iterable[Drawn]) -> None:
    """Take over what another index has drawn."""
    tx.session.run_many(WRITE_DRAWN, [*rows])


def forget_places(tx: Transaction, places: Iterable[Place]) -> None:
    """Give up what is pending at `places`, whose volume will not come back."""
    for place in places:
        forget_place(tx.pending_at(place[1]), place, tx.now_s)


def forget_place(pending: Pending, place: Place, now_s: float) -> None:
    """What is at a place, or a tombstone, does not matter any more: its volume is gone."""
    volume, path = place
    pending.tombstones.get(path, set()).discard(volume)
    row = pending.dead.pop(place, None)
    if row is not None and not row.is_tombstone:
        pending.release_tombstones(path, row.key, now_s)


# -- who has it --


def take_role(tx: Transaction, role: str) -> None:
    """Be another owner from now on."""
    tx.lease.role = role
    values = (tx.lease.owner, role)
    tx.session.run("UPDATE owner SET role = ?2 WHERE id = ?1", values)


def take_role_alone(tx: Transaction, role: str) -> None:
    """The same; raises Occupied if somebody is in the way."""
    tx.check_others(role)
    take_role(tx, role)


async def wait_for_role(index: Index, role: str) -> None:
    """Become an owner of another role; raises Occupied if somebody is in the way who is alive.
    Who is not, is in the way until its lease ends."""
    until_s = math.inf
    while True:
        try:
            return await index.write(partial(take_role_alone, role=role))
        except Occupied as error:
            if error.until_s > until_s:  # it was renewed meanwhile
                raise
            until_s = error.until_s
        await asyncio.sleep(index.lease.seconds / 20)


def end_other_movers(tx: Transaction) -> None:
    """Make garbage of what tools have claimed that had the lock before, and were killed."""
    query = f"SELECT id FROM owner WHERE role = '{MOVER}' AND id <> ?1"
    for (number,) in tx.session.select(query, (tx.lease.owner,)):
        tx.end_lease(number)


@contextlib.asynccontextmanager
async def lock_tools(index: Index) -> AsyncIterator[None]:
    """Keep other tools that move replicas away meanwhile; raises Unavailable if there is one."""
    with contextlib.ExitStack() as stack:
        if index.session.is_remote:
            await wait_for_role(index, MOVER)
        else:
            try:
                lock = lock_file(f"{index.session.place}.tools", exclusive=True)
            except BlockingIOError:
                raise Unavailable(IN_THE_WAY[MOVER]) from None
            stack.callback(os.close, lock)
            await index.write(partial(take_role, role=MOVER))
        await index.write(end_other_movers)
        yield


# -- a copy --


def remove_index(path: str) -> None:
    for suffix in INDEX_SUFFIXES:
        Path(path + suffix).unlink(missing_ok=True)


def put_file_in_place(file: str, target: str) -> None:
    """Give `file` the name `target`, for good: it is synced before, and its folder after."""
    with open(file, "rb") as opened:
        os.fsync(opened.fileno())
    os.replace(file, target)
    sync_folder(Path(target).absolute().parent)


def copy_index(session: Session, target: str) -> int:
    """Copy the index as it is at this moment to a file, while others write; return its number of
    keys. The file appears whole, checked and synced, or not at all."""
    part = target + COPYING
    try:
        remove_index(part)
        with contextlib.closing(sqlite3.connect(part)) as copy:
            session.db.backup(copy)  # in one step: one snapshot, while writers go on
            copy.execute("PRAGMA journal_mode = DELETE")
            with copy:
                copy.execute(MARK_AS_COPY)
            ((soundness,),) = copy.execute("PRAGMA integrity_check(1)")
            if soundness != "ok":
                raise IndexFailed(f"the copy is damaged, and so is the index: {soundness}")
            ((keys,),) = copy.execute("SELECT count(*) FROM record")
        put_file_in_place(part, target)
    finally:
        remove_index(part)
    return int(keys)


def mark_as_copy(session: Session) -> None:
    """Have nobody serve this index from now on: another one has taken its place."""
    session.select("UPDATE meta SET is_copy = true" if session.is_remote else MARK_AS_COPY)


def check_target(session: Session, target: str) -> None:
    """Raise ConfigError if a copy of the index may not be written to the file `target`."""
    if session.is_remote:
        reason = f"an index in a database is copied with its own tools: pg_dump -n {session.place}"
        raise ConfigError([f"FILE: {reason} (README.md, Beyond one index server)"])
    folder = Path(target).absolute().parent
    if not folder.is_dir():
        raise ConfigError([f"FILE: there is no folder {folder}"])
    taken = set[tuple[int, int, str]]()
    for path in files_of_index(session.place):
        taken |= identify_file(path)
    for path in (target, *(target + COPYING + suffix for suffix in INDEX_SUFFIXES)):
        if not taken.isdisjoint(identify_file(path)):
            raise ConfigError([f"FILE: {path} is the index or a file that belongs to it"])


def files_of_index(path: str) -> set[str]:
    """Return the names of all that belongs to an index, there or not. It may be a link itself."""
    suffixes = [*INDEX_SUFFIXES, *TOOL_SUFFIXES, *(f".new{suffix}" for suffix in INDEX_SUFFIXES)]
    return {base + suffix for base in (path, os.path.realpath(path)) for suffix in suffixes}


def identify_file(path: str) -> set[tuple[int, int, str]]:
    """Return what two paths to the same file share, wherever links lead: the file itself, which
    may have several names; and its name in its folder, for a file that is not there yet."""
    real = Path(os.path.realpath(path))
    marks = set[tuple[int, int, str]]()
    for place, name in ((real, ""), (real.parent, real.name)):
        with contextlib.suppress(OSError):
            facts = place.stat()
            marks.add((facts.st_dev, facts.st_ino, name))
    return marks


# -- a new one --


async def use_alone(db: str, act: Callable[[Session], T]) -> T:
    """Return what `act` does in a session of its own, which may take as long as it takes; raises
    IndexFailed."""

    def carry_out() -> T:
        session = make_session(db)
        try:
            with contextlib.closing(session):
                session.connect()
                return act(session)
        except Exception as error:
            raise session.explain(error) from None

    return await asyncio.to_thread(carry_out)


async def has_index(db: str) -> bool:
    """Return whether there is one; raises IndexFailed if that is not to be found out."""
    session = make_session(db)
    if not session.is_remote:
        return Path(session.place).is_file()
    query = "SELECT 1 WHERE to_regclass('meta') IS NOT NULL"
    return bool(await use_alone(db, lambda session: session.select(query)))


async def check_index(db: str) -> None:
    """Raise ConfigError if there is no index."""
    if not await has_index(db):
        name = make_session(db).name
        raise ConfigError([f"db: there is no index at {name} (rebuild can make one)"])


def count_records(session: Session) -> tuple[int, int]:
    """Return how many there are, and the bytes of their blobs."""
    ((count, size),) = session.select("SELECT count(*), coalesce(sum(size), 0) FROM record")
    return count, int(size)


def check_soundness(session: Session) -> str:
    """Return what SQLite finds wrong with its file, or ""."""
    if session.is_remote:
        return ""
    ((soundness,),) = session.select("PRAGMA integrity_check(1)")
    return "" if soundness == "ok" else str(soundness)


def find_damage(session: Session) -> str:
    """Return why an index that nobody else has open is not whole, or "". Raises what `explain`
    turns into IndexDamaged if nothing of it can be read. Its log is brought into it, too."""
    if not session.is_remote and session.select("PRAGMA user_version") == [(0,)]:
        raise IndexDamaged("it is empty")
    session.prepare()
    if not session.is_remote:
        session.select("PRAGMA wal_checkpoint(TRUNCATE)")
    damage = check_soundness(session)
    if damage:
        return damage
    counted = count_records(session)
    total = read_totals(session).get(ALL_KEYS, (0, 0))
    if counted != total:
        return f"it has {counted[0]} records of {counted[1]} bytes, not {total[0]} of {total[1]}"
    if not all(map(is_sound, select_drawn(session))):
        return "what it says of versions is none"
    return ""


def check_new_index(session: Session, keys: int, size: int) -> None:
    """Raise IndexFailed unless the new index is sound and holds what was read."""
    damage = check_soundness(session)
    rows = count_records(session)
    if damage or rows != (keys, size) or read_totals(session).get(ALL_KEYS, (0, 0)) != rows:
        found = f"{damage or 'ok'}, {rows}"
        raise IndexFailed(f"the new one is not what was read ({found}); the old one stays")


def select_lost(session: Session, new: str, after: str) -> list[tuple[Record, bool]]:
    """Return a page of the records that the index `new` lacks or has in an older version, and
    which of the two."""
    fresh = new
    if not session.is_remote:
        session.run("ATTACH ?1 AS fresh", (new,))
        fresh = "fresh"
    try:
        query = f"""SELECT new.version IS NOT NULL, old.*
            FROM record AS old LEFT JOIN {fresh}.record AS new ON new.key = old.key
            WHERE old.key > ?1 AND (new.version IS NULL OR new.version < old.version)
            ORDER BY old.key LIMIT ?2"""
        rows = session.select(query, (after, RECORD_PAGE))
    finally:
        if not session.is_remote:
            session.run("DETACH fresh")
    return [(record_of_row(row), bool(older)) for older, *row in rows]


async def remove_new(db: str) -> None:
    """Leave nothing of an index that was not put in its place."""
    session = make_session(db)
    if session.is_remote:
        await use_alone(db, drop_schema)
    else:
        remove_index(session.place)


def drop_schema(session: Session) -> None:
    session.select(f"DROP SCHEMA IF EXISTS {session.place} CASCADE")


def keep_old_file(path: str) -> str:
    """Give the index, and its log if that could not be brought in, a second, dated name; return
    that."""
    name = f"{path}.{time.strftime('%Y%m%dT%H%M%S')}.{time.time_ns() % 10**9:09}"
    for suffix in ("", "-wal"):
        if Path(path + suffix).exists():
            try:
                os.link(path + suffix, name + suffix)
            except OSError:  # a file system without hard links
                shutil.copy2(path + suffix, name + suffix)
    sync_folder(Path(path).absolute().parent)
    for suffix in ("-wal", "-shm"):  # the log of the old one must never be applied to the new one
        Path(path + suffix).unlink(missing_ok=True)
    return name


def swap_schemas(session: Session, new: str, owner: int, keep: bool) -> str:
    """Give the schema `new` the name of this one, in one transaction, and only if `owner`, who
    rebuilds, has not lost its lease: then servers may have written. Whoever waits for a turn of
    the old index is told that it is closed."""
    here = session.place
    kept = f"{here}_{time.strftime('%Y%m%dt%H%M%S')}_{random.getrandbits(16):04x}"
    session.run("BEGIN ISOLATION LEVEL READ COMMITTED")
    session.run("UPDATE meta SET turn = turn + 1, closed = true")
    query = "SELECT 1 FROM owner WHERE id = ?1 AND role = 'rebuilder'"
    if not session.select(query, (owner,)):
        session.roll_back()
        raise IndexFailed("the lease of this rebuild has ended: run it again")
    session.run(f"ALTER SCHEMA {here} RENAME TO {kept}" if keep else f"DROP SCHEMA {here} CASCADE")
    session.run(f"ALTER SCHEMA {new} RENAME TO {here}")
    session.commit()
    return kept if keep else ""


class Replacement:
    """A new index that is made beside the one at `db`, and takes its place or is given up.

    Meanwhile no server and no tool has the index open. `old` is None if there is none that can be
    read; `damage` says what is wrong with it, "" if it is whole."""

    def __init__(self, db: str) -> None:
        self._db = db
        self._session = make_session(db)
        self.name = self._session.name
        self._beside = self._session.beside()
        self.new = Index(self._beside)
        self.old: Index | None = None
        self.damage = ""
        self._existed = False
        self._is_alone = False
        self._lock = contextlib.ExitStack()
        self._guard: Index | None = None  # who keeps others away by its lease
        self._renewal: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Keep others away, look at the old index, begin the new one; raises MkvError or
        OSError."""
        if not self._session.is_remote:
            self._lock_file()
        self._is_alone = True
        self._existed = await has_index(self._db)
        if self._session.is_remote:
            self._guard = Index(self._db, role=TOOL)
            await self._guard.prepare()
            await wait_for_role(self._guard, REBUILDER)
            self._renewal = asyncio.create_task(self._guard.renew_for_ever())
        if self._existed:
            try:
                self.damage = await use_alone(self._db, find_damage)
                self.old = self._guard or Index(self._db)
                await self.old.prepare()  # who may write is the last to close it: no log is left
            except IndexDamaged as error:
                self.damage = error.reason
        await remove_new(self._beside)
        await self.new.open()

    def _lock_file(self) -> None:
        path = self._session.place
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.callback(os.close, lock_file(f"{path}.lock", exclusive=True))
        except BlockingIOError:
            reason = f"{self.name} is in use by a server or a tool: stop that first"
            raise Unavailable(reason) from None

    async def lost(self) -> AsyncIterator[list[tuple[Record, bool]]]:
        """Yield the records of the old index that the new one lacks, and whether it has an older
        version of them, in pages."""
        after = ""
        new = self.new.session.place
        while self._existed and self.old is not None:
            page = await use_alone(self._db, partial(select_lost, new=new, after=after))
            if not page:
                return
            yield page
            after = page[-1][0].key

    async def finish(self, keys: int, size: int) -> str:
        """Check that the new index is sound and holds so many keys and bytes, and put it in the
        place of the old one. Return the name under which that is kept, "" if there was none.
        Raises IndexFailed, and then the old one stays. A kill does no harm at any step."""
        await use_alone(self._beside, partial(check_new_index, keys=keys, size=size))
        await self.new.close()
        await self._close_old()
        new = self.new.session.place
        if not self._guard:
            return await asyncio.to_thread(self._put_file_in_place, new)
        owner = self._guard.lease.owner
        swap = partial(swap_schemas, new=new, owner=owner, keep=self._existed)
        kept = await use_alone(self._db, swap)
        self._guard.disown()
        return kept

    def _put_file_in_place(self, new: str) -> str:
        kept = keep_old_file(self._session.place) if self._existed else ""
        put_file_in_place(new, self._session.place)
        return kept

    async def _close_old(self) -> None:
        if self.old is not None and self.old is not self._guard:
            await self.old.close()

    async def close(self) -> None:
        """Leave nothing of a new index that was not put in place."""
        await self.new.close()
        await self._close_old()
        if self._is_alone:
            await remove_new(self._beside)
        if self._renewal:
            self._renewal.cancel()
            await asyncio.wait([self._renewal])
        if self._guard:
            await self._guard.close()
        self._lock.close()
        self._is_alone = False


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


async def read_identities(clients: Clients) -> dict[str, Shown]:
    """Read who volumes say that they are; raises VolumeError."""
    shown = await asyncio.gather(*(client.read_identity() for client in clients.values()))
    return dict(zip(clients, shown, strict=True))


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
                elif path not in ("/corrupt", IDENTITY_PATH):
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
# Claim, copy, commit: points 6 to 8 of the theory of operation.

LEASE_ENDED = "this tool stood still for too long: its copies are given up"
UNBURIED = "its copies may come back in a rebuild: too few volumes could note that they are dead"


def claim(tx: Transaction, move: Move) -> str:
    """Claim where `move` will write; return why it must not begin, if so."""
    record = move.record
    if tx.get(record.key) != record:
        return "changed"
    if move.copy:
        tx.claim(record.key, record.path, move.copy)
    return ""


def commit(
    tx: Transaction, move: Move, failed: str, sent: Sent, delay_s: float
) -> tuple[str, Burial]:
    """Move the record if nothing `failed` or came between; return why it was not moved, if so. All
    that was `sent` and that the record does not name then is dead, whoever has ended its claim;
    return, too, what of it is to be buried."""
    before = move.record
    path = before.path
    key = before.key
    pending = tx.pending_of(key)
    if tx.get(key) != before:
        failed = "changed"
    elif not pending.claimed_at(path).issuperset(move.copy):
        failed = failed or LEASE_ENDED
    elif any((volume_of(p), place_path(path, p)) in pending.dead for p in move.after.places):
        failed = failed or "changed"
    if not failed:
        tx.remove(before)
        tx.insert(move.after)
        pending.kill_places(path, move.drop, tx.now_s + delay_s, tx.now_s, key)
    current = tx.get(key)
    lives = current is not None and current.version == before.version
    named = current.places if current is not None and lives else ()
    pending.end_write(path, set(move.copy), sent, named, tx.now_s, key)
    living = current.version if current is not None else ""
    is_above = living < before.version
    return failed, pending.above(living if is_above else LAST_VERSION, tx.now_s)


class CopyFailed(Exception):
    """A volume did not take its copy."""


async def in_step(acts: Iterable[Awaitable[None]]) -> None:
    """Await all to their end, then raise CopyFailed if a volume failed: none goes on by itself."""
    for error in await asyncio.gather(*acts, return_exceptions=True):
        if isinstance(error, VolumeError):
            raise CopyFailed(str(error)) from error
        if error:
            raise error


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Moves that are under way together, one large blob or small ones; by keys, why copies were
    not made, and where they were sent to."""

    moves: Sequence[Move]
    lease: Lease  # under which their places are claimed
    failed: dict[str, str] = field(default_factory=dict)
    sent: dict[str, dict[str, float]] = field(default_factory=lambda: defaultdict(dict))


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

    async def _pace(self, size: int) -> None:
        self.bytes += size
        if self._rate:
            wait_s = self._free_at - time.monotonic()
            self._free_at += max(0.0, -wait_s) + size / self._rate
            await asyncio.sleep(max(0.0, wait_s))

    async def read_blobs(self, wanted: Sequence[Replica]) -> list[bytes | str]:
        """Read small replicas: each its good bytes, or what is wrong with it."""
        places = [(volume_of(place), place_path(record.path, place)) for place, record in wanted]
        answers = await get_each(self.clients, places, SMALL_BLOB)
        return [
            judge_blob(answer, record) for answer, (_, record) in zip(answers, wanted, strict=True)
        ]

    async def stream(
        self, record: Record, place: str, uploads: Sequence[Upload] = ()
    ) -> bytes | str:
        """Read a replica of any size, checking it, into `uploads`, but for its last piece: so no
        volume ever has a wrong blob. Return that piece, or what is wrong with the replica. Raises
        CopyFailed."""
        hasher = Hasher({"sha256": bytes.fromhex(record.digest)})
        held = b""
        chunks = self.clients[volume_of(place)].stream(place_path(record.path, place))
        try:
            async with contextlib.aclosing(chunks):
                async for chunk in chunks:
                    await self._pace(len(chunk) * max(1, len(uploads)))
                    hasher.update(chunk)
                    if hasher.size > record.size:
                        return "corrupt"
                    if held:
                        await in_step(upload.send(held) for upload in uploads)
                    held = chunk
            hasher.finish()
            return held
        except WrongDigest:
            return "corrupt"
        except NotFound:
            return "missing"
        except VolumeError as error:
            return f"unreadable: {error}"

    async def check(self, wanted: Sequence[Replica]) -> list[str]:
        """Read replicas in full: each "" if it is good, else what is wrong with it."""
        results: list[bytes | str] = []
        for batch in plan_batches(wanted, lambda one: one[1].size):
            place, record = batch[0]
            if record.size > SMALL_BLOB:
                results.append(await self.stream(record, place))
            else:
                await self._pace(sum(record.size for _, record in batch))
                results += await self.read_blobs(batch)
        return [one if isinstance(one, str) else "" for one in results]

    async def move(self, moves: Sequence[Move]) -> dict[str, str]:
        """Carry a batch out; return key -> why it was not done, or "". If it is cancelled, its
        claims stay until the lease ends."""
        index = self._store.index
        keys = [move.record.key for move in moves]
        claims, lease = await index.write(partial(self._claim, moves), keys, durable=False)
        outcome = dict(zip(keys, claims, strict=True))
        begun = [move for move in moves if not outcome[move.record.key]]
        batch = Batch(moves=begun, lease=lease)
        if not begun:
            return outcome
        if begun[0].record.size > SMALL_BLOB:
            await self._copy_large(batch)
        else:
            await self._copy_small(batch)
        ends = await index.write(partial(self._commit, batch), keys)
        for move, (why, burial) in zip(begun, ends, strict=True):
            if burial.rows and not await self._store._bury(self._store.view, burial):
                why = UNBURIED
            outcome[move.record.key] = why
        return outcome

    def _claim(self, moves: Sequence[Move], tx: Transaction) -> tuple[list[str], Lease]:
        return [claim(tx, move) for move in moves], tx.lease

    def _commit(self, batch: Batch, tx: Transaction) -> list[tuple[str, Burial]]:
        delay_s = self._store.view.config.garbage_delay
        ends = []
        for move in batch.moves:
            key = move.record.key
            sent = batch.sent.get(key, {})
            ends.append(commit(tx, move, batch.failed.get(key, ""), sent, delay_s))
        return ends

    async def _copy_small(self, batch: Batch) -> None:
        """Sources are tried in turn, for all keys at once."""
        blobs = dict[str, bytes]()
        for turn in range(max(len(move.sources) for move in batch.moves)):
            left = [
                move
                for move in batch.moves
                if move.record.key not in blobs and turn < len(move.sources)
            ]
            results = await self.read_blobs([(move.sources[turn], move.record) for move in left])
            for move, blob in zip(left, results, strict=True):
                if isinstance(blob, bytes):
                    blobs[move.record.key] = blob
                else:
                    self._note_bad(move, move.sources[turn], blob)
        copies = list[tuple[Record, str, bytes | None]]()
        size = 0
        for move in batch.moves:
            good = blobs.get(move.record.key)
            if good is None:
                batch.failed[move.record.key] = NO_SOURCE
                continue
            copies += [(move.record, place, good) for place in move.copy]
            size += len(good) * len(move.copy)
        await self._pace(size)
        await self._put(batch, copies)

    async def _put(self, batch: Batch, copies: Sequence[tuple[Record, str, bytes | None]]) -> None:
        """Send sidecars, and before each its blob if it is not there yet, to places: once. Each is
        an exchange of its own, so that one that fails says nothing of the others."""
        over = asyncio.get_running_loop().create_future()
        left = len(copies)

        def hear_end(record: Record, place: str, exchange: Exchange) -> None:
            nonlocal left
            if exchange.error:
                batch.failed[record.key] = str(exchange.error)
            if exchange.doubt_s is not None:
                batch.sent[record.key][place] = exchange.doubt_s
            left -= 1
            if not left and not over.done():
                over.set_result(None)

        for record, place, blob in copies:
            path = place_path(record.path, place)
            files = {} if blob is None else {path: blob}
            files[sidecar_path(path)] = encode_sidecar(record)
            self.clients[volume_of(place)].send_files(
                files, "", partial(hear_end, record, place), lambda _: None, batch.lease
            )
        if copies:
            await over

    async def _copy_large(self, batch: Batch) -> None:
        (move,) = batch.moves
        key = move.record.key
        try:
            for source in move.sources:
                wrong = await self._copy_from(batch, move, source)
                if not wrong:
                    return
                self._note_bad(move, source, wrong)
            batch.failed[key] = NO_SOURCE
        except (CopyFailed, VolumeError) as error:
            batch.failed[key] = str(error)

    async def _copy_from(self, batch: Batch, move: Move, source: str) -> str:
        """Copy a large blob; return what is wrong with its source. Raises CopyFailed or
        VolumeError."""
        record = move.record
        uploads = list[Upload]()
        sent = batch.sent[record.key]
        try:
            # A PUT that has no end writes nothing: with another source there may be another one.
            for place in move.copy:
                path = place_path(record.path, place)
                client = self.clients[volume_of(place)]
                uploads.append(await client.start_upload(path, record.size, "", batch.lease))
            held = await self.stream(record, source, uploads)
            if isinstance(held, str):
                return held
            sent |= dict.fromkeys(move.copy, HUNG_S)
            await in_step(upload.send(held) for upload in uploads)
            await in_step(upload.finish() for upload in uploads)
            sent |= dict.fromkeys(move.copy, ANSWERED)
            await self._put(batch, [(record, place, None) for place in move.copy])
            return ""
        finally:
            for upload in uploads:
                upload.abort()

    def _note_bad(self, move: Move, place: str, wrong: str) -> None:
        """Report a replica that is not good; of what the record does not name nobody expects
        that."""
        record = move.record
        if place in record.places:
            kind, _, detail = wrong.partition(": ")
            path = place_path(record.path, place)
            self._report.add(Case(kind, volume_of(place), path, record.key, detail))


NO_SOURCE = "no good replica could be read"


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


@contextlib.asynccontextmanager
async def open_store(config: Config, moving: bool = False) -> AsyncIterator[Store]:
    """Open volumes and index beside a server that may be running; `moving` replicas is for one
    tool at a time."""
    await check_index(config.db)
    async with contextlib.AsyncExitStack() as stack:
        config = await stack.enter_async_context(open_volumes(config))
        store = Store(config, role=TOOL)
        stack.push_async_callback(store.close)
        await store.start()
        if moving:
            await stack.enter_async_context(lock_tools(store.index))
        yield store


# == rebuild ======================================================================================


def carry_over(
    pending: Mapping[str, Pending], age_s: float, seen: Collection[str], tx: Transaction
) -> None:
    """Take over what is pending in an index whose clock is `age_s` behind, but for tombstones on
    volumes that are `seen`: their own files say that. What is dead is due at once, since nobody
    reads. What is claimed is so by this owner now: dead when it retires, unless it is adopted."""
    for one in pending.values():
        for (path, _), places in one.claims.items():
            after = tx.pending_at(path)
            after.kill_places(path, places, tx.now_s, tx.now_s, one.key, tx.lease.owner)
        for place, row in one.dead.items():
            doubts = list[float]()
            if row.doubt_s is not None:
                doubts.append(row.doubt_s + age_s)
            if row.owner is not None:
                doubts.append(tx.now_s + BROKEN_S)
            row = row._replace(doubt_s=max(doubts, default=None), owner=None)
            tx.pending_at(row.path).dead[place] = row._replace(due_s=tx.now_s, since_s=tx.now_s)
        for path, volumes in one.tombstones.items():
            if unseen := volumes.difference(seen):
                tx.pending_at(path).tombstones[path] = unseen


def only_dead(pending: Mapping[str, Pending]) -> dict[str, Pending]:
    """Return of what a damaged index says only what is dead, and at places that can be."""
    dead = dict[str, Pending]()
    for stem, one in pending.items():
        rows = {place: row for place, row in one.dead.items() if parse_path(row.path)}
        dead[stem] = Pending({}, rows, {}, one.key)
    return dead


def paths_of(pending: Mapping[str, Pending]) -> list[str]:
    """Return the paths of all that is pending."""
    paths = list[str]()
    for one in pending.values():
        paths += [path for path, _ in one.claims]
        paths += [path for _, path in one.dead]
        paths += one.tombstones
    return paths


class Keys:
    """The keys in a run of folders: what the volumes and the old index say of them, and, once they
    are settled, what becomes of them."""

    def __init__(
        self,
        clients: Clients,
        versions: Mapping[str, Version],
        read: Mapping[str, Sidecars],
        tombstones: Mapping[str, Tombstone],
        old: Remembered,
    ) -> None:
        self._clients = clients
        self._versions = versions
        self._read = read
        self._tombstones = tombstones
        self._old = old
        self.adopted = list[Record]()
        self.dead = dict[Place, str]()  # (volume, path of a blob) -> key, "" if it is not known
        self.known_dead = 0  # versions of which only the old index knew it
        self.cases = list[Case]()

    async def settle(self) -> None:
        """Decide on all versions of all keys."""
        stems = sorted(self._versions, reverse=True)
        for key_stem, group in groupby(stems, key=lambda stem: stem[:KEY_STEM]):
            await self._settle_key(key_stem, list(group))

    async def _settle_key(self, key_stem: str, stems: list[str]) -> None:
        """Adopt the first version, from the highest one down, that is sound and not dead; what is
        below is dead."""
        named = self._old.records.get(key_stem)
        if named and key_stem + named.version not in stems and self._places_away(named):
            stems = sorted([*stems, key_stem + named.version], reverse=True)
        is_settled = False
        for stem in stems:
            version = self._versions.get(stem) or Version(stem)
            if stem in self._tombstones:
                self._kill(version)
            elif self._old.is_dead(stem):
                self._kill(version)
                places = version.sidecars.keys() | version.blobs.keys()
                if not places <= self._old.dead.get(stem, set()):
                    self.known_dead += 1
            elif is_settled and (version.sidecars or self._old.names(stem)):
                self._kill(version)
            else:
                record = await self._judge(version)
                if record is not None:
                    is_settled = True
                    self.adopted.append(record)
                    if not version.sidecars.keys() <= {*record.places}:
                        self._kill_the_rest(version, record)

    def _places_away(self, record: Record) -> list[str]:
        """Return the places of a record that are on volumes that are not read now."""
        return [place for place in record.places if volume_of(place) not in self._clients]

    def _key_of(self, stem: str) -> str:
        return self._old.keys.get(stem[:KEY_STEM], "")

    def _kill(self, version: Version) -> None:
        """All of a version is dead, also what the old index names on volumes that are not read."""
        key = self._key_of(version.stem)
        self.dead |= dict.fromkeys(version.places, key)
        if named := self._old.names(version.stem):
            for place in self._places_away(named):
                self.dead[volume_of(place), place_path(named.path, place)] = key

    def _kill_the_rest(self, version: Version, record: Record) -> None:
        """What has a sidecar of the version of `record`, and was left out of it, is dead: there
        the blob is bad or missing, or it is the second one on its volume."""
        for volume, path in version.places:
            place = volume + tag_of(path)
            if place in version.sidecars and place not in record.places:
                self.dead[volume, path] = record.key

    async def _judge(self, version: Version) -> Record | None:
        """Return the record that a version makes which is not known to be dead, None if it makes
        none."""
        stem = version.stem
        named = self._old.names(stem)
        read = self._read.get(stem, {})
        dead = self._old.dead.get(stem, set())
        standing = version.without(dead) if dead else version
        record = None
        if standing.sidecars:
            sidecars = {place: read[place] for place in standing.sidecars} if dead else read
            record, cases = await self._read_and_judge(standing, sidecars, named)
            self.cases += cases
        if bare := standing.blobs.keys() - standing.sidecars.keys():
            for place in sorted(bare):
                for path in standing.blobs[place]:
                    self.cases.append(Case("blob without sidecar", volume_of(place), path))
        if record is None and dead and named:  # it may have the last good replica
            record, _ = await self._read_and_judge(version, read, named, in_full=True)
        if record is None and standing.sidecars and standing.blobs:
            self.cases.append(name_unusable(standing, read))
            return None
        if named and (away := self._places_away(named)):
            places = (*record.places, *away) if record else away
            record = (record or named)._replace(places=tuple(sorted(places)))
        return record

    async def _read_and_judge(
        self, version: Version, read: Sidecars, named: Record | None, in_full: bool = False
    ) -> Judgement:
        """Judge a version, by the digests of those blobs that have to decide."""
        digests = dict[Place, str]()
        for volume, path in find_doubts(version, read, in_full):
            size = version.size(volume + tag_of(path), path) or 0
            digests[volume, path] = await read_digest(self._clients[volume], path, size)
        return judge_version(version, read, digests, named.places if named else ())

    def write(self, tx: Transaction) -> None:
        """Write what has become of them to the new index."""
        insert_all(tx, self.adopted)
        if self._old.dead or self._old.claimed:
            for record in self.adopted:
                raise_from_dead(record, tx.pending_of(record.key))
        for stem, tombstone in self._tombstones.items():
            tombstone.write(self._key_of(stem), tx)
        for (volume, path), key in self.dead.items():
            pending = tx.pending_at(path)
            row = Dead(path, volume, tx.now_s, tx.now_s, None, None, key)
            row = pending.dead.setdefault((volume, path), row)
            pending.dead[volume, path] = row._replace(key=row.key or key)


def raise_from_dead(record: Record, pending: Pending) -> None:
    """Have nothing dead, or claimed, where a record stands."""
    for volume, path in list(pending.dead):
        is_its_version = version_of(path) == record.version
        if is_its_version and volume + tag_of(path) in record.places:
            del pending.dead[volume, path]


class Rebuild:
    """Makes the new index of one store, run by run."""

    def __init__(self, clients: Clients, indexes: Replacement, report: Report) -> None:
        self._clients = clients
        self._indexes = indexes
        self._copy = None if indexes.damage else indexes.old  # a whole one
        self._new = indexes.new
        self._report = report
        self._drawn = dict[str, Drawn]()  # by tag
        self._highest = ""  # version in any file
        self.walk = Walk(clients, report, self._fail)
        self.keys = self.bytes = self.left_out = self.known_dead = 0

    def _fail(self, error: VolumeError) -> None:
        raise error

    async def run(self, allowed: Collection[str]) -> None:
        """Carry over what the old index says that is dead or claimed; decide on the keys of all
        folders; see what has become of the old keys."""
        await self._check_identities()
        await self.walk.start()
        if self._copy:
            self._check_volumes(await self._copy.read(read_totals), allowed)
            self._drawn = {row.tag: row for row in await self._copy.read(select_drawn)}
            await self._carry_over(self._copy)
        elif self._indexes.old:
            await self._carry_over_damaged(self._indexes.old)
        await self.walk.run(self._merge)
        if self._report.counts["unusable version"]:
            return  # these end it
        await self._see_to_the_lost()
        await self._release_tombstones()
        await self._new.write(partial(note_drawn, rows=self._rows_of_drawn()))

    async def _check_identities(self) -> None:
        """Raise ToolError if a volume is another than it should be; note in the new index who they
        are."""
        shown = await read_identities(self._clients)
        seen = await self._copy.read(select_identities) if self._copy else {}
        store, faults = judge_identities(shown, seen)
        if faults:
            hint = "if the index is the wrong one, put it away and rebuild without it"
            raise ToolError("; ".join([*faults, hint] if seen else faults))
        found = {name: one.number for name, one in shown.items() if isinstance(one, Identity)}
        for name, number in (seen | found | ({STORE_ID: store} if store else {})).items():
            await self._new.write(partial(keep_identity, name=name, number=number, anew=True))

    async def _carry_over(self, old: Index) -> None:
        age_s = await self._new.read(Session.read_clock) - await old.read(Session.read_clock)
        async for pending in read_pending(old):
            carry = partial(carry_over, pending, age_s, self._clients)
            await self._new.write(carry, paths=paths_of(pending))

    async def _carry_over_damaged(self, old: Index) -> None:
        """Do so with what can be read of an index that is not whole. Of the versions that it has
        drawn only the highest counts."""
        try:
            age_s = await self._new.read(Session.read_clock) - await old.read(Session.read_clock)
            async for pending in read_pending(old):
                pending = only_dead(pending)
                carry = partial(carry_over, pending, age_s, self._clients)
                await self._new.write(carry, paths=paths_of(pending))
            rows = [row for row in await old.read(select_drawn) if is_sound(row)]
            highest_ns = max((row.highest_ns for row in rows), default=0)
            self._drawn = {SEEN_TAG: Drawn(SEEN_TAG, highest_ns + 1, highest_ns)}
        except Exception:  # of an index that may say anything
            return  # should it be the new one that fails, it will again

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

    async def _see_to_the_lost(self) -> None:
        """See to the keys of the old index that the new one lacks, or has in an older version:
        those on volumes that were not read stay as they are, the others are reported."""
        async for page in self._indexes.lost():
            keys = [record.key for record, _ in page]
            kept, lost = await self._new.write(partial(keep_unread, page, self._clients), keys)
            self._count(kept)
            self.left_out += len(kept)
            for record, is_older in lost:
                detail = "an older version is there" if is_older else ""
                names = " ".join(record.volumes)
                self._report.add(Case("lost key", names, record.path, record.key, detail))

    def _count(self, records: Collection[Record]) -> None:
        self.keys += len(records)
        self.bytes += sum(record.size for record in records)

    async def _release_tombstones(self) -> None:
        """Have those deleted of whose versions nothing is dead any more."""
        async for pending in read_pending(self._new):
            paths = [path for one in pending.values() for path in one.tombstones]
            await self._new.write(partial(release_tombstones, paths), paths=paths)

    def _rows_of_drawn(self) -> list[Drawn]:
        """Return what the new index knows of versions: all that the old one knew, and that none is
        to be drawn below what was seen."""
        highest_ns = version_ns(self._highest) if self._highest else 0
        highest_ns = max([highest_ns, *(row.highest_ns for row in self._drawn.values())])
        seen = Drawn(SEEN_TAG, highest_ns + 1, highest_ns)
        return [*(self._drawn | {SEEN_TAG: seen}).values()]

    async def _merge(self, run: list[str], on: On) -> None:
        """Decide on all keys of a run of folders."""
        versions, cases = group_files(await self.walk.list_run(on))
        found = [version_of(stem) for stem in versions]
        self._highest = max([self._highest, *(one for one in found if one < END_OF_VERSIONS)])
        read = await self._read(versions.values())
        tombstones = await self._read_tombstones(versions.values())
        old = await self._ask_old(run, read)
        keys = Keys(self._clients, versions, read, tombstones, old)
        await keys.settle()
        paths = [path for _, path in keys.dead]
        paths += [tombstone.path for tombstone in tombstones.values()]
        if old.dead or old.claimed:
            paths += [record.path for record in keys.adopted]
        adopted = [record.key for record in keys.adopted]
        await self._new.write(keys.write, adopted, paths)
        self._count(keys.adopted)
        self.known_dead += keys.known_dead
        self._report.add(*cases, *keys.cases)

    async def _ask_old(self, run: list[str], read: Mapping[str, Sidecars]) -> Remembered:
        """Return what the old index says of the versions in a run. What was pending there is in
        the new one by now."""
        old = Remembered(drawn=self._drawn)
        for one in (await self._new.read(Session.read_pending, run)).values():
            for row in one.dead.values():
                if not row.is_tombstone:
                    places = old.dead if row.owner is None else old.claimed
                    place = row.volume + tag_of(row.path)
                    places.setdefault(row.path[:STEM], set()).add(place)
        for stem, sidecars in read.items():
            for sidecar in sidecars.values():
                if isinstance(sidecar, Record):
                    old.keys[stem[:KEY_STEM]] = sidecar.key
                    break
        if self._copy:
            records = await self._copy.read(get_all, [*old.keys.values()])
            old.records.update(zip(old.keys, records, strict=True))
        return old

    async def _read_tombstones(self, versions: Collection[Version]) -> dict[str, Tombstone]:
        """Return stem -> tombstone of the versions that are dead. That it has one is enough; what
        that says only tells where else to look. An index that names such a version is older than
        the volumes."""
        tombstones = dict[str, Tombstone]()
        for version in versions:
            if not version.tombstones:
                continue
            path = tombstone_path(version.stem)
            places = [(volume, path) for volume in version.tombstones]
            found = Tombstone(path=version.stem, volumes=sorted(version.tombstones))
            for (volume, _), answer in zip(
                places, await get_each(self._clients, places, MAX_SIDECAR_BYTES), strict=True
            ):
                if isinstance(answer, VolumeError):
                    raise answer
                try:
                    found.path, doubted = decode_tombstone(answer[1], path)
                    found.places.update(doubted)
                except ValueError as error:
                    found.places.update(self._clients)
                    self._report.add(Case("bad tombstone", volume, path, "", str(error)))
            tombstones[version.stem] = found
        return tombstones

    async def _read(self, versions: Collection[Version]) -> dict[str, dict[str, Record | str]]:
        """Read all sidecars: return stem -> place -> sidecar."""
        read: dict[str, dict[str, Record | str]] = {version.stem: {} for version in versions}
        wanted = list[Place]()
        asked = list[tuple[str, str]]()
        for version in versions:
            for place in version.sidecars:
                asked.append((version.stem, place))
                wanted.append((volume_of(place), f"{place_path(version.stem, place)}.key"))
        sidecars = await read_sidecars(self._clients, wanted)
        for (stem, place), sidecar in zip(asked, sidecars, strict=True):
            read[stem][place] = sidecar
        return read


END_OF_VERSIONS = f"{END_OF_TIME_NS:016x}"


def keep_unread(
    page: Iterable[tuple[Record, bool]], read: Collection[str], tx: Transaction
) -> tuple[list[Record], list[tuple[Record, bool]]]:
    """Keep those of some records of the old index, which the new one lacks, that are on volumes
    that were not `read`; return these, and the others. What has a tombstone is neither: it was
    deleted after the old index was copied."""
    kept = list[Record]()
    lost = list[tuple[Record, bool]]()
    for record, is_older in page:
        pending = tx.pending_of(record.key)
        away = tuple(place for place in record.places if volume_of(place) not in read)
        if tombstone_path(record.path) in pending.tombstones:
            pending.kill_places(record.path, away, tx.now_s, tx.now_s, record.key)
        elif away and not is_older:
            kept.append(record._replace(places=away))
            tx.insert(kept[-1])
        else:
            lost.append((record, is_older))
    return kept, lost


def release_tombstones(paths: Iterable[str], tx: Transaction) -> None:
    for path in paths:
        tx.pending_at(path).release_tombstones(path, "", tx.now_s)


async def rebuild(config: Config, options: argparse.Namespace, report: Report) -> None:
    """Make a new index from the volumes and swap it in, or change nothing."""
    indexes = Replacement(config.db)
    async with contextlib.AsyncExitStack() as stack:
        config = await stack.enter_async_context(open_volumes(config))
        stack.push_async_callback(indexes.close)
        await indexes.open()
        known = {volume.name for volume in config.volumes}
        if indexes.old and not indexes.damage:
            known.update(await indexes.old.read(read_totals))
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
        report.facts = {
            "keys": work.keys,
            "bytes": work.bytes,
            "garbage": (await indexes.new.read(read_totals)).get(GARBAGE, (0, 0))[0],
            "damage": indexes.damage,
            "left_out": work.left_out,
            "known_dead": work.known_dead,
        }
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
    if indexes.damage:
        reason = f"it is not whole ({indexes.damage})"
        report.lines.append(f"{reason}: what was deleted of late may be back")
    if work.known_dead:
        reason = "the old index knew that they are dead"
        report.lines.append(f"{work.known_dead} versions on the volumes were left out: {reason}")
    if work.left_out:
        where = "only on the volumes that were left out, and stay as they were"
        report.lines.append(f"{work.left_out} keys are {where}")
    lost = report.counts["lost key"]
    if lost:
        report.lines.append(f"{lost} keys of the old index are lost or older now, see above")
        report.code = 1


# == rebalance ====================================================================================

IDLE_PASSES = 2  # in which nothing is moved: kept connections may have broken long ago


class Rebalance:
    """Brings every key to where the ring says; without a mover it only counts what that takes."""

    def __init__(self, store: Store, mover: Mover | None, concurrency: int) -> None:
        self._store = store
        self._mover = mover
        self._concurrency = concurrency
        self.keys = self.checked = self.moved = self.changed = self.dropped = 0
        self.pairs: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
        self.left: Counter[str] = Counter()
        self._failed = 0  # in this pass, of what was tried

    async def run(self) -> None:
        """Go over the keys until those left cannot be moved. What failed goes to new places in the
        next pass."""
        idle = 0
        while idle < IDLE_PASSES:
            before = self.moved
            await self._pass()
            if not self._failed:
                return
            idle = 0 if self.moved > before else idle + 1

    async def _pass(self) -> None:
        self.left.clear()
        self._failed = 0
        totals = await self._store.index.read(read_totals)
        self.keys = totals.get(ALL_KEYS, (0, 0))[0]
        self.checked = 0
        await run_all(self._jobs(), self._concurrency)

    async def _jobs(self) -> AsyncIterator[Awaitable[None]]:
        """Yield batches of moves that can go at once, over all records."""
        view = self._store.view
        states = self._store.health.states
        pending = list[Move]()
        async for page in read_records(self._store.index):
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
                self._failed += why != NO_SOURCE
            else:
                self.moved += 1
                self.dropped += len(move.drop)
                for target in move.copy:
                    pair = self.pairs[volume_of(move.sources[0]), volume_of(target)]
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
            await work.run()
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
        report.lines.append(f"left {count}: {reason}")
    report.code = 1 if work.left else 0


# == verify, discard ==============================================================================

HARMLESS = ("foreign file", "nginx leftover")  # reported; no reason for exit code 1


StrayRow = tuple[str, str, str]  # (key, volume, path); "": it is not known
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

    async def add_strays(self, strays: Iterable[StrayRow]) -> None:
        await self._insert("INSERT INTO stray VALUES (?, ?, ?)", strays)

    async def folders(self, firsts: Sequence[str]) -> list[str]:
        """Return the folders /aa/bb/ below some /aa/ that stand in a row, where records are."""
        query = "SELECT DISTINCT substr(path, 1, 7) FROM noted WHERE path >= ? AND path < ?"
        return [row[0] for row in await self._select(query, firsts[0], after_prefix(firsts[-1]))]

    async def records_in(self, first: str, last: str) -> list[tuple[str, str]]:
        """Return (path, key) of what was noted in a range of folders."""
        query = "SELECT path, key FROM noted WHERE path >= ? AND path < ?"
        return await self._select(query, first, after_prefix(last))

    async def strays(self) -> AsyncIterator[list[StrayRow]]:
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
    """Whether the record names the place of the blob or sidecar at `path`."""
    if record is None or record.version != version_of(path):
        return False
    return volume + split_path(path)[1] in record.places


def remove_strays(rows: Iterable[StrayRow], tx: Transaction) -> int:
    """What is at these paths is dead, unless the key's record, or a claim, names it; return how
    many are. A tombstone goes once nothing of its version is dead any more."""
    count = 0
    for key, volume, path in rows:
        pending = tx.pending_at(path)
        plain, tag = split_path(path)
        if path.endswith(".del"):
            note_buried(tx, (), [(path, volume)])
        else:
            is_claimed = any(at[:STEM] == path[:STEM] for at, _ in pending.claims)
            if is_claimed or is_named(tx.get(key) if key else None, volume, path):
                continue
            pending.kill_places(plain, [volume + tag], tx.now_s, tx.now_s, key)
        count += 1
    return count


class Comparison:
    """The walk over the volumes beside what the index knows of each folder. The store is in use:
    the index is read before the files and after them."""

    def __init__(
        self, store: Store, clients: Clients, notes: Notes, report: Report, grace_s: float
    ) -> None:
        self._store = store
        self._clients = clients
        self._notes = notes
        self._report = report
        self._before_s = time.time() - grace_s
        self.walk = Walk(clients, report, self.fail)
        self.failed = set[str]()

    def fail(self, error: VolumeError) -> None:
        if error.volume not in self.failed:
            self.failed.add(error.volume)
            self._report.add(Case("failed volume", error.volume, "", "", str(error)))

    async def note_records(self) -> None:
        async for page in read_records(self._store.index):
            await self._notes.add_records(page)

    async def look(self, run: Sequence[str], on: On) -> tuple[dict[str, Version], Expected]:
        """Return what is in a run of folders, and what the index says of it."""
        index = self._store.index
        span = (run[0], run[-1])
        before = await index.read(Session.read_pending, run)
        versions, cases = group_files(await self.walk.list_run(on))
        self._report.add(*cases)
        records = await self._read_noted(*span)
        after = await index.read(Session.read_pending, run)
        drawn = await index.read(select_drawn)
        return versions, collect_expected(records, [*before.values(), *after.values()], drawn)

    async def _read_noted(self, first: str, last: str) -> dict[str, Record]:
        """Return, by stem, the records in a range of folders whose version is as it was noted."""
        noted = await self._notes.records_in(first, last)
        current = await self._store.index.read(get_all, [key for _, key in noted])
        records = dict[str, Record]()
        for (path, _), record in zip(noted, current, strict=True):
            if record is not None and record.version == version_of(path):
                records[path[:STEM]] = record
        return records

    def find_strays(
        self, versions: Iterable[Version], expected: Expected
    ) -> tuple[list[Stray], int]:
        return find_strays(versions, expected, self._before_s)

    async def identify(self, strays: Sequence[Stray]) -> list[tuple[Stray, str, str]]:
        """Return (stray, its key, what it is), without those that are named by now."""
        wanted = [stray for stray in strays if not stray.path.endswith(".del")]
        places = [(stray.volume, sidecar_path(stray.path)) for stray in wanted]
        sidecars = dict(zip(wanted, await read_sidecars(self._clients, places), strict=True))
        keys = [one.key for one in sidecars.values() if isinstance(one, Record)]
        found = await self._store.index.read(get_all, keys)
        current = dict(zip(keys, found, strict=True))
        named = list[tuple[Stray, str, str]]()
        for stray in strays:
            sidecar = sidecars.get(stray, "")
            key = sidecar.key if isinstance(sidecar, Record) else ""
            record = current.get(key)
            if not is_named(record, stray.volume, stray.path):
                named.append((stray, key, name_stray(stray.path, sidecar, record)))
        return named


class Verify:
    """Compares the index with the volumes, and with --repair makes them agree."""

    def __init__(
        self, compared: Comparison, store: Store, mover: Mover, notes: Notes, report: Report,
        deep: bool, repair: bool,
    ) -> None:  # fmt: skip
        self._compared = compared
        self._store = store
        self._mover = mover
        self._notes = notes
        self._report = report
        self._deep = deep
        self._repair = repair
        self.keys = self.replicas = self.bytes = self.young = self.repaired = 0
        self.litter = 0  # noted for removal
        self._beyond_index = 0  # blobs and sidecars that it does not name
        self._without_replica = 0  # keys
        self.kept = ""  # why no litter was removed

    async def run(self) -> None:
        walk = self._compared.walk
        await self._compared.note_records()
        await walk.start()
        await walk.run(self._compare, self._notes.folders)
        totals = await self._store.index.read(read_totals)
        unconfigured = find_unconfigured(totals, self._mover.clients)
        self.kept = explain_keeping(
            self._beyond_index, self.keys, self._without_replica, self._compared.failed,
            [one["name"] for one in unconfigured], self._report.counts[CONTRADICTION],
        )  # fmt: skip
        if self._repair and not self.kept:
            await self._remove_strays()

    async def _compare(self, run: list[str], on: On) -> None:
        """Check a run of folders."""
        try:
            versions, expected = await self._compared.look(run, on)
            unsound = await self._check(expected, versions)
            strays, young = self._compared.find_strays(versions.values(), expected)
            self.young += young
            await self._note_strays(strays, unsound)
        except VolumeError as error:
            self._compared.fail(error)

    async def _check(self, expected: Expected, versions: Mapping[str, Version]) -> set[str]:
        """Find what is wrong with the replicas of records, and settle it; return the stems of
        those with which something still is."""
        records = expected.records.values()
        self.keys += len(records)
        self.replicas += sum(len(record.places) for record in records)
        self.bytes += sum(record.size * len(record.places) for record in records)
        beside = dict[Record, Beside]()
        # Record -> place -> what is wrong.
        faults: dict[Record, dict[str, str]] = defaultdict(dict)
        doubtful = list[Replica]()  # whose sidecars are read
        in_full = list[Replica]()  # whose blobs are
        for stem, record in expected.records.items():
            version = versions.get(stem) or Version(stem)
            is_deep = self._deep
            if version.others(record.places):
                beside[record] = look_beside(version, record, expected)
                # What is beside it goes only if its own replicas are good.
                is_deep = is_deep or (self._repair and beside[record].has_extra)
            size = len(encode_sidecar(record))
            for place in record.places:
                if volume_of(place) not in self._mover.clients:
                    faults[record][place] = "not configured"
                    continue
                if volume_of(place) in self._compared.failed:
                    continue
                wrong = judge_replica(record, version, place)
                if wrong:
                    faults[record][place] = wrong
                elif (
                    is_deep or version.sidecars[place][0] != size
                ):  # of another make, or cut short
                    doubtful.append((place, record))
                if is_deep and wrong in ("", "missing sidecar"):
                    in_full.append((place, record))
        for (place, record), is_good in zip(
            doubtful, await self._check_sidecars(doubtful), strict=True
        ):
            if not is_good:
                faults[record][place] = "bad sidecar"
        for (place, record), wrong in zip(in_full, await self._mover.check(in_full), strict=True):
            if wrong:
                faults[record][place] = wrong
        return await self._settle(records, faults, beside)

    async def _check_sidecars(self, replicas: Sequence[Replica]) -> list[bool]:
        """Return which sidecars say what the record does."""
        places = [
            (volume_of(place), sidecar_path(place_path(record.path, place)))
            for place, record in replicas
        ]
        sidecars = await read_sidecars(self._mover.clients, places)
        return [
            isinstance(sidecar, Record) and sidecar._replace(places=record.places) == record
            for (_, record), sidecar in zip(replicas, sidecars, strict=True)
        ]

    async def _settle(
        self, records: Collection[Record], faults: Mapping[Record, Mapping[str, str]],
        beside: Mapping[Record, Beside],
    ) -> set[str]:  # fmt: skip
        """Mend what is wrong, if told to, and report it, unless a client has come between; return
        the stems of the records with which something still is."""
        replicas = self._store.view.config.replicas
        suspects = [
            record for record in records if record in faults or len(record.places) < replicas
        ]
        current = await self._store.index.read(get_all, [record.key for record in suspects])
        suspects = [record for record, now in zip(suspects, current, strict=True) if record == now]
        moves = await self._plan(suspects, faults, beside)
        outcome = {record: move.left for record, move in moves.items()}
        if self._repair:
            possible = [move for move in moves.values() if not move.left]
            for batch in plan_batches(possible, lambda move: move.record.size):
                ends = await self._mover.move(batch)
                outcome |= {move.record: ends[move.record.key] for move in batch}
        unsound = set[str]()
        for record in suspects:
            why = outcome.get(record, "")
            if why == "changed":
                continue
            done = moves[record] if self._repair and record in moves and not why else None
            if not self._report_on(record, faults.get(record, {}), done, why):
                unsound.add(record.path[:STEM])
        return unsound

    async def _plan(
        self, suspects: Sequence[Record], faults: Mapping[Record, Mapping[str, str]],
        beside: Mapping[Record, Beside],
    ) -> dict[Record, Move]:  # fmt: skip
        """Return what can be done for records of which replicas are bad, or missing."""
        view = self._store.view
        replicas = view.config.replicas
        good = await self._read_spare(suspects, beside) if self._repair else {}
        moves = dict[Record, Move]()
        for record in suspects:
            wrong = faults.get(record, {})
            if len(record.places) < replicas or any(one in MENDABLE for one in wrong.values()):
                spare = tuple(good.get(record, ()))
                found = beside.get(record, Beside())
                others = tuple(place for place in found.spare if place not in spare)
                moves[record] = plan_mend(
                    record, wrong, spare, others + found.others,
                    view.ring, replicas, self._store.health.states,
                )  # fmt: skip
        return moves

    async def _read_spare(
        self, suspects: Sequence[Record], beside: Mapping[Record, Beside]
    ) -> dict[Record, list[str]]:
        """Return the places of which the index does not know, and that are good in full."""
        replicas = [
            (place, record) for record in suspects for place in beside.get(record, Beside()).spare
        ]
        whole = await self._mover.check(replicas)
        told = await self._check_sidecars(replicas)
        good = defaultdict[Record, list[str]](list)
        for (place, record), wrong, is_told in zip(replicas, whole, told, strict=True):
            if is_told and not wrong:
                good[record].append(place)
        return good

    def _report_on(
        self, record: Record, faults: Mapping[str, str], done: Move | None, why: str
    ) -> bool:
        """Report what was wrong with a record, and whether `done` has mended it, or `why` not;
        return whether nothing is wrong any more."""
        config = self._store.view.config
        dropped = done.drop if done else ()
        left = len(faults)
        for place, wrong in faults.items():
            kind, _, detail = wrong.partition(": ")
            if place in dropped:
                detail = "repaired"
                left -= 1
                self.repaired += 1
            path = place_path(record.path, place)
            self._report.add(Case(kind, volume_of(place), path, record.key, detail))
        is_lost = all(place in faults for place in record.places) and not done
        self._without_replica += is_lost
        if is_lost and not any(wrong.endswith("sidecar") for wrong in faults.values()):
            self._report.add(Case("no good replica", "", record.path, record.key))
        if len(record.places) < config.replicas:
            count = len(done.after.places if done else record.places)
            detail = f"{count} of {config.replicas}"
            if count >= config.replicas:
                detail = "repaired"
                self.repaired += 1
            else:
                detail += f", {why}" if why else ""
                left += 1
            self._report.add(Case("too few replicas", "", record.path, record.key, detail))
        return left == 0

    async def _note_strays(self, strays: Sequence[Stray], unsound: Collection[str]) -> None:
        """Report what the index does not know, and note what may be removed."""
        noted = list[StrayRow]()
        for stray, key, name in await self._compared.identify(strays):
            volume, path = stray.volume, stray.path
            is_tombstone = path.endswith(".del")
            match stray.kind:
                case Kind.CONTRADICTION:
                    name = CONTRADICTION
                case Kind.UNKNOWN:
                    name = UNKNOWN
                    self._beyond_index += not is_tombstone
                case Kind.LITTER | Kind.EXTRA:
                    self._beyond_index += not is_tombstone
                    if path[:STEM] not in unsound:
                        noted.append((key, volume, path))
            self._report.add(Case(name, volume, path, key))
        self.litter += len(noted)
        await self._notes.add_strays(noted)

    async def _remove_strays(self) -> None:
        """Each one's record is looked up again in the transaction."""
        async for rows in self._notes.strays():
            self.repaired += await remove_noted(self._store.index, rows)


async def remove_noted(index: Index, rows: Sequence[StrayRow]) -> int:
    keys = [key for key, _, _ in rows if key]
    paths = [path for _, _, path in rows]
    return await index.write(partial(remove_strays, rows), keys, paths)


CONTRADICTION = "tombstone of a version that lives"
UNKNOWN = "unknown version"


async def verify(config: Config, options: argparse.Namespace, report: Report) -> None:
    """Check every replica of every record, and every file on every volume; with --repair, restore
    and clean up."""
    async with open_store(config, options.repair) as store:
        mover = Mover(store, options.limit_rate * 1e6, report)
        notes = Notes()
        compared = Comparison(store, mover.clients, notes, report, options.grace)
        work = Verify(compared, store, mover, notes, report, options.deep, options.repair)
        progress = show_progress(
            report, lambda: tell_extent(work, mover), lambda: compared.walk.done
        )
        try:
            async with progress:
                await work.run()
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
    unknown = report.counts[UNKNOWN]
    if unknown:
        report.lines.append(
            f"{unknown} files are of versions that this index has never given out, and stay: if "
            "it is the right one, `mkv_tools.py discard VOLUME` deletes them"
        )
    if work.kept and (work.litter or unknown or report.counts[CONTRADICTION]):
        report.lines.append(f"nothing was removed: {work.kept}")
    report.facts["kept"] = work.kept
    report.code = 1 if left else 0


def tell_extent(work: Verify, mover: Mover) -> str:
    read = f", {show_bytes(mover.bytes)} read" if mover.bytes else ""
    return f"{work.keys} keys, {work.replicas} replicas of {show_bytes(work.bytes)}{read}"


def tell_faults(repaired: int, left: int) -> str:
    if repaired:
        return f"{repaired} faults repaired, {left} left"
    return f"{left} faults" if left else "no faults"


class Discard:
    """Deletes from one volume what no record, claim or dead row of the index names, and what is of
    no version that lives."""

    def __init__(self, compared: Comparison, store: Store, notes: Notes, report: Report) -> None:
        self._compared = compared
        self._store = store
        self._notes = notes
        self._report = report
        self.keys = self.files = self.bytes = 0  # found
        self.count = self.deleted = 0  # blobs, sidecars without one, tombstones

    def share(self) -> float:
        """Finding them is half of it."""
        return (self._compared.walk.done + self.deleted / max(1, self.count)) / 2

    def text(self) -> str:
        return f"{self.files} files, {show_bytes(self.bytes)} found, {self.deleted} deleted"

    async def find(self) -> None:
        await self._compared.note_records()
        await self._compared.walk.start()
        await self._compared.walk.run(self._note)

    async def _note(self, run: list[str], on: On) -> None:
        try:
            versions, expected = await self._compared.look(run, on)
            strays, _ = self._compared.find_strays(versions.values(), expected)
            found = await self._compared.identify(strays)
        except VolumeError as error:
            self._compared.fail(error)
            return
        rows = list[StrayRow]()
        for stray, key, name in found:
            if stray.kind in (Kind.UNKNOWN, Kind.LITTER):
                name = UNKNOWN if stray.kind is Kind.UNKNOWN else name
                self._report.add(Case(name, stray.volume, stray.path, key))
                self.files += len(stray.files)
                self.bytes += sum(size for size, _ in stray.files)
                rows.append((key, stray.volume, stray.path))
        self.keys += len({path[:KEY_STEM] for _, _, path in rows})
        self.count += len(rows)
        await self._notes.add_strays(rows)

    async def delete(self) -> None:
        """Enter them as dead, and do what a server does then. What a kill, or a volume that fails,
        leaves undone is done by the server."""
        async for rows in self._notes.strays():
            self.deleted += await remove_noted(self._store.index, rows)
            await self._store.collect_garbage()
        while await self._store.collect_garbage():
            pass


async def discard(config: Config, options: argparse.Namespace, report: Report) -> None:
    """Delete from one volume what this index does not know; first only say how much that is."""
    name = options.name
    async with open_store(config, options.yes) as store:
        client = store.view.clients.get(name)
        if client is None:
            raise ConfigError([f"NAME: {name} is not in the configuration"])
        notes = Notes()
        compared = Comparison(store, {name: client}, notes, report, options.grace)
        work = Discard(compared, store, notes, report)
        try:
            async with show_progress(report, work.text, work.share):
                await work.find()
                if options.yes and not compared.failed:
                    await work.delete()
        finally:
            await notes.close()
    report.facts = {"volume": name, "files": work.files, "bytes": work.bytes, "keys": work.keys}
    report.facts["deleted"] = work.deleted
    found = f"{name}: {work.files} files, {show_bytes(work.bytes)}, of {work.keys} keys"
    if compared.failed:
        report.lines = [f"{found}; not all could be read, and nothing was deleted"]
    elif options.yes:
        report.lines = [f"{found} are deleted"]
    else:
        report.lines = [f"{found} are of no version that this index knows to be alive"]
        report.lines += ["say --yes to delete them"] if work.files else []
    report.code = 1 if compared.failed or work.deleted < work.count else 0


# == status, backup, forget, token =========================================================


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
        report.lines += [f"  {v['reason']}"] if v.get("reason") else []
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
    await check_index(config.db)
    check_target(index.session, options.file)
    await index.open()
    part = options.file + COPYING
    whole = max(1, size_of(config.db))

    def tell() -> str:
        return f"{show_bytes(size_of(part))} copied"

    try:
        async with show_progress(report, tell, lambda: min(1.0, size_of(part) / whole)):
            keys = await index.read(copy_index, options.file)
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
    await check_index(options.source)
    source = Replacement(options.source)
    target = Replacement(options.target)
    async with contextlib.AsyncExitStack() as stack:
        for one in (source, target):
            stack.push_async_callback(one.close)
            await one.open()
        if source.old is None or source.damage:
            raise ConfigError([f"FROM: {source.name}: {source.damage}"])
        if await source.old.read(Session.select, source.old.session.IS_COPY):
            raise ConfigError(
                [f"FROM: {source.name} is a copy, which may lack what came after it"]
            )
        keys, size = (await source.old.read(read_totals)).get(ALL_KEYS, (0, 0))
        copying = IndexCopy(source.old, target.new, keys)
        taken = f"TO: there is an index at {target.name}, and it is not empty"
        if target.damage:
            raise ConfigError([taken])
        if target.old and await count_keys(target.old):
            # It may be that of a run which was killed before it was done with FROM.
            if await copying.compare(target.old):
                raise ConfigError([taken])
        else:
            async with show_progress(report, copying.text, copying.share):
                await copying.copy()
                if why := await copying.compare(target.new):
                    raise ToolError(f"{why}: TO stays as it was")
            for name, number in (await source.old.read(select_identities)).items():
                await target.new.write(partial(keep_identity, name=name, number=number, anew=True))
            await target.finish(keys, size)
        await use_alone(options.source, mark_as_copy)
    report.facts = {"keys": keys, "bytes": size, "pending": copying.pending}
    report.lines = [
        f"{target.name}: {keys} keys, {show_bytes(size)}, and {copying.pending} places pending",
        f"{source.name} says from now on that it is a copy, and no server uses it",
    ]


async def count_keys(index: Index) -> int:
    keys, _ = (await index.read(read_totals)).get(ALL_KEYS, (0, 0))
    return keys


class IndexCopy:
    """A copy of one index's rows into another, and how far it is."""

    def __init__(self, source: Index, target: Index, whole: int) -> None:
        self._source = source
        self._target = target
        self._whole = whole  # keys there are
        self.keys = 0
        self.pending = 0  # places
        self.checked = 0  # keys

    def text(self) -> str:
        return f"{self.keys} keys copied, {self.checked} checked"

    def share(self) -> float:
        return min(1.0, (self.keys + self.checked) / max(1, 2 * self._whole))

    async def copy(self) -> None:
        async for records in read_records(self._source):
            keys = [record.key for record in records]
            await self._target.write(partial(insert_all, records=records), keys)
            self.keys += len(records)
        age_s = await self._target.read(Session.read_clock) - await self._source.read(
            Session.read_clock
        )
        async for pending in read_pending(self._source):
            carry = partial(carry_over, pending, age_s, ())
            await self._target.write(carry, paths=paths_of(pending))
        drawn = await self._source.read(select_drawn)
        await self._target.write(partial(note_drawn, rows=drawn))

    async def compare(self, target: Index) -> str:
        """Return "" if an index has the same records, has drawn the same versions, and has as many
        places pending as the source; else what is wrong with it."""
        copies = read_records(target)
        async for records in read_records(self._source):
            if await anext(copies, []) != records:
                return "the copy is not the same"
            self.checked += len(records)
        is_longer = bool(await anext(copies, []))
        self.pending = await count_pending(self._source)
        is_same = sorted(await target.read(select_drawn)) == sorted(
            await self._source.read(select_drawn)
        )
        if is_longer or await count_pending(target) != self.pending or not is_same:
            return "the copy has more, or less, than there was"
        return ""


async def count_pending(index: Index) -> int:
    """Return at how many places something is pending: a claim of one is as much as that it is
    dead."""
    count = 0
    async for pending in read_pending(index):
        for one in pending.values():
            places = set(one.dead)
            for (path, _), claimed in one.claims.items():
                places |= {(volume_of(place), place_path(path, place)) for place in claimed}
            count += len(places) + sum(map(len, one.tombstones.values()))
    return count


async def adopt(config: Config, options: argparse.Namespace, report: Report) -> None:
    """Make a volume the one that it is configured as: write its identity, and nothing else."""
    name = options.name
    await check_index(config.db)
    async with contextlib.AsyncExitStack() as stack:
        config = await stack.enter_async_context(open_volumes(config))
        if name not in {volume.name for volume in config.volumes}:
            raise ConfigError([f"VOLUME: {name} is not in the configuration"])
        store = Store(config, role=TOOL)  # not started, since that takes in what is new
        stack.push_async_callback(store.close)
        await store.index.open()
        clients = store.view.clients
        seen = await store.index.read(select_identities)
        shown = await read_answering(clients, name)
        found = shown[name]
        (root,) = await clients[name].get(["/"], LISTING_BYTES)
        listed = read_listing(root, "/") if root[0] == 200 else {}
        blobs, _ = (await store.index.read(read_totals)).get(name, (0, 0))
        report.facts = {"volume": name, "records": blobs, "root": sorted(listed)}
        report.facts["identity"] = found._asdict() if isinstance(found, Identity) else found
        report.facts["adopted"] = False
        folders = sum(re.fullmatch("/[0-9a-f]{2}", path) is not None for path in listed)
        report.lines = [
            f"{clients[name].volume.url}: {describe_identity(found)}, {folders} folders of blobs",
            f"{blobs} records name {name}",
        ]
        identity = Identity(seen[STORE_ID], name, draw_number())
        if judge_identity(found, identity.store, name, seen.get(name)).standing is Standing.RIGHT:
            report.lines.append("it is the one that was last seen: nothing is to be done")
            return
        if refusal := explain_adoption(shown, name, identity.store):
            raise ToolError(f"{name} is not adopted: {refusal}")
        await clients[name].write_identity(identity)
        shown = await read_answering(clients, name)
        if shown[name] != identity:
            raise ToolError(
                f"{name} is not adopted: it shows {describe_identity(shown[name])} now"
            )
        if refusal := explain_adoption(shown, name, identity.store):
            raise ToolError(f"{name} is not adopted: {refusal}")
        await store.index.write(
            partial(keep_identity, name=name, number=identity.number, anew=True)
        )
        report.facts["adopted"] = True
        report.lines.append(f"{name} is adopted: a server takes it up within seconds")


async def read_answering(clients: Clients, needed: str) -> dict[str, Shown]:
    """Read the identity of `needed`, and of all others that answer; raises VolumeError."""
    shown = dict[str, Shown]()

    async def read(name: str) -> None:
        try:
            shown[name] = await clients[name].read_identity()
        except VolumeError:
            if name == needed:
                raise

    await asyncio.gather(*map(read, clients))
    return shown


def describe_identity(shown: Shown) -> str:
    if isinstance(shown, Identity):
        return f"volume {shown.volume} of store {shown.store}, number {shown.number}"
    return "no identity" if shown is None else f"no identity that can be read ({shown})"


async def forget(config: Config, options: argparse.Namespace, report: Report) -> None:
    """Give up what waits to be deleted on a volume that will not come back."""
    name = options.name
    index = Index(config.db)
    embedded = {f"volume{i}" for i in range(1, EMBEDDED_VOLUMES + 1)}
    configured = {volume.name for volume in config.volumes} or embedded
    if name in configured:
        reason = "is in the configuration: take it out, reload, rebalance, then forget it"
        raise ConfigError([f"NAME: {name} {reason}"])
    await check_index(config.db)
    await index.open()
    try:
        totals = await index.read(read_totals)
        waiting = await index.read(select_dead, name)
        if name in (ALL_KEYS, GARBAGE) or not (name in totals or waiting):
            raise ConfigError([f"NAME: the index knows no volume {name}"])
        blobs, _ = totals.get(name, (0, 0))
        if blobs:
            raise ToolError(f"{blobs} records still name {name}: rebalance first")
        count = 0
        while waiting:
            paths = [path for _, path in waiting]
            await index.write(partial(forget_places, places=waiting), paths=paths)
            count += len(waiting)
            waiting = await index.read(select_dead, name)
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
GRACE = argument(
    "--grace", metavar="S", type=SECONDS, default=3600.0,
    help="s; younger files are left alone [3600]",
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
        "meanwhile is left alone: run it again until it exits with 0, and also after it was "
        "killed.",
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
            GRACE,
            LIMIT_RATE,
        ],
        ALL_SETTINGS,
        "A record with fewer replicas than `replicas` is a fault (exit code 1), also one that a "
        "PUT left behind with a lower `min_replicas`. A repair goes to a new place; one that "
        "fails leaves the record as it was. What no record names is removed only if this index "
        "has given its version out, and only if every volume could be read, every key has a good "
        f"replica, and it is not more than there are keys. {FULL_FOLDER}",
    ),
    "discard": Command(
        discard,
        "Delete from one volume what this index does not know, while the server runs: say how "
        "much that is, and with --yes do it.",
        [
            argument("name", metavar="VOLUME", help="its name"),
            argument("--yes", action="store_true", help="really"),
            GRACE,
        ],
        ALL_SETTINGS,
        "What was written by another index, or before this one was made without a copy of the old "
        "one, is named by verify, and never removed by it: the index may be the wrong one. Where "
        "that is not so, this deletes it. What belongs to a version that lives stays.",
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
    "adopt": Command(
        adopt,
        "Settle that what is at a volume's address is that volume, while the server runs. Says "
        "what is there and how many records name it, and writes its identity, nothing else.",
        [argument("name", metavar="VOLUME", help="its name in the configuration")],
        ALL_SETTINGS,
        "For a volume that is refused, with the reason in `status`: a disk that was replaced "
        "under its old name, or another store's that is to be used here. Where the disk is not "
        "mounted or the addresses are exchanged, mend that instead. What records name and is not "
        "there is for verify --repair afterwards.",
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
    if not is_url(config.db):  # for temporary tables
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
