"""What a simulated device does with a task: the trainer's own code, or a difference that is drawn instead.

Restoring, left-overs and the sparse codec are the trainer's in both.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from msgspec.structs import replace

from liberatai_agent.children import trainer_child as child
from liberatai_agent.children.messages import Answer, Done, Failed, Work
from liberatai_agent.events import TrainingResult
from liberatai_core.contract.messages import work_seed
from liberatai_core.errors import LiberataiError
from liberatai_core.weights import Vector

STEP: Final = 0.3
"""How far one training goes towards the weights that are wanted."""
NOISE: Final = 0.02
VARIETY: Final = 64
KEPT: Final = 64
"""Rounds and bases whose differences are remembered: late devices still train on them."""

Learn = Callable[[Work, int], Answer]
"""Does a training on a number of samples, and never raises for what a task may cause."""


@dataclass(slots=True)
class Trained:
    """Training as it is, in this process: with torch or whatever the job's family needs.

    Attributes:
        memories: what the trainer keeps between rounds, per structure: most devices start a round from the
            same weights.
        samples: what it keeps of a device's data, by file.
    """

    memories: dict[str, child.Memory] = field(default_factory=dict)
    samples: dict[str, Any] = field(default_factory=dict)

    def __call__(self, work: Work, _: int) -> Answer:
        """Train on the device's own file."""
        memory = self.memories.setdefault(work.structure.id, child.Memory())
        memory.samples = self.samples.get(work.data_path)
        answer = child.work(work, memory)
        self.samples[work.data_path] = memory.samples
        return answer


@dataclass(slots=True)
class Drawn:
    """A difference that leads towards hidden weights, with noise, instead of training.

    Its loss is the mean square distance to them: many rounds make it small, wrong updates make it large.
    Devices are dealt one of VARIETY differences per round and base, each encoded once: nothing is left over.

    Attributes:
        seed: of the hidden weights and the noise.
    """

    seed: int
    memories: dict[str, child.Memory] = field(default_factory=dict)
    wanted: dict[str, Vector] = field(default_factory=dict)
    encoded: dict[tuple[str, int, bytes, float], dict[int, TrainingResult]] = field(default_factory=dict)

    def __call__(self, work: Work, samples: int) -> Answer:
        """Draw the difference of one training."""
        try:
            result = self._dealt(work)
        except LiberataiError as error:
            return Failed(code=error.code, text=str(error)[:512])
        counts: tuple[int, ...] | None = None
        if work.share_class_counts:
            each, more = divmod(samples, work.data.classes)
            counts = tuple(each + (one < more) for one in range(work.data.classes))
        returned = tuple(one.update_id for one in work.returned)
        return Done(result=replace(result, samples=samples, class_counts=counts, returned=returned))

    def loss(self, structure: str, weights: Vector) -> float:
        """Return the mean square distance to the hidden weights."""
        return float(np.mean(np.square(weights - self._wanted(structure, len(weights)))))

    def _wanted(self, structure: str, size: int) -> Vector:
        if structure not in self.wanted:
            random = np.random.default_rng([self.seed, size])
            self.wanted[structure] = random.normal(0.0, 0.5, size).astype(np.float32)
        return self.wanted[structure]

    def _dealt(self, work: Work) -> TrainingResult:
        memory = self.memories.setdefault(work.structure.id, child.Memory())
        base = child.base_weights(work, memory)
        key = work.structure.id, work.round, work.path[-1].digest, work.density
        if key not in self.encoded:
            while len(self.encoded) >= KEPT:
                del self.encoded[next(iter(self.encoded))]
            self.encoded[key] = {}
        dealt = self.encoded[key]
        number = work_seed(work.seed, work.device, work.job, work.round) % VARIETY
        if number not in dealt:
            dealt[number] = self._learn(work, base, number)
        return dealt[number]

    def _learn(self, work: Work, base: Vector, number: int) -> TrainingResult:
        chosen = child.trained_part(work)
        wanted = self._wanted(work.structure.id, len(base))
        random = np.random.default_rng([self.seed, work.round, number])
        noise = random.normal(0.0, NOISE, len(base)).astype(np.float32)

        def difference() -> Vector:
            learnt: Vector = chosen.gather(STEP * (wanted - base) + noise)
            return learnt

        plain = replace(work, residual=None, returned=())
        _, body, _ = child.sparsified(plain, chosen.part, difference)
        return TrainingResult(body=body, samples=1, loss=self.loss(work.structure.id, base))
