"""Count lines of code: those that hold something else than blanks, comments and docstrings.

    python .ci/code_lines.py [FOLDER] [--files] [--against REVISION]

Lines are summed by room: a folder below FOLDER (default deflow_torchrl); FOLDER's own files stand by themselves. ``--files``
sums by file, ``--against`` adds the counts of another git revision.
"""

import argparse
import ast
import io
import subprocess
import tarfile
import tokenize
from collections import Counter
from pathlib import Path

_NO_CODE = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING, tokenize.ENDMARKER,
}  # fmt: skip
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def code_lines(source: str) -> int:
    """Number of lines with code."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, _DOCUMENTED) and ast.get_docstring(node) is not None:
            lines.difference_update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


def count(sources: dict[str, str], *, by_file: bool) -> Counter:
    """Lines of each room or file; ``sources`` maps paths inside the folder to their text."""
    counts: Counter = Counter()
    for path, source in sources.items():
        room = path if by_file or "/" not in path else path.split("/")[0] + "/"
        counts[room] += code_lines(source)
    return counts


def sources_here(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*.py"))}


def sources_of(folder: Path, revision: str) -> dict[str, str]:
    command = ["git", "archive", revision, "."]  # of the folder it is called in
    archive = subprocess.run(command, cwd=folder, check=True, capture_output=True)
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
        files = [file for file in tar.getmembers() if file.isfile() and file.name.endswith(".py")]
        return {file.name: tar.extractfile(file).read().decode("utf-8") for file in files}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parents[1] / "deflow_torchrl")
    parser.add_argument("--files", action="store_true", help="count by file")
    parser.add_argument("--against", metavar="REVISION", help="compare with this git revision")
    options = parser.parse_args()
    now = count(sources_here(options.folder), by_file=options.files)
    if options.against is None:
        rows = [(room, f"{lines:,}") for room, lines in now.most_common()]
        header, sums = ("", "lines"), ("total", f"{now.total():,}")
    else:
        then = count(sources_of(options.folder, options.against), by_file=options.files)
        rooms = sorted(now.keys() | then.keys(), key=lambda room: -max(now[room], then[room]))
        rows = [(room, f"{then[room]:,}", f"{now[room]:,}", f"{now[room] - then[room]:+,}") for room in rooms]
        header = ("", options.against[:12], "now", "change")
        sums = ("total", f"{then.total():,}", f"{now.total():,}", f"{now.total() - then.total():+,}")
    width = max(len(row[0]) for row in [*rows, sums])
    for row in [header, *rows, sums]:
        print(row[0].ljust(width), *(cell.rjust(12) for cell in row[1:]))


if __name__ == "__main__":
    main()
