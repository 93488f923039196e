"""`btt content add` finds the ledger where the node has it."""

from __future__ import annotations

import pytest

from btt.sdk.errors import ConfigError
from btt.services.content.cli import ledger_of

ADDRESS = "btt-ledger://TFile@127.0.0.1:1/00"


def test_the_ledger_is_that_of_the_nodes_configuration(tmp_path, monkeypatch):
    monkeypatch.delenv("BTT_NODE__LEDGER__ADDRESS", raising=False)
    with pytest.raises(ConfigError, match="btt node init"):
        ledger_of(tmp_path)
    path = tmp_path / "node.toml"
    for text in ("", "[ledger", "[ledger]\n", 'ledger = "here"\n'):
        path.write_text(text)
        with pytest.raises(ConfigError, match=r"does not say on which ledger.*--ledger"):
            ledger_of(tmp_path)
    path.write_text(f'[ledger]\naddress = "{ADDRESS}"\n')
    assert ledger_of(tmp_path) == ADDRESS
    monkeypatch.setenv("BTT_NODE__LEDGER__ADDRESS", "btt-ledger://TOther@127.0.0.1:1/00")
    assert ledger_of(tmp_path) == "btt-ledger://TOther@127.0.0.1:1/00"
