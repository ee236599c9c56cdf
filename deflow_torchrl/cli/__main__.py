# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""``python -m deflow_torchrl.cli``."""

from deflow_torchrl.cli import main

if __name__ == "__main__":
    main()
