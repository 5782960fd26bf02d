"""A job's training settings reach the trainer: message and trainer have the same fields."""

import msgspec

from liberatai_core.contract.messages import Training
from liberatai_core.learning.training import TrainSettings


def test_the_message_and_the_trainer_agree_on_names_and_defaults() -> None:
    assert msgspec.structs.asdict(Training()) == msgspec.structs.asdict(TrainSettings())
