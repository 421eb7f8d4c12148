"""The compose files, without a Docker engine: parsed, and their very commands and health checks run as processes.

What is not proved here: the images themselves, and that a kernel's namespaces do what the files ask for.
"""

from __future__ import annotations

import base64
import os
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from headrace.client import Client
from headrace.embedded import find_server
from tests.courier_world import Receiver, receiving, verify
from tests.processes import clean_environment, free_port, until, workers

ROOT = Path(__file__).parent.parent
DRAIN_MARGIN_SECONDS = 5


def read(name: str) -> dict[str, Any]:
    return dict(yaml.safe_load((ROOT / name).read_text(encoding="utf-8")))


BASE, GPU, VLLM = (read(f"docker-compose{name}.yml") for name in ("", ".gpu", ".vllm"))
SERVICES: dict[str, dict[str, Any]] = BASE["services"]

#: ``valkey-cli ping``: the images have it, the wheel that tests use has only the server.
VALKEY_CLI = """#!{python}
import socket, sys
host, port = sys.argv[sys.argv.index("-h") + 1], int(sys.argv[sys.argv.index("-p") + 1])
with socket.create_connection((host, port), 3) as client:
    client.sendall(sys.argv[-1].encode() + b"\\r\\n")
    sys.exit(not client.recv(64).startswith(b"+PONG"))
"""


@dataclass(slots=True)
class Host:
    """This machine in the place of a Docker host: folders for volumes, loopback ports for service names."""

    folder: Path
    environ: Mapping[str, str]  #: what ``${NAME:-default}`` is filled from
    ports: dict[str, int] = field(default_factory=lambda: {"redis": free_port(), "api": free_port()})
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for volume in BASE["volumes"]:
            (self.folder / volume).mkdir()
        programs = self.folder / "bin"
        programs.mkdir()
        write_program(programs / "valkey-cli", VALKEY_CLI.format(python=sys.executable))
        write_program(programs / "headrace", f'#!/bin/sh\nexec {sys.executable} -P -m headrace "$@"\n')
        (programs / "python").symlink_to(sys.executable)
        (programs / "valkey-server").symlink_to(find_server())

    def here(self, service: str, word: str) -> str:
        """A word of a command or an environment, as it is on this machine."""
        word = re.sub(r"\$\{(\w+):-([^}]*)\}", lambda found: self.environ.get(found[1]) or found[2], word)
        for volume, path in volumes_of(service).items():
            word = re.sub(rf"^{path}(?=/|$)", str(self.folder / volume), word)
        word = word.replace("redis://redis:6379", f"redis://127.0.0.1:{self.ports['redis']}")
        word = re.sub(r"(127\.0\.0\.1:)8000", rf"\g<1>{self.ports['api']}", word)
        return {"6379": str(self.ports["redis"]), "8000": str(self.ports["api"]), "0.0.0.0": "127.0.0.1"}.get(
            word, word
        )

    def environment(self, service: str) -> dict[str, str]:
        given = {k: self.here(service, str(v)) for k, v in SERVICES[service].get("environment", {}).items()}
        path = f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        return clean_environment(
            HEADRACE_CACHE=str(self.folder / "models"), PYTHONPATH=str(ROOT), **{**given, "PATH": path}
        )

    def start(self, service: str) -> subprocess.Popen[bytes]:
        words = [self.here(service, str(word)) for word in SERVICES[service]["command"]]
        if service == "redis":
            words += ["--port", str(self.ports["redis"]), "--bind", "127.0.0.1"]
        process = subprocess.Popen(words, env=self.environment(service), cwd=self.folder)
        self.started.append(process)
        return process

    def is_healthy(self, service: str) -> bool:
        kind, *words = SERVICES[service]["healthcheck"]["test"]
        assert kind == "CMD"
        argv = [self.here(service, word) for word in words]
        done = subprocess.run(argv, env=self.environment(service), capture_output=True, timeout=30, check=False)
        return done.returncode == 0


def write_program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def volumes_of(service: str) -> dict[str, str]:
    """Volume name to the path it is mounted on."""
    return {one.split(":")[0]: one.split(":")[1] for one in SERVICES[service].get("volumes", [])}


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    one = Host(folder=tmp_path, environ={"HEADRACE_ENGINE": "instant"})
    yield one
    for process in one.started:
        process.kill()
        process.wait()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as one:
        yield one


def seconds(text: str) -> float:
    found = re.fullmatch(r"(\d+)s", text)
    assert found
    return float(found[1])


def test_the_services_come_up_in_order_turn_healthy_answer_a_job_and_stop_in_their_grace_period(
    host: Host, receiver: Receiver
) -> None:
    host.environ = {**host.environ, "HEADRACE_WEBHOOK_PRIVATE_HOSTS": receiver.host}
    redis_process = host.start("redis")
    until(lambda: host.is_healthy("redis"), redis_process)
    assert host.start("init").wait(60) == 0
    api = host.start("api")
    until(lambda: host.is_healthy("api"), api)
    assert not host.is_healthy("worker")  # there is none yet
    worker = host.start("worker")
    until(lambda: host.is_healthy("worker"), worker)
    key = (host.folder / "keys" / "api-key").read_text().strip()
    url = f"http://127.0.0.1:{host.ports['api']}"
    until(lambda: workers(url, key), api, worker)
    courier = host.start("courier")
    with Client(url, api_key=key) as client:
        body = {"input": {"prompt": "hello"}, "webhook": {"url": receiver.url()}}
        assert client.wait(client.submit(body, max_tokens=5).id, 30).succeeded
        until(lambda: receiver.got, api, worker, courier)
        assert client.run("hello", timeout=30, max_tokens=5).succeeded
        running = client.submit("long", max_tokens=100_000)
        until(lambda: client.get(running.id).status != "queued", api, worker)
        client.cancel(running.id)

    secret = (host.folder / "hooks" / "webhook-secret").read_text().strip()
    assert verify(receiver.got[0], base64.b64decode(secret.removeprefix("whsec_")))
    for name, process in (("worker", worker), ("courier", courier), ("api", api), ("redis", redis_process)):
        process.send_signal(signal.SIGTERM)
        assert process.wait(seconds(SERVICES[name]["stop_grace_period"])) == 0, name


def test_init_writes_a_private_key_once_and_prints_how_to_ask(host: Host) -> None:
    assert host.start("init").wait(60) == 0
    path = host.folder / "keys" / "api-key"
    key = path.read_text()
    argv = [host.here("init", str(word)) for word in SERVICES["init"]["command"]]
    again = subprocess.run(argv, env=host.environment("init"), capture_output=True, text=True, timeout=60, check=True)

    hook = host.folder / "hooks" / "webhook-secret"
    assert re.fullmatch(r"whsec_[A-Za-z0-9+/]{43}=\n", hook.read_text())
    assert stat.S_IMODE(hook.stat().st_mode) == 0o600
    assert path.read_text() == key
    assert re.fullmatch(r"sk_[0-9a-f]{64}\n", key)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert "curl " in again.stdout
    assert key.strip() not in again.stdout


def test_several_workers_of_one_host_are_told_nothing_that_only_one_could_be() -> None:
    worker = SERVICES["worker"]

    assert not {"container_name", "ports", "hostname"} & set(worker)
    assert not {"HEADRACE_WORKER_NAME", "HEADRACE_THREADS", "HEADRACE_WORKERS"} & set(worker["environment"])


def test_a_worker_has_its_drain_and_five_seconds_to_stop() -> None:
    command = SERVICES["worker"]["command"]
    drain = float(command[command.index("--drain-seconds") + 1])

    assert seconds(SERVICES["worker"]["stop_grace_period"]) == drain + DRAIN_MARGIN_SECONDS


@pytest.mark.parametrize("name", SERVICES)
def test_every_container_is_read_only_without_root_or_capabilities(name: str) -> None:
    service = SERVICES[name]

    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["tmpfs"] == ["/tmp"]
    assert int(service["user"].split(":")[0]) > 0
    assert "privileged" not in service
    assert all(not one.startswith(("/", ".")) for one in service["volumes"]), "named volumes only"


def test_only_the_api_s_port_is_published_and_on_loopback() -> None:
    assert {name for name, service in SERVICES.items() if "ports" in service} == {"api"}
    assert all(port.startswith("127.0.0.1:") for port in SERVICES["api"]["ports"])


def test_only_init_can_reach_out_and_a_courier_where_one_is_asked_for() -> None:
    networks = BASE["networks"]
    masquerade = "com.docker.network.bridge.enable_ip_masquerade"
    closed = {
        n for n, net in networks.items() if net.get("internal") or net.get("driver_opts", {}).get(masquerade) == "false"
    }

    assert {name for name, service in SERVICES.items() if not set(service["networks"]) <= closed} == {
        "init",
        "courier",
    }
    assert [name for name, service in SERVICES.items() if "profiles" in service] == ["courier"]
    assert SERVICES["redis"]["networks"] == SERVICES["worker"]["networks"] == ["inside"]
    assert networks["inside"]["internal"] is True


def test_rooms_start_only_after_redis_is_healthy_and_init_has_ended_well() -> None:
    wanted = {"redis": {"condition": "service_healthy"}, "init": {"condition": "service_completed_successfully"}}

    assert all(SERVICES[room]["depends_on"] == wanted for room in ("api", "worker", "courier"))
    assert SERVICES["init"]["restart"] == "no"


def test_redis_keeps_what_202_promises() -> None:
    words = SERVICES["redis"]["command"]
    given = dict(zip(words[1::2], words[2::2], strict=True))

    assert (given["--appendonly"], given["--appendfsync"], given["--maxmemory-policy"]) == (
        "yes",
        "always",
        "noeviction",
    )
    assert (given["--stream-node-max-bytes"], given["--hash-max-listpack-value"]) == ("256", "4096")
    assert given["--hz"] == "2"
    assert (given["--save"], given["--dir"]) == ("", "/data")


def test_every_variable_of_the_files_is_a_setting() -> None:
    from headrace.layers import load

    for service in ("init", "api", "worker", "courier"):
        environ = {k: re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", str(v)) for k, v in SERVICES[service]["environment"].items()}
        load({}, environ)


def test_the_gpu_overlay_changes_the_worker_only_and_asks_for_cards() -> None:
    assert set(GPU["services"]) == {"worker"}
    worker = GPU["services"]["worker"]
    [device] = worker["deploy"]["resources"]["reservations"]["devices"]

    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
    assert worker["image"] != SERVICES["worker"]["image"]
    assert worker["environment"]["HEADRACE_DEVICE"] == "cuda"


def test_the_vllm_overlay_changes_the_worker_only_and_its_variables_are_settings() -> None:
    from headrace.layers import load

    assert set(VLLM["services"]) == {"worker"}
    worker = VLLM["services"]["worker"]
    recipe = worker["build"]["dockerfile_inline"]
    environ = {k: re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", str(v)) for k, v in worker["environment"].items()}

    assert load({}, environ).engine == "vllm"
    assert set(re.findall(r"^COPY (\w+) ", recipe, flags=re.M)) >= {
        "api",
        "core",
        "courier",
        "headrace",
        "jobs",
        "worker",
    }
    assert "ENTRYPOINT []" in recipe
    assert worker["image"] not in (SERVICES["worker"]["image"], GPU["services"]["worker"]["image"])
    assert worker["deploy"] == GPU["services"]["worker"]["deploy"]


def test_the_image_is_not_root_copies_every_room_and_nothing_else() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    copied = set(re.findall(r"^COPY (\w+) \1$", text, flags=re.M))
    user = re.search(r"^USER (\d+):(\d+)$", text, flags=re.M)
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}

    assert copied == {"api", "core", "courier", "headrace", "jobs", "worker"}
    assert user is not None
    assert f"{user[1]}:{user[2]}" == SERVICES["api"]["user"]
    assert copied <= kept
    assert all((ROOT / name).exists() for name in kept)
    assert "HEALTHCHECK" in text
    assert "curl" not in text
