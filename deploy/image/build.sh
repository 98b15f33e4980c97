#!/usr/bin/env bash
# Builds an image on a Debian machine, as root, without Docker and without a registry of images: by buildah, on a base
# that mmdebstrap makes of Debian's packages. Leaves DIRECTORY/convoy-TARGET.tar (docker load, skopeo copy) and its SBOM.
#   deploy/image/build.sh DIRECTORY [TARGET]
# The base and the layers stay in DIRECTORY, so another build takes what has not changed. PIP_CERT names authorities
# of your own for pip in the build; they do not get into the image. DEBIAN=trixie takes another Debian.
set -euo pipefail

usage="usage: deploy/image/build.sh DIRECTORY [TARGET]"
directory=$(realpath -m "${1:?$usage}")
target=${2:-cpu}
debian=${DEBIAN:-bookworm}
cd "$(dirname "$0")/../.."

for program in buildah mmdebstrap; do
    command -v "$program" >/dev/null || { echo "$program is not installed (apt-get install $program)." >&2; exit 1; }
done
export BUILDAH_ISOLATION=chroot
mkdir -p "$directory"
# vfs needs nothing of the kernel, and is slower than overlay, which needs it to be no overlay below.
store() { buildah --storage-driver "${STORAGE_DRIVER:-vfs}" --root "$directory/layers" --runroot "$directory/run" "$@"; }

# In place of python:3.x-slim: Debian's Python, with pip for the build stages.
base=$directory/base-$debian.tar
if [[ ! -s $base ]]; then
    mmdebstrap --quiet --variant=minbase --include=python3,python3-venv,python3-pip,python-is-python3,ca-certificates \
        "$debian" "$base.part.tar"
    mv "$base.part.tar" "$base"
fi
if ! store inspect --type image "localhost/python-base:$debian" >/dev/null 2>&1; then
    empty=$(store from scratch)
    store add --quiet "$empty" "$base" / >/dev/null
    store commit --quiet --rm "$empty" "localhost/python-base:$debian" >/dev/null
fi

mounts=(--volume /etc/resolv.conf:/etc/resolv.conf:ro)
if [[ -n ${PIP_CERT:-} ]]; then
    printf '[global]\ncert = /run/authorities.pem\n' >"$directory/pip.conf"
    mounts+=(--volume "$directory/pip.conf:/etc/pip.conf:ro" --volume "$PIP_CERT:/run/authorities.pem:ro")
fi
version=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' app/__init__.py)
# Docker's own format, since OCI's has no place for a health check.
store build --pull=never --format docker --layers --target "$target" --tag "localhost/convoy:$target" "${mounts[@]}" \
    --build-arg PYTHON_IMAGE="localhost/python-base:$debian" --build-arg VERSION="$version" \
    --build-arg REVISION="$(git rev-parse HEAD)" --build-arg CREATED="$(TZ=UTC git log -1 --date=format-local:%FT%TZ --format=%cd)" .

case $target in cpu | gpu | train) ;; *) exit 0 ;; esac
archive=$directory/convoy-$target.tar
rm -f "$archive"
store push --quiet "localhost/convoy:$target" "docker-archive:$archive:convoy:$target"
if command -v syft >/dev/null; then
    SYFT_CHECK_FOR_APP_UPDATE=false syft scan --quiet "docker-archive:$archive" --output "cyclonedx-json=${archive%.tar}.sbom.json"
else
    echo "syft is not installed, so no SBOM is made (pip install -r deploy/image/tools.txt)." >&2
fi
ls -l "${archive%.tar}"*
