#!lua flags=allow-oom
-- Take jobs from workers that died. ARGV: ttl, grace in ms, bound, worker that was seen dead ('' for none), how it died.
-- A lease found over is marked first and swept after the grace; one of 0 (somebody saw the process die) is swept now.
-- Answers {requeued, ended, dead ids, workers forgotten, more}.
local grace, left, buried = tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4]
local requeued, ended, dead, gone = 0, 0, {}, {}
local REMEMBERED, COUNTED = 5, 3 -- deaths: on the job's record, in the words of its error

-- Note on a job how its worker died; the record.
local function record(id, job, death)
  local deaths = cjson.decode(call('HGET', K.job .. id, 'deaths') or '[]')
  while #deaths >= REMEMBERED do table.remove(deaths, 1) end
  deaths[#deaths + 1] = {attempt = job.attempt, worker = death.worker, host = death.host, how = death.how,
    at = NOW / 1000, tokens = job.tokens, neighbours = death.neighbours}
  call('HSET', K.job .. id, 'deaths', cjson.encode(deaths))
  return deaths
end

-- The error of a dead letter: the last deaths, in words.
local function explain(deaths)
  local words = {}
  for i = math.max(1, #deaths - COUNTED + 1), #deaths do
    local death = deaths[i]
    local beside = death.neighbours == 0 and 'alone' or string.format('beside %d', death.neighbours)
    words[#words + 1] = string.format('%s at %d tokens, %s', death.how, death.tokens, beside)
  end
  local message = 'the job was running each time its worker died: ' .. table.concat(words, '; ')
  return cjson.encode({code = 'poison_job', message = message, param = cjson.null})
end

-- A crash sets `crashes` to 1 if the attempt had published a token, else adds 1: at 1 to the front, at 2 a suspect.
local function crash(id, job, death)
  local deaths = record(id, job, death)
  job.crashes = job.published_attempt == job.attempt and 1 or job.crashes + 1
  call('HSET', K.job .. id, 'crashes', job.crashes)
  if job.crashes >= 3 and not job.cancel_requested then
    finish(id, job, 'failed', {reason = 'poison_job', error = explain(deaths), exc = EXC.poison})
    dead[#dead + 1] = id
  elseif job.cancel_requested then
    put_back(id, job)
    ended = ended + 1
  else
    put_back(id, job)
    requeued = requeued + 1
  end
end

-- What a death's records have in common. A sweep may take several calls: the first one counts.
local function describe(worker, seen)
  local key = K.card .. worker
  call('HSETNX', key, 'held', call('SCARD', K.held .. worker))
  local how, held, card = unpack(call('HMGET', key, 'how', 'held', 'card'))
  how = how or (seen and 'it left without handing its jobs back' or 'its lease ran out')
  return {worker = worker, how = how, host = card and cjson.decode(card).host, neighbours = tonumber(held) - 1}
end

local function sweep(worker, seen)
  local death = describe(worker, seen)
  local members = call('SRANDMEMBER', K.held .. worker, left)
  left = left - #members
  local found = {}
  for _, member in ipairs(members) do
    local id, attempt = string.match(member, '^(.*):(%d+)$')
    local began = call('HGET', K.execution .. member, 'created_at') or '0'
    drop(id, attempt, worker)
    local job = load(id)
    if job and job.status == 'started' and job.attempt == tonumber(attempt) then
      local created = tonumber(call('ZSCORE', K.index .. job.kind .. ':running', id) or 0)
      found[#found + 1] = {began = began, created = created, id = id, job = job}
    elseif job then
      note_end(id, job)
    end
  end
  -- Latest first: each goes to the front, so the one that was claimed first ends up first; of one claim, the oldest.
  table.sort(found, function(a, b)
    if a.began ~= b.began then return a.began > b.began end
    if a.created ~= b.created then return a.created > b.created end
    return a.id > b.id
  end)
  for _, each in ipairs(found) do crash(each.id, each.job, death) end
  if call('EXISTS', K.held .. worker) == 1 then return end
  call('ZREM', K.leases, worker)
  call('ZREM', K.marks, worker)
  if call('GET', K.hold) == worker then call('DEL', K.hold) end
  call('DEL', K.card .. worker, K.rq_worker .. worker, K.rq_worker .. worker .. ':executions')
  call('SREM', K.rq_workers, K.rq_worker .. worker)
  call('SREM', K.queue_workers, K.rq_worker .. worker)
  gone[#gone + 1] = worker
end

if buried ~= '' then
  call('ZADD', K.leases, 0, buried)
  call('HSETNX', K.card .. buried, 'how', ARGV[5] ~= '' and ARGV[5] or 'its process died')
end
local over = call('ZRANGEBYSCORE', K.leases, '-inf', NOW, 'WITHSCORES', 'LIMIT', 0, 64)
for i = 1, #over, 2 do
  local worker, marked = over[i], tonumber(call('ZSCORE', K.marks, over[i]) or nil)
  if tonumber(over[i + 1]) > 0 and not marked then
    call('ZADD', K.marks, NOW, worker)
  elseif left > 0 and (tonumber(over[i + 1]) == 0 or NOW - marked >= grace) then
    sweep(worker, tonumber(over[i + 1]) == 0)
  end
end
return {requeued, ended, dead, gone, left <= 0 and 1 or 0}
