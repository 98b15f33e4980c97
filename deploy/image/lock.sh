#!/usr/bin/env bash
# Writes the lists that the images are installed from: every package with the SHA-256 of each of its files. Needs uv.
# Versions are those of constraints.txt; names, versions and hashes are all that may stand here, never a place.
set -euo pipefail
cd "$(dirname "$0")/../.."

lock() {
    uv pip compile --quiet --generate-hashes --universal --python-version 3.11 --no-header --no-annotate \
        --output-file "deploy/image/$1.txt" -c constraints.txt "${@:2}" >/dev/null
}

lock cpu pyproject.toml --extra cpu --extra grpc --extra otel
lock gpu pyproject.toml --extra gpu --extra grpc --extra otel -c constraints-gpu.txt
lock train pyproject.toml --extra cpu --extra train
echo setuptools | lock build -
