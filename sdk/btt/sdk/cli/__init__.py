"""The `btt` command.

This module imports nothing heavy: what a command needs is imported when that command runs, so
that `btt --help` answers at once and a broken plugin breaks nothing but itself.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells expect."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: Arguments without the program's name; those of the process by default.

    Returns:
        The exit code: 0 done, 1 error, 2 usage, 3 configuration, 4 the other side cannot be
        reached, 5 payment or budget, 6 not found, 130 interrupted.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    # What goes wrong comes as an error of ours; gRPC would write its own lines before it.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        from btt.sdk.errors import BttError, StorageError

        try:
            from btt.sdk.cli.commands import run

            try:
                return run(words)
            except OSError as error:  # a file or folder that the user named, in most cases
                raise StorageError(f"{error}.") from error
        except BttError as error:
            from btt.sdk.cli.failures import report

            return report(error, as_json="--json" in words)
    except KeyboardInterrupt:
        return INTERRUPTED
