"""Tests see nothing of a devnet that the shell around them was told of."""

from __future__ import annotations

import os

for _name in [name for name in os.environ if name.startswith("BTT_")]:
    del os.environ[_name]
