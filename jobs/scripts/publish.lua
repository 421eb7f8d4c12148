#!lua flags=allow-oom
-- Append token events. ARGV: ttl, then of each job: id, attempt, number of the first, milliseconds since its first token was
-- drawn, how many, and of each event text, ids, index, logprobs. Answers a code for each job: 1 done, 5 done and somebody
-- reads along, 4 somebody cancelled it, 0 refused.
-- Refused unless the attempt is the job's; events that are there already are skipped. What somebody reads along is read.
-- A reaped attempt that nobody has claimed yet may still publish: its late result would count, too. Not one of a job that
-- ended since and that stock RQ queued again: its log is closed, and goes when it is claimed.
local codes, at = {}, 2
while at <= #ARGV do
  local id, attempt, first, age = ARGV[at], tonumber(ARGV[at + 1]), tonumber(ARGV[at + 2]), tonumber(ARGV[at + 3])
  local last = at + 4 + 4 * tonumber(ARGV[at + 4])
  local job = load(id)
  local code
  if not job or job.attempt ~= attempt then
    drop(id, attempt)
    code = 0
  elseif job.settled == attempt then
    code = 1
  elseif job.status ~= 'started' and (job.status ~= 'queued' or job.closed) then
    note_end(id, job)
    drop(id, attempt)
    code = 0
  elseif first > job.events then
    return hole(job, first)
  else
    local entries, change = read_events(job, attempt, first, age, at + 5, last)
    write_down(id, entries)
    if #change > 0 then call('HSET', K.job .. id, unpack(change)) end
    code = job.cancel_requested and 4 or job.watched and 5 or 1
  end
  codes[#codes + 1] = code
  at = last + 1
end
return codes
