#!lua flags=no-writes,allow-oom
-- Workers with a live lease. ARGV: ttl. Answers a list of {name, card, state, running, stats, started_at}.
local found = {}
for _, worker in ipairs(call('ZRANGEBYSCORE', K.leases, '(' .. string.format('%.0f', NOW), '+inf', 'LIMIT', 0, 10000)) do
  local row = call('HMGET', K.card .. worker, 'card', 'state', 'running', 'stats', 'started_at')
  if row[1] then found[#found + 1] = {worker, row[1], row[2], row[3], row[4], row[5]} end
end
return found
