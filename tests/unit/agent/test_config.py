"""The agent's settings: strict, complete in their complaints, relative to their file."""

from pathlib import Path

import pytest

from liberatai_agent.config import load_config, parse_config
from liberatai_core.errors import ConfigError, NotFoundError

GOOD = f"fleet: home\ndevice: dev-a\ncoordinator_key: {'ab' * 32}\n"


def test_three_keys_are_enough(tmp_path: Path) -> None:
    config = parse_config(GOOD, "agent.yaml", tmp_path)
    assert config.key_bytes == b"\xab" * 32
    assert config.data is None
    assert config.gate.max_load_others is None


def test_paths_are_relative_to_the_settings_file(tmp_path: Path) -> None:
    (tmp_path / "agent.yaml").write_text(
        GOOD + "state_dir: state\ndata: /abs/data.npz\nprofile: ./board.yaml\n"
    )
    config = load_config(tmp_path / "agent.yaml")
    assert config.state_dir == str(tmp_path / "state")
    assert config.data == "/abs/data.npz"
    assert config.profile == str(tmp_path / "board.yaml")


def test_all_faults_are_reported_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(
            "fleet: Home\ndevice: dev-a\nkeepalive_s: 0\nbrokr: x\ngate: {max_temp_c: hot}\n",
            "agent.yaml",
            tmp_path,
        )
    text = str(caught.value)
    assert len(caught.value.faults) == 5
    for name in ("fleet", "coordinator_key: missing", "keepalive_s", "brokr: unknown key", "gate.max_temp_c"):
        assert name in text


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("broker: http://x", "must be mqtt://"),
        ("broker: mqtt://", "must be mqtt://"),
        ("broker: mqtt://user:secret@host", "no credentials"),
        ("broker: mqtt://host:99999", "must be mqtt://"),
        ("password_file: pw", "needs username"),
        ("cert_file: c.pem", "give both or none"),
        ("ca_file: ca.pem", "mqtts://"),
    ],
)
def test_what_no_single_key_shows_is_found(tmp_path: Path, line: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        parse_config(GOOD + line, "agent.yaml", tmp_path)


def test_a_missing_file_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        load_config(tmp_path / "absent.yaml")


def test_a_link_has_no_quota_unless_one_is_set(tmp_path: Path) -> None:
    assert parse_config(GOOD, "agent.yaml", tmp_path).link.quota_bytes is None
    half = parse_config(GOOD + "link: {metered: true, quota_mb_per_day: 0.5}\n", "agent.yaml", tmp_path)
    assert half.link.quota_bytes == 1 << 19
    tiny = parse_config(GOOD + "link: {quota_mb_per_day: 1.0e-9}\n", "agent.yaml", tmp_path)
    assert tiny.link.quota_bytes == 1


@pytest.mark.parametrize(
    "link", ["{quota_mb_per_day: 0}", "{quota_mb_per_day: -1}", "{metered: often}", "{mb: 1}"]
)
def test_a_faulty_link_is_refused(tmp_path: Path, link: str) -> None:
    with pytest.raises(ConfigError, match="link"):
        parse_config(GOOD + f"link: {link}\n", "agent.yaml", tmp_path)
