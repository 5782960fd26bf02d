"""The process that makes keys and requests and checks certificates: it loads `cryptography`, the agent not.

One task on standard input, one answer on standard output (msgpack). It runs for half a second, some times a
year.
"""

import sys
from pathlib import Path

import msgspec

from liberatai_agent.children.certificates import CertificateCheck, CertificateTask, Made
from liberatai_core.certificates import (
    certificate_pem,
    key_of,
    key_pem,
    load,
    new_key,
    prove,
    request,
    require_pair,
)
from liberatai_core.contract.messages import claimed
from liberatai_core.errors import CertificateError, LiberataiError


def main() -> int:
    """Do one task."""
    task = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=CertificateTask | CertificateCheck)
    try:
        answer = _make(task) if isinstance(task, CertificateTask) else _check(task)
    except (LiberataiError, OSError) as error:
        answer = Made(fault=str(error))
    sys.stdout.buffer.write(msgspec.msgpack.encode(answer))
    return 0


def _make(task: CertificateTask) -> Made:
    key = new_key()
    wanted, proof = request(key, task.device), b""
    if task.claim_file:
        claim = key_of(Path(task.claim_file).read_bytes(), task.claim_file)
        proof = prove(claim, claimed(task.fleet, task.device, task.public_key, wanted))
    return Made(key=key_pem(key), request=wanted, proof=proof)


def _check(task: CertificateCheck) -> Made:
    both = b""
    if task.certificate:
        require_pair(task.certificate, task.key, Path(task.ca_file).read_bytes(), task.name)
        both = certificate_pem(task.certificate) + task.key
    if task.claim and load(task.claim).public_key() != key_of(task.key).public_key():
        raise CertificateError(f"{task.name}: the claim credential belongs to another key")
    return Made(key=both, claim=certificate_pem(task.claim) + task.key if task.claim else b"")


if __name__ == "__main__":
    sys.exit(main())
