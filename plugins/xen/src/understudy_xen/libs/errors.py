"""What can go wrong with Xen's libraries.

::

    HypervisorError
     +-- XenUnavailable           Xen cannot be used on this machine, and what would change that
     |    +-- NotXen              no Xen runs here, or this is no dom0
     |    +-- UnknownXen          this version of Xen is not in the table of `understudy_xen.libs.versions`
     |    +-- LibraryMissing      a library of the running version is not installed, or lacks a function
     |    +-- NoPrivilege         this process may not speak to the hypervisor
     +-- XenCallFailed            a call failed: function, errno, domain
     |    +-- DomainGone          ... because the domain does not exist
     +-- SuspendFailed            a guest asked to suspend did not; why, and what state it is in
     +-- LibxlFailed              libxl ended an operation with an error: its name, and its last words
     +-- RestorerLost             the process that restores a domain has ended, or does not answer
"""

from __future__ import annotations

import errno
import os
from enum import Enum

from understudy.errors import HypervisorError

__all__ = [
    "DomainGone",
    "LibraryMissing",
    "LibxlFailed",
    "NoPrivilege",
    "NotXen",
    "RestorerLost",
    "SuspendFailed",
    "SuspendFailure",
    "UnknownXen",
    "XenCallFailed",
    "XenUnavailable",
]


class XenUnavailable(HypervisorError):
    """Xen cannot be used on this machine as it is.

    Args:
        problem: What is wrong.
        remedy: What would change that.
    """

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(f"{problem}: {remedy}")
        self.problem = problem
        self.remedy = remedy


class NotXen(XenUnavailable):
    """No Xen runs on this machine, or this is not its control domain."""


class UnknownXen(XenUnavailable):
    """The running Xen is of a version whose libraries are not known here."""


class LibraryMissing(XenUnavailable):
    """A library of the running Xen cannot be loaded."""


class NoPrivilege(XenUnavailable):
    """This process may not speak to the hypervisor."""


class XenCallFailed(HypervisorError):
    """A call into a Xen library failed.

    Args:
        function: Its name, e.g. ``"xc_domain_pause"``.
        code: The errno it left behind, 0 if none.
        domid: Of the domain it was about, ``None`` if it was about none.
        detail: What the library itself had to say, if anything.
    """

    def __init__(self, function: str, code: int, domid: int | None = None, detail: str = "") -> None:
        about = "" if domid is None else f" for domain {domid}"
        reason = f"{os.strerror(code)} ({errno.errorcode.get(code, code)})" if code else "no errno was set"
        super().__init__(f"{function} failed{about}: {reason}" + (f": {detail}" if detail else ""))
        self.function = function
        self.errno = code
        self.domid = domid
        self.detail = detail


class DomainGone(XenCallFailed):
    """There is no such domain, or not any more."""


class SuspendFailure(Enum):
    """Why a guest that was asked to suspend did not."""

    UNANSWERED = "it did not take up the request, which was withdrawn; it runs"
    PAUSED = (
        "it is paused, by an administrator or a toolstack, and did not see the request, which was withdrawn"
    )
    TIMEOUT = "it took up the request and had not suspended at the deadline; it may suspend any time"
    SHUTDOWN = "it shut down by itself meanwhile"
    GONE = "it was destroyed meanwhile"


class SuspendFailed(HypervisorError):
    """A guest that was asked to suspend did not.

    Args:
        domid: Of the domain.
        failure: Why.
        detail: More about it, e.g. the reason of the shutdown.
    """

    def __init__(self, domid: int, failure: SuspendFailure, detail: str = "") -> None:
        super().__init__(
            f"domain {domid} did not suspend: {failure.value}" + (f" ({detail})" if detail else "")
        )
        self.domid = domid
        self.failure = failure
        self.detail = detail


class LibxlFailed(HypervisorError):
    """An operation of libxl failed.

    Args:
        operation: E.g. ``"libxl_domain_create_restore"``.
        code: Its return code, negative.
        name: Name of the code, e.g. ``"ERROR_FAIL"``.
        domid: Of the domain, ``None`` while it has none.
        said: The errors that libxl logged meanwhile, oldest first.
    """

    def __init__(
        self, operation: str, code: int, name: str, domid: int | None = None, said: tuple[str, ...] = ()
    ) -> None:
        about = "" if domid is None else f" for domain {domid}"
        super().__init__(
            f"{operation} failed{about}: {name} ({code})" + (f": {'; '.join(said)}" if said else "")
        )
        self.operation = operation
        self.code = code
        self.name = name
        self.domid = domid
        self.said = said


class RestorerLost(HypervisorError):
    """The process that makes a domain from a stream has ended, or does not answer.

    What it was about to do may be done in part; the domain is found by its UUID.
    """
