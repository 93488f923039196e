"""The payment channel without I/O: payer, payee, meter and credit (paper: steps 7 to 9)."""

from btt.sdk.channel.conduct import FOREVER_MS, BanPolicy, Conduct
from btt.sdk.channel.credit import Standing, Strangers, signing_point
from btt.sdk.channel.durable import Durable
from btt.sdk.channel.meter import Meter, Units
from btt.sdk.channel.payee import Checked, Payee
from btt.sdk.channel.payer import Intent, PaidCall, Payer, SignedUpdate
from btt.sdk.channel.prices import Line, Price, PriceSheet, Segment, Tally

__all__ = [
    "FOREVER_MS",
    "BanPolicy",
    "Checked",
    "Conduct",
    "Durable",
    "Intent",
    "Line",
    "Meter",
    "PaidCall",
    "Payee",
    "Payer",
    "Price",
    "PriceSheet",
    "Segment",
    "SignedUpdate",
    "Standing",
    "Strangers",
    "Tally",
    "Units",
    "signing_point",
]
