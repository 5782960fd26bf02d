"""Golden bytes of the wire: fixed messages, a fixed key, and the frames they must give for ever.

Run `python -m tests.golden.make` from the repository's root to write `tests/golden/wire/` anew. Do that only
after a deliberate change of the protocol: every difference in these files is one that a device of an
earlier release notices.
"""

import json
from pathlib import Path
from typing import Any

import msgspec

from liberatai_core.contract import messages as m
from liberatai_core.contract.frame import Signer, encode_spec, seal
from liberatai_core.structure import DataContract, Structure, Tensor

FOLDER = Path(__file__).parent / "wire"
FLEET = "golden"
SIGNER = Signer.from_seed(bytes(range(32)), FLEET)
"""Ed25519 signatures are deterministic (RFC 8032), so a frame has exactly one form."""

DATA = DataContract(input_shape=(1, 8, 8), classes=10)
STRUCTURE = Structure(
    family="mlp",
    params={"hidden": 4},
    tensors=(
        Tensor(name="hidden.weight", shape=(4, 64)),
        Tensor(name="hidden.bias", shape=(4,)),
        Tensor(name="head.weight", shape=(10, 4)),
        Tensor(name="head.bias", shape=(10,)),
    ),
)
ID16 = bytes(range(16))
ID32 = bytes(range(100, 132))
BLOB = "abcdefghijklmnopqrstuvwxyz"
BASE = ID32[:16]
KEYFRAME = m.Step(version=3, blob=m.BlobRef(blob=BLOB, size_bytes=1234), digest=BASE)
DELTA = m.Step(version=4, blob=m.BlobRef(blob=BLOB[::-1], size_bytes=99), digest=BASE[::-1])
SPEC = m.TaskSpec(job="digits", structure=STRUCTURE, data=DATA)
FULL_SPEC = m.TaskSpec(
    job="digits",
    structure=STRUCTURE,
    data=DATA,
    codec="random_k",
    training=m.Training(epochs=2, batch_size=16, learning_rate=0.5, optimizer="adam", momentum=0.5),
    seed=42,
    deadline_s=60.5,
    share_class_counts=True,
    residual_decay=0.5,
    residual_limit=7,
)

WISHES = m.Wishes(
    pause=True,
    telemetry_s=300.0,
    max_load_others=0.5,
    min_battery_percent=60.0,
    max_temp_c=70.0,
    min_free_disk_mb=256.0,
    min_free_memory_mb=128.0,
    quota_mb_per_day=20.0,
)
SPECS = {"TaskSpec": SPEC, "TaskSpec-full": FULL_SPEC}
"""What tasks have in common: blobs, not messages."""

MINIMAL: dict[type[m.Message], m.Message] = {
    m.State: m.State(device="dev-1", state="online", session=7),
    m.Capability: m.Capability(
        device="dev-1", public_key=SIGNER.public_key, session=7, agent_version="0.1.0", tier="full"
    ),
    m.Report: m.Report(device="dev-1", session=7, phase="idle"),
    m.Telemetry: m.Telemetry(device="dev-1", session=7),
    m.Event: m.Event(device="dev-1", session=7, number=0, name="started"),
    m.EpochSeen: m.EpochSeen(device="dev-1", session=7, word=b"\x00\x01\x02\xff"),
    m.Offer: m.Offer(
        device="dev-1",
        transfer=BLOB,
        size_bytes=300_000,
        chunk_bytes=131_072,
        sha256=ID32,
        update_id=ID16,
        job="digits",
        round=5,
    ),
    m.Update: m.Update(
        update_id=ID16,
        device="dev-1",
        job="digits",
        round=5,
        epoch=2,
        structure="mlp-hidden4",
        base=BASE,
        samples=60,
        codec="topk",
        body=b"\x00\x01\x02\xff",
    ),
    m.Task: m.Task(
        task_id=ID16,
        epoch=2,
        coordinator="co1",
        device="dev-1",
        job="digits",
        round=5,
        spec=m.BlobRef(blob=BLOB[1:] + "2", size_bytes=567),
        density=0.125,
        steps=(KEYFRAME,),
    ),
    m.Cancel: m.Cancel(device="dev-1", epoch=2, coordinator="co1", job="digits", round=5),
    m.Have: m.Have(device="dev-1", session=7),
    m.Answer: m.Answer(device="dev-1", session=7, epoch=2, number=1),
    m.Request: m.Request(device="dev-1", epoch=2, number=1, what="ping"),
    m.Want: m.Want(device="dev-1", epoch=2, version=3),
    m.Credit: m.Credit(device="dev-1", transfer=BLOB, have=b"\x05", chunks=4),
    m.Receipt: m.Receipt(device="dev-1", update_id=ID16, accepted=True),
    m.SessionSeen: m.SessionSeen(device="dev-1", session=41),
    m.CertificateRequest: m.CertificateRequest(
        device="dev-1", public_key=SIGNER.public_key, nonce=ID16, request=b"\x30\x03\x02\x01\x00"
    ),
    m.CertificateReply: m.CertificateReply(device="dev-1", nonce=ID16, state="pending"),
    m.BlobManifest: m.BlobManifest(blob=BLOB, size_bytes=300_000),
    m.Head: m.Head(job="digits", epoch=2, version=4, state="running", chains={}),
    m.CoordinatorState: m.CoordinatorState(coordinator="co1", state="online", epoch=2),
}
"""One message of each kind with nothing but its required fields."""

FULL: dict[type[m.Message], m.Message] = {
    m.State: m.State(device="dev-1", state="lost", session=2**53, version="0.1.0"),
    m.Capability: m.Capability(
        device="dev-1",
        public_key=SIGNER.public_key,
        session=7,
        agent_version="0.1.0 ü",
        tier="head",
        profile="raspberry-pi-4",
        arch="aarch64",
        cores=4,
        cpu_share=0.5,
        memory_bytes=2**30,
        storage_bytes=512 * 1024,
        disk_free_bytes=2**34,
        gflops=3.25,
        up_bits_s=5e6,
        down_bits_s=2e7,
        metered=True,
        samples=60,
        data=DATA,
        families=("cnn", "mlp"),
        runtimes=("onnxruntime",),
        codecs=("topk", "dense"),
        link_measured=True,
        day_quota_bytes=50 * 2**20,
        quota_spent=True,
        telemetry_s=300.0,
    ),
    m.Report: m.Report(
        device="dev-1", session=7, phase="training", job="digits", round=5, reason="epoch 1 of 5"
    ),
    m.Telemetry: m.Telemetry(
        device="dev-1",
        session=7,
        cpu_percent=87.5,
        memory_available_bytes=2**29,
        rss_bytes=28_000_000,
        sent_bytes=1,
        received_bytes=2**40,
        temperature_c=-12.5,
    ),
    m.Have: m.Have(
        device="dev-1",
        session=7,
        version=3,
        state="failed",
        code="E_DIGEST",
        text="damaged",
        settings=WISHES,
        limited=("max_temp_c",),
        model="digits",
        model_version=4,
        structure="mlp-hidden4",
        evaluation=(8, 10),
        before=(9, 10),
        agent_version="0.1.0",
    ),
    m.Answer: m.Answer(
        device="dev-1", session=7, epoch=2, number=1, code="E_STATE", text="no", lines=("one", "zwei ü")
    ),
    m.Request: m.Request(device="dev-1", epoch=2, number=1, what="logs", lines=50),
    m.Want: m.Want(
        device="dev-1",
        epoch=2,
        version=3,
        settings=WISHES,
        model=m.ModelWish(
            model="digits",
            version=4,
            spec=m.BlobRef(blob=BLOB[1:] + "2", size_bytes=567),
            steps=(KEYFRAME, DELTA),
        ),
        agent=m.AgentWish(version="0.2.0", bundle=m.BlobRef(blob=BLOB, size_bytes=5_000_000)),
    ),
    m.Event: m.Event(device="dev-1", session=7, number=3, name="refused", code="E_DISK", text="disk full"),
    m.Update: msgspec.structs.replace(
        MINIMAL[m.Update],
        class_counts=(0, 60, 300, 70_000),
        evaluation=(55, 60),
        train_seconds=12.125,
        loss=0.75,
        sent_bytes=1000,
        received_bytes=2000,
    ),
    m.Task: msgspec.structs.replace(
        MINIMAL[m.Task], held=BASE, steps=(DELTA,), run=b"\x01\x02\x03\x04\x05\x06\x07\x08"
    ),
    m.Cancel: msgspec.structs.replace(MINIMAL[m.Cancel], held=BASE, final=(DELTA,)),
    m.Receipt: m.Receipt(
        device="dev-1", update_id=ID16, accepted=False, code="E_BUSY", text="try again later", retry=True
    ),
    m.CertificateRequest: msgspec.structs.replace(
        MINIMAL[m.CertificateRequest], claim="claim-abc", proof=b"\x30\x00"
    ),
    m.CertificateReply: m.CertificateReply(
        device="dev-1",
        nonce=ID16,
        state="issued",
        code="E_CERT",
        text="a word",
        now_s=1.8e9,
        certificate=b"\x30\x01",
        authority=b"\x30\x02",
        claim=b"\x30\x03",
        profile="pi4",
    ),
    m.BlobManifest: m.BlobManifest(blob=BLOB, size_bytes=300_000, chunk_bytes=65_536),
    m.Head: m.Head(
        job="digits", epoch=2, version=4, state="finished", chains={"mlp-hidden4": (KEYFRAME, DELTA)}
    ),
}
"""The same with every optional field away from its default (kinds that have some)."""


def cases() -> dict[str, m.Message]:
    """Return every golden message by the name of its file."""
    found: dict[str, m.Message] = {}
    for suffix, table in (("", MINIMAL), ("-full", FULL)):
        found |= {f"{kind.__name__}{suffix}": message for kind, message in table.items()}
    return found


def changed(message: Any, field: str, value: Any) -> Any:
    """Return the plain body of a message with one field set to anything; an unknown field is one too many."""
    plain = msgspec.to_builtins(message, builtin_types=(bytes,))
    if isinstance(plain, dict):
        return plain | {field: value}
    names = type(message).__struct_fields__
    place = names.index(field) if field in names else len(names)
    return [*plain[:place], value, *plain[place + 1 :]]


def where(kind: Any, field: str) -> str:
    """Return a pattern of how an error names a field: by its place in an array."""
    names = kind.__struct_fields__
    return rf"\$\[{names.index(field)}\]" if kind.__struct_config__.array_like else field


def schema() -> dict[str, Any]:
    """Return, per message, its kind byte, largest body, form, and fields in wire order with their defaults.

    A field that has its default is left out on the wire. So a default is part of the protocol: changed, it
    means something else to a reader of another release, without any byte that would tell.
    """
    parts: list[Any] = [m.TaskSpec, m.Training, m.Step, m.BlobRef, Structure, Tensor, DataContract]
    return {
        struct.__name__: {
            "kind": m.KIND_OF.get(struct),
            "max_body_bytes": m.MAX_BYTES.get(struct),
            "array": struct.__struct_config__.array_like,
            "fields": {field.encode_name: _default(field) for field in msgspec.structs.fields(struct)},
        }
        for struct in [*m.KIND_OF, *parts]
    }


def _default(field: msgspec.structs.FieldInfo) -> Any:
    if field.required:
        return "required"
    return {"default": json.loads(msgspec.json.encode(field.default))}


def hex_lines(frame: bytes) -> str:
    """Return a frame as text: the header's parts and the body, 32 bytes per line."""
    parts = [frame[:3], frame[3:4], frame[4:12], frame[12:44], frame[44:76]]
    parts += [frame[start : start + 32] for start in range(76, len(frame), 32)]
    return "\n".join(part.hex() for part in parts) + "\n"


def spec_lines(spec: m.TaskSpec) -> str:
    """Return a TaskSpec as text, 32 bytes per line."""
    data = encode_spec(spec)
    return "\n".join(data[start : start + 32].hex() for start in range(0, len(data), 32)) + "\n"


def main() -> None:
    """Write all files."""
    FOLDER.mkdir(exist_ok=True)
    for name, message in cases().items():
        (FOLDER / f"{name}.hex").write_text(hex_lines(seal(message, SIGNER)))
    for name, spec in SPECS.items():
        (FOLDER / f"{name}.hex").write_text(spec_lines(spec))
    (FOLDER / "schema.json").write_text(json.dumps(schema(), indent=1) + "\n")


if __name__ == "__main__":
    main()
