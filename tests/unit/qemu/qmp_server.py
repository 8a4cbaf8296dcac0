"""A QMP server that does what a test says: the fake behind the monitor's unit tests."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

GREETING = {
    "QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 0}, "package": ""}, "capabilities": ["oob"]}
}


class QmpServer:
    """Answers every command by `answer`; what it returns is sent, ``None`` means silence."""

    def __init__(self) -> None:
        self.received: list[dict[str, Any]] = []
        self.answer: Callable[[dict[str, Any]], dict[str, Any] | None] = lambda _: {"return": {}}
        self.greeting: bytes = json.dumps(GREETING).encode() + b"\r\n"
        self.connections: list[asyncio.StreamWriter] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections.append(writer)
        writer.write(self.greeting)
        try:
            async for message in _messages(reader):
                self.received.append(message)
                known = message.get("execute") == "qmp_capabilities"
                answer: dict[str, Any] | None = {"return": {}} if known else self.answer(message)
                if answer is not None:
                    self.send({**answer, "id": message["id"]} if "id" in message else answer)
        except ConnectionResetError:
            pass
        finally:
            writer.close()

    def send(self, message: dict[str, Any]) -> None:
        self.connections[-1].write(json.dumps(message).encode() + b"\r\n")

    def event(self, name: str, microseconds: int = 0, **data: Any) -> None:
        stamp = {"seconds": 1, "microseconds": microseconds}
        self.send({"event": name, "data": data, "timestamp": stamp})

    def hang_up(self) -> None:
        self.connections[-1].close()


@asynccontextmanager
async def qmp_server(path: Path) -> AsyncIterator[QmpServer]:
    """Run a server on the Unix socket `path`."""
    server = QmpServer()
    listening = await asyncio.start_unix_server(server.serve, path)
    try:
        yield server
    finally:
        listening.close()
        for writer in server.connections:
            writer.close()
        await listening.wait_closed()


async def _messages(reader: asyncio.StreamReader) -> AsyncIterator[dict[str, Any]]:
    # The client ends its messages by nothing; JSON says where one ends.
    text = ""
    while data := await reader.read(65536):
        text += data.decode().replace("\n", " ")
        while text.strip():
            try:
                message, end = json.JSONDecoder().raw_decode(text.lstrip())
            except json.JSONDecodeError:
                break
            text = text.lstrip()[end:]
            yield message
