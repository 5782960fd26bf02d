"""From a message of the broker to an event, or to a refusal. Pure.

Every frame is verified with the one pinned key of the coordinator before it is looked at.
"""

from dataclasses import dataclass

from liberatai_agent.events import (
    CancelArrived,
    CoordinatorChanged,
    CreditArrived,
    ReceiptArrived,
    SessionBehind,
    TaskArrived,
)
from liberatai_core.contract import topics
from liberatai_core.contract.frame import key_id, open_frame
from liberatai_core.contract.messages import (
    Cancel,
    CoordinatorState,
    Credit,
    Message,
    Receipt,
    Request,
    SessionSeen,
    Task,
    Want,
    update_id,
)
from liberatai_core.errors import SchemaError, TopicError

Asked = Want | Request
"""Words that the session of rounds has nothing to do with."""
Heard = TaskArrived | CancelArrived | CoordinatorChanged | ReceiptArrived | CreditArrived | SessionBehind


@dataclass(frozen=True, slots=True)
class Ear:
    """Hears for one device.

    Attributes:
        fleet, device: whose topics these are.
        coordinator_key: nothing else is believed.
    """

    fleet: str
    device: str
    coordinator_key: bytes

    def key(self, claimed: bytes) -> bytes | None:
        """Return the key with this id, if it may speak to us."""
        return self.coordinator_key if claimed == key_id(self.coordinator_key) else None

    def hear(self, topic: str, payload: bytes) -> Heard | Asked | None:
        """Return what a message says; None: nothing (a retained topic was emptied).

        Raises:
            LiberataiError: whatever is wrong with it; its code is counted.
        """
        place = topics.parse(topic, self.fleet)
        if not payload:
            return None
        return self._event(place, open_frame(payload, self.fleet, self.key).message, payload)

    def _event(self, place: topics.Place, message: Message, frame: bytes) -> Heard | Asked:
        match (place.leaf, message):
            case ("state", CoordinatorState()):
                if message.coordinator != place.owner:
                    raise TopicError(f"presence of {message.coordinator}")
                return CoordinatorChanged(state=message.state, epoch=message.epoch, word=frame)
            case ("task", Task()):
                self._require_own(message.device)
                wanted = update_id(message.device, message.job, message.round, message.base, message.run)
                if message.task_id != wanted:
                    raise SchemaError("task_id does not name this work")
                return TaskArrived(task=message)
            case ("task", Cancel()):
                self._require_own(message.device)
                return CancelArrived(cancel=message)
            case ("want", Want() as asked):
                self._require_own(asked.device)
                return asked
            case ("req", Request() as asked):
                self._require_own(asked.device)
                return asked
            case ("xa", Receipt()):
                self._require_own(message.device)
                return ReceiptArrived(receipt=message)
            case ("xa", Credit()):
                self._require_own(message.device)
                return CreditArrived(transfer=message.transfer, have=message.have, chunks=message.chunks)
            case ("xa", SessionSeen()):
                self._require_own(message.device)
                return SessionBehind(session=message.session)
            case _:
                raise TopicError(f"{type(message).__name__} does not belong here")

    def _require_own(self, device: str) -> None:
        if device != self.device:
            raise TopicError(f"meant for {device}")


def is_blob(topic: str, fleet: str) -> bool:
    """Whether a message is a part of a blob, which is verified by whoever asked for it.

    Raises:
        TopicError: a topic of no known form.
    """
    return topics.parse(topic, fleet).side == "pub"
