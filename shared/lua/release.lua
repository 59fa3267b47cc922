-- An orderly shutdown hands a generation over: claimable at once, not charged (at most max_releases times).
-- KEYS order, log, leases
-- ARGV id, channel, epoch, claim_grace_ms, max_queue_ms, max_attempts, max_releases, log_ms, order_ms
-- Answers: HINT epoch n | ENDED status | FENCED
local order, log, leases = KEYS[1], KEYS[2], KEYS[3]
local id, channel = ARGV[1], ARGV[2]
local now = now_ms()

local o = redis.call('HMGET', order, 'epoch', 'nonce', 'charged', 'releases', 'hints')
if not o[1] or o[1] ~= ARGV[3] or o[2] == '' then return { 'FENCED' } end
local queue_until = now + tonumber(ARGV[5])
local charged, releases, hints = tonumber(o[3]), tonumber(o[4]) + 1, tonumber(o[5]) + 1
if releases > tonumber(ARGV[7]) then charged = charged + 1 end
if charged >= tonumber(ARGV[6]) then
  terminate(order, log, leases, channel, id, tonumber(o[1]), 'failed',
    failure('attempts_exhausted', 'every worker that tried was lost or stopped; see REJOIN_MAX_ATTEMPTS'), now, ARGV[8], ARGV[9])
  return { 'ENDED', 'failed' }
end
redis.call('HSET', order, 'nonce', '', 'charged', int(charged), 'releases', int(releases), 'hints', int(hints),
  'misses', '0', 'queue_until', int(queue_until))
redis.call('ZADD', leases, int(math.min(now + tonumber(ARGV[4]), queue_until)), id)
return { 'HINT', o[1], hints }
