#!lua flags=no-writes,allow-oom
-- The queue at a glance. ARGV: ttl. Answers {completions per second, suspects, dead letters, callbacks that wait, were
-- delivered and given up, jobs in each of STATES …}.
local suspects = 0
for _, list in ipairs(call('SMEMBERS', K.queues)) do
  if list == K.suspects or string.sub(list, 1, #K.suspects + 1) == K.suspects .. '.' then
    suspects = suspects + call('LLEN', list)
  end
end
local report = {string.format('%.6f', rate()), suspects, call('ZCARD', K.dead), call('ZCARD', K.outbox)}
for _, state in ipairs({'delivered', 'failed'}) do report[#report + 1] = tonumber(call('HGET', K.deliveries, state) or 0) end
for _, state in ipairs(STATES) do report[#report + 1] = count(state) end
return report
