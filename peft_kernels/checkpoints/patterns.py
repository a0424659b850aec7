"""Matches keys of PEFT's `rank_pattern` and `alpha_pattern` in bounded time.

PEFT uses `re`, which backtracks: some keys take hours, with the GIL held. Here a key becomes an NFA (K.
Thompson, "Regular Expression Search Algorithm", CACM 1968), and every step is counted.

The syntax is `re`'s without backtracking or flags: characters, `.`, `[a-z_]`, `\\d`, `\\w`, `\\s` and their
opposites, escaped punctuation, `|`, groups, `^`, `$`, and `*`, `+`, `?`, `{m}`, `{m,}`, `{m,n}`, lazy or not.
Within this syntax keys match exactly as in PEFT.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from .header import shown

LONGEST = 1000
"""Maximum characters of a key, and maximum count in braces."""
DEEPEST = 50
"""Maximum nesting of groups."""
MOST_STATES = 10_000
"""Maximum states of a key, with counts expanded."""
MOST_STEPS = 5_000_000
"""Maximum steps of all lookups in a table. A thousand names, looked up among a thousand others, take a
million."""

_NAME = re.compile(r"[^\\\[\](){}|^$*+?\n]*")  # of which `re` makes something of the dots alone
_TOKEN = re.compile(
    r"\\[dDwWsS] | \\[^\w\s] | \[\^?(?:[\w.]-[\w.]|\\[dDwWsS.-]|[\w.])+-?\]"  # one character
    r"| \(\?: | [()|^$] | [*+?]\?? | \{\d+(?:,\d*)?\}\?? | [^\\\[\](){}|^$*+?]",
    re.ASCII | re.VERBOSE,
)


class PatternTable:
    """Values by key, looked up by the path of a layer. As in PEFT, the first key wins that matches the path
    or its end after a dot.

    Raises ValueError for keys outside of the syntax above, and for lookups of more than `MOST_STEPS` steps.
    """

    def __init__(self, table: Mapping[str, Any]) -> None:
        self._steps = 0
        self._values = [(key, self._parsed(key), value) for key, value in table.items()]

    def get(self, path: str, default: Any) -> Any:
        self._count(len(self._values))
        for key, start, value in self._values:
            if _is_end(key, path) if start is None else self._matches(start, path):
                return value
        return default

    def _parsed(self, key: str) -> _State | None:
        """The first state of a pattern, or None for a plain name."""
        if _NAME.fullmatch(key):
            return None
        parser = _Parser(key)
        self._count(100 * len(key) + parser.states)
        return parser.start

    def _matches(self, start: _State, path: str) -> bool:
        here: set[_State] = set()
        for i in range(len(path) + 1):
            if i == 0 or path[i - 1] == ".":
                self._reach([start], here, i == 0, i == len(path))
            if i == len(path):
                break
            there: set[_State] = set()
            for state in here:
                if state.takes is not None and state.takes(path[i]):
                    self._reach(state.after, there, False, i + 1 == len(path))
            self._count(len(here))
            here = there
        return any(state.kind == "end" for state in here)

    def _reach(self, states: list[_State], found: set[_State], first: bool, last: bool) -> None:
        """Adds states and those reachable from them without a character."""
        left = list(states)
        while left:
            state = left.pop()
            self._count(1)
            if state in found or (state.kind == "^" and not first) or (state.kind == "$" and not last):
                continue
            found.add(state)
            if state.takes is None:
                left += state.after

    def _count(self, steps: int) -> None:
        self._steps += steps
        if self._steps > MOST_STEPS:
            raise ValueError(f"expected patterns that match within {MOST_STEPS} steps, got slower ones")


def _is_end(name: str, path: str) -> bool:
    begin = len(path) - len(name)
    if begin < 0 or (begin and path[begin - 1] != "."):
        return False
    return all(a in (".", b) for a, b in zip(name, path[begin:], strict=True))


@dataclass(eq=False)
class _State:
    """A state that consumes one character, or none, subject to `kind`."""

    kind: str = ""
    takes: Callable[[str], Any] | None = None
    after: list[_State] = field(default_factory=list)


_Part = Callable[[_State], _State]
"""Maps the state after a part of the key to the part's first state."""


class _Parser:
    """A recursive-descent parser."""

    def __init__(self, key: str) -> None:
        self._key = key
        if len(key) > LONGEST:
            raise self._error()
        self._tokens = list(_tokens(key))
        if sum(map(len, self._tokens)) != len(key):
            raise self._error()
        self.states = self._depth = 0
        part = self._choice()
        if self._tokens:  # an unmatched bracket
            raise self._error()
        self.start = part(self._state("end"))

    def _choice(self) -> _Part:
        parts = [self._sequence()]
        while self._tokens[:1] == ["|"]:
            self._tokens.pop(0)
            parts.append(self._sequence())
        return lambda after: self._state(after=[part(after) for part in parts])

    def _sequence(self) -> _Part:
        parts: list[_Part] = []
        while self._tokens and self._tokens[0] not in ("|", ")"):
            token = self._tokens.pop(0)
            part = self._group() if token in ("(", "(?:") else self._one(token)
            if self._tokens and self._tokens[0][0] in "*+?{":
                if token in ("^", "$"):
                    raise self._error()
                part = self._repeated(part, self._tokens.pop(0))
            parts.append(part)

        def build(after: _State) -> _State:
            for part in reversed(parts):
                after = part(after)
            return after

        return build

    def _group(self) -> _Part:
        self._depth += 1
        if self._depth > DEEPEST:
            raise self._error()
        part = self._choice()
        if not self._tokens:
            raise self._error()
        self._tokens.pop(0)
        self._depth -= 1
        return part

    def _one(self, token: str) -> _Part:
        if token in ("^", "$"):
            return lambda after: self._state(token, after=[after])
        if token[0] in "*+?{":
            raise self._error()
        try:
            takes = token.__eq__ if len(token) == 1 and token != "." else re.compile(token).match
        except re.error as error:  # [z-a]
            raise self._error() from error
        return lambda after: self._state(takes=takes, after=[after])

    def _repeated(self, part: _Part, token: str) -> _Part:
        counts = {"*": "0,", "+": "1,", "?": "0,1"}.get(token[0]) or token.strip("{}?")
        first, comma, last = counts.partition(",")
        least, most = int(first), int(last or 0) if comma else int(first)
        endless = bool(comma and not last)
        if max(least, most) > LONGEST or (most < least and not endless):
            raise self._error()

        def build(after: _State) -> _State:
            if endless:
                after = self._state(after=[after])
                after.after.append(part(after))
            else:
                end = after
                for _ in range(most - least):
                    after = self._state(after=[part(after), end])
            for _ in range(least):
                after = part(after)
            return after

        return build

    def _state(self, kind: str = "", takes: Any = None, after: list[_State] | None = None) -> _State:
        self.states += 1
        if self.states > MOST_STATES:
            raise self._error()
        return _State(kind, takes, after or [])

    def _error(self) -> ValueError:
        return ValueError(
            "expected names of layers, or patterns of .  [a-z]  \\d  (a|b)  *  +  ?  {2}  ^  $  "
            f"of at most {LONGEST} characters, got {shown(self._key)}"
        )


def _tokens(key: str) -> Iterator[str]:
    position = 0
    while (match := _TOKEN.match(key, position)) is not None:
        yield match[0]
        position = match.end()
