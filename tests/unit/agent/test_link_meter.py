"""The watch measures what moves through the socket, and its counts survive restarts, crashes and a bad file."""

from pathlib import Path

import pytest

from liberatai_agent.exchange.link_estimate import ANNOUNCE_S, DAY_S, DRIFT_HALF_LIFE_S, LinkEstimate
from liberatai_agent.exchange.link_meter import FILE, SAVE_S, UNSAVED_BYTES, LinkMeter, read_link
from liberatai_core.errors import NotFoundError
from liberatai_core.link.link import Traffic

MIB = 1 << 20
NOON = 20_000 * DAY_S + DAY_S / 2


class Socket:
    """Counters and clocks that a test moves by hand."""

    def __init__(self) -> None:
        self.traffic, self.now_s, self.wall_s = Traffic(), 1000.0, NOON

    def move(self, seconds: float, sent: int = 0, received: int = 0) -> None:
        self.now_s += seconds
        self.wall_s += seconds
        self.traffic = Traffic(
            sent_bytes=self.traffic.sent_bytes + sent, received_bytes=self.traffic.received_bytes + received
        )

    def watch(self, folder: Path, quota: int | None = None, up_bits_s: float | None = None) -> LinkMeter:
        """Return the watch of an agent that has just started: its socket counts from zero."""
        self.traffic = Traffic()
        return LinkMeter(
            folder,
            quota,
            lambda: self.traffic,
            lambda: self.now_s,
            lambda: self.wall_s,
            up_bits_s=up_bits_s,
        )


def test_an_upload_is_measured_from_the_publication_to_its_acknowledgement(tmp_path: Path) -> None:
    socket = Socket()
    watch = socket.watch(tmp_path)
    with watch.sending(8192):
        socket.move(1.0)
    assert watch.link.up_bits_s == pytest.approx(65_536)


def test_an_upload_that_fails_is_not_measured(tmp_path: Path) -> None:
    socket = Socket()
    watch = socket.watch(tmp_path)

    def upload() -> None:
        with watch.sending(8192):
            socket.move(1.0)
            raise NotFoundError("gone")

    with pytest.raises(NotFoundError):
        upload()
    assert watch.link.up_bits_s is None


def test_downloads_that_overlap_share_the_link_and_are_measured_together(tmp_path: Path) -> None:
    socket = Socket()
    watch = socket.watch(tmp_path)
    with watch.fetching():
        socket.move(1.0, received=10_000)
        with watch.fetching():
            socket.move(1.0, received=10_000)
        assert watch.link.down_bits_s is None
        socket.move(2.0, received=20_000)
    assert watch.link.down_bits_s == pytest.approx(80_000)


def test_downloads_of_which_one_failed_say_nothing(tmp_path: Path) -> None:
    """A minute was waited for a blob that never came."""
    socket = Socket()
    watch = socket.watch(tmp_path)

    def in_vain() -> None:
        with watch.fetching():
            socket.move(60.0)
            raise NotFoundError("nothing came")

    with watch.fetching():
        socket.move(1.0, received=10_000)
        with pytest.raises(NotFoundError):
            in_vain()
    assert watch.link.down_bits_s is None
    with watch.fetching():
        socket.move(1.0, received=10_000)
    assert watch.link.down_bits_s == pytest.approx(80_000)


def test_rates_totals_and_the_days_bytes_survive_a_restart(tmp_path: Path) -> None:
    socket = Socket()
    watch = socket.watch(tmp_path, MIB)
    with watch.sending(8192):
        socket.move(1.0, sent=9000)
    socket.move(1.0, received=500)
    watch.count()
    watch.save()
    again = socket.watch(tmp_path, MIB)
    assert again.link == watch.link
    assert again.day_bytes == 9500
    assert again.announced.up_bits_s == watch.link.up_bits_s == pytest.approx(65_536, rel=1e-3)
    socket.move(1.0, sent=100)
    again.count()
    assert (again.day_bytes, again.link.sent_bytes) == (9600, 9100)


def test_a_low_rate_returns_to_the_profile_while_the_agent_runs_and_a_restart_keeps_what_is_reached(
    tmp_path: Path,
) -> None:
    """A bad day: 1.6 kbit/s were measured, the profile promises 1 Mbit/s, and nothing large is sent."""
    socket = Socket()
    watch = socket.watch(tmp_path, up_bits_s=1e6)
    with watch.sending(8000):
        socket.move(40.0)
    watch.count()
    before = watch.link.up_bits_s
    assert before is not None
    assert before == pytest.approx(1600, rel=0.01)
    for _ in range(12):
        socket.move(DRIFT_HALF_LIFE_S / 12)
        watch.count()
    assert watch.link.up_bits_s == pytest.approx(2 * before, rel=0.01)
    assert read_link(tmp_path).up_bits_s == watch.link.up_bits_s
    again = socket.watch(tmp_path, up_bits_s=1e6)
    socket.move(DRIFT_HALF_LIFE_S)
    again.count()
    assert again.link.up_bits_s == pytest.approx(4 * before, rel=0.01)
    assert again.look().up_bits_s == again.link.up_bits_s, "the coordinator hears of it"


@pytest.mark.parametrize(("quota", "unsaved"), [(None, UNSAVED_BYTES), (MIB, MIB // 100)])
def test_a_crash_forgets_no_more_than_its_limit(tmp_path: Path, quota: int | None, unsaved: int) -> None:
    socket = Socket()
    watch = socket.watch(tmp_path, quota)
    socket.move(1.0)
    watch.count()
    for _ in range(50):
        socket.move(1.0, sent=unsaved // 10 + 1)
        watch.count()
        assert watch.link.sent_bytes - read_link(tmp_path).sent_bytes <= unsaved


def test_an_idle_link_does_not_wear_the_card_out(tmp_path: Path) -> None:
    socket = Socket()
    watch = socket.watch(tmp_path)
    watch.count()
    written = set()
    for _ in range(120):
        socket.move(5.0, sent=2)
        watch.count()
        written.add((tmp_path / FILE).stat().st_mtime_ns)
    assert len(written) <= 1 + 600 / SAVE_S


def test_the_quota_is_spent_until_midnight_and_a_restart_does_not_renew_it(tmp_path: Path) -> None:
    socket = Socket()
    watch = socket.watch(tmp_path, MIB)
    socket.move(60.0, sent=MIB // 2, received=MIB // 2 - 1)
    watch.count()
    assert not watch.spent
    socket.move(1.0, received=1)
    watch.count()
    assert watch.spent
    watch.save()
    again = socket.watch(tmp_path, MIB)
    assert again.spent
    socket.wall_s -= 3 * DAY_S
    again.count()
    assert again.spent
    socket.wall_s = NOON + DAY_S / 2
    again.count()
    assert not again.spent


def test_a_start_on_the_next_day_has_its_quota_at_once(tmp_path: Path) -> None:
    socket = Socket()
    watch = socket.watch(tmp_path, MIB)
    socket.move(1.0, sent=MIB)
    watch.count()
    watch.save()
    socket.wall_s += DAY_S
    assert not socket.watch(tmp_path, MIB).spent


def test_without_a_quota_nothing_is_ever_spent(tmp_path: Path) -> None:
    socket = Socket()
    watch = socket.watch(tmp_path)
    socket.move(1.0, sent=1 << 50)
    watch.count()
    assert not watch.spent


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b'{"day": -1}',
        b'{"day_bytes": 1e400}',
        b'{"up_s_per_byte": 0}',
        b'{"other": 1}',
        b"9" * 10_000,
    ],
)
def test_a_damaged_file_means_to_measure_anew(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE).write_bytes(content)
    assert read_link(tmp_path) == LinkEstimate()
    socket = Socket()
    watch = socket.watch(tmp_path)
    socket.move(1.0, sent=10)
    watch.count()
    watch.save()
    assert read_link(tmp_path).sent_bytes == 10


def test_a_disk_that_refuses_is_asked_again(tmp_path: Path) -> None:
    folder = tmp_path / "later"
    socket = Socket()
    watch = socket.watch(folder)
    socket.move(1.0, sent=10)
    watch.count()
    watch.save()
    folder.mkdir()
    watch.save()
    assert read_link(folder).sent_bytes == 10


def test_the_coordinator_hears_of_a_new_rate_once_and_not_too_often(tmp_path: Path) -> None:
    socket = Socket()
    watch = socket.watch(tmp_path)
    before = watch.look()
    with watch.sending(8192):
        socket.move(1.0)
    first = watch.look()
    assert first is not before
    for _ in range(20):
        with watch.sending(8192):
            socket.move(8.0)
    assert watch.link.up_bits_s is not None
    assert first.up_bits_s is not None
    assert watch.link.up_bits_s < first.up_bits_s / 2
    assert watch.look() is first
    socket.move(ANNOUNCE_S)
    assert watch.look().up_bits_s == watch.link.up_bits_s
