"""What both clients do alike with httpx2: options, a call as a request, an answer as a value or an error."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import httpx2

from headrace.calls import LONGEST_WAIT_SECONDS, Call
from headrace.errors import refusal

EVENT_LIMIT = 1 << 28  #: bytes; the last event holds the whole job
SILENCE_SECONDS = 60.0  #: a stream sends comments more often than that
CONNECT_SECONDS = 5.0
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def options(url: str, api_key: str) -> dict[str, Any]:
    """Arguments of an httpx2 client for this server; a proxy of the environment is not for this very machine."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    limits = httpx2.Limits(max_connections=256, max_keepalive_connections=256)
    return {
        "base_url": url,
        "headers": headers,
        "limits": limits,
        "trust_env": urlsplit(url).hostname not in LOOPBACK,
    }


def request(call: Call[Any]) -> dict[str, Any]:
    """Arguments of ``httpx2.Client.request``."""
    return {
        "method": call.method,
        "url": call.path,
        "params": dict(call.query),
        "headers": dict(call.headers),
        "json": call.body,
        "timeout": httpx2.Timeout(call.timeout, connect=CONNECT_SECONDS),
    }


def stream(after: int) -> dict[str, Any]:
    """Arguments of ``httpx2.Client.sse`` that go on after an event's number."""
    headers = {"Last-Event-ID": str(after)} if after >= 0 else {}
    timeout = httpx2.Timeout(SILENCE_SECONDS, connect=CONNECT_SECONDS)
    return {"headers": headers, "timeout": timeout, "max_event_size": EVENT_LIMIT}


def answer(response: httpx2.Response) -> Any:
    """The JSON of an answer that was read; None where it has no body.

    Raises:
        ServerRefused: the status says so.
    """
    if response.is_success:
        return response.json() if response.content else None
    raise refusal(response.status_code, _json(response), response.headers.get("x-request-id"))


def this_wait(deadline: float | None) -> float:
    """Seconds that the next request may ask the server to wait; ``deadline`` on the monotonic clock."""
    if deadline is None:
        return LONGEST_WAIT_SECONDS
    return round(min(LONGEST_WAIT_SECONDS, max(0.0, deadline - time.monotonic())), 3)


def why(error: Exception | None) -> str:
    """The reason in words; some exceptions have none."""
    return str(error) or type(error).__name__ if error is not None else "the stream ends before the job does"


def _json(response: httpx2.Response) -> Mapping[str, Any] | None:
    try:
        body = response.json()
    except ValueError:
        return None
    return body if isinstance(body, dict) else None
