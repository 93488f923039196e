"""Reads a running node's numbers for its metrics."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from btt.node.books import reading_file
from btt.node.earnings import By, read_entries, told_by, total_of
from btt.node.payments.store import Earnings, read_earnings
from btt.node.plugins.host import State

if TYPE_CHECKING:
    from btt.node.earnings import Sums
    from btt.node.metrics import Sample
    from btt.node.runtime import Node


async def read_samples(node: Node) -> list[Sample]:
    """Returns what Prometheus is told about a node, apart from its calls."""
    sums, books = await asyncio.to_thread(_earned, node.folder.books)
    opened = [record for record, _ in await node.store.channels()]
    now = node.clock()
    samples: list[Sample] = [
        ("btt_revenue_base_units", {"state": state}, amount) for state, amount in asdict(sums).items()
    ]
    samples += [
        ("btt_channels", {"state": "open"}, len(opened)),
        ("btt_channels", {"state": "closed"}, books.closed_channels),
        ("btt_channel_capacity_base_units", {}, sum(record.deposit for record in opened)),
        ("btt_unpaid_base_units", {}, sum(max(0, s.payee.meter.excess) for s in node.sessions.all())),
        ("btt_sessions", {}, len(node.sessions.all())),
        ("btt_calls_running", {}, node.admission.running),
        ("btt_loop_lag_seconds", {}, node.services.watchdog.lag_s),
        ("btt_ledger_connected", {}, node.ledger.is_connected),
        ("btt_offer_serial", {}, node.offers.usable()[0].serial),
    ]
    if opened:
        expiry = min(record.expires_ms for record in opened) - now
        samples.append(("btt_channel_expiry_seconds", {}, expiry / 1000))
    for name in node.services.registry.hosts:
        quota = node.quotas.of(name)
        samples.append(("btt_quota_limit_bytes", {"service": name}, quota.limit))
        samples.append(("btt_quota_used_bytes", {"service": name}, await quota.used()))
    for name, host in node.services.registry.hosts.items():
        samples.append(("btt_plugin_failures", {"service": name}, host.failures))
        samples += [
            ("btt_plugin_state", {"service": name, "state": state}, host.state is state) for state in State
        ]
    return samples


def _earned(path: Path) -> tuple[Sums, Earnings]:
    with reading_file(path) as db:
        return total_of(told_by(read_entries(db), By.DAY)), read_earnings(db)
