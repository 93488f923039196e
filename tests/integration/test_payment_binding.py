"""Who may use a session, a channel, an address: everything that must be refused."""

from __future__ import annotations

import dataclasses
import secrets

import grpc.aio
import pytest

from btt.proto.payment.v1 import payment_pb2, payment_pb2_grpc
from btt.sdk.channel import Price
from btt.sdk.client import Wallet
from btt.sdk.content.feed import LINE
from btt.sdk.errors import (
    AppRefused,
    ChannelClosed,
    ChannelUnknown,
    IdentityError,
    PriceChanged,
    RequestExpired,
    SessionEnded,
    SignatureInvalid,
    SignerMismatch,
    TermsRefused,
)
from btt.sdk.identity import NodeAddress, Offer
from btt.sdk.keys import Address, PrivateKey
from btt.sdk.money import Rate
from btt.sdk.payment.calls import CALL_KEY, PROOF_KEY, TOKEN_KEY
from btt.sdk.payment.connection import NodeConnection, connect_node
from btt.sdk.payment.history import trust_endpoint
from btt.sdk.payment.store import PayerStore
from btt.sdk.payment.wire import sign_call
from btt.sdk.rpc import to_error
from btt.sdk.signing import APP_UNKNOWN, EARLY_CLOSE, ChannelCommit, SessionOpen, service_reference, sign
from btt.sdk.tls import make_certificate, pinned_channel
from kit.economy import RUN, content
from kit.probe import PRICES, Probe, pb, rpc


@pytest.fixture
async def probe(economy):
    node = await economy.node(lambda r: rpc.add_ProbeServiceServicer_to_server(Probe(), r), PRICES)
    node.wallet = await economy.wallet()
    return node


def connection(node) -> NodeConnection:
    offer = Offer.open(node.offers[0].document, ledger_id=node.ledger_id, node=None, now_ms=node.clock())
    return NodeConnection(node.address, node.tls[1], offer)


async def refusal(call):
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await call
    return to_error(failure.value)


async def open_request(at, stub, channel_id, key, **changes):
    begin = await stub.Begin(payment_pb2.BeginRequest())
    body = SessionOpen(
        **{
            "node": at.identity.public.address,
            "channel": channel_id,
            "offer_digest": at.offers[0].digest,
            "app": APP_UNKNOWN,
            "client_nonce": secrets.token_bytes(16),
            "server_nonce": begin.server_nonce,
            "valid_until_ms": at.clock() + 60_000,
            **changes,
        }
    )
    return payment_pb2.OpenRequest(open=body.encode(), signature=sign(key, body, at.ledger_id))


async def test_a_session_opens_only_for_k1_of_the_channel_on_this_node(probe, economy):
    channel = connection(probe).channel(label="raw")
    stub = payment_pb2_grpc.PaymentServiceStub(channel)
    other = await economy.node(lambda r: rpc.add_ProbeServiceServicer_to_server(Probe(), r), PRICES)
    async with economy.client(probe, probe.wallet) as btt:
        session = await btt.session(1000)
        channel_id, k1 = session.payer.channel_id, session._key
        thief = PrivateKey.generate()
        assert isinstance(
            await refusal(stub.Open(await open_request(probe, stub, channel_id, thief))), SignatureInvalid
        )
        # The account key is not K1 either.
        assert isinstance(
            await refusal(stub.Open(await open_request(probe, stub, channel_id, probe.wallet.account))),
            SignatureInvalid,
        )
        for changes, error in [
            ({"node": other.identity.public.address}, SignerMismatch),
            ({"offer_digest": bytes(32)}, PriceChanged),
            ({"server_nonce": bytes(16)}, RequestExpired),
            ({"valid_until_ms": probe.clock() - 1}, RequestExpired),
            ({"valid_until_ms": probe.clock() + 3600_000}, RequestExpired),
            ({"app": Address(b"a" * 20)}, AppRefused),
            ({"channel": bytes(32)}, ChannelUnknown),
        ]:
            request = await open_request(probe, stub, channel_id, k1, **changes)
            assert isinstance(await refusal(stub.Open(request)), error), changes
        assert session.error is None, "none of this touched the honest session"
        # A replayed Open has a used nonce.
        request = await open_request(probe, stub, channel_id, k1)
        await stub.Open(request)
        assert isinstance(await refusal(stub.Open(request)), RequestExpired)
        # The channel pays `probe`; at another node it is worth nothing.
        foreign = connection(other).channel(label="raw")
        there = payment_pb2_grpc.PaymentServiceStub(foreign)
        request = await open_request(other, there, channel_id, k1)
        refused = await refusal(there.Open(request))
        assert isinstance(refused, SignerMismatch | ChannelUnknown)
        await foreign.close()
        await session.abandon()
        btt.providers[0].live = None
    await channel.close()


async def test_a_stolen_token_without_k1_is_refused_everywhere(probe, economy):
    other = await economy.node(lambda r: rpc.add_ProbeServiceServicer_to_server(Probe(), r), PRICES)
    async with economy.client(probe, probe.wallet) as btt:
        session = await btt.session(1000)
        seen = secrets.token_bytes(16)
        await rpc.ProbeServiceStub(session.channel).One(pb.Ask(size=10))
        thief = PrivateKey.generate()
        call_id = secrets.token_bytes(16)
        stolen = sign_call(thief, session.token, call_id, probe.ledger_id)
        raw = connection(probe).channel(label="raw")
        service, payment = rpc.ProbeServiceStub(raw), payment_pb2_grpc.PaymentServiceStub(raw)
        for proof in (stolen, b"", session.proof(seen)):
            metadata = ((TOKEN_KEY, session.token), (CALL_KEY, call_id), (PROOF_KEY, proof))
            assert isinstance(
                await refusal(service.One(pb.Ask(size=10), metadata=metadata)), SignatureInvalid
            )
        close = payment_pb2.CloseRequest(token=session.token, call_id=call_id, signature=stolen)
        assert isinstance(await refusal(payment.Close(close)), SignatureInvalid)
        stream = payment.Pay()
        attach = payment_pb2.Attach(token=session.token, call_id=call_id, signature=stolen)
        await stream.write(payment_pb2.PayRequest(attach=attach))
        assert isinstance(await refusal(_read(stream)), SignatureInvalid)
        # Even K1's own proof cannot attach a second stream to a live session.
        stream = payment.Pay()
        attach = payment_pb2.Attach(token=session.token, call_id=call_id, signature=session.proof(call_id))
        await stream.write(payment_pb2.PayRequest(attach=attach))
        assert isinstance(await refusal(_read(stream)), SessionEnded)
        # The same token at another node names no session there.
        foreign = connection(other).channel(label="raw")
        metadata = (
            (TOKEN_KEY, session.token),
            (CALL_KEY, call_id),
            (PROOF_KEY, session.proof(call_id)),
        )
        assert isinstance(
            await refusal(rpc.ProbeServiceStub(foreign).One(pb.Ask(size=1), metadata=metadata)), SessionEnded
        )
        await foreign.close()
        await raw.close()
        await rpc.ProbeServiceStub(session.channel).One(pb.Ask(size=10))
        assert session.error is None
    assert btt.receipts[0].counts_agree


async def _read(stream):
    async for message in stream:
        return message
    raise AssertionError("the stream ended without an error")


async def test_a_new_session_fences_the_old_one(probe, economy):
    async with economy.client(probe, probe.wallet) as btt:
        first = await btt.session(1000)
        raw = connection(probe).channel(label="raw")
        stub = payment_pb2_grpc.PaymentServiceStub(raw)
        request = await open_request(probe, stub, first.payer.channel_id, first._key)
        reply = await stub.Open(request)
        assert reply.epoch == 2
        with pytest.raises(SessionEnded):
            await rpc.ProbeServiceStub(first.channel).One(pb.Ask(size=10))
        await first.abandon()
        btt.providers[0].live = None
        await raw.close()


async def test_a_closed_channel_is_refused_whatever_receipt_it_has(probe, economy):
    async with economy.client(probe, probe.wallet) as btt:
        session = await btt.session(1000)
        channel_id, k1 = session.payer.channel_id, session._key
        await rpc.ProbeServiceStub(session.channel).One(pb.Ask(size=10))
    assert btt.receipts[0].channel_closed
    raw = connection(probe).channel(label="raw")
    stub = payment_pb2_grpc.PaymentServiceStub(raw)
    assert isinstance(
        await refusal(stub.Open(await open_request(probe, stub, channel_id, k1))), ChannelClosed
    )
    # A node that lost its books asks the ledger before it gives credit.
    probe.store._db.execute("DELETE FROM counts")
    probe.store._db.execute("DELETE FROM channels")
    assert isinstance(
        await refusal(stub.Open(await open_request(probe, stub, channel_id, k1))), ChannelClosed
    )
    await raw.close()
    # The wallet of a client that did not hear of the close opens another channel by itself.
    store = PayerStore(probe.wallet.folder)
    store.set_state(channel_id, "open")
    store.close()
    async with economy.client(probe, probe.wallet) as btt:
        again = await btt.session(1000)
        assert again.payer.channel_id != channel_id


@pytest.mark.parametrize(
    "change",
    [
        lambda n: {"payee": Address(b"p" * 20)},
        lambda n: {"k2": PrivateKey.generate().public},
        lambda n: {"service_ref": service_reference(Address(b"n" * 20))},
        lambda n: {"amount": 0},
        lambda n: {"expires_ms": n.clock() + 1000},
        lambda n: {"expires_ms": n.clock() + 366 * 24 * 3600 * 1000},
        lambda n: {"challenge_ms": 999},
    ],
)
async def test_the_node_signs_no_refund_for_terms_it_does_not_want(probe, change):
    commit = ChannelCommit(
        payer=probe.wallet.account.public.address,
        payee=probe.payee_key.public.address,
        k1=PrivateKey.generate().public,
        k2=probe.payee_key.public,
        amount=1000,
        expires_ms=probe.clock() + 3600_000,
        challenge_ms=1000,
        flags=EARLY_CLOSE,
        fee=0,
        nonce=bytes(16),
        service_ref=service_reference(probe.identity.public.address),
    )
    raw = connection(probe).channel(label="raw")
    stub = payment_pb2_grpc.PaymentServiceStub(raw)
    assert (await stub.AgreeRefund(payment_pb2.AgreeRefundRequest(commit=commit.encode()))).signature
    bad = dataclasses.replace(commit, **change(probe))
    assert isinstance(
        await refusal(stub.AgreeRefund(payment_pb2.AgreeRefundRequest(commit=bad.encode()))), TermsRefused
    )
    await raw.close()


async def meet(node, address, store, **options):
    return await connect_node(
        address, ledger_id=node.ledger_id, store=store, clock=node.clock, timeout=10, **options
    )


async def test_first_contact_takes_only_the_node_of_the_address(probe, economy, tmp_path):
    store = PayerStore(tmp_path / "books")
    met = await meet(probe, probe.address, store)
    assert met.offer.node == probe.identity.public.address
    impostor = await economy.node(lambda r: rpc.add_ProbeServiceServicer_to_server(Probe(), r), PRICES)
    # A man in the middle with his own certificate and his own offer.
    address = NodeAddress(probe.identity.public.address, "127.0.0.1", impostor.port)
    with pytest.raises(IdentityError, match="not of"):
        await meet(probe, address, store)
    # A man in the middle who relays the real offer over his own certificate.
    impostor.offers = probe.offers
    with pytest.raises(IdentityError, match="does not name"):
        await meet(probe, address, store)
    # An offer for another ledger.
    with pytest.raises(IdentityError, match="another ledger"):
        await connect_node(probe.address, ledger_id=bytes(32), store=store, clock=probe.clock)
    store.close()


async def test_an_old_offer_serial_is_refused(probe, tmp_path):
    store = PayerStore(tmp_path / "books")
    old = probe.offers[0]
    probe.sign()
    await meet(probe, probe.address, store)
    probe.offers = [old]
    with pytest.raises(IdentityError, match="was seen before"):
        await meet(probe, probe.address, store)
    store.close()


async def test_an_expired_or_future_offer_is_refused(probe, tmp_path):
    store = PayerStore(tmp_path / "books")
    for ahead in (3600_000 + 6 * 60_000, -6 * 60_000):
        with pytest.raises(IdentityError, match="not current"):
            await connect_node(
                probe.address,
                ledger_id=probe.ledger_id,
                store=store,
                clock=lambda ahead=ahead: probe.clock() + ahead,
            )
    store.close()


async def test_a_bare_endpoint_is_trusted_once_and_never_changed(probe, economy, tmp_path):
    store = PayerStore(tmp_path / "books")
    bare = NodeAddress.parse(f"127.0.0.1:{probe.port}")
    with pytest.raises(IdentityError, match="not met"):
        await meet(probe, bare, store)
    await meet(probe, bare, store, trust_new=True)
    await meet(probe, bare, store)
    other = PayerStore(tmp_path / "other")
    trust_endpoint(other, f"127.0.0.1:{probe.port}", Address(b"e" * 20))
    with pytest.raises(IdentityError, match="not of"):
        await meet(probe, bare, other, trust_new=True)
    store.close()
    other.close()


@pytest.mark.parametrize("pin", [b"", b"garbage"])
async def test_an_empty_pin_is_an_error(pin):
    with pytest.raises(IdentityError):
        pinned_channel("127.0.0.1", 1, pin, "x.btt")


async def test_another_certificate_for_the_same_name_does_not_connect(probe):
    name = f"{probe.identity.public.address}.btt"
    _, certificate = make_certificate(name)
    channel = pinned_channel("127.0.0.1", probe.port, certificate, name)
    failure = await refusal(rpc.ProbeServiceStub(channel).Free(pb.Ask(size=1)))
    assert "connection failed" in str(failure)
    await channel.close()


async def test_a_changed_price_means_a_new_session(economy, tmp_path):
    data = content(3 * RUN)
    node, infohash = await economy.content_node({"a": data})
    wallet = await economy.wallet()
    async with economy.client(node, wallet) as btt:
        quote = await btt.content.quote(infohash["a"])
        node.sign({LINE: Price(Rate.parse("2 BTT / GiB"), RUN)})
        node.sign()
        btt.providers[0]._node = None
        with pytest.raises(PriceChanged):
            async with btt.content.fetch(quote, tmp_path / "out") as transfer:
                async for _ in transfer.progress():
                    pass
    # Nothing was paid at the price that nobody agreed to.
    assert [receipt.paid for receipt in btt.receipts] == [0]


def test_wallet_repr_hides_its_key(tmp_path):
    key = PrivateKey.generate()
    assert key.secret.hex() not in repr(Wallet(tmp_path, key))
