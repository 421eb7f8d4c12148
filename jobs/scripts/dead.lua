#!lua flags=allow-oom
-- A page of dead letters, newest first. ARGV: ttl, after ('' for the first page), limit.
-- Answers {found, jobs, more}; found is 0 when `after` is no dead letter. What `rq requeue` or a deletion took out of
-- RQ's registry without telling us is dropped here, so a page may be short and still have more behind it.
local after, limit, first = ARGV[2], tonumber(ARGV[3]), 0
if after ~= '' then
  local rank = call('ZREVRANK', K.dead, after)
  if not rank then return {0, {}, 0} end
  first = rank + 1
end
local ids = call('ZRANGE', K.dead, first, first + 2 * limit, 'REV')
local jobs, stale, looked = {}, {}, 0
for _, id in ipairs(ids) do
  if #jobs == limit then break end
  looked = looked + 1
  local job = load(id)
  if job and job.state == 'failed' and job.reason == 'poison_job' then jobs[#jobs + 1] = read(id)
  else stale[#stale + 1] = id end
end
if #stale > 0 then call('ZREM', K.dead, unpack(stale)) end
return {1, jobs, (looked < #ids or #ids > 2 * limit) and 1 or 0}
