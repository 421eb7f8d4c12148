#!lua flags=allow-oom
-- Bring a job to the one place that its state names; a doctor's work, so it may walk lists.
-- ARGV: ttl, id, then every list. Answers what was done, in words ('' for nothing).
local id = ARGV[2]
local job = load(id)

local function leave_lists()
  for i = 3, #ARGV do call('LREM', ARGV[i], 0, id) end
end

local function forget_attempts(but)
  for attempt = 1, job and job.attempt or 64 do
    if attempt ~= but then drop(id, attempt) end
  end
end

local function index_as(state)
  for _, kind in ipairs(KINDS) do
    for _, other in ipairs(STATES) do
      if not state or kind ~= job.kind or other ~= state then call('ZREM', K.index .. kind .. ':' .. other, id) end
    end
  end
  if not state then return end
  call('ZADD', K.index .. job.kind .. ':' .. state, 'NX', NOW_US, id)
  call('HSET', K.job .. id, 'place', state)
end

if not job then
  leave_lists()
  unlist(id)
  index_as(nil)
  forget_attempts(nil)
  return 'forgot what was left of it'
end
if job.state == 'running' then
  leave_lists()
  forget_attempts(job.attempt)
  local member = id .. ':' .. job.attempt
  local worker = call('HGET', K.execution .. member, 'worker_name') or call('HGET', K.job .. id, 'worker_name')
  index_as('running')
  job.place = 'running'
  if worker and call('ZSCORE', K.leases, worker) and call('EXISTS', K.execution .. member) == 1 then
    call('ZADD', K.wip, NEVER, member)
    call('SADD', K.held .. worker, member)
    return 'noted again that ' .. worker .. ' runs it'
  end
  drop(id, job.attempt, worker)
  put_back(id, job)
  return 'put it back into the queue: no worker runs it'
end
forget_attempts(nil)
if job.state == 'queued' then
  if job.closed then reopen(id, job) end
  index_as('queued')
  job.place = 'queued'
  if K[job.status] and call('ZSCORE', K[job.status], id) then -- scheduled, deferred
    leave_lists()
    return 'left it in the one place it waits in'
  end
  leave_lists()
  for _, key in ipairs({K.waits, K.scheduled, K.deferred}) do call('ZREM', key, id) end
  put_back(id, job)
  return 'put it at the front of the queue, once'
end
leave_lists()
pass(id, job)
note_end(id, job)
mend_callback(id, job)
index_as(job.state)
call('ZREM', K.scheduled, id)
call('ZREM', K.deferred, id)
call('ZREM', K.deadlines, id)
call('ZREM', K.waits, id)
for status, registry in pairs(REGISTRY) do
  if registry ~= REGISTRY[job.status] then call('ZREM', registry, id) end
end
call('ZADD', REGISTRY[job.status], 'NX', SECONDS + math.max(keep(job), 60), id)
if job.state == 'failed' and job.reason == 'poison_job' then call('ZADD', K.dead, 'NX', NOW, id) end
if call('TTL', K.job .. id) < 0 and keep(job) > 0 then retain_now(id, job, keep(job)) end
return 'noted where it is, and took it out of everywhere else'
