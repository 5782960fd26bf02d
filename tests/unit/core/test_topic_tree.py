"""Topics and filters in a tree select what the rules of MQTT select, one by one."""

from hypothesis import given
from hypothesis import strategies as st

from liberatai_core.link.packet import matches
from liberatai_core.link.topic_tree import TopicTree

LEVEL = st.sampled_from(["a", "b", "$s", ""])
TOPIC = st.lists(LEVEL, min_size=1, max_size=4).map("/".join)
FILTER = st.tuples(st.lists(st.sampled_from(["a", "b", "$s", "", "+"]), max_size=3), st.booleans()).map(
    lambda parts: "/".join([*parts[0], *(["#"] if parts[1] or not parts[0] else [])])
)


@given(st.lists(FILTER, max_size=8), TOPIC, st.lists(st.integers(0, 7)))
def test_the_filters_that_select_a_topic_are_those_that_match_it(
    filters: list[str], topic: str, gone: list[int]
) -> None:
    tree: TopicTree[str] = TopicTree()
    for one in filters:
        tree.put(one, one)
    for number in gone:
        if number < len(filters):
            tree.pop(filters[number])
    left = set(filters) - {filters[number] for number in gone if number < len(filters)}
    assert sorted(tree.selecting(topic)) == sorted(one for one in left if matches(one, topic))


@given(st.lists(TOPIC, max_size=8), FILTER)
def test_the_topics_that_a_filter_selects_are_those_that_match_it(topics: list[str], wanted: str) -> None:
    tree: TopicTree[int] = TopicTree()
    for one in topics:
        tree.put(one, len(one))
    assert sorted(tree.selected(wanted)) == sorted(
        {(one, len(one)) for one in topics if matches(wanted, one)}
    )
    assert dict(tree.items()) == {one: len(one) for one in topics}


def test_what_was_forgotten_leaves_nothing_behind() -> None:
    tree: TopicTree[int] = TopicTree()
    tree.put("a/b/c", 1)
    tree.put("a", 2)
    tree.pop("a/b/c")
    tree.pop("x/y")
    assert (tree.get("a"), tree.get("a/b"), tree.get("a/b/c")) == (2, None, None)
    assert tree._root.children["a"].children == {}
