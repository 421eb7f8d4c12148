#!lua flags=allow-oom
-- Note how an attempt to deliver a callback went. ARGV: ttl, callback, attempt, state ('delivered', 'failed', or
-- 'pending': it is tried again), problem, ms until then. Answers 1, or 0 when refused: another attempt is under way, or
-- it is over. A success counts whoever brings it.
local callback, attempt, state = ARGV[2], tonumber(ARGV[3]), ARGV[4]
local key = K.callback .. callback
local now, attempts = unpack(call('HMGET', key, 'state', 'attempts'))
if now ~= 'pending' or (state ~= 'delivered' and tonumber(attempts) ~= attempt) then return 0 end
if state == 'pending' then
  call('HSET', key, 'error', ARGV[5])
  call('ZADD', K.outbox, NOW + tonumber(ARGV[6]), callback)
else
  conclude(callback, state, state == 'failed' and ARGV[5])
end
return 1
