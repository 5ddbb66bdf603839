"""Valkey in this process, on a clock that can be moved: the commands that the product uses, and its real Lua scripts.

Scripts run in Lua 5.1, as in Valkey, unchanged. That this is Valkey as far as the product can tell is shown by the
contract suites of both stores, which run on it and on a real server (tests/contract).
"""

import hashlib
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from lupa.lua51 import LuaRuntime, lua_type
from redis.exceptions import NoScriptError, ResponseError

Command = tuple[Any, ...]
Hash = dict[bytes, bytes]

_LUA = LuaRuntime(encoding=None)
_COMPILED: dict[bytes, Any] = {}


def _compiled(script: bytes) -> Any:
    if script not in _COMPILED:
        _COMPILED[script] = _LUA.execute(b"return function(KEYS, ARGV, redis) " + script + b"\nend")
    return _COMPILED[script]


def encoded(value: Any) -> bytes:
    """An argument as it travels."""
    if isinstance(value, bytes):
        return value
    return (
        value.encode()
        if isinstance(value, str)
        else bytes(value)
        if isinstance(value, bytearray | memoryview)
        else str(value).encode()
    )


class Valkey:
    """One server. `clock_ms`: milliseconds by which keys expire; they stand still while a command or script runs."""

    def __init__(self, clock_ms: Callable[[], int]) -> None:
        self._clock_ms = clock_ms
        self._now_ms = clock_ms()
        self._data: dict[bytes, Any] = {}
        self._expiry: dict[bytes, int] = {}
        self._scripts: dict[bytes, bytes] = {}
        self.published: Callable[[bytes, bytes], None] = lambda _channel, _message: None
        self.immortal: set[bytes] = set()
        """Keys that stood without expiry at the end of some command."""
        lua_call = _LUA.eval(b"function(call) return {call = call} end")
        self._lua_redis = lua_call(self._called_from_lua)

    def load(self, *scripts: str) -> None:
        """Knows scripts already, as a server does that has been up for a while."""
        for script in scripts:
            self._script(b"LOAD", script.encode())

    # Access for those who look from outside

    def keys(self, pattern: str = "*") -> list[bytes]:
        self._now_ms = self._clock_ms()
        return self._keys(pattern.encode())

    def value(self, key: str | bytes) -> Any:
        """What lies under a key, as it is stored; None if nothing."""
        self._now_ms = self._clock_ms()
        return self._live(encoded(key))

    # Commands

    def execute(self, *command: Any) -> Any:
        """The answer to one command. Raises ResponseError."""
        self._now_ms = self._clock_ms()
        answer = self._call([encoded(part) for part in command])
        self._look_for_immortals()
        return answer

    def transaction(self, commands: Sequence[Command]) -> list[Any]:
        """The answers to commands that take effect together."""
        self._now_ms = self._clock_ms()
        answers = [self._call([encoded(part) for part in command]) for command in commands]
        self._look_for_immortals()
        return answers

    def _look_for_immortals(self) -> None:
        if len(self._data) != len(self._expiry):
            self.immortal.update(self._data.keys() - self._expiry.keys())

    def _call(self, parts: list[bytes]) -> Any:
        name = parts[0].upper()
        arguments = parts[1:]
        if b" " in name:  # redis-py joins two words
            name, word = name.split(b" ")
            arguments = [word, *arguments]
        method = getattr(self, f"_{name.decode().lower()}", None)
        if method is None:
            raise ResponseError(f"unknown command {name.decode()}")
        return method(*arguments)

    def _called_from_lua(self, *parts: Any) -> Any:
        return _to_lua(self._call([encoded(part) for part in parts]))

    def _live(self, key: bytes) -> Any:
        expires = self._expiry.get(key)
        if expires is not None and expires <= self._now_ms:
            self._remove(key)
        return self._data.get(key)

    def _kind(self, key: bytes, kind: type, *, create: bool = False) -> Any:
        found = self._live(key)
        if found is None:
            found = kind()
            if create:
                self._data[key] = found
        elif not isinstance(found, kind):
            raise ResponseError("WRONGTYPE")
        return found

    def _remove(self, key: bytes) -> bool:
        self._expiry.pop(key, None)
        return self._data.pop(key, None) is not None

    # Keys

    def _keys(self, pattern: bytes) -> list[bytes]:
        return sorted(k for k in list(self._data) if self._live(k) is not None and _matches(k, pattern))

    def _scan(self, cursor: bytes, *options: bytes) -> list[Any]:
        return [b"0", self._keys(b"*")]

    def _exists(self, *keys: bytes) -> int:
        return sum(self._live(key) is not None for key in keys)

    def _del(self, *keys: bytes) -> int:
        return sum(self._live(key) is not None and self._remove(key) for key in keys)

    _unlink = _del

    def _flushall(self, *options: bytes) -> bytes:
        self._data.clear()
        self._expiry.clear()
        return b"OK"

    def _rename(self, old: bytes, new: bytes) -> bytes:
        if self._live(old) is None:
            raise ResponseError("no such key")
        self._remove(new)
        self._data[new] = self._data.pop(old)
        if old in self._expiry:
            self._expiry[new] = self._expiry.pop(old)
        return b"OK"

    def _pexpire(self, key: bytes, milliseconds: bytes) -> int:
        if self._live(key) is None:
            return 0
        self._expiry[key] = self._now_ms + int(milliseconds)
        return 1

    def _pttl(self, key: bytes) -> int:
        if self._live(key) is None:
            return -2
        return self._expiry[key] - self._now_ms if key in self._expiry else -1

    def _ttl(self, key: bytes) -> int:
        milliseconds = self._pttl(key)
        return milliseconds if milliseconds < 0 else (milliseconds + 500) // 1000

    # Strings

    def _get(self, key: bytes) -> bytes | None:
        return self._live(key) and self._kind(key, bytes)

    def _mget(self, *keys: bytes) -> list[bytes | None]:
        return [self._get(key) for key in keys]

    def _set(self, key: bytes, value: bytes, *options: bytes) -> bytes | None:
        words = [option.upper() for option in options]
        if b"NX" in words and self._live(key) is not None:
            return None
        self._remove(key)
        self._data[key] = value
        if b"PX" in words:
            self._pexpire(key, options[words.index(b"PX") + 1])
        return b"OK"

    def _strlen(self, key: bytes) -> int:
        return len(self._kind(key, bytes))

    def _append(self, key: bytes, value: bytes) -> int:
        self._data[key] = self._kind(key, bytes) + value
        return len(self._data[key])

    def _getrange(self, key: bytes, start: bytes, end: bytes) -> bytes:
        return self._kind(key, bytes)[int(start) : int(end) + 1]

    # Hashes

    def _hset(self, key: bytes, *pairs: bytes) -> int:
        fields: Hash = self._kind(key, dict, create=True)
        before = len(fields)
        fields.update(zip(pairs[::2], pairs[1::2], strict=True))
        return len(fields) - before

    def _hget(self, key: bytes, field: bytes) -> bytes | None:
        return self._kind(key, dict).get(field)

    def _hmget(self, key: bytes, *fields: bytes) -> list[bytes | None]:
        found = self._kind(key, dict)
        return [found.get(field) for field in fields]

    def _hgetall(self, key: bytes) -> list[bytes]:
        return [part for pair in self._kind(key, dict).items() for part in pair]

    def _hlen(self, key: bytes) -> int:
        return len(self._kind(key, dict))

    def _hkeys(self, key: bytes) -> list[bytes]:
        return list(self._kind(key, dict))

    def _hexists(self, key: bytes, field: bytes) -> int:
        return int(field in self._kind(key, dict))

    def _hdel(self, key: bytes, *fields: bytes) -> int:
        found = self._kind(key, dict)
        return self._emptied(key, sum(found.pop(field, None) is not None for field in fields))

    # Sets, as dictionaries: they keep the order in which members came

    def _sadd(self, key: bytes, *members: bytes) -> int:
        found = self._kind(key, _Set, create=True)
        before = len(found)
        found.update(dict.fromkeys(members, b""))
        return len(found) - before

    def _srem(self, key: bytes, *members: bytes) -> int:
        found = self._kind(key, _Set)
        return self._emptied(key, sum(found.pop(member, None) is not None for member in members))

    def _smembers(self, key: bytes) -> list[bytes]:
        return list(self._kind(key, _Set))

    def _srandmember(self, key: bytes, count: bytes) -> list[bytes]:
        return list(self._kind(key, _Set))[: int(count)]

    def _emptied(self, key: bytes, removed: int) -> int:
        if key in self._data and not self._data[key]:
            self._remove(key)
        return removed

    # Sorted sets

    def _zadd(self, key: bytes, *parts: bytes) -> int:
        *options, score, member = parts
        only_known = b"XX" in options
        found = self._kind(key, _Sorted, create=not only_known)
        new = member not in found
        if new and only_known:
            return 0
        found[member] = float(score)
        return int(new)

    def _zrem(self, key: bytes, member: bytes) -> int:
        found = self._kind(key, _Sorted)
        return self._emptied(key, int(found.pop(member, None) is not None))

    def _zcard(self, key: bytes) -> int:
        return len(self._kind(key, _Sorted))

    def _zscore(self, key: bytes, member: bytes) -> bytes | None:
        score = self._kind(key, _Sorted).get(member)
        return None if score is None else str(score).encode()

    def _time(self) -> list[bytes]:
        seconds, milliseconds = divmod(self._now_ms, 1000)
        return [str(seconds).encode(), str(1000 * milliseconds).encode()]

    def _zrangebyscore(self, key: bytes, least: bytes, most: bytes) -> list[bytes]:
        found = self._kind(key, _Sorted)
        low, high = float(least), float(most)
        return sorted((m for m, score in found.items() if low <= score <= high), key=lambda m: (found[m], m))

    def _zremrangebyscore(self, key: bytes, least: bytes, most: bytes) -> int:
        found = self._kind(key, _Sorted)
        gone = self._zrangebyscore(key, least, most)
        for member in gone:
            del found[member]
        return self._emptied(key, len(gone))

    # Scripts and messages

    def _publish(self, channel: bytes, message: bytes) -> int:
        self.published(channel, message)
        return 1

    def _script(self, word: bytes, script: bytes) -> bytes:
        digest = hashlib.sha1(script).hexdigest().encode()
        self._scripts[digest] = script
        return digest

    def _evalsha(self, digest: bytes, count: bytes, *arguments: bytes) -> Any:
        if digest not in self._scripts:
            raise NoScriptError("NOSCRIPT")
        keys, rest = arguments[: int(count)], arguments[int(count) :]
        function = _compiled(self._scripts[digest])
        return _from_lua(function(_LUA.table_from(keys), _LUA.table_from(rest), self._lua_redis))

    def _eval(self, script: bytes, count: bytes, *arguments: bytes) -> Any:
        return self._evalsha(self._script(b"LOAD", script), count, *arguments)


class _Set(dict[bytes, bytes]):
    """Told from a hash."""


class _Sorted(dict[bytes, float]):
    """Told from a hash."""


def _matches(key: bytes, pattern: bytes) -> bool:
    return fnmatchcase(key.decode(errors="replace"), pattern.decode().replace("[", "[[]"))


def _to_lua(value: Any) -> Any:
    """An answer as a script sees it: nothing is false, as in Valkey."""
    if value is None:
        return False
    if isinstance(value, list):
        return _LUA.table_from([_to_lua(part) for part in value])
    return value


def _from_lua(value: Any) -> Any:
    """A script's result as an answer: tables end at the first nil, numbers lose their fraction."""
    if lua_type(value) == "table":
        parts = []
        while (part := value[len(parts) + 1]) is not None:
            parts.append(_from_lua(part))
        return parts
    if isinstance(value, bool):
        return 1 if value else None
    return int(value) if isinstance(value, int | float) else value
