"""What a node offers beside its operator's own files: content bought from other nodes, to be sold on.

Bought content lies in a folder of the node's own, so taking it out of the catalogue deletes it; what
was published stays where it is.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from btt.sdk.content.torrent import Torrent
from btt.sdk.errors import StorageError
from btt.services.content.catalogue import Catalogue, Entry, SourceFile


def place_of(catalogue: Catalogue, infohash: bytes) -> Path:
    """Returns the folder that bought content is fetched into."""
    return catalogue.folder / "bought" / infohash.hex()


def enter_bought(torrent: Torrent, catalogue: Catalogue) -> Entry:
    """Adds content to the catalogue that was fetched into its place.

    Args:
        torrent: What was fetched.
        catalogue: Where to enter it.

    Raises:
        StorageError: The disk or database failed.
    """
    place = place_of(catalogue, torrent.infohash)
    root = place if torrent.is_single else place / torrent.name
    files = []
    for file in torrent.files:
        path = root.joinpath(*file.path)
        about = path.lstat()
        files.append(SourceFile(path=path, length=about.st_size, mtime_ns=about.st_mtime_ns))
    entry = Entry(
        infohash=torrent.infohash,
        infohash_v1=hashlib.sha1(torrent.info, usedforsecurity=False).digest(),
        name=torrent.name,
        source=place / torrent.name,
        total_bytes=torrent.total_bytes,
        info_bytes=len(torrent.info),
        layers_bytes=torrent.layers_bytes,
        files=len(files),
    )
    catalogue.add(entry, files, torrent=torrent.torrent_file())
    return entry


def remove(infohash: bytes, catalogue: Catalogue) -> bool:
    """Takes content out of the catalogue, and deletes what was bought of it, also a part.

    Returns:
        Whether anything was there.

    Raises:
        StorageError: The disk or database failed.
    """
    found = catalogue.remove(infohash)
    place = place_of(catalogue, infohash)
    try:
        shutil.rmtree(place)
    except FileNotFoundError:
        return found
    except OSError as failed:
        raise StorageError(f"{place} could not be deleted: {failed}.") from failed
    return True
