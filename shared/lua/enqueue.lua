-- Hint n of a generation, in the place of hint n-1.
-- KEYS queue, doorbell, job key, then ARQ's keys of hint n-1 (job, in-progress, retry)
-- ARGV job id, job (JSON), expires_ms, skew_ms, bell length, previous job id ('' = none)
local score = score_now(ARGV[4])
if ARGV[6] ~= '' then
  score = number_or(redis.call('ZSCORE', KEYS[1], ARGV[6]), score) -- a hint sent again keeps its place
  redis.call('ZREM', KEYS[1], ARGV[6])
  redis.call('DEL', KEYS[4], KEYS[5], KEYS[6])
end
hint(KEYS[1], KEYS[2], KEYS[3], score)
return 'OK'
