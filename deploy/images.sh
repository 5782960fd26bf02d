#!/bin/sh
# Build the images of this source tree, the same bytes whenever: images.sh [agent|agent-train|coordinator ...]
#
#   ENGINE=podman|docker   (default: the one that is there)
#   BASE=IMAGE             see deploy/Containerfile.agent; WHEELS=DIR: install from these wheels only
#   PIP_ARGS=...           for pip
set -eu
cd "$(dirname "$0")/.."
ENGINE=${ENGINE:-$(command -v podman || command -v docker || true)}
[ -n "$ENGINE" ] || { echo "error: neither podman nor docker is installed" >&2; exit 1; }
[ $# -gt 0 ] || set -- agent agent-train coordinator
for name in "$@"; do
    case $name in
    agent) file=agent extras= ;;
    agent-train) file=agent extras=train ;;
    coordinator) file=coordinator extras=coordinator ;;
    *) echo "error: no image $name: agent, agent-train or coordinator" >&2; exit 2 ;;
    esac
    set -- build --file "deploy/Containerfile.$file" --tag "liberatai-$name" --build-arg "EXTRAS=$extras"
    case $ENGINE in *podman) set -- "$@" --timestamp "${SOURCE_DATE_EPOCH:-0}" --format docker ;; esac
    [ -z "${BASE:-}" ] || set -- "$@" --build-arg "BASE=$BASE"
    if [ -n "${WHEELS:-}" ]; then
        set -- "$@" --volume "$WHEELS:/wheels:ro" --network none --build-arg "PIP_ARGS=--no-index --find-links /wheels"
    else
        set -- "$@" --network host --build-arg "PIP_ARGS=${PIP_ARGS:-}"
    fi
    "$ENGINE" "$@" .
done
