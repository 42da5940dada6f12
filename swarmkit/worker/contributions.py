"""What this computer has contributed, by hour, in an SQLite file that survives crashes."""

from __future__ import annotations

import contextlib
import sqlite3
from dataclasses import astuple, dataclass, fields
from datetime import date, datetime, timedelta
from pathlib import Path

from swarmkit.worker.control.values import Day, Totals

_HOUR_S = 3600


@dataclass
class Share:
    """What was contributed since it was last written down."""

    tokens: int = 0
    sessions: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    serving_s: float = 0.0
    working_s: float = 0.0

    def add(self, other: Share) -> None:
        """Add what somebody else counted."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


_NAMES = tuple(field.name for field in fields(Share))
_SUMS = ", ".join(f"coalesce(sum({name}), 0)" for name in _NAMES)


class Contributions:
    """The history. What cannot be written yet, because the disk is full, is kept and written later.

    Used by one thread. Attributes:
        trouble: why the history cannot be written at present, in words; else empty.
    """

    def __init__(self, path: Path, days: int) -> None:
        """Open the history.

        Args: days: for how many days it is kept.
        """
        self.trouble = ""
        self._path, self._days = path, days
        self._unwritten: dict[int, Share] = {}  # by hour
        self._database = self._opened()

    def add(self, share: Share, now: float) -> None:
        """Add what was contributed in the hour of `now`, Unix time; `write` writes it down."""
        self._unwritten.setdefault(int(now // _HOUR_S), Share()).add(share)

    def write(self, now: float) -> None:
        """Write down what was added, and forget what is too old."""
        columns = ", ".join(f"{name} = {name} + excluded.{name}" for name in _NAMES)
        places = ", ".join("?" * (1 + len(_NAMES)))
        try:
            with self._database:
                for hour, share in self._unwritten.items():
                    self._database.execute(
                        f"insert into hours values ({places}) on conflict (hour) do update set {columns}",
                        (hour, *astuple(share)),
                    )
                oldest = int(now // _HOUR_S) - 24 * self._days
                self._database.execute("delete from hours where hour < ?", (oldest,))
        except sqlite3.Error as error:
            self.trouble = f"The history of contributions cannot be written at present: {error}."
        else:
            self._unwritten.clear()
            self.trouble = ""

    def between(self, start: float, stop: float) -> Totals:
        """What was contributed in the hours from `start` to before `stop`, Unix time."""
        low, high = int(start // _HOUR_S), -int(-stop // _HOUR_S)
        share = Share()
        with contextlib.suppress(sqlite3.Error):
            row = self._database.execute(
                f"select {_SUMS} from hours where hour >= ? and hour < ?", (low, high)
            ).fetchone()
            share = Share(*row)
        for hour, unwritten in self._unwritten.items():
            if low <= hour < high:
                share.add(unwritten)
        return Totals(**vars(share))

    def all(self) -> Totals:
        """What was contributed in all, as far as it is remembered."""
        return self.between(0, 2**40)

    def day(self, day: date) -> Totals:
        """What was contributed on a day of the computer's local time."""
        start, stop = (datetime(d.year, d.month, d.day).timestamp() for d in (day, day + timedelta(days=1)))
        return self.between(start, stop)

    def month(self, day: date) -> Totals:
        """What was contributed in the month of a day, by the computer's local time."""
        first = day.replace(day=1)
        after = (first + timedelta(days=32)).replace(day=1)
        start, stop = (datetime(d.year, d.month, 1).timestamp() for d in (first, after))
        return self.between(start, stop)

    def days(self, last: date, count: int) -> list[Day]:
        """Each of the `count` days up to and with `last`, the oldest first."""
        days = (last - timedelta(days=count - 1 - index) for index in range(count))
        return [Day(date=day.isoformat(), totals=self.day(day)) for day in days]

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def _opened(self) -> sqlite3.Connection:
        try:
            return _with_table(self._path)
        except sqlite3.DatabaseError as error:
            self.trouble = f"The history of contributions could not be read ({error})"
            aside = self._path.with_name(f"{self._path.name}.unusable")
            with contextlib.suppress(OSError):
                self._path.replace(aside)
                self.trouble += f"; it was kept as {aside}, and a new one was begun."
        try:
            return _with_table(self._path)
        except sqlite3.Error:
            return _with_table(Path(":memory:"))


def _with_table(path: Path) -> sqlite3.Connection:
    database = sqlite3.connect(path, timeout=1.0, check_same_thread=False)
    columns = ", ".join(f"{name} numeric not null" for name in _NAMES)
    try:
        with database:
            database.execute(f"create table if not exists hours (hour integer primary key, {columns})")
    except sqlite3.Error:
        database.close()
        raise
    return database
