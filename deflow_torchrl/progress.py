# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""One progress bar for everything that takes more than a few seconds: on standard error, with an ETA."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def progress_bar(iterable: Iterable[Any] | None = None, **kwargs: Any) -> tqdm:
    """``tqdm`` that redraws in a terminal and, in a file, prints its state every ten seconds."""
    terminal = sys.stderr.isatty()
    return tqdm(iterable, dynamic_ncols=terminal, mininterval=0.1 if terminal else 10.0, **kwargs)


def patient_bar(iterable: Iterable[Any] | None = None, **kwargs: Any) -> tqdm:
    """A bar for work that usually takes no time: shown after three seconds, gone when it is done."""
    return progress_bar(iterable, **{"delay": 3.0, "leave": False, **kwargs})


def byte_bar(desc: str, total: int | None, *, initial: int = 0, show: bool = True, delay: float = 0.0) -> tqdm:
    """A bar in bytes from ``initial`` on, shown after ``delay`` seconds; closing removes it unless ``leave`` was set."""
    return patient_bar(
        desc=desc,
        total=total,
        initial=initial,
        disable=not show,
        delay=delay,
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
    )


def clock(seconds: float) -> str:
    """Hours, minutes and seconds, from an hour on without the seconds.

    Examples:
        >>> clock(65), clock(7300), clock(200_000)
        ('1:05', '2 h 01 min', '2 d 7 h')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes}:{rest:02d}"
