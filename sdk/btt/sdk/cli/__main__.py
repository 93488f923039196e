"""Lets `python -m btt.sdk.cli` be the `btt` command, for processes that start it."""

from __future__ import annotations

import sys

from btt.sdk.cli import main

sys.exit(main())
