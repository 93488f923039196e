"""Finds what an object leads to."""

from __future__ import annotations

import asyncio
import gc
import types


def reachable(start):
    """Yields what attributes, items and closures lead to; modules, classes and globals lead everywhere."""
    seen, queue = {}, [start]
    stop = types.ModuleType | type | types.FrameType | asyncio.AbstractEventLoop | types.CodeType
    while queue:
        thing = queue.pop()
        if id(thing) in seen or isinstance(thing, stop):
            continue
        seen[id(thing)] = thing  # held, so that no other gets its id
        yield thing
        if isinstance(thing, types.FunctionType):
            queue += [cell.cell_contents for cell in thing.__closure__ or ()]
        else:
            queue += gc.get_referents(thing)
