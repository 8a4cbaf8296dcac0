"""What a takeover wants of DRBD 8.4, asked of the kernel itself: no process is started for it.

``drbdadm`` starts ``drbdsetup``, which sends one message and waits for one answer. At a takeover the guest stands still
meanwhile, so the message is sent from here.

::

    struct genlmsghdr | struct drbd_genlmsghdr: minor, then flags or the answer's code | attribute*

A disk is attached again with the very options that it had, as the kernel told them: nothing is read from a file that
may have been edited since.

The family of DRBD 9 has the same name and other messages; its version tells.

Source: Linux include/linux/drbd_genl.h, drbd_genl_api.h, drbd.h; drivers/block/drbd/drbd_nl.c.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Mapping
from typing import Final

from understudy.errors import UnderstudyError
from understudy.netlink import NLM_F_REQUEST, ask, attribute, attributes, message, nested, text

__all__ = ["DrbdRefused", "Genl"]

_NETLINK_GENERIC: Final = 16
_GENL_ID_CTRL: Final = 16
_CTRL_CMD_GETFAMILY: Final = 3
_CTRL_ATTR_FAMILY_ID: Final = 1
_CTRL_ATTR_FAMILY_NAME: Final = 2
_CTRL_ATTR_VERSION: Final = 3

_FAMILY: Final = "drbd"
_VERSION: Final = 1
_GET_STATUS: Final = 2
_DISCONNECT: Final = 11
_ATTACH: Final = 12
_PRIMARY: Final = 14
_DETACH: Final = 18
_INVAL_PEER: Final = 20
_CFG_REPLY: Final = 1
_CFG_CONTEXT: Final = 2
_DISK_CONF: Final = 3
_SET_ROLE_PARMS: Final = 6
_DISCONNECT_PARMS: Final = 12
_INFO_TEXT: Final = 1
_MY_ADDRESS: Final = 3
_PEER_ADDRESS: Final = 4
_FORCE: Final = 1
_NO_MINOR: Final = 0xFFFFFFFF

_GENERIC = struct.Struct("=BBH")
_DRBD = struct.Struct("=Ii")

_DONE: Final = frozenset({101, 1, 2, 3, 4})  # NO_ERROR, and what enum drbd_state_rv has above zero
_NAMES: Final[Mapping[int, str]] = {
    -1: "SS_TWO_PRIMARIES",
    -2: "SS_NO_UP_TO_DATE_DISK",
    -4: "SS_NO_LOCAL_DISK",
    -5: "SS_NO_REMOTE_DISK",
    -6: "SS_CONNECTED_OUTDATES",
    -7: "SS_PRIMARY_NOP",
    -8: "SS_RESYNC_RUNNING",
    -9: "SS_ALREADY_STANDALONE",
    -10: "SS_CW_FAILED_BY_PEER",
    -11: "SS_IS_DISKLESS",
    -12: "SS_DEVICE_IN_USE",
    -13: "SS_NO_NET_CONFIG",
    -15: "SS_NEED_CONNECTION",
    -16: "SS_LOWER_THAN_OUTDATED",
    -17: "SS_NOT_SUPPORTED",
    -18: "SS_IN_TRANSIENT_STATE",
    -19: "SS_CONCURRENT_ST_CHG",
    -20: "SS_O_VOL_PEER_PRI",
    -21: "SS_OUTDATE_WO_CONN",
    104: "ERR_OPEN_DISK",
    105: "ERR_OPEN_MD_DISK",
    111: "ERR_DISK_TOO_SMALL",
    112: "ERR_MD_DISK_TOO_SMALL",
    114: "ERR_BDCLAIM_DISK",
    115: "ERR_BDCLAIM_MD_DISK",
    116: "ERR_MD_IDX_INVALID",
    118: "ERR_IO_MD_DISK",
    119: "ERR_MD_INVALID",
    122: "ERR_NOMEM",
    124: "ERR_DISK_CONFIGURED",
    126: "ERR_MANDATORY_TAG",
    127: "ERR_MINOR_INVALID",
    129: "ERR_INTR",
    138: "ERR_NO_DISK",
    140: "ERR_NOMEM_BITMAP",
    150: "ERR_DATA_NOT_CURRENT",
    152: "ERR_PERM",
    158: "ERR_RES_NOT_KNOWN",
    162: "ERR_INVALID_REQUEST",
    165: "ERR_MD_UNCLEAN",
    170: "ERR_IMPLICIT_SHRINK",
}


class DrbdRefused(UnderstudyError):
    """DRBD's kernel module refused a request; with the name of its code, and its own words where it gives any."""


class Genl:
    """The kernel's side of one DRBD device.

    The calls may be made from any thread, one after the other. They block for as long as DRBD needs: a disk that does
    not answer holds up `detach`.

    Args:
        minor: Of the device.
        family: Number of DRBD's messages.

    Make one with `find`. It holds nothing open.
    """

    def __init__(self, minor: int, family: int) -> None:
        self._minor = minor
        self._family = family

    @classmethod
    def find(cls, minor: int) -> Genl | None:
        """Return the way to a device, ``None`` where DRBD is not there or is another one.

        Raises:
            DrbdRefused: The kernel cannot be asked.
        """
        body = _GENERIC.pack(_CTRL_CMD_GETFAMILY, 1, 0) + attribute(_CTRL_ATTR_FAMILY_NAME, text(_FAMILY))
        try:
            answer = ask(_NETLINK_GENERIC, message(_GENL_ID_CTRL, NLM_F_REQUEST, body))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise DrbdRefused(f"DRBD's messages cannot be found: {error.strerror or error}") from error
        told = dict(attributes(answer[_GENERIC.size :]))
        version, family = (
            int.from_bytes(told.get(key, b""), sys.byteorder)
            for key in (_CTRL_ATTR_VERSION, _CTRL_ATTR_FAMILY_ID)
        )
        return cls(minor, family) if version == _VERSION else None

    def options(self) -> bytes | None:
        """Return the disk below and all its options, for `attach`; ``None`` if there is none.

        Raises:
            DrbdRefused: There is no such device.
        """
        return self._status().get(_DISK_CONF)

    def disconnect(self) -> None:
        """Give the peer up, without its consent; does nothing when there is none any more.

        Raises:
            DrbdRefused: Why not; also when DRBD gave it up by itself at this moment.
        """
        names = dict(attributes(self._status().get(_CFG_CONTEXT, b"")))
        if _PEER_ADDRESS in names:
            addresses = b"".join(attribute(key, names[key]) for key in (_MY_ADDRESS, _PEER_ADDRESS))
            force = nested(_DISCONNECT_PARMS, attribute(_FORCE, b"\1"))
            self._command("disconnect", _DISCONNECT, _NO_MINOR, nested(_CFG_CONTEXT, addresses) + force)

    def detach(self) -> None:
        """Let go of the disk below.

        Raises:
            DrbdRefused: Why not.
        """
        self._command("detach", _DETACH, self._minor, b"")

    def attach(self, options: bytes) -> None:
        """Take a disk, whose activity log has been applied.

        Args:
            options: As `options` told them.

        Raises:
            DrbdRefused: Why not; there is no disk then.
        """
        self._command("attach", _ATTACH, self._minor, nested(_DISK_CONF, options))

    def promote(self) -> None:
        """Become DRBD's primary.

        Raises:
            DrbdRefused: Why not.
        """
        self._command("primary", _PRIMARY, self._minor, nested(_SET_ROLE_PARMS, b""))

    def distrust_peer(self) -> None:
        """Mark all blocks as out of sync, on the disk; without a connection.

        Raises:
            DrbdRefused: Why not.
        """
        self._command("invalidate-remote", _INVAL_PEER, self._minor, b"")

    def _status(self) -> dict[int, bytes]:
        return dict(attributes(self._command("get-status", _GET_STATUS, self._minor, b"")))

    def _command(self, name: str, number: int, minor: int, body: bytes) -> bytes:
        header = _GENERIC.pack(number, _VERSION, 0) + _DRBD.pack(minor, 0)
        try:
            answer = ask(_NETLINK_GENERIC, message(self._family, NLM_F_REQUEST, header + body))
        except OSError as error:
            raise DrbdRefused(f"DRBD minor {self._minor}: {name}: {error.strerror or error}") from error
        _, code = _DRBD.unpack_from(answer, _GENERIC.size)
        told = answer[_GENERIC.size + _DRBD.size :]
        if code not in _DONE:
            said = [
                words.rstrip(b"\0").decode(errors="replace").strip()
                for kind, reply in attributes(told)
                if kind == _CFG_REPLY
                for key, words in attributes(reply)
                if key == _INFO_TEXT
            ]
            why = "; ".join([f"{_NAMES.get(code, 'code')} ({code})", *said])
            raise DrbdRefused(f"DRBD minor {self._minor}: {name}: {why}")
        return told
