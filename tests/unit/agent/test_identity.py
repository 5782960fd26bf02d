"""Who a device is survives crashes, rot and copies: no number goes back by itself, and the key stays."""

import random
from pathlib import Path

import pytest

from liberatai_agent.membership.identity import Identity
from liberatai_agent.store.files import write_durably
from liberatai_core.errors import ConfigError

OLD, NEW = b"o" * 32, b"n" * 32


def identity(folder: Path) -> Identity:
    return Identity(folder, "dev", "test")


def slots(folder: Path) -> list[Path]:
    return sorted(folder.glob("identity.dev.?"))


def test_numbers_grow_over_restarts(tmp_path: Path) -> None:
    first = identity(tmp_path)
    assert [first.next_session(), first.next_session()] == [1, 2]
    assert identity(tmp_path).next_session() == 3
    again = identity(tmp_path)
    again.raise_session(2)
    assert again.next_session() == 4
    again.raise_session(100)
    assert again.next_session() == 101


def test_each_coordinator_has_its_own_fence(tmp_path: Path) -> None:
    mine = identity(tmp_path)
    mine.set_fence(OLD, 7, b"word")
    mine.set_fence(OLD, 8)
    assert (mine.fence(OLD).epoch, mine.fence(OLD).word) == (8, b"word")
    assert mine.fence(NEW).epoch == 0, "a coordinator that was set up anew begins at its own first epoch"
    mine.set_fence(NEW, 1)
    again = identity(tmp_path)
    assert (again.fence(OLD).epoch, again.fence(NEW).epoch) == (8, 1)
    for number in range(20):
        again.set_fence(bytes([number]) * 32, 5, b"w" * 1152)
    assert identity(tmp_path).fence(bytes([19]) * 32).epoch == 5
    assert not identity(tmp_path).damaged


def test_the_device_key_is_made_once_and_private(tmp_path: Path) -> None:
    key = identity(tmp_path / "state").signer.public_key
    assert identity(tmp_path / "state").signer.public_key == key
    path = tmp_path / "state" / "device.key"
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        identity(tmp_path / "state")


@pytest.mark.parametrize("content", [b"", b"short", b"\0" * 32, b"r" * 32, None, b"x" * 4096])
def test_a_damaged_or_missing_key_is_restored_from_its_copy(tmp_path: Path, content: bytes | None) -> None:
    first = identity(tmp_path)
    first.next_session()
    path = tmp_path / "device.key"
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    again = identity(tmp_path)
    assert again.signer.public_key == first.signer.public_key
    assert path.read_bytes() == identity(tmp_path)._record.seed
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_damaged_key_without_a_copy_is_set_aside_and_a_new_one_made(tmp_path: Path) -> None:
    write_durably(tmp_path / "device.key", b"short")
    found = identity(tmp_path)
    assert found.damaged
    assert (tmp_path / "device.key.damaged").read_bytes() == b"short"
    assert identity(tmp_path).signer.public_key == found.signer.public_key


@pytest.mark.parametrize("how", ["empty", "short", "zeros", "noise", "bit"])
@pytest.mark.parametrize("which", [0, 1])
def test_one_damaged_file_costs_nothing_and_no_number_is_used_twice(
    tmp_path: Path, how: str, which: int
) -> None:
    first = identity(tmp_path)
    first.set_fence(OLD, 3)
    first.set_fence(OLD, 4)
    used = [first.next_session(), first.next_session()]
    path = slots(tmp_path)[which]
    content = path.read_bytes()
    path.write_bytes(
        {
            "empty": b"",
            "short": content[:40],
            "zeros": bytes(4096),
            "noise": random.Random(1).randbytes(4096),
            "bit": content[:-1] + bytes([content[-1] ^ 1]),
        }[how]
    )
    again = identity(tmp_path)
    assert again.damaged
    assert again.signer.public_key == first.signer.public_key
    assert again.fence(OLD).epoch == 4
    assert again.next_session() > max(used)
    again.next_session()
    assert not identity(tmp_path).damaged, "both were written again"


def test_two_damaged_files_keep_the_key_and_begin_anew(tmp_path: Path) -> None:
    first = identity(tmp_path)
    for _ in range(3):
        first.next_session()
    for path in slots(tmp_path):
        path.write_bytes(b"")
    again = identity(tmp_path)
    assert len(again.damaged) == 2
    assert again.signer.public_key == first.signer.public_key
    again.raise_session(3)
    assert again.next_session() > 3
