"""Options that several commands share, and where the wallet is."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from btt.sdk.errors import ConfigError, InvalidRequest

if TYPE_CHECKING:
    from btt.sdk.ledger import LedgerClient
    from btt.sdk.wallet import Keystore

PASSWORD_VARIABLE = "BTT_WALLET_PASSWORD"  # noqa: S105 - its name, not a password

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before spending.")]
WalletFolder = Annotated[
    Path | None,
    typer.Option("--wallet", envvar="BTT_WALLET", help="Folder of the wallet.", show_default="your own"),
]
LedgerOption = Annotated[
    str, typer.Option("--ledger", envvar="BTT_LEDGER", help="The ledger: btt-ledger://T…@host:port/…")
]
NodeOption = Annotated[
    str,
    typer.Option("--from", envvar="BTT_NODES", help="Nodes, separated by commas: btt://T…@host:port,…"),
]
ClockFile = Annotated[
    Path | None, typer.Option("--clock", help="File of the clock that a devnet shares.", show_default=False)
]
TrustNew = Annotated[
    bool, typer.Option("--trust-new", help="Trust an unknown node at a bare host:port, and remember it.")
]
ExportOption = Annotated[
    Path | None,
    typer.Option("--export", help="Write them to this new file, as evidence for others.", show_default=False),
]

_Parsed = TypeVar("_Parsed")


def parsed(parse: Callable[[str], _Parsed], text: str, option: str) -> _Parsed:
    """Reads what the user typed.

    Args:
        parse: What reads it.
        text: As typed.
        option: Name of the option or argument, for the message.

    Raises:
        typer.BadParameter: It cannot be read; the program ends with 2.
    """
    try:
        return parse(text)
    except InvalidRequest as error:
        raise typer.BadParameter(error.message, param_hint=option) from None
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from None


def confirmed(question: str) -> bool:
    """Asks before money moves.

    Raises:
        ConfigError: There is nobody to ask.
    """
    if not sys.stdin.isatty():
        raise ConfigError("There is no terminal to ask on whether to spend.", hint="Say --yes.")
    return bool(typer.confirm(question, err=True))


def wallet_folder(chosen: Path | None) -> Path:
    """Returns the folder of the wallet: the chosen one, or this user's."""
    if chosen is not None:
        return chosen
    from platformdirs import user_data_path

    return user_data_path("btt") / "wallet"


@asynccontextmanager
async def keeping_ledger(ledger: str, folder: Path) -> AsyncIterator[LedgerClient]:
    """Connects to a ledger; what it acknowledges is kept in the wallet's folder.

    Args:
        ledger: Its address, as typed.
        folder: Of the wallet.
    """
    from btt.sdk.ledger import LedgerAddress, LedgerClient
    from btt.sdk.ledger.keeping import RECEIPTS, EvidenceStore

    where = parsed(LedgerAddress.parse, ledger, "--ledger")
    with closing(EvidenceStore(folder / RECEIPTS)) as keeper:
        async with LedgerClient.connect(where, keeper=keeper) as client:
            yield client


def open_wallet(folder: Path) -> Keystore:
    """Opens the wallet of a folder; asks for the password only when there is one.

    Raises:
        ConfigError: There is no wallet, or the password is wrong or missing.
    """
    from btt.sdk.wallet import Keystore

    path = folder / "wallet.json"
    given = os.environ.get(PASSWORD_VARIABLE)
    if given is not None:
        return Keystore.open(path, given)
    try:
        return Keystore.open(path, "")
    except ConfigError:
        if not path.exists():
            raise
    if not sys.stdin.isatty():
        raise ConfigError(f"The wallet {path} has a password.", hint=f"Set {PASSWORD_VARIABLE}.")
    return Keystore.open(path, typer.prompt("Password of the wallet", hide_input=True, err=True))
