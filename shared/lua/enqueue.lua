-- Hint n of a generation, in ARQ's own keys, and the doorbell, in one step. It takes the place of hint n-1.
-- KEYS queue, doorbell, job key, then ARQ's keys of hint n-1 (job, in-progress, retry)
-- ARGV job id, previous job id ('' = none), job (JSON), expires_ms, skew_ms, bell length
local score = now_ms() - tonumber(ARGV[5]) -- ARQ compares with its own machine's clock: leave room for skew
if ARGV[2] ~= '' then
  score = number_or(redis.call('ZSCORE', KEYS[1], ARGV[2]), score) -- a hint sent again keeps its place
  redis.call('ZREM', KEYS[1], ARGV[2])
  redis.call('DEL', KEYS[4], KEYS[5], KEYS[6])
end
redis.call('SET', KEYS[3], ARGV[3], 'PX', ARGV[4])
redis.call('ZADD', KEYS[1], int(score), ARGV[1])
redis.call('RPUSH', KEYS[2], '1')
redis.call('LTRIM', KEYS[2], -tonumber(ARGV[6]), -1)
return 'OK'
