"""What we would publish lives beside anybody's own ``api``, ``core``, ``jobs`` and ``worker``."""

from __future__ import annotations

import re
import signal
import site
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.processes import clean_environment, free_port, until, workers

ROOT = Path(__file__).parent.parent
OURS = ("api", "core", "courier", "jobs", "worker")
WRONG_ROOM = 97  #: exit code of the application's own programs


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built without a network, as it would be published."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet", "--no-index"]
    subprocess.run([*pip, "--no-deps", "--no-build-isolation", "-w", str(folder), str(ROOT)], check=True, timeout=120)
    [built] = folder.glob("*.whl")
    return built


def test_the_wheel_has_one_top_level_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.partition("/")[0] for name in names}

    assert {top for top in tops if not top.endswith(".dist-info")} == {"headrace"}
    assert not any("__pycache__" in name or name.endswith((".pyc", ".log", ".json")) for name in names)


def test_the_wheel_holds_every_room_and_every_script_of_the_checkout(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("headrace/_rooms/")}
    wanted = {
        f"headrace/_rooms/{path.relative_to(ROOT).as_posix()}"
        for room in OURS
        for path in (ROOT / room).rglob("*")
        if path.suffix in (".py", ".lua")
    }
    assert packed >= wanted
    assert any(name.endswith(".lua") for name in packed)


@dataclass(frozen=True, slots=True)
class Application:
    """Somebody else's program with rooms of its own, in an environment where our wheel is installed."""

    folder: Path
    python: Path

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        argv = [str(self.python), *words]
        return subprocess.run(
            argv, cwd=self.folder, env=clean_environment(), capture_output=True, text=True, timeout=60, check=False
        )


@pytest.fixture(scope="module")
def application(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Application:
    """Its environment sees this one's dependencies, but not this checkout: only the wheel."""
    folder = tmp_path_factory.mktemp("application")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True, timeout=60)
    [packages] = (folder / "venv" / "lib").glob("python*/site-packages")
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*pip, "--target", str(packages), str(wheel)], check=True, timeout=120)
    for room in OURS:
        (folder / room).mkdir()
        (folder / room / "__init__.py").write_text(f"OWNER = 'the application, {room}'\n")
        (folder / room / "__main__.py").write_text(f"raise SystemExit({WRONG_ROOM})\n")
    (folder / "core" / "request.py").write_text("raise RuntimeError('the wrong core')\n")
    return Application(folder=folder, python=folder / "venv" / "bin" / "python")


def test_the_application_keeps_its_own_packages(application: Application) -> None:
    rooms = ", ".join(OURS)
    code = f"import {rooms}, headrace.client; print(*(room.OWNER for room in ({rooms})), sep=';')"
    done = application.run("-c", code)

    assert done.stdout.strip() == ";".join(f"the application, {room}" for room in OURS), done.stderr
    assert application.run("-m", "api").returncode == WRONG_ROOM  # the trap is real


def test_the_client_that_the_application_imports_is_the_wheel_s(application: Application) -> None:
    code = "import headrace.client as c; print(c.__file__, c.Client('http://127.0.0.1:1').submit.__name__)"
    done = application.run("-c", code)

    assert str(application.folder) in done.stdout, done.stderr


@contextmanager
def started(application: Application, *words: str, **environ: str) -> Iterator[subprocess.Popen[bytes]]:
    """A verb, started from the application's own folder."""
    argv = [str(application.python), "-m", "headrace", *words]
    with subprocess.Popen(argv, cwd=application.folder, env=clean_environment(**environ)) as process:
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)


def test_verbs_started_from_the_application_s_folder_run_our_rooms(application: Application, valkey_url: str) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with (
        started(application, "api", "--port", str(port), REDIS_URL=valkey_url) as api,
        started(application, "worker", "--engine", "instant", "--drain-seconds", "1", REDIS_URL=valkey_url) as worker,
    ):
        until(lambda: workers(url), api, worker)
        code = (
            "import api, headrace.client as c\n"
            f"job = c.Client({url!r}).run('hello', timeout=30, max_tokens=3)\n"
            "print(api.OWNER, job.status, len(job.token_ids))"
        )
        done = application.run("-c", code)

    assert done.stdout.strip() == "the application, api succeeded 3", done.stderr
    assert (api.returncode, worker.returncode) == (0, 0)


def direct_dependencies() -> dict[str, set[str]]:
    """Extra (``base`` for none) to the names in pyproject.toml, without our own extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = {"base": project["dependencies"], **project["optional-dependencies"]}
    return {
        group: {name for one in wanted if (name := re.split(r"[\[<>=~ ]", one)[0]) != "headrace"}
        for group, wanted in groups.items()
    }


def documented_dependencies() -> dict[str, set[str]]:
    """The same, read off the tables of docs/dependencies.md: a heading per extra, a row per package."""
    found: dict[str, set[str]] = {}
    group = ""
    for line in (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            group = line[3:].split()[0].strip("`")
        elif (row := re.match(r"\| `([a-z0-9-]+)` \| (.+) \| (.+) \| ([0-9.]+ [kM]B) \|", line)) is not None:
            found.setdefault(group, set()).add(row[1])
    return found


def test_every_direct_dependency_is_documented_with_reason_licence_and_size() -> None:
    wanted = {group: names for group, names in direct_dependencies().items() if names}

    assert documented_dependencies() == wanted


def test_the_base_install_is_small() -> None:
    assert len(direct_dependencies()["base"]) <= 12
