"""``init``: what has to be done once before rooms start in containers: the model in its volume, secrets in theirs."""

from __future__ import annotations

import argparse
import base64
import os
import secrets
import subprocess
from pathlib import Path

from headrace import rooms
from headrace.settings import SettingError
from headrace.verbs.serve import MODEL_SETTINGS
from headrace.verbs.verb import OK, Invocation, Verb

KEY_FILE = "api-key"
WEBHOOK_FILE = "webhook-secret"


def init(invocation: Invocation) -> int:
    """Fetch the model, write key and webhook secret where there are none, and say how to ask."""
    settings, arguments = invocation.settings, invocation.arguments
    if settings.engine == "torch":
        argv = rooms.fetch_command(settings)
        environment = rooms.environment(settings, invocation.environ)
        if code := subprocess.run(argv, env=environment, stdout=subprocess.DEVNULL, check=False).returncode:
            raise SettingError(
                f"the model {settings.model!r} cannot be fetched (exit code {code}); the lines above say why"
            )
    path = Path(arguments.keys) / KEY_FILE
    made = write_once(path, f"sk_{secrets.token_hex(32)}")
    hook = Path(arguments.webhook_keys or arguments.keys) / WEBHOOK_FILE
    write_once(hook, f"whsec_{base64.b64encode(secrets.token_bytes(32)).decode()}")
    curl = (
        f'curl -H "Authorization: Bearer $({arguments.show_key})" '
        f"-H 'Content-Type: application/json' -H 'Prefer: wait=30' '{arguments.public_url}/v1/jobs' "
        """-d '{"kind": "generate", "input": {"messages": [{"role": "user", "content": "Hello"}]}}'"""
    )
    facts = {"model": settings.model, "key_file": str(path), "key_written": made, "curl": curl}
    facts["webhook_secret_file"] = str(hook)
    invocation.print(facts, f"ready: {settings.model}, key in {path}{'' if made else ' (kept)'}\nask with:\n  {curl}")
    return OK


def write_once(path: Path, secret: str) -> bool:
    """Keep a secret, readable by its owner only; False where there is one already, which is left alone.

    Raises:
        SettingError: the folder cannot be written.
    """
    if path.exists():
        return False
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="ascii") as file:
            file.write(f"{secret}\n")
        os.link(draft, path)  # unlike a rename, never replaces one that came meanwhile
        draft.unlink()
    except OSError as error:
        raise SettingError(f"{path} cannot be written: {error}") from error
    return True


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--keys", default="/keys", metavar="DIR", help="folder for the key (/keys)")
    parser.add_argument("--webhook-keys", metavar="DIR", help="folder for the webhook secret (that of the key)")
    parser.add_argument("--public-url", default="http://127.0.0.1:8000", metavar="URL", help="where clients will ask")
    show = "docker compose exec -T api cat /keys/api-key"
    parser.add_argument("--show-key", default=show, metavar="COMMAND", help="prints the key, for the curl line")


INIT = Verb(
    name="init",
    text="fetch the model and write key and webhook secret, once, before containers start",
    example="headrace init --keys ./keys --model smollm2-135m",
    settings=MODEL_SETTINGS,
    run=init,
    add=_add,
)
