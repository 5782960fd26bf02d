"""What an NVFLARE client does: train for a round. The first site tests what it is given: the round before."""

import sys

import numpy as np
import nvflare.client as flare
from work import SHAPES, Work


def main() -> None:
    """Train until the job ends."""
    work = Work(sys.argv[1])
    flare.init()
    device = int(flare.get_site_name().removeprefix("site-")) - 1
    while flare.is_running():
        given = flare.receive()
        if given is None:
            break
        number = int(given.current_round) + 1
        flat = np.asarray(given.params["numpy_key"], np.float32)
        ends = np.cumsum([int(np.prod(shape)) for shape in SHAPES])[:-1]
        weights = [one.reshape(shape) for one, shape in zip(np.split(flat, ends), SHAPES, strict=True)]
        if device == 0:
            work.tested(weights, number - 1)
        found, samples, _ = work.trained(weights, device, number)
        flare.send(
            flare.FLModel(
                params={"numpy_key": np.concatenate([one.ravel() for one in found])},
                params_type=flare.ParamsType.FULL,
                metrics={"accuracy": 0.0},
                meta={"NUM_STEPS_CURRENT_ROUND": samples},
            )
        )


if __name__ == "__main__":
    main()
