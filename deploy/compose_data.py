"""Example data for compose.yaml: digits of scikit-learn, dealt out unevenly, and a job on them."""

import sys
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

DEVICES = ("zero", "four-a", "four-b", "nuc")
ALPHA, SEED = 0.5, 1
JOB = """name: digits
data: {input_shape: [1, 8, 8], classes: 10}
structures:
  - {family: mlp, params: {hidden: 32}}
rounds: {count: 10, min_devices: 2, quorum: 0.5, deadline_s: 120}
training: {epochs: 3, learning_rate: 0.05}
evaluate: {test: test.npz}
"""


def main() -> int:
    """Write the files into the folder that is named."""
    if len(sys.argv) != 2:
        sys.stderr.write("usage: compose_data.py FOLDER\n")
        return 2
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    pixels, y = load_digits(return_X_y=True)
    x = (pixels / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    random = np.random.default_rng(SEED)
    lot = random.permutation(len(y))
    test, rest = lot[:300], lot[300:]
    shares = random.dirichlet(np.full(len(DEVICES), ALPHA), 10)
    owner = np.array([random.choice(len(DEVICES), p=shares[label]) for label in y[rest]])
    owner[:80] = np.arange(80) % len(DEVICES)  # nobody has nothing
    np.savez(folder / "test.npz", x=x[test], y=y[test])
    for number, name in enumerate(DEVICES):
        np.savez(folder / f"{name}.npz", x=x[rest[owner == number]], y=y[rest[owner == number]])
    (folder / "job.yaml").write_text(JOB)
    return 0


if __name__ == "__main__":
    sys.exit(main())
