"""What the API must be able to live without."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

BLOCK = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "numpy"):
            raise ImportError(f"{name} is not installed on an API host")
sys.meta_path.insert(0, Blocker())
import api.app, api.server, api.__main__
print(sorted(name for name in sys.modules if name.split(".")[0] in ("core", "worker", "headrace")))
"""


def test_the_api_imports_where_torch_is_not_installed() -> None:
    done = subprocess.run([sys.executable, "-c", BLOCK], cwd=ROOT, capture_output=True, text=True, timeout=60)

    assert done.returncode == 0, done.stderr
    assert (
        done.stdout.strip()
        == "['core', 'core.bounds', 'core.card', 'core.errors', 'core.params', 'core.request', 'core.structured']"
    )


def test_no_route_runs_in_a_thread() -> None:
    import inspect

    from fastapi.routing import APIRoute

    from api.app import ROUTES

    routes = [route for each in ROUTES for route in each.router.routes if isinstance(route, APIRoute)]
    calls = [route.endpoint for route in routes]
    calls += [needed.call for route in routes for needed in route.dependant.dependencies if needed.call is not None]

    assert len(routes) >= 14
    assert [call.__name__ for call in calls if not inspect.iscoroutinefunction(call)] == []
