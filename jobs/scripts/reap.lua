#!lua flags=allow-oom
-- Take jobs from workers that died. ARGV: ttl, grace in ms, bound, worker that was seen dead ('' for none).
-- A lease found over is marked first and swept after the grace; one of 0 (somebody saw the process die) is swept now.
-- Answers {requeued, ended, dead ids, workers forgotten, more}.
local grace, left, buried = tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4]
local requeued, ended, dead, gone = 0, 0, {}, {}
local POISON = '{"code":"poison_job","message":"the job was running each time its worker died","param":null}'

-- A crash sets `crashes` to 1 if the attempt had published a token, else adds 1: at 1 to the front, at 2 a suspect.
local function crash(id, job)
  job.crashes = job.published_attempt == job.attempt and 1 or job.crashes + 1
  call('HSET', K.job .. id, 'crashes', job.crashes)
  if job.crashes >= 3 and not job.cancel_requested then
    finish(id, job, 'failed', {reason = 'poison_job', error = POISON, exc = EXC.poison})
    dead[#dead + 1] = id
  elseif job.cancel_requested then
    put_back(id, job)
    ended = ended + 1
  else
    put_back(id, job)
    requeued = requeued + 1
  end
end

local function sweep(worker)
  local members = call('SRANDMEMBER', K.held .. worker, left)
  left = left - #members
  local found = {}
  for _, member in ipairs(members) do
    local id, attempt = string.match(member, '^(.*):(%d+)$')
    local began = call('HGET', K.execution .. member, 'created_at') or '0'
    drop(id, attempt, worker)
    local job = load(id)
    if job and job.status == 'started' and job.attempt == tonumber(attempt) then
      found[#found + 1] = {began, id, job}
    elseif job then
      note_end(id, job)
    end
  end
  -- Latest first: each goes to the front, so the one that was claimed first ends up first.
  table.sort(found, function(a, b) return a[1] > b[1] or (a[1] == b[1] and a[2] > b[2]) end)
  for _, each in ipairs(found) do crash(each[2], each[3]) end
  if call('EXISTS', K.held .. worker) == 1 then return end
  call('ZREM', K.leases, worker)
  call('ZREM', K.marks, worker)
  if call('GET', K.hold) == worker then call('DEL', K.hold) end
  call('DEL', K.card .. worker, K.rq_worker .. worker, K.rq_worker .. worker .. ':executions')
  call('SREM', K.rq_workers, K.rq_worker .. worker)
  call('SREM', K.queue_workers, K.rq_worker .. worker)
  gone[#gone + 1] = worker
end

if buried ~= '' then call('ZADD', K.leases, 0, buried) end
local over = call('ZRANGEBYSCORE', K.leases, '-inf', NOW, 'WITHSCORES', 'LIMIT', 0, 64)
for i = 1, #over, 2 do
  local worker, marked = over[i], tonumber(call('ZSCORE', K.marks, over[i]) or nil)
  if tonumber(over[i + 1]) > 0 and not marked then
    call('ZADD', K.marks, NOW, worker)
  elseif left > 0 and (tonumber(over[i + 1]) == 0 or NOW - marked >= grace) then
    sweep(worker)
  end
end
return {requeued, ended, dead, gone, left <= 0 and 1 or 0}
