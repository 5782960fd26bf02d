"""Sizes, topics and filters."""

import pytest

from liberatai_core.link.packet import matches, publish_bytes


@pytest.mark.parametrize(
    ("topic_filter", "topic", "expected"),
    [
        ("a/b", "a/b", True),
        ("a/b", "a/b/c", False),
        ("a/+", "a/b", True),
        ("a/+", "a", False),
        ("a/+", "a/", True),
        ("a/+/c", "a/b/c", True),
        ("a/+/c", "a/b/d", False),
        ("a/#", "a", True),
        ("a/#", "a/b/c", True),
        ("#", "a/b", True),
        ("+/b", "a/b", True),
        ("#", "$SYS/x", False),
        ("+/x", "$SYS/x", False),
        ("$SYS/#", "$SYS/x", True),
    ],
)
def test_filters_select_topics_as_mqtt_says(topic_filter: str, topic: str, expected: bool) -> None:
    assert matches(topic_filter, topic) is expected


@pytest.mark.parametrize(
    ("payload_bytes", "mqtt5", "qos", "expected"),
    [(0, True, 1, 8), (0, False, 1, 7), (0, False, 0, 5), (121, True, 1, 129), (122, True, 1, 131)],
)
def test_size_of_a_publish_packet(payload_bytes: int, mqtt5: bool, qos: int, expected: int) -> None:
    """Topic "a": header 1 + length 1..2 + topic 3 + identifier 2 (QoS 1) + properties 1 (MQTT 5)."""
    assert publish_bytes("a", payload_bytes, qos=qos, mqtt5=mqtt5) == expected
