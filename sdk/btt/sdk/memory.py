"""Keeps freed buffers of a run's size in the process, where the next run finds them, and only once.

glibc takes every buffer of 128 KiB and more straight from the kernel and hands it back
when it is freed. A transfer frees and takes several buffers of 1 MiB for each run, and
each new one costs 256 page faults that zero its pages: about a quarter of the CPU time
of a fetch. And it keeps what each thread has freed apart, in up to eight heaps a core: a long
transfer fills the gaps of them all. Programs that move content call this once, early.
"""

from __future__ import annotations

import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # malloc.h
_FROM_KERNEL = 32 << 20
"""The largest value that glibc takes, bytes."""
_KEPT = 256 << 20
"""Free bytes at the top of the heap that go back to the kernel; a transfer never has so many."""


def keep_freed_memory() -> bool:
    """Lets the allocator reuse large buffers, from one heap, for this whole process.

    Returns:
        Whether it applies here: only glibc has, and needs, it.
    """
    if sys.platform != "linux":
        return False
    import ctypes

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((_TRIM_THRESHOLD, _KEPT), (_MMAP_THRESHOLD, _FROM_KERNEL), (_ARENA_MAX, 1))
    return all(mallopt(name, value) for name, value in settings)
