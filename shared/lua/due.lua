-- The ids of one partition whose lease has ended.
-- KEYS leases, reaper     ARGV lease_ms, limit
-- Grace guard: when nobody has looked for over a second (Redis or everybody was away), or the clock stepped back,
-- everyone gets one more lease first: an outage must not restart every generation.
local now = now_ms()
local last = redis.call('HMGET', KEYS[2], 'last_run', 'not_before')
local last_run, not_before = number_or(last[1], -1), number_or(last[2], 0)
if last_run < 0 or now - last_run > 1000 or now < last_run then
  not_before = now + tonumber(ARGV[1])
end
if now < last_run then -- the deadlines step back too: no dead worker's lease may last as much longer as the step is long
  local leases = redis.call('ZRANGE', KEYS[1], 0, -1, 'WITHSCORES')
  for at = 1, #leases, 2 do
    redis.call('ZADD', KEYS[1], int(tonumber(leases[at + 1]) - (last_run - now)), leases[at])
  end
end
redis.call('HSET', KEYS[2], 'last_run', int(now), 'not_before', int(not_before))
if now < not_before then return {} end
return redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', int(now), 'LIMIT', 0, tonumber(ARGV[2]))
