"""`liberatai models commit`: a file of another program becomes a commit."""

# ruff: noqa: PLC0415 - a command imports what it needs when it runs, see `cli`

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from liberatai_coordinator.cli.model_store import author_of, open_store
from liberatai_coordinator.cli.tables import progress, size_text
from liberatai_core.errors import ConfigError

if TYPE_CHECKING:
    from liberatai_coordinator.repository.store import Store
    from liberatai_core.structure import DataContract, Parameter


def commit(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="safetensors, a torch state_dict, or ONNX.")],
    model: Annotated[str, typer.Option("--model", help="Name of the model, e.g. digits or lab/digits.")],
    family: Annotated[
        str | None, typer.Option("--family", help="Architecture that the weights are of, e.g. cnn.")
    ] = None,
    params: Annotated[
        str | None, typer.Option("--params", help="Its parameters, e.g. '{width: 16}' or width=16.")
    ] = None,
    input_shape: Annotated[
        str | None, typer.Option("--input", help="Shape of one sample, channels first, e.g. 1x8x8.")
    ] = None,
    classes: Annotated[int | None, typer.Option("--classes", help="Number of labels.")] = None,
    message: Annotated[str, typer.Option("--message", "-m", help="What is new, in words.")] = "",
    parent: Annotated[
        list[str] | None,
        typer.Option("--parent", help="Commit that it was made from [default: where the branch is]."),
    ] = None,
    branch: Annotated[str, typer.Option("--branch", help="Branch that goes to it.")] = "latest",
    metric: Annotated[
        list[str] | None, typer.Option("--metric", help="Figure that was measured, e.g. accuracy=0.97.")
    ] = None,
    licence: Annotated[str, typer.Option("--licence", help="SPDX expression, e.g. Apache-2.0.")] = "",
    labels: Annotated[str, typer.Option("--labels", help="Names of the classes, divided by commas.")] = "",
    input_range: Annotated[
        str, typer.Option("--range", help="Least and largest value of inputs, e.g. 0:1.")
    ] = "",
    author: Annotated[
        str | None, typer.Option("--author", envvar="LIBERATAI_AUTHOR", help="Who commits.")
    ] = None,
) -> None:
    """Commit a model's file. Pickles, programs and archives are refused; nothing in the file is run."""
    from liberatai_coordinator.repository import imports
    from liberatai_coordinator.repository.files import About, commit_file
    from liberatai_coordinator.repository.names import require_model, require_tag, short

    require_model(model)
    require_tag(branch)
    data = _data(input_shape, classes)
    if family is not None and data is None:
        raise ConfigError("--input", ["missing: with --family give --input and --classes"])
    about = About(
        model=model,
        message=message,
        author=author_of(author),
        licence=licence,
        labels=tuple(name.strip() for name in labels.split(",")) if labels else (),
        input_range=_range(input_range),
        metrics=_metrics(metric or []),
        data=data,
        family=family,
        params=_params(params),
    )
    with progress(f"committing {file.name}"):
        loaded = imports.load(file)
        store = open_store(context, make=True)
        parents = [store.find(one) for one in parent] if parent else _head(store, model, branch)
        made = commit_file(store, loaded, about, parents, branch=branch, origin=file.name)
    whole = sum(one.bytes for one in made.commit.variants)
    print(f"{model}:{branch} {short(made.digest)}: {size_text(whole)}, {made.commit.variants[0].name}")


def _head(store: "Store", model: str, branch: str) -> list[str]:
    return [one.digest for one in store.names(model) if one.tag == branch]


def _data(shape: str | None, classes: int | None) -> "DataContract | None":
    from liberatai_core.structure import DataContract

    if shape is None and classes is None:
        return None
    if shape is None or classes is None:
        raise ConfigError("--input", ["give --input and --classes together"])
    try:
        sides = [int(side) for side in shape.lower().split("x")]
        return msgspec.convert({"input_shape": sides, "classes": classes}, DataContract)
    except (ValueError, msgspec.ValidationError):
        raise ConfigError("--input", [f"{shape!r} and {classes}: write e.g. 1x8x8 and 10"]) from None


def _params(text: str | None) -> "dict[str, Parameter]":
    """Return parameters written as YAML, or as name=value divided by commas."""
    if not text:
        return {}
    from liberatai_core.settings import parse_mapping

    if "=" in text and not text.lstrip().startswith("{"):
        text = "{" + ", ".join(part.replace("=", ": ", 1) for part in text.split(",")) + "}"
    found = parse_mapping(text, "--params")
    wrong = [name for name, value in found.items() if not isinstance(value, int | float | str | bool)]
    if wrong:
        raise ConfigError("--params", [f"{name}: a number, a text or true and false" for name in wrong])
    return found


def _metrics(given: list[str]) -> dict[str, float]:
    found = {}
    for text in given:
        name, equals, value = text.partition("=")
        try:
            found[name] = float(value)
        except ValueError:
            equals = ""
        if not equals or not name:
            raise ConfigError("--metric", [f"{text!r}: write NAME=NUMBER"])
    return found


def _range(text: str) -> tuple[float, ...]:
    if not text:
        return ()
    try:
        low, high = (float(part) for part in text.split(":"))
    except ValueError:
        raise ConfigError("--range", [f"{text!r}: write LEAST:LARGEST, e.g. 0:1"]) from None
    return (low, high)
