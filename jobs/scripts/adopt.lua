#!lua flags=allow-oom
-- Note kind, model and priority of a job that stock RQ put in, as its first worker read them; route it when it is for
-- another model. ARGV: ttl, id, attempt, kind, model, priority, creation in microseconds, route (1 or 0). Answers 1, or
-- 0 when refused.
local id, attempt, kind, model, created = ARGV[2], tonumber(ARGV[3]), ARGV[4], ARGV[5], tonumber(ARGV[7])
local job = load(id)
if not job or job.attempt ~= attempt or job.status ~= 'started' then return 0 end
call('ZREM', K.index .. job.kind .. ':' .. job.place, id)
call('ZADD', K.index .. kind .. ':' .. job.place, created, id)
job.kind, job.model, job.class = kind, model, class_of(tonumber(ARGV[6]))
call('HSET', K.job .. id, 'kind', kind, 'model', model)
if ARGV[6] ~= '0' then call('HSET', K.job .. id, 'priority', ARGV[6]) end
if ARGV[8] == '1' then
  drop(id, attempt)
  put_back(id, job)
end
return 1
