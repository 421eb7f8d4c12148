#!lua flags=allow-oom
-- End a queued job, or ask the worker of a running one to. ARGV: ttl, id.
-- Answers {1, job}, {0} unknown, {-1, job} ended before. The id stays in its list until a claim drops it.
local id = ARGV[2]
local job = load(id)
if not job then return {0} end
if is_final(job.state) then
  note_end(id, job)
  return {-1, read(id)}
end
if job.state == 'running' then
  call('HSET', K.job .. id, 'cancel_requested', 1)
  local message = cjson.encode({command = 'stop-job', job_id = id})
  if job.worker_name then call('PUBLISH', K.pubsub .. job.worker_name, message) end
else
  finish(id, job, 'cancelled')
end
return {1, read(id)}
