"""The worker as RQ's own tools see it: registered, heard of, told things. Knows no engine, runs no job.

``rq info``, ``rq suspend``, ``send_stop_job_command``, ``send_shutdown_command`` and dashboards work on what is here.
A job's function name is a label that ``jobs`` looks up; nothing here imports a name that came out of Redis.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rq.command import parse_payload
from rq.serializers import JSONSerializer
from rq.worker import BaseWorker, WorkerStatus

from core.errors import StoreRefuses
from jobs.connection import explained
from jobs.job import QUEUE

log = logging.getLogger("headrace.worker.rq")

POLL_SECONDS = 1.0  #: the command thread looks so often whether it is to end; a message wakes it at once
RECONNECT_SECONDS = 0.5

STATES = {"busy": WorkerStatus.BUSY, "draining": WorkerStatus.BUSY, "idle": WorkerStatus.IDLE}
COUNTS = ("successful_job_count", "failed_job_count", "total_working_time")  #: RQ's names of what a worker has done


@dataclass(frozen=True, slots=True)
class StopCommand:
    """Somebody wants a running job stopped."""

    job_id: str
    attempt: int | None = None  #: only this one; None: whichever runs


class RqWorker(BaseWorker):  # type: ignore[misc]  # rq is not followed by mypy: its annotations are not strict
    """A real RQ worker for registration, heartbeat, state and commands; the loop is ours.

    ``stops`` and ``follows`` are filled by the command thread and emptied by the loop between two steps.
    """

    def __init__(self, name: str, connection: Any, request_stop: Callable[[], None]) -> None:
        """Take a client of its own: the command thread listens on it, the loop beats over it."""
        super().__init__([QUEUE], name=name, connection=connection, serializer=JSONSerializer)
        self.stops: deque[StopCommand] = deque()
        self.follows: deque[str] = deque()  #: jobs that somebody has begun to read along
        self._ask_to_stop = request_stop

    def register(self) -> None:
        """Appear in ``rq info`` and listen for commands.

        Raises:
            StoreUnavailable: to be tried again.
        """
        self._appear()
        if self.pubsub_thread is None:
            with explained():
                self.subscribe()

    def words(self, state: str) -> list[Sequence[Any]]:
        """The Redis commands that say that we live and what we do, and ask whether RQ knows us; for ``hear``."""
        pipeline: Any = self.connection.pipeline(transaction=False)
        self.heartbeat(pipeline=pipeline)
        self.set_state(STATES.get(state, WorkerStatus.SUSPENDED), pipeline=pipeline)
        pipeline.hset(self.key, mapping={name: getattr(self, name) for name in COUNTS})
        pipeline.hexists(self.key, "birth")
        pipeline.sismember(self.redis_workers_keys, self.key)
        return [args for args, _ in pipeline.command_stack]

    def hear(self, answers: Sequence[Any]) -> None:
        """Appear again if we were taken for dead. A full memory refuses RQ's words, and that is no outage: it takes all
        of ours."""
        *_, born, listed = answers
        if not (born and listed):
            self._appear()

    def count(self, succeeded: bool, seconds: float) -> None:
        """Take the end of a job that we worked on for so long."""
        if succeeded:
            self.successful_job_count += 1
        else:
            self.failed_job_count += 1
        self.total_working_time += seconds

    def leave(self) -> None:
        """Disappear from ``rq info`` at once."""
        with explained():
            self.register_death()
            self.unsubscribe()

    def handle_payload(self, message: dict[str, Any]) -> None:
        """Note a command; the loop obeys between two steps. There is no work horse to kill."""
        payload = parse_payload(message)
        command, job_id = payload.get("command"), payload.get("job_id")
        if command == "stop-job" and isinstance(job_id, str):
            self.stops.append(StopCommand(job_id))
        elif command == "stop-execution" and isinstance(job_id, str):
            execution = str(payload.get("execution_id"))
            self.stops.append(StopCommand(job_id, int(execution) if execution.isdecimal() else -1))
        elif command == "follow-job" and isinstance(job_id, str):  # ours, and none of RQ's
            self.follows.append(job_id)
        elif command == "shutdown":
            log.info("told to shut down by RQ's command")
            self._ask_to_stop()
        else:
            log.info("ignored RQ's command %.40r", command)

    def subscribe(self) -> None:
        self.pubsub = self.connection.pubsub()
        self.pubsub.subscribe(**{self.pubsub_channel_name: self.handle_payload})
        self.pubsub_thread = self.pubsub.run_in_thread(POLL_SECONDS, daemon=True, exception_handler=_outlast)

    def unsubscribe(self) -> None:
        if self.pubsub_thread is not None:
            self.pubsub_thread.stop()
            self.pubsub.unsubscribe()  # its reply wakes the thread
            self.pubsub_thread.join(timeout=POLL_SECONDS)

    def _appear(self) -> None:
        """Register with RQ. Where memory is full RQ's tools do not see us until there is room, and jobs go on."""
        try:
            with explained():
                self.connection.delete(self.key)  # RQ refuses a name that is there, and this name is ours alone
                self.register_birth()
                self.set_state(WorkerStatus.STARTED)
        except StoreRefuses as error:
            log.warning("not registered with RQ for now: %s", error)

    def _set_connection(self, connection: Any) -> Any:
        """As given: RQ would raise the time-out of every connection in the pool to seven minutes."""
        return connection


def _outlast(error: Exception, pubsub: Any, thread: Any) -> None:
    """Go on listening after a fault: redis-py connects and subscribes again at the next read."""
    log.warning("listening for RQ's commands failed, trying again: %s", error)
    time.sleep(RECONNECT_SECONDS)
