"""`liberatai-agent predict`: what the model on this device says of some samples."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from liberatai_agent.commands.kit import OK, add_command, add_config
from liberatai_core.errors import DataError

SHOWN = 2
"""Classes beside the first that a table shows."""


def register(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "predict",
        _predict,
        text="Let the newest model on this device predict, finished or still in training.",
        example="liberatai-agent predict --state-dir DIR --input samples.npy",
    )
    where = parser.add_mutually_exclusive_group()
    add_config(where)
    where.add_argument("--state-dir", type=Path, default=None, metavar="DIR", help="the agent's state folder")
    where.add_argument(
        "--model", type=Path, default=None, metavar="FILE", help="a file that `liberatai models pull` wrote"
    )
    parser.add_argument(
        "--input",
        required=True,
        metavar="FILE",
        help=".npy with samples (n, …) or one sample, or .npz with x; -: a .npy from standard input",
    )
    parser.add_argument(
        "--runtime",
        choices=("torch", "onnxruntime", "numpy"),
        default=None,
        help="what computes (default: the first of these that is installed)",
    )
    parser.add_argument(
        "-o",
        "--output",
        choices=("table", "json", "name"),
        default="table",
        help="how to print (default: %(default)s)",
    )


def _predict(args: argparse.Namespace) -> int:
    from liberatai_agent.config import load_config  # noqa: PLC0415
    from liberatai_core.learning.dataset import class_names  # noqa: PLC0415
    from liberatai_core.model import load  # noqa: PLC0415

    classes: tuple[str, ...] = ()
    source = args.model or args.state_dir
    if source is None:
        config = load_config(args.config)
        source, classes = config.state_path, class_names(config.data or "")
    x = _input(args.input)
    model = load(source, runtime=args.runtime, classes=classes)
    found = model.predict(x)
    if args.output == "name":
        print("\n".join(found.names))
    elif args.output == "json":
        print(
            json.dumps(
                {
                    "job": model.name,
                    "version": found.version,
                    "runtime": model.runtime,
                    "labels": found.labels.tolist(),
                    "names": list(found.names),
                    "probabilities": [[round(float(p), 6) for p in row] for row in found.probabilities],
                }
            )
        )
    else:
        sys.stderr.write(f"{model.name or source} version {found.version}, {model.runtime}\n")
        for number, row in enumerate(found.probabilities):
            best = row.argsort()[::-1][: SHOWN + 1].tolist()
            said = ", ".join(f"{model.class_name(c)} {row[c]:.1%}" for c in best)
            print(f"{number}: {said}")
    return OK


def _input(given: str) -> Any:
    """Return the samples of a file or of standard input.

    Raises:
        DataError: there are none.
    """
    import io  # noqa: PLC0415

    import numpy as np  # noqa: PLC0415

    try:
        source: Any = io.BytesIO(sys.stdin.buffer.read()) if given == "-" else given
        found = np.load(source, allow_pickle=False)
        if isinstance(found, np.ndarray):
            return found
        with found:
            return found["x"]
    except (OSError, ValueError, EOFError, KeyError) as error:
        raise DataError(f"{given}: no .npy file of numbers, and no .npz with x ({error})") from None
