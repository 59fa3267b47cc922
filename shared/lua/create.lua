-- KEYS order, log, leases
-- ARGV id, channel, request hash, head of generation.queued, claim_grace_ms, max_queue_ms, alive_ms, abandon_ms ('' = never), field, value, …
local order, log, leases = KEYS[1], KEYS[2], KEYS[3]
local id, channel, hash, head = ARGV[1], ARGV[2], ARGV[3], ARGV[4]

if redis.call('EXISTS', order) == 1 then
  local found = redis.call('HMGET', order, 'hash', 'deleted')
  return { 'EXISTS', found[1], found[2] or '' }
end

local now = now_ms()
local alive_ms, queue_until = ARGV[7], now + tonumber(ARGV[6])
redis.call('HSET', order, 'hash', hash, 'created', int(now), 'touched', int(now), 'status', 'queued', 'nonce', '',
  'epoch', '0', 'attempts', '0', 'charged', '0', 'releases', '0', 'misses', '0', 'hints', '1',
  'queue_until', int(queue_until), 'server', server_run())
redis.call('HSET', order, unpack(ARGV, 9))
if ARGV[8] ~= '' then redis.call('HSET', order, 'attended_until', int(now + tonumber(ARGV[8])), 'grace', ARGV[8]) end
local event = head .. ',"created_at":' .. int(now) .. '}'
redis.call('DEL', log)
redis.call('XADD', log, '0-1', 'data', event)
redis.call('PEXPIRE', order, alive_ms)
redis.call('PEXPIRE', log, alive_ms)
redis.call('ZADD', leases, int(math.min(now + tonumber(ARGV[5]), queue_until)), id) -- the queued lease: a lost hint is sent again
push(channel, id, '0-0', { '0-1 ' .. event })
return { 'CREATED', int(now) }
