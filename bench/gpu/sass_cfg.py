"""Loops and ways through a kernel's basic blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property

END = -1
"""In place of a block, where control leaves."""

Cost = tuple[int, int]
Loop = frozenset[int]
"""The blocks of a natural loop, those of the loops in it included."""


class Graph:
    """Blocks by number, each with those that may come after it, END among them. Control enters at 0."""

    def __init__(self, successors: Mapping[int, Sequence[int]]) -> None:
        reached, todo = {0}, [0]
        while todo:
            for after in successors[todo.pop()]:
                if after not in reached and after != END:
                    reached.add(after)
                    todo.append(after)
        self.leaving = {block for block in reached if END in successors[block]}
        self.successors = {b: [after for after in successors[b] if after != END] for b in sorted(reached)}
        self.predecessors: dict[int, list[int]] = {block: [] for block in self.successors}
        for block, following in self.successors.items():
            for after in following:
                self.predecessors[after].append(block)

    @cached_property
    def dominators(self) -> dict[int, set[int]]:
        """Of every block, those that each way from the entry to it passes, itself among them."""
        found = {block: set(self.successors) for block in self.successors}
        found[0] = {0}
        changed = True
        while changed:
            changed = False
            for block in self.successors:
                if block:
                    above = set.intersection(*(found[b] for b in self.predecessors[block])) | {block}
                    changed |= above != found[block]
                    found[block] = above
        return found

    @cached_property
    def loops(self) -> dict[int, Loop]:
        """By their heads. A loop is what reaches a jump back to its head without passing the head."""
        bodies: dict[int, set[int]] = {}
        for block in self.successors:
            for head in self._heads(block):
                body, todo = bodies.setdefault(head, {head}), [block]
                while todo:
                    inside = todo.pop()
                    if inside not in body:
                        body.add(inside)
                        todo += self.predecessors[inside]
        return {head: frozenset(body) for head, body in bodies.items()}

    def innermost(self, blocks: Iterable[int]) -> set[Loop]:
        """The smallest loops that have one of the blocks."""
        around = ([body for body in self.loops.values() if block in body] for block in blocks)
        return {min(bodies, key=len) for bodies in around if bodies}

    def around(self, loop: Loop) -> Loop | None:
        """The smallest loop that has all of another one, and more."""
        return min((body for body in self.loops.values() if body > loop), key=len, default=None)

    def best_path(self, loop: Loop | None, cost: Callable[[int], Cost]) -> list[int]:
        """The dearest way once round a loop, or through everything; of the loops on the way, once through."""
        inside = self.successors.keys() if loop is None else loop
        head = 0 if loop is None else next(h for h, body in self.loops.items() if body is loop)
        best: dict[int, tuple[Cost, list[int]]] = {}
        for block in reversed(self._in_order(head, inside)):
            onwards = [best[after] for after in self._forward(block) if after in best]
            if block in self.leaving if loop is None else head in self.successors[block]:
                onwards.append(((0, 0), []))
            if onwards:
                (work, length), path = max(onwards, key=lambda onward: onward[0])
                own = cost(block)
                best[block] = (work + own[0], length + own[1]), [block, *path]
        return best[head][1]

    def _heads(self, block: int) -> list[int]:
        """Where a block jumps back to."""
        return [after for after in self.successors[block] if after in self.dominators[block]]

    def _forward(self, block: int) -> list[int]:
        return [after for after in self.successors[block] if after not in self.dominators[block]]

    def _in_order(self, head: int, inside: Iterable[int]) -> list[int]:
        """Blocks that can be reached from the head, each after all that lead to it, jumps back left out."""
        allowed, done, order = set(inside), set(), []
        todo = [(head, iter(self._forward(head)))]
        done.add(head)
        while todo:
            block, following = todo[-1]
            after = next((a for a in following if a in allowed and a not in done), None)
            if after is None:
                order.append(block)
                todo.pop()
            else:
                done.add(after)
                todo.append((after, iter(self._forward(after))))
        return order[::-1]
