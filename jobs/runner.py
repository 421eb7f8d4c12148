"""Sends commands and reads answers: once with a blocking client, once with asyncio. Knows no job.

Scripts are sent by their hash. A server that does not know them (it was restarted, or flushed) is given all of them,
and the commands it could not run are sent again, in their order, with their texts: it may be flushed again meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import redis
import redis.asyncio
from redis.exceptions import NoScriptError

from jobs.connection import explain, explained
from jobs.line import BlockingLine, Line
from jobs.pulse import Pulse
from jobs.scripting import Command, scripts

T = TypeVar("T")


class Runner:
    """Runs commands over one blocking client.

    ``keep_seconds`` goes with every script: how long jobs are kept that do not say so themselves.
    """

    def __init__(self, client: redis.Redis, keep_seconds: int) -> None:
        self.client = client
        self._line = BlockingLine(client)
        self._keep = keep_seconds

    def run(self, command: Command[T]) -> T:
        """Run one command.

        Raises:
            StoreError: Redis' fault; and whatever the command's decoding raises.
        """
        [answer] = self.answers([command])
        return command.decode(answer)

    def answers(self, commands: Sequence[Command[Any]], tail: Sequence[Any] = ()) -> list[Any]:
        """Run commands in one round trip; their raw answers, and that of the bare Redis command ``tail`` if given.

        Raises:
            StoreError: the first fault; commands behind it may have run.
        """
        with explained():
            return _checked(self._loaded_answers(commands, tail))

    def run_with(self, command: Command[T], others: Sequence[Sequence[Any]]) -> tuple[T, list[Any]]:
        """Run one command, and bare Redis commands behind it in the same round trip; an error of theirs is an answer.

        Raises:
            StoreError: Redis' fault, be it one command's own; and whatever the command's decoding raises.
        """
        bare = [Command(words[0], words[1:], _same) for words in others]
        with explained():
            answer, *rest = self._loaded_answers([command, *bare], ())
            [answer] = _checked([answer])
        return command.decode(answer), rest

    def load(self) -> None:
        """Give the server all scripts."""
        _checked(self._line.ask([("SCRIPT", "LOAD", script.text) for script in scripts().values()]))

    def close(self) -> None:
        self._line.close()
        self.client.close()

    def _loaded_answers(self, commands: Sequence[Command[Any]], tail: Sequence[Any]) -> list[Any]:
        """With errors in their places; scripts that the server lost are loaded and called again."""
        answers = self._send(commands, tail)
        missing = [i for i, answer in enumerate(answers) if isinstance(answer, NoScriptError)]
        if missing:
            self.load()
            again = self._send([commands[i] for i in missing], tail, whole=True)
            _fill(answers, missing, again, bool(tail))
        return answers

    def _send(self, commands: Sequence[Command[Any]], tail: Sequence[Any], *, whole: bool = False) -> list[Any]:
        words = [_words(command, self._keep, whole=whole) for command in commands]
        return self._line.ask([*words, tail] if tail else words)


class AsyncRunner:
    """Runs commands over one asyncio client, each only as long as the server's pulse beats; otherwise as ``Runner``."""

    def __init__(self, client: redis.asyncio.Redis, keep_seconds: int, pulse: Pulse) -> None:
        self.client = client
        self._line = Line(client)
        self._keep = keep_seconds
        self._pulse = pulse

    async def run(self, command: Command[T]) -> T:
        """Run one command.

        Raises:
            StoreError: Redis' fault; and whatever the command's decoding raises.
        """
        [answer] = await self.answers([command])
        return command.decode(answer)

    async def answers(self, commands: Sequence[Command[Any]], tail: Sequence[Any] = ()) -> list[Any]:
        """Run commands in one round trip; their raw answers, and that of the bare Redis command ``tail`` if given.

        Raises:
            StoreError: the first fault; commands behind it may have run.
        """
        try:
            async with self._pulse.beating():
                return await self._answers(commands, tail)
        except (redis.RedisError, OSError) as error:
            raise explain(error) from error

    async def load(self) -> None:
        """Give the server all scripts."""
        _checked(await self._line.ask([("SCRIPT", "LOAD", script.text) for script in scripts().values()]))

    async def close(self) -> None:
        await self._line.close()
        await self.client.aclose()

    async def _answers(self, commands: Sequence[Command[Any]], tail: Sequence[Any]) -> list[Any]:
        answers = await self._send(commands, tail)
        missing = [i for i, answer in enumerate(answers) if isinstance(answer, NoScriptError)]
        if missing:
            await self.load()
            again = await self._send([commands[i] for i in missing], tail, whole=True)
            _fill(answers, missing, again, bool(tail))
        return _checked(answers)

    async def _send(self, commands: Sequence[Command[Any]], tail: Sequence[Any], *, whole: bool = False) -> list[Any]:
        words = [_words(command, self._keep, whole=whole) for command in commands]
        return await self._line.ask([*words, tail] if tail else words)


def _same(answer: Any) -> Any:
    return answer


def _words(command: Command[Any], keep_seconds: int, *, whole: bool = False) -> list[Any]:
    """The command as it is sent; ``whole``: with the script's text."""
    if command.name.isupper():
        return [command.name, *command.args]
    script = scripts()[command.name]
    called = ["EVAL", script.text] if whole else ["EVALSHA", script.sha]
    return [*called, 0, keep_seconds, *command.args]


def _fill(answers: list[Any], missing: Sequence[int], again: Sequence[Any], with_tail: bool) -> None:
    """Put the answers of a second try in their places; the tail's second answer is the one that counts."""
    for place, answer in zip(missing, again, strict=False):
        answers[place] = answer
    if with_tail:
        answers[-1] = again[-1]


def _checked(answers: list[Any]) -> list[Any]:
    for answer in answers:
        if isinstance(answer, Exception):
            raise answer
    return answers
