"""Records of runs, figures and the HTML page."""

from __future__ import annotations

from deflow_torchrl._lazy import lazy_exports

_EXPORTS = {
    "build_record": ".records",
    "plot_learning_curve": ".figures",
    "write_html_report": ".html",
}
__all__ = list(_EXPORTS)
__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)
