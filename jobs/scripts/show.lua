#!lua flags=allow-oom
-- The same for somebody outside, who is about to read the answer: from now on nobody starts it over. ARGV: ttl, id, number.
local id = ARGV[2]
local job = load(id)
if job and not is_final(job.state) and not job.read then call('HSET', K.job .. id, 'read', 1) end
return read_log(id, tonumber(ARGV[3]))
