"""What differs between the Xen versions whose libraries are loaded here: one table.

libxenctrl, libxenguest and libxenlight have no stable ABI. Their SONAME is the version of Xen, and the hypervisor
refuses a library of another version by the number of its domctl and sysctl interface. So the libraries are loaded by
the running hypervisor's version, and only if that version is in this table.

Every number was taken from the headers of the release named in its row (x.y.0), the sizes and offsets by a C compiler
on x86-64. Not in the table, because it is the same in all of them: struct save_callbacks, xc_domain_save (the header's
text is the same from 4.14 to 4.22), struct libxl_domain_restore_params, enum libxl_error, the emulation flags of a
domain, and the prototypes of the libxl calls that are used here; `xc_domain_getinfolist`, which every version has
(xc_domain_getinfo went, and xc_domain_getinfo_single came, in 4.18).

Source: Xen RELEASE-4.14.0 to RELEASE-4.22.0: xen/include/public/{domctl,sysctl}.h (XEN_DOMCTL_INTERFACE_VERSION,
xen_domctl_getdomaininfo, xen_sysctl_physinfo), xen/include/public/arch-x86/xen.h (XEN_X86_EMU_*);
tools/include/{xenctrl,xenguest,libxl}.h (tools/libxc/include and tools/libxl in 4.14);
tools/libs/light/libxl_types.idl; tools/libs/{ctrl,guest,light}/Makefile (SONAMEs).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

from understudy_xen.libs.errors import NotXen, UnknownXen

__all__ = ["FACTS", "Facts", "XenVersion", "running_version"]

_SYSFS = Path("/sys/hypervisor")


@dataclass(frozen=True, slots=True, order=True)
class XenVersion:
    """Major and minor version of a hypervisor."""

    major: int
    minor: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}"


@dataclass(frozen=True, slots=True)
class Facts:
    """What a version has that another has not; offsets and sizes in bytes."""

    domctl: int  #: XEN_DOMCTL_INTERFACE_VERSION
    sysctl: int  #: XEN_SYSCTL_INTERFACE_VERSION
    info_bytes: int  #: sizeof(struct xen_domctl_getdomaininfo)
    emulation_at: int  #: offset of arch_config.emulation_flags in it
    physinfo_bytes: int  #: sizeof(struct xen_sysctl_physinfo)
    pages_at: int  #: offset of total_pages in it; free, scrub and outstanding pages follow
    resume_in: str = "libxenguest"  #: where xc_domain_resume is
    restore_memflags: bool = False  #: xc_domain_restore has a last argument `memflags`


FACTS: Final[Mapping[XenVersion, Facts]] = MappingProxyType(
    {
        XenVersion(4, 14): Facts(0x12, 0x13, 104, 96, 104, 32, resume_in="libxenctrl"),
        XenVersion(4, 15): Facts(0x13, 0x13, 104, 96, 104, 32, resume_in="libxenctrl"),
        XenVersion(4, 16): Facts(0x14, 0x14, 112, 104, 104, 32),
        XenVersion(4, 17): Facts(0x15, 0x15, 112, 104, 112, 40),
        XenVersion(4, 18): Facts(0x16, 0x15, 112, 104, 112, 40),
        XenVersion(4, 19): Facts(0x17, 0x15, 112, 104, 112, 40),
        XenVersion(4, 20): Facts(0x17, 0x15, 112, 104, 112, 40),
        XenVersion(4, 21): Facts(0x17, 0x16, 112, 104, 112, 40),
        XenVersion(4, 22): Facts(0x18, 0x16, 112, 104, 112, 40, restore_memflags=True),
    }
)


def running_version(sysfs: Path = _SYSFS) -> XenVersion:
    """Return the version of the hypervisor under this kernel.

    Args:
        sysfs: Where the kernel tells about it.

    Raises:
        NotXen: No Xen runs here.
        UnknownXen: It runs, and is of a version that is not in the table.
    """
    try:
        kind = (sysfs / "type").read_text().strip()
        major = (sysfs / "version/major").read_text().strip()
        minor = (sysfs / "version/minor").read_text().strip()
    except OSError as error:
        raise NotXen(
            f"no Xen runs under this kernel ({error.filename}: {error.strerror})",
            "boot the host with Xen (on Debian: install xen-system-amd64, and choose Xen in the boot menu)",
        ) from error
    if kind != "xen":
        raise NotXen(f"the hypervisor under this kernel is {kind!r}, not Xen", "boot the host with Xen")
    try:
        version = XenVersion(int(major), int(minor))
    except ValueError:
        raise UnknownXen(
            f"Xen tells a version that is no number: {major!r}.{minor!r}", "a release of Xen, 4.14 to 4.22"
        ) from None
    if version not in FACTS:
        raise UnknownXen(
            f"Xen {version} runs here, and its libraries are not known to understudy-xen",
            f"known are {min(FACTS)} to {max(FACTS)}; a newer understudy-xen may know more",
        )
    return version
