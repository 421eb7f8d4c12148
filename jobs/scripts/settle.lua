#!lua flags=allow-oom
-- End an attempt. ARGV: ttl, id, attempt, outcome, permanent (1 or 0), return value, error, RQ's exc_string ('' for none),
-- bytes of the value's texts, and where there are last events: the number of the first, and the rest as in publish.lua.
-- Answers 1 done, 3 done and others depend on it, 2 was done before, 0 refused: not the job's attempt.
local id, attempt, outcome, permanent, first = ARGV[2], tonumber(ARGV[3]), ARGV[4], ARGV[5] == '1', tonumber(ARGV[10] or 0)
local function given(i) return ARGV[i] ~= '' and ARGV[i] or nil end
local job = load(id)
if not job or job.attempt ~= attempt then
  drop(id, attempt)
  return 0
end
if job.settled == attempt then return 2 end
-- Reaped and not claimed again: a late result still counts, and saves computing it twice. Its id falls out at a claim.
local late = job.status == 'queued' and not job.closed and outcome == 'succeeded'
if job.status ~= 'started' and not late then
  note_end(id, job)
  drop(id, attempt)
  return 0
end
if first > job.events then return hole(job, first) end
local tail, change = {}, {}
if ARGV[10] then tail, change = read_events(job, attempt, first, tonumber(ARGV[11]), 12, #ARGV) end
drop(id, attempt, job.worker_name)
local key = K.job .. id
local retries = outcome == 'failed' and not permanent and tonumber(call('HGET', key, 'retries_left') or 0) or 0
if retries > 0 and not job.cancel_requested then -- what the submitter asked RQ for
  write_down(id, tail)
  local intervals = cjson.decode(call('HGET', key, 'retry_intervals') or '[0]')
  local seconds = tonumber(intervals[math.max(#intervals - retries, 0) + 1] or 0)
  call('HSET', key, 'retries_left', retries - 1, 'ended_at', stamp(), 'settled', attempt, unpack(change))
  if seconds > 0 then
    move(id, job, 'queued')
    call('HSET', key, 'status', 'scheduled', 'place', 'queued')
    call('HDEL', key, 'worker_name')
    call('ZADD', K.scheduled, SECONDS + seconds, id)
    if job.deadline_at then call('ZADD', K.deadlines, job.deadline_at, id) end
  else
    requeue(id, job, call('HGET', key, 'enqueue_at_front_on_retry') == '1' and 'front' or 'back')
  end
  return 1
end
local how = {value = given(6), error = given(7), exc = given(8), text_bytes = tonumber(given(9)), attempt = attempt,
  claimed = not late, tail = tail, change = change}
if outcome == 'expired' then how.reason, how.exc = 'deadline', EXC.deadline end
if outcome == 'cancelled' and not job.cancel_requested then how.status = 'stopped' end -- RQ's send_stop_job_command
return finish(id, job, outcome, how) and 3 or 1
