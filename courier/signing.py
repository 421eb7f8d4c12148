"""Standard Webhooks 1.0.0: what is sent, and how it is signed. Pure."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
from collections.abc import Mapping, Sequence

from jobs.outbox import Callback

PREFIX = "whsec_"
SECRET_BYTES = range(24, 65)


def read_secrets(text: str) -> tuple[bytes, ...]:
    """Keys from ``whsec_…`` words; all of them sign, so that a receiver may change from one to the next.

    Raises:
        ValueError: there is none, or one that is no secret; without showing it.
    """
    keys = []
    for word in text.split():
        try:
            key = base64.b64decode(word.removeprefix(PREFIX), validate=True)
        except binascii.Error:
            key = b""
        if not word.startswith(PREFIX) or len(key) not in SECRET_BYTES:
            raise ValueError(f"webhook_secret: must be {PREFIX} and 24 to 64 bytes in base64")
        keys.append(key)
    if not keys:
        raise ValueError("webhook_secret: is empty; set webhook_secret_file (or webhook_secret)")
    return tuple(keys)


def body(callback: Callback) -> bytes:
    """Thin: which job, and how it ended. The same bytes at every attempt."""
    wire = {
        "id": callback.id,
        "object": "event",
        "created_at": callback.ended_at,
        "type": callback.type,
        "data": {"id": callback.job_id},
    }
    return json.dumps(wire, separators=(",", ":")).encode()


def headers(callback_id: str, sent_at: int, content: bytes, keys: Sequence[bytes]) -> Mapping[str, str]:
    """The three headers; ``sent_at`` in Unix seconds, of this attempt."""
    signed = f"{callback_id}.{sent_at}.".encode() + content
    signatures = (base64.b64encode(hmac.digest(key, signed, hashlib.sha256)).decode() for key in keys)
    return {
        "webhook-id": callback_id,
        "webhook-timestamp": str(sent_at),
        "webhook-signature": " ".join(f"v1,{signature}" for signature in signatures),
    }
