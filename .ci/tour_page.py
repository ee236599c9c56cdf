"""MkDocs hook: examples/tour.py as a page.

Its cells are run in the quick setting; what a cell prints, and the pictures it writes into ``TOUR_OUT``, stand below it.
"""

import contextlib
import io
import os
import re
import tempfile
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

TOUR = Path(__file__).parents[1] / "examples" / "tour.py"
NOTE = """!!! note
    This page was made with `TOUR_QUICK=1`, which learns nothing. Its numbers and pictures show what the cells write, not what
    they reach.

"""


def pages(script: Path, out: Path) -> tuple[str, dict[str, bytes]]:
    """Run a script in percent format: the page in Markdown, and its pictures by name."""
    text, pictures, names = "", {}, {"__name__": "tour"}
    for head, cell in re.findall(r"^# %%(.*)\n((?:(?!# %%).*\n?)*)", script.read_text(encoding="utf-8"), re.M):
        if "markdown" in head:
            text += re.sub(r"^# ?", "", cell, flags=re.M) + "\n"
            text += NOTE if not pictures and "# A tour" in cell else ""
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
            exec(compile(cell, str(script), "exec"), names)
        text += f"```python\n{cell.strip()}\n```\n\n"
        text += f"```text\n{printed.getvalue().strip()}\n```\n\n" if printed.getvalue().strip() else ""
        for path in sorted(out.glob("*.*")):
            if path.suffix in (".png", ".webp") and path.name not in pictures:
                pictures[path.name] = path.read_bytes()
                text += f"![{path.stem}](tour/{path.name})\n\n"
    return text, pictures


def on_files(files: Files, config: Any) -> Files:
    """Add the page and its pictures."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(TOUR_QUICK="1", TOUR_OUT=folder, MPLBACKEND="Agg", DEFLOW_HOME=folder)
        text, pictures = pages(TOUR, Path(folder))
        text = text.replace(f"{folder}/", "tour/")
    files.append(File.generated(config, "tour.md", content=text))
    for name, content in pictures.items():
        files.append(File.generated(config, f"tour/{name}", content=content))
    return files
