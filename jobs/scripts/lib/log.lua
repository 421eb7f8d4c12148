-- A job's log: a stream while it runs; once it has ended, one packed field of its hash (jobs/logs.py reads both).

local PIECE = 4096 -- events packed in one call

-- Event number job.events, as it is in the stream; the caller writes job.events to the hash.
local function event(job, fields)
  job.events = job.events + 1
  return {job.events .. '-0', fields}
end

local function write_down(id, entries)
  for _, entry in ipairs(entries) do call('XADD', K.events .. id, entry[1], unpack(entry[2])) end
end

-- How many token ids these are: behind a byte that says how many each takes, the numbers, the least byte first.
local function count_ids(ids) return ids == '' and 0 or (#ids - 1) / string.byte(ids) end

-- The token events from ARGV[at] to ARGV[last], of each its text, ids, index and log-probabilities, as entries behind the
-- log; the first has the number `first`, and what is there already is left out. The attempt's first token was drawn `age` ms
-- ago. What somebody reads along is read. Answers also what the caller writes to the hash.
local function read_events(job, attempt, first, age, at, last)
  local entries, number, tokens, bytes, first_token = {}, first, 0, 0, nil
  for i = at, last, 4 do
    if number >= job.events then
      local text, ids, index, logprobs = ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3]
      local fields = {'t', text}
      if ids ~= '' then
        fields[3], fields[4] = 'i', ids
        tokens = tokens + count_ids(ids)
      end
      if index ~= '0' then fields[#fields + 1] = 'x'; fields[#fields + 1] = index end
      if logprobs ~= '' then fields[#fields + 1] = 'l'; fields[#fields + 1] = logprobs end
      first_token, bytes = first_token or number, bytes + #text
      entries[#entries + 1] = event(job, fields)
    end
    number = number + 1
  end
  if not first_token then return {}, {} end
  local change = {'events', job.events, 'tokens', job.tokens + tokens, 'text_bytes', job.text_bytes + bytes,
    'published_attempt', attempt}
  local function set(name, value) change[#change + 1] = name; change[#change + 1] = value end
  if job.tokens == 0 then
    set('first_token', first_token)
    set('first_token_at', string.format('%.3f', NOW_US / 1000 - age))
  end
  if job.watched then set('read', 1) end
  job.tokens, job.text_bytes = job.tokens + tokens, job.text_bytes + bytes
  return entries, change
end

-- A bug of ours, or a server that lost what it had said was written.
local function hole(job, first)
  return redis.error_reply('ERR headrace: event ' .. first .. ' leaves a hole after ' .. job.events)
end

-- A number as LEB128.
local function varint(number)
  if number < 128 then return string.char(number) end
  return string.char(number % 128 + 128) .. varint(math.floor(number / 128))
end

local function the_id(ids)
  local a, b, c, d = string.byte(ids, 2, 5)
  return a + 256 * b + 65536 * (c or 0) + 16777216 * (d or 0)
end

-- One entry of the stream, packed: the length of its text times 4, plus what it is: 0 a token with one id, of the first
-- choice and without log-probabilities, 1 any other token event, 2 started, 3 finished.
local function pack(fields, inline)
  if fields[1] == 'f' then return varint(3) end
  if fields[1] == 'a' then return varint(4 * #fields[4] + 2) .. varint(tonumber(fields[2])) .. fields[4] end
  local text = fields[2]
  local body = inline and text or ''
  if #fields == 4 and fields[3] == 'i' and count_ids(fields[4]) == 1 then
    return varint(4 * #text) .. varint(the_id(fields[4])) .. body
  end
  local ids, index, logprobs = '', 0, ''
  for i = 3, #fields, 2 do
    local name, value = fields[i], fields[i + 1]
    if name == 'x' then index = tonumber(value) end
    if name == 'l' then logprobs = value end
    if name == 'i' then ids = value end
  end
  return varint(4 * #text + 1) .. varint(index) .. varint(#ids) .. ids .. varint(#logprobs) .. logprobs .. body
end

-- These events behind what is packed already, which says whether texts go along.
local function pack_behind(packed, entries)
  local parts, inline = {packed}, string.sub(packed, 1, 1) == 'I'
  for _, entry in ipairs(entries) do parts[#parts + 1] = pack(entry[2], inline) end
  return table.concat(parts)
end

-- What is packed up to `last` goes from the stream. Answers whether that is the end: else the id is noted.
-- Where the job is `followed` the last event stays there for a moment: it wakes those who read, and its number tells them
-- what they missed.
local function cut(id, last, followed)
  local key = K.events .. id
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

-- Pack the log of a job that has just ended: what of it is in the stream, and its `tail`, which need not go there; of a long
-- one the first PIECE events. Texts go along (`inline`) unless the result has them, every byte. Answers what the caller writes to
-- the hash, and whether that was all.
local function pack_log(id, job, tail, inline)
  local entries = next_events(id)
  if #entries < PIECE then
    for _, entry in ipairs(tail) do entries[#entries + 1] = entry end
  else
    write_down(id, tail)
  end
  local head = (inline and 'I' or 'R') .. varint(tonumber(string.match(entries[1][1], '^%d+')) - 1)
  return pack_behind(head, entries), cut(id, entries[#entries], job.watched)
end

-- Pack the next ones of a long log.
local function pack_more(id)
  local entries, key = next_events(id), K.job .. id
  local packed = call('HGET', key, 'log')
  if packed and #entries > 0 then
    call('HSET', key, 'log', pack_behind(packed, entries))
    if not cut(id, entries[#entries], true) then return end
  end
  call('SREM', K.unpacked, id)
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
