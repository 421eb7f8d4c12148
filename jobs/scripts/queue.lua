#!lua flags=no-writes,allow-oom
-- The queue at a glance. ARGV: ttl. Answers {completions per second, suspects, jobs in each of STATES …}.
local report = {string.format('%.6f', rate()), call('LLEN', K.suspects)}
for _, state in ipairs(STATES) do report[#report + 1] = count(state) end
return report
