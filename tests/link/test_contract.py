"""The rules of `link.Link`, held by every implementation against every broker."""

import asyncio
import re
from typing import Any

import pytest

from liberatai_core.errors import LinkError, TooLargeError, TopicError
from liberatai_core.link.link import Connected, Disconnected, Received, Will


async def test_a_message_arrives_unchanged(world: Any) -> None:
    seen = await world.peer("coordinator", world.up("#"))
    device = await world.peer("dev-a")
    payload = bytes(range(256)) * 40
    await device.link.publish(world.up("ev"), payload)
    event = await seen.next(Received)
    assert (event.topic, event.payload, event.retained) == (world.up("ev"), payload, False)
    assert event.token > 0
    await device.link.close()
    await seen.link.close()


async def test_a_message_without_guarantee_needs_no_acknowledgement(world: Any) -> None:
    seen = await world.peer("coordinator", world.up("tele"))
    device = await world.peer("dev-a")
    await device.link.publish(world.up("tele"), b"t", qos=0)
    event = await seen.next(Received)
    assert event.payload == b"t"
    seen.link.ack(event.token)
    await device.link.close()
    await seen.link.close()


async def test_messages_keep_their_order(world: Any) -> None:
    seen = await world.peer("coordinator", world.up("ev"))
    device = await world.peer("dev-a")
    wanted = [str(number).encode() for number in range(60)]
    await asyncio.gather(*(device.link.publish(world.up("ev"), payload) for payload in wanted))
    assert await seen.payloads(60) == wanted
    await device.link.close()
    await seen.link.close()


async def test_wildcards_select_topics(world: Any) -> None:
    seen = await world.peer("coordinator", world.up("+/m").replace("dev-a", "+"))
    device = await world.peer("dev-a")
    for topic in ("m", "x/n", "x/m", "x/y/m", "z/m"):
        await device.link.publish(world.up(topic), topic.encode())
    assert await seen.payloads(2) == [b"x/m", b"z/m"]
    await device.link.close()
    await seen.link.close()


async def test_what_is_retained_arrives_once_and_an_empty_message_deletes_it(world: Any) -> None:
    source = await world.peer("coordinator")
    await source.link.publish(world.pub("head/job"), b"v1", retain=True)
    await source.link.publish(world.pub("head/gone"), b"v1", retain=True)
    await source.link.publish(world.pub("head/gone"), b"", retain=True)
    device = await world.peer("dev-a", world.pub("#"))
    event = await device.next(Received)
    assert (event.topic, event.payload, event.retained) == (world.pub("head/job"), b"v1", True)
    await source.link.publish(world.pub("mark"), b"mark")
    assert (await device.next(Received)).payload == b"mark"
    await device.link.close()
    await source.link.close()


async def test_a_subscription_made_later_is_in_force_when_subscribe_returns(world: Any) -> None:
    source = await world.peer("coordinator")
    device = await world.peer("dev-a")
    await device.link.subscribe(world.pub("a"), world.pub("b"))
    await source.link.publish(world.pub("b"), b"1")
    assert (await device.next(Received)).payload == b"1"
    await device.link.unsubscribe(world.pub("b"))
    await source.link.publish(world.pub("b"), b"2")
    await source.link.publish(world.pub("a"), b"3")
    assert (await device.next(Received)).payload == b"3"
    await device.link.close()
    await source.link.close()


async def test_what_was_forgotten_while_away_stays_forgotten(world: Any) -> None:
    source = await world.peer("coordinator")
    device = await world.peer("dev-a", world.pub("a"), world.pub("b"))
    world.cut(device.link)
    await device.next(Disconnected)
    await device.link.unsubscribe(world.pub("b"))
    await device.next(Connected)
    await source.link.publish(world.pub("b"), b"no")
    await source.link.publish(world.pub("a"), b"yes")
    assert (await device.next(Received)).payload == b"yes"
    await device.link.close()
    await source.link.close()


async def test_the_will_speaks_when_the_connection_breaks(world: Any) -> None:
    seen = await world.peer("coordinator", world.up("state"))
    device = await world.peer("dev-a", will=Will(topic=world.up("state"), payload=b"lost"))
    world.cut(device.link)
    assert (await seen.next(Received)).payload == b"lost"
    late = await world.peer("observer", world.up("state"))
    event = await late.next(Received)
    assert (event.payload, event.retained) == (b"lost", True)
    for peer in (device, seen, late):
        await peer.link.close()


async def test_the_will_is_silent_after_a_goodbye(world: Any) -> None:
    seen = await world.peer("coordinator", world.up("#"))
    device = await world.peer("dev-a", will=Will(topic=world.up("state"), payload=b"lost"))
    await device.link.publish(world.up("ev"), b"bye")
    await device.link.close()
    await seen.link.publish(world.up("mark"), b"mark")
    assert await seen.payloads(2) == [b"bye", b"mark"]
    await seen.link.close()


async def test_what_was_not_acknowledged_comes_again(world: Any) -> None:
    source = await world.peer("coordinator")
    device = await world.peer("dev-a", world.down("#"))
    for payload in (b"1", b"2", b"3"):
        await source.link.publish(world.down("req"), payload)
    first = await device.next(Received)
    second = await device.next(Received, ack=False)
    third = await device.next(Received)
    assert [event.payload for event in (first, second, third)] == [b"1", b"2", b"3"]
    # An acknowledgement is on its way when the next message of ours has been answered.
    await device.link.publish(world.up("ev"), b"after")
    world.cut(device.link)
    await device.next(Connected)
    device.link.ack(second.token)  # of the connection that is gone: without effect
    assert (await device.next(Received, ack=False)).payload == b"2"
    world.cut(device.link)
    await device.next(Connected)
    assert (await device.next(Received)).payload == b"2"
    await source.link.publish(world.down("req"), b"4")
    assert (await device.next(Received)).payload == b"4"
    await device.link.close()
    await source.link.close()


async def test_a_message_can_wait_long_for_its_acknowledgement(mqtt_world: Any) -> None:
    """Amqtt gives up after 5 s by itself; training data must be on disk before the acknowledgement."""
    source = await mqtt_world.peer("coordinator")
    device = await mqtt_world.peer("dev-a", mqtt_world.down("#"))
    await source.link.publish(mqtt_world.down("req"), b"1")
    await device.next(Received, ack=False)
    await asyncio.sleep(5.5 if mqtt_world.kind == "amqtt" else 0)
    mqtt_world.cut(device.link)
    await device.next(Connected)
    assert (await device.next(Received)).payload == b"1"
    await device.link.close()
    await source.link.close()


async def test_an_unacknowledged_message_does_not_hold_up_a_subscription(world: Any) -> None:
    source = await world.peer("coordinator")
    await source.link.publish(world.pub("head"), b"1", retain=True)
    await source.link.publish(world.pub("blob"), b"2", retain=True)
    device = await world.peer("dev-a", world.pub("head"))
    head = await device.next(Received, ack=False)
    async with asyncio.timeout(3):
        await device.link.subscribe(world.pub("blob"))
        assert (await device.next(Received)).payload == b"2"
    device.link.ack(head.token)
    await device.link.close()
    await source.link.close()


async def test_the_session_keeps_messages_for_a_client_that_is_away(world: Any) -> None:
    """100 of 100 arrive; amqtt keeps none for a client without a user name."""
    source = await world.peer("coordinator")
    device = await world.peer("dev-a", world.down("#"))
    await device.link.close()
    wanted = [str(number).encode() for number in range(100)]
    for payload in wanted:
        await source.link.publish(world.down("req"), payload)
    again = await world.peer("dev-a", world.down("#"))
    assert sorted(await again.payloads(100)) == sorted(wanted)
    await again.link.close()
    await source.link.close()


async def test_nothing_is_queued_while_disconnected(world: Any) -> None:
    seen = await world.peer("coordinator", world.up("#"))
    device = await world.peer("dev-a")
    world.stop()
    await device.next(Disconnected)
    with pytest.raises(LinkError, match="not connected"):
        await device.link.publish(world.up("ev"), b"early")
    world.start()
    await device.next(Connected)
    await seen.next(Connected)
    await device.link.publish(world.up("ev"), b"late")
    assert (await seen.next(Received)).payload == b"late"
    await device.link.close()
    await seen.link.close()


async def test_subscriptions_survive_a_killed_broker(world: Any) -> None:
    device = await world.peer("dev-a", world.down("#"))
    source = await world.peer("coordinator")
    world.stop()
    assert (await device.next(Disconnected)).retry_in_s >= 0
    await device.link.subscribe(world.pub("#"))  # while away: remembered
    await source.next(Disconnected)
    world.start()
    await device.next(Connected)
    await source.next(Connected)
    await source.link.publish(world.down("req"), b"1")
    await source.link.publish(world.pub("x"), b"2")
    assert await device.payloads(2) == [b"1", b"2"]
    await device.link.close()
    await source.link.close()


async def test_a_broker_may_come_after_the_link(world: Any, peer_of: Any) -> None:
    world.stop()
    peer = await peer_of(world.link("dev-a")).open()
    await peer.next(Disconnected)
    world.start()
    await peer.next(Connected)
    await peer.link.publish(world.up("ev"), b"1")
    await peer.link.close()


async def test_an_oversize_message_is_never_sent_and_the_link_survives(world: Any) -> None:
    seen = await world.peer("coordinator", world.up("#"))
    device = await world.peer("dev-a")
    before = device.link.traffic.sent_bytes
    with pytest.raises(TooLargeError):
        await device.link.publish(world.up("x"), bytes(266_240))
    assert device.link.traffic.sent_bytes == before
    await device.link.publish(world.up("x"), bytes(262_144))
    assert len((await seen.next(Received)).payload) == 262_144
    await device.link.close()
    await seen.link.close()


async def test_two_links_with_one_identity_hear_of_it(world: Any) -> None:
    first = await world.peer("dev-a")
    second = await world.peer("dev-a")
    reason = (await first.next(Disconnected)).reason
    while world.kind != "amqtt" and not re.search("taken over|do two devices", reason):  # amqtt stops there
        reason = (await first.next(Disconnected)).reason
    await first.link.close()
    await second.link.close()


@pytest.mark.parametrize("topic", ["", "a/+/b", "a/#", "a\0b", "x" * 65_536])
async def test_an_impossible_topic_is_refused_here(world: Any, topic: str) -> None:
    link = world.link("dev-a")
    with pytest.raises(TopicError):
        await link.publish(topic, b"")


@pytest.mark.parametrize("topic_filter", ["", "a/#/b", "a+/b", "#a"])
async def test_an_impossible_filter_is_refused_here(world: Any, topic_filter: str) -> None:
    link = world.link("dev-a")
    with pytest.raises(TopicError):
        await link.subscribe(topic_filter)


async def test_close_ends_everything_and_may_be_repeated(world: Any) -> None:
    device = await world.peer("dev-a")
    await device.link.close()
    await device.link.close()
    async with asyncio.timeout(5):
        await device.task
    with pytest.raises(LinkError):
        await device.link.publish(world.up("ev"), b"late")


async def test_a_link_that_never_opened_closes(world: Any) -> None:
    await world.link("dev-a").close()


async def test_traffic_counts_whole_packets(world: Any) -> None:
    device = await world.peer("dev-a", world.down("#"))
    before = device.link.traffic
    await device.link.publish(world.up("ev"), bytes(10_000))
    after = device.link.traffic
    topic_bytes = len(world.up("ev"))
    assert 10_000 + topic_bytes < after.sent_bytes - before.sent_bytes < 10_000 + topic_bytes + 20
    assert after.received_bytes >= before.received_bytes + 4
    await device.link.close()
