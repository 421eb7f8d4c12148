#!lua flags=allow-oom
-- A job's log from a number on, for somebody who reads along: what is published of it from now on is to come promptly, and
-- counts as read. What is there already does not: that is show's to say. ARGV: ttl, id, number.
local id = ARGV[2]
local job = load(id)
if job and not is_final(job.state) and not job.watched then
  call('HSET', K.job .. id, 'watched', 1)
  local came = call('ZSCORE', K.index .. job.kind .. ':running', id)
  local first = job.tokens == 0 and is_young(job, came) -- its worker hears of it from the first token's report
  if job.worker_name and not first then
    call('PUBLISH', K.pubsub .. job.worker_name, cjson.encode({command = 'follow-job', job_id = id}))
  end
end
return read_log(id, tonumber(ARGV[3]))
