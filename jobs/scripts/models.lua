#!lua flags=no-writes,allow-oom
-- The cards of all models ever served. ARGV: ttl.
return call('HVALS', K.models)
