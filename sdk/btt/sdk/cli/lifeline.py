"""Ends this process when the one that started it is gone, however that one ended.

The parent keeps the other end of our standard input open and never writes. The kernel closes it
with the parent, even after kill -9, and then reading ends.
"""

from __future__ import annotations

import os
import threading

_EXIT_CODE = 1


def follow_stdin() -> None:
    """Watches standard input in the background; when it ends, so does the process, at once.

    Only for work that may be cut off anywhere.
    """
    threading.Thread(target=_watch, name="lifeline", daemon=True).start()


def _watch() -> None:
    # Not sys.stdin: its lock, held by a thread, breaks the interpreter's exit.
    try:
        while os.read(0, 4096):
            pass
    except OSError:
        pass
    os._exit(_EXIT_CODE)
