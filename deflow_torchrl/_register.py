# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""``load_dataset("ogbench:NAME")`` of TorchRL, in any script that imports this package before or after TorchRL.

TorchRL finds no plug-ins by itself, and importing it from here would cost ``deflow --help`` seconds: so the name is
registered at once where TorchRL's data sets are imported already, and else at the moment they are.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_MODULE = "torchrl.data.datasets"


def register_datasets() -> None:
    """Register this package's data sets with TorchRL, now or when its data sets are imported."""
    if _MODULE in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _OnImport())


def _register() -> None:
    from torchrl.data.datasets import register_dataset

    register_dataset("ogbench", "deflow_torchrl.data.ogbench:OGBenchExperienceReplay", replace=True)


class _OnImport(MetaPathFinder):
    """Lets the import of one module pass as it is, and registers behind it."""

    def __init__(self) -> None:
        self._asking = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Only ``torchrl.data.datasets`` is of interest."""
        if fullname != _MODULE or self._asking:
            return None
        self._asking = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._asking = False
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                _register()

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
