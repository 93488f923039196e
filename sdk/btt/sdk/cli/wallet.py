"""`btt wallet`: make a wallet, show its address and what it holds, let programs spend some of it."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from contextlib import closing
from typing import TYPE_CHECKING, Annotated

import typer

from btt.sdk.cli import grants
from btt.sdk.cli.commands import Commands
from btt.sdk.cli.options import (
    PASSWORD_VARIABLE,
    AsJson,
    ExportOption,
    LedgerOption,
    WalletFolder,
    Yes,
    confirmed,
    keeping_ledger,
    open_wallet,
    parsed,
    wallet_folder,
)
from btt.sdk.errors import ConfigError

if TYPE_CHECKING:
    from btt.sdk.ledger import SignedReceipt
    from btt.sdk.payment.store import PayerStore
    from btt.sdk.payment.transfers import Earlier

app = typer.Typer(cls=Commands, no_args_is_help=True, help="Your BTT: one file, twelve words, one address.")
app.command()(grants.grant)
app.command()(grants.grants)


@app.command()
def create(
    wallet: WalletFolder = None,
    password: Annotated[
        bool | None,
        typer.Option(
            "--password/--no-password",
            help=f"Protect it with a password, asked for or from {PASSWORD_VARIABLE}.",
            show_default="ask on a terminal",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a new wallet and show its twelve words, this once."""
    from btt.sdk.wallet import Keystore

    folder = wallet_folder(wallet)
    path = folder / "wallet.json"
    if path.exists():  # before anything is asked
        raise ConfigError(f"There is a wallet at {path} already.", hint="Use it, or choose --wallet.")
    made = Keystore.create(path, _new_password(wanted=password))
    if as_json:
        typer.echo(json.dumps({"address": str(made.address), "words": made.words, "wallet": str(path)}))
        return
    typer.echo(f"Address {made.address}")
    typer.echo(f"Wallet  {path}")
    typer.echo("Words   " + made.words)
    typer.echo("Write the words down and keep them secret: whoever has them has the money,")
    typer.echo("and nothing else brings it back when the file or its password is lost.")


def _new_password(*, wanted: bool | None) -> str:
    if wanted is False:
        return ""
    given = os.environ.get(PASSWORD_VARIABLE)
    if given is not None:
        return given
    if sys.stdin.isatty():
        text: str = typer.prompt(
            "Password (empty for none)",
            default="",
            show_default=False,
            hide_input=True,
            confirmation_prompt=True,
            err=True,
        )
        return text
    if wanted:
        raise ConfigError("There is no terminal to ask for a password on.", hint=f"Set {PASSWORD_VARIABLE}.")
    typer.echo(
        "warning: The wallet has no password, for there is no terminal to ask for one on. "
        f"Set {PASSWORD_VARIABLE}, or say --no-password.",
        err=True,
    )
    return ""


@app.command()
def address(wallet: WalletFolder = None, as_json: AsJson = False) -> None:
    """Show the address that receives BTT."""
    found = str(open_wallet(wallet_folder(wallet)).address)
    typer.echo(json.dumps({"address": found}) if as_json else found)


@app.command()
def balance(ledger: LedgerOption, wallet: WalletFolder = None, as_json: AsJson = False) -> None:
    """Show what the wallet holds on a ledger, and what it has locked in channels."""
    from btt.sdk.ledger import LedgerAddress, LedgerClient
    from btt.sdk.money import Amount

    where = parsed(LedgerAddress.parse, ledger, "--ledger")
    opened = open_wallet(wallet_folder(wallet))

    async def ask() -> tuple[Amount, Amount]:
        async with LedgerClient.connect(where) as client:
            state = await client.account(opened.key())
        return Amount(state.available), Amount(state.locked)

    free, locked = asyncio.run(ask())
    if as_json:
        found = {"address": str(opened.address), "balance": str(int(free)), "locked": str(int(locked))}
        typer.echo(json.dumps(found))
        return
    typer.echo(f"Address {opened.address}")
    typer.echo(f"Balance {free}")
    if locked:
        typer.echo(f"Locked  {locked} in channels")


@app.command()
def transfer(
    to: Annotated[str, typer.Argument(help="Address that gets it, T…")],
    amount: Annotated[str, typer.Argument(help='How much, such as "0.5 BTT".')],
    ledger: LedgerOption,
    wallet: WalletFolder = None,
    memo: Annotated[str, typer.Option(help="For the recipient; at most 32 bytes.")] = "",
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Send BTT to another account of the ledger.

    If no answer comes, the same command again asks what became of it, and cannot pay twice. A command for
    another transfer settles the one before it first.
    """
    from btt.sdk.keys import Address
    from btt.sdk.money import Amount
    from btt.sdk.payment import transfers
    from btt.sdk.payment.store import PayerStore

    folder = wallet_folder(wallet)
    receiver = parsed(Address.parse, to, "TO")
    value = parsed(Amount.parse, amount, "AMOUNT")
    note = memo.encode(errors="surrogateescape").ljust(32, b"\0")
    if len(note) > 32:
        raise typer.BadParameter("at most 32 bytes", param_hint="--memo")
    opened = open_wallet(folder)
    if not yes and not confirmed(f"Send {value} to {receiver}?"):
        raise typer.Exit(1)

    key = opened.key()

    async def move(store: PayerStore) -> tuple[SignedReceipt, Earlier | None]:
        async with keeping_ledger(ledger, folder) as client:
            earlier = await transfers.settle(store, client, key)
            if earlier is not None:
                typer.echo(_what_became_of(earlier), err=True)
                before = earlier.request
                is_this = (before.recipient, before.amount, before.memo) == (receiver, value, note)
                if earlier.receipt is not None and is_this:
                    typer.echo("That is what was asked for now; nothing more was sent.", err=True)
                    return earlier.receipt, earlier
            return await transfers.send(store, client, key, receiver, int(value), note), earlier

    with closing(PayerStore(folder)) as store, transfers.alone(store):
        receipt, earlier = asyncio.run(move(store))
    if as_json:
        sent = {
            "entry": receipt.seq, "request": receipt.receipt.request_digest.hex(),
            "amount": str(int(value)), "to": str(receiver), "earlier": None,
        }  # fmt: skip
        if earlier is not None:
            sent["earlier"] = {
                "entry": earlier.receipt.seq if earlier.receipt else None,
                "amount": str(int(earlier.request.amount)), "to": str(earlier.request.recipient),
            }  # fmt: skip
        typer.echo(json.dumps(sent))
        return
    typer.echo(f"Sent {value} to {receiver}: entry {receipt.seq} of the ledger.")


def _what_became_of(earlier: Earlier) -> str:
    from btt.sdk.money import Amount

    what = f"A transfer of {Amount(earlier.request.amount)} to {earlier.request.recipient}, asked for before,"
    if earlier.receipt is None:
        return f"{what} did not happen, and never will."
    return f"{what} went through: entry {earlier.receipt.seq} of the ledger."


@app.command()
def forgive(
    node: Annotated[str, typer.Argument(help="Address of the node, T…")],
    wallet: WalletFolder = None,
    as_json: AsJson = False,
) -> None:
    """Use a node again that the wallet leaves alone because of what it did."""
    from btt.sdk.keys import Address
    from btt.sdk.payment.store import PayerStore

    who = parsed(Address.parse, node, "NODE")
    store = PayerStore(wallet_folder(wallet))
    try:
        found = store.forgive(who)
    finally:
        store.close()
    if as_json:
        typer.echo(json.dumps({"node": str(who), "forgiven": found}))
        return
    typer.echo(f"{who} is forgiven." if found else f"There was nothing against {who}.")


@app.command()
def receipts(
    ledger: LedgerOption,
    wallet: WalletFolder = None,
    update: Annotated[
        bool, typer.Option("--update", help="Ask the ledger first for what others did, such as to pay us.")
    ] = False,
    export: ExportOption = None,
    as_json: AsJson = False,
) -> None:
    """List what the ledger acknowledged, from the wallet's own file; the ledger need not be there."""
    from btt.sdk.cli.receipts import show_receipts
    from btt.sdk.ledger import LedgerAddress

    where = parsed(LedgerAddress.parse, ledger, "--ledger")
    folder = wallet_folder(wallet)
    if update:
        key = open_wallet(folder).key()

        async def gather() -> None:
            async with keeping_ledger(ledger, folder) as client:
                await client.gather(key)

        asyncio.run(gather())
    show_receipts(folder, where.ledger_id, export=export, as_json=as_json)
