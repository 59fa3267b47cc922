-- Take back an order that nobody has claimed: too few replicas have it, or too many hints wait.
-- KEYS order, log, leases     ARGV id
local o = redis.call('HMGET', KEYS[1], 'attempts', 'status')
if o[1] and (o[1] ~= '0' or o[2] ~= 'queued') then return 'KEPT' end
redis.call('DEL', KEYS[1], KEYS[2])
redis.call('ZREM', KEYS[3], ARGV[1])
return 'RETRACTED'
