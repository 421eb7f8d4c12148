#!lua
-- Create a job, once. ARGV: ttl, id, kind, model, deadline in ms or '', max queued, whether memory is full (1 or 0),
-- whether to refuse what would be late (1 or 0), data, priority, then more fields of the hash.
-- Answers {1, created at, its deadline, ticket, what to take from that to have its position} when created, {0, job, data}
-- for a known id, and refused: {-1, queued, seconds to wait} the queue is full, {-2} memory is, {-3, seconds} its turn
-- comes too late.
local id, kind, model, deadline, limit, data = ARGV[2], ARGV[3], ARGV[4], tonumber(ARGV[5]), tonumber(ARGV[6]), ARGV[9]
local priority = tonumber(ARGV[10])
local class = CLASSES[class_of(priority)]
if call('EXISTS', K.job .. id) == 1 then
  call('INCR', K.repeats)
  return {0, read(id), call('HGET', K.job .. id, 'data')}
end
if ARGV[7] == '1' then return {-2, 0} end
local queued = count('queued')
if queued >= limit then
  local speed = rate()
  local seconds = speed > 0 and math.ceil((queued - limit + 1) / speed) or 120
  return {-1, queued, math.min(math.max(seconds, 1), 120)}
end
if ARGV[8] == '1' and deadline then
  local speed = rate() -- 0: nothing ended of late, so nobody knows, and a guess refuses nobody
  local ahead = math.max(0, queued - waiting_in(class_of(priority) + 1, #CLASSES))
  if speed > 0 and ahead / speed * 1000 > deadline then return {-3, math.ceil(ahead / speed)} end
end
local at, ticket = stamp(), call('INCR', class.tickets)
call('DEL', K.events .. id) -- a forgotten job of that name was still read
call('HSET', K.job .. id, 'status', 'queued', 'data', data, 'kind', kind, 'place', 'queued', 'created_at', at,
  'enqueued_at', at, 'ticket', ticket, unpack(ARGV, 11))
if model ~= '' then call('HSET', K.job .. id, 'model', model) end
if priority ~= 0 then call('HSET', K.job .. id, 'priority', priority) end
if deadline then
  call('HSET', K.job .. id, 'deadline_at', NOW + deadline, 'deadline_in', deadline)
  call('ZADD', K.deadlines, NOW + deadline, id)
end
call('ZADD', K.index .. kind .. ':queued', NOW_US, id)
call('SADD', K.queues, class.list)
call('RPUSH', class.list, id)
wake(K.wake)
return {1, at, deadline and NOW + deadline or false, ticket, before_first(class_of(priority))}
