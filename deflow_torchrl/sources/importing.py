# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Files of a user's own made into a folder to train on: ``deflow data import``."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deflow_torchrl.data.dataset import TransitionDataset, make_folder
from deflow_torchrl.sources.card import data_card, write_card
from deflow_torchrl.sources.files import import_files


def import_folder(
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], out: Path, **options: Any
) -> tuple[TransitionDataset, dict[str, Any]]:
    """Turn files into a checked data set in a folder of its own, with its card as JSON and Markdown.

    Args:
        paths: files as :func:`import_files` takes them.
        out: the folder, which must not exist or be empty; its parents are made.
        options: the keyword arguments of :func:`import_files` but for ``folder``.

    Returns:
        The transitions, and the card (:func:`data_card`).

    Raises:
        InputError: on files, options or a folder that cannot be used; nothing is left behind then.
    """
    made = [parent for parent in out.parents if not parent.exists()]
    card: dict[str, Any] = {}

    def describe(dataset: TransitionDataset, folder: Path) -> None:
        card.update(data_card(dataset, name=out.name))
        write_card(card, folder)

    try:
        dataset = make_folder(out, lambda folder: import_files(paths, folder=folder, **options), describe=describe)
    except BaseException:
        for parent in made:  # the deepest first; one that another process has filled stays
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise
    return dataset, card
