-- The first hint of a new generation, and its place among its tenant's newest; nothing where enough hints wait already.
-- KEYS queue, doorbell, job key, the tenant's list
-- ARGV job id, job (JSON), expires_ms, skew_ms, bell length, most hints that may wait ('' = any number), id, created, list length, list_ms
-- Answers: OK | FULL
if redis.call('ZCARD', KEYS[1]) >= number_or(ARGV[6], math.huge) then
  local is_queued = redis.call('ZSCORE', KEYS[1], ARGV[1]) -- by this very call, whose reply was lost
  if not is_queued then return 'FULL' end
end
hint(KEYS[1], KEYS[2], KEYS[3], score_now(ARGV[4]))
redis.call('ZADD', KEYS[4], 'NX', ARGV[8], ARGV[7])
redis.call('ZREMRANGEBYRANK', KEYS[4], 0, -tonumber(ARGV[9]) - 1)
redis.call('PEXPIRE', KEYS[4], ARGV[10])
return 'OK'
