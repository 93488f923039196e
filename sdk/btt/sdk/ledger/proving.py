"""What exported receipts prove, offline: what was acknowledged, and whether the ledger told two stories."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from btt.sdk.errors import EvidenceInvalid
from btt.sdk.ledger.address import LedgerAddress
from btt.sdk.ledger.evidence import Evidence, load, operator_keys
from btt.sdk.ledger.keeping import EvidenceStore


@dataclass(frozen=True, slots=True)
class Proof:
    """What files of evidence prove together.

    Args:
        acknowledged: The ledger did these, and signed that it did.
        unacknowledged: Payments without a receipt, each signed by the key beside it (`Evidence.signer`);
            whether that is the channel's K1, its T1 says.
        undone: The ledger did these and went back behind them, in a recovery that it signed too.
        equivocations: Pairs of receipts that no honest ledger signs both.
    """

    acknowledged: tuple[Evidence, ...]
    unacknowledged: tuple[Evidence, ...]
    undone: tuple[Evidence, ...]
    equivocations: tuple[tuple[Evidence, Evidence], ...]


def prove(paths: Iterable[Path], ledger: LedgerAddress) -> Proof:
    """Verifies files of evidence without asking anybody.

    Args:
        paths: Of the files; each brings its own proof of who signs for the ledger.
        ledger: From one's own configuration; only its operator and id are used.

    Raises:
        ConfigError: One is no such file.
        WrongLedger: One is about another ledger.
        EvidenceInvalid: Something in one proves nothing; the text names it.
        StorageError: One cannot be read.
    """
    acknowledged: list[Evidence] = []
    unacknowledged: list[Evidence] = []
    undone: list[Evidence] = []
    with (
        tempfile.TemporaryDirectory(prefix="btt-receipts-") as folder,
        closing(EvidenceStore(Path(folder) / "all.db")) as store,
    ):
        for path in paths:
            header, found = load(path, ledger.ledger_id)
            operations: list[Evidence] = []
            try:
                keys = operator_keys(header, ledger.operator)
                for one in found:
                    stands = one.check(keys, ledger.ledger_id)
                    kept = acknowledged if one.receipt else unacknowledged
                    (kept if stands else undone).append(one)
                    operations.append(one)
            except EvidenceInvalid as error:
                raise EvidenceInvalid(f"{path}: {error.message}") from error
            store.keep(header, operations)
        equivocations = tuple(store.equivocations(ledger.ledger_id))
    return Proof(tuple(acknowledged), tuple(unacknowledged), tuple(undone), equivocations)
