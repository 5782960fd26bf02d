"""What hostile devices answer: signed and in form, so that only aggregation can tell."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from msgspec.structs import replace

from liberatai_agent.children import trainer_child as child
from liberatai_agent.children.messages import Answer, Done, Work
from liberatai_coordinator.sim.virtual.learning import Learn
from liberatai_core.contract.messages import work_seed
from liberatai_core.sparsifier import methods, top_k

TIMES = 10.0
"""How much larger than learnt."""


@dataclass(frozen=True, slots=True)
class Hostile:
    """Learns as `learn` does, and answers with something else.

    Attributes:
        how: the opposite of what was learnt, TIMES as large; noise of that size; or bytes that mean nothing.
    """

    learn: Learn
    how: Literal["opposite", "noise", "garbage"]

    def __call__(self, work: Work, samples: int) -> Answer:
        """Answer a task."""
        answer = self.learn(work, samples)
        if not isinstance(answer, Done):
            return answer
        seed = work_seed(work.seed, work.device, work.job, work.round)
        random = np.random.default_rng([seed, 1])
        if self.how == "garbage":
            body = random.bytes(max(16, len(answer.result.body)))
        else:
            part = child.trained_part(work).part
            learnt = methods.densify(answer.result.body, part, seed)
            size = TIMES * float(np.sqrt(np.mean(np.square(learnt)))) or TIMES
            wrong = -TIMES * learnt
            if self.how == "noise":
                wrong = random.normal(0.0, size, len(learnt)).astype(np.float32)
            method = methods.METHODS[work.codec]
            _, body = method.sparsify(
                top_k.init(part.parameters),
                wrong.astype(np.float32),
                part,
                work.density,
                seed=seed,
                decay=1.0,
            )
        return Done(result=replace(answer.result, body=body))
