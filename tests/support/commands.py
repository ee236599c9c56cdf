"""Run command lines of ``deflow`` in one process: a JSON list of argument lists comes in, one of what each printed goes out.

The first that exits with another code than 0 ends the process with that code.
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
