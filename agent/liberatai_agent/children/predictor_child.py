"""The predicting process: answers on a Unix socket with the newest model of the agent's state folder.

`python -m liberatai_agent.children.predictor_child PARENT_PID SOCKET STATE_DIR IDLE_S [DATA]`: SOCKET is a
file descriptor that it inherits and listens on. It ends after IDLE_S without a question, and with its parent.

A question is four bytes of length (big-endian) and so many bytes: a .npy file, or JSON {"x": [[…], …]}. The
answer has the same form, in JSON: {"labels", "names", "probabilities", "job", "version", "runtime"}, or
{"error", "text"}. Several questions may follow one another on a connection.
"""

import io
import json
import socket
import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from liberatai_agent.children.confine import confine
from liberatai_core.errors import DataError, LiberataiError, TooLargeError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from liberatai_core.model import Model

LENGTH = struct.Struct(">I")
MAX_QUESTION_BYTES = 64 << 20
"""A sample has at most 64 MiB as float32."""
NPY = b"\x93NUMPY"
PATIENCE_S = 10.0
"""For the rest of a question: who stops in the middle of one must not keep others waiting."""


class Answers:
    """Answers questions; loads the model with the first one, and again while there is none.

    Args:
        folder: the agent's state.
        data: its private file, for the names of classes; "" if there is none.
    """

    def __init__(self, folder: Path, data: str) -> None:
        self._folder, self._data = folder, data
        self._model: Model | None = None

    def answer(self, question: bytes) -> dict[str, Any]:
        """Return the answer to a question; never raises for what stands in it."""
        try:
            return self._answer(inputs_of(question))
        except LiberataiError as error:
            return {"error": error.code, "text": str(error)}
        except MemoryError:
            return {"error": TooLargeError.code, "text": "not enough memory for so many samples"}

    def _answer(self, x: "NDArray[np.generic]") -> dict[str, Any]:
        from liberatai_core.learning.dataset import class_names  # noqa: PLC0415
        from liberatai_core.model import load  # noqa: PLC0415 - imports numpy

        if self._model is None:
            self._model = load(self._folder, classes=class_names(self._data), light=True)
        model = self._model
        found = model.predict(x)
        return {
            "labels": found.labels.tolist(),
            "names": list(found.names),
            "probabilities": [[round(float(p), 6) for p in row] for row in found.probabilities],
            "job": model.name,
            "version": found.version,
            "runtime": model.runtime,
        }


def inputs_of(question: bytes) -> "NDArray[np.generic]":
    """Return the samples in a question.

    Raises:
        DataError: there are none.
    """
    import numpy as np  # noqa: PLC0415

    try:
        if question.startswith(NPY):
            return np.asarray(np.load(io.BytesIO(question), allow_pickle=False))
        asked = json.loads(question)
        return np.asarray(asked["x"], dtype=np.float32)
    except (ValueError, TypeError, KeyError, EOFError, RecursionError) as error:
        raise DataError(f'no samples: send a .npy file or {{"x": [[…], …]}} ({error})') from None


def serve(listener: socket.socket, answers: Answers, idle_s: float) -> None:
    """Answer one connection after the other until nobody asks for so long."""
    listener.settimeout(idle_s)
    while True:
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            return
        with connection:
            connection.settimeout(PATIENCE_S)
            try:
                _converse(connection, answers)
            except (OSError, TimeoutError):
                continue


def _converse(connection: socket.socket, answers: Answers) -> None:
    while head := _received(connection, LENGTH.size):
        size = LENGTH.unpack(head)[0]
        if size > MAX_QUESTION_BYTES:
            text = f"a question of {size} bytes, at most {MAX_QUESTION_BYTES}"
            _say(connection, {"error": TooLargeError.code, "text": text})
            return
        _say(connection, answers.answer(_received(connection, size)))


def _received(connection: socket.socket, size: int) -> bytes:
    """Return exactly so many bytes; none if the other side closed before the first."""
    parts, missing = [], size
    while missing:
        part = connection.recv(min(missing, 1 << 16))
        if not part:
            if missing == size:
                return b""
            raise ConnectionResetError
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)


def _say(connection: socket.socket, answer: dict[str, Any]) -> None:
    body = json.dumps(answer).encode()
    connection.sendall(LENGTH.pack(len(body)) + body)


def main(argv: Sequence[str]) -> int:
    """Confine the process, then serve."""
    confine(int(argv[0]))
    listener = socket.socket(fileno=int(argv[1]))
    serve(listener, Answers(Path(argv[2]), argv[4] if len(argv) > 4 else ""), float(argv[3]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
