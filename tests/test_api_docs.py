"""``docs/api.md`` lists what there is."""

from __future__ import annotations

import re
from pathlib import Path

from fastapi.routing import APIRoute

from api import errors as ours
from api.app import ANSWERS, ENDED, ROUTES
from core import errors
from core.errors import HeadraceError
from jobs.job import RQ_STATUS

PAGE = (Path(__file__).parent.parent / "docs" / "api.md").read_text(encoding="utf-8")

#: Codes of classes that stand for their leaves, and one that always carries the job's own code.
NEVER_SENT = {"job_error", "job_not_succeeded"}


def test_every_route_is_on_the_page_with_an_example() -> None:
    routes = [route for each in ROUTES for route in each.router.routes if isinstance(route, APIRoute)]
    for path in {route.path for route in routes}:
        example = path.replace("{job_id}", "order-17")

        assert path.replace("{job_id}", "{id}") in PAGE
        assert re.search(rf"curl .*127\.0\.0\.1:8000{re.escape(example)}\b", PAGE), path


def test_every_error_code_is_in_the_row_of_its_status() -> None:
    rows = {
        int(row[1]): set(re.findall(r"`([a-z_]+)`", row[2])) for row in re.finditer(r"\| (\d{3}) \| ([^|]+) \|", PAGE)
    }
    known = [value for module in (errors, ours) for value in vars(module).values() if isinstance(value, type)]
    for cls in known:
        if issubclass(cls, HeadraceError) and cls.code not in NEVER_SENT:
            status = next(ANSWERS[base] for base in cls.__mro__ if base in ANSWERS).status
            assert cls.code in rows[status], f"{cls.code} is missing at {status}"
    assert all(code in PAGE for code in ENDED)


def test_every_state_is_mapped() -> None:
    for state, rqs in RQ_STATUS.items():
        assert re.search(rf"^\| `{state.value}` \| `{rqs}`", PAGE, re.MULTILINE), state
