"""Man pages and completions are made from the programs: every command, every option, in forms that work."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.unit.coordinator.api_kit import MemoryOperations, served
from tests.unit.test_docs import COMMANDS

ROOT = Path(__file__).parents[2]


def program() -> Any:
    spec = importlib.util.spec_from_file_location("make_man", ROOT / "deploy/man/make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_man"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("man")
    assert program().write(folder) > len(COMMANDS)
    return folder


def test_every_command_has_a_page_with_all_its_options(pages: Path) -> None:
    for command, options in COMMANDS.items():
        text = (pages / "man1" / f"{command.replace(' ', '-')}.1").read_text()
        for part in (".SH NAME", ".SH SYNOPSIS", ".SH DESCRIPTION", ".SH EXAMPLE"):
            assert part in text
        for option in options:
            assert option.replace("-", "\\-") in text, (command, option)


@pytest.mark.skipif(shutil.which("groff") is None and shutil.which("mandoc") is None, reason="no roff here")
def test_pages_are_roff_without_a_fault(pages: Path) -> None:
    tool = (
        ["groff", "-man", "-ww", "-Tutf8", "-z"] if shutil.which("groff") else ["mandoc", "-Tlint", "-Werror"]
    )
    files = sorted(map(str, (pages / "man1").iterdir()))
    done = subprocess.run([*tool, *files], capture_output=True, text=True, check=False)
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        (["doc"], {"doctor"}),
        (["status", "--st"], {"--state-dir"}),
        (["status", "-o", "js"], {"json"}),
        (["--config", "x", "doctor", "--con"], {"--config"}),
    ],
)
def test_bash_completes_the_agent(pages: Path, typed: list[str], offered: set[str]) -> None:
    words = " ".join(f"'{word}'" for word in ["liberatai-agent", *typed])
    script = (
        f"source {pages}/bash/liberatai-agent; COMP_WORDS=({words}); COMP_CWORD={len(typed)}; "
        'complete() { :; }; _liberatai_agent; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == offered


@pytest.mark.parametrize(
    ("typed", "offered"), [("liberatai dev", {"devices"}), ("liberatai devices show g", {"gateway"})]
)
def test_the_shell_completes_commands_and_names_of_devices(
    tmp_path: Path, typed: str, offered: set[str]
) -> None:
    socket = tmp_path / "api.sock"
    variables = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if Path(path).is_dir()),
        "LIBERATAI_SOCKET": str(socket),
        "_LIBERATAI_COMPLETE": "complete_bash",
        "COMP_WORDS": typed,
        "COMP_CWORD": str(len(typed.split()) - 1),
    }
    with served(MemoryOperations(), socket):
        command = [sys.executable, "-m", "liberatai_coordinator"]
        done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert set(done.stdout.split()) == offered, done.stderr
