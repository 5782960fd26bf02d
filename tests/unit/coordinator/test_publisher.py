"""What stands at the broker is the newest word, whatever is sent again in between."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from liberatai_coordinator.jobs.publisher import BATCH, Publisher
from liberatai_core.contract.frame import Signer
from liberatai_core.contract.messages import Cancel
from liberatai_core.contract.topics import Topics, blob_id


class SlowLink:
    """A broker that is slow with the first message of every topic, and remembers what stands."""

    max_packet_bytes = 266_240

    def __init__(self) -> None:
        self.stands: dict[str, bytes] = {}
        self.sent: list[str] = []
        self.gates: dict[str, asyncio.Event] = {}

    async def publish(self, topic: str, payload: bytes, *, retain: bool = False, qos: int = 1) -> None:
        gate = self.gates.pop(topic, None)
        if gate is not None:
            await gate.wait()
        self.sent.append(topic)
        self.stands[topic] = payload


def run(scenario: Callable[[SlowLink, Publisher], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        link = SlowLink()
        signer, topics = Signer.from_seed(bytes(32), "test"), Topics(fleet="test")
        await scenario(link, Publisher(link=link, signer=signer, topics=topics))  # type: ignore[arg-type]

    asyncio.run(asyncio.wait_for(main(), 60))


def cancel(number: int) -> Cancel:
    return Cancel(device="a", epoch=1, coordinator="co1", job="j", round=number)


def test_what_is_said_again_never_overtakes_a_newer_word() -> None:
    async def scenario(link: SlowLink, publisher: Publisher) -> None:
        await publisher.retain("t", cancel(1))
        gate = link.gates["t"] = asyncio.Event()
        again = asyncio.create_task(publisher.republish())
        await asyncio.sleep(0)
        newer = asyncio.create_task(publisher.retain("t", cancel(2)))
        await asyncio.sleep(0)
        gate.set()
        await asyncio.gather(again, newer)
        assert link.stands["t"] == publisher.retained["t"]

    run(scenario)


def test_what_was_taken_away_does_not_come_back() -> None:
    async def scenario(link: SlowLink, publisher: Publisher) -> None:
        await publisher.retain("t", cancel(1))
        gate = link.gates["t"] = asyncio.Event()
        again = asyncio.create_task(publisher.republish())
        await asyncio.sleep(0)
        gone = asyncio.create_task(publisher.clear("t"))
        await asyncio.sleep(0)
        gate.set()
        await asyncio.gather(again, gone)
        assert link.stands["t"] == b""
        assert "t" not in publisher.retained

    run(scenario)


def test_others_have_their_turn_while_a_whole_fleet_is_told() -> None:
    async def scenario(link: SlowLink, publisher: Publisher) -> None:
        turns = 0

        async def other() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        beside = asyncio.create_task(other())
        await publisher.retain_all((f"t{n}", cancel(n + 1)) for n in range(10 * BATCH))
        beside.cancel()
        assert len(link.stands) == 10 * BATCH
        assert turns >= 10

    run(scenario)


def test_blobs_that_an_earlier_start_left_are_taken_away_and_its_own_are_not() -> None:
    async def scenario(link: SlowLink, publisher: Publisher) -> None:
        kept, left = b"kept", b"left" * 100_000
        ref = await publisher.add_blob(kept, "job")
        await publisher.forget_blobs({ref.blob: len(kept), blob_id(left): len(left)})
        assert link.stands.pop(publisher.topics.blob(ref.blob, 0)) == kept
        assert link.stands
        assert set(link.stands.values()) == {b""}
        assert all(blob_id(left) in topic for topic in link.stands)

    run(scenario)


def test_a_blob_stands_until_every_job_that_needs_it_has_dropped_it() -> None:
    async def scenario(link: SlowLink, publisher: Publisher) -> None:
        ref = await publisher.add_blob(b"start", "one")
        publisher.hold({ref.blob}, "two")
        topic = publisher.topics.blob(ref.blob, 0)
        await publisher.drop_blobs({ref.blob}, "one")
        await publisher.drop_blobs({ref.blob}, "one")
        assert link.stands[topic] == b"start"
        await publisher.drop_blobs({ref.blob}, "two")
        assert link.stands[topic] == b""
        assert not publisher.holders

    run(scenario)


def test_two_jobs_that_drop_the_same_blobs_at_once_do_not_disturb_each_other() -> None:
    async def scenario(link: SlowLink, publisher: Publisher) -> None:
        refs = [await publisher.add_blob(bytes([n]) * 200_000, "one") for n in range(3)]
        names = {ref.blob for ref in refs}
        publisher.hold(names, "two")
        await asyncio.gather(publisher.drop_blobs(names, "one"), publisher.drop_blobs(names, "two"))
        assert set(link.stands.values()) == {b""}

    run(scenario)


def test_a_blob_that_is_needed_again_while_it_is_taken_away_stands_whole() -> None:
    async def scenario(link: SlowLink, publisher: Publisher) -> None:
        content = bytes(range(256)) * 2000
        ref = await publisher.add_blob(content, "one")
        first, *others = publisher.blobs[ref.blob]
        assert others
        gate = link.gates[first] = asyncio.Event()
        gone = asyncio.create_task(publisher.drop_blobs({ref.blob}, "one"))
        await asyncio.sleep(0)
        again = asyncio.create_task(publisher.add_blob(content, "two"))
        await asyncio.sleep(0)
        gate.set()
        await asyncio.gather(gone, again)
        assert all(link.stands[topic] for topic in (first, *others))

    run(scenario)
