"""Orbax and tensorstore, kept from telling in many lines what we tell in one."""

from __future__ import annotations

import logging
import sys


def quieten_orbax() -> None:
    """Keep orbax's INFO lines and its threads' tracebacks from the terminal; a failed save is told once, by us."""
    from absl import logging as absl_logging

    class OneLineWarnings(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            if "orbax" in record.pathname:
                record.exc_info, record.exc_text = None, None
                return logging.WARNING <= record.levelno < logging.ERROR
            return True

    handler = absl_logging.get_absl_handler()
    if any(type(f).__name__ == "OneLineWarnings" for f in handler.filters):
        return
    handler.addFilter(OneLineWarnings())
    # Of several reads that fail at once one is raised, and told; the others end as tasks that nobody asks.
    logging.getLogger("asyncio").addFilter(lambda record: "exception was never retrieved" not in record.getMessage())
    shown = sys.unraisablehook

    def hook(lost: sys.UnraisableHookArgs) -> None:
        # A read that failed has closed the event loop that tensorstore's other reads report to, each with a traceback.
        if str(lost.exc_value) != "Event loop is closed":
            shown(lost)

    sys.unraisablehook = hook
