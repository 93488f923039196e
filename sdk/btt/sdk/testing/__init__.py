"""What tests of dApps and services can use: a whole small BTT network on this machine."""

from __future__ import annotations

from btt.sdk.clock import FakeClock
from btt.sdk.testing.devnet import Devnet, Totals

__all__ = ["Devnet", "FakeClock", "Totals"]
