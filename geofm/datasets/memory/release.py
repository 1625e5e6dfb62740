"""Giving memory back to the system, which allocators keep for themselves."""

import ctypes
import sys

import pyarrow as pa


def give_back() -> None:
    """Return what was freed.

    After arrays of many megabytes were made and thrown away, glibc and Arrow keep tens of megabytes
    that later arrays do not fit into. Worker processes would inherit them.
    """
    pa.default_memory_pool().release_unused()
    if sys.platform == 'linux':
        trim = getattr(ctypes.CDLL(None), 'malloc_trim', None)
        if trim is not None:
            trim(0)
