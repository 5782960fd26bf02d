"""What the fleet wishes a device to be like, and what it is like."""

from typing import Annotated, Literal

from msgspec import Meta

from liberatai_core.contract import limits
from liberatai_core.contract.messages.base import Counter, DeviceId, Message, Name, Sums, Text, Version
from liberatai_core.contract.messages.blobs import BlobRef, Step
from liberatai_core.structure import MAX_ID


class Wishes(Message, frozen=True, kw_only=True):
    """Settings that a fleet may wish for; None: as the device has it. They tighten, they never loosen.

    Attributes:
        pause: no training.
        telemetry_s: seconds between two samples of load and traffic.
        max_load_others, min_battery_percent, max_temp_c, min_free_disk_mb, min_free_memory_mb: of the gate.
        quota_mb_per_day: of the link.
    """

    pause: bool = False
    telemetry_s: Annotated[float, Meta(ge=1, le=86_400)] | None = None
    max_load_others: Annotated[float, Meta(ge=0, le=4096)] | None = None
    min_battery_percent: Annotated[float, Meta(ge=0, le=100)] | None = None
    max_temp_c: Annotated[float, Meta(gt=0, le=200)] | None = None
    min_free_disk_mb: Annotated[float, Meta(ge=0, le=1e9)] | None = None
    min_free_memory_mb: Annotated[float, Meta(ge=0, le=1e9)] | None = None
    quota_mb_per_day: Annotated[float, Meta(gt=0, le=1e9)] | None = None


class Have(Message, frozen=True, kw_only=True):
    """Retained: what the device is like, measured by the newest Want.

    Attributes:
        version: of the Want; 0: none was seen.
        state: "done": it is as wished; "working": on the way; "failed": it could not be done, and the device
            is as before; "refused": it is not done on principle.
        code, text: why, if it is not done.
        settings: as they are in force.
        limited: names of settings that the device's own limits hold tighter than was wished.
        model, model_version, structure: that is in use; "" and 0: none.
        evaluation: (correct, total) of the new model on the local hold-out; None: nothing is held out.
        before: the same of the model that was in use before, or still is.
        agent_version: that runs.
    """

    device: DeviceId
    session: Counter
    version: Counter = 0
    state: Literal["done", "working", "failed", "refused"] = "done"
    code: Annotated[str, Meta(max_length=32)] = ""
    text: Text = ""
    settings: Wishes = Wishes()
    limited: Annotated[tuple[Annotated[str, Meta(max_length=32)], ...], Meta(max_length=16)] = ()
    model: Annotated[str, Meta(max_length=64)] = ""
    model_version: Version = 0
    structure: Annotated[str, Meta(max_length=MAX_ID)] = ""
    evaluation: Sums | None = None
    before: Sums | None = None
    agent_version: Annotated[str, Meta(max_length=64)] = ""


class ModelWish(Message, frozen=True, kw_only=True, array_like=True):
    """A version of a model that a device shall hold and use.

    Attributes:
        spec: a TaskSpec with its structure and the form of its data.
        steps: the whole path to its weights, a keyframe first.
    """

    model: Name
    version: Version
    spec: BlobRef
    steps: Annotated[tuple[Step, ...], Meta(min_length=1, max_length=limits.MAX_CHAIN)]


class AgentWish(Message, frozen=True, kw_only=True, array_like=True):
    """A release of the agent that shall run: its bundle, signed with the release key."""

    version: Annotated[str, Meta(min_length=1, max_length=64)]
    bundle: BlobRef


class Want(Message, frozen=True, kw_only=True):
    """Retained, one per device: what it shall be like, as a whole.

    Attributes:
        epoch: of the coordinator that says so; lower ones than the highest seen are ignored.
        version: grows with every change of it.
        model: None: none by wish.
        agent: None: whatever runs.
    """

    device: DeviceId
    epoch: Counter
    version: Counter
    settings: Wishes = Wishes()
    model: ModelWish | None = None
    agent: AgentWish | None = None
