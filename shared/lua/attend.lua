-- Somebody is reading a generation that is to end when nobody does.
-- KEYS order     ARGV grace_ms
local o = redis.call('HMGET', KEYS[1], 'status', 'attended_until')
if not o[1] or TERMINAL[o[1]] or not o[2] then return 0 end
redis.call('HSET', KEYS[1], 'attended_until', int(now_ms() + tonumber(ARGV[1])))
return 1
