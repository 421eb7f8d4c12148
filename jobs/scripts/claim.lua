#!lua flags=allow-oom
-- Take jobs and mark them started, in one go. ARGV: ttl, worker, room, running, model, engine, looks, identity of the
-- engine, patience for a job that waits for another in ms.
-- Begun answers that wait for such an engine come first, then the more urgent before the less, but that every fifth job
-- claimed while several classes wait is not of the most urgent one: three times of the middle one, then of the last.
-- Ids of ended jobs fall out here, jobs for other models go to those models' lists; `looks` bounds the work of a call.
-- Answers {jobs, alone, hold, more}; a job is {id, attempt, next event, crashes, ms to its deadline, fields of RQ's,
-- whether somebody reads along, whether it is young}.
local worker, room, running, model = ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4]), string.lower(ARGV[5])
local engine, looks, identity, patience = ARGV[6], tonumber(ARGV[7]), ARGV[8], tonumber(ARGV[9])
local SUSPECT_WAIT, HOLD_FOR = 2000, 60000 -- milliseconds
local taken, waiting = {}, {} -- waiting: the lists of each class that somebody waits in

-- Whether this engine may compute the job: it begins the answer, goes on as whoever began would, or may start it over.
local function may_resume(id, job)
  if job.tokens == 0 or job.engine == identity or job.resume == 'any' then return true end
  if job.resume == 'wait' or job.read then return false end
  start_over(id, job)
  return true
end

local function is_ours(job) return not job.model or job.model == '' or string.lower(job.model) == model end

local function take(id, job)
  move_up(job)
  local at, key, attempt = stamp(), K.job .. id, job.attempt + 1
  local member = id .. ':' .. attempt
  if job.events == 0 then call('DEL', K.events .. id) end -- as at a submission: stock RQ may have put it in
  write_down(id, {event(job, {'a', attempt, 'e', engine})})
  local came = move(id, job, 'running')
  if job.cancel_requested or job.suspect_at > 0 or job.waiting_for then
    call('HDEL', key, 'cancel_requested', 'suspect_at', 'waiting_for')
  end
  call('ZREM', K.waits, id)
  call('HSET', key, 'attempt', attempt, 'status', 'started', 'started_at', at, 'last_heartbeat', at, 'worker_name', worker,
    'place', 'running', 'events', job.events, 'ticket', 0, 'engine', job.tokens > 0 and job.engine or identity)
  call('PERSIST', key)
  call('ZREM', K.deadlines, id)
  call('ZADD', K.wip, NEVER, member)
  call('ZADD', K.executions .. id, NEVER, attempt)
  local seconds = string.format('%.6f', NOW_US / 1000000)
  call('HSET', K.execution .. member, 'id', attempt, 'job_id', id, 'created_at', seconds, 'last_heartbeat', seconds,
    'worker_name', worker)
  -- Not into RQ's own set of the worker's executions: rq-dashboard 0.9 reads a current job with pickle, and answers 500.
  call('SADD', K.held .. worker, member)
  taken[#taken + 1] = {id, attempt, job.events, job.crashes, job.deadline_at and job.deadline_at - NOW or false,
    call('HMGET', key, 'data', 'kind', 'timeout', 'success_callback_name', 'failure_callback_name',
      'stopped_callback_name', 'repeats_left', 'webhooks', 'created_at'),
    job.watched and 1 or 0, is_young(job, came) and 1 or 0}
end

-- The next id of a list that is to be computed here; what is not is put where it belongs. `trusted`: it lists suspects.
-- `class`: it lists such jobs, and stock RQ may have put others there.
local function pop(list, trusted, class)
  while looks > 0 do
    local id = call('LPOP', list)
    if not id then return nil end
    looks = looks - 1
    local job = load(id)
    if job and job.status == 'queued' and job.closed then reopen(id, job) end
    if job and job.status ~= 'queued' then
      pass(id, job)
      note_end(id, job)
    elseif job and job.deadline_at and job.deadline_at <= NOW then
      pass(id, job)
      expire(id, job)
    elseif job and not trusted and job.crashes >= 2 then
      pass(id, job)
      if not job.waiting_for then requeue(id, job, 'suspects') end -- else RQ queued it twice, and it waits elsewhere
    elseif job and not (is_ours(job) and job.class == (class or job.class)) then
      if not job.waiting_for or list == like_list(job) then requeue(id, job, 'back') end
    elseif job and not may_resume(id, job) then
      wait_for_like(id, job, patience)
    elseif job then
      return id, job
    end
  end
end

local function pop_class(number)
  for _, list in ipairs(waiting[number] or {}) do
    local id, job = pop(list, false, number)
    if id then return id, job end
  end
end

-- The next job of all classes: of the most urgent one, unless it is another's turn and somebody waits there.
local function pop_any(turn)
  local id, job
  if turn % 5 == 4 then id, job = pop_class(turn % 20 == 19 and 3 or 2) end
  for number = 1, #CLASSES do
    if not id then id, job = pop_class(number) end
  end
  return id, job
end

-- Whether a list's first suspect has waited long enough for this worker to empty itself.
local function must_hold(list)
  local id = call('LINDEX', list, 0)
  local job = id and load(id)
  if id and not (job and job.status == 'queued') then call('LPOP', list) end
  if not job or job.status ~= 'queued' or NOW - job.suspect_at < SUSPECT_WAIT then return false end
  return call('SET', K.hold, worker, 'NX', 'PX', HOLD_FOR) or call('GET', K.hold) == worker
end

if room < 1 or call('EXISTS', K.suspended) == 1 or not call('ZSCORE', K.leases, worker) then return {taken, 0, 0, 0} end
local suspects = {K.like_suspects .. identity, K.suspects .. '.' .. model, K.suspects}
local like = {K.like .. identity}
if call('EXISTS', like[1], unpack(suspects)) == 0 then suspects, like = {}, {} end -- mostly: one look instead of four
for _, list in ipairs(suspects) do
  if running > 0 then
    if must_hold(list) then return {taken, 0, 1, 0} end
  else
    local id, job = pop(list, true)
    if id then
      take(id, job)
      call('DEL', K.hold)
      return {taken, 1, 0, 0}
    end
  end
end
for _, list in ipairs(like) do
  while #taken < room do
    local id, job = pop(list)
    if not id then break end
    take(id, job)
  end
end
local classes = 0
for number, class in ipairs(CLASSES) do
  local lists = {class.list .. '.' .. model, class.list}
  if call('EXISTS', unpack(lists)) > 0 then waiting[number], classes = lists, classes + 1 end
end
local turn = tonumber(call('HGET', K.turns, model) or 0)
while #taken < room do
  local id, job = pop_any(turn)
  if not id then break end
  take(id, job)
  turn = turn + 1
end
if classes > 1 then call('HSET', K.turns, model, turn % 20) end
if #taken < room and looks > 0 and count('queued') == 0 then
  for _, class in ipairs(CLASSES) do
    local tickets = call('GET', class.tickets) or '0' -- nobody waits: the estimate starts afresh
    if (call('GET', class.passed) or '0') ~= tickets then call('SET', class.passed, tickets) end -- a write costs time
  end
end
return {taken, 0, 0, #taken < room and looks == 0 and 1 or 0}
