"""Compiles a test's proto, as a third party's build would."""

from __future__ import annotations

import importlib
import sys
import tempfile
from importlib import resources
from pathlib import Path
from types import ModuleType

from grpc_tools import protoc

_GOOGLE = resources.files("grpc_tools") / "_proto"
_PROTO = Path(__file__).parent.parent.parent / "proto"


def compile_proto(path: Path) -> tuple[ModuleType, ModuleType]:
    """Returns the modules of the messages and of the services."""
    with tempfile.TemporaryDirectory() as out:
        code = protoc.main(
            [
                "protoc",
                f"-I{path.parent}",
                f"-I{_PROTO}",
                f"-I{_GOOGLE}",
                f"--python_out={out}",
                f"--grpc_python_out={out}",
                path.name,
            ]
        )
        assert code == 0
        sys.path.insert(0, out)
        try:
            return importlib.import_module(f"{path.stem}_pb2"), importlib.import_module(
                f"{path.stem}_pb2_grpc"
            )
        finally:
            sys.path.remove(out)
