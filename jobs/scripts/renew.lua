#!lua flags=allow-oom
-- Renew a worker's lease and compare what it knows with what it holds.
-- ARGV: ttl, worker, lease in ms, state, stats, card, then id:attempt of each job it knows.
-- Answers {lost, cancels, suspended, unknown}.
local worker = ARGV[2]
local lost, cancels, unknown, known = {}, {}, {}, {}
call('ZADD', K.leases, NOW + tonumber(ARGV[3]), worker)
call('ZREM', K.marks, worker)
call('HSET', K.card .. worker, 'state', ARGV[4], 'stats', ARGV[5], 'running', #ARGV - 6)
if ARGV[6] ~= '' then -- swept while it was silent: back it is
  call('HSETNX', K.card .. worker, 'card', ARGV[6])
  call('HSETNX', K.card .. worker, 'started_at', NOW)
end
for i = 7, #ARGV do
  local id, attempt = string.match(ARGV[i], '^(.*):(%d+)$')
  known[ARGV[i]] = true
  local seen = call('HMGET', K.job .. id, 'status', 'attempt', 'cancel_requested') -- mostly that is all there is to know
  if seen[1] ~= 'started' or seen[2] ~= attempt then
    local job = load(id)
    if job then note_end(id, job) end
    drop(id, attempt, worker)
    lost[#lost + 1] = id
  elseif seen[3] then
    cancels[#cancels + 1] = id
  end
end
for _, member in ipairs(call('SMEMBERS', K.held .. worker)) do
  if not known[member] then unknown[#unknown + 1] = member end
end
return {lost, cancels, call('EXISTS', K.suspended), unknown}
