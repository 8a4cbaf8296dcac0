"""One raw netlink socket per guest: what its gates are told goes out together, what others change is heard.

All gates of a guest take a phase at the same time; their messages are collected and sent by one ``sendmsg``. The kernel
carries them out before that call returns, so that the answers are there to be read, without waiting. The same socket
is subscribed to the kernel's notifications about links and traffic control: what somebody else changes lies in the same
queue, in the order in which it happened, and a filter in the kernel keeps out what is about other interfaces.

A call waits for nothing but the kernel's lock of its network configuration (RTNL), for as long as somebody else's
change takes.

Source: netlink(7), rtnetlink(7); Linux net/netlink/af_netlink.c, net/core/rtnetlink.c (rtnetlink_send).
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import socket
import struct
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import Final, NamedTuple, Protocol
from weakref import WeakValueDictionary

from understudy.errors import HypervisorError
from understudy.netlink import NLMSG_ERROR
from understudy_netbuffer.mailbox import Mailbox
from understudy_netbuffer.rtnetlink import (
    RTM_DELACTION,
    RTM_NEWACTION,
    RTM_NEWQDISC,
    Event,
    event_of,
    messages,
    number,
    refusal_of,
)

__all__ = ["Listener", "Wire", "wire_of"]

_SOL_NETLINK: Final = 270
_NETLINK_ADD_MEMBERSHIP: Final = 1
_NETLINK_CAP_ACK: Final = 10
_NETLINK_EXT_ACK: Final = 11
_RTNLGRP_LINK: Final = 1
_RTNLGRP_TC: Final = 4
_SO_ATTACH_FILTER: Final = 26
_SO_RCVBUFFORCE: Final = 33

_QUEUE_BYTES: Final = 1 << 20
_MOST_FILTERED: Final = 100  # jumps of classic BPF reach 255 instructions


class Listener(Protocol):
    """Somebody who must know what others change about its interfaces."""

    @property
    def interfaces(self) -> Collection[int]:
        """Index numbers of the interfaces it is made of."""

    def heard(self, event: Event) -> None:
        """Take note of a change that was not ours; called while the socket is read, must not ask."""

    def deaf(self) -> None:
        """Take note that changes may have been missed: the kernel had more to say than the queue holds."""


class _Asked(NamedTuple):
    message: bytearray
    took: Callable[[bytes], None]
    unless: Callable[[], bool] | None
    refused: Callable[[Exception], None] | None
    future: asyncio.Future[None]


class Wire:
    """The way of one guest's gates to the kernel.

    Raises:
        OSError: No netlink socket can be had.
    """

    def __init__(self) -> None:
        self._socket = socket.socket(
            socket.AF_NETLINK,
            socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK,
            socket.NETLINK_ROUTE,
        )
        try:
            for option in (_NETLINK_CAP_ACK, _NETLINK_EXT_ACK):
                self._socket.setsockopt(_SOL_NETLINK, option, 1)
            with suppress(OSError):  # without the privilege the default has to do
                self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _QUEUE_BYTES)
            self._socket.bind((0, 0))
            self._port = int(self._socket.getsockname()[0])
            for group in (_RTNLGRP_LINK, _RTNLGRP_TC):
                self._socket.setsockopt(_SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP, group)
        except OSError:
            self._socket.close()
            raise
        self._mailbox = Mailbox(self._socket)
        # Asked for once: until Python 3.12 that is a system call each time.
        self._loop = asyncio.get_running_loop()
        self._listeners: list[Listener] = []
        self._batch: list[_Asked] = []
        self._looks_first = False  # something in the batch depends on what others have changed
        self._asked: dict[int, _Asked] = {}
        self._sequence = 0

    # --- Who listens -------------------------------------------------------------------------------------------------

    def join(self, listener: Listener) -> None:
        """Begin to tell `listener`; again after its interfaces have changed."""
        if listener not in self._listeners:
            self._listeners.append(listener)
            if len(self._listeners) == 1:
                self._loop.add_reader(self._socket, self.drain)
        self._filter()

    def leave(self, listener: Listener) -> None:
        """Tell it no more; with the last one the socket is closed. Idempotent."""
        if listener in self._listeners:
            self._listeners.remove(listener)
            self._filter()
        if not self._listeners and self._socket.fileno() >= 0:
            self._loop.remove_reader(self._socket)
            self._socket.close()

    @property
    def closed(self) -> bool:
        """Whether the last listener has left."""
        return self._socket.fileno() < 0

    # --- Asking ------------------------------------------------------------------------------------------------------

    async def ask(
        self,
        message: bytearray,
        took: Callable[[bytes], None],
        *,
        unless: Callable[[], bool] | None = None,
        refused: Callable[[Exception], None] | None = None,
    ) -> None:
        """Have the kernel make a change, together with those of the guest's other gates.

        Args:
            message: Of `understudy_netbuffer.rtnetlink`; its sequence number is written here.
            took: Called with the kernel's answer at the very moment when it is known, whatever becomes of the caller.
            unless: Asked in the moment before the message is sent, when everything that others have changed until then
                has been heard; if it is true, nothing is sent.
            refused: If given, nobody waits for the answer: this returns when the kernel has carried the message out or
                refused it, and the next `drain` calls `took`, or this with what is raised otherwise.

        Raises:
            understudy_netbuffer.rtnetlink.KernelRefused: The kernel refused; nothing was changed.
            HypervisorError: It gave no answer; the change may have been made.

        Guarantees:
            A caller that is cancelled before the message was sent has changed nothing.
        """
        asked = _Asked(message, took, unless, refused, self._loop.create_future())
        self._batch.append(asked)
        self._looks_first |= unless is not None
        if len(self._batch) >= len(self._listeners):
            self._send()
        elif len(self._batch) == 1:
            # Who takes part in this phase has been started already: after this turn of the loop the batch is whole.
            self._loop.call_soon(self._send)
        await asked.future

    def tell(self, message: bytearray) -> None:
        """Have the kernel make a change at once and without an answer, also while the socket is read."""
        self._sequence = (self._sequence + 1) & 0xFFFFFFFF
        number(message, self._sequence)
        with suppress(OSError):
            self._socket.send(message)

    def drain(self) -> None:
        """Take in everything that the kernel has said; whom it concerns has heard it when this returns."""
        while not self.closed:
            try:
                count = self._mailbox.collect()
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                self._deaf()
                continue
            for datagram in self._mailbox.datagrams(count):
                if datagram is None:
                    self._deaf()
                else:
                    self._read(datagram)
            if not self._mailbox.full(count):
                return

    def _send(self) -> None:
        if self._looks_first:
            self.drain()
            self._give_up("the kernel gave no answer")
        batch, self._batch, self._looks_first = self._batch, [], False
        sent = []
        for asked in batch:
            if asked.future.done():
                continue  # cancelled before it was sent
            if asked.unless is not None and asked.unless():
                asked.future.set_result(None)
                continue
            self._sequence = (self._sequence + 1) & 0xFFFFFFFF
            number(asked.message, self._sequence)
            self._asked[self._sequence] = asked
            sent.append(asked)
        if not sent:
            return
        try:
            self._socket.send(sent[0].message if len(sent) == 1 else b"".join(each.message for each in sent))
        except OSError as error:
            self._give_up(f"the kernel cannot be asked: {error.strerror}")
            return
        waited_for = False
        for asked in sent:
            if asked.refused is None:
                waited_for = True
            else:
                asked.future.set_result(None)
        if waited_for:
            self.drain()  # everything has been carried out: the answers are there
            self._give_up("the kernel gave no answer")

    def _give_up(self, problem: str) -> None:
        # What has not been answered by now never will be.
        if self._asked:
            left, self._asked = self._asked, {}
            for asked in left.values():
                _fail(asked, HypervisorError(problem))

    # --- Hearing -----------------------------------------------------------------------------------------------------

    def _read(self, datagram: bytes) -> None:
        for kind, sequence, port, message in messages(datagram):
            if port == self._port:
                self._answer(kind, sequence, message)
            elif (event := event_of(kind, message)) is not None:
                for listener in tuple(self._listeners):
                    if not event.index or event.index in listener.interfaces:
                        listener.heard(event)

    def _answer(self, kind: int, sequence: int, message: bytes) -> None:
        if kind not in {RTM_NEWQDISC, NLMSG_ERROR}:
            return  # what was replaced by our own message
        asked = self._asked.pop(sequence, None)
        if asked is None:
            return
        refused = refusal_of(message) if kind == NLMSG_ERROR else None
        if refused is not None:
            _fail(asked, refused)
            return
        asked.took(message)
        if not asked.future.done():
            asked.future.set_result(None)

    def _deaf(self) -> None:
        for listener in tuple(self._listeners):
            listener.deaf()

    def _filter(self) -> None:
        # In the kernel: our answers, actions (which name no interface) and what is about our interfaces; no more.
        indexes = sorted({index for each in self._listeners for index in each.interfaces})
        if self.closed or len(indexes) > _MOST_FILTERED:
            return
        tests = [
            (0x28, 4, (socket.htons(NLMSG_ERROR), socket.htons(RTM_NEWACTION), socket.htons(RTM_DELACTION))),
            (0x20, 12, (socket.htonl(self._port),)),
            (0x20, 20, tuple(map(socket.htonl, indexes))),
        ]
        left = sum(1 + len(values) for _, _, values in tests)
        program = []
        for load, offset, values in tests:
            program.append(struct.pack("=HBBI", load, 0, 0, offset))
            left -= 1
            for value in values:
                program.append(struct.pack("=HBBI", 0x15, left, 0, value))  # equal: to the last instruction
                left -= 1
        program.append(struct.pack("=HBBI", 0x06, 0, 0, 0))
        program.append(struct.pack("=HBBI", 0x06, 0, 0, 0xFFFFFFFF))
        code = ctypes.create_string_buffer(b"".join(program))
        self._socket.setsockopt(
            socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HL", len(program), ctypes.addressof(code))
        )


def _fail(asked: _Asked, error: Exception) -> None:
    if asked.refused is not None:
        asked.refused(error)
    if not asked.future.done():
        asked.future.set_exception(error)


# One wire for all gates of a guest's session; it lives as long as one of them does.
_wires: WeakValueDictionary[tuple[str, str], Wire] = WeakValueDictionary()


def wire_of(guest: str, session: str) -> Wire:
    """Return the wire of a guest's session, made for the first gate that asks.

    The caller joins it at once; it is closed when the last one has left.

    Raises:
        HypervisorError: No netlink socket can be had.
    """
    found = _wires.get((guest, session))
    if found is None or found.closed:
        try:
            found = _wires[guest, session] = Wire()
        except OSError as error:
            raise HypervisorError(f"no netlink socket can be had: {error.strerror}") from error
    return found
