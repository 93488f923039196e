"""Making a new service where that cannot be done."""

from __future__ import annotations

from pathlib import Path

import pytest

from btt.sdk import scaffold
from btt.sdk.errors import ConfigError, StorageError


def test_a_folder_that_cannot_be_written_is_a_typed_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StorageError, match="cannot be written") as refused:
            scaffold.new("acme-nowhere", folder)
        assert refused.value.hint == "Choose another folder."
    with pytest.raises(ConfigError, match="is not empty"):
        scaffold.new("acme-nowhere", tmp_path)
