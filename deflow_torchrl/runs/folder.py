# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Run folders: names of their files, the settings they hold, and folders of several seeds."""

from __future__ import annotations

import shlex
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from deflow_torchrl.errors import InputError
from deflow_torchrl.paths import hold_lock, write_text
from deflow_torchrl.runs.settings import SettledConfig

CONFIG_FILE = "config.yaml"
GROUP_FILE = "group.yaml"  # beside the run folders of seeds that are trained together
SUMMARY_FILE = "summary.json"
BANK_FILE = "base_actions.pt"
CHECKPOINTS = "checkpoints"
VIDEOS = "videos"
SWEEP_LOCK = ".sweep.lock"  # in a sweep's folder
LOCK_FILE = ".lock"  # there while a process works on the folder

_held: dict[Path, int] = {}  # folder -> the thread of this process that holds it


@contextmanager
def hold_folders(folders: Sequence[Path], *, distrust_hosts: bool = True) -> Iterator[None]:
    """Keep other processes from writing in run folders during the block; blocks of one thread may be nested.

    Folders that were created for it and stay empty are removed at the end.

    Args:
        folders: run folders, or a group's folder and those of its runs.

    Keyword Args:
        distrust_hosts: as in :func:`~deflow_torchrl.paths.hold_lock`.

    Raises:
        LockHeldError: where another process works in one of them: names it and the lock file.
        InputError: where they cannot be written.
    """
    new = [path for out in folders for path in (out, *out.parents) if not path.exists()]
    with ExitStack() as stack:
        stack.callback(_remove_empty, new)
        for out in folders:
            key = out.resolve()
            if _held.get(key) == threading.get_ident():
                continue
            busy = f"another process works in {out}"
            stack.enter_context(hold_lock(out / LOCK_FILE, busy=busy, distrust_hosts=distrust_hosts))
            _held[key] = threading.get_ident()
            stack.callback(_held.pop, key)
        yield


def _remove_empty(folders: Sequence[Path]) -> None:
    for path in folders:
        with suppress(OSError):
            path.rmdir()


def read_settings(path: Path) -> dict[str, Any]:
    """Read a run's :data:`CONFIG_FILE` or a group's :data:`GROUP_FILE`.

    Returns:
        ``config``, ``final_episodes``, the ``command`` that began it (or None), the seeds it was ``stacked`` with (or None) and
        whether a group has ``finished``.

    Raises:
        InputError: if it is damaged.
    """
    import yaml

    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
        needed = {key: settings[key] for key in ("config", "final_episodes")}
        return {"command": None, "stacked": None, "finished": False, **settings, **needed}
    except (OSError, yaml.YAMLError, UnicodeDecodeError, TypeError, KeyError) as error:
        raise InputError(f"{path} is damaged: {' '.join(str(error).split())}") from error


def write_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Write settings for :func:`read_settings`."""
    import yaml

    write_text(path, yaml.safe_dump(dict(settings), sort_keys=False))


def read_run_settings(out: Path) -> dict[str, Any]:
    """Read the settings of one run, as :func:`read_settings`.

    Raises:
        InputError: if ``out`` is no run folder, or holds the runs of several seeds.
    """
    if is_group(out) and not (out / CONFIG_FILE).is_file():
        seeds = read_settings(out / GROUP_FILE)["config"]["seeds"]
        raise InputError(
            f"{out} holds the runs of seeds {seeds}; name one of them, for example {seed_folder(out, seeds[0])}"
        )
    if not (out / CONFIG_FILE).is_file():
        raise InputError(f"{out} is not a run folder: it has no {CONFIG_FILE}")
    return read_settings(out / CONFIG_FILE)


def is_group(out: Path) -> bool:
    """Whether a folder holds the runs of seeds that were trained together."""
    return (out / GROUP_FILE).is_file()


def seed_folder(out: Path, seed: int) -> Path:
    """The run folder of a seed that is trained together with others in ``out``."""
    return out / f"seed{seed}"


def seed_configs(config: SettledConfig) -> list[SettledConfig]:
    """The settings of each run: those of every seed where there are several, else ``config`` alone."""
    if config.seeds is None:
        return [config]
    folder = Path(config.out or "")
    return [replace(config, seeds=None, seed=seed, out=str(seed_folder(folder, seed))) for seed in config.seeds]


def check_free(out: Path) -> None:
    """Raise InputError if ``out`` already holds a run."""
    if (out / CONFIG_FILE).exists() or (out / GROUP_FILE).exists():
        raise InputError(
            f"{out} already holds a run; go on with `deflow resume {out}` or choose another folder with out="
        )


def check_free_of_group(out: Path) -> None:
    """Raise InputError if the run in ``out`` belongs to a group that is still training."""
    stacked, group = read_run_settings(out)["stacked"], out.absolute().parent
    if stacked and is_group(group) and not read_settings(group / GROUP_FILE)["finished"]:
        raise InputError(
            f"{out} is trained together with the runs of seeds {stacked}, which are not finished; go on with all of them: "
            f"deflow resume {shlex.quote(str(group))}"
        )
