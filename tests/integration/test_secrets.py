"""Logs, receipts and what watchers are told name no secret, and nobody a stranger does not know already."""

from __future__ import annotations

import base64
import logging
from pathlib import Path

import pytest

from btt.sdk.errors import BttError
from btt.sdk.keys import PrivateKey
from btt.sdk.ledger import LedgerClient
from btt.sdk.payment import session as session_module
from btt.services.ledger.folder import LedgerFolder
from kit.chaos import Relay
from kit.economy import CONTENT_PRICE, RUN, content
from kit.ledgers import BANK, SHOP, LedgerProcess, errands

ALICE = PrivateKey((31).to_bytes(32, "big"))


def forms(secret: bytes) -> list[str]:
    """How bytes may come to stand in a text."""
    return [
        secret.hex(),
        secret.hex().upper(),
        base64.b64encode(secret).decode().rstrip("="),
        base64.urlsafe_b64encode(secret).decode().rstrip("="),
        str(int.from_bytes(secret, "big")),
        repr(secret)[2:-1],
        str(list(secret))[1:-1],
    ]


def shown(text: str, things: dict[str, bytes]) -> list[str]:
    return [name for name, thing in things.items() if any(form in text for form in forms(thing))]


def parties(**keys: PrivateKey) -> dict[str, bytes]:
    found = {}
    for name, key in keys.items():
        found |= {
            f"{name}'s address": key.address.data,
            f"{name}'s address as text": str(key.address).encode(),
        }
        found[f"{name}'s public key"] = key.public.data
    return found


async def test_the_logs_of_a_whole_economy(economy, tmp_path, caplog, capsys, monkeypatch) -> None:
    caplog.set_level(logging.DEBUG)
    tokens: list[bytes] = []
    channel_keys: list[PrivateKey] = []
    start = session_module.PaymentSession._start

    async def started(session) -> None:
        await start(session)
        tokens.append(session.token)
        channel_keys.append(session._key)

    monkeypatch.setattr(session_module.PaymentSession, "_start", started)
    data = content(6 * RUN)
    node, infohash = await economy.content_node({"film.bin": data})
    wallet, poor = await economy.wallet(), await economy.wallet(0)
    async with Relay(node.port) as relay:
        port, node.port = node.port, relay.port
        client = economy.client(node, wallet)
        node.port = port
        async with client as btt:
            await btt.session(CONTENT_PRICE[next(iter(CONTENT_PRICE))].rate.owed(len(data)))
            relay.cut()
            async with btt.content.fetch(infohash["film.bin"], tmp_path / "out") as transfer:
                pass
    assert transfer.receipt.fetched_bytes == len(data)
    with pytest.raises(BttError):
        async with economy.client(node, poor) as btt:
            await btt.session(1000)
    for wrong in (economy.ledger.transfer(wallet.account, poor.account.address, 10**17),
                  economy.ledger.channel(bytes(32), wallet.account)):  # fmt: skip
        with pytest.raises(BttError):
            await wrong
    out = capsys.readouterr()
    logs = caplog.text + out.out + out.err
    assert "session.open" in logs
    assert "channel.closed" in logs
    assert len(tokens) >= 2
    operator = LedgerFolder.open(economy.root / "ledger")
    keys = {
        "the payer's key": wallet.account, "the payee's key": node.payee_key, "the node's key": node.identity,
        "the faucet's key": economy.faucet, "the operator's key": operator.operator_key,
    }  # fmt: skip
    secrets = {name: key.secret for name, key in keys.items()}
    secrets |= {f"K1 {n}": key.secret for n, key in enumerate(channel_keys)}
    secrets |= {f"token {n}": token for n, token in enumerate(tokens)}
    secrets |= {
        "TLS key": node.tls[0].split(b"\n")[1],
        "the ledger's TLS key": operator.tls_key.split(b"\n")[1],
    }
    assert shown(logs, secrets) == []
    everybody = {
        "payer": wallet.account,
        "payee": node.payee_key,
        "poor": poor.account,
        "faucet": economy.faucet,
    }
    assert shown(logs, parties(**everybody)) == []


async def test_the_log_of_a_ledger_process_and_its_receipts(tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = LedgerProcess.make(tmp_path / "ledger", log=log)
    try:
        async with LedgerClient.connect(process.start()) as ledger:
            receipts = [await ledger.transfer(BANK, ALICE.address, 1000)]
            receipts += [await errand.ask(ledger) for errand in errands(ledger, ALICE, 0)]
            with pytest.raises(BttError):
                await ledger.transfer(ALICE, SHOP.address, 10**9)
            bank_sees, shop_sees = ledger.watch(BANK), ledger.watch(SHOP)
            pages = [await anext(bank_sees), await anext(shop_sees)]
            await bank_sees.aclose()
            await shop_sees.aclose()
        process.stop()
    finally:
        process.kill()
    operator = LedgerFolder.open(process.home)
    secrets = {"operator": operator.operator_key.secret, "alice": ALICE.secret, "bank": BANK.secret}
    assert shown(log.read_text(), secrets | parties(alice=ALICE, bank=BANK, shop=SHOP)) == []
    people = [key.address.data for key in (ALICE, BANK, SHOP)] + [
        key.public.data for key in (ALICE, BANK, SHOP)
    ]
    for public in (
        *(receipt.encode() for receipt in receipts),
        *(page.SerializeToString() for page in pages),
    ):
        assert not [person for person in people if person in public]
    assert len(pages[0].events) == 2, "the bank sees its issue and its own transfer"
