"""Pages of a domain's memory, seen from dom0."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable

__all__ = ["read_pages"]


def read_pages(domid: int, pfns: Iterable[int]) -> dict[int, bytes]:
    """Return pages of a domain's memory, read-only mapped.

    Source: tools/include/xenforeignmemory.h of Xen 4.17.
    """
    library = ctypes.CDLL("libxenforeignmemory.so.1", use_errno=True)
    pointer = ctypes.c_void_p
    library.xenforeignmemory_open.restype = library.xenforeignmemory_map.restype = pointer
    library.xenforeignmemory_open.argtypes = [pointer, ctypes.c_uint]
    library.xenforeignmemory_map.argtypes = [
        pointer,
        ctypes.c_uint32,
        ctypes.c_int,
        ctypes.c_size_t,
        pointer,
        pointer,
    ]
    library.xenforeignmemory_unmap.argtypes = [pointer, pointer, ctypes.c_size_t]
    library.xenforeignmemory_close.argtypes = [pointer]
    wanted = list(pfns)
    numbers, errors = (ctypes.c_uint64 * len(wanted))(*wanted), (ctypes.c_int * len(wanted))()
    handle = library.xenforeignmemory_open(None, 0)
    assert handle, os.strerror(ctypes.get_errno())
    try:
        address = library.xenforeignmemory_map(handle, domid, 1, len(wanted), numbers, errors)  # PROT_READ
        assert address, os.strerror(ctypes.get_errno())
        try:
            assert not any(errors), {pfn: error for pfn, error in zip(wanted, errors, strict=True) if error}
            return {pfn: ctypes.string_at(address + 4096 * index, 4096) for index, pfn in enumerate(wanted)}
        finally:
            library.xenforeignmemory_unmap(handle, address, len(wanted))
    finally:
        library.xenforeignmemory_close(handle)
