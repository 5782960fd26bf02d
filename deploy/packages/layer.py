"""Turns a folder of unpacked wheels into the files of one package; called by build.sh.

`layer.py PACKAGE SITE TREE`: SITE is what `pip install --target` made, TREE the package's root.
"""

import compileall
import os
import py_compile
import shutil
import sys
from pathlib import Path

HOME = "opt/liberatai"
PYTHON = "python3.11"
SITE_PACKAGES = f"{HOME}/lib/{PYTHON}/site-packages"
PYVENV = (
    f"home = /usr/bin\ninclude-system-site-packages = false\nversion = 3.11\nexecutable = /usr/bin/{PYTHON}\n"
)
PROGRAM = """#!/{home}/bin/python3 -P
import os
import sys

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
from {module} import main

sys.exit(main())
"""
PROGRAMS = {
    "liberatai-agent": ("liberatai-agent", "liberatai_agent.cli"),
    "liberatai-coordinator": ("liberatai", "liberatai_coordinator.cli"),
}
"""Package -> its program and where that starts."""
OURS = {
    "liberatai-agent": ("liberatai_core", "liberatai_agent", "liberatai-*.dist-info"),
    "liberatai-coordinator": ("liberatai_coordinator",),
}
"""Package -> what it holds of our own wheel."""
BUILD_ONLY = (
    "bin",
    "share",
    "torch/include",
    "torch/share",
    "torch/test",
    "numpy/_core/include",
    "numpy/distutils",
    "numpy/f2py",
)
"""Nobody compiles on a device."""
TRACES = ("direct_url.json", "RECORD", "REQUESTED", "INSTALLER")
"""Of the installation: paths of this machine, and lists of files that are not there any more."""
NEEDED_TESTS = ("_natype.py",)
"""numpy.testing imports it."""


def slim(site: Path) -> None:
    """Remove what no device needs: tests, headers, stubs, static libraries, what pip notes about itself."""
    for name in BUILD_ONLY:
        shutil.rmtree(site / name, ignore_errors=True)
    for path in site.glob("torch/bin/*"):
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "torch_shm_manager":  # torch looks for it when it is imported
            path.unlink()
    for path in [*site.rglob("*.pyi"), *site.rglob("*.a"), *site.rglob("*.pyx"), *site.rglob("*.pxd")]:
        path.unlink()
    for info in site.glob("*.dist-info"):
        for name in TRACES:
            (info / name).unlink(missing_ok=True)
    for folder in sorted(site.rglob("tests"), reverse=True):
        if not folder.is_dir() or folder.parent.name == "testing":
            continue
        kept = [folder / name for name in NEEDED_TESTS if (folder / name).is_file()]
        if not kept:
            shutil.rmtree(folder)
            continue
        for path in folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path not in kept and path.name != "__init__.py":
                path.unlink()


def take_ours(package: str, site: Path) -> None:
    """Leave of our own wheel what this package holds."""
    kept = [path for pattern in OURS.get(package, ()) for path in site.glob(pattern)]
    for path in site.glob("liberatai*"):
        if path not in kept:
            shutil.rmtree(path)


def require_no_cuda(site: Path) -> None:
    """Refuse a torch that needs gigabytes of CUDA beside it."""
    if any(site.glob("torch/lib/libtorch_cuda*")):
        sys.exit(
            "error: this torch is built for CUDA; use one for the CPU:"
            " PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu deploy/packages/build.sh …"
        )


def compiled(target: Path, tree: Path) -> None:
    """Compile everything, so that no device has to, and nothing is written beside the package's files.

    Only the Python of the target writes what it reads; with another one the package works and starts slower.
    """
    if f"python{sys.version_info.major}.{sys.version_info.minor}" != PYTHON:
        sys.stderr.write(f"warning: this is not {PYTHON}: without compiled files\n")
        return
    compileall.compile_dir(
        target,
        quiet=2,
        force=True,
        stripdir=str(tree),
        prependdir="/",
        invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
    )


def main(package: str, site: Path, tree: Path) -> None:
    """Make the tree."""
    require_no_cuda(site)
    take_ours(package, site)
    slim(site)
    target = tree / SITE_PACKAGES
    target.parent.mkdir(parents=True)
    site.rename(target)
    compiled(target, tree)
    programs = tree / HOME / "bin"
    if package == "liberatai-agent":
        programs.mkdir()
        (programs / "python3").symlink_to(f"/usr/bin/{PYTHON}")
        (tree / HOME / "pyvenv.cfg").write_text(PYVENV, encoding="utf-8")
    if package in PROGRAMS:
        name, module = PROGRAMS[package]
        programs.mkdir(exist_ok=True)
        (programs / name).write_text(PROGRAM.format(home=HOME, module=module), encoding="utf-8")
        (programs / name).chmod(0o755)
    when = int(os.environ["SOURCE_DATE_EPOCH"])
    for folder, _, files in os.walk(tree, topdown=False):
        for name in [*files, "."]:
            os.utime(Path(folder, name), (when, when), follow_symlinks=False)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
