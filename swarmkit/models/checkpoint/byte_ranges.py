"""Ranges of bytes of a file, and which of them are missing, or better asked for together."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class ByteRange(NamedTuple):
    """Bytes `[start, stop)` of a file."""

    start: int
    stop: int


def merge(spans: Iterable[ByteRange]) -> list[ByteRange]:
    """Return the same bytes as few ranges, in order."""
    merged: list[ByteRange] = []
    for span in sorted(span for span in spans if span.start < span.stop):
        if merged and span.start <= merged[-1].stop:
            merged[-1] = ByteRange(merged[-1].start, max(merged[-1].stop, span.stop))
        else:
            merged.append(span)
    return merged


def subtract(wanted: Iterable[ByteRange], had: Iterable[ByteRange]) -> list[ByteRange]:
    """Return the bytes of `wanted` that are not in `had`, in order."""
    rest: list[ByteRange] = []
    holes = merge(had)
    for span in merge(wanted):
        start = span.start
        for hole in holes:
            if hole.stop <= start or hole.start >= span.stop:
                continue
            if hole.start > start:
                rest.append(ByteRange(start, hole.start))
            start = hole.stop
        if start < span.stop:
            rest.append(ByteRange(start, span.stop))
    return rest


def coalesce(spans: Iterable[ByteRange], spare_bytes: int) -> list[ByteRange]:
    """Return fewer, longer ranges that hold all of `spans` and at most `spare_bytes` besides.

    The smallest gaps are bridged first: each costs its bytes and saves one request.
    """
    apart = merge(spans)
    gaps = sorted(range(1, len(apart)), key=lambda i: apart[i].start - apart[i - 1].stop)
    bridged = []
    for i in gaps:
        gap = ByteRange(apart[i - 1].stop, apart[i].start)
        spare_bytes -= gap.stop - gap.start
        if spare_bytes < 0:
            break
        bridged.append(gap)
    return merge([*apart, *bridged])


def length(spans: Iterable[ByteRange]) -> int:
    """Return the bytes of ranges that do not overlap."""
    return sum(span.stop - span.start for span in spans)
