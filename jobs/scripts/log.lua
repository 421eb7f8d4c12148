#!lua flags=no-writes,allow-oom
-- A job's events from a number on. ARGV: ttl, id, number. Answers stream entries.
return call('XRANGE', K.events .. ARGV[2], (tonumber(ARGV[3]) + 1) .. '-0', '+')
