#!lua flags=allow-oom
-- End queued jobs whose deadline has passed, and forget ended jobs whose time is over. ARGV: ttl, bound.
-- Answers {expired, forgotten, more}.
local bound = tonumber(ARGV[2])
local due = call('ZRANGEBYSCORE', K.deadlines, '-inf', NOW, 'LIMIT', 0, bound)
local expired = 0
for _, id in ipairs(due) do
  local job = load(id)
  call('ZREM', K.deadlines, id)
  if job and job.state == 'queued' then
    expire(id, job)
    expired = expired + 1
  elseif job then
    note_end(id, job)
  end
end
local old = call('ZRANGEBYSCORE', K.retention, '-inf', NOW, 'LIMIT', 0, bound)
local forgotten = 0
for _, id in ipairs(old) do
  local job = load(id)
  call('ZREM', K.retention, id)
  if job and not is_final(job.state) then
    if job.closed then reopen(id, job) end -- `rq requeue` leaves the old expiry on: the job would vanish
  else
    if job then forget(id, job) end
    unlist(id)
    for _, kind in ipairs(KINDS) do -- the hash may be gone, and with it what it was
      for _, state in ipairs(STATES) do call('ZREM', K.index .. kind .. ':' .. state, id) end
    end
    call('DEL', K.events .. id)
    forgotten = forgotten + 1
  end
end
return {expired, forgotten, (#due == bound or #old == bound) and 1 or 0}
