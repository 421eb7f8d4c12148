"""llama.cpp's server, as a peer: starts it and asks it over HTTP. Standard library only."""

from __future__ import annotations

import concurrent.futures
import http.client
import json
import re
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers import stdio

SLOT_TOKENS = 1024
LOAD_SECONDS = 30


class LlamaServer:
    """``llama-server`` on a port of its own, with as many slots as run at once."""

    def __init__(self, binaries: Path, gguf: Path, running: int, threads: int, cache: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self._binaries, self._gguf, self._threads, self._cache = binaries, gguf, threads, cache
        server = str(binaries / "llama-server")
        for self._own in ([], ["--no-repack"]):  # build 11434 never ends its warm-up on a virtual machine with AMX
            options = ["-np", str(running), "-c", str(running * SLOT_TOKENS), *self._shared()]
            self._process = subprocess.Popen([server, "--port", str(self._port), *options], stdin=subprocess.DEVNULL)
            if self._is_ready():
                break
            self._process.kill()
            self._process.wait()
        else:
            raise SystemExit(f"llama-server was not ready within {LOAD_SECONDS} s")
        told = subprocess.run([server, "--version"], capture_output=True, text=True, check=True)
        version = re.search(r"version: (.*)", told.stdout + told.stderr)
        self.versions: Mapping[str, str] = {"llama.cpp": version[1] if version else "unknown"}
        kept = [part for part in options if part != str(gguf) and part != "-m"]
        self.settings: Mapping[str, Any] = {
            "weights": gguf.stem.rpartition(".")[2],
            "cache": cache,
            "options": f"llama-server {' '.join(kept)}; /completion with token ids, cache_prompt=false",
        }

    def run(self, items: Sequence[stdio.Item]) -> list[list[int]]:
        with concurrent.futures.ThreadPoolExecutor(len(items)) as pool:
            return list(pool.map(self._ask, items))

    def perplexity(self, prose: stdio.Prose) -> float:
        """By ``llama-perplexity``, which cuts the text by itself: checked is that it cuts as many windows."""
        length = len(prose.windows[0])
        with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as file:
            file.write(prose.text)
            file.flush()
            command = [str(self._binaries / "llama-perplexity"), "-f", file.name, "-c", str(length), *self._shared()]
            told = subprocess.run(command, capture_output=True, text=True, check=True)
        said = told.stdout + told.stderr
        chunks = re.search(r"over (\d+) chunks", said)
        found = re.search(r"Final estimate: PPL = ([\d.]+)", said)
        if not (chunks and found) or int(chunks[1]) != len(prose.windows):
            raise stdio.CannotScore(f"llama-perplexity did not score {len(prose.windows)} windows")
        return float(found[1])

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(10)

    def _shared(self) -> list[str]:
        cache = ["-ctk", self._cache, "-ctv", self._cache, "-fa", "on"]
        return ["-m", str(self._gguf), "-t", str(self._threads), *cache, *self._own]

    def _ask(self, item: stdio.Item) -> list[int]:
        body = {"prompt": item.token_ids, "n_predict": item.answer_tokens, "ignore_eos": True, "temperature": 0}
        body |= {"cache_prompt": False, "return_tokens": True}
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=600)
        connection.request("POST", "/completion", json.dumps(body), {"Content-Type": "application/json"})
        answer = json.loads(connection.getresponse().read())
        connection.close()
        return list(answer["tokens"])

    def _is_ready(self) -> bool:
        """Whether it is within ``LOAD_SECONDS``."""
        deadline = time.monotonic() + LOAD_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=2)
            try:
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    return True
            except OSError:
                pass
            finally:
                connection.close()
            time.sleep(0.2)
        return False


def main() -> None:
    parser = stdio.parser(__doc__)
    parser.add_argument("--binaries", type=Path, required=True, help="folder with llama-server and llama-perplexity")
    parser.add_argument("--cache", default="f16")
    given = parser.parse_args()
    server: list[LlamaServer] = []

    def load() -> LlamaServer:
        server.append(LlamaServer(given.binaries, given.model, given.running, given.threads, given.cache))
        return server[0]

    try:
        stdio.serve(load, given.workload)
    finally:
        for one in server:
            one.close()


if __name__ == "__main__":
    main()
