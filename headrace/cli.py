"""The ``headrace`` command: verbs, settings, exit codes. Each verb's own work is in ``headrace.verbs``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from headrace.errors import ClientError, InvalidRequest, JobFailed, ServerRefused, TimedOut
from headrace.layers import load, suggest
from headrace.settings import SettingError
from headrace.supervise import PermanentFailure
from headrace.verbs import ask, bench, dead, doctor, follow, prepare, serve, show
from headrace.verbs.verb import FAILED, OK, TIMED_OUT, UNREACHABLE, USAGE, Invocation, Verb

VERBS: Mapping[str, Verb] = {
    verb.name: verb
    for verb in (
        *(serve.UP, serve.API, serve.WORKER, serve.COURIER),
        *(ask.RUN, ask.SUBMIT),
        *(follow.STATUS, follow.WAIT, follow.CANCEL, follow.RETRY),
        *(follow.RESEND, follow.LIST, follow.MODELS, follow.WORKERS),
        *(dead.DEAD, doctor.DOCTOR, bench.BENCH),
        *(show.DEMO, prepare.INIT, show.VERSION),
    )
}
EXIT_CODES = "exit codes: 0 ok, 1 the job failed, 2 usage, 3 unreachable, 5 timed out"
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Do what was typed; the exit code says how it went."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(words)
    except (SettingError, ClientError, PermanentFailure) as error:
        _complain(error, as_json="--json" in words)
        return exit_code(error)
    except BrokenPipeError:  # the reader of our output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except KeyboardInterrupt:
        return INTERRUPTED


def exit_code(error: Exception) -> int:
    """The stable code for an error."""
    if isinstance(error, JobFailed):
        return FAILED
    if isinstance(error, TimedOut):
        return TIMED_OUT
    if isinstance(error, SettingError | PermanentFailure | InvalidRequest):
        return USAGE
    if isinstance(error, ServerRefused) and error.status < 429:
        return USAGE  # a wrong id, a wrong key, a state that does not allow it
    return UNREACHABLE


def _run(words: Sequence[str]) -> int:
    parser, parsers = _parsers()
    if words and not words[0].startswith("-") and words[0] not in VERBS:
        parser.error(f"no such verb: {words[0]}{suggest(words[0], VERBS)}")
    arguments, unknown = parser.parse_known_args(words)
    if arguments.verb is None:
        parser.print_help()
        return USAGE
    verb, own = VERBS[arguments.verb], parsers[arguments.verb]
    if unknown:
        own.error(f"unknown: {' '.join(unknown)}{suggest(unknown[0].split('=')[0], own.flags)}")
    config = Path(arguments.config) if arguments.config else None
    settings = load(verb.flags_given(arguments), os.environ, config)
    return verb.run(Invocation(arguments=arguments, settings=settings, environ=os.environ))


class _Parser(argparse.ArgumentParser):
    """Knows its flags, for suggestions; never guesses from the beginning of one."""

    @property
    def flags(self) -> list[str]:
        return list(self._option_string_actions)

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"{self.prog}: {message}\n{self.prog} --help shows an example\n")


def _parsers() -> tuple[_Parser, Mapping[str, _Parser]]:
    parser = _Parser(
        prog="headrace",
        description="Durable, batched inference for language models.",
        epilog=f"{EXIT_CODES}\n\nexample: headrace up",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    places = parser.add_subparsers(dest="verb", metavar="VERB", parser_class=_Parser)
    parsers = {}
    for verb in VERBS.values():
        parsers[verb.name] = own = places.add_parser(
            verb.name,
            help=verb.text,
            description=verb.text,
            epilog=f"example: {verb.example}\n\n{EXIT_CODES}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        verb.build(own)
    return parser, parsers


def _complain(error: Exception, *, as_json: bool) -> None:
    if as_json:
        code = getattr(error, "code", type(error).__name__)
        facts = {"message": str(error), "code": str(code), "param": getattr(error, "param", None)}
        print(json.dumps({"error": facts}, ensure_ascii=False), file=sys.stderr)
    else:
        print(f"headrace: {error}", file=sys.stderr)
