#!lua flags=allow-oom
-- Append token events. ARGV: ttl, id, attempt, number of the first, then text, ids, index, logprobs of each.
-- Refused (0) unless the attempt is the job's; events that are there already are skipped. 4: somebody cancelled it.
-- A reaped attempt that nobody has claimed yet may still publish: its late result would count, too.
local id, attempt, first = ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local job = load(id)
if not job or job.attempt ~= attempt then
  drop(id, attempt)
  return 0
end
if job.settled == attempt then return 1 end
if job.status ~= 'started' and job.status ~= 'queued' then
  note_end(id, job)
  drop(id, attempt)
  return 0
end
if first > job.events then return redis.error_reply('ERR headrace: event ' .. first .. ' leaves a hole after ' .. job.events) end
local number, tokens = first, 0
for i = 5, #ARGV, 4 do
  if number >= job.events then
    local text, ids, index, logprobs = ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3]
    local entry = {'t', text}
    if ids ~= '' then
      entry[3], entry[4] = 'i', ids
      local _, spaces = string.gsub(ids, ' ', '')
      tokens = tokens + spaces + 1
    end
    if index ~= '0' then entry[#entry + 1] = 'x'; entry[#entry + 1] = index end
    if logprobs ~= '' then entry[#entry + 1] = 'l'; entry[#entry + 1] = logprobs end
    log(id, job, unpack(entry))
  end
  number = number + 1
end
if tokens > 0 then
  call('HSET', K.job .. id, 'events', job.events, 'tokens', job.tokens + tokens, 'published_attempt', attempt)
  call('HSETNX', K.job .. id, 'first_token_at', string.format('%.3f', NOW_US / 1000))
else
  call('HSET', K.job .. id, 'events', job.events)
end
return job.cancel_requested and 4 or 1
