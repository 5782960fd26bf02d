#!/bin/sh
# The devices' architecture without a board: contract, codecs and probe under an emulated aarch64.
#
# Usage: tests/aarch64/run.sh [python of the development environment]; AARCH64_PYTEST holds more options of pytest.
#
# Unpacks an arm64 Debian Python and the wheels a device installs into .aarch64/ (kept, some 300 MB), runs the
# golden, property and contract tests there, and compares SHA-256 digests of frames, codecs and decoded
# weights with those of this machine, byte for byte. Where the tools cannot be had it says so and ends with 0.
set -eu

cd "$(dirname "$0")/../.."
python=${1:-.venv/bin/python}
cache=$PWD/.aarch64
root=$cache/rootfs
site=$cache/site

say() { printf 'aarch64: %s\n' "$*"; }
skip() { say "SKIPPED: $*"; exit 0; }

# --- tools ---------------------------------------------------------------------------------------------

for tool in qemu-aarch64-static debootstrap dpkg-deb; do
    command -v "$tool" >/dev/null 2>&1 && continue
    [ "$(id -u)" = 0 ] || skip "$tool is missing and only root can install it (apt-get install qemu-user-static debootstrap)"
    command -v apt-get >/dev/null 2>&1 || skip "$tool is missing and this machine has no apt-get"
    say "installing qemu-user-static and debootstrap"
    { apt-get update -qq && apt-get install -y -qq --no-install-recommends qemu-user-static debootstrap; } \
        >/dev/null 2>&1 || skip "qemu-user-static and debootstrap could not be installed"
done

# --- an arm64 Python, unpacked and never installed -----------------------------------------------------

# Prints "mirror suite" of the first entry of apt's sources, in either of their two formats.
source_line() {
    cat /etc/apt/sources.list /etc/apt/sources.list.d/*.sources /etc/apt/sources.list.d/*.list 2>/dev/null | awk '
        /^URIs:/ && !mirror { mirror = $2 }
        /^Suites:/ && !suite { suite = $2 }
        /^deb[ \t]/ && !mirror { sub(/\[[^]]*\]/, ""); mirror = $2; suite = $3 }
        END { print mirror, suite }'
}

if [ ! -e "$root/.complete" ]; then
    [ "$(id -u)" = 0 ] || skip "debootstrap needs root, once (afterwards $cache is enough)"
    set -- $(source_line)
    [ $# = 2 ] || skip "no package mirror found in apt's sources"
    say "fetching an arm64 Python ($2)"
    rm -rf "$cache/stage" "$root"
    mkdir -p "$cache/stage" "$root"
    debootstrap --arch=arm64 --foreign --variant=minbase --include=python3,ca-certificates "$2" "$cache/stage" "$1" \
        >"$cache/debootstrap.log" 2>&1 || skip "the mirror gave no arm64 system (see $cache/debootstrap.log)"
    for package in "$cache"/stage/var/cache/apt/archives/*.deb; do
        dpkg-deb -x "$package" "$root"
    done
    rm -rf "$cache/stage"
    : >"$root/.complete"
fi
arm_python=$(ls "$root"/usr/bin/python3.[0-9]* | head -n 1)
version=${arm_python##*python3.}

# --- what a device installs, and what the tests need on top --------------------------------------------

wanted=$("$python" - <<'END'
from importlib.metadata import version

names = ["numpy", "msgspec", "psutil", "pyyaml", "paho-mqtt", "cryptography"]
names += ["msgpack", "pytest", "pytest-timeout", "hypothesis"]
print(" ".join(f"{name}=={version(name)}" for name in names))
END
)
if [ "$(cat "$site/.complete" 2>/dev/null)" != "$wanted" ]; then
    say "fetching wheels: $wanted"
    rm -rf "$site"
    # shellcheck disable=SC2086 # a list of words
    "$python" -m pip install --quiet --disable-pip-version-check --no-compile --target "$site" --only-binary=:all: \
        --platform manylinux2014_aarch64 --platform manylinux_2_28_aarch64 --implementation cp \
        --python-version "3$version" $wanted || skip "the wheels could not be fetched"
    printf '%s' "$wanted" >"$site/.complete"
fi

# --- run -------------------------------------------------------------------------------------------------

emulator="qemu-aarch64-static -L $root"
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
# Tests that start a fresh interpreter start it through the emulator too.
emulated() {
    env PYTHONPATH="$site:$PWD/core:$PWD/agent:$PWD" PYTHONPYCACHEPREFIX="$cache/pycache" \
        LIBERATAI_EMULATOR="$emulator" HYPOTHESIS_PROFILE=quick $emulator "$arm_python" "$@"
}

say "$(emulated -c 'import numpy, platform; print(platform.machine(), "Python", platform.python_version(), "numpy", numpy.__version__)')"

tests="tests/golden"
for name in errors weights structure topics messages frame chunks limits; do
    tests="$tests tests/unit/core/test_$name.py"
done
for more in tests/property tests/unit/core/test_codec.py tests/unit/core/test_sparsifier*.py tests/unit/core/test_compressor*.py \
    tests/unit/core/sparsifier tests/unit/core/compressor; do
    [ -e "$more" ] && tests="$tests $more"
done
# Left out: what only a coordinator does (choosing codings for a budget), and long searches for inputs whose
# answer depends on no architecture. Emulation is ten times slower than the machine.
left_out="budget or sensitive or smallest or extreme_scales or pruned or many_tensors or flipped_bit_is_refused_or_changes \
    or random_bytes_behind or many_rounds or importan or unlike or project_weights or for_retraining or row_and_column \
    or alike_rows"
# shellcheck disable=SC2086 # a list of words
emulated -m pytest -q -p no:cacheprovider -k "not ($left_out)" ${AARCH64_PYTEST:-} $tests

say "probe of the agent"
emulated -m liberatai_agent probe -o json >"$cache/probe.json"
"$python" - "$cache/probe.json" <<'END'
import json, sys

probe = json.load(open(sys.argv[1]))
assert probe["arch"] == "aarch64", probe
END

say "digests on both architectures"
rm -rf "$cache/models"
PYTHONPATH="$PWD/core:$PWD" "$python" -m tests.aarch64.digests "$cache/models" >"$cache/digests.here"
emulated -m tests.aarch64.digests "$cache/models" >"$cache/digests.aarch64"
if ! diff "$cache/digests.here" "$cache/digests.aarch64"; then
    say "FAILED: the two architectures disagree (above: < $(uname -m), > aarch64)"
    exit 1
fi
say "passed: $(grep -c . "$cache/digests.here") digests are the same on $(uname -m) and aarch64"
