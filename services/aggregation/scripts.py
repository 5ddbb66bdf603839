"""The Lua scripts of the shard store. Each is one atomic step; its comment names the race it closes.

Every script answers a list whose first entry is a word of `Answer`. Every key a script writes expires, with its round
or before. Scripts name keys outside of KEYS only by appending a stored digest or a shard's index to a prefix with the
round's hash tag.
"""

from enum import StrEnum
from typing import Final


class Answer(StrEnum):
    """First entry of a script's answer."""

    OK = "OK"
    ROUND_UNKNOWN = "ROUND_UNKNOWN"
    LAYOUT_MISMATCH = "LAYOUT_MISMATCH"
    COMPLETE = "COMPLETE"
    """The very content is stored and checked."""
    SUPERSEDED = "SUPERSEDED"
    """A later upload or request took this one's place."""
    GAP = "GAP"
    """The bytes do not follow those stored."""
    SEALED = "SEALED"
    """The update is sealed with other content."""
    MISSING = "MISSING"
    """A shard of the update is not stored with the content asked for."""
    LOST = "LOST"
    """The bytes of a result have expired before they were published."""
    STORED = "STORED"
    """A result of this very request is stored; sha256, total_bytes and cpu_s follow."""


_TTL: Final = """
local ttl = redis.call('PTTL', KEYS[1])
if ttl < 1 then return {'ROUND_UNKNOWN'} end
"""
"""Every writer's first step. Closes: a late write after CloseRound, which would leave keys that nobody deletes."""

OPEN_ROUND: Final = """
-- KEYS: round, closed. ARGV: layout digest, layout, format, ttl in ms; then client and rank of each member.
-- Closes: two replicas open one round with different layouts; the first one opened is the round's layout. A call that
-- was sent before CloseRound arrives after it, and opens a round that nobody closes again.
if redis.call('EXISTS', KEYS[2]) == 1 then return {'ROUND_UNKNOWN'} end
local digest = redis.call('HGET', KEYS[1], 'layout_digest')
if digest then
  return {digest == ARGV[1] and 'OK' or 'LAYOUT_MISMATCH'}
end
redis.call('HSET', KEYS[1], 'layout_digest', ARGV[1], 'layout', ARGV[2], 'format', ARGV[3])
for index = 5, #ARGV, 2 do
  redis.call('HSET', KEYS[1], 'restricted', 1, 'rank:' .. ARGV[index], ARGV[index + 1])
end
redis.call('PEXPIRE', KEYS[1], ARGV[4])
return {'OK'}
"""

CLOSE_ROUND: Final = """
-- KEYS: round, closed. ARGV: life of the mark in ms.
-- In this order: a script whose first write takes nothing may go on to write where Redis is full.
redis.call('UNLINK', KEYS[1])
redis.call('SET', KEYS[2], '', 'PX', ARGV[1])
return {'OK'}
"""

BEGIN: Final = (
    _TTL
    + """
-- KEYS: round, client, partial, updates. ARGV: shard, '<sha256>:<total>', new token.
-- Answers: COMPLETE, SEALED, or OK with the token and the number of bytes stored.
-- Closes: an upload of other content writes into this one's bytes. Uploads of the same content share a token and
-- help each other; other content takes a new token, and every later step of the old upload finds itself superseded.
local partial_field, complete_field = 'partial:' .. ARGV[1], 'complete:' .. ARGV[1]
if redis.call('HGET', KEYS[2], complete_field) == ARGV[2] then
  redis.call('UNLINK', KEYS[3])
  redis.call('SREM', KEYS[4], KEYS[3])
  redis.call('HDEL', KEYS[2], partial_field)
  return {'COMPLETE'}
end
if redis.call('HEXISTS', KEYS[2], 'sealed') == 1 then return {'SEALED'} end
local partial = redis.call('HGET', KEYS[2], partial_field)
if partial and string.sub(partial, 34) == ARGV[2] then
  return {'OK', string.sub(partial, 1, 32), redis.call('STRLEN', KEYS[3])}
end
redis.call('UNLINK', KEYS[3])
redis.call('HSET', KEYS[2], partial_field, ARGV[3] .. ':' .. ARGV[2])
redis.call('SADD', KEYS[4], KEYS[2], KEYS[3])
redis.call('PEXPIRE', KEYS[2], ttl)
redis.call('PEXPIRE', KEYS[4], ttl)
return {'OK', ARGV[3], 0}
"""
)

_CURRENT: Final = """
if redis.call('HGET', KEYS[2], 'complete:' .. ARGV[1]) == ARGV[2] then return {'COMPLETE'} end
if redis.call('HEXISTS', KEYS[2], 'sealed') == 1 then return {'SEALED'} end
if redis.call('HGET', KEYS[2], 'partial:' .. ARGV[1]) ~= ARGV[3] .. ':' .. ARGV[2] then return {'SUPERSEDED'} end
"""
"""A step of an upload begins with: is it complete through another call, the update sealed, or it superseded?"""

APPEND: Final = (
    _TTL
    + _CURRENT
    + """
-- KEYS: round, client, partial. ARGV: shard, '<sha256>:<total>', token, offset, bytes.
-- Answers: OK with the number of bytes stored, COMPLETE, SEALED, SUPERSEDED or GAP.
-- Closes: two uploads of one shard interleave. Bytes that are stored already are skipped, never written again, so
-- that what a check has read cannot change under it.
local length = redis.call('STRLEN', KEYS[3])
local skip = length - tonumber(ARGV[4])
if skip < 0 then return {'GAP', length} end
if skip >= #ARGV[5] then return {'OK', length} end
length = redis.call('APPEND', KEYS[3], skip == 0 and ARGV[5] or string.sub(ARGV[5], skip + 1))
redis.call('PEXPIRE', KEYS[3], ttl)
return {'OK', length}
"""
)

PROMOTE: Final = (
    _TTL
    + _CURRENT
    + """
-- KEYS: round, client, partial, update, updates. ARGV: shard, '<sha256>:<total>', token, prefix of update keys,
-- squared norm.
-- Closes: content that was not checked becomes complete. The token proves that the bytes are those that were checked,
-- since they were all there then and stored bytes never change. The shard complete before is dropped in the same step.
local old = redis.call('HGET', KEYS[2], 'complete:' .. ARGV[1])
redis.call('RENAME', KEYS[3], KEYS[4])
redis.call('PEXPIRE', KEYS[4], ttl)
redis.call('HSET', KEYS[2], 'complete:' .. ARGV[1], ARGV[2], 'norm:' .. ARGV[1], ARGV[5])
redis.call('HDEL', KEYS[2], 'partial:' .. ARGV[1])
redis.call('SREM', KEYS[5], KEYS[3])
redis.call('SADD', KEYS[5], KEYS[4])
if old then
  local old_key = ARGV[4] .. string.sub(old, 1, 64)
  redis.call('UNLINK', old_key)
  redis.call('SREM', KEYS[5], old_key)
end
return {'OK'}
"""
)

FORGET: Final = """
-- KEYS: client, partial, updates. ARGV: shard, '<sha256>:<total>', token.
-- Closes: a refused upload deletes the bytes of the one that took its place.
local field = 'partial:' .. ARGV[1]
if redis.call('HGET', KEYS[1], field) ~= ARGV[3] .. ':' .. ARGV[2] then return {'SUPERSEDED'} end
redis.call('UNLINK', KEYS[2])
redis.call('SREM', KEYS[3], KEYS[2])
redis.call('HDEL', KEYS[1], field)
if redis.call('EXISTS', KEYS[1]) == 0 then redis.call('SREM', KEYS[3], KEYS[1]) end
return {'OK'}
"""

SEAL: Final = (
    _TTL
    + """
-- KEYS: round, client, updates. ARGV: prefix of the client's partial keys, '<sha256>:<total>' of each shard in order.
-- Closes: a shard is replaced between the look at an update and its commit, or after it: the update that was committed
-- could not be aggregated. The look and the seal are one step, and no upload of other content goes on after it.
for index = 2, #ARGV do
  if redis.call('HGET', KEYS[2], 'complete:' .. (index - 2)) ~= ARGV[index] then return {'MISSING'} end
end
for index = 2, #ARGV do
  if redis.call('HDEL', KEYS[2], 'partial:' .. (index - 2)) == 1 then
    local partial = ARGV[1] .. (index - 2)
    redis.call('UNLINK', partial)
    redis.call('SREM', KEYS[3], partial)
  end
end
redis.call('HSET', KEYS[2], 'sealed', 1)
redis.call('PEXPIRE', KEYS[2], ttl)
return {'OK'}
"""
)

ANNOUNCE: Final = """
-- KEYS: replicas. ARGV: address, life in ms.
-- By the clock of Redis: those of the replicas may differ.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
redis.call('ZADD', KEYS[1], now + ARGV[2], ARGV[1])
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return {'OK'}
"""

ANNOUNCED: Final = """
-- KEYS: replicas. Answers OK and the addresses whose announcement has not expired.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
return {'OK', unpack(redis.call('ZRANGEBYSCORE', KEYS[1], now, '+inf'))}
"""

_STORED: Final = """
local stored = redis.call('HMGET', KEYS[2], 'request', 'sha256', 'total_bytes', 'cpu_s', 'wanted')
"""

CLAIM: Final = (
    _STORED
    + """
-- KEYS: round, result, results. ARGV: request digest, number of its contributions.
-- Answers: STORED with the result of this request, SUPERSEDED, or OK.
-- Closes: a request that was given up for another one publishes after it: only the newest claim can publish.
-- Closes: such a request claims after it, since its call was on its way when it was cancelled. Contributions to a round
-- are only ever left out, so the request that has more of them is the older one.
if stored[1] == ARGV[1] then return {'STORED', stored[2], stored[3], stored[4]} end
"""
    + _TTL
    + """
local fewest = redis.call('HGET', KEYS[2], 'contributions')
if fewest and tonumber(ARGV[2]) > tonumber(fewest) then return {'SUPERSEDED'} end
redis.call('HSET', KEYS[2], 'wanted', ARGV[1], 'contributions', ARGV[2])
redis.call('SADD', KEYS[3], KEYS[2])
redis.call('PEXPIRE', KEYS[2], ttl)
redis.call('PEXPIRE', KEYS[3], ttl)
return {'OK'}
"""
)

PUBLISH: Final = (
    _STORED
    + """
-- KEYS: round, result, bytes, results. ARGV: request digest, sha256 in hex, total bytes, cpu seconds, prefix of bytes
-- keys. The bytes are stored before, for minutes; here they become the result or are dropped.
-- Answers: STORED with the result that was stored first for this request; ROUND_UNKNOWN; SUPERSEDED; LOST.
-- Closes: two replicas store results of one request that differ in their last bit; a late worker replaces the result
-- of a newer request, or brings a closed round back.
local function drop(key)
  redis.call('UNLINK', key)
  redis.call('SREM', KEYS[4], key)
end
if stored[1] == ARGV[1] then
  if stored[2] ~= ARGV[2] then drop(KEYS[3]) end
  return {'STORED', stored[2], stored[3], stored[4]}
end
local open = redis.call('EXISTS', KEYS[1]) == 1
if not open or stored[5] ~= ARGV[1] then
  if stored[2] ~= ARGV[2] then drop(KEYS[3]) end
  return {open and 'SUPERSEDED' or 'ROUND_UNKNOWN'}
end
local ttl = redis.call('PTTL', KEYS[1])
if redis.call('PEXPIRE', KEYS[3], ttl) == 0 then return {'LOST'} end
if stored[2] and stored[2] ~= ARGV[2] then drop(ARGV[5] .. stored[2]) end
redis.call('SADD', KEYS[4], KEYS[3])
redis.call('PEXPIRE', KEYS[4], ttl)
redis.call('HSET', KEYS[2], 'request', ARGV[1], 'sha256', ARGV[2], 'total_bytes', ARGV[3], 'cpu_s', ARGV[4])
return {'STORED', ARGV[2], ARGV[3], ARGV[4]}
"""
)
