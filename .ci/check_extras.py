"""Hold every extra of pyproject.toml, and the package without one, against constraints.txt: pip must be able to install it.

    python .ci/check_extras.py [EXTRA...]

pip resolves and installs nothing. An extra fails where a pin contradicts a requirement, and where a package it brings has no pin.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def requirements(extra: str) -> list[str]:
    """What an extra adds, its references to other extras resolved, and what the package needs without one."""
    texts = PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]
    found: list[str] = []
    for text in texts:
        requirement = Requirement(text)
        own = canonicalize_name(requirement.name) == PROJECT["name"]
        found += [more for other in sorted(requirement.extras) for more in requirements(other)] if own else [text]
    return found


def fault(extra: str, pinned: set[str]) -> str | None:
    """Why the extra cannot be installed with the pins, or None."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--disable-pip-version-check"]
        command += [
            "--report",
            str(report),
            "-c",
            str(ROOT / "constraints.txt"),
            *requirements(""),
            *requirements(extra),
        ]
        try:
            result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        except subprocess.TimeoutExpired:
            return "pip found no answer in 300 seconds; pin the package whose versions it tries one by one"
        if result.returncode:
            errors = [line for line in result.stderr.splitlines() if not line.startswith("WARNING")]
            return " ".join(errors)
        packages = [package["metadata"] for package in json.loads(report.read_text(encoding="utf-8"))["install"]]
    unpinned = [f"{it['name']}=={it['version']}" for it in packages if canonicalize_name(it["name"]) not in pinned]
    return f"without a pin: {', '.join(unpinned)}" if unpinned else None


def main() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {canonicalize_name(line.partition("==")[0]) for line in lines if "==" in line and not line.startswith("#")}
    extras = sys.argv[1:] or ["", *PROJECT["optional-dependencies"]]
    failed = False
    with ThreadPoolExecutor(max_workers=4) as pool:  # pip waits for its index most of the time
        for extra, found in zip(extras, pool.map(lambda extra: fault(extra, pinned), extras), strict=True):
            print(f"{extra or '(no extra)'}: {found or 'installs with constraints.txt'}", flush=True)
            failed |= found is not None
    sys.exit(failed)


if __name__ == "__main__":
    main()
