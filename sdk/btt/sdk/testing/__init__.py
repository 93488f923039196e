"""What tests of dApps and services can use: a whole small BTT network on this machine."""

from __future__ import annotations

from btt.sdk.clock import FakeClock
from btt.sdk.testing.devnet import Devnet, Totals
from btt.sdk.testing.network import Elsewhere, Network

__all__ = ["Devnet", "Elsewhere", "FakeClock", "Network", "Totals"]
