"""What can go wrong with xenstore.

::

    XenStoreError (HypervisorError)
     +-- XenStoreRefused        xenstored answered with an error; carries its name
     |    +-- XenStoreMissing   ENOENT: no such path
     |    +-- XenStoreConflict  EAGAIN: somebody else changed what the transaction touched
     +-- XenStoreLimit          a path, value or request that xenstored would not take; nothing was sent
     +-- XenStoreSilent         no answer before the deadline
     |    +-- XenStoreBusy      not even a connection was taken
     +-- XenStoreLost           the connection is gone; nothing can be asked any more
          +-- XenStoreGarbage   what came is not the protocol; the connection was closed

Source: Xen docs/misc/xenstore.txt ("Error replies"), xen/include/public/io/xs_wire.h (xsd_errors).
"""

from __future__ import annotations

from understudy.errors import HypervisorError

__all__ = [
    "XenStoreBusy",
    "XenStoreConflict",
    "XenStoreError",
    "XenStoreGarbage",
    "XenStoreLimit",
    "XenStoreLost",
    "XenStoreMissing",
    "XenStoreRefused",
    "XenStoreSilent",
    "refusal",
]


class XenStoreError(HypervisorError):
    """Something between this process and xenstored went wrong."""


class XenStoreRefused(XenStoreError):
    """Xenstored answered a request with an error.

    Args:
        what: The request in words, e.g. ``"READ /local/domain/3/name"``.
        code: Name of the error, e.g. ``"EACCES"``.
    """

    def __init__(self, what: str, code: str) -> None:
        super().__init__(f"xenstored refused {what}: {code}")
        self.what = what
        self.code = code


class XenStoreMissing(XenStoreRefused):
    """There is no such path."""


class XenStoreConflict(XenStoreRefused):
    """The transaction was not committed, because somebody else changed what it had touched."""


class XenStoreLimit(XenStoreError):
    """The request breaks a limit of the protocol; it was not sent."""


class XenStoreSilent(XenStoreError):
    """Xenstored did not answer before the deadline; whether it carries the request out is not known."""


class XenStoreBusy(XenStoreSilent):
    """Xenstored has not taken a connection: it stands still, or many come at once."""


class XenStoreLost(XenStoreError):
    """The connection to xenstored is gone."""


class XenStoreGarbage(XenStoreLost):
    """What came from xenstored is not its protocol; the connection was closed."""


def refusal(what: str, code: str) -> XenStoreRefused:
    """Return the error that an answer of type ERROR stands for."""
    kinds: dict[str, type[XenStoreRefused]] = {"ENOENT": XenStoreMissing, "EAGAIN": XenStoreConflict}
    return kinds.get(code, XenStoreRefused)(what, code)
