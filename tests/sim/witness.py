"""Sees every message that leaves a process, and holds it against the disks and against the truth.

The rule behind most checks: nothing may leave a process that its own disk does not know, because
in the next moment the process may be dead. The truth is what really crossed the lines: units sent,
units taken, updates signed.
"""

from __future__ import annotations

import re
import sqlite3
from collections import Counter, defaultdict
from datetime import datetime
from typing import TYPE_CHECKING, Any

import grpc

from btt.proto.ledger.v1 import ledger_pb2
from btt.proto.payment.v1 import payment_pb2
from btt.sdk.keys import Address
from btt.sdk.payment.calls import CALL_KEY, TOKEN_KEY
from btt.sdk.signing import Receipt, SessionOpen, TopUp
from btt.services.ledger.audit import Auditor, compare
from btt.services.ledger.check import entries
from btt.services.ledger.journal import Entry, Kind
from sim.books import Violation, must
from sim.machine import Process
from sim.market import FUNDS, UNIT, pb
from sim.network import Call

if TYPE_CHECKING:
    from sim.world import World

_connect = sqlite3.connect
_PAYMENT = "/btt.proto.payment.v1.PaymentService/"
_LEDGER = "/btt.proto.ledger.v1.LedgerService/"
_SERVICE = "/sim.v1.SimService/"
_BAN = re.compile(r"This payer is banned until ([0-9: -]+) UTC")
_SLACK_S = 10.0
"""What clocks that differ from life to life may take of a window."""
_SKEW_MS = 5000
"""Most that two lives of a node can differ about the time."""


class Witness:
    """What has been seen; the attributes are read by the parties too.

    Args:
        world: What is watched.
        genesis: The ledger's description.
    """

    def __init__(self, world: World, genesis: bytes) -> None:
        self.books = world.books
        self.trace = world.trace
        self.banned: dict[tuple[str, Address], int] = {}
        """When a ban ends that a node has told a payer of, Unix milliseconds."""
        self.overdue: set[str] = set()
        """Nodes that were away for longer than they may."""
        self.honest: set[str] = set()
        self.signed: dict[bytes, int] = defaultdict(int)
        """Highest update that left a payer, per channel."""
        self.updates: dict[bytes, dict[int, bytes]] = defaultdict(dict)
        """Every update that ever left a payer, per channel: signature by amount."""
        self.sent: Counter[bytes] = Counter()
        """Units that left a node, per channel."""
        self.taken: Counter[bytes] = Counter()
        """Units that were received, or accepted where that decides, per channel."""
        self._windows: dict[bytes, float] = {}
        """When a channel's window is over, by the time that the ledger was there, seconds."""
        self.risks: Counter[bytes] = Counter()
        """Sessions and calls of a channel: each may forfeit one prepaid unit, and no more."""
        self.lives: Counter[str] = Counter()
        """How often a node forgot what it had not saved."""
        self.restored: set[str] = set()
        self.silent: set[str] = set()
        self.captured: list[tuple[str, bytes, tuple[Any, ...]]] = []
        """Requests that anyone on the line could have kept: path, bytes, metadata."""
        self._genesis = genesis
        self._world = world
        self._disks = world.disks
        self._readers: dict[str, sqlite3.Connection] = {}
        self._channel: dict[Call, bytes] = {}
        self._session: dict[bytes, bytes] = {}
        self._shown: dict[Call, int] = defaultdict(int)
        self._answered: set[bytes] = set()

    # Disks

    def disk(self, name: str) -> sqlite3.Connection:
        found = self._readers.get(name)
        if found is None:
            found = self._readers[name] = _connect(self._disks[name], isolation_level=None)
        return found

    def leave(self, name: str) -> None:
        """Closes the file of a party, which is about to be exchanged."""
        if name in self._readers:
            self._readers.pop(name).close()

    def close(self) -> None:
        for name in list(self._readers):
            self.leave(name)

    def _one(self, name: str, query: str, *args: Any) -> Any:
        row = self.disk(name).execute(query, args).fetchone()
        return row[0] if row and row[0] is not None else 0

    def committed(self, path: str) -> None:
        """Reads what the ledger has just committed."""
        if path != str(self._disks["ledger"]):
            return
        connection = self.disk("ledger")
        head = self._one("ledger", "SELECT seq FROM head")
        must(head >= self.books.seq, f"the journal fell from entry {self.books.seq} to {head}")
        moves = False
        for entry in entries(connection, after=self.books.seq):
            self.books.take(entry)
            if entry.kind is Kind.TOP_UP and TopUp.decode(entry.body).request_id not in self._by_hand:
                self._world.coverage["payer: topped up"] += 1
            self._in_window(entry)
            moves = moves or entry.kind in (Kind.OPEN_CHANNEL, Kind.TOP_UP)
            self.trace("ledger", f"entry {entry.seq} {entry.kind.name} {[p.amount for p in entry.postings]}")
        if moves:
            self._within_budgets()
        held = dict(connection.execute("SELECT id, balance FROM accounts"))
        wanted = {a: abs(n) for a, n in self.books.balances.items()}
        must(held == wanted, "the accounts are not what the journal says")

    def _in_window(self, entry: Entry) -> None:
        """A window is as long as the ledger was there, whatever the clock says."""
        channel = entry.body[:32]
        if entry.kind is Kind.FINALIZE and channel in self._windows:
            end = self._windows[channel]
            left = end - self._world.ledger_up_s
            must(left <= _SLACK_S, f"a window ended {left:.0f} s too early, by the time the ledger was there")
        line = self.books.channels.get(channel)
        begins = entry.kind in (Kind.REQUEST_CLOSE, Kind.EXTEND) and channel not in self._windows
        if begins and line is not None:
            promised = (line.deadline - entry.time_ms) / 1000
            self._windows[channel] = self._world.ledger_up_s + promised

    def forget_windows(self) -> None:
        """A recovery may have lost what began them."""
        self._windows.clear()

    @property
    def _by_hand(self) -> set[bytes]:
        return {plan.request_id for plan, _ in self._world.plans}

    def _within_budgets(self) -> None:
        """What a payer's program locked and spent is within what its user granted."""
        by_hand = self._by_hand
        spent: Counter[Address] = Counter()
        for line in self.books.channels.values():
            own = sum(amount for name, amount in line.locked.items() if name not in by_hand)
            spent[line.terms.payer] += line.captured if line.closed else own
        for name in ("payer1", "payer2"):
            if name not in self.restored:
                total = spent[self._world.address_of(name)]
                must(total <= FUNDS, f"{name} was granted {FUNDS}, and has spent {total}")

    # The tap

    def asked(self, call: Call, data: bytes) -> None:
        if call.path == f"{_PAYMENT}Open":
            request = payment_pb2.OpenRequest.FromString(data)
            channel = self._channel[call] = SessionOpen.decode(request.open).channel
            self._shown[call] = request.best.cumulative
            self._leaves_payer(call, channel, request.best.cumulative, request.best.signature)
        elif call.path == f"{_PAYMENT}Pay":
            message = payment_pb2.PayRequest.FromString(data)
            if message.HasField("attach"):
                self._channel[call] = self._session.get(message.attach.token, b"")
            elif message.HasField("update"):
                update = message.update
                self._leaves_payer(call, self._channel[call], update.cumulative, update.signature)
        elif call.path.startswith(_SERVICE):
            self.risks[self._of(call)] += 1
        if not call.path.endswith("Pay") and len(self.captured) < 400:
            self.captured.append((call.path, data, call.metadata))

    def _of(self, call: Call) -> bytes:
        return self._session.get(dict(call.metadata).get(TOKEN_KEY, b""), b"")

    def _leaves_payer(self, call: Call, channel: bytes, cumulative: int, signature: bytes) -> None:
        if not cumulative or not channel:
            return
        self.signed[channel] = max(self.signed[channel], cumulative)
        self.updates[channel][cumulative] = signature
        name = call.client.name
        if name not in self.honest:
            return
        saved = self._one(name, "SELECT signed FROM channels WHERE channel_id = ?", channel)
        must(saved >= cumulative, f"{name} shows {cumulative}, and has saved {saved}")
        owed = self._one(name, "SELECT sum(units) FROM counts WHERE channel_id = ?", channel)
        must(cumulative <= owed + UNIT, f"{name} pays {cumulative}, and owes {owed}")
        locked = self.books.channels[channel].deposit if channel in self.books.channels else cumulative
        must(cumulative <= locked, f"{name} pays {cumulative} from a channel that holds {locked}")

    def answered(self, call: Call, server: Process, data: bytes) -> None:
        if call.path.startswith(_LEDGER):
            self._receipt(call, data)
        elif call.path == f"{_PAYMENT}Open":
            reply = payment_pb2.OpenResponse.FromString(data)
            channel = self._channel.get(call, b"")
            if not call.twin:
                self._session[reply.token] = channel
            self.risks[channel] += 1
            self._is_saved(server.name, channel, reply.best.cumulative)
            self._is_not_banned(server.name, channel)
            must(
                reply.best.cumulative >= self._shown[call] or server.name not in self.honest,
                f"{server.name} forgets the update that it was shown",
            )
        elif call.path == f"{_PAYMENT}Pay":
            message = payment_pb2.PayResponse.FromString(data)
            if message.HasField("statement"):
                self._is_saved(server.name, self._channel[call], message.statement.paid)
        elif call.path.startswith(_SERVICE):
            # Both messages have one field of bytes, of the same number.
            channel = self._of(call)
            units = len(pb.Piece.FromString(data).data)
            if call.name == "One":  # an answer that is given again is charged once
                units *= (number := dict(call.metadata)[CALL_KEY]) not in self._answered
                self._answered.add(number)
            self.sent[channel] += units
            self._is_covered(server.name, channel)

    def heard(self, call: Call, data: bytes) -> None:
        if call.path.startswith(_SERVICE) and call.name != "ManyChecked":
            self.taken[self._of(call)] += len(pb.Piece.FromString(data).data)

    def failed(self, call: Call, server: Process, code: grpc.StatusCode, text: str) -> None:
        self.trace(server.name, f"{call.name} refused: {text}")
        if server.name in self.honest and (ban := _BAN.search(text)):
            self._told_of_ban(call, server.name, datetime.fromisoformat(f"{ban[1]}+00:00"))
        if code in (grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL) and server.name in self.honest:
            raise Violation(f"{server.name} fails in {call.name}: {text}")

    def _told_of_ban(self, call: Call, node: str, until: datetime) -> None:
        line = self.books.channels.get(self._channel.get(call) or self._of(call))
        if line is None or not self._world.is_of(call.client.name, line.terms.payer):
            return  # somebody repeats another's words
        fair = call.client.name in self.honest - self.restored
        must(not fair or node in self.restored, f"{node} bans {call.client.name}, who pays")
        self._world.coverage["node: bans"] += 1
        self.banned[node, line.terms.payer] = int(until.timestamp() * 1000)

    def _is_not_banned(self, node: str, channel: bytes) -> None:
        line = self.books.channels.get(channel)
        if line is None or node not in self.honest - self.restored:
            return
        until = self.banned.get((node, line.terms.payer), 0)
        must(self._world.now_ms() > until - _SKEW_MS, f"{node} takes back whom it had banned")

    def _receipt(self, call: Call, data: bytes) -> None:
        answer = getattr(ledger_pb2, f"{call.name}Response").FromString(data)
        if "receipt" not in answer.DESCRIPTOR.fields_by_name:
            return
        receipt = Receipt.decode(answer.receipt.body)
        known = receipt.seq <= self.books.seq and self.books.hashes[receipt.seq] == receipt.entry_hash
        must(known, f"the ledger gives a receipt for entry {receipt.seq}, which is not on its disk")

    def _is_saved(self, node: str, channel: bytes, paid: int) -> None:
        if node in self.honest and channel:
            saved = self._one(node, "SELECT best FROM channels WHERE channel_id = ?", channel)
            must(paid <= saved, f"{node} counts {paid} as paid, and has saved {saved}")

    def _is_covered(self, node: str, channel: bytes) -> None:
        """What a payer has got and not paid for is within its credit."""
        if node not in self.honest or channel not in self.books.channels:
            return
        payer = self.books.channels[channel].terms.payer
        saved = self.disk(node).execute(
            "SELECT channel_id, best FROM channels WHERE payer = ?", (payer.data,)
        )
        unpaid = paid = 0
        for one, best in saved.fetchall():
            unpaid += max(0, self.sent[one] - best)
            paid += best
        self._bounded(node, unpaid, paid)

    def _bounded(self, node: str, unpaid: int, paid: int) -> None:
        if node not in self.restored:
            most = max(UNIT, paid * 5 // 100) * (1 + self.lives[node])
            must(unpaid <= most, f"{node} gave {unpaid} units away to one who paid {paid}")

    # The end

    def final(self, nodes: dict[bytes, str], payers: dict[bytes, str]) -> None:
        """Checks what every party has in the end.

        Args:
            nodes: Names of honest nodes by K2, 33 bytes.
            payers: Names of honest payers by address, 20 bytes.

        Raises:
            Violation: Somebody lost more than it may, or the books do not add up.
        """
        auditor = Auditor(self._genesis)
        for entry in entries(self.disk("ledger")):
            auditor.take(entry)
        compare(auditor, self.disk("ledger"))
        for channel, line in self.books.channels.items():
            must(line.closed, f"channel {channel.hex()[:8]} is still open")
            payer, node = payers.get(line.terms.payer.data), nodes.get(line.terms.k2.data)
            must(line.captured <= self.signed[channel], f"{line.captured} was taken, more than was signed")
            if payer is not None:
                lost = line.captured - self.taken[channel]
                most = UNIT * self.risks[channel]
                must(lost <= most, f"{payer} paid {lost} for nothing in {self.risks[channel]} calls")
            if node is not None and node not in self.restored | self.overdue | self.silent:
                best = self._one(node, "SELECT best FROM channels WHERE channel_id = ?", channel)
                owed = self._one(node, "SELECT sum(units) FROM counts WHERE channel_id = ?", channel)
                short = min(best, owed) - line.captured
                must(short <= 0, f"{node} was paid {min(best, owed)} and got {line.captured}")
        for (node, _), (unpaid, paid) in self._accounts(nodes).items():
            if node not in self.overdue:
                self._bounded(node, unpaid, paid)

    def _accounts(self, nodes: dict[bytes, str]) -> dict[tuple[str, bytes], tuple[int, int]]:
        """Returns what each payer has got for nothing, and paid, by node and payer."""
        found: dict[tuple[str, bytes], tuple[int, int]] = {}
        for channel, line in self.books.channels.items():
            if (node := nodes.get(line.terms.k2.data)) is not None:
                unpaid, paid = found.get((node, line.terms.payer.data), (0, 0))
                unpaid += max(0, self.sent[channel] - line.captured)
                # Credit grows with what was shown, though what was not used up of it goes back.
                found[node, line.terms.payer.data] = unpaid, paid + self.signed[channel]
        return found

    def strangers(self, nodes: dict[bytes, str]) -> dict[str, int]:
        """Returns what each honest node was never paid for by those who never earned credit."""
        lost: Counter[str] = Counter()
        for (node, _), (unpaid, paid) in self._accounts(nodes).items():
            earned = paid * 5 // 100  # credit of its own, whoever it is
            lost[node] += max(0, unpaid - earned) if earned < UNIT else 0
        return dict(lost)
