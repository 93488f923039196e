"""The bounds that the security model promises, read from the code that keeps them."""

from __future__ import annotations

from btt.node.config import BansSection, LimitsSection, PaymentsSection
from btt.node.payments import agreement
from btt.sdk import identity, tls
from btt.sdk.channel import credit
from btt.sdk.content import torrent
from btt.sdk.money import SUPPLY, Amount, Rate
from btt.sdk.payment.faults import NODE_BANS
from btt.services.content.plugin import DEFAULT_RATE
from btt.services.ledger import books, mark, sequencer, server
from reference.text import table

_SIZES = ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"), (1, "bytes"))
_STEPS = ((86_400_000, "day"), (3_600_000, "hour"), (60_000, "minute"), (1000, "second"))


def all_bounds() -> str:
    """One table for those who pay, one for nodes, one for ledgers."""
    unit = Amount(Rate.parse(DEFAULT_RATE).owed(torrent.RUN))
    payments, bans, limits = PaymentsSection(), BansSection(), LimitsSection()
    config = server.LedgerConfig.__dataclass_fields__
    client = [
        (
            "lost to a node that takes a prepayment and sends nothing",
            f"one unit: {unit} of content at {DEFAULT_RATE}",
        ),
        ("paid for data that does not verify", "0"),
        (
            "held in memory for the metadata of one torrent",
            f"{_size(torrent.MAX_INFO)} and {_size(torrent.MAX_LAYERS)} of hashes",
        ),
        (
            "first ban of a node that lied or failed; the longest one",
            f"{_time(NODE_BANS.first_ms)}; {_time(NODE_BANS.longest_ms)}",
        ),
        ("life of an offer", _time(identity.MAX_OFFER_LIFE_MS)),
        ("difference of two clocks that is borne", _time(identity.CLOCK_TOLERANCE_MS)),
    ]
    node = [
        ("owed by a payer that is new", f"one unit: {unit} of content at {DEFAULT_RATE}", "-"),
        (
            "owed by a payer that has paid",
            f"{credit.EARNED_PERCENT} % of what it paid here, at most {payments.credit_limit}",
            "`credit_limit`",
        ),
        (
            "written off for a payer (sent, not accepted)",
            f"one unit, or {credit.WRITE_OFF_PERCENT} % of what it paid here",
            "-",
        ),
        (
            "owed by all newcomers of an hour together",
            str(payments.strangers_per_hour),
            "`strangers_per_hour`",
        ),
        ("owed by those of one /24 or /48", str(payments.strangers_per_network), "`strangers_per_network`"),
        ("time a call waits for payment", _time(payments.grace), "`grace`"),
        (
            "failures before a ban; the first ban; the longest",
            f"{bans.after}; {_time(bans.first)}; {_time(bans.longest)}",
            "`[bans]`",
        ),
        ("longest absence: shortest challenge window", _time(payments.min_challenge), "`min_challenge`"),
        ("paid calls at once", str(limits.calls), "`[limits]`"),
        ("size of one message", _size(tls.MAX_MESSAGE), "-"),
        (
            "nonces kept for those who open sessions; for how long",
            f"{agreement.MAX_NONCES:,}; {_time(agreement.NONCE_LIFE_MS)}",
            "-",
        ),
    ]
    ledger = [
        ("money there is", f"{Amount(SUPPLY)}, {SUPPLY:,} base units"),
        (
            "requests of one key: each second; at once",
            f"{config['rate'].default:g}; {config['burst'].default}",
        ),
        (
            "requests that wait; that are committed together",
            f"{sequencer.MOST_QUEUED:,}; {sequencer.MOST_IN_BATCH}",
        ),
        ("size of one message; calls at once", f"{_size(server.MAX_MESSAGE)}; {server.MAX_CALLS:,}"),
        ("life of a signed request", _time(books.LONGEST_VALIDITY_MS)),
        ("age of the mark against old copies", f"{mark.INTERVAL:g} second"),
    ]
    return "\n".join(
        (
            "### Of those who pay",
            "",
            table(("at most", "bound"), client),
            "### Of a node",
            "",
            table(("at most", "bound", "key in node.toml"), node),
            "### Of a ledger",
            "",
            table(("at most", "bound"), ledger),
        )
    )


def _time(milliseconds: int) -> str:
    step, name = next(known for known in _STEPS if milliseconds % known[0] == 0)
    count = milliseconds // step
    return f"{count} {name}{'s' * (count != 1)}"


def _size(count: int) -> str:
    step, name = next(known for known in _SIZES if count % known[0] == 0)
    return f"{count // step} {name}"
