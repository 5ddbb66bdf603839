"""The Lua scripts: each is one atomic step, and says which race it closes."""

from typing import Final

COMPARE_AND_SET: Final = """
-- KEYS: federation, record (the same key for its own), then keys that live as long as it, then those that it does not
-- need any more.  ARGV: expected revision (0: no record), data, state, expiry in ms, channel, number of the keys that
-- live on, the record among them, expiry of the others in ms.
-- Returns 1 if written, 0 if another writer was first, or the federation is gone or going.
--
-- What is not needed expires in the step that says so: no crash in between leaves it, and no late writer takes away
-- what a newer record needs again.
-- Race: two writers (driver replicas, a driver and an RPC, a driver that lost its lease) that decided on the same
-- record. Only the one that saw the newest revision writes; the other must look again and decide anew.
-- Race: a driver that lost its lease creates a round while its federation is deleted, or after. It must leave nothing.
if KEYS[2] ~= KEYS[1] then
  local phase = redis.call('HGET', KEYS[1], 'state')
  if not phase or phase == 'DELETING' then
    return 0
  end
end
local revision = tonumber(redis.call('HGET', KEYS[2], 'revision') or '0')
if revision ~= tonumber(ARGV[1]) then
  return 0
end
redis.call('HSET', KEYS[2], 'revision', revision + 1, 'data', ARGV[2], 'state', ARGV[3])
for index = 2, #KEYS do
  redis.call('PEXPIRE', KEYS[index], index <= tonumber(ARGV[6]) + 1 and ARGV[4] or ARGV[7])
end
redis.call('PUBLISH', ARGV[5], '')
return 1
"""

COMMIT: Final = """
-- KEYS: round, commits; with a committee the dealings, then the shares of each member.
-- ARGV: client, manifest digest, update, expiry in ms, channel; with a committee the dealing, then each share.
-- Returns {outcome, count}: 1 committed now, 2 committed before (count is that of the first receipt), 3 committed
-- before with another manifest, 4 the round is not collecting.
--
-- Race: a commit against the close of the round. The state is read in the step that counts the update, and the driver
-- reads the commits only after it wrote the state, so an update is either in the aggregate or refused.
-- Race: two commits of one client (a retry that overtakes the first call). The first one stored is the only one.
-- The repeat is looked for before the state, so that a retry succeeds after the round moved on.
local known = redis.call('HGET', KEYS[2], ARGV[1])
if known then
  local ordinal, manifest = string.match(known, '^(%d+) (%x+) ')
  if manifest == ARGV[2] then
    return {2, tonumber(ordinal)}
  end
  return {3, 0}
end
if redis.call('HGET', KEYS[1], 'state') ~= 'COLLECTING' then
  return {4, 0}
end
local ordinal = redis.call('HLEN', KEYS[2]) + 1
redis.call('HSET', KEYS[2], ARGV[1], ordinal .. ' ' .. ARGV[2] .. ' ' .. ARGV[3])
redis.call('PEXPIRE', KEYS[2], ARGV[4])
for index = 3, #KEYS do
  redis.call('HSET', KEYS[index], ARGV[1], ARGV[index + 3])
  redis.call('PEXPIRE', KEYS[index], ARGV[4])
end
redis.call('PUBLISH', ARGV[5], ARGV[1])
return {1, ordinal}
"""

STATE: Final = """
-- KEYS: round, statements; for a view the orders.
-- ARGV: client, content, expiry in ms, channel, states of the round (",KEYING,"); for a view its order's digest, names.
-- Returns 1 stated now, 2 stated before, 3 another content was stated before, 4 the round is in another state.
--
-- Race: a statement against the round's next step. The driver reads statements after it wrote the state that ends their
-- step, so what it acts on is what was counted; nothing is added later.
-- Race: two statements of one client. The first one stored is the only one.
local known = redis.call('HGET', KEYS[2], ARGV[1])
if known then
  return known == ARGV[2] and 2 or 3
end
local state = redis.call('HGET', KEYS[1], 'state')
if not state or not string.find(ARGV[5], ',' .. state .. ',', 1, true) then
  return 4
end
redis.call('HSET', KEYS[2], ARGV[1], ARGV[2])
redis.call('PEXPIRE', KEYS[2], ARGV[3])
if KEYS[3] then
  redis.call('HSET', KEYS[3], ARGV[6], ARGV[7])
  redis.call('PEXPIRE', KEYS[3], ARGV[3])
end
redis.call('PUBLISH', ARGV[4], ARGV[1])
return 1
"""

_UNLESS_DELETED: Final = """
local phase = redis.call('HGET', KEYS[1], 'state')
if not phase then
  return 0
end
if phase == 'DELETING' then
  return 1
end
"""
"""Of a call that may be under way while its federation, KEYS[1], is deleted."""

PUT_FIELD: Final = (
    """
-- KEYS: federation, hash; for what belongs to a round that collects, the round.  ARGV: field, value, expiry in ms.
-- Returns 1 if set, or of no use: the federation is being deleted; 2 if the round does not collect (any more); 0 if
-- there is no such federation (any more).
--
-- Race: a call under way while its federation is deleted, or its round closes and what it collected is deleted. It must
-- leave nothing behind, least of all a member of the federation that gets the name next.
"""
    + _UNLESS_DELETED
    + """
if KEYS[3] and redis.call('HGET', KEYS[3], 'state') ~= 'COLLECTING' then
  return 2
end
redis.call('HSET', KEYS[2], ARGV[1], ARGV[2])
redis.call('PEXPIRE', KEYS[2], ARGV[3])
return 1
"""
)

PUT_VALUE: Final = """
-- KEYS: federation, value.  ARGV: value, named by its digest; expiry in ms, at least.
-- Returns 1 if set, 0 if there is no such federation (any more), or it is being deleted.
--
-- Race: as of a field.
local phase = redis.call('HGET', KEYS[1], 'state')
if not phase or phase == 'DELETING' then
  return 0
end
if redis.call('PTTL', KEYS[2]) < tonumber(ARGV[2]) then
  redis.call('SET', KEYS[2], ARGV[1], 'PX', ARGV[2])
end
return 1
"""

SEE: Final = """
-- KEYS: members, sighting, sessions, copies.  ARGV: client, sighting, expiry in ms, session ("" if unknown), Unix ms.
-- Returns the number of members, 0 if the client is none, -1 if another process of it has taken over since.
--
-- One round trip in place of four: agents beat all the time.
-- Race: two processes with one identity beat at once. Only that of the newest session is heard, and who beats beside it
-- is noted, in one step.
if redis.call('HEXISTS', KEYS[1], ARGV[1]) == 0 then
  return 0
end
local newest = redis.call('HGET', KEYS[3], ARGV[1])
if ARGV[4] ~= '' and newest and newest ~= ARGV[4] then
  redis.call('HSET', KEYS[4], ARGV[1], ARGV[5])
  redis.call('PEXPIRE', KEYS[4], redis.call('PTTL', KEYS[3]))
  return -1
end
redis.call('SET', KEYS[2], ARGV[2], 'PX', ARGV[3])
return redis.call('HLEN', KEYS[1])
"""

BEGIN_SESSION: Final = (
    """
-- KEYS: federation, sessions.  ARGV: client, newest session that the caller saw ("" for none), its own, expiry in ms.
-- Returns 1 if set, or of no use: the federation is being deleted; 2 if another session began meanwhile; 0 if there is
-- no such federation (any more).
--
-- Race: what an agent's dead process asked for reaches the store after its successor began. The caller that waits for
-- the answer looks again; one that is gone does not, and takes nothing back.
"""
    + _UNLESS_DELETED
    + """
if (redis.call('HGET', KEYS[2], ARGV[1]) or '') ~= ARGV[2] then
  return 2
end
redis.call('HSET', KEYS[2], ARGV[1], ARGV[3])
redis.call('PEXPIRE', KEYS[2], ARGV[4])
return 1
"""
)

TOUCH: Final = """
-- KEYS: sighting.  ARGV: Unix ms, sighting if there is none, expiry in ms.
--
-- Race: a call and a heartbeat of one client at once. The call must not put back what the client said before.
local known = redis.call('GET', KEYS[1])
local seen = known and string.gsub(known, '"at_ms":%d+', '"at_ms":' .. ARGV[1]) or ARGV[2]
redis.call('SET', KEYS[1], seen, 'PX', ARGV[3])
"""

RENEW: Final = """
-- KEYS: lease.  ARGV: token, expiry in ms.  Returns 1 if renewed, 0 if the lease is lost.
--
-- Race: a holder that paused beyond the expiry renews what another driver has acquired since.
if redis.call('GET', KEYS[1]) ~= ARGV[1] then
  return 0
end
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return 1
"""

RELEASE: Final = """
-- KEYS: lease.  ARGV: token.  Returns 1 if released, 0 if it was not held any more.
--
-- Race: a holder that paused beyond the expiry deletes what another driver has acquired since.
if redis.call('GET', KEYS[1]) ~= ARGV[1] then
  return 0
end
return redis.call('DEL', KEYS[1])
"""
