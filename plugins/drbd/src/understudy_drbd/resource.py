"""What DRBD's configuration says of a device: its resource, the disk below, and options that matter to us.

Read from ``drbdadm dump-xml``, whose form is the same for DRBD 8.4 and 9, and nearly the same for 8.3; it tells what
the files say, and the sections of the parts from the general to the special (``common``, resource, connection, volume).

Source: drbd-utils user/v84/drbdadm_main.c and user/v9/drbdadm_dump.c (adm_dump_xml); drbd.conf(5).
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from understudy.errors import UnderstudyError

__all__ = ["AL_EXTENT_BYTES", "Resource", "resource_of"]

AL_EXTENT_BYTES: Final = 4 << 20  #: what one entry of the activity log covers
_DEFAULTS: Final = {
    ("net", "protocol"): "C",
    ("disk", "al-extents"): "1237",
    ("disk", "fencing"): "dont-care",
    ("net", "after-sb-0pri"): "disconnect",
    ("net", "after-sb-1pri"): "disconnect",
    ("net", "after-sb-2pri"): "disconnect",
    ("net", "allow-two-primaries"): "no",
}


@dataclass(frozen=True, slots=True)
class Resource:
    """A DRBD resource as this host's configuration describes it."""

    name: str
    minor: int  #: of its device on this host
    disk: Path  #: what is below it on this host
    metadata: str  #: ``"internal"``, or the device of its metadata
    volumes: int  #: how many devices it has
    peers: int  #: how many other hosts it has
    options: Mapping[tuple[str, str], str]  #: by section and name; see `option`
    handlers: Mapping[str, str]  #: the programs that DRBD calls, by event

    def option(self, section: str, name: str) -> str:
        """Return an option's value, or DRBD's default where that is known, else ``""``."""
        return self.options.get((section, name), _DEFAULTS.get((section, name), ""))

    @property
    def internal(self) -> bool:
        """Whether its metadata is on the disk itself, and goes back in time with it."""
        return self.metadata.split()[:1] == ["internal"]

    def log_covers(self, size_bytes: int) -> bool:
        """Tell whether the activity log of a host that crashed names all that it wrote, however long ago.

        The log holds the extents written to last; where all of the disk fits in, none was ever dropped from it.
        """
        return size_bytes <= int(self.option("disk", "al-extents")) * AL_EXTENT_BYTES


def resource_of(xml: str, host: str, minor: int) -> Resource | None:
    """Return the resource that has the device of number `minor` on `host`.

    Args:
        xml: What ``drbdadm dump-xml`` prints.
        host: The host's name, ``uname -n``.
        minor: Minor number of the device.

    Returns:
        The resource, or ``None`` if the configuration has no such device on this host.

    Raises:
        UnderstudyError: The text is no such dump.
    """
    try:
        root = ET.fromstring(xml)  # noqa: S314 - the site's own configuration, printed by its own tool
        for element in root.findall("resource"):
            hosts = {str(each.get("name", "")): each for each in element.findall("host")}
            own = next((each for name, each in hosts.items() if _same_host(name, host)), None)
            if own is None:
                continue
            for volume in _volumes(own):
                if int(_child(volume, "device").get("minor", "-1")) == minor:
                    return _resource(root, element, own, volume, len(hosts) - 1)
    except (ET.ParseError, ValueError) as error:
        raise UnderstudyError(f"DRBD's configuration cannot be read ({error}): {xml[:200]!r}") from error
    return None


def _resource(
    root: ET.Element, element: ET.Element, host: ET.Element, volume: ET.Element, peers: int
) -> Resource:
    options: dict[tuple[str, str], str] = {}
    if protocol := element.get("protocol"):
        options["net", "protocol"] = protocol  # in DRBD 8.3
    for part in (root.find("common"), element, *element.findall("connection"), host, volume):
        for section in part.findall("section") if part is not None else ():
            for option in section.findall("option"):
                key = (section.get("name", ""), option.get("name", ""))
                options[key] = option.get("value", "yes")
    return Resource(
        name=str(element.get("name")),
        minor=int(_child(volume, "device").get("minor", "-1")),
        disk=Path(_text(volume, "disk")),
        metadata=_text(volume, "meta-disk"),
        volumes=len(_volumes(host)),
        peers=peers,
        options={key: value for key, value in options.items() if key[0] != "handlers"},
        handlers={name: value for (section, name), value in options.items() if section == "handlers"},
    )


def _volumes(host: ET.Element) -> list[ET.Element]:
    # DRBD 8.3 knew no volumes: what describes one stands with the host.
    return host.findall("volume") or [host]


def _same_host(configured: str, host: str) -> bool:
    # Several names may stand after one `on`.
    return any(name == host or name == host.partition(".")[0] for name in configured.split())


def _child(element: ET.Element, tag: str) -> ET.Element:
    found = element.find(tag)
    if found is None:
        raise ValueError(f"a {element.tag} without {tag}")
    return found


def _text(element: ET.Element, tag: str) -> str:
    return (_child(element, tag).text or "").strip()
