#!lua flags=allow-oom
-- Forget an ended job. ARGV: ttl, id, perhaps 'dead': only a dead letter. Answers {1}, {0} unknown, {-1, job} not ended,
-- or no such.
local id = ARGV[2]
local job = load(id)
if not job then return {0} end
local is_dead = job.state == 'failed' and job.reason == 'poison_job'
if not is_final(job.state) or (ARGV[3] == 'dead' and not is_dead) then return {-1, read(id)} end
forget(id, job)
call('DEL', K.events .. id, K.job .. id .. ':dependents')
return {1}
