#!lua flags=allow-oom
-- End queued jobs whose deadline has passed or that waited too long for the like of their engine, forget ended jobs
-- whose time is over, give up callbacks that no courier came for, and finish packing long logs. ARGV: ttl, bound. Answers {done, more}.
local bound, done = tonumber(ARGV[2]), 0
local UNSENT = 7 * 86400000 -- milliseconds
local LOST = '{"code":"engine_changed","message":"engine %s began this answer and no worker of its kind came back in '
  .. 'time; retry the job to start it again","param":null}'
local due = call('ZRANGEBYSCORE', K.deadlines, '-inf', NOW, 'LIMIT', 0, bound)
for _, id in ipairs(due) do
  local job = load(id)
  call('ZREM', K.deadlines, id)
  if job and job.state == 'queued' then
    expire(id, job)
    done = done + 1
  elseif job then
    note_end(id, job)
  end
end
local waited = call('ZRANGEBYSCORE', K.waits, '-inf', NOW, 'LIMIT', 0, bound)
for _, id in ipairs(waited) do
  local job = load(id)
  call('ZREM', K.waits, id)
  if job and job.state == 'queued' and job.waiting_for then
    call('LREM', like_list(job), 1, id) -- near the head: a retry queues it elsewhere, and it waits once
    finish(id, job, 'failed', {reason = 'engine_changed', error = string.format(LOST, job.engine), exc = EXC.engine})
    done = done + 1
  end
end
local old = call('ZRANGEBYSCORE', K.retention, '-inf', NOW, 'LIMIT', 0, bound)
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
    done = done + 1
  end
end
local unsent = call('ZRANGEBYSCORE', K.outbox, '-inf', NOW - UNSENT, 'LIMIT', 0, bound)
for _, callback in ipairs(unsent) do conclude(callback, 'failed', 'nobody came to deliver it') end
local left = call('SRANDMEMBER', K.unpacked, 4)
for _, id in ipairs(left) do pack_more(id) end
return {done, (#due == bound or #waited == bound or #old == bound or #unsent == bound or #left > 0) and 1 or 0}
