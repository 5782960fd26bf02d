"""What both links must know about MQTT packets: their size on the wire, topic names, topic filters.

Source: OASIS MQTT 5.0, sections 1.5.5 (variable byte integer), 3.3 (PUBLISH), 4.7 (topic names and filters).
"""

from liberatai_core.errors import TopicError

MAX_TOPIC_BYTES = 65_535  # the length of a topic is written as two bytes


def publish_bytes(topic: str, payload_bytes: int, *, qos: int = 1, mqtt5: bool = True) -> int:
    """Return the whole size of a PUBLISH packet without optional properties, in bytes."""
    body = 2 + len(topic.encode()) + (2 if qos else 0) + (1 if mqtt5 else 0) + payload_bytes
    length_bytes = 1 + sum(body >= limit for limit in (1 << 7, 1 << 14, 1 << 21))
    return 1 + length_bytes + body


def check_topic(topic: str) -> None:
    """Refuse what may not be published to.

    Raises:
        TopicError: empty, too long, with a wildcard, a NUL, or characters that UTF-8 cannot carry.
    """
    _check(topic)
    if "+" in topic or "#" in topic:
        raise TopicError(f"topic {topic!r}: a wildcard is for subscriptions only")


def check_filter(topic_filter: str) -> None:
    """Refuse what is no topic filter.

    Raises:
        TopicError: empty, too long, or a wildcard that does not fill its level; `#` must come last.
    """
    _check(topic_filter)
    levels = topic_filter.split("/")
    for place, level in enumerate(levels):
        misplaced = level == "#" and place != len(levels) - 1
        if misplaced or (len(level) > 1 and ("+" in level or "#" in level)):
            raise TopicError(f"filter {topic_filter!r}: misplaced wildcard")


def _check(topic: str) -> None:
    try:
        size = len(topic.encode())
    except UnicodeEncodeError as error:
        raise TopicError(f"topic {topic!r}: not UTF-8") from error
    if not 0 < size <= MAX_TOPIC_BYTES or "\0" in topic:
        raise TopicError(f"topic {topic[:80]!r}: must have 1 to {MAX_TOPIC_BYTES} bytes and no NUL")


def matches(topic_filter: str, topic: str) -> bool:
    """Say whether a topic filter selects a topic (MQTT 5.0 section 4.7; `$` topics only by name)."""
    wanted, given = topic_filter.split("/"), topic.split("/")
    if given[0].startswith("$") and wanted[0] in ("+", "#"):
        return False
    for place, level in enumerate(wanted):
        if level == "#":
            return True
        if place >= len(given) or level not in ("+", given[place]):
            return False
    return len(wanted) == len(given)
