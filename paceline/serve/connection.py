"""uvicorn's HTTP connection with a time and a size limit for the request head; uvicorn itself has no time limit."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol


class Connection(HttpToolsProtocol):
    """uvicorn's connection, closed if a request's head is not complete after `head_seconds` or `head_limit` bytes."""

    head_seconds = 30.0
    head_limit = 64 << 10

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._timeout: asyncio.TimerHandle | None = None
        self._head_size = 0
        self._in_body = False

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._start_timeout()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._cancel_timeout()  # the head is complete: the application applies its own limits to the body
            return
        # A body may still arrive after its reply (a refusal). It is read: closing with unread bytes sends a TCP reset,
        # which can destroy the reply before the client reads it.
        self._head_size = 0 if self._in_body else self._head_size + len(data)
        if self._head_size > self.head_limit:
            self.transport.close()
        elif self._timeout is None:
            self._start_timeout()

    def on_headers_complete(self) -> None:
        self._in_body = True
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._in_body = False
        super().on_message_complete()

    def connection_lost(self, error: Exception | None) -> None:
        self._cancel_timeout()
        super().connection_lost(error)

    def _start_timeout(self) -> None:
        self._timeout = asyncio.get_running_loop().call_later(self.head_seconds, self.transport.close)

    def _cancel_timeout(self) -> None:
        self._head_size = 0
        if self._timeout is not None:
            self._timeout.cancel()
            self._timeout = None
