"""Where a fetch keeps its bytes: incomplete files that survive a crash, and whole ones under their names.

A run is written at its place in `<file>.<8 digits of the infohash>.btt-part`, whatever the order:
other content of the same name must not cost what was paid already. Nothing is recorded beside
it: after a crash the part is hashed again, so what counts as there is what verifies, and holes
cost nothing. A file gets its name only when it is whole and synced, and never takes the place
of another. All functions block; call them from worker threads. POSIX only.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

from btt.sdk.content import files, paths
from btt.sdk.content.direct import DirectWriter
from btt.sdk.content.torrent import RUN, Torrent
from btt.sdk.errors import BttError, ConfigError, StorageError

Progress = Callable[[int, int], None]
"""Called with the bytes looked at and the bytes in all; what it raises ends the work."""

_MOST_OPEN = 64
"""Parts that stay open: those of small files come faster than a disk syncs and names them."""

_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_WRITE = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC


class _Part:
    """An open part file; it is closed only when no thread writes to it any more."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.direct = DirectWriter(fd)
        self.writers = 0


class Destination:
    """The place of one fetch on disk; a context manager that keeps other fetches out.

    Args:
        root: The folder the user chose. A single file becomes `root/<name>`, several become
            `root/<name>/...`.
        torrent: What is fetched.

    Raises:
        ConfigError: From `__enter__`, if another fetch works here or the place is unusable.
        StorageError: From `__enter__`, if the disk fails.
    """

    def __init__(self, root: Path, torrent: Torrent) -> None:
        self._root = root
        self._torrent = torrent
        self._above = () if torrent.is_single else (torrent.name,)
        # One flag a run; None: not looked at yet.
        self._have: list[bytearray | None] = [None] * len(torrent.files)
        self._final = [False] * len(torrent.files)
        self._begun = [False] * len(torrent.files)
        self._parts: dict[int, _Part] = {}
        self._changed = threading.Condition()
        self._scanning = threading.Lock()
        self._finishing = threading.Lock()
        self._folder_lock = -1
        self._closed = True

    def __enter__(self) -> Destination:
        if not self._torrent.is_single:
            fd = files.open_folder(self._root, self._above)
            assert fd is not None
            self._folder_lock = fd
            try:
                files.lock(fd, self._root / self._torrent.name)
            except BaseException:
                os.close(fd)
                self._folder_lock = -1
                raise
        self._closed = False
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends a scan, waits for writes, and lets go of all files; parts stay for a later attempt."""
        with self._changed:
            self._closed = True
        with self._scanning:  # it stops at its next run; until then it reads from what is closed here
            pass
        for file in list(self._parts):
            self._release(file, drop_empty=True)
        if self._folder_lock >= 0:
            os.close(self._folder_lock)
            self._folder_lock = -1

    @property
    def path(self) -> Path:
        """The file, or the folder of all files, that the fetch produces."""
        return self._root / self._torrent.name

    def file_path(self, file: int) -> Path:
        """The final path of one file."""
        return self._root.joinpath(*self._above, *self._torrent.files[file].path)

    def part_path(self, file: int) -> Path:
        """Where the bytes of one file lie until it is whole."""
        final = self.file_path(file)
        return final.with_name(paths.part_name(final.name, self._torrent.infohash))

    def is_finished(self, file: int) -> bool:
        """Whether the file is whole under its final name."""
        return self._final[file]

    @property
    def missing_bytes(self) -> int:
        """Bytes that are still to be fetched, over all files; all of them before `scan`."""
        return sum(
            min(runs.stop * RUN, entry.length) - runs.start * RUN
            for entry in self._torrent.files
            for runs in self.missing(entry.index)
        )

    def scan(self, *, progress: Progress | None = None) -> None:
        """Hashes what an earlier attempt left, and checks that the rest finds room.

        Args:
            progress: Told about every run that was looked at or skipped.

        Raises:
            ConfigError: If a file with other content has the final name, a name is taken by a
                link or folder, or another fetch works on the same file.
            StorageError: If the disk fails or has too little space for what is missing.
            ValueError: If the destination is not open, or is closed meanwhile.
        """
        total = self._torrent.total_bytes
        seen = 0
        need = 0

        def looked(file: int, run: int) -> None:
            self._check_open()
            if progress is not None:
                progress(seen + min(run * RUN, self._torrent.files[file].length), total)

        with self._scanning:
            for entry in self._torrent.files:
                need += self._scan_file(entry.index, looked)
                seen += entry.length
        files.check_room(self._root, need)

    def missing(self, file: int) -> list[range]:
        """The runs of a file that are still to be fetched, as ranges in order; all of them before `scan`."""
        count = self._torrent.runs(file)
        have = self._have[file]
        if have is None:
            return [range(count)] if count else []
        found: list[range] = []
        at = have.find(0)
        while at >= 0:
            end = have.find(1, at)
            end = count if end < 0 else end
            found.append(range(at, end))
            at = have.find(0, end)
        return found

    def write_run(self, file: int, run: int, data: bytes | bytearray | memoryview) -> None:
        """Writes one run, which counts for nothing before `keep`; many threads may write at once.

        Args:
            file: Index of the file.
            run: Number of the run.
            data: Its bytes. A run that is kept already is not written again.

        Raises:
            ConfigError: If the place cannot be written.
            StorageError: If the disk fails or is full; the run stays missing.
            ValueError: If the length is not that of the run, before `scan`, or after `close`.
        """
        if len(data) != self._torrent.run_length(file, run):
            raise ValueError(f"run {run} of file {file} has another length")
        have = self._have[file]
        if have is None:
            raise ValueError("scan comes before writing")
        if have[run]:
            return
        with self._writing(file) as part, files.on_disk(self.file_path(file)):
            if part is None:
                return
            done = part.direct.write(data, run * RUN)
            while done < len(data):
                done += os.pwrite(part.fd, memoryview(data)[done:], run * RUN + done)

    def keep(self, file: int, run: int) -> None:
        """Counts a run as there: it has verified, and it is written."""
        have = self._have[file]
        assert have is not None, "scan comes before writing"
        have[run] = 1

    def finish(self, file: int) -> Path:
        """Syncs a file whose runs are all there and gives it its name; doing it twice is harmless.

        Returns:
            Its final path.

        Raises:
            ConfigError: If something else has taken the name meanwhile; the part is kept.
            StorageError: If the disk fails; the part is kept.
            ValueError: If runs are missing.
        """
        target = self.file_path(file)
        have = self._have[file]
        if have is None or 0 in have:
            raise ValueError(f"file {file} has missing runs")
        with self._finishing:
            with self._writing(file) as part, self._folder(file) as (folder, *names), files.on_disk(target):
                if part is None:
                    return target
                os.ftruncate(part.fd, self._torrent.files[file].length)
                os.fsync(part.fd)
                files.give_name(part=names[1], name=names[0], folder=folder, target=target)
                os.fsync(folder)
            with self._changed:
                self._final[file] = True
            self._release(file)
        return target

    def _scan_file(self, file: int, looked: Callable[[int, int], None]) -> int:
        """Fills in what is there of one file; returns the bytes of disk the rest needs."""
        entry = self._torrent.files[file]
        folder = files.open_folder(self._root, (*self._above, *entry.path[:-1]), create=False)
        if folder is not None:
            try:
                if self._is_final(file, folder, looked):
                    self._have[file] = bytearray(b"\1") * self._torrent.runs(file)
                    self._final[file] = True
                    return 0
            finally:
                os.close(folder)
        have = bytearray(self._torrent.runs(file))
        kept = 0
        part = self._part(file, create=self._torrent.is_single, writing=False)
        if part is not None:
            with files.on_disk(self.file_path(file)):
                if self._torrent.is_single:
                    # Only one of them can get the name: the others would pay for nothing.
                    with self._folder(file) as (where, _, name):
                        names = os.listdir(where)  # noqa: PTH208 - a descriptor has no path
                        files.check_unlocked(paths.rivals(name, names), where, self.path)
                self._hash(file, part.fd, have, looked)
                kept = os.fstat(part.fd).st_blocks * 512
            if not self._torrent.is_single:  # the folder's lock suffices; do not keep 100,000 files open
                self._release(file)
        looked(file, len(have))
        self._have[file] = have
        return max(0, entry.length - kept) if 0 in have else 0

    def _is_final(self, file: int, folder: int, looked: Callable[[int, int], None]) -> bool:
        entry, path = self._torrent.files[file], self.file_path(file)
        name = entry.path[-1]
        try:
            fd = os.open(name, _READ, dir_fd=folder)
        except FileNotFoundError:
            return False
        except OSError as failed:
            raise files.disk_error(failed, path) from failed
        try:
            about = os.fstat(fd)
            have = bytearray(self._torrent.runs(file))
            if stat.S_ISREG(about.st_mode) and about.st_size == entry.length:
                with files.on_disk(path):
                    self._hash(file, fd, have, looked, holes=True)
            else:
                have = bytearray(1)
            if 0 in have:
                raise ConfigError(f"{path} exists and is something else.", hint=files.OTHER_FOLDER)
            # A crash between naming a file and dropping its part leaves both names.
            with files.on_disk(path), contextlib.suppress(FileNotFoundError):
                part = self.part_path(file).name
                if os.path.samestat(os.stat(part, dir_fd=folder, follow_symlinks=False), about):
                    os.unlink(part, dir_fd=folder)
        finally:
            os.close(fd)
        return True

    def _hash(
        self, file: int, fd: int, have: bytearray, looked: Callable[[int, int], None], *, holes: bool = False
    ) -> None:
        """Marks the runs that verify; skips holes unless a whole file is judged."""
        buffer = bytearray(min(RUN, self._torrent.files[file].length))
        run = 0
        while run < len(have):
            if not holes:
                try:
                    run = max(run, os.lseek(fd, run * RUN, os.SEEK_DATA) // RUN)
                except OSError as failed:
                    if failed.errno == errno.ENXIO:  # only a hole is left
                        break
                    if failed.errno != errno.EINVAL:  # the file system knows no holes
                        raise
                if run >= len(have):
                    break
            view = memoryview(buffer)[: self._torrent.run_length(file, run)]
            got = 0
            while got < len(view):
                count = os.preadv(fd, [view[got:]], run * RUN + got)
                if not count:
                    break
                got += count
            have[run] = got == len(view) and self._torrent.verify_run(file, run, view)
            run += 1
            looked(file, run)

    @contextlib.contextmanager
    def _folder(self, file: int) -> Iterator[tuple[int, str, str]]:
        """Opens the folder of a file; gives its descriptor, the file's name and the part's."""
        *folders, name = self._torrent.files[file].path
        fd = files.open_folder(self._root, (*self._above, *folders))
        assert fd is not None
        try:
            yield fd, name, self.part_path(file).name
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def _writing(self, file: int) -> Iterator[_Part | None]:
        """Keeps a part open while a thread works on it; None if the file is finished already."""
        part = self._part(file, create=True, writing=True)
        if part is None:
            yield None
            return
        try:
            yield part
        finally:
            with self._changed:
                part.writers -= 1
                self._changed.notify_all()

    def _part(self, file: int, *, create: bool, writing: bool) -> _Part | None:
        with self._changed:
            self._check_open()
            if self._final[file]:
                return None
            part = self._parts.get(file)
            if part is None:
                # Made a second time it would lack what is counted as there.
                fd = self._open_part(file, create=create and not self._begun[file])
                if fd is None:
                    if self._begun[file]:
                        raise StorageError(f"{self.part_path(file)} was removed meanwhile.")
                    return None
                self._begun[file] = True
                if len(self._parts) >= _MOST_OPEN:
                    for idle in [other for other, open_ in self._parts.items() if not open_.writers]:
                        self._release(idle)
                part = self._parts[file] = _Part(fd)
            part.writers += writing
            return part

    def _open_part(self, file: int, *, create: bool) -> int | None:
        path, part = self.file_path(file), self.part_path(file).name
        folders = self._torrent.files[file].path[:-1]
        folder = files.open_folder(self._root, (*self._above, *folders), create=create)
        if folder is None:
            return None
        try:
            with files.on_disk(path.with_name(part)):
                try:
                    fd = os.open(part, _WRITE | (os.O_CREAT if create else 0), 0o666, dir_fd=folder)
                except FileNotFoundError:
                    if create:
                        raise
                    return None
                try:
                    _check_part(fd, path.with_name(part))
                    if self._torrent.is_single:
                        files.lock(fd, path, name=part, folder=folder)
                except BaseException:
                    os.close(fd)
                    raise
        finally:
            os.close(folder)
        return fd

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("the destination is not open")

    def _release(self, file: int, *, drop_empty: bool = False) -> None:
        with self._changed:
            part = self._parts.pop(file, None)
            if part is None:
                return
            while part.writers:
                self._changed.wait()
        try:
            if drop_empty and not os.fstat(part.fd).st_size:
                with contextlib.suppress(OSError, BttError), self._folder(file) as (folder, _, name):
                    os.unlink(name, dir_fd=folder)
        finally:
            part.direct.close()
            os.close(part.fd)


def _check_part(fd: int, path: Path) -> None:
    about = os.fstat(fd)
    if not stat.S_ISREG(about.st_mode) or about.st_nlink != 1:
        raise ConfigError(f"{path} is no file of its own.", hint=files.OTHER_FOLDER)
