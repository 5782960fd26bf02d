"""`liberatai models`: versions that trainings made, and the variants of them that fit a device's storage."""

# ruff: noqa: PLC0415 - a command imports what it needs when it runs, see `cli`

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from liberatai_coordinator.cli.fit import fit
from liberatai_coordinator.cli.kit import Model, Version, client_of, group, only_structure
from liberatai_coordinator.cli.pull import pull
from liberatai_coordinator.cli.tables import (
    Column,
    Output,
    OutputOption,
    WatchOption,
    count_text,
    progress,
    show_list,
    size_text,
    when_text,
)
from liberatai_coordinator.cli.version import show_version
from liberatai_coordinator.client.views import VersionView
from liberatai_core.errors import ConfigError, DigestError

if TYPE_CHECKING:
    from liberatai_core.learning.quantised_onnx import Int8Report


class Format(StrEnum):
    """File formats of an exported model."""

    SAFETENSORS = "safetensors"
    ONNX = "onnx"
    ONNX_INT8 = "onnx-int8"


app = group("The model repository: versions, and variants for small storage.", "liberatai models list")


@app.command("list", epilog="Example: liberatai models list")
def models_list(
    context: typer.Context, output: OutputOption = Output.TABLE, watch: WatchOption = False
) -> None:
    """List the newest version of every model."""
    with client_of(context) as client:
        show_list(client.models.list, _VERSION_COLUMNS, output, watch=watch)


app.command("show", epilog="Example: liberatai models show digits --version 3")(show_version)


@app.command("log", epilog="Example: liberatai models log digits -o wide")
def models_log(
    context: typer.Context, name: Model, output: OutputOption = Output.TABLE, watch: WatchOption = False
) -> None:
    """List all versions of a model, newest first."""
    with client_of(context) as client:
        show_list(lambda: client.models.log(name), _VERSION_COLUMNS, output, watch=watch)


app.command(
    "fit",
    epilog="Example: liberatai models fit digits --budget 120KB --budget 60KB --unlabeled images.npz",
)(fit)
app.command("pull", epilog="Example: liberatai models pull digits --budget 120KB --out digits.lam")(pull)


@app.command(
    "export",
    epilog="Example: liberatai models export digits --structure cnn-width16 --format onnx --out digits.onnx",
)
def models_export(
    context: typer.Context,
    name: Model,
    out: Annotated[Path, typer.Option("--out", help="File to write.")],
    version: Version = "latest",
    structure: Annotated[
        str | None, typer.Option("--structure", help="Which one; may be left out if there is only one.")
    ] = None,
    file_format: Annotated[
        Format | None,
        typer.Option(
            "--format",
            help="safetensors, onnx or onnx-int8 [default: onnx for a file .onnx, else safetensors].",
        ),
    ] = None,
    unlabeled: Annotated[
        Path | None,
        typer.Option("--unlabeled", help="File (npz) with inputs that onnx-int8 is calibrated on."),
    ] = None,
) -> None:
    """Write the weights of one structure, exactly as devices hold them, to a file of a common format."""
    if file_format is None:
        file_format = Format.ONNX if out.suffix == ".onnx" else Format.SAFETENSORS
    int8 = file_format is Format.ONNX_INT8
    if int8 and unlabeled is None:
        raise ConfigError("--unlabeled", ["missing: onnx-int8 is calibrated on inputs like the devices'"])
    if not int8 and unlabeled is not None:
        raise ConfigError("--unlabeled", [f"only onnx-int8 is calibrated, {file_format} is exact"])
    said = ""
    with client_of(context) as client, progress(f"exporting {name}"):
        view = client.models.version(name, version)
        chosen = only_structure(view, structure)
        shape, data, content = client.models.weights(name, str(view.version), chosen)
        from liberatai_core import weights as flat
        from liberatai_core.learning import export

        vector = flat.from_bytes(content)
        if flat.digest(vector).hex() != view.digests[chosen]:
            raise DigestError(
                f"{name} version {view.version}: {chosen} does not have its digest; nothing written"
            )
        if unlabeled is not None:
            from liberatai_core.learning.dataset import load_unlabeled
            from liberatai_core.learning.quantised_onnx import to_onnx_int8

            said = _int8_text(to_onnx_int8(shape, data, vector, load_unlabeled(unlabeled, data), out))
        elif file_format is Format.ONNX:
            export.to_onnx(shape, data, vector, out)
        else:
            export.to_safetensors(shape, vector, out, _metadata(view, chosen, shape.params))
    print(f"{out}: {name} version {view.version}, {chosen}, {size_text(out.stat().st_size)}{said}")


def _int8_text(report: "Int8Report") -> str:
    said = (
        f" ({size_text(report.float_bytes)} in float32); same answer as float32 on {report.agreement:.1%} of "
        f"{report.checked} unlabeled samples, divergence {report.divergence:.2g}"
    )
    if report.kept:
        said += f"; float32 kept in {', '.join(report.kept)}"
    return said + (f"; {report.warning}" if report.warning else "")


def _metadata(view: VersionView, structure: str, params: object) -> dict[str, str]:
    return {
        "model": view.model,
        "version": str(view.version),
        "version_id": view.id,
        "structure": structure,
        "params": json.dumps(params, sort_keys=True),
        "weights_sha256": view.digests[structure],
    }


_VERSION_COLUMNS: list[Column[VersionView]] = [
    Column("MODEL", lambda row: row.model),
    Column("VERSION", lambda row: str(row.version), right=True),
    Column("ID", lambda row: row.id[:12]),
    Column("ROUND", lambda row: str(row.round), right=True),
    Column("UPDATES", lambda row: count_text(row.updates), right=True),
    Column("SIZE", lambda row: size_text(sum(row.bytes.values())), right=True),
    Column("ENSEMBLE", lambda row: row.ensemble),
    Column("CREATED", lambda row: when_text(row.created_s)),
    Column("TAGS", lambda row: ", ".join(row.tags)),
    Column("PARENT", lambda row: (row.parent or "-")[:12], wide=True),
    Column("GUARD", lambda row: row.guard, wide=True, note=True),
]
