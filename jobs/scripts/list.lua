#!lua flags=no-writes,allow-oom
-- A page of jobs, newest first. ARGV: ttl, after ('' for the first page), limit, then kind:state of each index to merge.
-- Answers {found, jobs, ids whose index entry is stale}; found is 0 when `after` is unknown.
local after, limit = ARGV[2], tonumber(ARGV[3])
local home, last = nil, nil
if after ~= '' then
  local kind, place = unpack(call('HMGET', K.job .. after, 'kind', 'place'))
  home = place and (kind or 'generate') .. ':' .. place
  last = home and tonumber(call('ZSCORE', K.index .. home, after) or nil)
  if not last then return {0} end
end
local found = {}
for i = 4, #ARGV do
  local key, state, first = K.index .. ARGV[i], string.match(ARGV[i], ':(.*)$'), 0
  if last then -- by rank where `after` stands, by score elsewhere: nothing comes twice, however alike the times are
    first = ARGV[i] == home and call('ZREVRANK', key, after) + 1
      or call('ZCOUNT', key, '(' .. string.format('%.17g', last), '+inf')
  end
  local ids = call('ZRANGE', key, first, first + 2 * limit - 1, 'REV', 'WITHSCORES')
  for j = 1, #ids, 2 do
    local id, score = ids[j], tonumber(ids[j + 1])
    if not last or score < last or (score == last and id < after) then found[#found + 1] = {score, id, state} end
  end
end
table.sort(found, function(a, b) return a[1] > b[1] or (a[1] == b[1] and a[2] > b[2]) end)
local jobs, stale = {}, {}
for i = 1, math.min(limit, #found) do
  local id = found[i][2]
  local status, reason = unpack(call('HMGET', K.job .. id, 'status', 'reason'))
  if status and state_of(status, reason) == found[i][3] then
    jobs[#jobs + 1] = read(id)
  else
    stale[#stale + 1] = id
  end
end
return {1, jobs, stale}
