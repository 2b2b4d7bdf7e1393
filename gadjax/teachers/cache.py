"""The teacher's answers, kept in SQLite: a row is one answer that is wanted, from its request to its text.

    pending --lease--> leased --record--> ok | refused | failed
       ^                  |                            |
       +- expiry, release-+                            +-- add (a later run tries again) --> pending

A row that is `ok` or `refused` stays what it is. Every method is one transaction that is on the disk when the method
returns (write-ahead log, `synchronous=FULL`): a process may be killed at any point, and several may collect at once.
"""

import json
import math
import sqlite3
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import NamedTuple, Self

from gadjax.errors import UserError
from gadjax.records import Message
from gadjax.teachers.requests import COLUMNS, Outcome, Request

LAYOUT = 3  # of the file; 1 had no reservations and batches, 2 nothing shared
BUSY_SECONDS = 60.0  # how long a writer waits for another process's transaction


class Lease(NamedTuple):
    """What became of the rows that somebody wants to ask for.

    Attributes:
        taken: keys that are now theirs to ask for.
        held: keys that somebody else holds.
        dear: keys of free rows for which the money is too short.
        reserved: US dollars that all rows under way may cost, whoever holds them.
    """

    taken: set[str]
    held: set[str]
    dear: set[str]
    reserved: float


@dataclass(frozen=True)
class Overview:
    """What a cache holds of one teacher.

    Attributes:
        provider, model: the teacher, as the keys say it.
        states: the number of rows in each state.
        truncated: answers that the length limit cut off.
        cost: US dollars.
        replied: the models' names as replied, and how often, the most frequent first.
        errors: why rows were refused or failed, and how often, the most frequent first.
    """

    provider: str
    model: str
    states: Mapping[str, int]
    truncated: int
    cost: float
    replied: Sequence[tuple[str, int]]
    errors: Sequence[tuple[str, int]]


ANSWERS = """
    CREATE TABLE IF NOT EXISTS answers (
        key TEXT PRIMARY KEY,
        request TEXT NOT NULL,
        state TEXT NOT NULL CHECK (state IN ('pending', 'leased', 'ok', 'refused', 'failed')),
        text TEXT NOT NULL DEFAULT '',
        finish_reason TEXT NOT NULL DEFAULT '',
        prompt_tokens INTEGER NOT NULL DEFAULT 0,
        completion_tokens INTEGER NOT NULL DEFAULT 0,
        cost REAL NOT NULL DEFAULT 0,
        model TEXT NOT NULL DEFAULT '',
        error TEXT NOT NULL DEFAULT '',
        owner TEXT,
        leased_until REAL,
        created REAL NOT NULL,
        updated REAL NOT NULL,
        reserved REAL NOT NULL DEFAULT 0
    ) STRICT
"""
BATCHES = """
    CREATE TABLE IF NOT EXISTS batches (
        token TEXT PRIMARY KEY,
        provider TEXT NOT NULL,
        batch TEXT NOT NULL DEFAULT '',
        created REAL NOT NULL
    ) STRICT
"""
SHARED = "CREATE TABLE IF NOT EXISTS shared (name TEXT PRIMARY KEY, numbers TEXT NOT NULL) STRICT"
RESERVED = "ALTER TABLE answers ADD COLUMN reserved REAL NOT NULL DEFAULT 0"
# Sums of money are made from it alone: the table has all the texts.
MONEY = "CREATE INDEX IF NOT EXISTS money ON answers (state, cost, reserved, leased_until)"


class TeacherCache:
    """The cache file, opened for reading and collecting. For one thread at a time.

    Args:
        path: the SQLite file; made where there is none.
        lease_seconds: a lease that its owner does not renew for so long may be taken by others.
        read_only: only for reading answers: the file must be there and stays as it is.

    Raises:
        UserError: the file is no cache of this version, or its file system cannot hold one.
    """

    def __init__(self, path: Path | str, lease_seconds: float = 30.0, *, read_only: bool = False):
        self.path, self.lease_seconds, self._read_only = Path(path), lease_seconds, read_only
        self._owner = uuid.uuid4().hex
        # SQLite's own mode for reading only would leave its -wal and -shm files behind.
        file = f"{self.path.absolute().as_uri()}?mode={'rw' if read_only else 'rwc'}"
        try:
            if not read_only:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(file, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False, uri=True)
            try:
                self._prepare()
            except BaseException:
                self._db.close()
                raise
        except (OSError, sqlite3.DatabaseError) as error:
            raise UserError(str(path), f"cannot be opened as a cache ({error})", "move the file away or name another folder") from error

    def _prepare(self) -> None:
        if self._read_only:
            self._db.execute("PRAGMA query_only = ON")
            self._check_version(*range(1, LAYOUT + 1))
            return
        mode = self._db.execute("PRAGMA journal_mode = WAL").fetchone()[0]
        if mode != "wal":
            raise UserError(str(self.path), "its file system allows no write-ahead log", "put the run's folder on a local disk")
        self._db.execute("PRAGMA synchronous = FULL")
        if self._check_version(*range(LAYOUT + 1)) == LAYOUT:
            return  # nothing is written by opening
        with self._transaction():
            version = self._check_version(*range(LAYOUT + 1))  # another process may have been first
            for statement in {0: (ANSWERS, MONEY, BATCHES, SHARED), 1: (RESERVED, MONEY, BATCHES, SHARED), 2: (SHARED,)}.get(version, ()):
                self._db.execute(statement)
            self._db.execute(f"PRAGMA user_version = {LAYOUT}")

    def _check_version(self, *allowed: int) -> int:
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if version not in allowed:
            raise UserError(str(self.path), f"is a cache of version {version}, not {LAYOUT}", "use the gadjax that made it")
        return version

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file; leases that are still held run out by themselves."""
        self._db.close()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def add(self, requests: Iterable[Request]) -> None:
        """Makes a pending row of every request that has no answer yet, those that failed before among them."""
        now = time.time()
        rows = ((request.key, request.json, now, now) for request in requests)
        statement = """
            INSERT INTO answers (key, request, state, created, updated) VALUES (?, ?, 'pending', ?, ?)
            ON CONFLICT (key) DO UPDATE SET state = 'pending', updated = excluded.updated WHERE state = 'failed'
        """
        with self._transaction():
            self._db.executemany(statement, rows)

    def lease(self, costs: Mapping[str, float], limit: float = math.inf, owner: str = "", seconds: float = 0.0) -> Lease:
        """Takes rows that are pending, or whose lease has run out, as far as the money reaches.

        What the rows may cost is set aside until they have their outcome, for all who use the cache: what is spent and set
        aside together never exceeds the limit.

        Args:
            costs: the most that asking for a row may cost, in US dollars, by its key.
            limit: US dollars that all answers of the cache may cost together.
            owner: who holds the rows; by default this opened cache.
            seconds: for how long; by default `lease_seconds`.
        """
        now, wanted, ours = time.time(), json.dumps(list(costs)), owner or self._owner
        look = """
            SELECT key, state = 'pending' OR leased_until < ?, owner FROM answers
            WHERE key IN (SELECT value FROM json_each(?)) AND state IN ('pending', 'leased')
        """
        take = "UPDATE answers SET state = 'leased', owner = ?, leased_until = ?, reserved = ?, updated = ? WHERE key = ?"
        with self._transaction():
            found = {key: (free, holder) for key, free, holder in self._db.execute(look, (now, wanted))}
            spent, reserved = self._money(now)
            taken, dear = set[str](), set[str]()
            for key in (key for key in costs if key in found and found[key][0]):
                if costs[key] and spent + reserved + costs[key] > limit:
                    dear.add(key)
                else:
                    taken.add(key)
                    reserved += costs[key]
            until = now + (seconds or self.lease_seconds)
            self._db.executemany(take, ((ours, until, costs[key], now, key) for key in taken))
        held = {key for key, (free, holder) in found.items() if not free and holder != ours}
        return Lease(taken, held, dear, reserved)

    def reserve(self, key: str, cost: float, limit: float) -> bool:
        """Sets aside `cost` in all for a row that is leased to us. False: the limit does not allow it, and nothing is changed."""
        with self._transaction():
            spent, reserved = self._money(time.time())
            before = self._db.execute("SELECT reserved FROM answers WHERE key = ?", (key,)).fetchone()[0]
            if cost > before and spent + reserved - before + cost > limit:
                return False
            self._db.execute("UPDATE answers SET reserved = ? WHERE key = ?", (cost, key))
        return True

    def _money(self, now: float) -> tuple[float, float]:
        """US dollars that are spent, and that are set aside for what is under way."""
        statement = """
            SELECT coalesce(sum(cost), 0.0), coalesce(sum(reserved) FILTER (WHERE state = 'leased' AND leased_until >= ?), 0.0)
            FROM answers
        """
        return self._db.execute(statement, (now,)).fetchone()

    def renew(self) -> None:
        """Holds on to what is leased for another `lease_seconds`."""
        with self._transaction():
            self._db.execute(
                "UPDATE answers SET leased_until = ? WHERE state = 'leased' AND owner = ?", (time.time() + self.lease_seconds, self._owner)
            )

    def release(self) -> None:
        """Gives back what is leased and has no outcome."""
        with self._transaction():
            self._db.execute("UPDATE answers SET state = 'pending' WHERE state = 'leased' AND owner = ?", (self._owner,))

    def record(self, outcomes: Iterable[tuple[Request, Outcome]], replace: bool = False) -> None:
        """Keeps outcomes. A row that is `ok` or `refused` already keeps what it has, unless `replace` is set.

        What failed tries of a row have cost is kept with it.
        """
        now = time.time()
        rows = [(request.key, request.json, now, now, *astuple(outcome)) for request, outcome in outcomes]
        places = ", ".join("?" * (4 + len(COLUMNS)))
        news = ", ".join(f"{name} = excluded.{name}" for name in ("updated", *COLUMNS) if name != "cost")
        cost = "excluded.cost" if replace else "answers.cost + excluded.cost"
        guard = "" if replace else "WHERE state NOT IN ('ok', 'refused')"
        statement = f"""
            INSERT INTO answers (key, request, created, updated, {", ".join(COLUMNS)}) VALUES ({places})
            ON CONFLICT (key) DO UPDATE SET {news}, cost = {cost}, owner = NULL, leased_until = NULL {guard}
        """
        with self._transaction():
            self._db.executemany(statement, rows)

    def begin_batch(self, token: str, provider: str) -> None:
        """Writes down that a batch is about to be made; its rows are leased to the token."""
        with self._transaction():
            self._db.execute("INSERT INTO batches (token, provider, created) VALUES (?, ?, ?)", (token, provider, time.time()))

    def name_batch(self, token: str, batch: str) -> None:
        """Writes down what the endpoint calls the batch."""
        with self._transaction():
            self._db.execute("UPDATE batches SET batch = ? WHERE token = ?", (batch, token))

    def open_batches(self, provider: str) -> list[tuple[str, str]]:
        """The tokens of the batches that are under way, and their names; a name is empty where it is not known that one was made."""
        return self._db.execute("SELECT token, batch FROM batches WHERE provider = ? ORDER BY created", (provider,)).fetchall()

    def in_batch(self, token: str) -> dict[str, Request]:
        """The requests of a batch that have no outcome yet, by their key."""
        statement = "SELECT key, request FROM answers WHERE state = 'leased' AND owner = ?"
        return {key: Request.parse(request) for key, request in self._db.execute(statement, (token,))}

    def end_batch(self, token: str) -> None:
        """Forgets a batch; its requests without an outcome are pending again."""
        with self._transaction():
            self._db.execute("UPDATE answers SET state = 'pending' WHERE state = 'leased' AND owner = ?", (token,))
            self._db.execute("DELETE FROM batches WHERE token = ?", (token,))

    @contextmanager
    def shared(self, name: str) -> Iterator[dict[str, float]]:
        """Numbers that all who use the cache have in common; what is changed in them within is changed for all.

        This alone may be forgotten when the power fails: it is not waited for.
        """
        self._db.execute("PRAGMA synchronous = NORMAL")
        try:
            with self._transaction():
                row = self._db.execute("SELECT numbers FROM shared WHERE name = ?", (name,)).fetchone()
                numbers: dict[str, float] = json.loads(row[0]) if row else {}
                yield numbers
                self._db.execute("INSERT OR REPLACE INTO shared (name, numbers) VALUES (?, ?)", (name, json.dumps(numbers)))
        finally:
            self._db.execute("PRAGMA synchronous = FULL")

    def outcomes(self, keys: Iterable[str]) -> dict[str, Outcome]:
        """The outcomes of those keys that have one."""
        statement = f"""
            SELECT key, {", ".join(COLUMNS)} FROM answers
            WHERE key IN (SELECT value FROM json_each(?)) AND state IN ('ok', 'refused', 'failed')
        """
        return {key: Outcome(*values) for key, *values in self._db.execute(statement, (json.dumps(list(keys)),))}

    def answered(self, keys: Iterable[str]) -> set[str]:
        """Those of `keys` that have an answer or a refusal."""
        statement = "SELECT key FROM answers WHERE key IN (SELECT value FROM json_each(?)) AND state IN ('ok', 'refused')"
        return {key for (key,) in self._db.execute(statement, (json.dumps(list(keys)),))}

    def tally(self, keys: Iterable[str]) -> list[tuple[str, str, int, float]]:
        """State, finish reason, number of rows and their cost, for each pair of the first two that occurs among `keys`."""
        statement = """
            SELECT state, finish_reason, count(*), sum(cost) FROM answers
            WHERE key IN (SELECT value FROM json_each(?)) GROUP BY state, finish_reason ORDER BY state, finish_reason
        """
        return self._db.execute(statement, (json.dumps(list(keys)),)).fetchall()

    def replies(self, keys: Iterable[str], count: int) -> list[tuple[Request, Outcome]]:
        """Up to `count` requests among `keys` that the teacher has replied to, with their outcomes; drawn by lot, always the same."""
        statement = f"""
            SELECT request, {", ".join(COLUMNS)} FROM answers
            WHERE key IN (SELECT value FROM json_each(?)) AND state IN ('ok', 'refused') AND prompt_tokens > 0 ORDER BY key LIMIT ?
        """
        rows = self._db.execute(statement, (json.dumps(list(keys)), count))
        return [(Request.parse(request), Outcome(*values)) for request, *values in rows]

    def conversations(self, provider: str, model: str) -> list[tuple[Message, ...]]:
        """What a teacher was asked, or was said to have been asked, each conversation once, in the order in which they came."""
        statement = """
            SELECT DISTINCT json_extract(request, '$.messages') FROM answers
            WHERE json_extract(request, '$.provider') = ? AND json_extract(request, '$.model') = ? ORDER BY rowid
        """
        return [tuple(json.loads(messages)) for (messages,) in self._db.execute(statement, (provider, model))]

    def overview(self, shown: int = 8) -> list[Overview]:
        """What there is of each teacher; of names and errors the `shown` most frequent ones."""
        teacher = "json_extract(request, '$.provider') AS provider, json_extract(request, '$.model') AS asked"
        statement = f"""
            SELECT {teacher}, state, model, error, finish_reason = 'length', count(*), sum(cost) FROM answers
            GROUP BY provider, asked, state, model, error, finish_reason = 'length' ORDER BY provider, asked
        """
        found = dict[tuple[str, str], list[tuple[str, str, str, int, int, float]]]()
        for provider, asked, *row in self._db.execute(statement):
            found.setdefault((provider, asked), []).append(tuple(row))
        return [_overview(*teacher, rows, shown) for teacher, rows in found.items()]

    def cost(self) -> float:
        """US dollars that all answers of the cache have cost."""
        return self._db.execute("SELECT coalesce(sum(cost), 0.0) FROM answers").fetchone()[0]


def _overview(provider: str, asked: str, rows: Sequence[tuple[str, str, str, int, int, float]], shown: int) -> Overview:
    states, models, errors = Counter[str](), Counter[str](), Counter[str]()
    for state, model, error, _, count, _ in rows:
        states[state] += count
        models[model] += count * bool(model)
        errors[error] += count * bool(error)
    truncated = sum(count for state, _, _, cut, count, _ in rows if cut and state == "ok")
    replied, reasons = ([each for each in counts.most_common(shown) if each[1]] for counts in (models, errors))
    return Overview(provider, asked, states, truncated, sum(row[-1] for row in rows), replied, reasons)
