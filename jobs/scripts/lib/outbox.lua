-- The outbox: a callback for each end of a job whose submitter wants to be told. Its record goes with the job, but not
-- before it is delivered or given up.

-- The job ended: somebody is to be told, once for this end.
local function call_back(id, job)
  if not job.webhook then return end
  job.callback = 'evt_' .. string.sub(redis.sha1hex(id .. ':' .. NOW_US), 1, 32)
  call('HSET', K.job .. id, 'callback', job.callback)
  call('HSET', K.callback .. job.callback, 'job', id, 'url', job.webhook, 'type', 'job.' .. job.state, 'at', SECONDS,
    'state', 'pending', 'attempts', 0, 'before', 0)
  call('ZADD', K.outbox, NOW, job.callback)
end

-- That end is over, or the job is no more: what is still to be delivered is.
local function let_go(id, job)
  if not job.callback then return end
  if call('HGET', K.callback .. job.callback, 'state') ~= 'pending' then call('DEL', K.callback .. job.callback) end
  call('HDEL', K.job .. id, 'callback')
  job.callback = false
end

-- Nothing more is tried, for 'delivered' or 'failed': the record stays for as long as the job.
local function conclude(callback, state, problem)
  local key = K.callback .. callback
  local id = call('HGET', key, 'job')
  call('ZREM', K.outbox, callback)
  call('HINCRBY', K.deliveries, state, 1)
  if not id or call('HGET', K.job .. id, 'callback') ~= callback then return call('DEL', key) end
  call('HSET', key, 'state', state)
  if problem then call('HSET', key, 'error', problem) else call('HDEL', key, 'error') end
  local left = call('PTTL', K.job .. id)
  if left > 0 then call('PEXPIRE', key, left + 60000) end
end

-- A doctor's: an ended job has a callback, which is in the outbox while it is to be delivered.
local function mend_callback(id, job)
  local state = job.callback and call('HGET', K.callback .. job.callback, 'state')
  if not state then
    call_back(id, job)
  elseif state == 'pending' then
    call('ZADD', K.outbox, 'NX', NOW, job.callback)
  else
    call('ZREM', K.outbox, job.callback)
  end
end
