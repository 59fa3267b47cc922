-- Rejoin log protocol, v1. Rules every script keeps:
--   only Redis TIME, never a machine's clock; numbers are written with %d (1.79e+12 is no id);
--   no entry without its push, in the same step; nothing is written to a log whose order is missing.

local TERMINAL = { completed = true, failed = true, cancelled = true, incomplete = true }

local function now_ms()
  local time = redis.call('TIME')
  return tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
end

local function int(number)
  return string.format('%d', number)
end

local function number_or(value, default)
  return tonumber(value or '') or default
end

-- Epochs are times, so that one that was lost in a failover is never handed out again.
local function next_epoch(epoch, now)
  return math.max(epoch + 1, now)
end

-- The run id of this server process; '' where it is not told.
local function server_run()
  local info = redis.pcall('INFO', 'server')
  return type(info) == 'string' and string.match(info, 'run_id:(%x+)') or ''
end

-- The last entry of a log: its id, epoch and seq; nil when there is no log.
local function tail_of(log)
  local last = redis.call('XREVRANGE', log, '+', '-', 'COUNT', 1)[1]
  if not last then return nil end
  local epoch, seq = string.match(last[1], '^(%d+)-(%d+)$')
  return last[1], tonumber(epoch), tonumber(seq)
end

-- A push is a copy of what was just stored, and says which entry it follows:
--   <generation id> <previous entry id>\n<entry id> <json>\n<entry id> <json>…
local function push(channel, id, previous, lines)
  redis.call('PUBLISH', channel, id .. ' ' .. previous .. '\n' .. table.concat(lines, '\n'))
end

-- A running generation never expires: its keys are given a day, at most once a minute.
local function touch(order, log, touched, now, alive_ms)
  if now - number_or(touched, 0) < 60000 then return end
  redis.call('HSET', order, 'touched', int(now))
  redis.call('PEXPIRE', order, alive_ms)
  redis.call('PEXPIRE', log, alive_ms)
end

local function retire(order, log, leases, id, status, log_ms, order_ms)
  redis.call('HSET', order, 'status', status, 'nonce', '')
  redis.call('ZREM', leases, id)
  redis.call('PEXPIRE', log, log_ms)
  redis.call('PEXPIRE', order, order_ms)
end

-- End a generation from outside its attempt: the next epoch, with the terminal event as its entry 0.
-- `head` is the event's JSON without its closing brace.
local function terminate(order, log, leases, channel, id, epoch, status, head, now, log_ms, order_ms)
  local previous = tail_of(log)
  if not previous then
    retire(order, log, leases, id, status, log_ms, order_ms)
    return
  end
  local closing = next_epoch(epoch, now)
  local entry = int(closing) .. '-0'
  local event = head .. ',"at":' .. int(now) .. '}'
  redis.call('XADD', log, entry, 'data', event)
  redis.call('HSET', order, 'epoch', int(closing))
  retire(order, log, leases, id, status, log_ms, order_ms)
  push(channel, id, previous, { entry .. ' ' .. event })
end

-- on_disconnect = cancel: nobody has said for a whole grace time that a reader is there.
local ABANDONED = '{"type":"generation.cancelled","by":"disconnect"'

local function is_abandoned(attended_until, now)
  return now > number_or(attended_until, math.huge)
end

-- The same, asked by whoever still writes or wants to. A lease that has ended tells of an outage, in which no reader
-- could say that it is there: they get one more grace time.
local function is_abandoned_by_now(order, leases, id, attended_until, now)
  if not is_abandoned(attended_until, now) then return false end
  if now <= number_or(redis.call('ZSCORE', leases, id), 0) then return true end
  redis.call('HSET', order, 'attended_until', int(now + number_or(redis.call('HGET', order, 'grace'), 10000)))
  return false
end

local function failure(code, message)
  return '{"type":"generation.failed","code":"' .. code .. '","message":"' .. message .. '","retryable":true'
end

-- ARQ compares a job's score with its own machine's clock: leave room for skew.
local function score_now(skew_ms)
  return now_ms() - tonumber(skew_ms)
end

-- A hint in ARQ's own keys, and the doorbell, which says which hint it is rung for. ARGV is that of enqueue and announce:
-- job id, job (JSON), expires_ms, skew_ms, bell length
local function hint(queue, bell, job_key, score)
  redis.call('SET', job_key, ARGV[2], 'PX', ARGV[3])
  redis.call('ZADD', queue, int(score), ARGV[1])
  redis.call('RPUSH', bell, ARGV[1])
  redis.call('LTRIM', bell, -tonumber(ARGV[5]), -1)
end
