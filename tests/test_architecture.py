"""The house rules that a program can check: who imports whom, who reads the environment, what nobody does."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("api", "core", "courier", "headrace", "jobs", "worker")
FILES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py") if "_rooms" not in path.parts)

#: What of the core an API host needs.
SHARED_WORDS = ("core.bounds", "core.card", "core.errors", "core.params", "core.request", "core.structured")

#: Room -> what of ours it may import. A dotted name means that module only.
MAY_IMPORT: Mapping[str, tuple[str, ...]] = {
    "headrace": ("headrace",),
    "api": ("api", "jobs", *SHARED_WORDS),
    "jobs": ("jobs", *SHARED_WORDS),
    "worker": ("worker", "jobs", "core"),
    "courier": ("courier", "jobs", "core.errors"),
    "core": ("core",),
}

#: Package -> where alone it may be imported: a room or a file.
HOME: Mapping[str, tuple[str, ...]] = {
    "redis": ("jobs",),
    "rq": ("jobs", "worker/rq_worker.py"),
    "torch": ("core", "worker/engine_process.py"),  # which sets its threads and picks its card
    **dict.fromkeys(
        ("transformers", "safetensors", "gguf", "numpy", "huggingface_hub", "tokenizers", "llguidance"), ("core",)
    ),
    **dict.fromkeys(("fastapi", "pydantic", "starlette", "uvicorn", "prometheus_client"), ("api",)),
    "vllm": ("core/vllm_engine.py",),
    "httpx2": ("headrace", "courier/post.py"),
    "rich": ("headrace",),
}

#: Importable where nothing is installed.
STANDARD_LIBRARY_ONLY = tuple(
    f"{name.replace('.', '/')}.py" for name in (*SHARED_WORDS, "core.choices", "core.protocol", "core.instant")
)

#: Files that read ``os.environ`` and ``sys.argv``, by name; so does a module that is a program (``python -m …``).
READS_ENVIRONMENT = ("settings.py", "cli.py")
#: Calls that run what they read. The module ``pickle`` may be named for its exception only.
FORBIDDEN_CALLS = (
    *("eval", "exec", "os.system", "os.popen"),
    *("pickle.load", "pickle.loads", "pickle.dump", "pickle.dumps", "pickle.Unpickler", "pickle.Pickler"),
)
PROGRAM = 'if __name__ == "__main__":'


def where(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> Iterator[str]:
    """Every module a file imports, anywhere in it; ``from a import b`` counts as ``a.b`` too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{where(path)}:{node.lineno}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def inside(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def dotted(node: ast.AST) -> str:
    return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def test_each_room_imports_only_the_rooms_below_it() -> None:
    wrong = [
        f"{where(path)} imports {module}"
        for path in FILES
        for module in imports(path)
        if module.partition(".")[0] in ROOMS
        and not any(inside(module, allowed) for allowed in MAY_IMPORT[path.relative_to(ROOT).parts[0]])
    ]
    assert wrong == []


def test_each_big_dependency_stays_in_its_room() -> None:
    wrong = [
        f"{where(path)} imports {module}"
        for path in FILES
        for module in imports(path)
        if (homes := HOME.get(module.partition(".")[0])) is not None
        and not any(where(path) == home or where(path).startswith(f"{home}/") for home in homes)
    ]
    assert wrong == []


def test_the_shared_words_need_the_standard_library_only() -> None:
    wrong = [
        f"{name} imports {module}"
        for name in STANDARD_LIBRARY_ONLY
        for module in imports(ROOT / name)
        if module.partition(".")[0] not in sys.stdlib_module_names
        and not any(inside(module, file.removesuffix(".py").replace("/", ".")) for file in STANDARD_LIBRARY_ONLY)
    ]
    assert wrong == []


def reached(first: Path) -> set[Path]:
    """The files that one imports, and those that they import, itself included."""
    found, left = set[Path](), [first]
    while left:
        path = left.pop()
        found.add(path)
        names = {ROOT / f"{module.replace('.', '/')}.py" for module in imports(path)}
        left += [other for other in names & set(FILES) if other not in found]
    return found


def test_no_engine_knows_that_there_are_others() -> None:
    files = {name: ROOT / "core" / f"{name}.py" for name in ("engine", "instant", "vllm_engine")}
    others = {name: {files[other] for other in files if other != name} for name in files}

    assert [name for name in files if reached(files[name]) & others[name]] == []
    words = [
        f"{where(path)}:{node.lineno} {node.value}"
        for path in reached(files["engine"])
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value in ("vllm", "instant")
    ]
    assert words == []


def test_the_face_needs_httpx2_and_rich_only() -> None:
    known = {*sys.stdlib_module_names, "headrace", "httpx2", "rich"}
    others = {
        module.partition(".")[0] for path in FILES if where(path).startswith("headrace/") for module in imports(path)
    }

    assert others <= known


def test_only_programs_and_settings_read_the_environment_and_the_command_line() -> None:
    wrong = [
        f"{where(path)}:{node.lineno} {dotted(node)}"
        for path in FILES
        if path.name not in READS_ENVIRONMENT and PROGRAM not in path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and dotted(node) in ("os.environ", "os.getenv", "sys.argv")
    ]
    assert wrong == []


def test_nothing_is_pickled_and_no_shell_is_started() -> None:
    wrong = []
    for path in FILES:
        for module in imports(path):
            if module.partition(".")[0] in ("cloudpickle", "dill", "marshal", "shelve") or module in FORBIDDEN_CALLS:
                wrong.append(f"{where(path)} imports {module}")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                shell = any(word.arg == "shell" and ast.unparse(word.value) != "False" for word in node.keywords)
                if shell or dotted(node.func) in FORBIDDEN_CALLS:
                    wrong.append(f"{where(path)}:{node.lineno} {ast.unparse(node)}")
    assert wrong == []


def test_every_module_says_in_its_first_line_what_it_knows() -> None:
    assert [where(path) for path in FILES if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))] == []


def test_an_init_is_a_docstring() -> None:
    full = [p for p in FILES if p.name == "__init__.py" and len(ast.parse(p.read_text(encoding="utf-8")).body) != 1]

    assert full == []


def test_files_and_functions_stay_short() -> None:
    long = [where(path) for path in FILES if len(path.read_text(encoding="utf-8").splitlines()) > 300]
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                given = [one.arg for one in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                names = [name for name in given if name not in ("self", "cls")]
                if lines > 60 or len(names) > 6:
                    long.append(f"{where(path)}:{node.name} has {lines} lines and {len(names)} parameters")
    assert long == []


def test_a_room_catches_everything_in_one_place_at_most() -> None:
    broad: dict[str, list[str]] = {}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ExceptHandler):
                caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
                if any(one is None or dotted(one) in ("Exception", "BaseException") for one in caught):
                    broad.setdefault(where(path).partition("/")[0], []).append(f"{where(path)}:{node.lineno}")

    assert {room: places for room, places in broad.items() if len(places) > 1} == {}


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("api.app", ("torch", "transformers")),
        ("core.instant", ("torch", "transformers", "redis", "rq", "pydantic")),
        ("courier.rounds", ("torch", "fastapi", "pydantic", "api", "worker", "headrace")),
        ("headrace.cli", ("torch", "redis", "rq", "fastapi", "api", "jobs", "worker", "core")),
        ("headrace.client", ("torch", "redis", "rq", "fastapi", "api", "jobs", "worker", "core")),
    ],
)
def test_a_room_can_be_imported_where_others_are_not_installed(module: str, absent: tuple[str, ...]) -> None:
    code = f"import sys; sys.modules.update(dict.fromkeys({absent!r})); import {module}"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )

    assert done.returncode == 0, done.stderr
