"""Makes the distribution of a new service from the template, and generates code from its proto."""

from __future__ import annotations

import importlib.util
import keyword
import re
import subprocess
import sys
from importlib import resources
from importlib.metadata import entry_points
from pathlib import Path
from string import Template
from typing import Final

from btt.sdk.errors import ConfigError, StorageError

SERVICES: Final = "btt.services"
"""Group of the entry points by which nodes find services."""

_NAME: Final = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_FILES: Final = {
    "pyproject.toml.in": "pyproject.toml",
    "README.md.in": "README.md",
    "service.proto.in": "src/$package/v1/$package.proto",
    "plugin.py.in": "src/$package/plugin.py",
    "conformance.py.in": "src/$package/conformance.py",
    "test_service.py.in": "tests/test_$package.py",
}


def new(name: str, folder: Path) -> None:
    """Writes a new distribution, with its code generated if the generator is installed.

    Args:
        name: Of the distribution and the service, such as "acme-words".
        folder: New, or empty.

    Raises:
        ConfigError: The name does not do, or the folder holds something.
        StorageError: It cannot be written.
    """
    package = name.replace("-", "_")
    if not _NAME.fullmatch(name) or len(name) > 60 or keyword.iskeyword(package):
        raise ConfigError(f'"{name}" is no name for a service.', hint='Write it like "acme-words".')
    if importlib.util.find_spec(package) is not None:
        raise ConfigError(f"There is a Python package {package} already.", hint="Choose another name.")
    if name in entry_points(group=SERVICES).names:
        raise ConfigError(f"A service {name} is installed already.", hint="Choose another name.")
    try:
        if folder.exists() and any(folder.iterdir()):
            raise ConfigError(f"{folder} is not empty.", hint="Choose another folder.")
        _write(name, package, folder)
    except OSError as error:
        raise StorageError(
            f"{error.filename or folder} cannot be written ({error.strerror}).", hint="Choose another folder."
        ) from error
    if can_generate():
        generate(folder)


def _write(name: str, package: str, folder: Path) -> None:
    template = resources.files("btt.sdk") / "template"
    for source, target in _FILES.items():
        path = folder / Template(target).substitute(package=package)
        path.parent.mkdir(parents=True, exist_ok=True)
        text = Template((template / source).read_text("utf-8")).substitute(name=name, package=package)
        path.write_text(text, "utf-8")
    for made in (folder / "src" / package, folder / "src" / package / "v1"):
        (made / "__init__.py").touch()


def can_generate() -> bool:
    """Says whether the generator is installed (grpcio-tools)."""
    return importlib.util.find_spec("grpc_tools") is not None


def generate(folder: Path) -> list[Path]:
    """Generates the code of every proto below `src`, beside it.

    Args:
        folder: Of the distribution.

    Returns:
        The protos.

    Raises:
        ConfigError: There is none, it is wrong, or the generator is not installed.
    """
    if not can_generate():
        raise ConfigError("The generator is not installed.", hint="pip install 'grpcio-tools>=1.85.1'")
    source = folder / "src"
    protos = sorted(source.rglob("*.proto"))
    if not protos:
        raise ConfigError(f"There is no .proto below {source}.")
    spec = importlib.util.find_spec("btt.proto")
    assert spec is not None, "it comes with this package"
    includes = {Path(place).parent.parent for place in spec.submodule_search_locations or ()}
    command = [
        sys.executable, "-m", "grpc_tools.protoc", f"-I{source}", *(f"-I{path}" for path in includes),
        f"--python_out={source}", f"--pyi_out={source}", f"--grpc_python_out={source}",
        *(str(proto.relative_to(source)) for proto in protos),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - the generator
    if done.returncode:
        raise ConfigError(f"The proto does not compile: {done.stderr.strip()}")
    return protos
