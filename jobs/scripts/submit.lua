#!lua
-- Create a job, once. ARGV: ttl, id, kind, model, deadline in ms or '', max queued, data, then more fields of the hash.
-- Answers {1, job} when created, {0, job, data} for a known id, {-1, queued, seconds to wait} when the queue is full.
local id, kind, model, deadline, limit, data = ARGV[2], ARGV[3], ARGV[4], tonumber(ARGV[5]), tonumber(ARGV[6]), ARGV[7]
if call('EXISTS', K.job .. id) == 1 then
  call('INCR', K.repeats)
  return {0, read(id), call('HGET', K.job .. id, 'data')}
end
local queued = count('queued')
if queued >= limit then
  local speed = rate()
  local seconds = speed > 0 and math.ceil((queued - limit + 1) / speed) or 120
  return {-1, queued, math.min(math.max(seconds, 1), 120)}
end
local at = stamp()
call('HSET', K.job .. id, 'status', 'queued', 'data', data, 'kind', kind, 'place', 'queued', 'created_at', at,
  'enqueued_at', at, 'ticket', call('INCR', K.tickets), unpack(ARGV, 8))
if model ~= '' then call('HSET', K.job .. id, 'model', model) end
if deadline then
  call('HSET', K.job .. id, 'deadline_at', NOW + deadline, 'deadline_in', deadline)
  call('ZADD', K.deadlines, NOW + deadline, id)
end
call('ZADD', K.index .. kind .. ':queued', NOW_US, id)
call('SADD', K.queues, K.ready)
call('RPUSH', K.ready, id)
wake(K.wake)
return {1, read(id)}
