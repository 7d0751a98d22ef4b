"""A connection that must say in time, and within a size, what it wants; uvicorn itself waits for ever."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol


class Connection(HttpToolsProtocol):
    """uvicorn's connection, closed where a request's head is not whole after `head_seconds` or `head_limit` bytes."""

    head_seconds = 30.0
    head_limit = 64 << 10

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._late: asyncio.TimerHandle | None = None
        self._head_size = 0
        self._body = False

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop()  # the head is whole: the application waits for the rest
            return
        # what comes of a body after its reply (a refusal) is read: closing on unread bytes would reset the reply away
        self._head_size = 0 if self._body else self._head_size + len(data)
        if self._head_size > self.head_limit:
            self.transport.close()
        elif self._late is None:
            self._wait()

    def on_headers_complete(self) -> None:
        self._body = True
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._body = False
        super().on_message_complete()

    def connection_lost(self, error: Exception | None) -> None:
        self._stop()
        super().connection_lost(error)

    def _wait(self) -> None:
        self._late = asyncio.get_running_loop().call_later(self.head_seconds, self.transport.close)

    def _stop(self) -> None:
        self._head_size = 0
        if self._late is not None:
            self._late.cancel()
            self._late = None
