-- A job's log: a stream while it runs; once it has ended, one packed field of its hash (jobs/logs.py reads both).

local PIECE = 4096 -- events packed in one call

-- Append event number job.events; the caller writes job.events to the hash.
local function log(id, job, ...)
  call('XADD', K.events .. id, (job.events + 1) .. '-0', ...)
  job.events = job.events + 1
end

-- Append the token events from ARGV[at] to ARGV[last], of each its text, ids, index and log-probabilities; the first has the
-- number `first`, and what is there already is skipped. The attempt's first token was drawn `age` ms ago. What somebody reads
-- along is read. Answers what the caller writes to the hash, if there is anything.
local function append(id, job, attempt, first, age, at, last)
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
  local change = {'events', job.events, 'tokens', job.tokens + tokens, 'text_bytes', job.text_bytes + bytes,
    'published_attempt', attempt}
  local function set(name, value) change[#change + 1] = name; change[#change + 1] = value end
  if job.tokens == 0 then
    set('first_token', first_token)
    set('first_token_at', string.format('%.3f', NOW_US / 1000 - age))
  end
  if job.watched then set('read', 1) end
  job.tokens, job.text_bytes = job.tokens + tokens, job.text_bytes + bytes
  return change
end

-- A bug of ours, or a server that lost what it had said was written.
local function hole(job, first)
  return redis.error_reply('ERR headrace: event ' .. first .. ' leaves a hole after ' .. job.events)
end

-- Numbers, a space between them, each as a varint; and how many they are.
local function varints(numbers)
  local pieces, bytes, length, count = {}, {}, 0, 0
  for digits in string.gmatch(numbers, '%d+') do
    local number = tonumber(digits)
    while number >= 128 do
      length = length + 1
      bytes[length] = number % 128 + 128
      number = math.floor(number / 128)
    end
    length, count = length + 1, count + 1
    bytes[length] = number
    if length > 1000 then
      pieces[#pieces + 1], bytes, length = string.char(unpack(bytes)), {}, 0
    end
  end
  return table.concat(pieces) .. string.char(unpack(bytes)), count
end

local function varint(number) return (varints(string.format('%d', number))) end

-- One entry of the stream, packed: the length of its text times 4, plus what it is: 0 a token with one id, of the first
-- choice and without log-probabilities, 1 any other token event, 2 started, 3 finished.
local function pack(fields, inline)
  if fields[1] == 'f' then return varint(3) end
  if fields[1] == 'a' then return varint(4 * #fields[4] + 2) .. varint(tonumber(fields[2])) .. fields[4] end
  local text = fields[2]
  local body = inline and text or ''
  if #fields == 4 and fields[3] == 'i' and not string.find(fields[4], ' ', 1, true) then
    return varint(4 * #text) .. varint(tonumber(fields[4])) .. body
  end
  local ids, count, index, logprobs = '', 0, 0, ''
  for i = 3, #fields, 2 do
    local name, value = fields[i], fields[i + 1]
    if name == 'x' then index = tonumber(value) end
    if name == 'l' then logprobs = value end
    if name == 'i' then ids, count = varints(value) end
  end
  return varint(4 * #text + 1) .. varint(index) .. varint(count) .. ids .. varint(#logprobs) .. logprobs .. body
end

-- Pack these events behind what is packed already. What does not fit in a call stays in the stream, and the id is noted.
-- Where the job is `followed` the last event stays there for a moment: it wakes those who read, and its number tells them
-- what they missed.
local function pack_events(id, entries, packed, inline, followed)
  local key, parts, last = K.events .. id, {packed}, entries[#entries]
  for _, entry in ipairs(entries) do parts[#parts + 1] = pack(entry[2], inline) end
  call('HSET', K.job .. id, 'log', table.concat(parts))
  if last[2][1] ~= 'f' then
    call('XTRIM', key, 'MINID', (tonumber(string.match(last[1], '^%d+')) + 1) .. '-0')
    call('SADD', K.unpacked, id)
    return false
  end
  call('DEL', key)
  if followed then
    call('XADD', key, last[1], 'f', 1)
    call('PEXPIRE', key, 2000)
  end
  return true
end

local function next_events(id) return call('XRANGE', K.events .. id, '-', '+', 'COUNT', PIECE) end

-- Pack the first PIECE events of a job that has just ended. Texts go along (`inline`) unless the result has them, every byte.
-- Answers whether that was all.
local function pack_log(id, job, inline)
  local entries = next_events(id)
  local head = (inline and 'I' or 'R') .. varint(tonumber(string.match(entries[1][1], '^%d+')) - 1)
  return pack_events(id, entries, head, inline, job.watched)
end

-- Pack the next ones of a long log.
local function pack_more(id)
  local entries = next_events(id)
  local packed = call('HGET', K.job .. id, 'log')
  if not packed or #entries == 0 or pack_events(id, entries, packed, string.sub(packed, 1, 1) == 'I', true) then
    call('SREM', K.unpacked, id)
  end
end

-- What reading a log takes: the packed part, the value that may hold its texts, and the stream's entries from a number on.
local function read_log(id, number)
  local packed = call('HGET', K.job .. id, 'log')
  local value = false
  if packed and string.sub(packed, 1, 1) == 'R' then
    local last = call('XREVRANGE', K.results .. id, '+', '-', 'COUNT', 1)[1]
    for i = 1, last and #last[2] or 0, 2 do
      if last[2][i] == 'return_value' then value = last[2][i + 1] end
    end
  end
  return {packed, value, call('XRANGE', K.events .. id, (number + 1) .. '-0', '+')}
end

-- Take an answer back to before its first token: the numbers of its events start there again. Nobody has read them.
local function start_over(id, job)
  local kept = call('XRANGE', K.events .. id, '-', job.first_token .. '-0')
  call('DEL', K.events .. id)
  for _, entry in ipairs(kept) do call('XADD', K.events .. id, entry[1], unpack(entry[2])) end
  job.events, job.tokens, job.text_bytes = job.first_token, 0, 0
  call('HSET', K.job .. id, 'events', job.events, 'tokens', 0, 'text_bytes', 0)
  call('HDEL', K.job .. id, 'first_token_at')
end
