"""A Mosquitto on this machine as a fleet has it: mutual TLS, two doors, an authority of its own.

For tests and benchmarks, and to try a fleet's set-up on one machine: the files are those that
`liberatai broker init` writes.
"""

import getpass
import os
import signal
from dataclasses import replace
from pathlib import Path

import msgspec

from liberatai_coordinator.authority import broker_files
from liberatai_coordinator.authority.authority import Authority
from liberatai_coordinator.authority.mosquitto import MosquittoPlan
from liberatai_coordinator.authority.signing import DAY_S, Role
from liberatai_coordinator.brokers.start import (
    HOST,
    Recipe,
    RunningBroker,
    find_mosquitto,
    free_port,
    mosquitto_version,
)
from liberatai_core.certificates import certificate_pem, key_pem, new_key
from liberatai_core.errors import LinkError, NotFoundError
from liberatai_core.files import write_durably

PORT_TRIES = 5


class SecureBroker(RunningBroker):
    """A broker process with mutual TLS.

    Attributes:
        authority: of its fleet.
        files: what the broker reads.
        claim_port: of the door for claims.
        ca_file: the authority's certificate.
    """

    def __init__(
        self, recipe: Recipe, folder: Path, port: int, claim_port: int, authority: Authority
    ) -> None:
        self.authority, self.claim_port = authority, claim_port
        self.files = folder / "broker"
        self.ca_file = self.files / "certs" / "ca.crt"
        super().__init__(recipe, folder, port)

    @property
    def url(self) -> str:
        """Where devices connect to."""
        return f"mqtts://{self.host}:{self.port}"

    @property
    def claim_url(self) -> str:
        """Where claims connect to."""
        return f"mqtts://{self.host}:{self.claim_port}"

    def credential(self, name: str, role: str = "device", *, days: float = 1.0) -> Path:
        """Return a file with a new certificate and its key."""
        key = new_key()
        kind = msgspec.convert(role, Role)
        der = self.authority.issue(key.public_key(), kind, name, days * DAY_S)
        path = self.folder / f"{name}.pem"
        write_durably(path, certificate_pem(der) + key_pem(key))
        return path

    def reload(self) -> None:
        """Let it load its lists anew (SIGHUP)."""
        if self.pid is not None:
            os.kill(self.pid, signal.SIGHUP)


def start_secure_broker(folder: Path, fleet: str = "default", coordinator: str = "co1") -> SecureBroker:
    """Start a Mosquitto with mutual TLS on this machine and wait until it answers.

    Args:
        folder: for its files, and `ca/` for the authority, which is made if it is not there.
        fleet: name in every topic.
        coordinator: common name of the coordinator's certificate.

    Raises:
        NotFoundError: Mosquitto is not installed.
        LinkError: it does not start; the text ends with its last log lines.
    """
    program = find_mosquitto()
    if program is None:
        raise NotFoundError("mosquitto is not installed: apt install mosquitto")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder = folder.resolve()
    there = (folder / "ca" / "ca.crt").exists()
    authority = Authority(folder / "ca") if there else Authority.create(folder / "ca", fleet)
    version = mosquitto_version(program)
    plan = MosquittoPlan(
        folder=folder / "broker",
        release="2.0" if version.startswith(("1.", "2.0", "unknown")) else "2.1",
        user=getpass.getuser(),
        bind=HOST,
        state_dir=folder,
    )
    for attempt in range(PORT_TRIES):
        claim_port = free_port()

        def prepare(port: int, claim_port: int = claim_port) -> list[str]:
            final = replace(plan, port=port, claim_port=claim_port)
            broker_files.init(final, authority, coordinator, ("localhost", HOST))
            return [str(program), "-c", str(folder / "broker" / "mosquitto.conf")]

        recipe = Recipe("mosquitto", version, "", prepare)
        try:
            return SecureBroker(recipe, folder, free_port(), claim_port, authority)
        except LinkError as error:
            if attempt == PORT_TRIES - 1 or "in use" not in str(error):
                raise
    raise AssertionError("unreachable")
