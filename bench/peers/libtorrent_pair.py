"""The peer `libtorrent`: a tuned seeder and a tuned leecher over loopback TCP.

Both run in processes of their own. The seeder is given its pieces (`have_pieces`)
instead of `seed_mode`, which would hash every piece on its first read and make it
twice as slow; the leecher hashes what it receives, as always, and syncs its file at
the end. uTP, encryption, DHT and every local discovery are off.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import libtorrent as lt

from bench.harness import MIB, Run, measure
from bench.processes import Child, heard, say

# Larger buffers than the defaults. Queue and threads were the fastest of four tried (1.2 x the next).
SETTINGS: dict[str, Any] = {
    "enable_dht": False,
    "enable_lsd": False,
    "enable_upnp": False,
    "enable_natpmp": False,
    "enable_outgoing_utp": False,
    "enable_incoming_utp": False,
    "in_enc_policy": 2,  # disabled
    "out_enc_policy": 2,
    "allow_multiple_connections_per_ip": True,
    "connection_speed": 500,
    "max_out_request_queue": 4000,
    "max_allowed_in_request_queue": 4000,
    "send_buffer_watermark": 4 * MIB,
    "send_buffer_low_watermark": MIB,
    "send_buffer_watermark_factor": 200,
    "recv_socket_buffer_size": MIB,
    "send_socket_buffer_size": MIB,
    "max_queued_disk_bytes": 64 * MIB,
    "aio_threads": 1,
    "hashing_threads": 2,
    "unchoke_slots_limit": 8,
    "alert_mask": lt.alert.category_t.status_notification
    | lt.alert.category_t.storage_notification
    | lt.alert.category_t.connect_notification
    | lt.alert.category_t.error_notification,
}


def make_torrent(source: Path, torrent: Path) -> None:
    """Writes a hybrid torrent with 1 MiB pieces of one file."""
    storage = lt.file_storage()
    storage.add_file(source.name, source.stat().st_size)
    creator = lt.create_torrent(storage, MIB)
    lt.set_piece_hashes(creator, str(source.parent))
    torrent.write_bytes(lt.bencode(creator.generate()))


def _session(overrides: dict[str, Any]) -> Any:
    settings: Any = {**SETTINGS, **overrides}
    return lt.session(settings)


def _add(session: Any, torrent: Path, folder: Path, *, complete: bool) -> tuple[Any, Any]:
    parameters = lt.add_torrent_params()
    info = lt.torrent_info(str(torrent))
    parameters.ti = info
    parameters.save_path = str(folder)
    parameters.flags &= ~(lt.torrent_flags.auto_managed | lt.torrent_flags.paused)
    if complete:
        parameters.have_pieces = [True] * info.num_pieces()
    return session.add_torrent(parameters), info


def _await_checked(handle: Any) -> None:
    checking = (lt.torrent_status.checking_files, lt.torrent_status.checking_resume_data)
    while handle.status().state in checking:
        time.sleep(0.02)


def _seed(torrent: Path, source: Path) -> None:
    session = _session({"listen_interfaces": "127.0.0.1:0"})
    handle, _ = _add(session, torrent, source.parent, complete=True)
    _await_checked(handle)
    while not (handle.status().is_seeding and session.listen_port()):
        time.sleep(0.02)
    say("ready", port=session.listen_port())
    heard()


def _leech(torrent: Path, folder: Path, port: int) -> None:
    session = _session({"listen_interfaces": "127.0.0.1:0"})
    handle, info = _add(session, torrent, folder, complete=False)
    _await_checked(handle)
    session.pop_alerts()
    say("ready")
    heard()
    alerts = _alerts(session)
    handle.connect_peer(("127.0.0.1", port))
    # libtorrent dials on its next tick, up to a second later. That wait says nothing about its speed,
    # so the clock starts when it dials.
    _await(alerts, lt.peer_connect_alert)
    start = time.perf_counter()
    _await(alerts, lt.torrent_finished_alert)
    # Only a flushed cache puts every block into the file; then the file is made durable like ours.
    handle.flush_cache()
    _await(alerts, lt.cache_flushed_alert)
    transferred = time.perf_counter() - start
    file = os.open(folder / info.name(), os.O_RDONLY)
    os.fsync(file)
    os.close(file)
    seconds = time.perf_counter() - start
    say("done", seconds=seconds, bytes=info.total_size(), before_fsync=transferred)
    heard()


def _alerts(session: Any) -> Iterator[Any]:
    """Yields the session's alerts as they come; raises RuntimeError when the torrent fails."""
    while True:
        session.wait_for_alert(1000)
        for alert in session.pop_alerts():
            failed = isinstance(alert, lt.torrent_error_alert | lt.file_error_alert)
            if failed:
                raise RuntimeError(alert.message())
            yield alert


def _await(alerts: Iterator[Any], kind: type) -> None:
    next(alert for alert in alerts if isinstance(alert, kind))


def contestant(source: Path, torrent: Path, folder: Path) -> Run:
    """Lets a leecher fetch the torrent from a seeder.

    Args:
        source: The seeder's file.
        torrent: Made by `make_torrent`.
        folder: The leecher's, on the same file system.
    """
    module = "bench.peers.libtorrent_pair"
    with Child("seeder", module, ["seed", str(torrent), str(source)]) as seeder:
        port = seeder.expect("ready")["port"]
        with Child("leecher", module, ["leech", str(torrent), str(folder), str(port)]) as leecher:
            leecher.expect("ready")
            return measure(leecher, seeder, source=source, folder=folder)


def _main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("role", choices=["seed", "leech"])
    parser.add_argument("torrent", type=Path)
    parser.add_argument("path", type=Path)
    parser.add_argument("port", type=int, nargs="?", default=0)
    arguments = parser.parse_args()
    if arguments.role == "seed":
        _seed(arguments.torrent, arguments.path)
    else:
        _leech(arguments.torrent, arguments.path, arguments.port)
    # The session's own shutdown waits for trackers that do not exist.
    os._exit(0)


if __name__ == "__main__":
    _main()
