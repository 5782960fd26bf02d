"""Values by topic or topic filter, found by walking its levels: what a broker keeps for many clients.

Rules: MQTT 5.0, section 4.7. Asking takes time with the levels of a topic, not with how many there are.
"""

from collections.abc import Iterator
from typing import Generic, TypeVar

Value = TypeVar("Value")


class _Node(Generic[Value]):
    __slots__ = ("children", "name", "value")

    def __init__(self) -> None:
        self.children: dict[str, _Node[Value]] = {}
        self.name = ""
        self.value: Value | None = None


class TopicTree(Generic[Value]):
    """A dictionary whose keys are topics, or topic filters. A value is never None."""

    def __init__(self) -> None:
        self._root: _Node[Value] = _Node()

    def get(self, name: str) -> Value | None:
        """Return the value of exactly this topic or filter."""
        node: _Node[Value] | None = self._root
        for level in name.split("/"):
            node = node.children.get(level) if node is not None else None
        return node.value if node is not None else None

    def put(self, name: str, value: Value) -> None:
        """Set the value of a topic or filter."""
        node = self._root
        for level in name.split("/"):
            node = node.children.setdefault(level, _Node())
        node.name, node.value = name, value

    def pop(self, name: str) -> None:
        """Forget a topic or filter, if it is there."""
        way = [self._root]
        levels = name.split("/")
        for level in levels:
            node = way[-1].children.get(level)
            if node is None:
                return
            way.append(node)
        way[-1].value = None
        while len(way) > 1 and not way[-1].children and way[-1].value is None:
            way.pop()
            del way[-1].children[levels[len(way) - 1]]

    def clear(self) -> None:
        """Forget everything."""
        self._root = _Node()

    def items(self) -> Iterator[tuple[str, Value]]:
        """Yield everything."""
        return _below(self._root)

    def selecting(self, topic: str) -> Iterator[Value]:
        """Yield the values of all filters that select a topic."""
        nodes, levels = [self._root], topic.split("/")
        for place, level in enumerate(levels):
            following = []
            for node in nodes:
                wildcards = place or not level.startswith("$")
                for key in ("+", level) if wildcards else (level,):
                    child = node.children.get(key)
                    if child is not None:
                        following.append(child)
                rest = node.children.get("#") if wildcards else None
                if rest is not None and rest.value is not None:
                    yield rest.value
            nodes = following
        for node in nodes:
            if node.value is not None:
                yield node.value
            rest = node.children.get("#")  # it selects what it stands under, too
            if rest is not None and rest.value is not None:
                yield rest.value

    def selected(self, topic_filter: str) -> Iterator[tuple[str, Value]]:
        """Yield all topics that a filter selects, with their values."""
        nodes = [self._root]
        for place, level in enumerate(topic_filter.split("/")):
            if level == "#":
                for node in nodes:
                    yield from _below(node, hidden=not place)
                return
            if level == "+":
                nodes = [
                    child
                    for node in nodes
                    for key, child in node.children.items()
                    if place or not key.startswith("$")
                ]
            else:
                nodes = [node.children[level] for node in nodes if level in node.children]
        for node in nodes:
            if node.value is not None:
                yield node.name, node.value


def _below(node: _Node[Value], *, hidden: bool = False) -> Iterator[tuple[str, Value]]:
    """Yield what stands at a node and below it; `hidden`: without what begins with a `$`."""
    if node.value is not None:
        yield node.name, node.value
    for key, child in list(node.children.items()):
        if not (hidden and key.startswith("$")):
            yield from _below(child)
