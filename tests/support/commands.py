"""Run several command lines of ``deflow`` in one process.

Reads a JSON list of argument lists and writes a JSON list of their outputs. Stops at the first exit code other than 0.
"""

import contextlib
import io
import json
import sys

if __name__ == "__main__":
    from deflow_torchrl.cli import main

    printed = []
    for arguments in json.load(sys.stdin):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            try:
                main(arguments)
            except SystemExit as left:
                if left.code:
                    raise
        printed.append(out.getvalue())
    json.dump(printed, sys.stdout)
