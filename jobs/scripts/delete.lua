#!lua flags=allow-oom
-- Forget an ended job. ARGV: ttl, id. Answers {1}, {0} unknown, {-1, job} not ended.
local id = ARGV[2]
local job = load(id)
if not job then return {0} end
if not is_final(job.state) then return {-1, read(id)} end
forget(id, job)
call('DEL', K.events .. id, K.job .. id .. ':dependents')
return {1}
