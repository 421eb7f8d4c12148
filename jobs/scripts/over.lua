#!lua flags=no-writes,allow-oom
-- Which of these jobs have ended, or are unknown. ARGV: ttl, ids.
local over = {}
for i = 2, #ARGV do
  local status = call('HGET', K.job .. ARGV[i], 'status')
  if not status or is_final(state_of(status)) then over[#over + 1] = ARGV[i] end
end
return over
