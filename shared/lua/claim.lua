-- KEYS order, log, leases
-- ARGV id, channel, expected epoch, nonce, lease_ms, max_generation_ms, alive_ms, log_ms, order_ms, owner,
--      the tail to go on from ('' = start afresh)
-- Answers: OK epoch attempt model provider prompt ms_left mode | REFUSED | GONE | ABANDONED
local order, log, leases = KEYS[1], KEYS[2], KEYS[3]
local id, channel, nonce, continues = ARGV[1], ARGV[2], ARGV[4], ARGV[11]

local o = redis.call('HMGET', order, 'epoch', 'nonce', 'status', 'attempts', 'attended_until', 'deadline', 'model',
  'provider', 'prompt', 'fresh', 'server')
if not o[1] then return { 'GONE' } end
local epoch, now = tonumber(o[1]), now_ms()
if o[2] == nonce then -- our own claim, whose reply was lost
  return { 'OK', o[1], o[4], o[7], o[8], o[9], int(tonumber(o[6]) - now), o[10] == o[1] and 'fresh' or 'continued' }
end
if TERMINAL[o[3]] or o[2] ~= '' or epoch ~= tonumber(ARGV[3]) then return { 'REFUSED' } end
local tail = tail_of(log)
if not tail then return { 'GONE' } end
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

-- Go on only from the very tail, and only on the server that took it: one that was restarted or promoted may have lost
-- words that readers have seen, and an attempt that went on without them would be spliced to them.
local server = server_run()
local restored = o[11] and o[11] ~= server
if continues ~= tail or server == '' or restored or o[4] == '0' then continues = '' end
local claimed, attempt = next_epoch(epoch, now), tonumber(o[4]) + 1
local event = '{"type":"generation.started","attempt":' .. int(attempt) .. ',"provider":"' .. o[8] .. '"'
if continues == '' then
  event = event .. ',"mode":"fresh"' .. (restored and ',"restored":true}' or '}')
  redis.call('HSET', order, 'fresh', int(claimed))
else
  event = event .. ',"mode":"continued","continues":"' .. continues .. '"}'
end
local entry = int(claimed) .. '-0'
redis.call('XADD', log, entry, 'data', event)
redis.call('HSET', order, 'epoch', int(claimed), 'nonce', nonce, 'status', 'in_progress', 'attempts', int(attempt),
  'misses', '0', 'deadline', int(deadline), 'owner', ARGV[10], 'server', server)
redis.call('ZADD', leases, int(now + tonumber(ARGV[5])), id)
touch(order, log, '0', now, ARGV[7])
push(channel, id, tail, { entry .. ' ' .. event })
return { 'OK', int(claimed), int(attempt), o[7], o[8], o[9], int(deadline - now), continues == '' and 'fresh' or 'continued' }
