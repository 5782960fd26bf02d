"""`liberatai release`: pack and sign releases of the agent, where the release key is: offline."""

# ruff: noqa: PLC0415 - a command imports what it needs when it runs, see `cli`

import importlib.util
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from liberatai_coordinator.cli.kit import group
from liberatai_coordinator.cli.tables import Output, OutputOption, show_one
from liberatai_core.errors import ConfigError, DiskError
from liberatai_core.units import date_text, size_text

app = group(
    "Sign releases of the agent.", "liberatai release sign --key release.key --number 7 --out 0.2.0.release"
)
DAY_S = 86_400.0
PROFILES = "liberatai_core/data/device_profiles"


@app.command("keygen", epilog="Example: liberatai release keygen --out release.key")
def release_keygen(
    out: Annotated[Path, typer.Option("--out", help="File for the private key; must not exist.")],
) -> None:
    """Make a release key. Keep it offline: who has it decides what runs on every device."""
    from liberatai_core.release import release_key

    seed = os.urandom(32)
    try:
        out.touch(mode=0o600, exist_ok=False)
        out.write_bytes(seed)
    except FileExistsError:
        raise ConfigError(str(out), ["is there already: a lost release key cannot be made again"]) from None
    except OSError as error:
        raise DiskError(f"{out}: {error.strerror}") from None
    print(f"{out}: private key; keep it offline, and a copy of it in another place")
    print("for agent.yaml of every device:")
    print(f'update: {{release_key: "{release_key(seed).public.hex()}"}}')


@app.command(
    "sign", epilog="Example: liberatai release sign --key release.key --number 7 --out 0.2.0.release"
)
def release_sign(
    key: Annotated[Path, typer.Option("--key", help="The private key.")],
    number: Annotated[int, typer.Option("--number", min=1, help="Grows with every release.")],
    out: Annotated[Path, typer.Option("--out", help="File for the release.")],
    source: Annotated[
        Path | None, typer.Option("--from", help="Folder with both packages [default: those that run here].")
    ] = None,
    version: Annotated[
        str | None, typer.Option("--version", help="For people [default: of this program].")
    ] = None,
    days: Annotated[
        float, typer.Option("--days", min=1, max=3650, help="Until no device takes it any more.")
    ] = 365,
) -> None:
    """Pack and sign a release of the agent: its own code; libraries stay as they are installed."""
    from liberatai_core import __version__, release

    seed = _read(key)
    now_s = time.time()
    manifest = release.Manifest(
        format=release.FORMAT,
        version=version or __version__,
        sequence=number,
        created_s=now_s,
        expires_s=now_s + days * DAY_S,
        requires=_requires(),
    )
    files = {name: _read(path) for name, path in _files(source)}
    content = release.pack(manifest, files, release.release_key(seed))
    try:
        out.write_bytes(content)
    except OSError as error:
        raise DiskError(f"{out}: {error.strerror}") from None
    print(
        f"{out}: release {manifest.version}, number {number}, {len(files)} files, {size_text(len(content))}, "
        f"until {date_text(manifest.expires_s)}"
    )


@app.command("show", epilog="Example: liberatai release show 0.2.0.release --release-key HEX")
def release_show(
    file: Annotated[Path, typer.Argument(help="The release.")],
    release_key: Annotated[str, typer.Option("--release-key", help="The public key, as in agent.yaml.")],
    output: OutputOption = Output.TABLE,
) -> None:
    """Check every byte of a release against a key, and say what it is."""
    from liberatai_core import release

    try:
        public = bytes.fromhex(release_key)
    except ValueError:
        public = b""
    if len(public) != 32:
        raise ConfigError("--release-key", ["a public key has 64 hex digits"])
    try:
        with file.open("rb") as opened:
            manifest = release.opened(opened, public)
            count = sum(1 for _ in release.contents(opened, manifest))
    except OSError as error:
        raise ConfigError(str(file), [f"cannot be read: {error.strerror}"]) from None
    if not output.is_table:
        fields = {"name": manifest.version, "number": manifest.sequence, "files": count, "key": release_key}
        show_one(fields | {"created_s": manifest.created_s, "expires_s": manifest.expires_s}, output)
        return
    print(
        f"{file}: release {manifest.version}, number {manifest.sequence}, {count} files, made "
        f"{date_text(manifest.created_s)}, until {date_text(manifest.expires_s)}; signed by this key"
    )


def _files(source: Path | None) -> Iterator[tuple[str, Path]]:
    from liberatai_core import release

    for package in release.PACKAGES:
        folder = _package(package) if source is None else source / package
        if not (folder / "__init__.py").is_file():
            raise ConfigError(str(folder), [f"no package {package} there"])
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder.parent).as_posix()
            if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyc":
                yield name, path

    if source is None or not (source / PROFILES).is_dir():
        # In a checkout the profiles lie elsewhere; as a package they lie in it.
        from liberatai_core.profile import shipped_profiles

        if not shipped_profiles().is_relative_to(_package("liberatai_core")):
            yield from (
                (f"{PROFILES}/{path.name}", path) for path in sorted(shipped_profiles().glob("*.yaml"))
            )


def _package(name: str) -> Path:
    found = importlib.util.find_spec(name)
    places = found.submodule_search_locations if found is not None else None
    return Path(next(iter(places))) if places else Path(name)


def _requires() -> dict[str, str]:
    """Return what the installed base needs: name to least version."""
    import re
    from importlib.metadata import PackageNotFoundError, requires

    try:
        listed = requires("liberatai") or []
    except PackageNotFoundError:
        return {}
    plain = [re.fullmatch(r"([A-Za-z0-9_.-]+) *(?:.*?>=([0-9.]+))?[^;]*", line) for line in listed]
    return {found[1]: found[2] or "0" for found in plain if found is not None}


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(str(path), [f"cannot be read: {error.strerror}"]) from None
