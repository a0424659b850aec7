"""Control-flow graph of a compiled kernel: dominators, loops, longest and shortest paths."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property

END = -1
"""The successor of a block that exits."""

Cost = tuple[int, int]
Loop = frozenset[int]
"""The blocks of a natural loop, inner loops included."""


class Graph:
    """Basic blocks with their successors, END among them. The entry is 0."""

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
        """For each block, those on every path from the entry to it, itself included."""
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
        """By header: the blocks that reach a back edge to the header without passing through it."""
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
        """The innermost loops of the blocks."""
        around = ([body for body in self.loops.values() if block in body] for block in blocks)
        return {min(bodies, key=len) for bodies in around if bodies}

    def best_path(self, loop: Loop | None, cost: Callable[[int], Cost]) -> list[int]:
        """The path of highest cost through one iteration of a loop, or the whole graph; inner loops run
        once."""
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
        """Targets of the back edges of a block."""
        return [after for after in self.successors[block] if after in self.dominators[block]]

    def _forward(self, block: int) -> list[int]:
        return [after for after in self.successors[block] if after not in self.dominators[block]]

    def _in_order(self, head: int, inside: Iterable[int]) -> list[int]:
        """Topological order of the blocks reachable from the header, back edges left out."""
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
