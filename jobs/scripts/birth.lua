#!lua flags=allow-oom
-- Give a worker its lease and show its card. ARGV: ttl, worker, lease in ms, card, model's name, model's card.
local worker = ARGV[2]
call('ZADD', K.leases, NOW + tonumber(ARGV[3]), worker)
call('ZREM', K.marks, worker)
call('HSET', K.card .. worker, 'card', ARGV[4])
call('HSETNX', K.card .. worker, 'started_at', NOW)
if ARGV[5] ~= '' then call('HSET', K.models, ARGV[5], ARGV[6]) end
return 1
