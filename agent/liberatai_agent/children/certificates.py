"""Keys, requests and checks of certificates, done by a process of their own (`certificate_child`).

`cryptography` takes 6 MiB, which an agent that runs for months needs for half a second, some times a year.
"""

import asyncio
import os
from pathlib import Path

import msgspec

from liberatai_agent.children.start import ROOT, environment
from liberatai_core import processes
from liberatai_core.errors import CertificateError

PATIENCE_S = 60.0
"""A board takes ten seconds to import `cryptography` from a slow card."""


class CertificateTask(msgspec.Struct, frozen=True, kw_only=True, tag="make"):
    """Make a key and a request for this device; `claim_file`: proven with the claim's key."""

    fleet: str
    device: str
    public_key: bytes
    claim_file: str = ""


class CertificateCheck(msgspec.Struct, frozen=True, kw_only=True, tag="check"):
    """Check what was issued against the key, the pinned authority and the name."""

    certificate: bytes
    claim: bytes
    key: bytes
    ca_file: str
    name: str


class Made(msgspec.Struct, frozen=True, kw_only=True):
    """The child's answer.

    Attributes:
        key: private key (PEM); of a check: certificate and key as they are written to a file.
        request: of a task (DER).
        claim: of a check: claim certificate and key as they are written to a file.
        proof: of a task.
        fault: what is wrong; "": nothing.
    """

    key: bytes = b""
    request: bytes = b""
    claim: bytes = b""
    proof: bytes = b""
    fault: str = ""


async def ask_child(task: CertificateTask | CertificateCheck) -> Made:
    """Let a child do one task.

    Raises:
        CertificateError: it found something wrong, or could not do it.
    """
    child = await asyncio.create_subprocess_exec(
        *processes.command("liberatai_agent.children.certificate_child"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        cwd=ROOT,
        env=environment(Path(os.sep)),
    )
    try:
        async with asyncio.timeout(PATIENCE_S):
            output, _ = await child.communicate(msgspec.msgpack.encode(task))
        made = msgspec.msgpack.decode(output, type=Made)
    except TimeoutError:
        raise CertificateError(f"the process that makes keys did not end in {PATIENCE_S:.0f} s") from None
    except msgspec.MsgspecError:
        raise CertificateError("the process that makes keys has failed; see the lines above") from None
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
    if made.fault:
        raise CertificateError(made.fault)
    return made
