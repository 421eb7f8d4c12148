#!lua
-- Queue a failed job again, at the back, from its beginning; one that crashed its workers comes back as a suspect.
-- ARGV: ttl, id, perhaps 'dead': only a dead letter. Answers {1, job}, {0} unknown, {-1, job} not failed, or no such.
local id = ARGV[2]
local job = load(id)
if not job then return {0} end
if job.state ~= 'failed' or (ARGV[3] == 'dead' and job.reason ~= 'poison_job') then return {-1, read(id)} end
note_end(id, job)
reopen(id, job)
call('HSET', K.job .. id, 'started_at', '', 'ended_at', '', 'enqueued_at', stamp(), 'ticket', call('INCR', CLASSES[job.class].tickets))
requeue(id, job, job.crashes >= 2 and 'suspects' or 'back')
return {1, read(id)}
