-- Append to many generations in one step; an append of nothing renews the lease.
-- KEYS per generation: order, log, leases
-- ARGV lease_ms, alive_ms, log_ms, order_ms, then per generation:
--      id, channel, epoch, first seq, final status ('' = goes on), number of events, event, …
-- Answers per generation: OK | GAP last seq | FENCED | ABANDONED | GONE
local lease_ms, alive_ms, log_ms, order_ms = tonumber(ARGV[1]), ARGV[2], ARGV[3], ARGV[4]
local now = now_ms()

local function append(order, log, leases, id, channel, epoch, first, final, from, count)
  local o = redis.call('HMGET', order, 'epoch', 'nonce', 'attended_until', 'touched')
  if not o[1] then return { 'GONE' } end
  local tail, tail_epoch, tail_seq = tail_of(log)
  if not tail then return { 'GONE' } end
  if count > 0 and tail_epoch == epoch and first + count - 1 <= tail_seq then -- a repeat
    if o[2] ~= '' and tonumber(o[1]) == epoch then redis.call('ZADD', leases, int(now + lease_ms), id) end
    return { 'OK' }
  end
  if tonumber(o[1]) ~= epoch or o[2] == '' then return { 'FENCED' } end
  if final == '' and is_abandoned_by_now(order, leases, id, o[3], now) then
    terminate(order, log, leases, channel, id, epoch, 'cancelled', ABANDONED, now, log_ms, order_ms)
    return { 'ABANDONED' }
  end
  redis.call('ZADD', leases, int(now + lease_ms), id)
  if tail_epoch ~= epoch then return { 'GAP', -1 } end
  if first > tail_seq + 1 then return { 'GAP', tail_seq } end
  local lines = {}
  for seq = tail_seq + 1, first + count - 1 do
    local entry, event = int(epoch) .. '-' .. int(seq), ARGV[from + seq - first]
    redis.call('XADD', log, entry, 'data', event)
    lines[#lines + 1] = entry .. ' ' .. event
  end
  if final ~= '' then
    retire(order, log, leases, id, final, log_ms, order_ms)
  else
    touch(order, log, o[4], now, alive_ms)
  end
  if #lines > 0 then push(channel, id, tail, lines) end
  return { 'OK' }
end

local answers, at = {}, 5
for key = 1, #KEYS, 3 do
  local count = tonumber(ARGV[at + 5])
  answers[#answers + 1] = append(KEYS[key], KEYS[key + 1], KEYS[key + 2], ARGV[at], ARGV[at + 1],
    tonumber(ARGV[at + 2]), tonumber(ARGV[at + 3]), ARGV[at + 4], at + 6, count)
  at = at + 6 + count
end
return answers
