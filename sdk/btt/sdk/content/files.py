"""Operations on the destination's disk that follow no link and replace no file.

Every folder below the destination is entered by descriptor, one component at a time; a link
that somebody put there is an error and never a way out. Failures become errors that say
whether another folder, more space or another disk helps.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from btt.sdk.errors import ConfigError, StorageError

OTHER_FOLDER = "Choose another folder, or move what is there; nothing was changed."
"""What to do when a name is taken."""

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


def open_folder(root: Path, parts: Sequence[str], *, create: bool = True) -> int | None:
    """Enters a folder below the destination without following links.

    Args:
        root: The folder the user chose; it may be reached through links. It is created.
        parts: Checked names below it.
        create: Make what is missing.

    Returns:
        A directory descriptor, to be closed by the caller; None if a part is missing and
        `create` is off.

    Raises:
        ConfigError: If a component is a link or no folder, or must not be entered.
        StorageError: If the disk fails or is full.
    """
    here = root
    try:
        if create:
            root.mkdir(parents=True, exist_ok=True)
        fd = os.open(root, _FOLDER)
    except FileNotFoundError as failed:
        if create:
            raise disk_error(failed, root) from failed
        return None
    except OSError as failed:
        raise disk_error(failed, root) from failed
    try:
        for part in parts:
            here = here / part
            if create:
                try:
                    os.mkdir(part, dir_fd=fd)
                except FileExistsError:
                    pass
                else:
                    os.fsync(fd)
            down = os.open(part, _FOLDER | os.O_NOFOLLOW, dir_fd=fd)
            os.close(fd)
            fd = down
    except OSError as failed:
        os.close(fd)
        if isinstance(failed, FileNotFoundError) and not create:
            return None
        raise disk_error(failed, here) from failed
    return fd


def check_room(root: Path, need: int) -> None:
    """Checks that the disk has room.

    Args:
        root: The folder the user chose. It is created.
        need: Bytes that are still to be written.

    Raises:
        ConfigError: If the folder cannot be entered.
        StorageError: If the disk has less space, or fails.
    """
    folder = open_folder(root, ()) if need else None
    if folder is None:
        return
    try:
        about = os.fstatvfs(folder)
    finally:
        os.close(folder)
    free = about.f_bavail * about.f_frsize
    if free < need:
        raise StorageError(
            f"{root} has {free:,} bytes free; the fetch needs {need:,} more.",
            hint="Free some space, or choose another folder; nothing was requested.",
        )


def disk_error(failed: OSError, path: Path) -> ConfigError | StorageError:
    """Says what a failed operation on the destination means for the user.

    Args:
        failed: What the system said.
        path: The file or folder it was about.

    Returns:
        ConfigError if another destination or other rights help, else StorageError.
    """
    match failed.errno:
        case errno.ELOOP:
            return ConfigError(f"{path} is a link; nothing is written through links.", hint=OTHER_FOLDER)
        case errno.ENOTDIR | errno.EISDIR | errno.EEXIST | errno.ENXIO:
            # O_NOFOLLOW with O_DIRECTORY reports a link as ENOTDIR.
            return ConfigError(f"{path} is in the way: it is a link or of another kind.", hint=OTHER_FOLDER)
        case errno.EACCES | errno.EPERM | errno.EROFS | errno.ENAMETOOLONG | errno.ENOENT:
            return ConfigError(f"{path} cannot be written: {failed.strerror}.", hint="Choose another folder.")
        case errno.ENOSPC | errno.EDQUOT:
            return StorageError(
                f"The disk is full: {path}.", hint="Free some space and try again; what arrived is kept."
            )
    return StorageError(f"{path}: {failed.strerror or failed}.")


def give_name(part: str, name: str, *, folder: int, target: Path) -> None:
    """Moves a part to its final name and never over another file, which rename alone would do.

    Args:
        part: Its name now.
        name: The final name.
        folder: Descriptor of their folder.
        target: The final path, for the error.

    Raises:
        ConfigError: If the final name is taken.
    """
    try:
        os.link(part, name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
    except OSError:  # the name is taken, or the file system has no hard links
        with contextlib.suppress(FileNotFoundError):
            os.stat(name, dir_fd=folder, follow_symlinks=False)
            raise ConfigError(f"{target} exists and is something else.", hint=OTHER_FOLDER) from None
        os.rename(part, name, src_dir_fd=folder, dst_dir_fd=folder)
    else:
        os.unlink(part, dir_fd=folder)


def lock(fd: int, path: Path, *, name: str = "", folder: int = -1) -> None:
    """Keeps other fetches away for as long as the descriptor is open.

    Args:
        fd: The file or folder to lock.
        path: What is fetched, for the error.
        name: If given, the name the descriptor must still have in `folder`: whoever held the
            lock before may have finished the file meanwhile.
        folder: Descriptor of that folder.

    Raises:
        ConfigError: If another fetch holds it.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not name or os.path.samestat(os.stat(name, dir_fd=folder, follow_symlinks=False), os.fstat(fd)):
            return
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError as failed:
        raise disk_error(failed, path) from failed
    raise ConfigError(f"Another fetch is writing to {path}.", hint="Wait for it, or choose another folder.")


def check_unlocked(names: Iterable[str], folder: int, path: Path) -> None:
    """Checks that no other fetch holds one of some files.

    Args:
        names: The files.
        folder: Descriptor of their folder.
        path: What is fetched, for the error.

    Raises:
        ConfigError: If another fetch does.
    """
    for name in names:
        try:
            fd = os.open(name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
        except OSError:  # gone meanwhile, or not ours
            continue
        try:
            lock(fd, path)
        finally:
            os.close(fd)


@contextlib.contextmanager
def on_disk(path: Path) -> Iterator[None]:
    """Turns failures of the disk into errors a user can act on; `path` is what they are about."""
    try:
        yield
    except FileNotFoundError:
        raise StorageError(f"{path} was removed meanwhile.") from None
    except OSError as failed:
        raise disk_error(failed, path) from failed
