"""A small economy in one process: a real ledger, nodes and wallets on loopback, a clock one can set."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import grpc.aio

from btt.node.admission import Admission, Apps, Limits
from btt.node.payments.closing import Closer
from btt.node.payments.interceptor import PaymentInterceptor
from btt.node.payments.registrar import Registrar
from btt.node.payments.servicer import PaymentServicer
from btt.node.payments.sessions import CreditPolicy, Sessions
from btt.node.payments.store import PayeeStore
from btt.proto.offer.v1 import offer_pb2, offer_pb2_grpc
from btt.proto.payment.v1 import payment_pb2_grpc
from btt.sdk.budget import Budget
from btt.sdk.channel import BanPolicy, Line, Price, PriceSheet
from btt.sdk.client import Client, Wallet
from btt.sdk.content.feed import LINE
from btt.sdk.identity import ChannelTerms, NodeAddress, Offer, sign_offer, tls_name
from btt.sdk.keys import PrivateKey
from btt.sdk.ledger import LedgerClient
from btt.sdk.money import BTT, Rate
from btt.sdk.tls import TRANSPORT_OPTIONS, certificate_sha256, make_certificate, server_credentials
from btt.services.content.catalogue import Catalogue
from btt.services.content.publish import publish
from btt.services.content.service import ContentServicer, register
from btt.services.ledger.server import RunningLedger

RUN = 1 << 20
CONTENT_PRICE: dict[Line, Price] = {LINE: Price(Rate.parse("1 BTT / GiB"), RUN)}
TERMS = ChannelTerms(
    min_amount=1, min_challenge_ms=1000, min_lifetime_ms=60_000, max_lifetime_ms=30 * 24 * 3600 * 1000
)


class Clock:
    """The time of this machine, plus what a test adds."""

    def __init__(self) -> None:
        self.ahead_ms = 0

    def __call__(self) -> int:
        return time.time_ns() // 1_000_000 + self.ahead_ms


class OfferServicer(offer_pb2_grpc.OfferServiceServicer):
    def __init__(self, node: TestNode) -> None:
        self._node = node

    async def GetOffer(self, request, context):  # noqa: N802
        return offer_pb2.GetOfferResponse(offer=self._node.offers[0].document)


@dataclass
class TestNode:
    """A node made of its parts, so that tests can swap them."""

    __test__ = False

    folder: Path
    clock: Callable[[], int]
    ledger_id: bytes
    ledger: LedgerClient
    prices: Mapping[Line, Price]
    policy: CreditPolicy
    limits: Limits = field(default_factory=Limits)
    allow_apps: tuple[str, ...] = ("*",)
    port: int = 0
    identity: PrivateKey = field(default_factory=PrivateKey.generate)
    payee_key: PrivateKey = field(default_factory=PrivateKey.generate)
    tls: tuple[bytes, bytes] = (b"", b"")
    offers: list[Offer] = field(default_factory=list)
    serial: int = 0

    def sign(self, prices: Mapping[Line, Price] | None = None, *, serial: int = 0) -> Offer:
        """Signs a new offer, which becomes the current one."""
        self.prices = prices or self.prices
        self.serial = serial or self.serial + 1
        now = self.clock()
        document = sign_offer(
            self.identity,
            ledger_id=self.ledger_id,
            payee=self.payee_key.public.address,
            payee_key=self.payee_key.public,
            serial=self.serial,
            issued_at_ms=now,
            valid_until_ms=now + 3600_000,
            certificates=[certificate_sha256(self.tls[1])],
            prices=dict(self.prices),
            terms=TERMS,
        )
        shown = SimpleNamespace(document=document)
        self.offers = [shown, *self.offers][:2]  # type: ignore[list-item]  # even if nobody can open it
        self.offers[0] = Offer.open(document, ledger_id=self.ledger_id, node=None, now_ms=now)
        return self.offers[0]

    async def start(self, register: Callable[[Registrar], None]) -> None:
        self.folder.mkdir(exist_ok=True)
        if not self.tls[0]:
            self.tls = make_certificate(tls_name(self.identity.public.address))
        self.sign()
        self.store = PayeeStore(self.folder / "payments.db")
        self.sessions = Sessions(
            ledger_id=self.ledger_id, store=self.store, policy=self.policy, clock=self.clock
        )
        self.closer = Closer(
            store=self.store,
            sessions=self.sessions,
            ledger=self.ledger,
            key=self.payee_key,
            clock=self.clock,
            margin_ms=60_000,
        )
        self.payments = PaymentServicer(
            ledger_id=self.ledger_id,
            ledger=self.ledger,
            identity=self.identity,
            payee_key=self.payee_key,
            store=self.store,
            sessions=self.sessions,
            closer=self.closer,
            offers=lambda: self.offers,
            serves=lambda app: self.admission.apps.check(app),
            clock=self.clock,
        )
        charges: dict[str, object] = {}
        apps = Apps(allow=self.allow_apps, deny=(), clock=self.clock)
        self.admission = Admission(apps=apps, node=self.limits, services={}, clock=self.clock)
        self.server = grpc.aio.server(
            interceptors=[
                PaymentInterceptor(
                    sessions=self.sessions,
                    charges=charges,
                    admit=self.admission.admit,
                    admit_free=self.admission.admit_free,
                    clock=self.clock,
                )
            ],
            options=[*TRANSPORT_OPTIONS, ("grpc.so_reuseport", 0)],
        )
        registrar = Registrar(self.server)
        registrar.charges = charges
        payment_pb2_grpc.add_PaymentServiceServicer_to_server(self.payments, registrar)
        offer_pb2_grpc.add_OfferServiceServicer_to_server(OfferServicer(self), registrar)
        register(registrar)
        self.port = self.server.add_secure_port(f"127.0.0.1:{self.port}", server_credentials(*self.tls))
        await self.server.start()

    async def stop(self) -> None:
        await self.server.stop(0)
        self.store.close()

    @property
    def address(self) -> NodeAddress:
        return NodeAddress(self.identity.public.address, "127.0.0.1", self.port)


class Economy:
    """A ledger, its money, and whoever uses it."""

    def __init__(self, root: Path, ledger: RunningLedger, client: LedgerClient, faucet: PrivateKey) -> None:
        self.root = root
        self.running = ledger
        self.ledger = client
        self.faucet = faucet
        self.clock = Clock()
        self.stack = AsyncExitStack()
        self._made = 0

    def _folder(self, kind: str) -> Path:
        self._made += 1
        path = self.root / f"{kind}{self._made}"
        path.mkdir()
        return path

    async def wallet(self, amount: int = 100 * BTT) -> Wallet:
        wallet = Wallet(self._folder("wallet"), PrivateKey.generate())
        if amount:
            await self.ledger.transfer(self.faucet, wallet.account.public.address, amount)
        return wallet

    async def node(
        self,
        register: Callable[[Registrar], None],
        prices: Mapping[Line, Price] = CONTENT_PRICE,
        *,
        limit_units: int = 64,
        strangers_units: int = 1000,
        grace_s: float = 60,
        bans: BanPolicy | None = None,
        start: bool = True,
    ) -> TestNode:
        unit = PriceSheet(b"", prices).unit_charge
        node = TestNode(
            folder=self._folder("node"),
            clock=self.clock,
            ledger_id=self.ledger.ledger_id,
            ledger=self.ledger,
            prices=prices,
            policy=CreditPolicy(
                unit=unit,
                limit=unit * limit_units,
                strangers_per_hour=unit * strangers_units,
                strangers_per_network=unit * strangers_units,
                grace_s=grace_s,
                bans=bans or BanPolicy(apart_ms=0),
            ),
        )
        if start:
            await node.start(register)
            self.stack.push_async_callback(node.stop)
        return node

    async def content_node(
        self, files: dict[str, bytes], **options: object
    ) -> tuple[TestNode, dict[str, bytes]]:
        """Starts a node that serves some files; returns it and their infohashes."""
        folder = self._folder("published")
        catalogue = Catalogue(folder / "catalogue")
        infohashes = {}
        for name, data in files.items():
            (folder / name).write_bytes(data)
            infohashes[name] = publish(folder / name, catalogue).infohash
        servicer = ContentServicer(catalogue)
        self.stack.callback(catalogue.close)
        self.stack.callback(servicer.close)
        node = await self.node(lambda r: register(servicer, r), **options)
        node.servicer = servicer
        return node, infohashes

    def client(
        self, nodes: TestNode | Sequence[TestNode], wallet: Wallet, budget: str = "5 BTT", **options: object
    ) -> Client:
        several = [nodes] if isinstance(nodes, TestNode) else nodes
        return Client.connect(
            [str(node.address) for node in several],
            budget=Budget(budget),
            ledger=str(self.running.address),
            wallet=wallet,
            clock=self.clock,
            **options,
        )


def content(size: int, seed: int = 1) -> bytes:
    """Returns seeded random bytes."""
    return random.Random(seed).randbytes(size)
