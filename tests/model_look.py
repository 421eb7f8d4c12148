"""How the model test sees the house: all of it at one moment, and closely the jobs that do not look as they did."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from core.bounds import Wire
from jobs import audit, commands, keys, scripting
from jobs.logs import read_log
from jobs.runner import _words
from jobs.scripting import Command
from jobs.store import Store
from tests.model_judge import Kept, View

KEEP = 86_400  #: of the jobs that do not say, in seconds

#: What is beside the jobs, and for each job a text that is another one whenever anything about it is. ARGV: ids.
GLANCE = """
local call, found = redis.call, {}
for _, id in ipairs(ARGV) do
  local key = K.job .. id
  found[id] = {table.concat(call('HGETALL', key), ' '), call('TTL', key) < 0 and 1 or 0, call('XLEN', K.events .. id),
    call('PTTL', K.events .. id) < 0 and 1 or 0, call('XLEN', K.results .. id),
    call('TTL', K.results .. id) < 0 and 1 or 0}
end
local function note(members, where)
  for _, member in ipairs(members) do
    local marks = found[string.match(member, '^(.*):') or member]
    if marks then marks[#marks + 1] = where end
  end
end
for _, name in ipairs({'wip', 'scheduled', 'deferred', 'finished', 'failed', 'canceled', 'retention', 'deadlines',
  'waits', 'dead'}) do note(call('ZRANGE', K[name], 0, -1), name) end
for _, kind in ipairs({'generate:', 'predict:'}) do
  for _, state in ipairs({'queued', 'running', 'succeeded', 'failed', 'cancelled', 'expired'}) do
    local members = call('ZRANGE', K.index .. kind .. state, 0, -1, 'WITHSCORES')
    for i = 1, #members, 2 do note({members[i]}, kind .. state .. members[i + 1]) end
  end
end
note(call('SMEMBERS', K.unpacked), 'unpacked')
for _, key in ipairs(call('KEYS', K.execution .. '*')) do note({string.sub(key, #K.execution + 1)}, 'execution') end
local house = {leases = call('ZRANGE', K.leases, 0, -1), marks = call('ZRANGE', K.marks, 0, -1),
  cards = call('KEYS', K.card .. '*'), lists = {}, held = {}}
local lists, seen = {K.suspects, K.urgent, K.ready, K.low, unpack(call('SMEMBERS', K.queues))}, {}
for _, key in ipairs(lists) do
  if not seen[key] then
    house.lists[#house.lists + 1], seen[key] = {key, call('LRANGE', key, 0, -1)}, true
    note(house.lists[#house.lists][2], key)
  end
end
for i, key in ipairs(call('KEYS', K.held .. '*')) do
  house.held[i] = {key, call('SMEMBERS', key)}
  note(house.held[i][2], key)
end
house.tickets, house.passed, house.callbacks, house.outbox = 0, 0, {}, call('ZRANGE', K.outbox, 0, -1)
for _, class in ipairs({'', ':urgent', ':low'}) do
  house.tickets = house.tickets + (call('GET', K.tickets .. class) or 0)
  house.passed = house.passed + (call('GET', K.passed .. class) or 0)
end
for i, key in ipairs(call('KEYS', K.callback .. '*')) do
  house.callbacks[i] = {key, call('HGETALL', key), call('TTL', key) < 0 and 0 or 1}
  note({call('HGET', key, 'job')}, key .. call('HGET', key, 'state'))
end
house.ended, house.counts_stay, house.wakes = 0, false, {}
for _, key in ipairs(call('KEYS', K.rate .. '*')) do
  house.ended = house.ended + call('GET', key)
  house.counts_stay = house.counts_stay or call('TTL', key) < 0
end
for i, key in ipairs(call('KEYS', K.wake .. '*')) do house.wakes[i] = {key, call('LLEN', key)} end
local texts = {}
for i, id in ipairs(ARGV) do texts[i] = table.concat(found[id], ' ') end
return {cjson.encode(house), texts}
"""
#: One job's hash, and what is kept beside it, and how long. ARGV: id.
STARE = """
local call, id = redis.call, ARGV[1]
local place = call('HMGET', K.job .. id, 'kind', 'place')
local clock = call('TIME')
return {call('HGETALL', K.job .. id), clock[1] * 1000 + math.floor(clock[2] / 1000), call('TTL', K.job .. id),
  call('TTL', K.results .. id), call('PTTL', K.events .. id), call('ZSCORE', K.retention, id) or '0',
  place[2] and call('ZSCORE', K.index .. (place[1] or 'generate') .. ':' .. place[2], id) or '0',
  call('ZRANGE', K.executions .. id, 0, -1)}
"""


@dataclass(frozen=True, slots=True)
class House:
    """What is beside the jobs."""

    lists: Mapping[str, Sequence[str]]  #: key -> ids
    held: Mapping[str, Sequence[str]]  #: key -> id:attempt
    leases: Sequence[str]
    marks: Sequence[str]
    cards: Sequence[str]
    tickets: int  #: given out
    passed: int  #: by the estimate
    ended: int  #: jobs that count for the speed
    counts_stay: bool  #: such a count is kept for ever
    wakes: Mapping[str, int]  #: tokens for whom an empty worker waits
    callbacks: Sequence[tuple[str, Sequence[str], int]]  #: key, names and values, whether Redis will forget it
    outbox: Sequence[str]


class Eye:
    """Looks at a house."""

    def __init__(self, store: Store) -> None:
        self._store, self._client = store, store.connection
        self._seen: dict[str, tuple[bytes, View]] = {}
        names = f"local K={scripting._table(keys.table())} "
        self._glance, self._stare = (str(self._client.script_load(names + text)) for text in (GLANCE, STARE))

    def look(self, ids: Sequence[str]) -> tuple[dict[str, View], House]:
        """Those of the jobs that are there, in this order, and the house."""
        answer, texts = self._client.execute_command("EVALSHA", self._glance, 0, *ids)
        house = _house(json.loads(answer))
        changed = [i for i, job_id in enumerate(ids) if self._seen.get(job_id, (b"",))[0] != texts[i]]
        if changed:
            views = self._stare_at([ids[i] for i in changed], sorted(house.lists))
            self._seen |= {ids[i]: (texts[i], view) for i, view in zip(changed, views, strict=True) if view}
        here = [job_id for i, job_id in enumerate(ids) if job_id in self._seen and self._seen[job_id][0] == texts[i]]
        return {job_id: self._seen[job_id][1] for job_id in here}, house

    def _stare_at(self, ids: Sequence[str], lists: Sequence[str]) -> list[View | None]:
        examine = Command("examine", [len(lists), *lists, *ids], list)
        with self._client.pipeline(transaction=False) as pipeline:
            pipeline.execute_command(*_words(examine, KEEP))
            for job_id in ids:
                pipeline.execute_command("EVALSHA", self._stare, 0, job_id)
                pipeline.execute_command(*_words(commands.get(job_id), KEEP))
                pipeline.execute_command(*_words(commands.events(job_id, -1), KEEP))
            facts, *answers = pipeline.execute()
        return [
            _view(job_id, fact, *answers[3 * i : 3 * i + 3])
            for i, (job_id, fact) in enumerate(zip(ids, facts, strict=True))
        ]


def _house(found: Wire) -> House:
    """Lua does not tell an empty list from an empty object."""
    lists, held = ({key: list(members) for key, members in found.pop(name)} for name in ("lists", "held"))
    flat: Wire = {name: list(found.pop(name)) for name in ("leases", "marks", "cards", "callbacks", "outbox")}
    return House(lists=lists, held=held, wakes=dict(found.pop("wakes")), **flat, **found)


def _view(job_id: str, fact: Any, found: Any, row: Any, log: Any) -> View | None:
    fields, now, lives, results_live, events_live, ends, born, attempts = found
    if not fields:
        return None
    texts = {
        name.decode(): value.decode(errors="replace") for name, value in zip(fields[::2], fields[1::2], strict=True)
    }
    kept = Kept(
        seen_at=now,
        seconds=lives,
        results_seconds=results_live,
        events_ms=events_live,
        until=float(ends),
        born=float(born),
        executions=[int(attempt) for attempt in attempts],
    )
    return View(commands.get(job_id).decode(row).job, read_log(log), texts, audit._facts(fact), kept)
