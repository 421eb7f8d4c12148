-- What happens to a job: every script moves it by these.

local function wake(list)
  call('LPUSH', list, 1)
  call('LTRIM', list, 0, 15)
  call('PUBLISH', K.arrivals, '')
end

-- An id left the queue for good: everybody behind it moves up. The caller writes job.ticket to the hash.
local function move_up(job)
  if job.ticket > 0 then call('INCR', CLASSES[job.class].passed) end
  job.ticket = 0
end

local function pass(id, job)
  if job.ticket == 0 then return end
  move_up(job)
  call('HSET', K.job .. id, 'ticket', 0)
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

-- Out of every registry. One that was `claimed` for what now ends is in none of ours.
local function unlist(id, claimed)
  call('ZREM', K.finished, id)
  call('ZREM', K.failed, id)
  call('ZREM', K.canceled, id)
  call('ZREM', K.scheduled, id)
  call('ZREM', K.deferred, id)
  if claimed then return end
  call('ZREM', K.retention, id)
  call('ZREM', K.deadlines, id)
  call('ZREM', K.waits, id)
  call('ZREM', K.dead, id)
end

-- Remove every trace of a job. Its log stays a minute for those who read it now.
local function forget(id, job)
  pass(id, job)
  move(id, job, nil)
  unlist(id)
  let_go(id, job)
  call('DEL', K.job .. id, K.results .. id)
  call('EXPIRE', K.events .. id, 60)
end

-- How long an ended job is kept: seconds, negative for ever.
local function keep(job)
  return tonumber((job.state == 'succeeded' and job.result_ttl or job.state ~= 'succeeded' and job.failure_ttl) or KEEP)
end

local function expiry(seconds) return NOW + seconds * 1000 end

-- The caller writes when it expires to the hash. `packed`: the whole log is, as far as the caller knows.
local function retain(id, job, seconds, packed)
  if seconds == 0 then return forget(id, job) end
  if seconds < 0 then return end
  call('ZADD', K.retention, expiry(seconds), id)
  call('EXPIRE', K.job .. id, seconds)
  call('EXPIRE', K.results .. id, seconds)
  if not packed and call('PTTL', K.events .. id) < 0 then call('EXPIRE', K.events .. id, seconds) end
end

local function retain_now(id, job, seconds, packed)
  if seconds > 0 then call('HSET', K.job .. id, 'expires_at', expiry(seconds)) end
  retain(id, job, seconds, packed)
end

-- The entry of RQ's result stream for how an attempt ended; answered, too.
local function write_result(id, job, status, how)
  if not (how.value or how.exc) then return end
  local entry = {'type', status == 'finished' and '1' or status == 'failed' and '2' or '3', 'worker_name', job.worker_name or ''}
  local function add(name, value) if value then entry[#entry + 1] = name; entry[#entry + 1] = value end end
  add('return_value', how.value)
  add('exc_string', how.exc)
  call('XADD', K.results .. id, 'MAXLEN', '~', 10, '*', unpack(entry))
  return entry
end

-- An ended job starts anew, with its whole time: its old log goes, the numbers of its events go on. What a worker that was
-- taken for dead still says of the last attempt belongs to the old log: it counts as settled. `rq requeue` leaves
-- this to whoever meets the job first: its mark is a job that waits and is `closed`.
local function reopen(id, job)
  call('DEL', K.events .. id)
  call('HDEL', K.job .. id, 'reason', 'error', 'expires_at', 'closed', 'first_token_at', 'cancel_requested', 'read', 'log')
  call('HSET', K.job .. id, 'tokens', 0, 'text_bytes', 0, 'settled', job.attempt)
  call('PERSIST', K.job .. id)
  call('PERSIST', K.results .. id)
  call('SREM', K.unpacked, id) -- else the new log's last event, left for who follows, would be packed again
  unlist(id)
  let_go(id, job)
  job.closed, job.tokens, job.text_bytes, job.cancel_requested = false, 0, 0, false
  local patience = tonumber(call('HGET', K.job .. id, 'deadline_in') or nil)
  if patience then
    job.deadline_at = NOW + patience
    call('HSET', K.job .. id, 'deadline_at', job.deadline_at)
  end
end

-- What is of use only while a job is unfinished.
local FLEETING = {'cancel_requested', 'published_attempt', 'first_token', 'read', 'engine', 'waiting_for',
  'last_heartbeat', 'suspect_at', 'text_bytes', 'watched', 'awaited'}

-- End a job: the only way into a final state. how: status, reason, error, value, text_bytes (of the value), exc, attempt
-- (that is settled), change (of the hash, by `append`).
local function finish(id, job, state, how)
  how = how or {}
  local status, tail, change = how.status or STATUS[state], how.tail or {}, how.change or {}
  if job.closed then
    reopen(id, job)
    tail, change = {}, {}
  end
  unlist(id, how.claimed) -- stock RQ leaves what it enqueues where it was scheduled
  job.state = state
  tail[#tail + 1] = event(job, {'f', 1})
  move(id, job, state)
  local dependents = job.rate_limit_key or call('EXISTS', K.job .. id .. ':dependents') == 1
  local kept = keep(job)
  local seconds = kept == 0 and dependents and 60 or kept -- RQ's code still has to look at it
  local log, packed
  if seconds == 0 then
    write_down(id, tail)
  else
    log, packed = pack_log(id, job, tail, how.text_bytes ~= job.text_bytes or job.resume == 'any')
  end
  local function set(name, value) if value then change[#change + 1] = name; change[#change + 1] = value end end
  set('log', log)
  set('status', status)
  set('ended_at', stamp())
  set('place', state)
  set('events', job.events)
  set('closed', 1)
  set('reason', how.reason)
  set('error', how.error)
  set('settled', how.attempt)
  set('expires_at', seconds > 0 and expiry(seconds))
  call('HSET', K.job .. id, unpack(change))
  local gone = {unpack(FLEETING)}
  if job.ticket == 0 then gone[#gone + 1] = 'ticket' end
  if state == 'succeeded' then gone[#gone + 1] = 'deaths' end
  call('HDEL', K.job .. id, unpack(gone))
  local result = write_result(id, job, status, how)
  call_back(id, job)
  call('ZADD', REGISTRY[status], status == 'canceled' and SECONDS or kept < 0 and '+inf' or SECONDS + kept, id)
  if how.reason == 'poison_job' then call('ZADD', K.dead, NOW, id) end
  if state == 'succeeded' or state == 'failed' then
    local bucket = K.rate .. math.floor(SECONDS / 10)
    if call('INCR', bucket) == 1 then call('EXPIRE', bucket, 300) end
  end
  if dependents then call('SADD', K.dependents, id) end
  retain(id, job, seconds, packed)
  tell_end(id, job, result, packed)
  return dependents
end

local function expire(id, job)
  finish(id, job, 'expired', {reason = 'deadline', exc = EXC.deadline})
end

-- Stock RQ ended the job (cancel, another worker): our index, log and retention learn of it, once.
local function note_end(id, job)
  if job.closed or not is_final(job.state) then return end
  local log, packed = pack_log(id, job, {event(job, {'f', 1})}, true)
  move(id, job, job.state)
  call('HSET', K.job .. id, 'closed', 1, 'events', job.events, 'place', job.state, 'log', log)
  call('HDEL', K.job .. id, 'cancel_requested', 'waiting_for', 'watched')
  if not job.ended_at or job.ended_at == '' then call('HSET', K.job .. id, 'ended_at', stamp()) end
  call('ZREM', K.deadlines, id)
  call('ZREM', K.waits, id)
  call_back(id, job)
  if call('TTL', K.job .. id) < 0 then retain_now(id, job, keep(job) == 0 and 1 or keep(job), packed) end
  tell_end(id, job, nil, packed)
end

-- Where a job waits for the like of its engine; a suspect among suspects, or whoever claims it would send it back.
local function like_list(job) return (job.crashes >= 2 and K.like_suspects or K.like) .. job.engine end

-- Let a job whose answer another engine began wait for its like, for `patience` milliseconds.
local function wait_for_like(id, job, patience)
  if job.waiting_for == job.engine then return end -- it is in that list already
  local list = like_list(job)
  call('RPUSH', list, id)
  call('SADD', K.queues, list)
  call('ZADD', K.waits, NOW + patience, id)
  call('HSET', K.job .. id, 'waiting_for', job.engine)
  wake(K.wake .. '.' .. job.engine)
end

-- Back into a list: 'front' or 'back' of its class's, or 'suspects'. The job's status is set here, its attempt never.
local function requeue(id, job, where)
  local model = job.model and job.model ~= '' and '.' .. string.lower(job.model) or ''
  local list = (where == 'suspects' and K.suspects or CLASSES[job.class].list) .. model
  call(where == 'front' and 'LPUSH' or 'RPUSH', list, id)
  call('SADD', K.queues, list)
  move(id, job, 'queued')
  call('HSET', K.job .. id, 'status', 'queued', 'place', 'queued')
  if where == 'suspects' then call('HSET', K.job .. id, 'suspect_at', NOW) end
  if job.waiting_for then -- it waits here now, and not for one engine
    call('HDEL', K.job .. id, 'waiting_for')
    call('ZREM', K.waits, id)
  end
  call('HDEL', K.job .. id, 'worker_name')
  if job.deadline_at then call('ZADD', K.deadlines, job.deadline_at, id) end
  wake(K.wake .. model)
end

-- An attempt is over without an end: by release, or by the death of its worker.
local function put_back(id, job)
  if job.cancel_requested then return finish(id, job, 'cancelled') end
  requeue(id, job, job.crashes >= 2 and 'suspects' or 'front')
end
