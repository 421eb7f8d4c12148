"""What the API's settings refuse."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from api.settings import ApiSettings

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "example.org"])
def test_an_address_that_others_reach_is_refused_without_a_key(host: str) -> None:
    with pytest.raises(ValueError, match="api_key_file"):
        ApiSettings(host=host)

    assert ApiSettings(host=host, api_key="k").read_key() == "k"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "[::1]", "localhost"])
def test_loopback_is_open_without_a_key(host: str) -> None:
    assert ApiSettings(host=host).read_key() == ""


def test_binding_every_address_without_a_key_exits_2_and_says_why() -> None:
    environment = {**os.environ, "HEADRACE_HOST": "0.0.0.0", "HEADRACE_REDIS_URL": "redis://127.0.0.1:1"}
    ended = subprocess.run(
        [sys.executable, "-m", "api"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )

    assert ended.returncode == 2
    assert "api_key_file" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_the_key_is_read_from_its_file(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("sk_secret\n")

    assert ApiSettings(host="0.0.0.0", api_key_file=str(path)).read_key() == "sk_secret"


@pytest.mark.parametrize("content", ["", "two words", "kéy", "a\nb"])
def test_a_key_that_no_header_can_carry_is_refused_without_showing_it(tmp_path: Path, content: str) -> None:
    path = tmp_path / "key"
    path.write_text(content)

    with pytest.raises(ValueError, match="visible ASCII") as caught:
        ApiSettings(api_key_file=str(path)).read_key()

    assert not content or content not in str(caught.value)


def test_a_missing_key_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere"):
        ApiSettings(api_key_file=str(tmp_path / "nowhere")).read_key()


def test_the_key_is_in_no_repr() -> None:
    assert "sk_secret" not in repr(ApiSettings(api_key="sk_secret"))


@pytest.mark.parametrize(
    ("name", "value"),
    [("port", 70_000), ("max_wait_seconds", -1), ("max_streams", 0), ("log_level", "loud"), ("durability", "maybe")],
)
def test_a_value_out_of_its_bound_is_named(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=name):
        ApiSettings(**{name: value})  # type: ignore[arg-type]
