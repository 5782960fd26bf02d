"""`liberatai models pull`: the variant that fits, checked and written to a file."""

# ruff: noqa: PLC0415 - a command imports what it needs when it runs, see `cli`

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from liberatai_coordinator.cli.kit import Version, budget_of, budget_of_profile, client_of
from liberatai_coordinator.cli.model_store import load, open_store
from liberatai_coordinator.cli.tables import Output, OutputOption, clean, dump, progress, show_one
from liberatai_coordinator.client.client import Client
from liberatai_coordinator.client.views import VariantDetail, VariantView
from liberatai_core.contract.limits import MAX_OBJECT_BYTES
from liberatai_core.errors import ConfigError, DigestError, DiskError, NotFoundError
from liberatai_core.spelling import meant


class Runtime(StrEnum):
    """What shall run a pulled model."""

    SAFETENSORS = "safetensors"
    NUMPY = "numpy"
    ONNX = "onnx"
    ONNX_INT8 = "onnx-int8"


def pull(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="Commit of the repository, or name of a model.")],
    out: Annotated[
        Path, typer.Option("--out", help="Folder to write, or a file .lam for a fitted variant alone.")
    ],
    budget: Annotated[
        str | None, typer.Option("--budget", help="The best variant whose file is not larger, e.g. 120KB.")
    ] = None,
    profile: Annotated[
        str | None, typer.Option("--profile", help="The best variant that this class of hardware can store.")
    ] = None,
    variant: Annotated[
        str | None, typer.Option("--variant", help="This variant: the beginning of its id.")
    ] = None,
    structure: Annotated[
        str | None, typer.Option("--structure", help="Only variants made from this structure.")
    ] = None,
    runtime: Annotated[
        Runtime | None, typer.Option("--runtime", help="What shall run it: a folder gets that form.")
    ] = None,
    unlabeled: Annotated[
        Path | None, typer.Option("--unlabeled", help="Inputs (npz) that onnx-int8 is calibrated on.")
    ] = None,
    version: Version = "latest",
    output: OutputOption = Output.TABLE,
) -> None:
    """Bring a commit into the form that fits: picked from what is stored, or made; it says why."""
    if out.suffix != ".lam":
        room = budget_of(budget, "--budget") if budget is not None else None
        if profile is not None:
            room = min(room or MAX_OBJECT_BYTES, budget_of_profile(profile))
        _from_repository(context, name, out, runtime, room, variant or structure, unlabeled, output)
        return
    given = [one for one in (budget, profile, variant) if one is not None]
    if len(given) != 1:
        raise ConfigError("models pull", ["give one of --budget, --profile and --variant"])
    with client_of(context) as client, progress(f"pulling {name}"):
        if variant is not None:
            detail = client.variants.show(name, variant)
        else:
            room = budget_of(budget, "--budget") if budget is not None else budget_of_profile(str(profile))
            detail = client.variants.show(name, _best(client, name, version, room, structure).id)
        file = client.variants.file(detail.variant)
    _write_checked(detail, file, out)
    if output is Output.NAME:
        show_one(detail.variant, output)
        return
    if not output.is_table:
        dump(detail, output)
        return
    print(f"{out}: {_variant_line(detail.variant)}")


def _from_repository(
    context: typer.Context,
    ref: str,
    folder: Path,
    runtime: Runtime | None,
    room: int | None,
    variant: str | None,
    unlabeled: Path | None,
    output: Output,
) -> None:
    from liberatai_coordinator.repository import pull as pulling
    from liberatai_core.learning.dataset import load_unlabeled

    store = open_store(context)
    loaded = load(store, ref)
    data = loaded.commit.data
    if unlabeled is not None and data is None:
        raise ConfigError("--unlabeled", [f"{ref}: nobody said what data it is for"])
    with progress(f"pulling {ref}"):
        done = pulling.pull(
            store,
            loaded,
            folder,
            runtime=None if runtime is None else runtime.value,
            room=room,
            variant=variant,
            unlabeled=None if unlabeled is None or data is None else load_unlabeled(unlabeled, data),
        )
    if not output.is_table:
        dump(done, output)
        return
    print(f"{folder / done.file}: {loaded.commit.model} {done.commit[7:19]}, {done.bytes} bytes, {done.why}")


def _best(client: Client, name: str, version: str, budget_bytes: int, structure: str | None) -> VariantView:
    from liberatai_coordinator.client.choice import best_variant

    view = client.models.version(name, version)
    if structure is not None and structure not in view.digests:
        known = ", ".join(sorted(view.digests))
        fault = (
            f"no {structure!r}{meant(structure, view.digests)} ({name} version {view.version} has {known})"
        )
        raise ConfigError("--structure", [fault])
    every = client.variants.list(name, str(view.version))
    variants = [one for one in every if structure in (None, one.parent_structure)]
    best = best_variant(variants, budget_bytes)
    if best is None:
        have = f"the smallest has {min(one.bytes for one in variants)} bytes" if variants else "there is none"
        raise NotFoundError(
            f"{name} version {view.version}: no variant of at most {budget_bytes} bytes ({have}); make one: "
            f"`liberatai models fit {name} --structure {structure or min(view.digests)} "
            f"--budget {budget_bytes} --unlabeled FILE.npz`"
        )
    rivals = [one for one in variants if one.bytes <= budget_bytes]
    origins = sorted({one.parent_structure for one in rivals})
    if len(origins) > 1 and any(one.accuracy is None for one in rivals):
        fault = (
            f"missing: variants of {' and '.join(origins)} fit, and agreement with unlike originals "
            "cannot be compared; name one, or fit them with --test"
        )
        raise ConfigError("--structure", [fault])
    return best


def _write_checked(detail: VariantDetail, file: bytes, out: Path) -> None:
    """Write a file that decodes to the weights that its variant names."""
    from liberatai_core.compressor.artifact import restore
    from liberatai_core.weights import digest

    if digest(restore(file, detail.structure)).hex() != detail.variant.digest:
        raise DigestError(
            f"variant {detail.variant.id[:12]} decodes to other weights than it names: not written"
        )
    from liberatai_core.model import Description, describe

    part = out.with_name(f"{out.name}.part")
    try:
        part.write_bytes(file)
        part.replace(out)
        describe(
            out,
            Description(
                family=detail.structure.family,
                params=detail.structure.params,
                data=detail.data,
                model=detail.variant.model,
                version=detail.variant.version,
            ),
        )
    except OSError as error:
        raise DiskError(f"{out}: cannot be written ({error.strerror})") from None


def _variant_line(variant: VariantView) -> str:
    figures = [
        f"{text} {value:.2%}"
        for text, value in (("accuracy", variant.accuracy), ("agreement", variant.agreement))
        if value is not None
    ]
    words = [
        f"{variant.model} version {variant.version}",
        f"variant {variant.id[:12]}",
        variant.structure,
        f"{variant.bytes} bytes",
        clean(variant.method),
    ]
    return ", ".join([*words, *figures])
