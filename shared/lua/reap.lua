-- What one ended lease means: the worker died (another attempt, charged), or a hint was lost (send it again).
-- KEYS order, log, leases
-- ARGV id, channel, claim_grace_ms, max_queue_ms, max_attempts, alive_ms, log_ms, order_ms, epoch to expire by force ('' = only if ended)
-- Answers: HINT epoch n | ENDED status | NO
local order, log, leases = KEYS[1], KEYS[2], KEYS[3]
local id, channel, claim_grace_ms = ARGV[1], ARGV[2], tonumber(ARGV[3])
local now = now_ms()

local deadline_of_lease = redis.call('ZSCORE', leases, id)
if not deadline_of_lease then return { 'NO' } end
local o = redis.call('HMGET', order, 'epoch', 'nonce', 'status', 'charged', 'misses', 'hints', 'queue_until',
  'deadline', 'attended_until', 'touched')
if not o[1] or TERMINAL[o[3]] then
  redis.call('ZREM', leases, id)
  return { 'NO' }
end
local epoch, held = tonumber(o[1]), o[2] ~= ''
if ARGV[9] == '' then
  if tonumber(deadline_of_lease) > now then return { 'NO' } end
elseif not held or ARGV[9] ~= o[1] then
  return { 'NO' }
end

local function ended(status, head)
  terminate(order, log, leases, channel, id, epoch, status, head, now, ARGV[7], ARGV[8])
  return { 'ENDED', status }
end

if is_abandoned(o[9], now) then return ended('cancelled', ABANDONED) end
local charged, misses, queue_until = tonumber(o[4]), tonumber(o[5]), tonumber(o[7])
if held then
  charged = charged + 1
  if now > number_or(o[8], math.huge) then
    return ended('failed', failure('deadline_exceeded', 'the generation ran longer than REJOIN_MAX_GENERATION_SECONDS'))
  end
  if charged >= tonumber(ARGV[5]) then
    return ended('failed', failure('attempts_exhausted', 'every worker that tried was lost; see REJOIN_MAX_ATTEMPTS'))
  end
  misses, queue_until = 0, now + tonumber(ARGV[4])
else
  if now >= queue_until then
    return ended('failed', failure('queue_timeout', 'no worker was free within REJOIN_MAX_QUEUE_SECONDS'))
  end
  misses = misses + 1
end
local patience = math.min(claim_grace_ms * 2 ^ math.min(misses, 10), math.max(60000, claim_grace_ms))
local hints = tonumber(o[6]) + 1
redis.call('HSET', order, 'nonce', '', 'charged', int(charged), 'misses', int(misses), 'hints', int(hints),
  'queue_until', int(queue_until))
redis.call('ZADD', leases, int(math.min(now + patience, queue_until)), id)
touch(order, log, o[10], now, ARGV[6])
return { 'HINT', o[1], hints }
