#!lua flags=allow-oom
-- Append token events. ARGV: ttl, id, attempt, number of the first, then text, ids, index, logprobs of each.
-- Refused (0) unless the attempt is the job's; events that are there already are skipped. 4: somebody cancelled it;
-- 5: nobody did, and somebody reads along.
-- A reaped attempt that nobody has claimed yet may still publish: its late result would count, too. Not one of a job that
-- ended since and that stock RQ queued again: its log is closed, and goes when it is claimed.
local id, attempt, first = ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local job = load(id)
if not job or job.attempt ~= attempt then
  drop(id, attempt)
  return 0
end
if job.settled == attempt then return 1 end
if job.status ~= 'started' and (job.status ~= 'queued' or job.closed) then
  note_end(id, job)
  drop(id, attempt)
  return 0
end
if first > job.events then return redis.error_reply('ERR headrace: event ' .. first .. ' leaves a hole after ' .. job.events) end
local number, tokens, bytes, first_token = first, 0, 0, nil
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
    first_token, bytes = first_token or number, bytes + #text
    log(id, job, unpack(entry))
  end
  number = number + 1
end
if first_token then
  call('HSET', K.job .. id, 'events', job.events, 'tokens', job.tokens + tokens, 'text_bytes', job.text_bytes + bytes)
  if job.tokens == 0 then
    call('HSET', K.job .. id, 'first_token', first_token, 'first_token_at', string.format('%.3f', NOW_US / 1000))
  end
  if job.published_attempt ~= attempt then call('HSET', K.job .. id, 'published_attempt', attempt) end
end
if job.cancel_requested then return 4 end
return job.watched and 5 or 1
