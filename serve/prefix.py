"""The prefix cache: what was computed for one prompt and is found again by the next that begins the same.

A radix tree over blocks of `page` tokens. The node of a block knows its final page; pages on the way from the root are
all that grows. What does not grow (a recurrence, a window's ring) is different at every token, so a row can begin only
at nodes that have a `Checkpoint` of it. Models that need none can begin anywhere. The length of what is shared is thus
the same for every kind of state, and at least the last token of a prompt is always computed.

Where later prompts will look: at the end of the prompt; where prompts were seen to part; ever sparser in long prompts;
and behind what is being generated, one that moves along, so that a chat's next turn finds it.

What is least recently used makes room. Nodes that rows stand at are pinned, and a leaf from which nothing can begin is
not kept at all. A cache never changes what is computed, only how often.
"""

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence as Items
from itertools import count
from math import inf

from serve.memory import Checkpoint, Start, StateMemory

_BEHIND = 64  # tokens between two checkpoints of a row that generates
_FIRST = 256  # tokens of a prompt before its first checkpoint on the way; then twice as many, and so on


class Node:
    """One block of `page` tokens after those of its parents. users: rows that stand here. used: when it last was."""

    __slots__ = ("parent", "block", "children", "page", "checkpoint", "depth", "users", "used")

    def __init__(self, parent: "Node | None", block: tuple[int, ...] | None, page: int = 0) -> None:
        self.parent, self.block, self.page = parent, block, page
        self.children: dict[tuple[int, ...], Node] = {}
        self.checkpoint: Checkpoint | None = None
        self.depth = 0 if parent is None else parent.depth + 1
        self.users = self.used = 0


class Trail:
    """Where in the tree a row stands. start: where it may begin, None: fresh. stops: lengths to keep a checkpoint at.

    behind: the node with the checkpoint that moves along while the row generates.
    """

    __slots__ = ("node", "start", "stops", "behind")

    def __init__(self, node: Node, start: Start | None, stops: list[int]) -> None:
        self.node, self.start, self.stops = node, start, stops
        self.behind: Node | None = None

    @property
    def length(self) -> int:
        """Tokens that need not be computed."""
        return self.start.length if self.start else 0


class PrefixCache:
    """Over the pages and slots of `memory`, which asks it to make room. queries, hits: tokens looked for and found.

    evictions: nodes that made room.
    """

    def __init__(self, memory: StateMemory) -> None:
        self.memory, self.page = memory, memory.page
        self.queries = self.hits = self.evictions = 0
        self._behind = -(-_BEHIND // self.page) * self.page
        self._roots: dict[str, Node] = {}  # one for each salt: what has different ones shares nothing
        self._kept: OrderedDict[Node, None] = OrderedDict()  # nodes with a checkpoint, the least recently used first
        self._idle: OrderedDict[Node, None] = OrderedDict()  # leaves nobody stands at, likewise
        self._reading: Node | None = None  # whose checkpoint the row that begins is about to copy
        self._clock = count(1)
        memory.reclaim = self._reclaim

    # -- a row's way through the tree ----------------------------------------------------------------------------

    def begin(self, tokens: Items[int], salt: str = "", most: float = inf) -> Trail:
        """The longest known beginning of `tokens`, pinned until `end`; its checkpoint until the next `begin`.

        most: tokens that the caller can do without.
        """
        page = self.page
        node = root = self._roots.setdefault(salt, Node(None, salt))
        best = None
        for first in range(0, (len(tokens) - 1) // page * page, page):
            child = node.children.get(tuple(tokens[first : first + page]))
            if child is None:
                break
            node = child
            if self._resumable(node) and node.depth * page <= most:
                best = node
        parted = node.depth * page
        start, self._reading = None, best
        if best is not None:
            start = Start(best.depth * page, self._pages(best), best.checkpoint)
            if best in self._kept:
                self._kept.move_to_end(best)
        trail = Trail(root, start, self._stops(len(tokens), start.length if start else 0, parted))
        self._stand(trail, best or root)
        return trail

    def _stops(self, tokens: int, start: int, parted: int) -> list[int]:
        """Where a prompt of `tokens` tokens, of which `parted` were seen before, leaves checkpoints."""
        if not self.memory.checkpoints:
            return []
        page, stops = self.page, {parted, (tokens - 1) // self.page * self.page}
        on_the_way = -(-_FIRST // page) * page
        while on_the_way < tokens:
            stops.add(on_the_way)
            on_the_way *= 2
        return sorted(stop for stop in stops if start < stop < tokens)

    def found(self, trail: Trail, tokens: int) -> None:
        """A row of that many tokens has begun where `trail` says."""
        self._reading = None
        self.queries += tokens
        self.hits += trail.length

    def stop(self, trail: Trail, computed: int) -> int:
        """The next length a row must stand at exactly, so that a checkpoint can be taken; 0: none."""
        if not self.memory.checkpoints:
            return 0
        index = bisect_right(trail.stops, computed)
        if index < len(trail.stops):
            return trail.stops[index]
        return (computed // self._behind + 1) * self._behind

    def extend(self, trail: Trail, row: int, tokens: Items[int], computed: int) -> None:
        """`row`, at `trail`, has now `computed` tokens in its state for good; `tokens` of it are wanted."""
        node, page, known = trail.node, self.page, min(computed, len(tokens))
        if known < (node.depth + 1) * page:
            return
        owned, late = self.memory.pages_of(row), self.memory.late
        while (first := node.depth * page) + page <= known:
            block = tuple(tokens[first : first + page])
            child = node.children.get(block)
            if child is None:
                final = owned[node.depth - late] if owned and node.depth >= late else 0
                child = node.children[block] = Node(node, block, final)
                self._idle.pop(node, None)
                if final:
                    self.memory.refer(final)
            elif child.page:  # the same has been computed twice; once is enough
                self.memory.adopt(row, node.depth - late, child.page)
            node = child
        left = trail.node
        self._stand(trail, node)
        self._leave(left)
        if self.memory.checkpoints and computed == node.depth * page:
            self._checkpoint(trail, row, computed)

    def _checkpoint(self, trail: Trail, row: int, computed: int) -> None:
        node, planned = trail.node, computed in trail.stops
        if node.checkpoint is not None or not (planned or computed % self._behind == 0):
            return
        if not planned and trail.behind is not None:
            self._drop(trail.behind)
            trail.behind = None
        node.checkpoint = self.memory.checkpoint(row, computed)
        if node.checkpoint is not None:
            self._kept[node] = None
            trail.behind = trail.behind if planned else node

    def end(self, trail: Trail) -> None:
        """The row of `trail` has gone, or never was."""
        self._reading = None
        self._leave(trail.node)

    def _stand(self, trail: Trail, node: Node) -> None:
        trail.node = node
        node.users += 1
        self._idle.pop(node, None)

    def _leave(self, node: Node) -> None:
        node.users -= 1
        node.used = next(self._clock)
        self._settle(node)

    # -- what is kept --------------------------------------------------------------------------------------------

    def _resumable(self, node: Node) -> bool:
        return node.checkpoint is not None or not self.memory.checkpoints

    def _pages(self, node: Node) -> list[int]:
        """Final pages of a beginning, in order."""
        pages = []
        while node.parent is not None:
            if node.page:
                pages.append(node.page)
            node = node.parent
        return pages[::-1]

    def _settle(self, node: Node) -> None:
        """A node that nobody stands at and nothing follows can make room; if nothing begins there, it does."""
        while not node.users and not node.children:
            if node.parent is None:
                self._roots.pop(node.block, None)
                return
            if self._resumable(node):
                self._idle[node] = None
                return
            node = self._remove(node)

    def _remove(self, node: Node) -> Node:
        """Takes a leaf off the tree; returns its parent."""
        parent = node.parent
        del parent.children[node.block]
        self._idle.pop(node, None)
        if node.page:
            self.memory.forget(node.page)
        if node.checkpoint is not None:
            self._release(node)
        node.parent = None
        return parent

    def _release(self, node: Node) -> None:
        del self._kept[node]
        self.memory.drop(node.checkpoint)
        node.checkpoint = None

    def _drop(self, node: Node) -> None:
        """Gives up a checkpoint, if it is still there, and all that was kept for it alone."""
        if node.checkpoint is not None:
            self._release(node)
            self._idle.pop(node, None)
            self._settle(node)

    def _reclaim(self, slots: int, pages: int) -> None:
        """Make room: checkpoints for slots; for pages leaves, then the pages of checkpoints."""
        memory = self.memory
        slots, pages = memory.free_slots + slots, memory.free_pages + pages
        while memory.free_slots < slots and self._oldest() is not None:
            self._evict(self._oldest())
        while memory.free_pages < pages and self._idle:
            node = next(iter(self._idle))
            parent = self._remove(node)
            self._settle(parent)
            if parent in self._idle and parent.used < node.used:  # of its child's age, if it was not used by itself
                self._idle.move_to_end(parent, last=False)
            self.evictions += 1
        while memory.free_pages < pages and memory.late and self._oldest() is not None:
            self._evict(self._oldest())

    def _oldest(self) -> Node | None:
        """The least recently used checkpoint, None when there is none but what is being read."""
        node = next(iter(self._kept), None)
        return None if node is self._reading else node

    def _evict(self, node: Node) -> None:
        self._drop(node)
        self.evictions += 1
