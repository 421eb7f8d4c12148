#!lua flags=allow-oom
-- Queue the scheduled jobs that are due. ARGV: ttl, bound. Answers {promoted, more}.
local bound, promoted = tonumber(ARGV[2]), 0
local due = call('ZRANGEBYSCORE', K.scheduled, 0, SECONDS, 'LIMIT', 0, bound)
for _, id in ipairs(due) do
  local job = load(id)
  call('ZREM', K.scheduled, id)
  if job and job.status == 'scheduled' then
    call('HSET', K.job .. id, 'enqueued_at', stamp())
    requeue(id, job, call('HGET', K.job .. id, 'enqueue_at_front_on_retry') == '1' and 'front' or 'back')
    promoted = promoted + 1
  end
end
return {promoted, #due == bound and 1 or 0}
