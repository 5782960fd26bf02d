"""The documents say what the programs do: settings, commands, fields, benchmarks, tests and links exist."""

import argparse
import ast
import itertools
import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import typer

from liberatai_agent import cli as agent_cli
from liberatai_agent.config import AgentConfig, parse_config
from liberatai_coordinator.cli import app as coordinator_cli
from liberatai_coordinator.config import CoordinatorConfig, JobSpec, parse_job
from liberatai_coordinator.sim.fleet_file import FleetFile
from liberatai_coordinator.sim.scenario import Scenario
from liberatai_core import settings
from liberatai_core.contract import messages

ROOT = Path(__file__).parents[2]
SKIPPED = {"node_modules", "demo-report", "dist", "build"}


def _documents() -> list[Path]:
    """Return every .md file of the repository; caches and environments have names with a dot."""
    return sorted(
        path
        for path in ROOT.rglob("*.md")
        if not any(part.startswith(".") or part in SKIPPED for part in path.relative_to(ROOT).parts[:-1])
    )


DOCUMENTS = _documents()
each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+(?:\n[^`\n]+)?)`")


def blocks(text: str) -> list[tuple[str, str]]:
    """Return (language, content) of every fenced block."""
    return FENCE.findall(text)


def inline(text: str) -> list[str]:
    """Return the code inside of sentences, on one line each."""
    return [" ".join(found.split()) for found in INLINE.findall(FENCE.sub("", text))]


# --- links ---------------------------------------------------------------------------------------------


def anchors(text: str) -> set[str]:
    """Return the names that headings have on a page: lower case, without signs, spaces as hyphens."""
    found = set()
    for heading in re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE):
        found.add(re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-"))
    return found


@each_document
def test_relative_links_and_pictures_lead_somewhere(document: Path) -> None:
    text = FENCE.sub("", document.read_text(encoding="utf-8"))
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        place = (document.parent / path).resolve() if path else document
        good = place.exists() and (not anchor or anchor in anchors(place.read_text(encoding="utf-8")))
        if not good:
            broken.append(target)
    assert broken == []


# --- settings ------------------------------------------------------------------------------------------


def keys_of(wanted: type[msgspec.Struct], prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield (dotted key, default, allowed values) of settings, as the tables show them."""
    for field in msgspec.structs.fields(wanted):
        name = prefix + field.encode_name
        nested, element = settings._struct_of(field.type), settings._element_of(field.type)
        if nested is not None:
            yield from keys_of(nested, f"{name}.")
            continue
        yield name, _default(field), settings._wish(field.type)
        inner = settings._struct_of(element) if element is not None else None
        if inner is not None:
            yield from keys_of(inner, f"{name}[].")


def _default(field: msgspec.structs.FieldInfo) -> str:
    if field.required:
        return "required"
    value: Any = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, str) else json.dumps(msgspec.to_builtins(value))


def table_of(section: str) -> dict[str, list[str]]:
    """Return the rows of the table of keys in a section of docs/jobs.md: key -> the other cells."""
    text = (ROOT / "docs/jobs.md").read_text(encoding="utf-8")
    body = text.split(f"\n## {section}\n")[1].split("\n## ")[0].split("\n### ")[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in body.splitlines()
        if line[:2] == "| "
    ]
    assert rows[0] == ["key", "unit", "default", "allowed", "meaning"]
    return {row[0].strip("`"): row[1:] for row in rows[1:]}


@pytest.mark.parametrize(
    ("section", "wanted"),
    [("Job", JobSpec), ("coordinator.yaml", CoordinatorConfig), ("agent.yaml", AgentConfig)],
)
def test_every_setting_is_documented_with_its_default_and_range(
    section: str, wanted: type[msgspec.Struct]
) -> None:
    table = table_of(section)
    assert {key: (row[1].strip("`"), row[2]) for key, row in table.items()} == {
        key: (default, allowed) for key, default, allowed in keys_of(wanted)
    }
    assert all(row[3] for row in table.values())
    for key, row in table.items():
        for suffix, unit in (("_s", "s"), ("_mb", "MiB"), ("_kb", "KiB"), ("_percent", "%"), ("_c", "°C")):
            assert not key.endswith(suffix) or row[0] == unit, key


KEYS = {name for wanted in (JobSpec, CoordinatorConfig, AgentConfig) for name, _, _ in keys_of(wanted)}
SECTIONS = {name.partition(".")[0] for name in KEYS if "." in name and "[" not in name}


@each_document
def test_settings_named_in_a_sentence_exist(document: Path) -> None:
    dotted = re.compile(rf"(?:{'|'.join(SECTIONS)})\.[a-z_]+")
    text = document.read_text(encoding="utf-8")
    named = {code.partition(":")[0] for code in inline(text)}
    assert {name for name in named if dotted.fullmatch(name) and name not in KEYS} == set()


@each_document
def test_settings_files_in_the_documents_are_taken_by_the_programs(document: Path) -> None:
    for language, content in blocks(document.read_text(encoding="utf-8")):
        if language != "yaml":
            continue
        title = content.splitlines()[0].removeprefix("# ")
        assert title in {"coordinator.yaml", "agent.yaml", "job.yaml", "fleet.yaml", "scenario.yaml"}, (
            "the first line of a YAML block names its file"
        )
        if title == "job.yaml":
            parse_job(content, title)
        elif title == "agent.yaml":
            parse_config(content, title, ROOT)
        elif title in {"fleet.yaml", "scenario.yaml"}:
            settings.parse(content, FleetFile if title == "fleet.yaml" else Scenario, title)
        else:
            settings.parse(content, CoordinatorConfig, title)


# --- commands ------------------------------------------------------------------------------------------


def commands() -> dict[str, set[str]]:
    """Return every command of both programs with its options."""
    found: dict[str, set[str]] = {}

    def walk(command: Any, path: str) -> None:
        for name, sub in getattr(command, "commands", {}).items():
            walk(sub, f"{path} {name}")
        if not hasattr(command, "commands"):
            options = {option for parameter in command.params for option in parameter.opts}
            found[path] = {option for option in options if option.startswith("-")} - {"--help"}

    walk(typer.main.get_command(coordinator_cli.app), "liberatai")
    for action in agent_cli._parser()._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, parser in action.choices.items():
                options = set(parser._option_string_actions)
                found[f"liberatai-agent {name}"] = options - {"-h", "--help"}
    return found


COMMANDS = commands()
GLOBAL = {"--socket", "--server", "--token-file", "--ca-file"}


def test_every_command_is_documented_with_an_example_and_all_its_options() -> None:
    text = (ROOT / "docs/commands.md").read_text(encoding="utf-8")
    parts = re.split(r"^### `([^`]+)`$", text, flags=re.MULTILINE)
    documented = dict(zip(parts[1::2], parts[2::2], strict=True))
    assert set(documented) == set(COMMANDS)
    for command, rest in documented.items():
        part = rest.split("\n## ")[0]
        listed = {
            option
            for line in part.splitlines()
            if line.startswith("- `-")
            for option in inline(line.partition(":")[0])
        }
        assert listed == COMMANDS[command], command
        (example,) = [content.strip() for _, content in blocks(part)]
        assert example.startswith(command)


def lines_of_commands(text: str) -> Iterator[str]:
    """Yield what a reader would type: lines of shell blocks, and code in sentences."""
    for language, content in blocks(text):
        if language == "sh":
            yield from content.replace("\\\n", " ").splitlines()
    yield from inline(text)


def command_faults(line: str) -> list[str]:
    """Return what is wrong with a line that calls one of the programs; none if it calls neither."""
    words = shlex.split(line, comments=True)
    if len(words) < 2 or words[0] not in {"liberatai", "liberatai-agent"}:
        return []
    rest = words[1:]
    while rest and rest[0] in GLOBAL:
        rest = rest[2:]
    names = [*itertools.takewhile(lambda word: re.fullmatch(r"[a-z]+", word), rest)]
    for length in range(len(names), 0, -1):
        command = " ".join([words[0], *names[:length]])
        if command in COMMANDS:
            given = {word.partition("=")[0] for word in rest[length:] if word.startswith("-")}
            return [f"{command}: no option {option}" for option in sorted(given - COMMANDS[command])]
    return [f"no such command: {line}"]


@each_document
def test_commands_that_a_document_calls_exist(document: Path) -> None:
    groups = {" ".join(command.split()[:2]) for command in COMMANDS}
    faults = [
        fault
        for line in lines_of_commands(document.read_text(encoding="utf-8"))
        if line not in groups
        for fault in command_faults(line)
    ]
    assert faults == []


def test_a_wrong_command_or_option_would_be_found() -> None:
    assert command_faults("liberatai devices approve camera-07") == []
    assert command_faults("liberatai --socket ./api.sock devices list -o wide # all") == []
    assert command_faults("liberatai devices befriend camera-07")
    assert command_faults("liberatai jobs create --yaml job.yaml")
    assert command_faults("liberatai-agent fly")


# --- files, targets, benchmarks, tests, code -----------------------------------------------------------


@each_document
def test_make_targets_benchmarks_and_paths_that_a_document_names_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z0-9-]+):", makefile, re.MULTILINE))
    missing = []
    for line in lines_of_commands(text):
        if found := re.match(r"make ([a-z0-9-]+)", line):
            name = found[1]
            benchmark = ROOT / "benchmarks" / f"{name.removeprefix('bench-').replace('-', '_')}.py"
            if name not in targets and not (name.startswith("bench-") and benchmark.is_file()):
                missing.append(line)
        found = re.match(r"python -m benchmarks\.(\w+)", line)
        places = [f"{found[1]}.py", f"{found[1]}/__main__.py"] if found else []
        if found and not any((ROOT / "benchmarks" / place).is_file() for place in places):
            missing.append(line)
        if found := re.fullmatch(
            r"((?:core|agent|coordinator|benchmarks|examples|tests|docs|deploy)/[\w./-]+)(?:::(\w+))?", line
        ):
            path = ROOT / found[1]
            if not path.exists() or (found[2] and found[2] not in functions(path)):
                missing.append(line)
    assert missing == []


def functions(path: Path) -> set[str]:
    """Return the names of a file's functions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def test_options_of_benchmarks_in_the_readme_exist() -> None:
    for line in lines_of_commands((ROOT / "README.md").read_text(encoding="utf-8")):
        if found := re.match(r"python -m benchmarks\.(\w+)(.*)", line):
            one = ROOT / "benchmarks" / f"{found[1]}.py"
            path = one if one.exists() else ROOT / "benchmarks" / found[1] / "__main__.py"
            source = path.read_text(encoding="utf-8")
            for option in re.findall(r"--[a-z-]+", found[2]):
                assert f'"{option}"' in source, line


def test_the_readme_quotes_the_hello_world_as_it_is() -> None:
    quoted = [
        content
        for language, content in blocks((ROOT / "README.md").read_text(encoding="utf-8"))
        if language == "python"
    ]
    assert quoted == [
        (ROOT / "examples/hello" / name).read_text(encoding="utf-8")
        for name in ("hello_family.py", "hello.py")
    ]


def test_every_decision_is_listed_and_has_its_parts() -> None:
    folder = ROOT / "docs/decisions"
    listed = re.findall(
        r"^\| \[(\d{4})\]\(([^)]+)\)", (folder / "README.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    files = sorted(path.name for path in folder.glob("0*.md"))
    assert [name for _, name in listed] == files
    assert [number for number, _ in listed] == [f"{place:04}" for place in range(1, len(files) + 1)]
    for name in files:
        text = (folder / name).read_text(encoding="utf-8")
        assert text.startswith(f"# {name[:4]}: ")
        assert re.findall(r"^\*\*(\w+)\.\*\*", text, re.MULTILINE) == [
            "Context",
            "Decision",
            "Consequences",
        ], name


def test_the_licence_is_the_one_that_the_project_names() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


# --- privacy -------------------------------------------------------------------------------------------

FROM_DEVICES = 16
"""Kinds below are what devices say; see `messages.KINDS`."""


def test_every_field_that_leaves_a_device_is_explained() -> None:
    """P9: a new field of an upward message needs its line on why it is no quantity of a single record."""
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    body = text.split("\n## Privacy: what leaves a device\n")[1].split("\n## ")[0]
    up = {
        struct.__name__: set(struct.__struct_fields__)
        for kind, struct in messages.KINDS.items()
        if kind < FROM_DEVICES
    }
    explained: dict[str, set[str]] = {name: set() for name in up}
    for line in body.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) != 4 or "`" not in cells[1]:
            continue
        names = list(up) if cells[0] == "all" else [name.strip() for name in cells[0].split(",")]
        for name in names:
            explained[name] |= set(inline(cells[1]))
    assert explained == up


# --- hygiene -------------------------------------------------------------------------------------------


@each_document
def test_no_path_of_a_developers_machine_stands_in_a_document(document: Path) -> None:
    assert not re.search(r"/home/|/root/|/work/|/tmp/|/Users/", document.read_text(encoding="utf-8"))


def test_every_document_is_looked_at() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split()
    assert {"README.md", "SECURITY.md", "docs/jobs.md"} <= {str(path.relative_to(ROOT)) for path in DOCUMENTS}
    assert {ROOT / name for name in listed if (ROOT / name).exists()} <= set(DOCUMENTS)
