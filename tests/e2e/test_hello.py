"""The hello world: a user's own model and data in at most 20 lines, run from nothing to a trained model."""

import io
import os
import re
import shutil
import subprocess
import sys
import tokenize
import tomllib
from pathlib import Path

import msgspec
import pytest

from liberatai_coordinator.config import JobSpec, parse_job
from liberatai_core.settings import parse_mapping

EXAMPLES = Path(__file__).parents[2] / "examples"
USER_CODE = ("hello_family.py", "hello.py")


def install(package: Path, target: Path) -> None:
    """Install a package of one module by hand, as pip would: its module and its entry points."""
    project = tomllib.loads((package / "pyproject.toml").read_text())["project"]
    metadata = target / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    (metadata / "entry_points.txt").write_text(
        "".join(
            f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in points.items())
            for group, points in project["entry-points"].items()
        )
    )
    shutil.copy(package / "hello_family.py", target)


def lines_of_code(source: str) -> int:
    """Lines that are neither blank nor only a comment."""
    ignored = {
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
    }
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return len({line for t in tokens if t.type not in ignored for line in range(t.start[0], t.end[0] + 1)})


def test_users_code_has_at_most_twenty_lines():
    assert sum(lines_of_code((EXAMPLES / "hello" / name).read_text()) for name in USER_CODE) <= 20


@pytest.mark.timeout(120)
def test_hello_world_trains_the_users_model_on_the_users_data(tmp_path):
    site = tmp_path / "site"
    install(EXAMPLES / "hello", site)
    work = tmp_path / "work"
    work.mkdir()
    for name in ("hello.py", "job.yaml"):
        shutil.copy(EXAMPLES / "hello" / name, work)
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        [sys.executable, "hello.py"],
        cwd=work,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"2 rounds, (\d+)% of unseen points right", done.stdout)
    assert found, done.stdout
    said = done.stderr.splitlines()
    assert said[0] == "starting a broker, a coordinator and 3 devices on this machine …"
    rounds = [line.split(":")[0] for line in said if line.startswith("round ")]
    assert rounds == ["round 1 of 2", "round 2 of 2"]
    assert int(found[1]) >= 85  # always "outside" would be right for 53 %


def test_full_example_job_has_every_key_with_its_default():
    text = (EXAMPLES / "job.yaml").read_text()
    job, raw = parse_job(text, "examples/job.yaml"), parse_mapping(text, "examples/job.yaml")
    assert set(raw) == set(JobSpec.__struct_fields__)
    for field in msgspec.structs.fields(JobSpec):
        value = getattr(job, field.name)
        if not isinstance(value, msgspec.Struct):
            continue
        assert set(raw[field.name]) == set(value.__struct_fields__)
        if not field.required:
            assert value == field.default
