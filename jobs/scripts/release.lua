#!lua flags=allow-oom
-- Hand a running job back to the front of the queue, with its tokens. ARGV: ttl, id, attempt. Answers 1, or 0: not ours.
local id, attempt = ARGV[2], tonumber(ARGV[3])
local job = load(id)
drop(id, attempt)
if not job or job.attempt ~= attempt or job.status ~= 'started' then return 0 end
put_back(id, job)
return 1
