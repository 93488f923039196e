"""What the holders of receipts see of them, and how they hand them on."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import ExitStack, closing
from itertools import chain
from pathlib import Path

import typer

from btt.proto.ledger.v1.ledger_pb2 import EvidenceHeader
from btt.sdk.errors import ConfigError
from btt.sdk.ledger.evidence import Evidence
from btt.sdk.ledger.evidence import export as write
from btt.sdk.ledger.keeping import RECEIPTS, EvidenceStore


def show_receipts(
    folder: Path,
    ledger_id: bytes,
    *,
    unshown: Iterable[Evidence] = (),
    export: Path | None,
    as_json: bool,
) -> None:
    """Lists or exports the evidence in the folder of a wallet or node.

    Args:
        folder: Holds the file of receipts; it need not have one yet.
        ledger_id: 32 bytes.
        unshown: Best updates that a payee holds.
        export: New file; None to list.
        as_json: Print one JSON object.

    Raises:
        ConfigError: There is nothing to export, or the file exists.
        StorageError: The disk failed.
    """
    header: EvidenceHeader | None = None
    told = unshown
    with ExitStack() as stack:
        if (folder / RECEIPTS).exists():
            store = stack.enter_context(closing(EvidenceStore(folder / RECEIPTS)))
            header = store.header(ledger_id)
            told = chain(store.operations(ledger_id), unshown)  # one by one: a node keeps them for ever
        if export is not None:
            if header is None:
                raise ConfigError("The ledger was never heard of here; there is nothing to export.")
            count = write(export, header, told)
            done = f"Wrote {count} operations to {export}."
            typer.echo(json.dumps({"operations": count}) if as_json else done)
        elif as_json:
            typer.echo(json.dumps([_as_dict(one) for one in told]))
        else:
            for one in told:
                typer.echo(str(one))


def _as_dict(one: Evidence) -> dict[str, object]:
    receipt = one.receipt.receipt if one.receipt else None
    return {
        "what": str(one),
        "entry": receipt.seq if receipt else None,
        "epoch": receipt.epoch if receipt else None,
        "time_ms": receipt.time_ms if receipt else None,
        "request": receipt.request_digest.hex() if receipt else None,
    }
