"""Load the libraries of the running Xen, each function with its prototype.

Source: Xen tools/include/{xenctrl,xenguest,xenevtchn}.h, 4.14.0 to 4.22.0.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from understudy_xen.libs.errors import DomainGone, LibraryMissing, NoPrivilege, NotXen, XenCallFailed
from understudy_xen.libs.versions import FACTS, Facts, XenVersion, running_version

__all__ = ["Libraries", "Library", "call", "find_libraries", "open_handle"]

PRIVCMD: Final = Path("/dev/xen/privcmd")
_CAPABILITIES: Final = Path("/proc/xen/capabilities")
_PACKAGE: Final = "on Debian: apt install libxenmisc{0} xen-utils-{0}"

_P, _INT, _U32, _U64 = ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32, ctypes.c_uint64
_UINT, _LONG, _ULONG = ctypes.c_uint, ctypes.c_long, ctypes.c_ulong

_Prototype = tuple[Any, Sequence[Any]]

_CTRL: Final[dict[str, _Prototype]] = {
    "xc_interface_open": (_P, (_P, _P, _UINT)),
    "xc_interface_close": (_INT, (_P,)),
    "xc_domain_getinfolist": (_INT, (_P, _U32, _UINT, _P)),
    "xc_domain_pause": (_INT, (_P, _U32)),
    "xc_domain_unpause": (_INT, (_P, _U32)),
    "xc_domain_shutdown": (_INT, (_P, _U32, _INT)),
    "xc_domain_destroy": (_INT, (_P, _U32)),
    "xc_domain_subscribe_for_suspend": (_INT, (_P, _U32, _U32)),
    "xc_evtchn_alloc_unbound": (_INT, (_P, _U32, _U32)),
    "xc_hvm_param_get": (_INT, (_P, _U32, _U32, _P)),
    "xc_physinfo": (_INT, (_P, _P)),
}
_RESUME: Final[_Prototype] = (_INT, (_P, _U32, _INT))
_GUEST: Final[dict[str, _Prototype]] = {
    "xc_domain_save": (_INT, (_P, _INT, _U32, _U32, _P, _INT, _INT)),
    "xc_suspend_evtchn_init_exclusive": (_INT, (_P, _P, _U32, _INT, _P)),
    "xc_suspend_evtchn_release": (_INT, (_P, _P, _U32, _INT, _P)),
}
_EVTCHN: Final[dict[str, _Prototype]] = {
    "xenevtchn_open": (_P, (_P, _UINT)),
    "xenevtchn_close": (_INT, (_P,)),
    "xenevtchn_fd": (_INT, (_P,)),
    "xenevtchn_notify": (_INT, (_P, _U32)),
    "xenevtchn_bind_interdomain": (_INT, (_P, _U32, _U32)),
    "xenevtchn_pending": (_INT, (_P,)),
    "xenevtchn_unmask": (_INT, (_P, _U32)),
    "xenevtchn_unbind": (_INT, (_P, _U32)),
}


class Library:
    """A loaded library, whose functions have prototypes.

    Args:
        soname: E.g. ``"libxenctrl.so.4.17"``.
        prototypes: Of the functions that are used.
        remedy: What to do where it is not installed.

    Raises:
        LibraryMissing: It cannot be loaded, or lacks one of the functions.
    """

    def __init__(self, soname: str, prototypes: Mapping[str, _Prototype], remedy: str) -> None:
        self.soname = soname
        try:
            # Global, because libxenguest of one version looks for what libxenctrl of the same has loaded.
            loaded = ctypes.CDLL(soname, mode=ctypes.RTLD_GLOBAL, use_errno=True)
        except OSError as error:
            raise LibraryMissing(f"{soname} cannot be loaded ({error})", remedy) from error
        self._functions: dict[str, Any] = {}
        for name, (result, arguments) in prototypes.items():
            try:
                function = getattr(loaded, name)
            except AttributeError:
                raise LibraryMissing(f"{soname} has no function {name}", remedy) from None
            function.restype, function.argtypes = result, tuple(arguments)
            self._functions[name] = function

    def __getitem__(self, name: str) -> Any:
        return self._functions[name]


@dataclass(frozen=True, slots=True)
class Libraries:
    """The libraries of one version of Xen."""

    version: XenVersion
    facts: Facts
    ctrl: Library
    guest: Library
    evtchn: Library


def find_libraries(version: XenVersion | None = None) -> Libraries:
    """Load the libraries of a version of Xen.

    Args:
        version: ``None`` for the running one's.

    Raises:
        XenUnavailable: No Xen of a known version runs here, this is no dom0, or a library is missing.
    """
    if version is None:
        version = running_version()
        _need_control_domain()
    facts = FACTS[version]
    remedy = f"install the tools of the very Xen that runs, {version} ({_PACKAGE.format(version)})"
    ctrl, guest = dict(_CTRL), dict(_GUEST)
    (guest if facts.resume_in == "libxenguest" else ctrl)["xc_domain_resume"] = _RESUME
    return Libraries(
        version,
        facts,
        Library(f"libxenctrl.so.{version}", ctrl, remedy),
        Library(f"libxenguest.so.{version}", guest, remedy),
        Library("libxenevtchn.so.1", _EVTCHN, remedy),
    )


def _need_control_domain() -> None:
    # The file is there only with xenfs mounted; without it the device below decides.
    try:
        capabilities = _CAPABILITIES.read_text()
    except OSError:
        return
    if "control_d" not in capabilities:
        raise NotXen("this is a Xen guest, not the control domain", "run the agent in dom0")


def open_handle(libraries: Libraries, logger: int) -> int:
    """Open a handle of libxenctrl.

    Args:
        libraries: Where it is.
        logger: Address of a `ToolLog`.

    Raises:
        NoPrivilege: This process may not speak to the hypervisor.
        NotXen: The kernel offers no way to it.
        XenCallFailed: It fails otherwise.
    """
    ctypes.set_errno(0)
    handle = libraries.ctrl["xc_interface_open"](logger, logger, 0)
    if handle:
        return int(handle)
    code = ctypes.get_errno()
    if code in {errno.EACCES, errno.EPERM}:
        raise NoPrivilege(
            f"{PRIVCMD} may not be opened ({os.strerror(code)})", "run the agent as root in dom0"
        )
    if code in {errno.ENOENT, errno.ENODEV, errno.ENXIO}:
        raise NotXen(
            f"{PRIVCMD} is not there ({os.strerror(code)})",
            "run the agent in dom0, with the module xen-privcmd loaded",
        )
    raise XenCallFailed("xc_interface_open", code)


def call(function: Any, *arguments: Any, domid: int | None = None) -> int:
    """Call a function of a library that returns a negative number on failure, and return what it returns.

    Args:
        function: From a `Library`.
        arguments: For it.
        domid: Of the domain it is about.

    Raises:
        DomainGone: There is no such domain.
        NoPrivilege: The hypervisor refuses this domain or process.
        XenCallFailed: It failed otherwise.
    """
    ctypes.set_errno(0)
    result = int(function(*arguments))
    if result >= 0:
        return result
    code = ctypes.get_errno()
    name = str(function.__name__)
    if code == errno.ESRCH and domid is not None:
        raise DomainGone(name, code, domid)
    if code == errno.EPERM:
        raise NoPrivilege(f"{name} is not permitted", "run the agent as root in dom0, the control domain")
    raise XenCallFailed(name, code, domid)
