# Two images that serve:
#   docker build -t convoy:cpu .
#   docker build -t convoy:gpu --target gpu .
# and one that trains, with PyTorch, for k8s/components/training:
#   docker build -t convoy-training --target train .
# A release build gives PYTHON_IMAGE by digest, and VERSION, REVISION and CREATED. docs/image.md tells the rest.
ARG PYTHON_IMAGE=python:3.12-slim-bookworm


FROM ${PYTHON_IMAGE} AS build
ENV ORT_DISABLE_TELEMETRY=1 \
    PIP_CACHE_DIR=/var/cache/pip \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_DEPS=1 \
    PIP_ONLY_BINARY=:all: \
    PIP_ROOT_USER_ACTION=ignore
WORKDIR /build
# The venv gets no pip of its own: the builder's pip installs into it from outside.
RUN python -m venv --without-pip /opt/convoy && \
    rm /opt/convoy/bin/[Aa]ctivate*


# Dependencies come before the code, in layers of their own: those of the GPU image are 2.7 GB, and a change in app/
# must not move them again. Each list is complete and has every file's SHA-256 (make image-lock): pip resolves nothing,
# and takes nothing else. The packages' own commands are deleted; system.py then lays out what the environment needs of
# the system around it.
FROM build AS dependencies-cpu
COPY deploy/image/cpu.txt ./
RUN --mount=type=cache,target=/var/cache/pip \
    python -m pip --python /opt/convoy/bin/python install --require-hashes -r cpu.txt && \
    python -m pip --python /opt/convoy/bin/python check && \
    find /opt/convoy/bin -type f -delete
COPY deploy/image/system.py ./
RUN python system.py /opt/convoy /system


FROM build AS dependencies-gpu
COPY deploy/image/gpu.txt ./
RUN --mount=type=cache,target=/var/cache/pip \
    python -m pip --python /opt/convoy/bin/python install --require-hashes -r gpu.txt && \
    python -m pip --python /opt/convoy/bin/python check && \
    find /opt/convoy/bin -type f -delete
COPY deploy/image/system.py ./
RUN python system.py /opt/convoy /system


FROM build AS dependencies-train
COPY deploy/image/train.txt ./
RUN --mount=type=cache,target=/var/cache/pip \
    python -m pip --python /opt/convoy/bin/python install --require-hashes -r train.txt && \
    python -m pip --python /opt/convoy/bin/python check


# Only what is staged leaves this stage, so setuptools may go into its copy of the venv. training/ comes last: it needs
# PyTorch, and the images that serve have neither.
FROM build AS code
COPY deploy/image/build.txt ./
RUN --mount=type=cache,target=/var/cache/pip \
    python -m pip --python /opt/convoy/bin/python install --require-hashes -r build.txt
COPY pyproject.toml README.md LICENSE ./
COPY app app
COPY convoy convoy
RUN python -m pip --python /opt/convoy/bin/python install --root /staged --no-build-isolation . && \
    rm /staged/opt/convoy/bin/convoy-train


FROM code AS code-train
COPY training training
RUN python -m pip --python /opt/convoy/bin/python install --root /staged-train --no-build-isolation .


# PyTorch looks for tools around it, so this image keeps the base's system, but not the tools that install, nor the right
# to become another user: those serve intruders, and are noise for a scanner. Deleted by hand, since Debian's pip does not
# uninstall itself. torchrun is beside convoy-train.
FROM ${PYTHON_IMAGE} AS train
RUN rm -rf "$(python -c 'import ensurepip; print(ensurepip.__path__[0])')" \
        "$(python -c 'import pip; print(pip.__path__[0])')"* \
        "$(dirname "$(command -v pip)")"/pip* && \
    find / -xdev -type f -perm /6000 -exec chmod ug-s {} +
ENV PATH=/opt/convoy/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    ORT_DISABLE_TELEMETRY=1
COPY --from=dependencies-train /opt/convoy /opt/convoy
COPY --from=code-train /staged-train/opt/convoy /opt/convoy
# There to be fine-tuned from.
COPY models /models
USER 10001:10001
HEALTHCHECK NONE
ENTRYPOINT ["convoy-train"]
CMD ["--help"]
ARG PYTHON_IMAGE
ARG VERSION=0.0.0
ARG REVISION=unknown
ARG CREATED=1970-01-01T00:00:00Z
LABEL org.opencontainers.image.title="Convoy, training" \
      org.opencontainers.image.description="Trains image classifiers, by one process or several, and writes what Convoy serves." \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.base.name="${PYTHON_IMAGE}" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}"


# From nothing: no shell, no package manager, only Python, what it needs, Convoy and models. Any uid may run it, and
# nothing is written but in /tmp.
FROM scratch AS runtime
ENV PATH=/opt/convoy/bin \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    ORT_DISABLE_TELEMETRY=1 \
    CONVOY_HOST=0.0.0.0 \
    CONVOY_PORT=8000 \
    CONVOY_MODELS=/models
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 CMD ["convoy", "health"]
ENTRYPOINT ["convoy"]
CMD ["serve"]
ARG PYTHON_IMAGE
LABEL org.opencontainers.image.title="Convoy" \
      org.opencontainers.image.description="Serves image classifiers: images in, labels and probabilities out." \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.base.name="${PYTHON_IMAGE}"


# Each image is tried before it is made: were a library not laid out, the build would end here. Only the environment goes
# on from these stages, so that a container's traces in /etc do not.
FROM runtime AS tried-cpu
COPY --from=dependencies-cpu /system /
COPY --from=dependencies-cpu /opt/convoy /opt/convoy
RUN ["python", "-c", "import fastapi, grpc, httptools, httpx, numpy, onnxruntime, opentelemetry.exporter.otlp.proto.http.trace_exporter, PIL.Image, simplejpeg, uvicorn, uvloop"]


FROM runtime AS tried-gpu
COPY --from=dependencies-gpu /system /
COPY --from=dependencies-gpu /opt/convoy /opt/convoy
RUN ["python", "-c", "import fastapi, grpc, httptools, httpx, numpy, onnxruntime, opentelemetry.exporter.otlp.proto.http.trace_exporter, PIL.Image, pynvml, simplejpeg, uvicorn, uvloop"]


# CUDA 13 and cuDNN come as wheels, so the image holds no CUDA system; the driver (R580 or newer) is the host's.
FROM runtime AS gpu
# Without NVIDIA_VISIBLE_DEVICES the container runtime mounts no driver, and ONNX Runtime falls back to the CPU without
# an error: CONVOY_DEVICE=cuda makes that a failure.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    NVIDIA_REQUIRE_CUDA="cuda>=13.0" \
    CONVOY_DEVICE=cuda
COPY --from=dependencies-gpu /system /
COPY --from=tried-gpu /opt/convoy /opt/convoy
COPY --from=code /staged/opt/convoy /opt/convoy
COPY models /models
# Last, since they change with each commit, and what follows a change is built anew.
ARG VERSION=0.0.0
ARG REVISION=unknown
ARG CREATED=1970-01-01T00:00:00Z
LABEL org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}"


FROM runtime AS cpu
COPY --from=dependencies-cpu /system /
COPY --from=tried-cpu /opt/convoy /opt/convoy
COPY --from=code /staged/opt/convoy /opt/convoy
COPY models /models
ARG VERSION=0.0.0
ARG REVISION=unknown
ARG CREATED=1970-01-01T00:00:00Z
LABEL org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}"
