"""What a callback says and how it is signed: the text of Standard Webhooks 1.0.0 is the oracle."""

from __future__ import annotations

import base64
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from courier.settings import CourierSettings
from courier.signing import body, headers, read_secrets
from jobs.outbox import Callback
from tests.courier_world import KEY, SECRET

CALLBACK = Callback(
    id="evt_1",
    attempt=1,
    tries=1,
    job_id="job_1",
    url="https://a.example/",
    type="job.succeeded",
    ended_at=1_790_000_000,
)


def test_a_signature_is_that_of_the_reference_libraries() -> None:
    keys = read_secrets("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    signed = headers("msg_p5jXN8AQM9LWM0D4loKWxJek", 1_614_265_330, b'{"test": 2432232314}', keys)

    assert signed == {
        "webhook-id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
        "webhook-timestamp": "1614265330",
        "webhook-signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
    }


def test_every_secret_signs_so_that_a_receiver_may_change_from_one_to_the_next() -> None:
    other = bytes(24)
    both = read_secrets(f"{SECRET}\n whsec_{base64.b64encode(other).decode()}")
    signatures = headers("evt_1", 1, b"{}", both)["webhook-signature"].split(" ")

    assert both == (KEY, other)
    assert signatures == [headers("evt_1", 1, b"{}", [key])["webhook-signature"] for key in both]


def test_the_body_is_thin_and_says_which_job_ended_and_how() -> None:
    assert json.loads(body(CALLBACK)) == {
        "id": "evt_1",
        "object": "event",
        "created_at": 1_790_000_000,
        "type": "job.succeeded",
        "data": {"id": "job_1"},
    }


@pytest.mark.parametrize("size", [23, 65])
def test_a_secret_that_is_too_short_or_too_long_is_refused_and_not_shown(size: int) -> None:
    secret = f"whsec_{base64.b64encode(bytes(size)).decode()}"
    for text in (secret, secret.removeprefix("whsec_"), "whsec_not base64!", f"{SECRET} {secret}", ""):
        with pytest.raises(ValueError, match="webhook_secret: ") as refused:
            read_secrets(text)
        assert not set(text.split()) & set(str(refused.value).split())


def test_the_secret_may_be_in_a_file_and_is_in_no_text_of_the_settings(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(f"{SECRET}\n")
    settings = CourierSettings(webhook_hosts="a.example", webhook_secret_file=str(tmp_path / "secret"))

    assert settings.read_secrets() == (KEY,)
    assert SECRET not in repr(CourierSettings(webhook_hosts="a.example", webhook_secret=SECRET))
    with pytest.raises(ValueError, match=r"webhook_secret_file: .*cannot be read"):
        CourierSettings(webhook_hosts="a.example", webhook_secret_file=str(tmp_path / "none")).read_secrets()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"webhook_hosts": ""}, "webhook_hosts: must list"),
        ({"webhook_hosts": "https://a.example/path"}, "webhook_hosts: must list"),
        ({"webhook_private_hosts": "user@a.example"}, "webhook_private_hosts: must list"),
        ({"webhook_retry_seconds": "1,two"}, "webhook_retry_seconds: must be seconds"),
        ({"webhook_retry_seconds": "1,-2"}, "webhook_retry_seconds: must be"),
        ({"webhook_timeout_seconds": 0}, "webhook_timeout_seconds: must be from"),
        ({"log_level": "loud"}, "log_level: must be one of"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_by_name(changes: dict[str, str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        CourierSettings(**{"webhook_hosts": "a.example", **changes})  # type: ignore[arg-type]


def test_the_page_s_own_verifier_accepts_what_we_sign_and_nothing_else() -> None:
    page = (Path(__file__).parent.parent / "docs" / "webhooks.md").read_text(encoding="utf-8")
    [example] = re.findall(r"```python\n(.*?)```", page, flags=re.S)
    names: dict[str, Any] = {}
    exec(example, names)
    content, now = body(CALLBACK), int(time.time())

    assert names["verify"](SECRET, headers("evt_1", now, content, [bytes(24), KEY]), content)["data"] == {"id": "job_1"}
    for wrong in (
        (SECRET, headers("evt_1", now, content, [bytes(24)]), content),
        (SECRET, headers("evt_1", now - 301, content, [KEY]), content),
        (SECRET, {**headers("evt_1", now, content, [KEY]), "webhook-id": "evt_2"}, content),
        (SECRET, headers("evt_1", now, content, [KEY]), content + b" "),
    ):
        with pytest.raises(ValueError, match=r"not signed by us|too old"):
            names["verify"](*wrong)
