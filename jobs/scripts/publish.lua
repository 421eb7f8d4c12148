#!lua flags=allow-oom
-- Append token events. ARGV: ttl, then of each job: id, attempt, number of the first, how many, and of each event text, ids,
-- index, logprobs. Answers a code for each job: 1 done, 5 done and somebody reads along, 4 somebody cancelled it, 0 refused.
-- Refused unless the attempt is the job's; events that are there already are skipped. What somebody reads along is read.
-- A reaped attempt that nobody has claimed yet may still publish: its late result would count, too. Not one of a job that
-- ended since and that stock RQ queued again: its log is closed, and goes when it is claimed.

-- Append the events from ARGV[at] to ARGV[last].
local function append(id, job, attempt, first, at, last)
  local number, tokens, bytes, first_token = first, 0, 0, nil
  for i = at, last, 4 do
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
  if not first_token then return end
  call('HSET', K.job .. id, 'events', job.events, 'tokens', job.tokens + tokens, 'text_bytes', job.text_bytes + bytes)
  if job.tokens == 0 then
    call('HSET', K.job .. id, 'first_token', first_token, 'first_token_at', string.format('%.3f', NOW_US / 1000))
  end
  if job.published_attempt ~= attempt then call('HSET', K.job .. id, 'published_attempt', attempt) end
  if job.watched and not job.read then call('HSET', K.job .. id, 'read', 1) end
end

local codes, at = {}, 2
while at <= #ARGV do
  local id, attempt, first, count = ARGV[at], tonumber(ARGV[at + 1]), tonumber(ARGV[at + 2]), tonumber(ARGV[at + 3])
  local last = at + 3 + 4 * count
  local job = load(id)
  local code
  if not job or job.attempt ~= attempt then
    drop(id, attempt)
    code = 0
  elseif job.settled == attempt then
    code = 1
  elseif job.status ~= 'started' and (job.status ~= 'queued' or job.closed) then
    note_end(id, job)
    drop(id, attempt)
    code = 0
  elseif first > job.events then
    return redis.error_reply('ERR headrace: event ' .. first .. ' leaves a hole after ' .. job.events)
  else
    append(id, job, attempt, first, at + 4, last)
    code = job.cancel_requested and 4 or job.watched and 5 or 1
  end
  codes[#codes + 1] = code
  at = last + 1
end
return codes
