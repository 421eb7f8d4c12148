#!lua flags=no-writes,allow-oom
-- One job, as a poll answers it. ARGV: ttl, id.
return read(ARGV[2])
