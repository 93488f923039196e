"""Somebody with a fresh home folder who reads pages and does what they say.

Every fenced block of a page has one of these languages:

- `sh`: typed line by line. A line that ends in `# exits N` must end with that code.
  `pip install -e 'FOLDER[extras]'` installs the folder for this reader alone, without what it
  depends on: that is here already.
- `python`: run as a program.
- `text`: what the block before it printed, among other things; `…` stands for anything in a line,
  and for any lines where it stands alone.
- `toml`: a part of node.toml, checked as a node checks it.
- `proto`: compiled.
- `{directive}`: read by the generator of the site, which fails where it does not understand.

A block whose code cannot run here says why in a comment before it: `<!-- not run: installs -->`.
`<!-- in the clone -->` runs a block in the root of the repository. A page that begins with
`<!-- goes on from: PAGE -->` is read after that page, by the same reader.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from btt.sdk.keys import Address

ROOT = Path(__file__).resolve().parents[2]
SERVERS = ("btt ledger serve", "btt node start")
# What a reader copies from the output into a variable.
PRINTED = {
    "BTT_LEDGER": r"btt-ledger://[^\s\"]+",
    "BTT_NODES": r"btt://[^\s\"]+",
    "SECOND": r"btt://[^\s\"]+",
    "TOKEN": r"--resume (\S+)",
    "INFOHASH": r"Infohash +([0-9a-f]{64})",
    "BTT_WALLET": r"export BTT_WALLET=(\S+)",
    "BTT_CLOCK": r"export BTT_CLOCK=(\S+)",
}

_BLOCK = re.compile(
    r"^(?:<!-- (?P<how>[^\n]+) -->\n)?```(?P<language>[^\n]*)\n(?P<text>.*?)^```$", re.S | re.M
)
_FENCE = re.compile(r"^\s*(?:```|~~~)", re.M)
_BEFORE = re.compile(r"\A<!-- goes on from: (\S+) -->\n")
_EXITS = re.compile(r"# exits (\d+)$")
_INSTALLS = re.compile(r"pip install -e '([a-z-]+)(?:\[[a-z]+\])?'")
_REASON = re.compile(r"not run: [a-z].*")


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block.

    Attributes:
        page: Path below the root of the repository.
        language: What stands behind the fence.
        text: What stands between.
        skipped: It says why it is not run.
        in_clone: It runs in the root of the repository.
    """

    page: str
    language: str
    text: str
    skipped: bool
    in_clone: bool


@dataclass(frozen=True, slots=True)
class Page:
    """A page with its blocks.

    Attributes:
        name: Path below the root of the repository.
        before: The page it goes on from; empty if it stands alone.
        blocks: In order.
    """

    name: str
    before: str
    blocks: tuple[Block, ...]

    @property
    def acts(self) -> bool:
        """Something of it runs."""
        return any(not block.skipped for block in self.blocks)


def read_page(name: str, text: str) -> Page:
    """Finds the blocks of a page.

    Raises:
        ValueError: A fence would be skipped without a word: it is indented or not closed, or the
            comment before it is none of ours.
    """
    blocks = []
    directives = 0
    for found in _BLOCK.finditer(text):
        if found["language"].startswith("{"):
            directives += 1
            continue
        how = found["how"] or ""
        if how and how != "in the clone" and not _REASON.fullmatch(how):
            raise ValueError(f"{name}: nobody knows what <!-- {how} --> says about a block")
        blocks.append(
            Block(name, found["language"], found["text"], how.startswith("not run"), how == "in the clone")
        )
    if len(_FENCE.findall(text)) != 2 * (len(blocks) + directives):
        raise ValueError(f"{name}: a fence is indented, not closed, or of another kind")
    before = _BEFORE.match(text)
    folder = Path(name).parent
    return Page(name, str(folder / before[1]) if before else "", tuple(blocks))


def pages() -> dict[str, Page]:
    """All pages that tell a reader what to do, by name."""
    paths = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    names = [str(path.relative_to(ROOT)) for path in paths]
    return {name: read_page(name, (ROOT / name).read_text("utf-8")) for name in names}


def stories(known: dict[str, Page]) -> list[tuple[Page, ...]]:
    """Pages that act, each with those that go on from it."""
    after = {page.before: page for page in known.values() if page.before}
    told = []
    for page in known.values():
        if page.acts and not page.before:
            story = [page]
            while story[-1].name in after:
                story.append(after[story[-1].name])
            told.append(tuple(story))
    assert sum(map(len, told)) == sum(page.acts for page in known.values()), "a page goes on from nowhere"
    return told


@dataclass
class Reader:
    """One person, one home folder.

    Attributes:
        home: The folder.
        printed: What the last block printed.
        seen: All that was printed.
        variables: What was copied into the environment.
        servers: What runs in other terminals.
        installed: What Python finds besides what is there for all.
    """

    home: Path
    printed: str = ""
    seen: str = ""
    # A port of the default may be taken on this machine; that pages name none twice is seen to below.
    variables: dict[str, str] = field(default_factory=lambda: {"BTT_NODE__NODE__LISTEN": "127.0.0.1:0"})
    servers: list[subprocess.Popen[str]] = field(default_factory=list)
    installed: list[Path] = field(default_factory=list)

    def read(self, page: Page) -> int:
        """Does what a page says; returns how many blocks did something."""
        ways: dict[str, Callable[[Block], None]] = {
            "sh": self._type,
            "python": self._python,
            "text": self._compare,
            "toml": self._configure,
            "proto": self._compile,
        }
        done = [block for block in page.blocks if not block.skipped]
        for block in done:
            assert block.language in ways, (
                f"{page.name}: a block of {block.language!r} does not say why it is not run"
            )
            ways[block.language](block)
        return len(done)

    def environment(self, *, in_clone: bool = False) -> dict[str, str]:
        """What a command sees: nothing of this machine's own wallets and nodes."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("BTT_", "XDG_"))}
        tools = f"{self._tools()}{os.pathsep}{kept.get('PATH', os.defpath)}"
        plain = {"COLUMNS": "100"}
        if self.installed:
            plain["PYTHONPATH"] = os.pathsep.join(map(str, self.installed))
        # What was copied for nodes and clients is none of the business of a program of the clone.
        copied = {} if in_clone else self.variables
        return {**kept, **plain, "HOME": str(self.home), "PATH": tools, **copied}

    def _tools(self) -> Path:
        folder = self.home / ".tools"
        folder.mkdir(exist_ok=True)
        for name, words in (
            ("btt", " -m btt.sdk.cli"),
            ("python", ""),
            ("pytest", " -m pytest -p no:cacheprovider"),
        ):
            script = folder / name
            script.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)}{words} "$@"\n')
            script.chmod(0o755)
        return folder

    def _run(self, words: Sequence[str], block: Block, exits: int = 0) -> None:
        done = subprocess.run(
            words, cwd=ROOT if block.in_clone else self.home,
            env=self.environment(in_clone=block.in_clone),
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=150, check=False,
        )  # fmt: skip
        said = f"{done.stdout}\n{done.stderr}"
        assert done.returncode == exits, f"{block.page}: {words[-1]}\nexited with {done.returncode}\n{said}"
        self._saw(said if exits else done.stdout)

    def _saw(self, text: str) -> None:
        self.printed += text
        self.seen += text

    def _type(self, block: Block) -> None:
        self.printed = ""
        for line in block.text.splitlines():
            exits = _EXITS.search(line)
            if exits:
                self._run(("bash", "-ec", line), block, int(exits[1]))
            elif line.startswith("export ") and line.endswith("=…"):
                name = line.removeprefix("export ").removesuffix("=…")
                values = re.findall(PRINTED[name], self.seen)
                assert values, f"{block.page}: nothing that was printed is a {name}"
                self.variables[name] = values[-1]
            elif line.startswith(SERVERS):
                self._serve(line)
            elif found := _INSTALLS.fullmatch(line):
                self._install(self.home / found[1])
            else:
                self._run(("bash", "-ec", line), block)

    def _serve(self, line: str) -> None:
        listens = [tomllib.loads(path.read_text())["node"]["listen"] for path in self.home.rglob("node.toml")]
        assert len(listens) == len(set(listens)), f"two nodes are to listen at one place: {listens}"
        words = [sys.executable, "-m", "btt.sdk.cli", *shlex.split(line)[1:], "--stdin-lifeline"]
        server = subprocess.Popen(
            words, cwd=self.home, env=self.environment(), text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self.servers.append(server)
        assert server.stdout is not None
        ready = server.stdout.readline()
        assert json.loads(ready)["ready"] is True
        self._saw(ready)

    def _install(self, folder: Path) -> None:
        site = self.home / ".site"
        words = ("--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--target", str(site))
        done = subprocess.run(
            [sys.executable, "-m", "pip", "install", "--quiet", *words, str(folder)],
            capture_output=True, text=True, timeout=150, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        # First the sources: an editable install follows what its author changes.
        self.installed += [folder / "src", site]

    def _python(self, block: Block) -> None:
        self.printed = ""
        self._run((sys.executable, "-c", block.text), block)

    def _compare(self, block: Block) -> None:
        lines = block.text.strip().splitlines()
        parts = [r"(?s:.*)" if line == "…" else re.escape(line).replace("…", r"[^\n]*") for line in lines]
        wanted = r"\n".join(parts)
        assert re.search(rf"^{wanted}$", self.printed, re.M), (
            f"{block.page} says\n{block.text}\nand this is what was printed:\n{self.printed}"
        )

    def _configure(self, block: Block) -> None:
        from btt.node.config import parse

        # What a page leaves out is there already; only its form matters here.
        ledger = f"btt-ledger://{Address(bytes(20))}@127.0.0.1:1/{bytes(32).hex()}"
        parse({"ledger": {"address": ledger}, **tomllib.loads(block.text)}, source=block.page)

    def _compile(self, block: Block) -> None:
        made = self.home / ".protos"
        made.mkdir(exist_ok=True)
        (made / "snippet.proto").write_text(block.text)
        paths = (f"-I{made}", f"-I{ROOT / 'proto'}", f"--descriptor_set_out={made / 'snippet.bin'}")
        self._run((sys.executable, "-m", "grpc_tools.protoc", *paths, "snippet.proto"), block)

    def stop(self) -> None:
        """Ends what runs in other terminals, the last one first."""
        for server in reversed(self.servers):
            server.terminate()
            server.communicate(timeout=30)


def reading(home: Path) -> Iterator[Reader]:
    """Yields a reader who leaves nothing running."""
    made = Reader(home)
    try:
        yield made
    finally:
        made.stop()
    assert [server.returncode for server in made.servers] == [0] * len(made.servers)
