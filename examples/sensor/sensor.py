"""A sensor loop beside an agent: predict, collect labels, let the agent train with them.

Every reading is shown to the newest model on this device. When somebody says what it really was (here: the
file of the simulated sensor), the reading and its label go into the agent's private data file. The agent sees
that the file has changed, and trains with it in the next round; nothing else has to be told.

    python sensor.py --state-dir /var/lib/liberatai-agent --data private.npz --readings stream.npz
"""

import argparse
import io
import json
import socket
import struct
from pathlib import Path

import numpy as np


class Model:
    """The newest model of the agent, through its local socket: a length, a .npy file; a length, JSON."""

    def __init__(self, state_dir: Path) -> None:
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(str(state_dir / "predict.sock"))

    def ask(self, readings: np.ndarray) -> dict:
        question = io.BytesIO()
        np.save(question, readings)
        self._connection.sendall(struct.pack(">I", question.tell()) + question.getvalue())
        return json.loads(self._received(struct.unpack(">I", self._received(4))[0]))

    def _received(self, size: int) -> bytes:
        found = b""
        while len(found) < size:
            part = self._connection.recv(size - len(found))
            if not part:
                raise ConnectionError("the agent closed the connection")
            found += part
        return found


def add(data: Path, x: np.ndarray, y: np.ndarray) -> int:
    """Put labelled readings behind those in the private file, whole or not at all; return how many there are."""
    kept = {}
    if data.exists():
        with np.load(data, allow_pickle=False) as before:
            kept = dict(before)
            x, y = np.concatenate([before["x"], x]), np.concatenate([before["y"], y])
    part = data.with_suffix(".part.npz")
    np.savez(part, **{**kept, "x": x, "y": y})
    part.replace(data)
    return len(y)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--state-dir", type=Path, required=True, help="the agent's state folder")
    parser.add_argument("--data", type=Path, required=True, help="the agent's private .npz: labels go there")
    parser.add_argument("--readings", type=Path, required=True, help=".npz that plays the sensor: x and y")
    parser.add_argument("--every", type=int, default=20, help="readings between two writes (default: 20)")
    args = parser.parse_args()
    model, right, new = Model(args.state_dir), 0, []
    with np.load(args.readings, allow_pickle=False) as stream:
        readings, truth = stream["x"], stream["y"]
    for number, (reading, label) in enumerate(zip(readings, truth, strict=True), start=1):
        answer = model.ask(reading[None])
        if "error" in answer:
            raise SystemExit(f"{answer['error']}: {answer['text']}")
        right += answer["labels"][0] == label  # what an operator would confirm or correct
        new.append((reading, label))
        if number % args.every == 0 or number == len(readings):
            x, y = (np.stack(part) for part in zip(*new, strict=True))
            count, new = add(args.data, x, y), []
            said = f"version {answer['version']}: {right}/{number} right, last {answer['names'][0]}"
            print(f"{said}; {count} labelled readings to train with")


if __name__ == "__main__":
    main()
