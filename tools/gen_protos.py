"""Generates the Python code of every .proto beside it, in place.

Run `python tools/gen_protos.py`; CI runs it with `--check` and fails when what is
committed differs from what the pinned generators make.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent / "proto"


def generate(target: Path) -> None:
    protos = sorted(str(p.relative_to(ROOT)) for p in ROOT.rglob("*.proto"))
    with_service = [p for p in protos if "\nservice " in (ROOT / p).read_text()]
    plugins = (
        f"--plugin=protoc-gen-mypy={tool('protoc-gen-mypy')}",
        (f"--plugin=protoc-gen-mypy_grpc={tool('protoc-gen-mypy_grpc')}"),
    )
    base = [sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT}", *plugins]
    subprocess.run([*base, f"--python_out={target}", f"--mypy_out={target}", *protos], check=True)
    subprocess.run(
        [*base, f"--grpc_python_out={target}", f"--mypy_grpc_out={target}", *with_service], check=True
    )


def tool(name: str) -> str:
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else shutil.which(name) or name


def generated(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*_pb2*.py*") if p.suffix != ".pyc"
    }


def main() -> int:
    if "--check" not in sys.argv:
        generate(ROOT)
        return 0
    with tempfile.TemporaryDirectory() as fresh:
        generate(Path(fresh))
        want, have = generated(Path(fresh)), generated(ROOT)
    drift = sorted(name for name in want.keys() | have.keys() if want.get(name) != have.get(name))
    for name in drift:
        print(f"generated code differs: proto/{name}; run python tools/gen_protos.py")
    return 1 if drift else 0


if __name__ == "__main__":
    sys.exit(main())
