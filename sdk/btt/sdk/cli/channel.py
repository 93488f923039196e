"""`btt channel`: the payment channels of a wallet, as the ledger has them."""

from __future__ import annotations

import asyncio
import datetime
import json
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from btt.sdk.cli.commands import Commands
from btt.sdk.cli.options import (
    AsJson,
    LedgerOption,
    WalletFolder,
    Yes,
    confirmed,
    keeping_ledger,
    open_wallet,
    parsed,
    wallet_folder,
)

if TYPE_CHECKING:
    from pathlib import Path

    from btt.proto.ledger.v1.ledger_pb2 import ChannelState
    from btt.sdk.errors import CaptureDisputed
    from btt.sdk.keys import PrivateKey
    from btt.sdk.ledger import LedgerClient
    from btt.sdk.payment.purse import Purse

app = typer.Typer(cls=Commands, no_args_is_help=True, help="Money that waits in payment channels.")

_PHASES = {1: "open", 2: "closing", 3: "closed"}
_Found = TypeVar("_Found")
ChannelId = Annotated[str, typer.Argument(help="Channel id, 64 hex digits or enough of its beginning.")]


def _with_ledger(
    ledger: str, wallet: Path | None, ask: Callable[[LedgerClient, PrivateKey], Awaitable[_Found]]
) -> _Found:
    folder = wallet_folder(wallet)
    key = open_wallet(folder).key()

    async def run() -> _Found:
        async with keeping_ledger(ledger, folder) as client:
            return await ask(client, key)

    return asyncio.run(run())


def with_purse(
    ledger: str, wallet: Path | None, act: Callable[[LedgerClient, PrivateKey, Purse], Awaitable[_Found]]
) -> _Found:
    """Acts on channels and on the wallet's own books of them.

    Args:
        ledger: Its address, as typed.
        wallet: The wallet's folder, if it was named.
        act: What to do with the ledger, the account's key, and the purse of both.
    """
    from btt.sdk.clock import configured
    from btt.sdk.payment.purse import Purse
    from btt.sdk.payment.store import PayerStore

    async def run(client: LedgerClient, key: PrivateKey) -> _Found:
        store = PayerStore(wallet_folder(wallet))
        try:
            return await act(client, key, Purse(key, store, client, configured()))
        finally:
            store.close()

    return _with_ledger(ledger, wallet, run)


async def _ids(client: LedgerClient, key: PrivateKey) -> list[bytes]:
    """The channels that the wallet opened, oldest first."""
    from btt.proto.ledger.v1 import ledger_pb2 as pb

    head = (await client.info()).head_seq
    found: list[bytes] = []
    async for page in client.watch(key):
        found += [event.channel_id for event in page.events if event.kind == pb.ENTRY_KIND_OPEN_CHANNEL]
        if page.seen_seq >= head:
            break
    return found


async def _states(client: LedgerClient, key: PrivateKey) -> list[ChannelState]:
    from btt.sdk.errors import SignerMismatch

    found = []
    for channel_id in await _ids(client, key):
        try:
            found.append(await client.channel(channel_id, key))
        except SignerMismatch:
            continue  # it pays this wallet; its node has the key
    return found


async def _listed(client: LedgerClient, key: PrivateKey) -> list[dict[str, Any]]:
    from btt.sdk.signing import ChannelCommit
    from btt.sdk.wallet import derive_channel_key

    found = []
    for state in await _states(client, key):
        terms = ChannelCommit.decode(state.commit)
        is_ours = derive_channel_key(key, terms.nonce).public == terms.k1
        found.append({**channel_fields(state), "granted": not is_ours})
    return found


async def _one(client: LedgerClient, key: PrivateKey, text: str) -> ChannelState:
    from btt.sdk.errors import ChannelUnknown

    text = text.lower()
    if len(text) == 64:
        return await client.channel(parsed(bytes.fromhex, text, "CHANNEL"), key)
    found = [one for one in await _ids(client, key) if text and one.hex().startswith(text)]
    if len(found) != 1:
        raise ChannelUnknown(f"{len(found)} channels of this wallet begin with {text!r}.")
    return await client.channel(found[0], key)


def channel_fields(state: ChannelState) -> dict[str, Any]:
    """Writes a channel for machines."""
    from btt.sdk.keys import Address
    from btt.sdk.signing import ChannelCommit

    terms = ChannelCommit.decode(state.commit)
    return {
        "channel": state.channel_id.hex(),
        "phase": _PHASES.get(state.phase, str(state.phase)),
        "payee": str(terms.payee),
        "node": str(Address(terms.service_ref[12:])),
        "deposit": str(state.deposit),
        "best": str(state.best),
        "captured": str(state.captured),
        "expires_ms": terms.expires_ms,
        "challenge_ms": terms.challenge_ms,
        "deadline_ms": state.deadline_ms,
        "early_close": bool(terms.flags & 1),
        "time_ms": state.time_ms,
    }


def moment(ms: int) -> str:
    """Writes a time for people."""
    try:
        moment = datetime.datetime.fromtimestamp(ms / 1000, datetime.UTC)
    except (OverflowError, ValueError, OSError):
        return f"{ms} ms"
    return f"{moment:%Y-%m-%d %H:%M:%S} UTC"


@app.command("list")
def list_channels(
    ledger: LedgerOption,
    wallet: WalletFolder = None,
    closed: Annotated[bool, typer.Option("--all", help="Show closed ones too.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the channels that this wallet opened."""
    from btt.sdk.money import Amount

    found = [one for one in _with_ledger(ledger, wallet, _listed) if closed or one["phase"] != "closed"]
    if as_json:
        typer.echo(json.dumps(found))
        return
    if not found:
        typer.echo("No channels.")
    for one in found:
        is_closed = one["phase"] == "closed"
        paid = Amount(int(one["captured"]) if is_closed else max(int(one["best"]), int(one["captured"])))
        typer.echo(
            f"{one['channel'][:16]}  {one['phase']:7}  {Amount(int(one['deposit']))} to {one['payee']}, "
            f"until {moment(one['expires_ms'])}"
            + (", granted:" if one["granted"] else "," if is_closed else "")
            + (f" {paid} paid" if one["granted"] or is_closed else "")
        )


@app.command()
def show(
    channel: ChannelId, ledger: LedgerOption, wallet: WalletFolder = None, as_json: AsJson = False
) -> None:
    """Show one channel."""
    from btt.sdk.clock import duration_text
    from btt.sdk.money import Amount

    found = channel_fields(_with_ledger(ledger, wallet, lambda client, key: _one(client, key, channel)))
    if as_json:
        typer.echo(json.dumps(found))
        return
    for name, value in found.items():
        if name in ("deposit", "best", "captured"):
            text = str(Amount(int(value)))
        elif name == "challenge_ms":
            text = duration_text(value)
        elif name.endswith("_ms"):
            text = moment(value) if value else "-"
        else:
            text = str(value)
        typer.echo(f"{name.removesuffix('_ms').replace('_', ' '):12} {text}")


@app.command()
def topup(
    channel: ChannelId,
    amount: Annotated[str, typer.Argument(help='How much more, such as "0.5 BTT".')],
    ledger: LedgerOption,
    wallet: WalletFolder = None,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Lock more money in a channel.

    If no answer comes, the same command again asks what became of it, and cannot lock it twice.
    """
    from btt.sdk.money import Amount

    more = parsed(Amount.parse, amount, "AMOUNT")
    if not yes and not confirmed(f"Lock {more} more in {channel[:16]}?"):
        raise typer.Exit(1)

    from btt.sdk.payment.outcome import look
    from btt.sdk.payment.topups import resume, top_up

    async def add(client: LedgerClient, key: PrivateKey, purse: Purse) -> dict[str, Any]:
        state = await _one(client, key, channel)
        earlier = await resume(purse, state.channel_id)
        if any(done.amount == more and not done.budget for done in earlier):
            typer.echo(
                "An earlier command asked for that, and it happened; nothing more was locked.", err=True
            )
        else:
            await top_up(purse, state.channel_id, int(more))
        return channel_fields(await look(purse, state.channel_id))

    found = with_purse(ledger, wallet, add)
    typer.echo(json.dumps(found) if as_json else f"The channel holds {Amount(int(found['deposit']))} now.")


@app.command()
def close(
    channel: ChannelId, ledger: LedgerOption, wallet: WalletFolder = None, as_json: AsJson = False
) -> None:
    """Ask for the rest of a channel; it comes back after the challenge window."""
    from btt.sdk.payment.outcome import look

    async def ask(client: LedgerClient, key: PrivateKey, purse: Purse) -> dict[str, Any]:
        state = await _one(client, key, channel)
        if _PHASES.get(state.phase) == "open":  # else it was asked before, and the answer may have been lost
            await client.request_close(state.channel_id, key)
        return channel_fields(await look(purse, state.channel_id))

    found = with_purse(ledger, wallet, ask)
    if as_json:
        typer.echo(json.dumps(found))
        return
    if found["phase"] == "closed":
        typer.echo("The channel is closed; the rest is back.")
        return
    typer.echo(f"The node may show its last payment until {moment(found['deadline_ms'])};")
    typer.echo("after that the rest comes back by itself.")


@app.command()
def refund(
    ledger: LedgerOption,
    wallet: WalletFolder = None,
    expired: Annotated[
        bool, typer.Option("--expired", help="Only what time has made due (the default).")
    ] = False,
    idle: Annotated[bool, typer.Option("--idle", help="Also what no program uses or keeps.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="Also what is kept for the next client.")] = False,
    as_json: AsJson = False,
) -> None:
    """Take back what lies in channels: those past their lock time or window, and unused ones.

    A node that answers closes an unused channel at once; else the rest comes back after the challenge window.
    """
    from btt.sdk.payment.refunds import KEEP_MS, Wanted, ask_back, collect, request_close
    from btt.sdk.signing import ChannelCommit

    if expired + idle + everything > 1:
        raise typer.BadParameter("choose one of --expired, --idle and --all")
    wanted = Wanted(idle=idle or everything, keep_ms=0 if everything else KEEP_MS)

    async def take(
        client: LedgerClient, key: PrivateKey, purse: Purse
    ) -> tuple[list[dict[str, Any]], list[CaptureDisputed]]:
        touched, disputes = await ask_back(purse, wanted)
        for state in await _states(client, key):
            if purse.store.find(state.channel_id) is None:  # opened with other books than these
                done = await collect(purse, state)
                is_ours = purse.holds(ChannelCommit.decode(state.commit))
                if done is None and wanted.idle and is_ours and _PHASES.get(state.phase) == "open":
                    done = await request_close(purse, state.channel_id)
                touched += [done] if done is not None else []
        return [channel_fields(state) for state in touched], disputes

    found, disputes = with_purse(ledger, wallet, take)
    if as_json:
        typer.echo(json.dumps(found))
    elif not found and not disputes:
        typer.echo("Nothing is due.")
    for one in found if not as_json else []:
        when = f", until {moment(one['deadline_ms'])}" if one["phase"] == "closing" else ""
        typer.echo(f"{one['channel'][:16]}  {one['phase']}{when}")
    if disputes:
        raise disputes[0]
