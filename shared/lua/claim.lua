-- KEYS order, log, leases
-- ARGV id, channel, expected epoch, nonce, lease_ms, max_generation_ms, alive_ms, log_ms, order_ms, continues ('' = fresh)
local order, log, leases = KEYS[1], KEYS[2], KEYS[3]
local id, channel, nonce, continues = ARGV[1], ARGV[2], ARGV[4], ARGV[10]

local o = redis.call('HMGET', order, 'epoch', 'nonce', 'status', 'attempts', 'attended_until', 'deadline', 'model',
  'provider', 'prompt', 'touched')
if not o[1] then return { 'GONE' } end
local epoch, now = tonumber(o[1]), now_ms()
if o[2] == nonce then -- our own claim, whose reply was lost
  return { 'OK', o[1], o[4], o[7], o[8], o[9], int(tonumber(o[6]) - now) }
end
if TERMINAL[o[3]] or o[2] ~= '' or epoch ~= tonumber(ARGV[3]) then return { 'REFUSED' } end
local tail = tail_of(log)
if not tail then return { 'GONE' } end
if continues ~= '' and continues ~= tail then return { 'REFUSED' } end
if is_abandoned_by_now(order, leases, id, o[5], now) then
  terminate(order, log, leases, channel, id, epoch, 'cancelled', ABANDONED, now, ARGV[8], ARGV[9])
  return { 'ABANDONED' }
end
local deadline = number_or(o[6], now + tonumber(ARGV[6]))
if now > deadline then
  terminate(order, log, leases, channel, id, epoch, 'failed',
    failure('deadline_exceeded', 'the generation ran longer than REJOIN_MAX_GENERATION_SECONDS'), now, ARGV[8], ARGV[9])
  return { 'REFUSED' }
end

local claimed, attempt = next_epoch(epoch, now), tonumber(o[4]) + 1
local event = '{"type":"generation.started","attempt":' .. int(attempt) .. ',"provider":"' .. o[8] .. '"'
if continues == '' then
  event = event .. ',"mode":"fresh"}'
  redis.call('HSET', order, 'fresh', int(claimed))
else
  event = event .. ',"mode":"continued","continues":"' .. continues .. '"}'
end
local entry = int(claimed) .. '-0'
redis.call('XADD', log, entry, 'data', event)
redis.call('HSET', order, 'epoch', int(claimed), 'nonce', nonce, 'status', 'in_progress', 'attempts', int(attempt),
  'misses', '0', 'deadline', int(deadline))
redis.call('ZADD', leases, int(now + tonumber(ARGV[5])), id)
touch(order, log, '0', now, ARGV[7])
push(channel, id, tail, { entry .. ' ' .. event })
return { 'OK', int(claimed), int(attempt), o[7], o[8], o[9], int(deadline - now) }
