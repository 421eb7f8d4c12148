"""The scripts' clock in words, on any day."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta

import pytest
import redis

from jobs import scripting


@pytest.mark.parametrize("seed", range(3))
def test_a_stamp_is_what_rq_writes_on_any_day(valkey: redis.Redis, seed: int) -> None:
    text = scripting.scripts()["get"].text
    shared = text[text.index("local K=") : text.index("local function state_of")]
    script = valkey.register_script(shared.replace("call('TIME')", "{ARGV[2], ARGV[3]}") + "return stamp()")
    first, pick = datetime(2000, 2, 27, tzinfo=UTC), random.Random(seed)
    for day in [*range(4), 365, *(pick.randrange(36_600) for _ in range(300))]:
        moment = first + timedelta(days=day, seconds=pick.randrange(86_400), microseconds=pick.randrange(1_000_000))
        told = script(args=[1, int(moment.timestamp()), moment.microsecond])

        assert told == moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ").encode()
