"""Write the job's folder: NVFLARE's own recipe for federated averaging of numpy weights."""

import sys
from pathlib import Path

import numpy as np
from nvflare.app_common.np.recipes.fedavg import NumpyFedAvgRecipe
from work import Work, first


def main() -> None:
    """Write it to the folder that is named."""
    folder, out, script = sys.argv[1:4]
    work = Work(folder)
    start = Path(folder) / "first.npy"
    np.save(start, np.concatenate([one.ravel() for one in first(int(work.given["seed"]))]))
    recipe = NumpyFedAvgRecipe(
        name="peer",
        initial_ckpt=str(start),
        min_clients=int(work.given["devices"]),
        num_rounds=int(work.given["rounds"]) + 1,  # one more: the next round tests the weights of one
        train_script=script,
        train_args=folder,
    )
    recipe.export(out)


if __name__ == "__main__":
    main()
