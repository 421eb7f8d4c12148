"""Settings: where a value comes from, and what happens to one that cannot be."""

from __future__ import annotations

import dataclasses
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from headrace.layers import load
from headrace.rooms import environment
from headrace.settings import RULES, SettingError, Settings


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No ./headrace.toml but the test's own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def headrace(*words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Type a command, with nothing of ours in the environment."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HEADRACE_", "REDIS_URL"))}
    argv = [sys.executable, "-m", "headrace", *words]
    return subprocess.run(argv, env={**clean, **environ}, capture_output=True, text=True, timeout=60, check=False)


def test_a_flag_wins_over_the_environment_and_that_over_the_file(empty_folder: Path) -> None:
    (empty_folder / "headrace.toml").write_text("port = 1\nworkers = 2\nmodel = 'a'\n")
    settings = load({"port": "3"}, {"HEADRACE_PORT": "2", "HEADRACE_WORKERS": "4"})

    assert (settings.port, settings.workers, settings.model) == (3, 4, "a")
    assert settings.host == "127.0.0.1"


def test_a_config_file_that_was_named_replaces_the_one_in_the_folder(empty_folder: Path) -> None:
    (empty_folder / "headrace.toml").write_text("port = 1\n")
    (empty_folder / "other.toml").write_text("workers = 3\n")
    settings = load({}, {}, empty_folder / "other.toml")

    assert (settings.port, settings.workers) == (8000, 3)
    with pytest.raises(SettingError, match=r"none\.toml cannot be read"):
        load({}, {}, empty_folder / "none.toml")


def test_redis_url_and_hf_token_are_honoured_under_their_usual_names() -> None:
    usual = {"REDIS_URL": "redis://a", "HF_TOKEN": "t"}

    assert load({}, usual).redis_url == "redis://a"
    assert load({}, usual).hf_token == "t"
    assert load({}, {**usual, "HEADRACE_REDIS_URL": "redis://b"}).redis_url == "redis://b"


@pytest.mark.parametrize(
    ("environ", "text", "said"),
    [
        ({"HEADRACE_PROT": "1"}, "", "HEADRACE_PROT: no such setting; did you mean 'HEADRACE_PORT'?"),
        ({}, "prot = 1", "headrace.toml: no such setting: prot; did you mean 'port'?"),
        ({"HEADRACE_PORT": "many"}, "", "HEADRACE_PORT: port must be a whole number, not 'many'"),
        ({"HEADRACE_PORT": "70000"}, "", "HEADRACE_PORT: port must be from 0 to 65535, not 70000"),
        (
            {"HEADRACE_LEASE_SECONDS": "nan"},
            "",
            "HEADRACE_LEASE_SECONDS: lease_seconds must be from 0.1 to 3600, not nan",
        ),
        (
            {"HEADRACE_PUBLISH_SECONDS": "-0.01"},
            "",
            "HEADRACE_PUBLISH_SECONDS: publish_seconds must be from 0 to 60, not -0.01",
        ),
        ({}, "publish_seconds = 61", "headrace.toml: publish_seconds: publish_seconds must be from 0 to 60, not 61"),
        ({}, "workers = 1.5", "headrace.toml: workers: workers must be a whole number, not 1.5"),
        ({}, "workers = true", "headrace.toml: workers: workers must be a whole number, not True"),
        ({}, "model = 7", "headrace.toml: model: model must be text, not 7"),
        (
            {"HEADRACE_DTYPE": "float64"},
            "",
            "HEADRACE_DTYPE: dtype must be one of auto, float32, bfloat16, int8, not 'float64'",
        ),
        ({"HEADRACE_KV_MEMORY": "lots"}, "", "HEADRACE_KV_MEMORY: kv_memory must be auto or a size such as 2GiB"),
        ({}, "port = ", "headrace.toml cannot be read"),
    ],
)
def test_what_cannot_be_is_refused_with_its_name_and_origin(
    empty_folder: Path, environ: dict[str, str], text: str, said: str
) -> None:
    (empty_folder / "headrace.toml").write_text(text)

    with pytest.raises(SettingError) as refused:
        load({}, environ)
    assert str(refused.value).startswith(said)


def test_a_refused_address_does_not_show_its_password() -> None:
    with pytest.raises(SettingError) as refused:
        load({}, {"REDIS_URL": "http://:hunter2@host"})

    assert "REDIS_URL" in str(refused.value)
    assert "hunter2" not in str(refused.value)
    assert "hunter2" not in str(Settings(redis_url="redis://:hunter2@host:1/0").to_public())
    assert "hunter2" not in str(Settings(redis_url="unix:///a?password=hunter2").to_public())
    assert "hunter2" not in str(Settings(webhook_secret="hunter2", api_key="hunter2").to_public())


def test_a_room_is_handed_every_setting_and_nothing_stale() -> None:
    inherited = {"HEADRACE_PORT": "1", "HEADRACE_CACHE": "/c", "PATH": "/bin", "PYTHONPATH": "/app"}
    handed = environment(Settings(port=9, lease_seconds=0.5, hf_token="t"), inherited, worker_index="3")

    assert (handed["HEADRACE_PORT"], handed["HEADRACE_LEASE_SECONDS"], handed["HEADRACE_WORKER_INDEX"]) == (
        "9",
        "0.5",
        "3",
    )
    assert (handed["HEADRACE_CACHE"], handed["PATH"], handed["HF_TOKEN"]) == ("/c", "/bin", "t")
    assert handed["PYTHONPATH"].endswith(os.pathsep + "/app")
    assert load({}, handed) == Settings(port=9, lease_seconds=0.5, hf_token="t", worker_index=3)


def test_every_setting_of_a_room_is_one_of_headrace_with_the_same_default() -> None:
    from api.settings import ApiSettings
    from courier.settings import CourierSettings
    from worker.settings import WorkerSettings

    for room in (ApiSettings, CourierSettings, WorkerSettings):
        for field in dataclasses.fields(room):
            assert field.name in RULES, f"{room.__name__}.{field.name} cannot be set"
            assert getattr(Settings(), field.name) == field.default, field.name


def test_an_open_door_is_refused_before_anything_starts(empty_folder: Path) -> None:
    done = headrace("up", "--host", "0.0.0.0", "--port", "0", "--data-dir", "queue")

    assert done.returncode == 2
    assert "no API key is set" in done.stderr
    assert not (empty_folder / "queue").exists()


def test_an_empty_key_file_is_no_key(empty_folder: Path) -> None:
    (empty_folder / "key").touch()
    done = headrace("up", "--host", "0.0.0.0", "--port", "0", "--api-key-file", "key")

    assert done.returncode == 2
    assert "key is empty" in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["upp"], "no such verb: upp; did you mean 'up'?"),
        (["up", "--prot", "1"], "did you mean '--port'?"),
        (["up", "--port", "many"], "--port: port must be a whole number, not 'many'"),
        (["api"], "headrace api needs a Redis"),
        (["worker"], "headrace worker needs a Redis"),
        (["courier"], "headrace courier needs a Redis"),
        (["submit"], "exactly one of PROMPT, --messages and --file"),
        (["submit", "--messages", "[oops"], "--messages: not JSON"),
        (["submit", "--file", "none.txt"], "none.txt cannot be read"),
        (["wait"], "required: ID"),
    ],
)
def test_a_mistake_on_the_command_line_exits_2_and_says_what_is_wrong(words: list[str], said: str) -> None:
    done = headrace(*words)

    assert done.returncode == 2
    assert said in done.stderr
    assert done.stdout == ""


def test_every_verb_has_help_with_an_example_json_and_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    from headrace.cli import EXIT_CODES, VERBS, main

    for verb in VERBS:
        with pytest.raises(SystemExit) as left:
            main([verb, "--help"])
        shown = capsys.readouterr().out

        assert left.value.code == 0
        assert f"example: {VERBS[verb].example}" in shown
        assert f"headrace {verb}" in VERBS[verb].example
        assert "--json" in shown
        assert EXIT_CODES in shown


def test_the_data_folder_and_its_secrets_are_private(empty_folder: Path) -> None:
    from headrace.embedded import DataFolder

    folder = DataFolder.open(empty_folder / "queue")
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.path.iterdir()}

    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    assert (modes["valkey.password"], modes["redis-url"]) == (0o600, 0o600)
    assert len(folder.password) == 64
    assert folder.password in (folder.path / "redis-url").read_text()
    folder.close()
    again = DataFolder.open(empty_folder / "queue")
    again.close()
    assert again.password == folder.password
