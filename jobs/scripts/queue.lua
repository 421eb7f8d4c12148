#!lua flags=no-writes,allow-oom
-- The queue at a glance. ARGV: ttl. Answers {completions per second, suspects, dead letters, jobs in each of
-- STATES …}.
local suspects = call('LLEN', K.suspects)
for _, model in ipairs(call('HKEYS', K.models)) do
  suspects = suspects + call('LLEN', K.suspects .. '.' .. string.lower(model))
end
local report = {string.format('%.6f', rate()), suspects, call('ZCARD', K.dead)}
for _, state in ipairs(STATES) do report[#report + 1] = count(state) end
return report
