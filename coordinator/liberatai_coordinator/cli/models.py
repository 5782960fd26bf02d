"""`liberatai models`: versions that trainings made, and the variants of them that fit a device's storage."""

# ruff: noqa: PLC0415 - a command imports what it needs when it runs, see `cli`

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from liberatai_coordinator.cli.fit import fit
from liberatai_coordinator.cli.kit import Model, Version, client_of, group, only_structure
from liberatai_coordinator.cli.model_care import gc, verify
from liberatai_coordinator.cli.model_commit import commit
from liberatai_coordinator.cli.model_history import diff, log, models_list
from liberatai_coordinator.cli.model_merge import merge
from liberatai_coordinator.cli.model_names import branch, tag, trust
from liberatai_coordinator.cli.model_remote import fetch, push
from liberatai_coordinator.cli.model_store import choose_store
from liberatai_coordinator.cli.pull import pull
from liberatai_coordinator.cli.tables import progress, size_text
from liberatai_coordinator.cli.version import show_version
from liberatai_coordinator.client.views import VersionView
from liberatai_core.errors import ConfigError, DigestError, StateError

if TYPE_CHECKING:
    from liberatai_coordinator.client.client import Client
    from liberatai_core.learning.quantised_onnx import Int8Report
    from liberatai_core.structure import DataContract, Structure
    from liberatai_core.weights import Vector


class Format(StrEnum):
    """File formats of an exported model."""

    SAFETENSORS = "safetensors"
    ONNX = "onnx"
    ONNX_INT8 = "onnx-int8"


app = group("The model repository: versions, and variants for small storage.", "liberatai models list")


@app.callback()
def _options(
    context: typer.Context,
    store: Annotated[
        Path | None,
        typer.Option(
            "--store",
            envvar="LIBERATAI_STORE",
            help="Folder of the repository [default: this machine's coordinator's, else one's own].",
        ),
    ] = None,
) -> None:
    choose_store(context, store)


app.command(
    "commit", epilog="Example: liberatai models commit digits.safetensors --model digits -m 'first try'"
)(commit)
app.command("list", epilog="Example: liberatai models list")(models_list)
app.command("show", epilog="Example: liberatai models show digits --version 3")(show_version)


app.command("log", epilog="Example: liberatai models log digits --graph")(log)
app.command("diff", epilog="Example: liberatai models diff digits:v1 digits --samples images.npz")(diff)
app.command("tag", epilog="Example: liberatai models tag digits:12 v1")(tag)
app.command("branch", epilog="Example: liberatai models branch digits:v1 try")(branch)
app.command("trust", epilog="Example: liberatai models trust lab $KEY --model 'lab/*'")(trust)
app.command("merge", epilog="Example: liberatai models merge digits digits:side --held-out test.npz")(merge)
app.command("push", epilog="Example: liberatai models push digits registry.example.org/lab/digits:v1")(push)
app.command("fetch", epilog="Example: liberatai models fetch registry.example.org/lab/digits:v1")(fetch)
app.command("verify", epilog="Example: liberatai models verify digits")(verify)
app.command("gc", epilog="Example: liberatai models gc --newest 100 --every 50 --dry-run")(gc)


app.command(
    "fit",
    epilog="Example: liberatai models fit digits --budget 120KB --budget 60KB --unlabeled images.npz",
)(fit)
app.command("pull", epilog="Example: liberatai models pull digits:v1 --runtime onnx --out digits")(pull)


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
    ensemble: Annotated[
        bool,
        typer.Option("--ensemble", help="All structures and how they answer together, as one ONNX file."),
    ] = False,
    unlabeled: Annotated[
        Path | None,
        typer.Option("--unlabeled", help="File (npz) with inputs that onnx-int8 is calibrated on."),
    ] = None,
) -> None:
    """Write the weights of one structure, exactly as devices hold them, to a file of a common format."""
    if ensemble:
        _export_ensemble(context, name, out, version, structure, file_format, unlabeled)
        return
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
        from liberatai_core.learning import export

        shape, data, vector = _weights(client, view, chosen)
        if unlabeled is not None:
            from liberatai_core.learning.dataset import load_unlabeled
            from liberatai_core.learning.quantised_onnx import to_onnx_int8

            said = _int8_text(to_onnx_int8(shape, data, vector, load_unlabeled(unlabeled, data), out))
        elif file_format is Format.ONNX:
            export.to_onnx(shape, data, vector, out)
        else:
            export.to_safetensors(shape, vector, out, _metadata(view, chosen, shape.params))
    print(f"{out}: {name} version {view.version}, {chosen}, {size_text(out.stat().st_size)}{said}")


def _export_ensemble(
    context: typer.Context,
    name: str,
    out: Path,
    version: str,
    structure: str | None,
    file_format: Format | None,
    unlabeled: Path | None,
) -> None:
    """Write what a version answers: its ensemble, or the structure that the guard fell back to."""
    if structure is not None:
        raise ConfigError("--ensemble", ["has all structures: leave --structure out"])
    if file_format not in (None, Format.ONNX) or unlabeled is not None or out.suffix != ".onnx":
        raise ConfigError("--ensemble", ["is an ONNX file in float32: --out must end in .onnx"])
    with client_of(context) as client, progress(f"exporting {name}"):
        view = client.models.version(name, version)
        how = client.models.ensemble(name, str(view.version))
        alone = how.use != "ensemble"
        if not (alone or how.members):
            raise StateError(f"{name} version {view.version} has no ensemble: leave --ensemble out")
        ids = (how.use,) if alone else how.members
        found = [_weights(client, view, one) for one in ids]
        import msgspec

        from liberatai_coordinator.models.ensembles import pool_of
        from liberatai_coordinator.store.manifests import Ensemble
        from liberatai_core.learning import export
        from liberatai_core.learning.ensemble_onnx import ensemble_onnx

        data = found[0][1]
        if alone:
            content = export.onnx_bytes(found[0][0], data, found[0][2])
        else:
            pool = pool_of(msgspec.convert(how, Ensemble, from_attributes=True))
            content = ensemble_onnx([(shape, vector) for shape, _, vector in found], pool, data)
        told = {
            "model": view.model,
            "version": str(view.version),
            "version_id": view.id,
            "ensemble": how.method,
            "structures": json.dumps({one: view.digests[one] for one in ids}),
        }
        export.write(out, export.described(content, told))
    what = f"the guard fell back to {how.use}" if alone else f"ensemble ({how.method}) of {', '.join(ids)}"
    print(f"{out}: {name} version {view.version}, {what}, {size_text(out.stat().st_size)}")


def _weights(client: "Client", view: VersionView, chosen: str) -> "tuple[Structure, DataContract, Vector]":
    """Return a structure, the data contract and the weights, which have their digest."""
    from liberatai_core import weights as flat

    shape, data, content = client.models.weights(view.model, str(view.version), chosen)
    vector = flat.from_bytes(content)
    if flat.digest(vector).hex() != view.digests[chosen]:
        raise DigestError(
            f"{view.model} version {view.version}: {chosen} does not have its digest; nothing written"
        )
    return shape, data, vector


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
