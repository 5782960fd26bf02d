"""Blobs and updates come through brokers that take only small messages, also when that turns out late."""

import asyncio
import hashlib
from pathlib import Path

import pytest
from tests.integration.kit import coordinator, until

from liberatai_agent.store.blobs import BlobStore, Fetcher
from liberatai_coordinator.api.operations import Operations
from liberatai_coordinator.intake.uploads import Uploads
from liberatai_coordinator.jobs.publisher import Publisher
from liberatai_core.contract import chunks
from liberatai_core.contract.frame import Signer
from liberatai_core.contract.limits import MAX_OBJECT_BYTES
from liberatai_core.contract.messages import BlobRef, Offer
from liberatai_core.contract.topics import Topics, blob_id
from liberatai_core.link.link import Connected
from liberatai_core.link.memory import MemoryBroker, MemoryLink

FLEET = "f"
SIGNER = Signer.from_seed(bytes(32), FLEET)
TOPICS = Topics(fleet=FLEET)


async def connected(
    broker: MemoryBroker, name: str
) -> tuple[MemoryLink, asyncio.Task[None], "asyncio.Queue[object]"]:
    link, heard = MemoryLink(broker, name), asyncio.Queue[object]()
    await link.open()
    events = link.events()
    assert isinstance(await anext(events), Connected)

    async def listen() -> None:
        async for event in events:
            heard.put_nowait(event)

    return link, asyncio.create_task(listen()), heard


async def fetched(broker: MemoryBroker, ref: BlobRef, folder: Path) -> bytes:
    link, listening, heard = await connected(broker, "dev-a")
    store = BlobStore(folder)

    def keys(_key_id: bytes) -> bytes | None:
        return SIGNER.public_key

    fetcher = Fetcher(lambda: link, TOPICS, keys, store, lambda *_: None, timeout_s=60.0)

    async def deliver() -> None:
        while True:
            fetcher.deliver(await heard.get())  # type: ignore[arg-type]

    delivering = asyncio.create_task(deliver())
    try:
        async with asyncio.timeout(60):
            await fetcher.fetch(ref)
    finally:
        delivering.cancel()
        listening.cancel()
        await link.close()
    return store.path(ref.blob).read_bytes()


@pytest.mark.parametrize("size", [900, 20_000, 300_000])
@pytest.mark.parametrize("late", [False, True], ids=["known", "found out later"])
def test_a_blob_is_cut_to_what_the_broker_takes(tmp_path: Path, size: int, late: bool) -> None:
    content = bytes(n * 7 % 251 for n in range(size))

    async def run() -> None:
        broker = MemoryBroker()
        link, listening, _ = await connected(broker, "co1")
        publisher = Publisher(link=link, signer=SIGNER, topics=TOPICS)
        if not late:
            broker.max_packet_bytes = 6000
        ref = await publisher.add_blob(content, "job")
        broker.max_packet_bytes = 6000
        await publisher.cut_anew()
        longest = max(map(len, broker.retained.values()))
        assert longest <= 6000
        assert await fetched(broker, ref, tmp_path) == content
        await publisher.drop_blobs({ref.blob}, "job")
        assert not [topic for topic in broker.retained if "/b/" in topic]
        listening.cancel()
        await link.close()

    asyncio.run(run())


def test_an_upload_that_is_offered_in_smaller_pieces_starts_anew() -> None:
    content = bytes(100) * 50
    uploads = Uploads(max_bytes=MAX_OBJECT_BYTES)

    def offer(piece: int) -> Offer:
        return Offer(
            device="dev-a",
            transfer=blob_id(content),
            size_bytes=len(content),
            chunk_bytes=piece,
            sha256=hashlib.sha256(content).digest(),
            update_id=bytes(16),
            job="j",
            round=1,
        )

    uploads.offer(offer(4096), 0.0)
    uploads.chunk("dev-a", blob_id(content), 0, content[:4096], 0.0)
    uploads.offer(offer(1024), 0.0)
    found = None
    for number in range(chunks.count(len(content), 1024)):
        found = uploads.chunk("dev-a", blob_id(content), number, chunks.cut(content, number, 1024), 0.0)
    assert found == content


def test_a_coordinator_says_what_its_broker_refuses_until_the_next_connection(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        broker = MemoryBroker()
        broker.allow = lambda _client, what, topic: what == "subscribe" or "/co/" not in topic
        async with coordinator(broker, tmp_path) as service:
            await until(lambda: bool(service.broker_refuses.lines))
            told = (await Operations.of(service).health())["broker_refuses"]
            assert len(told) == 1
            assert told[0].startswith("E_BROKER: the broker refuses messages to lai/v1/")
            broker.allow = None
            broker.kill(service.config.coordinator)
            await until(lambda: any("/co/" in topic for topic in broker.retained))
            await until(lambda: not service.broker_refuses.lines)

    asyncio.run(run())
    assert sum("E_BROKER" in record.message for record in caplog.records) == 1


def test_a_coordinator_is_in_haste_only_while_a_round_is_open(tmp_path: Path) -> None:
    haste: list[bool] = []

    async def run() -> None:
        broker = MemoryBroker()
        async with coordinator(broker, tmp_path) as service:
            service.link.urgent = haste.append  # type: ignore[method-assign, assignment]
            await until(lambda: bool(service.connected))
            broker.kill(service.config.coordinator)
            await until(lambda: haste == [False])
            await until(lambda: bool(service.connected))

            class Open:
                open_round = object()

            service.runners["j"] = Open()  # type: ignore[assignment]
            broker.kill(service.config.coordinator)
            await until(lambda: haste == [False, True])
            del service.runners["j"]

    asyncio.run(run())
