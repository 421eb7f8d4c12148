#!lua flags=no-writes,allow-oom
-- A job's log from a number on, as read_log answers it. ARGV: ttl, id, number.
return read_log(ARGV[2], tonumber(ARGV[3]))
