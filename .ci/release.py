"""Build wheel and sdist, install each into a clean environment with its core dependencies alone, and run README's snippet.

    python .ci/release.py                              # with constraints.txt
    python .ci/release.py --pair 2.9.1 0.14.1          # with these versions of torch and torchrl instead

The files are left in dist/. Exit code 1 where a step fails.
"""

import argparse
import re
import shlex
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def snippet() -> str:
    """The Python snippet of README.md."""
    found = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    if len(found) != 1:
        sys.exit(f"README.md has {len(found)} Python snippets, one is expected")
    return found[0]


def call(*words: str | Path, **options: object) -> None:
    """Run a command, shown first; end where it fails."""
    print("$", shlex.join(map(str, words)), flush=True)
    if code := subprocess.run(list(map(str, words)), check=False, **options).returncode:  # type: ignore[call-overload]
        sys.exit(f"exit code {code}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--pair", nargs=2, metavar=("TORCH", "TORCHRL"), help="versions in the place of constraints.txt"
    )
    parser.add_argument("--pip-args", default="", help="more arguments of pip install")
    arguments = parser.parse_args()
    dist = ROOT / "dist"
    with tempfile.TemporaryDirectory() as folder:
        for name in ("build", "clean"):
            venv.create(Path(folder, name), with_pip=True)
        building, clean = (Path(folder, name, "bin", "python") for name in ("build", "clean"))
        pip = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check", *shlex.split(arguments.pip_args))
        call(building, *pip, "build")
        for old in dist.glob("deflow_torchrl-*"):
            old.unlink()
        call(building, "-m", "build", "--outdir", dist, ROOT)
        wheel = next(dist.glob("*.whl"))
        versions = ("-c", ROOT / "constraints.txt")
        if arguments.pair:
            versions = tuple(
                f"{name}=={version}" for name, version in zip(("torch", "torchrl"), arguments.pair, strict=True)
            )
        script = Path(folder, "snippet.py")
        script.write_text(snippet(), encoding="utf-8")
        call(clean, *pip, *versions, wheel)
        call(clean, script, cwd=folder)
        call(clean, *pip, "--no-deps", "--force-reinstall", next(dist.glob("*.tar.gz")))
        call(clean, script, cwd=folder)
        call(clean, "-m", "pip", "freeze")


if __name__ == "__main__":
    main()
