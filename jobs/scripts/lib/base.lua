-- What all scripts share: the clock, and a job as read. K: the keys; SEEN: the fields that answer a poll; EXC: RQ's texts for ends nobody computed.
-- ARGV[1] is always how long jobs are kept that do not say so themselves, in seconds.
local call = redis.call
local clock = call('TIME')
local SECONDS = tonumber(clock[1])
local NOW_US = SECONDS * 1000000 + tonumber(clock[2])
local NOW = math.floor(NOW_US / 1000)
local KEEP = tonumber(ARGV[1])
local NEVER = 4102444800 -- 2100: RQ's clean-ups, on anybody's clock, leave live executions alone
local KINDS = {'generate', 'predict'}
local STATES = {'queued', 'running', 'succeeded', 'failed', 'cancelled', 'expired'}
local STATUS = {succeeded = 'finished', failed = 'failed', expired = 'failed', cancelled = 'canceled'}
local REGISTRY = {finished = K.finished, failed = K.failed, stopped = K.failed, canceled = K.canceled}
local FIELDS = {
  'status', 'attempt', 'crashes', 'kind', 'model', 'place', 'reason', 'events', 'tokens', 'ticket', 'closed',
  'settled', 'published_attempt', 'cancel_requested', 'deadline_at', 'suspect_at', 'result_ttl', 'failure_ttl',
  'worker_name', 'ended_at', 'rate_limit_key', 'engine', 'resume', 'waiting_for', 'read', 'first_token',
  'text_bytes', 'webhook', 'callback', 'priority', 'watched', 'awaited',
}
-- The classes of the queue, the most urgent one first: in which list a job waits, and what it is counted by.
local CLASSES = {
  {list = K.urgent, tickets = K.tickets .. ':urgent', passed = K.passed .. ':urgent'},
  {list = K.ready, tickets = K.tickets, passed = K.passed},
  {list = K.low, tickets = K.tickets .. ':low', passed = K.passed .. ':low'},
}
local NUMBERS = {
  'attempt', 'crashes', 'events', 'tokens', 'ticket', 'settled', 'published_attempt', 'suspect_at', 'first_token',
  'text_bytes', 'priority',
}

-- Now, as RQ writes times: 2026-01-02T03:04:05.678901Z.
local function stamp()
  local days = math.floor(SECONDS / 86400) + 719468
  local era = math.floor(days / 146097)
  local doe = days - era * 146097
  local yoe = math.floor((doe - math.floor(doe / 1460) + math.floor(doe / 36524) - math.floor(doe / 146096)) / 365)
  local doy = doe - (365 * yoe + math.floor(yoe / 4) - math.floor(yoe / 100))
  local mp = math.floor((5 * doy + 2) / 153)
  local day, month = doy - math.floor((153 * mp + 2) / 5) + 1, mp < 10 and mp + 3 or mp - 9
  local year = yoe + era * 400 + (month <= 2 and 1 or 0)
  local rest = SECONDS % 86400
  return string.format('%04d-%02d-%02dT%02d:%02d:%02d.%06dZ', year, month, day, math.floor(rest / 3600),
    math.floor(rest / 60) % 60, rest % 60, NOW_US % 1000000)
end

local function state_of(status, reason)
  if status == 'started' then return 'running' end
  if status == 'finished' then return 'succeeded' end
  if status == 'canceled' or status == 'stopped' then return 'cancelled' end
  if status == 'failed' then return reason == 'deadline' and 'expired' or 'failed' end
  return 'queued' -- RQ's queued, scheduled, deferred, rate_limited, ready_to_enqueue, created
end

local function is_final(state) return state ~= 'queued' and state ~= 'running' end

-- Whether a job that came then, in microseconds, is so young that somebody may be about to read along: its first token is
-- published at once. Where nobody knows, it is not; nor where its submitter waits for its end.
local function is_young(job, came) return came and not job.awaited and NOW_US - came < 1000000 end

-- Number of the class of a priority.
local function class_of(priority) return priority < 0 and 1 or priority > 0 and 3 or 2 end

-- About how many jobs wait in the classes from one to another.
local function waiting_in(first, last)
  local total = 0
  for i = first, last do
    local class = CLASSES[i]
    total = total + math.max(0, (call('GET', class.tickets) or 0) - (call('GET', class.passed) or 0))
  end
  return total
end

-- The job's fields that scripts decide by; nil when it is unknown.
local function load(id)
  local values = call('HMGET', K.job .. id, unpack(FIELDS))
  if not values[1] then return nil end
  local job = {}
  for i, name in ipairs(FIELDS) do job[name] = values[i] end
  for _, name in ipairs(NUMBERS) do job[name] = tonumber(job[name] or 0) end
  job.deadline_at = tonumber(job.deadline_at or nil)
  job.state = state_of(job.status, job.reason)
  job.class = class_of(job.priority)
  job.kind = job.kind or 'generate' -- put in by stock RQ: the first worker that claims it finds out
  return job
end

-- The last ticket of a class of which nobody is waited for any more: how many have left it, less those more urgent.
local function before_first(class)
  return (call('GET', CLASSES[class].passed) or 0) - waiting_in(1, class - 1)
end

-- What a poll answers: SEEN's values, the last result entry, what of the log is not packed, what to take from a queued
-- job's ticket to have its position, the id, and how far its callback has got. `result`: that entry, and `packed`: the whole
-- log is, where the caller knows.
local function read(id, result, packed)
  local row = call('HMGET', K.job .. id, unpack(SEEN))
  if not row[1] then return false end
  local state = state_of(row[1])
  local over = is_final(state)
  local last = over and not result and call('XREVRANGE', K.results .. id, '+', '-', 'COUNT', 1)[1]
  local unpacked = over and not packed and call('SISMEMBER', K.unpacked, id) == 1
  row[#SEEN + 1] = result or last and last[2] or false
  row[#SEEN + 2] = unpacked and call('XRANGE', K.events .. id, '-', '+') or false
  row[#SEEN + 3] = state == 'queued' and before_first(class_of(tonumber(row[#SEEN] or 0)))
  row[#SEEN + 4] = id
  row[#SEEN + 5] = row[2] and call('HMGET', K.callback .. row[2], 'state', 'attempts', 'error') or false
  return row
end

local TOLD = 8192 -- bytes of a job that are told with its end

-- Tell those who wait that the job has ended; who has waited since its submission is told the job as well. What is told are
-- names and values, behind a line of their lengths. `result` and `packed` as for `read`.
local function tell_end(id, job, result, packed)
  local told, lengths, bytes = {}, {}, 0
  local function add(name, value)
    told[#told + 1], told[#told + 2] = name, value
    lengths[#lengths + 1], lengths[#lengths + 2], bytes = #name, #value, bytes + #value
  end
  add('j', id)
  local row = job.awaited and not job.callback and read(id, result, packed)
  if row and not row[#SEEN + 2] then
    for i, name in ipairs(SEEN) do if row[i] then add(name, row[i]) end end
    local result = row[#SEEN + 1] or {}
    for i = 1, #result, 2 do add('.' .. result[i], result[i + 1]) end
  end
  if bytes > TOLD then told, lengths = {'j', id}, {1, #id} end
  call('PUBLISH', K.ended, table.concat(lengths, ' ') .. '\n' .. table.concat(told))
end

-- Move the job's entry of the index to a state; nil takes it out. Answers when the job came, in microseconds; nothing where
-- it is there: stock RQ may queue what runs.
local function move(id, job, state)
  if job.place == state then return end
  local score = NOW_US
  if job.place then
    score = call('ZSCORE', K.index .. job.kind .. ':' .. job.place, id) or NOW_US
    call('ZREM', K.index .. job.kind .. ':' .. job.place, id)
  end
  if state then call('ZADD', K.index .. job.kind .. ':' .. state, score, id) end
  job.place = state
  return score
end

-- Jobs ended per second, over the last minute.
local function rate()
  local bucket, total, oldest = math.floor(SECONDS / 10), 0, nil
  for b = bucket - 6, bucket do
    local count = tonumber(call('GET', K.rate .. b) or 0)
    if count > 0 then oldest = oldest or b end
    total = total + count
  end
  return oldest and total / math.max(10, NOW / 1000 - oldest * 10) or 0
end

local function count(state)
  local total = 0
  for _, kind in ipairs(KINDS) do total = total + call('ZCARD', K.index .. kind .. ':' .. state) end
  return total
end
