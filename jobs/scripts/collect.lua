#!lua flags=allow-oom
-- Take callbacks that are due; whose courier says nothing of one for the lease is taken again. ARGV: ttl, lease in ms,
-- bound. Answers {id, attempt, attempts before it was last sent anew, job, url, type, second of the end} each.
local taken = {}
for _, callback in ipairs(call('ZRANGEBYSCORE', K.outbox, '-inf', NOW, 'LIMIT', 0, tonumber(ARGV[3]))) do
  local key = K.callback .. callback
  local state, before, job, url, kind, at = unpack(call('HMGET', key, 'state', 'before', 'job', 'url', 'type', 'at'))
  if state == 'pending' then
    call('ZADD', K.outbox, NOW + tonumber(ARGV[2]), callback)
    taken[#taken + 1] = {callback, call('HINCRBY', key, 'attempts', 1), before, job, url, kind, at}
  else
    call('ZREM', K.outbox, callback)
  end
end
return taken
