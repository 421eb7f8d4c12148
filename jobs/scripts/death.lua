#!lua flags=allow-oom
-- A worker leaves. ARGV: ttl, worker. What it should still hold is for the next reap, at once. Answers 1, or 0 then.
local worker = ARGV[2]
if call('EXISTS', K.held .. worker) == 1 then
  call('ZADD', K.leases, 0, worker)
  return 0
end
call('ZREM', K.leases, worker)
call('ZREM', K.marks, worker)
call('DEL', K.card .. worker)
if call('GET', K.hold) == worker then call('DEL', K.hold) end
return 1
