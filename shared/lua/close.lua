-- KEYS order, log, leases
-- ARGV id, channel, status, head of the terminal event, log_ms, order_ms, nudge channel, only if held at this epoch ('' = whoever holds it)
local order, log, leases = KEYS[1], KEYS[2], KEYS[3]
local id, channel, status = ARGV[1], ARGV[2], ARGV[3]

local o = redis.call('HMGET', order, 'epoch', 'status', 'nonce')
if not o[1] then return { 'GONE' } end
if TERMINAL[o[2]] then return { 'ALREADY', o[2] } end
if ARGV[8] ~= '' and (ARGV[8] ~= o[1] or o[3] == '') then return { 'FENCED' } end
terminate(order, log, leases, channel, id, tonumber(o[1]), status, ARGV[4], now_ms(), ARGV[5], ARGV[6])
if o[3] ~= '' then redis.call('PUBLISH', ARGV[7], id) end -- a hint: the holder would learn it at its next append
return { 'CLOSED', status }
