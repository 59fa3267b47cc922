-- Hints off the queue, each under ARQ's lock: from here on the lease says that the generation is being worked on.
-- KEYS queue, then the lock of each hint
-- ARGV token of this call, lock_ms, then the job id of each hint
-- Answers: how many hints still wait, then for each its score ('' = it is not to be had: taken, locked or not yet due)
local queue, token, now = KEYS[1], ARGV[1], now_ms()
local answers = {}

local function take(lock, job_id)
  local holder, score = redis.call('GET', lock), redis.call('ZSCORE', queue, job_id)
  if holder == token then return score or '0' end -- taken by this very call, whose reply was lost
  if holder or not score or tonumber(score) > now then return '' end
  redis.call('SET', lock, token, 'PX', ARGV[2])
  redis.call('ZREM', queue, job_id)
  return score
end

for n = 2, #KEYS do answers[n] = take(KEYS[n], ARGV[n + 1]) end
answers[1] = redis.call('ZCARD', queue)
return answers
