#!lua flags=no-writes,allow-oom
-- Where jobs are, each seen at one moment. ARGV: ttl, number of lists, the lists, then ids.
-- Walks the lists: for a doctor's second look, and for tests. Answers {facts as JSON, packed log} for each id.
local lists = tonumber(ARGV[2])
local PLACES = {'scheduled', 'deferred', 'finished', 'failed', 'canceled', 'retention', 'deadlines', 'waits', 'dead'}
local RECENT = 32 -- attempts looked at

local function places(id)
  local found = {}
  for _, name in ipairs(PLACES) do
    if call('ZSCORE', K[name], id) then found[#found + 1] = name end
  end
  return found
end

local function listed(id)
  local found = {}
  for i = 3, 2 + lists do
    local times = #call('LPOS', ARGV[i], id, 'COUNT', 0)
    if times > 0 then found[#found + 1] = {ARGV[i], times} end
  end
  return found
end

local function indexed(id)
  local found = {}
  for _, kind in ipairs(KINDS) do
    for _, state in ipairs(STATES) do
      if call('ZSCORE', K.index .. kind .. ':' .. state, id) then found[#found + 1] = kind .. ':' .. state end
    end
  end
  return found
end

-- The attempts that somebody is said to run.
local function executions(id, attempt)
  local found = {}
  for number = math.max(1, attempt - RECENT), attempt do
    local member = id .. ':' .. number
    local wip, worker = call('ZSCORE', K.wip, member), call('HGET', K.execution .. member, 'worker_name')
    if wip or worker then
      found[#found + 1] = {attempt = number, wip = wip and true or false, worker = worker,
        held = worker and call('SISMEMBER', K.held .. worker, member) == 1,
        lease = worker and call('ZSCORE', K.leases, worker) and true or false}
    end
  end
  return found
end

local function logged(id)
  local key = K.events .. id
  local first, last = call('XRANGE', key, '-', '+', 'COUNT', 1)[1], call('XREVRANGE', key, '+', '-', 'COUNT', 1)[1]
  return {length = call('XLEN', key), first = first and first[1], last = last and last[1],
    ended = (last and last[2][1]) == 'f', unpacked = call('SISMEMBER', K.unpacked, id) == 1}
end

local function results(id)
  local count = 0
  for _, entry in ipairs(call('XRANGE', K.results .. id, '-', '+')) do
    for i = 1, #entry[2], 2 do
      if entry[2][i] == 'type' and entry[2][i + 1] == '1' then count = count + 1 end
    end
  end
  return count
end

-- Whether somebody is to be told of the end, and how far that has got.
local function callback(job)
  local name = job and job.callback
  return {wanted = job and job.webhook and true or false, state = name and call('HGET', K.callback .. name, 'state'),
    waits = name and call('ZSCORE', K.outbox, name) and true or false}
end

local answers = {}
for i = 3 + lists, #ARGV do
  local id = ARGV[i]
  local job = load(id)
  local facts = {id = id, known = job and true or false, origin = call('HGET', K.job .. id, 'origin'), state = job and job.state,
    status = job and job.status, attempt = job and job.attempt, events = job and job.events, kind = job and job.kind,
    closed = job and job.closed, reason = job and job.reason, place = job and job.place,
    forgotten = not job and tonumber(call('ZSCORE', K.retention, id) or NEVER * 1000) <= NOW + 1000}
  local found = {facts, listed(id), places(id), indexed(id), executions(id, job and job.attempt or RECENT), logged(id), results(id),
    callback(job)}
  answers[#answers + 1] = {cjson.encode(found), call('HGET', K.job .. id, 'log')}
end
return answers
