"""What a commit says of itself in other programs' terms: a model card and a bill of materials. Pure.

The card is a `README.md` with the front matter of Hugging Face's hub (`model-index`, `base_model`); the bill
of materials is CycloneDX 1.6 with a `modelCard` (https://cyclonedx.org/capabilities/mlbom/). Both are made of
what the record knows, and say nothing that nobody measured.
"""

import datetime as dt
import hashlib
import uuid
from typing import Any, Final

import msgspec

from liberatai_coordinator.repository.commits import Commit, Variant
from liberatai_coordinator.repository.descriptors import BOM, DOC_RAW, encode
from liberatai_coordinator.repository.names import short

CARD_FILE: Final = "README.md"
BOM_FILE: Final = "bom.cdx.json"
_NAMESPACE: Final = uuid.UUID("5b0d7f0e-6d1c-4f6e-9a39-0f6b2a1f5c11")
_DONE: Final = {
    "import": "was imported",
    "variant": "holds forms that were compressed for small storage",
    "round": "was made by a round of federated training: devices trained on data that never left them",
    "ensemble": "combines models of unlike structures",
    "student": "was taught by other models",
    "merge": "was merged from others",
    "finetune": "was trained on from another commit",
}


def documents(commit: Commit) -> list[tuple[bytes, str, str]]:
    """Return (content, media type, file name) of what goes along with a commit."""
    return [
        (card(commit).encode(), DOC_RAW, CARD_FILE),
        (bill_of_materials(commit), BOM, BOM_FILE),
    ]


def card(commit: Commit) -> str:
    """Return the model card in Markdown."""
    return "\n".join([*_front_matter(commit), "", f"# {commit.model}", "", *_body(commit), ""])


def _front_matter(commit: Commit) -> list[str]:
    fields: dict[str, Any] = {
        "library_name": "liberatai",
        "tags": ["federated-learning", "edge", *sorted({_family(one) for one in commit.variants} - {""})],
    }
    if commit.licence:
        fields["license"] = commit.licence.lower()
    if commit.parents:
        fields["base_model"] = [f"{commit.model}@{short(parent)}" for parent in commit.parents]
    if commit.data is not None:
        fields["pipeline_tag"] = "image-classification" if len(commit.data.input_shape) == 3 else "other"
    metrics = [
        {"type": name, "value": value, "name": name.replace("_", " ")}
        for name, value in sorted(commit.metrics.items())
    ]
    if metrics:
        dataset = {"name": "held-out data of the author", "type": "private"}
        task = {"type": fields.get("pipeline_tag", "other")}
        results = [{"task": task, "dataset": dataset, "metrics": metrics}]
        fields["model-index"] = [{"name": commit.model, "results": results}]
    return ["---", msgspec.yaml.encode(fields).decode().rstrip(), "---"]


def _family(variant: Variant) -> str:
    return variant.structure.family if variant.structure else ""


def _body(commit: Commit) -> list[str]:
    lines = [f"This commit {_DONE[commit.kind]}."]
    if commit.message:
        lines += ["", *(f"> {line}" for line in commit.message.splitlines())]
    rows = [
        ("author", commit.author),
        ("made", _date(commit.time)),
        ("parents", ", ".join(map(short, commit.parents))),
        ("job", f"{commit.job}, round {commit.round}" if commit.job else ""),
        ("contributions of devices", str(commit.updates) if commit.updates else ""),
        ("samples behind them", str(commit.samples) if commit.samples else ""),
        ("input", "x".join(map(str, commit.data.input_shape)) if commit.data else ""),
        ("input range", " … ".join(f"{value:g}" for value in commit.input_range)),
        ("classes", ", ".join(commit.labels) or (str(commit.data.classes) if commit.data else "")),
        ("licence", commit.licence),
        ("origin", commit.origin),
    ]
    lines += ["", "| | |", "|---|---|", *(f"| {name} | {_cell(text)} |" for name, text in rows if text)]
    if commit.metrics:
        lines += ["", "## Measured", "", "| figure | value |", "|---|---|"]
        lines += [f"| {name} | {value:.6g} |" for name, value in sorted(commit.metrics.items())]
    lines += [
        "",
        "## Variants",
        "",
        "| variant | runs with | bytes | sparsity | figures |",
        "|---|---|---|---|---|",
    ]
    for one in commit.variants:
        figures = ", ".join(f"{name} {value:.4g}" for name, value in sorted(one.metrics.items()))
        lines.append(f"| {one.name} | {one.runtime} | {one.bytes} | {one.sparsity:.1%} | {figures or '-'} |")
    lines += ["", "## Privacy", "", _privacy(commit)]
    return lines


def _privacy(commit: Commit) -> str:
    if commit.kind == "round":
        return (
            "Devices sent sparse, quantised differences of weights; their data stayed with them. The "
            "coordinator saw each update. No differential privacy is claimed unless the message says so."
        )
    return "Nothing is claimed about the data behind this commit."


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _date(seconds: int) -> str:
    if not seconds:
        return ""
    try:
        return dt.datetime.fromtimestamp(seconds, dt.UTC).strftime("%Y-%m-%d %H:%M UTC")
    except (OverflowError, OSError, ValueError):
        return ""


def bill_of_materials(commit: Commit) -> bytes:
    """Return the bill of materials (CycloneDX 1.6, JSON); its serial number follows from the content."""
    reference = hashlib.sha256(encode(commit)).hexdigest()
    parents = [
        {"type": "machine-learning-model", "name": commit.model, "version": short(parent), "bom-ref": parent}
        for parent in commit.parents
    ]
    metrics = [{"type": name, "value": f"{value:.6g}"} for name, value in sorted(commit.metrics.items())]
    model: dict[str, Any] = {
        "type": "machine-learning-model",
        "bom-ref": "model",
        "name": commit.model,
        "version": str(commit.number) if commit.number is not None else reference[:12],
        "modelCard": {
            "modelParameters": {
                "task": "classification",
                "architectureFamily": ", ".join(sorted({_family(one) for one in commit.variants} - {""}))
                or "unknown",
                "modelArchitecture": ", ".join(one.name for one in commit.variants)[:1000],
                **({"inputs": [{"format": "float32"}]} if commit.data else {}),
                **({"outputs": [{"format": "logits"}]} if commit.data else {}),
            },
            **({"quantitativeAnalysis": {"performanceMetrics": metrics}} if metrics else {}),
        },
        "hashes": [],
    }
    if commit.licence:
        model["licenses"] = [{"expression": commit.licence}]
    if parents:
        model["pedigree"] = {"ancestors": parents}
    files = [
        {
            "type": "file",
            "bom-ref": f"variant:{one.name}",
            "name": one.name,
            "hashes": [{"alg": "SHA-256", "content": one.manifest.removeprefix("sha256:")}],
        }
        for one in commit.variants
    ]
    del model["hashes"]
    value = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(_NAMESPACE, reference)}",
        "version": 1,
        "metadata": {"component": model},
        "components": files,
    }
    return encode(value)
