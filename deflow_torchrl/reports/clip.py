# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Clips: episodes of several policies side by side, as an animated picture (.webp, .gif) or a film (.mp4)."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deflow_torchrl.envs.drawing import ActedEpisode, EpisodeDrawing, Picture
from deflow_torchrl.errors import InputError, MissingExtraError
from deflow_torchrl.paths import atomic_write
from deflow_torchrl.processes import raise_if_stopped
from deflow_torchrl.progress import progress_bar
from deflow_torchrl.reports.figures import check_report_extra

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".mp4", ".gif", ".webp")
FRAMES_PER_SECOND = 15
PICTURES = 150
"""Pictures of an episode at most, where nothing else is asked for."""

_LINE, _GAP = 18, 6  # pixels
_INK, _PAPER, _SUCCESS, _FAILURE = "#1c1c1c", "#ffffff", "#007a4d", "#a34700"
_LAST = 1.2  # seconds that an episode's last frame stays
_QUALITY = 60  # of WebP, 0 to 100
_HELD = 10  # episodes whose frames fit into memory, where the format needs all of them at once

Frame = tuple["Image", float]
"""A picture and how many seconds it stays."""


def check_clip_file(path: Path, *, episodes: int = 1, force: bool = False) -> None:
    """Check that a clip of so many episodes can be written; called before anything is drawn.

    Raises:
        InputError: if ``path`` has another suffix than :data:`SUFFIXES`, is there already (unless ``force``), is in no folder, or
            has a format whose frames do not fit into memory.
        MissingExtraError: if the package that writes it is not installed.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"{path}: a clip ends in {', '.join(SUFFIXES)}")
    if path.is_dir():
        raise InputError(f"{path} is a folder; --out takes the file to write")
    if not path.parent.is_dir():
        raise InputError(f"the folder {path.parent} of {path.name} does not exist")
    if path.exists() and not force:
        raise InputError(f"{path} exists already; --force overwrites it, --out names another file")
    if episodes > _HELD and path.suffix.lower() != ".mp4":
        raise InputError(
            f"{path}: {episodes} episodes are too many for a {path.suffix}, {_HELD} at most; write an .mp4"
        )
    check_report_extra("PIL")
    if path.suffix.lower() == ".mp4" and importlib.util.find_spec("imageio_ffmpeg") is None:
        raise MissingExtraError("imageio-ffmpeg", "video")


def usual_interval(episodes: Mapping[str, Sequence[ActedEpisode]], *, pictures: int = PICTURES) -> int:
    """Steps from picture to picture such that the longest episode of any policy has ``pictures`` at most."""
    return max(1, *(-(-len(episode.actions) // pictures) for own in episodes.values() for episode in own))


def clip_frames(
    drawings: Mapping[str, EpisodeDrawing],
    episodes: Mapping[str, Sequence[ActedEpisode]],
    *,
    every: int,
    size: int,
    success: bool = True,
    notes: Sequence[str],
) -> Iterator[Frame]:
    """Draw episodes of several policies side by side, all from one start at a time.

    Args:
        drawings: policy -> what draws its episodes.
        episodes: policy -> its episodes, of all policies the same starts in the same order.

    Keyword Args:
        every: steps from picture to picture.
        size: height of a picture in pixels.
        success: whether the task is judged by success; otherwise the return so far is shown too.
        notes: a line about each start.
    """
    for note, *acted in zip(notes, *episodes.values(), strict=True):
        sources = [drawings[name].pictures(episode, every=every) for name, episode in zip(episodes, acted, strict=True)]
        shown: list[Picture | None] = [None] * len(sources)
        for pictures in itertools.zip_longest(*sources):
            shown = [new or old for new, old in zip(pictures, shown, strict=True)]
            panels = [
                _panel(name, picture, episode, size=size, success=success)
                for name, picture, episode in zip(episodes, shown, acted, strict=True)
                if picture is not None
            ]
            frame = _side_by_side(panels, note)
            yield frame, 1 / FRAMES_PER_SECOND
        yield frame, _LAST


def write_episodes(
    path: Path,
    drawings: Mapping[str, EpisodeDrawing],
    episodes: Mapping[str, Sequence[ActedEpisode]],
    *,
    every: int,
    show_progress: bool = True,
    **options: Any,
) -> None:
    """Draw episodes with a progress bar and write them as a clip; arguments as of :func:`clip_frames` and :func:`write_clip`."""
    longest = [max(len(episode.actions) for episode in start) for start in zip(*episodes.values(), strict=True)]
    total = sum(-(-steps // every) + 2 for steps in longest)  # the start before them, and the end once more
    with progress_bar(total=total, desc="draw", unit="frame", leave=False, disable=not show_progress) as bar:

        def watched() -> Iterator[Frame]:
            for frame in clip_frames(drawings, episodes, every=every, **options):
                raise_if_stopped()
                bar.update()
                yield frame

        write_clip(path, watched())


def write_clip(path: Path, frames: Iterable[Frame]) -> None:
    """Write a clip, beside and renamed; its suffix says in which format.

    Raises:
        InputError: if it cannot be written.
    """
    try:
        with atomic_write(path) as temporary:
            _WRITERS[path.suffix.lower()](temporary, iter(frames))
    except OSError as error:
        raise InputError(f"cannot write {path} ({error.strerror or error}); choose another file") from error


def _panel(name: str, picture: Picture, episode: ActedEpisode, *, size: int, success: bool) -> Image:
    """A picture below two lines: the policy, and the step with its outcome. A border marks success."""
    from PIL import Image, ImageDraw, ImageFont

    ended = picture.step == len(episode.actions)
    reached = picture.success or (ended and episode.success)
    said, colour = f"step {picture.step}", _INK
    if not success:
        said += f", return {picture.episode_return:.4g}"
    if reached:
        said, colour = f"{said}: success", _SUCCESS
    elif success and ended:
        said, colour = f"{said}: no success", _FAILURE
    drawn = Image.fromarray(picture.pixels)
    drawn = drawn.resize((round(drawn.width * size / drawn.height), size))
    panel = Image.new("RGB", (drawn.width, size + 2 * _LINE), _PAPER)
    panel.paste(drawn, (0, 2 * _LINE))
    pen = ImageDraw.Draw(panel)
    if reached:
        pen.rectangle((0, 2 * _LINE, drawn.width - 1, size + 2 * _LINE - 1), outline=_SUCCESS, width=4)
    font = ImageFont.load_default(13)
    pen.text((2, 1), name, _INK, font)
    pen.text((2, _LINE + 1), said, colour, font)
    return panel


def _side_by_side(panels: Sequence[Image], note: str) -> Image:
    """The panels above a line of text; width and height are even, as films need them."""
    from PIL import Image, ImageDraw, ImageFont

    width = sum(panel.width for panel in panels) + _GAP * (len(panels) - 1)
    height = max(panel.height for panel in panels)
    frame = Image.new("RGB", (width + width % 2, (height + _LINE + 1) // 2 * 2), _PAPER)
    left = 0
    for panel in panels:
        frame.paste(panel, (left, 0))
        left += panel.width + _GAP
    ImageDraw.Draw(frame).text((2, height + 1), note, _INK, ImageFont.load_default(12))
    return frame


def _write_picture(path: Path, frames: Iterator[Frame], *, format: str, **options: object) -> None:
    images, seconds = zip(*frames, strict=True)
    durations = [round(1000 * it) for it in seconds]
    images[0].save(path, format, save_all=True, append_images=images[1:], duration=durations, loop=0, **options)


def _write_webp(path: Path, frames: Iterator[Frame]) -> None:
    _write_picture(path, frames, format="WEBP", quality=_QUALITY, method=4)


def _write_gif(path: Path, frames: Iterator[Frame]) -> None:
    _write_picture(path, frames, format="GIF", optimize=True)


def _write_film(path: Path, frames: Iterator[Frame]) -> None:
    import imageio_ffmpeg

    first = next(frames)
    film = imageio_ffmpeg.write_frames(
        path,
        first[0].size,
        fps=FRAMES_PER_SECOND,
        macro_block_size=2,
        output_params=["-f", "mp4"],
        ffmpeg_log_level="error",
    )
    film.send(None)
    try:
        for image, seconds in itertools.chain([first], frames):
            for _ in range(round(seconds * FRAMES_PER_SECOND)):
                film.send(np.asarray(image).tobytes())
    finally:
        film.close()


_WRITERS = {".webp": _write_webp, ".gif": _write_gif, ".mp4": _write_film}
