-- What all scripts share. K: the keys; SEEN: the fields that answer a poll; EXC: RQ's texts for ends nobody computed.
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
  'worker_name', 'ended_at', 'rate_limit_key',
}
local NUMBERS = {
  'attempt', 'crashes', 'events', 'tokens', 'ticket', 'settled', 'published_attempt', 'suspect_at',
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

-- The job's fields that scripts decide by; nil when it is unknown.
local function load(id)
  local values = call('HMGET', K.job .. id, unpack(FIELDS))
  if not values[1] then return nil end
  local job = {}
  for i, name in ipairs(FIELDS) do job[name] = values[i] end
  for _, name in ipairs(NUMBERS) do job[name] = tonumber(job[name] or 0) end
  job.deadline_at = tonumber(job.deadline_at or nil)
  job.state = state_of(job.status, job.reason)
  job.kind = job.kind or 'generate' -- put in by stock RQ: the first worker that claims it finds out
  return job
end

-- What a poll answers: SEEN's values, then the last result entry, then the counter behind queue positions.
local function read(id)
  local row = call('HMGET', K.job .. id, unpack(SEEN))
  if not row[1] then return false end
  local last = is_final(state_of(row[1])) and call('XREVRANGE', K.results .. id, '+', '-', 'COUNT', 1)[1]
  row[#SEEN + 1] = last and last[2] or false
  row[#SEEN + 2] = call('GET', K.passed)
  row[#SEEN + 3] = id
  return row
end

-- Move the job's entry of the index to a state; nil takes it out.
local function move(id, job, state)
  if job.place == state then return end
  local score = NOW_US
  if job.place then
    score = call('ZSCORE', K.index .. job.kind .. ':' .. job.place, id) or NOW_US
    call('ZREM', K.index .. job.kind .. ':' .. job.place, id)
  end
  if state then call('ZADD', K.index .. job.kind .. ':' .. state, score, id) end
  job.place = state
end

-- Append event number job.events; the caller writes job.events to the hash.
local function log(id, job, ...)
  call('XADD', K.events .. id, (job.events + 1) .. '-0', ...)
  job.events = job.events + 1
end

local function wake(list)
  call('LPUSH', list, 1)
  call('LTRIM', list, 0, 15)
end

-- An id left the queue for good: everybody behind it moves up.
local function pass(id, job)
  if job.ticket > 0 then
    call('INCR', K.passed)
    call('HSET', K.job .. id, 'ticket', 0)
    job.ticket = 0
  end
end

-- Forget that an attempt runs, wherever RQ or we noted it.
local function drop(id, attempt, worker)
  local member = id .. ':' .. attempt
  worker = worker or call('HGET', K.execution .. member, 'worker_name')
  call('ZREM', K.wip, member)
  call('ZREM', K.executions .. id, attempt)
  call('DEL', K.execution .. member)
  if worker then call('SREM', K.held .. worker, member) end
end

local function unlist(id)
  call('ZREM', K.finished, id)
  call('ZREM', K.failed, id)
  call('ZREM', K.canceled, id)
  call('ZREM', K.scheduled, id)
  call('ZREM', K.deferred, id)
  call('ZREM', K.retention, id)
  call('ZREM', K.deadlines, id)
end

-- Remove every trace of a job. Its log stays a minute for those who read it now.
local function forget(id, job)
  pass(id, job)
  move(id, job, nil)
  unlist(id)
  call('DEL', K.job .. id, K.results .. id)
  call('EXPIRE', K.events .. id, 60)
end

-- How long an ended job is kept: seconds, negative for ever.
local function keep(job)
  return tonumber((job.state == 'succeeded' and job.result_ttl or job.state ~= 'succeeded' and job.failure_ttl) or KEEP)
end

local function retain(id, job, seconds)
  if seconds == 0 then return forget(id, job) end
  if seconds < 0 then return end
  call('HSET', K.job .. id, 'expires_at', NOW + seconds * 1000)
  call('ZADD', K.retention, NOW + seconds * 1000, id)
  call('EXPIRE', K.job .. id, seconds)
  call('EXPIRE', K.results .. id, seconds)
  call('EXPIRE', K.events .. id, seconds)
end

-- The entry of RQ's result stream for how an attempt ended.
local function write_result(id, job, status, how)
  if not (how.value or how.exc) then return end
  local entry = {'type', status == 'finished' and 1 or status == 'failed' and 2 or 3, 'worker_name', job.worker_name or ''}
  local function add(name, value) if value then entry[#entry + 1] = name; entry[#entry + 1] = value end end
  add('return_value', how.value)
  add('exc_string', how.exc)
  add('execution_id', job.attempt > 0 and job.attempt)
  add('execution_started_at', how.began)
  add('execution_ended_at', string.format('%.6f', NOW_US / 1000000))
  call('XADD', K.results .. id, 'MAXLEN', '~', 10, '*', unpack(entry))
end

-- An ended job starts anew, with its whole time: its old log goes, the numbers of its events go on. `rq requeue` leaves
-- this to whoever meets the job first: its mark is a job that waits and is `closed`.
local function reopen(id, job)
  call('DEL', K.events .. id)
  call('HDEL', K.job .. id, 'reason', 'error', 'expires_at', 'closed', 'first_token_at', 'cancel_requested')
  call('HSET', K.job .. id, 'tokens', 0)
  call('PERSIST', K.job .. id)
  call('PERSIST', K.results .. id)
  unlist(id)
  job.closed, job.tokens, job.cancel_requested = false, 0, false
  local patience = tonumber(call('HGET', K.job .. id, 'deadline_in') or nil)
  if patience then
    job.deadline_at = NOW + patience
    call('HSET', K.job .. id, 'deadline_at', job.deadline_at)
  end
end

-- End a job: the only way into a final state. how: status, reason, error, value, exc, began.
local function finish(id, job, state, how)
  how = how or {}
  local status = how.status or STATUS[state]
  if job.closed then reopen(id, job) end
  unlist(id)
  job.state = state
  log(id, job, 'f', 1)
  move(id, job, state)
  local change = {'status', status, 'ended_at', stamp(), 'place', state, 'events', job.events, 'closed', 1}
  local function set(name, value) if value then change[#change + 1] = name; change[#change + 1] = value end end
  set('reason', how.reason)
  set('error', how.error)
  call('HSET', K.job .. id, unpack(change))
  call('HDEL', K.job .. id, 'cancel_requested')
  if state == 'succeeded' then call('HDEL', K.job .. id, 'deaths') end
  write_result(id, job, status, how)
  local seconds = keep(job)
  call('ZADD', REGISTRY[status], status == 'canceled' and SECONDS or seconds < 0 and '+inf' or SECONDS + seconds, id)
  if state == 'succeeded' or state == 'failed' then
    local bucket = K.rate .. math.floor(SECONDS / 10)
    call('INCR', bucket)
    call('EXPIRE', bucket, 300)
  end
  local dependents = job.rate_limit_key or call('EXISTS', K.job .. id .. ':dependents') == 1
  if dependents then call('SADD', K.dependents, id) end
  if seconds == 0 and dependents then seconds = 60 end -- RQ's code still has to look at it
  retain(id, job, seconds)
  return dependents
end

local function expire(id, job)
  finish(id, job, 'expired', {reason = 'deadline', exc = EXC.deadline})
end

-- Stock RQ ended the job (cancel, another worker): our index, log and retention learn of it, once.
local function note_end(id, job)
  if job.closed or not is_final(job.state) then return end
  log(id, job, 'f', 1)
  move(id, job, job.state)
  call('HSET', K.job .. id, 'closed', 1, 'events', job.events, 'place', job.state)
  call('HDEL', K.job .. id, 'cancel_requested')
  if not job.ended_at or job.ended_at == '' then call('HSET', K.job .. id, 'ended_at', stamp()) end
  call('ZREM', K.deadlines, id)
  if call('TTL', K.job .. id) < 0 then retain(id, job, math.max(keep(job), 1)) end
end

-- Back into a list: 'front', 'back' or 'suspects'. The job's status is set here, its attempt never.
local function requeue(id, job, where)
  local model = job.model and job.model ~= '' and '.' .. string.lower(job.model) or ''
  local list = (where == 'suspects' and K.suspects or K.ready) .. model
  call(where == 'front' and 'LPUSH' or 'RPUSH', list, id)
  call('SADD', K.queues, list)
  move(id, job, 'queued')
  call('HSET', K.job .. id, 'status', 'queued', 'place', 'queued')
  if where == 'suspects' then call('HSET', K.job .. id, 'suspect_at', NOW) end
  call('HDEL', K.job .. id, 'worker_name')
  if job.deadline_at then call('ZADD', K.deadlines, job.deadline_at, id) end
  wake(K.wake .. model)
end

-- An attempt is over without an end: by release, or by the death of its worker.
local function put_back(id, job)
  if job.cancel_requested then return finish(id, job, 'cancelled') end
  requeue(id, job, job.crashes >= 2 and 'suspects' or 'front')
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
