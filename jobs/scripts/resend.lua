#!lua flags=allow-oom
-- Deliver an ended job's callback anew: at once, under its id, with as many tries as a fresh one. ARGV: ttl, id.
-- Answers {1, job}, {0} unknown, {-1, job} there is nothing to send.
local id = ARGV[2]
local job = load(id)
if not job then return {0} end
note_end(id, job)
local attempts = is_final(job.state) and job.callback and call('HGET', K.callback .. job.callback, 'attempts')
if not attempts then return {-1, read(id)} end
call('HSET', K.callback .. job.callback, 'state', 'pending', 'before', attempts)
call('PERSIST', K.callback .. job.callback)
call('ZADD', K.outbox, NOW, job.callback)
return {1, read(id)}
