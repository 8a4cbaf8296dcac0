"""libxl: make a domain from a stream, and what follows; in a process of its own.

libxl takes SIGCHLD for itself, starts children, and blocks in an event loop of its own until an operation is over. And
it does not get along with every stream: 4.17's spins for ever when one ends between libxc's CHECKPOINT and libxl's
CHECKPOINT_END. So nothing here is called in the agent: see `understudy_xen.restorer`.

Source: Xen tools/include/libxl.h, tools/libs/light/libxl_types.idl (domain_restore_params, error); the prototypes used
here are the same from 4.14 to 4.22. sizeof(libxl_domain_config) is 1288 bytes in 4.17, 1400 in 4.22, on x86-64.
"""

from __future__ import annotations

import ctypes
from types import MappingProxyType
from typing import Any, Final

from understudy_xen.libs.errors import LibxlFailed, XenCallFailed
from understudy_xen.libs.loading import Library
from understudy_xen.libs.toollog import ToolLog
from understudy_xen.libs.versions import XenVersion

__all__ = ["ERRORS", "Light"]

ERRORS: Final = MappingProxyType(
    {
        -1: "ERROR_NONSPECIFIC",
        -2: "ERROR_VERSION",
        -3: "ERROR_FAIL",
        -4: "ERROR_NI",
        -5: "ERROR_NOMEM",
        -6: "ERROR_INVAL",
        -7: "ERROR_BADFAIL",
        -8: "ERROR_GUEST_TIMEDOUT",
        -9: "ERROR_TIMEDOUT",
        -10: "ERROR_NOPARAVIRT",
        -11: "ERROR_NOT_READY",
        -12: "ERROR_OSEVENT_REG_FAIL",
        -13: "ERROR_BUFFERFULL",
        -14: "ERROR_UNKNOWN_CHILD",
        -15: "ERROR_LOCK_FAIL",
        -16: "ERROR_JSON_CONFIG_EMPTY",
        -17: "ERROR_DEVICE_EXISTS",
        -18: "ERROR_CHECKPOINT_DEVOPS_DOES_NOT_MATCH",
        -19: "ERROR_CHECKPOINT_DEVICE_NOT_SUPPORTED",
        -20: "ERROR_VNUMA_CONFIG_INVALID",
        -21: "ERROR_DOMAIN_NOTFOUND",
        -22: "ERROR_ABORTED",
        -23: "ERROR_NOTFOUND",
        -24: "ERROR_DOMAIN_DESTROYED",
        -25: "ERROR_FEATURE_REMOVED",
        -26: "ERROR_PROTOCOL_ERROR_QMP",
        -27: "ERROR_UNKNOWN_QMP_ERROR",
        -28: "ERROR_QMP_GENERIC_ERROR",
        -29: "ERROR_QMP_COMMAND_NOT_FOUND",
        -30: "ERROR_QMP_DEVICE_NOT_ACTIVE",
        -31: "ERROR_QMP_DEVICE_NOT_FOUND",
        -32: "ERROR_QEMU_API",
    }
)  #: enum libxl_error

_P, _INT, _U32, _S = ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32, ctypes.c_char_p
_PROTOTYPES: Final[dict[str, tuple[Any, tuple[Any, ...]]]] = {
    "libxl_ctx_alloc": (_INT, (_P, _INT, ctypes.c_uint, _P)),
    "libxl_ctx_free": (_INT, (_P,)),
    "libxl_domain_config_init": (None, (_P,)),
    "libxl_domain_config_dispose": (None, (_P,)),
    "libxl_domain_config_from_json": (_INT, (_P, _P, _S)),
    "libxl_domain_config_to_json": (_P, (_P, _P)),
    "libxl_domain_restore_params_init": (None, (_P,)),
    "libxl_domain_create_restore": (_INT, (_P, _P, _P, _INT, _INT, _P, _P, _P)),
    "libxl_domain_create_new": (_INT, (_P, _P, _P, _P, _P)),
    "libxl_retrieve_domain_configuration": (_INT, (_P, _U32, _P, _P)),
    "libxl_domain_unpause": (_INT, (_P, _U32, _P)),
    "libxl_domain_rename": (_INT, (_P, _U32, _S, _S)),
    "libxl_domain_destroy": (_INT, (_P, _U32, _P)),
}
_CONFIG_BYTES: Final = 65536  # of a libxl_domain_config: some forty times what it needs
_STREAM_VERSION: Final = 2

_libc = ctypes.CDLL(None)
_libc.free.argtypes = [ctypes.c_void_p]
_libc.free.restype = None


class _RestoreParams(ctypes.Structure):
    _fields_ = (
        ("checkpointed_stream", ctypes.c_int),
        ("stream_version", ctypes.c_uint32),
        ("colo_proxy_script", ctypes.c_char_p),
        ("userspace_colo_proxy", ctypes.c_int),
    )


class Light:
    """A context of libxl; every call blocks until its operation is over.

    Args:
        version: Of the running Xen.
        log: Gets what libxl says; its errors become part of `LibxlFailed`.

    Raises:
        LibraryMissing: libxl of this version is not installed.
        LibxlFailed: It cannot be used, e.g. because xenstored does not answer.
    """

    def __init__(self, version: XenVersion, log: ToolLog) -> None:
        soname = f"libxenlight.so.{version}"
        self._library = Library(soname, _PROTOTYPES, f"on Debian: apt install libxenmisc{version}")
        self._log = log
        self._context = ctypes.c_void_p()
        code = self._library["libxl_ctx_alloc"](ctypes.byref(self._context), 0, 0, log.address)
        if code:
            raise self._failure("libxl_ctx_alloc", code, None)

    def close(self) -> None:
        """Free the context."""
        if self._context.value is not None:
            self._library["libxl_ctx_free"](self._context)
            self._context = ctypes.c_void_p()

    def restore(self, config: str, fd: int, *, checkpointed: int, send_back_fd: int = -1) -> int:
        """Make a domain from a stream, and return its number; it is paused, its devices are there.

        Args:
            config: JSON of a libxl_domain_config.
            fd: Where a libxl stream comes, its header first.
            checkpointed: Kind of stream: 0 plain, 1 Remus, 2 COLO. A Remus stream's end, wherever it is after the
                first checkpoint, makes the domain from the last whole checkpoint.
            send_back_fd: The back channel; COLO only.

        Raises:
            LibxlFailed: It cannot be made. libxl has destroyed what it had made of it.
        """
        params = _RestoreParams()
        self._library["libxl_domain_restore_params_init"](ctypes.byref(params))
        params.checkpointed_stream = checkpointed
        params.stream_version = _STREAM_VERSION
        domid = _U32(0)
        with _Config(self, config) as held:
            self._run(
                "libxl_domain_create_restore",
                None,
                held,
                ctypes.byref(domid),
                fd,
                send_back_fd,
                ctypes.byref(params),
                None,
                None,
            )
        return domid.value

    def create(self, config: str) -> int:
        """Make a new domain, and return its number; it is paused."""
        domid = _U32(0)
        with _Config(self, config) as held:
            self._run("libxl_domain_create_new", None, held, ctypes.byref(domid), None, None)
        return domid.value

    def config(self, domid: int) -> str:
        """Return a domain's configuration as JSON: what it was made from, and what was changed since."""
        with _Config(self) as held:
            self._run("libxl_retrieve_domain_configuration", domid, domid, held, None)
            text = self._library["libxl_domain_config_to_json"](self._context, held)
            if not text:
                raise XenCallFailed("libxl_domain_config_to_json", ctypes.get_errno(), domid)
            try:
                return ctypes.string_at(text).decode()
            finally:
                _libc.free(text)

    def unpause(self, domid: int) -> None:
        """Let a domain run, and its device model."""
        self._run("libxl_domain_unpause", domid, domid, None)

    def rename(self, domid: int, old: str, new: str) -> None:
        """Give a domain another name."""
        self._run("libxl_domain_rename", domid, domid, old.encode(), new.encode())

    def destroy(self, domid: int) -> None:
        """End a domain with its devices, its device model and its part of xenstore."""
        self._run("libxl_domain_destroy", domid, domid, None)

    def _run(self, operation: str, domid: int | None, *arguments: Any) -> None:
        self._log.errors.clear()
        code = int(self._library[operation](self._context, *arguments))
        if code:
            raise self._failure(operation, code, domid)

    def _failure(self, operation: str, code: int, domid: int | None) -> LibxlFailed:
        return LibxlFailed(
            operation, code, ERRORS.get(code, "unknown error"), domid, tuple(self._log.errors[-5:])
        )


class _Config:
    # A libxl_domain_config, whose size only the library knows.

    def __init__(self, light: Light, text: str | None = None) -> None:
        self._light = light
        self._text = text
        self._raw = ctypes.create_string_buffer(_CONFIG_BYTES)

    def __enter__(self) -> ctypes.Array[ctypes.c_char]:
        library = self._light._library  # noqa: SLF001 - one module's
        library["libxl_domain_config_init"](self._raw)
        if self._text is not None:
            try:
                self._light._run("libxl_domain_config_from_json", None, self._raw, self._text.encode())  # noqa: SLF001
            except BaseException:
                self.__exit__()
                raise
        return self._raw

    def __exit__(self, *exc: object) -> None:
        self._light._library["libxl_domain_config_dispose"](self._raw)  # noqa: SLF001
