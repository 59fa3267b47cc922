-- Forget the words of a closed generation; the tombstone says that it was, and how it ended.
-- KEYS order, log, leases     ARGV order_ms
local status = redis.call('HGET', KEYS[1], 'status')
if not status then return 'GONE' end
if not TERMINAL[status] then return 'OPEN' end
redis.call('DEL', KEYS[2])
redis.call('HDEL', KEYS[1], 'prompt', 'metadata', 'options')
redis.call('HSET', KEYS[1], 'deleted', '1')
redis.call('PEXPIRE', KEYS[1], ARGV[1])
return 'ERASED'
