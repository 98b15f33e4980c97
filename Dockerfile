# Two images that serve:
#   docker build -t convoy:cpu .
#   docker build -t convoy:gpu --target gpu .
# and one that trains, with PyTorch, for k8s/components/training:
#   docker build -t convoy-training --target train .
# A release build gives PYTHON_IMAGE by digest, and VERSION and REVISION.
ARG PYTHON_IMAGE=python:3.12-slim-bookworm


FROM ${PYTHON_IMAGE} AS build
ENV ORT_DISABLE_TELEMETRY=1 \
    PIP_CACHE_DIR=/var/cache/pip \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ONLY_BINARY=:all: \
    PIP_ROOT_USER_ACTION=ignore
WORKDIR /build
# The venv gets no pip of its own: the builder's pip installs into it from outside.
RUN python -m venv --without-pip /opt/convoy
COPY pyproject.toml constraints.txt constraints-gpu.txt ./


# Dependencies come before the code, in layers of their own: those of the GPU image are 2.7 GB, and a change in app/
# must not move them again. pip cannot install a project's requirements without the project, so they are written out.
FROM build AS dependencies
RUN python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
    lists = {'base': project['dependencies'], **project['optional-dependencies']}; \
    [open(name + '.txt', 'w').write('\n'.join(lines)) for name, lines in lists.items()]"
RUN --mount=type=cache,target=/var/cache/pip \
    python -m pip --python /opt/convoy/bin/python install -c constraints.txt -r base.txt -r grpc.txt


FROM dependencies AS dependencies-cpu
RUN --mount=type=cache,target=/var/cache/pip \
    python -m pip --python /opt/convoy/bin/python install -c constraints.txt -r cpu.txt && \
    /opt/convoy/bin/python -c "import onnxruntime"


FROM dependencies AS dependencies-gpu
RUN --mount=type=cache,target=/var/cache/pip \
    python -m pip --python /opt/convoy/bin/python install -c constraints.txt -c constraints-gpu.txt -r gpu.txt && \
    /opt/convoy/bin/python -c "import onnxruntime"


FROM dependencies AS dependencies-train
RUN --mount=type=cache,target=/var/cache/pip \
    python -m pip --python /opt/convoy/bin/python install -c constraints.txt -r cpu.txt -r train.txt && \
    /opt/convoy/bin/python -c "import torch"


# Only /staged leaves this stage, so setuptools may go into its copy of the venv. training/ stays out: it needs torch.
FROM build AS code
RUN --mount=type=cache,target=/var/cache/pip \
    python -m pip --python /opt/convoy/bin/python install -c constraints.txt "setuptools>=77"
COPY README.md LICENSE ./
COPY app app
COPY convoy convoy
RUN python -m pip --python /opt/convoy/bin/python install --root /staged --no-deps --no-build-isolation . && \
    rm /staged/opt/convoy/bin/convoy-train


FROM code AS code-train
COPY training training
RUN python -m pip --python /opt/convoy/bin/python install --root /staged-train --no-deps --no-build-isolation .


FROM ${PYTHON_IMAGE} AS runtime
# The base image's pip, and the wheel of it that ensurepip keeps, are tools for an intruder and noise for a scanner.
RUN python -m pip uninstall --yes --root-user-action=ignore pip && \
    rm -rf "$(python -c 'import ensurepip; print(ensurepip.__path__[0])')"
ENV PATH=/opt/convoy/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    ORT_DISABLE_TELEMETRY=1 \
    CONVOY_HOST=0.0.0.0 \
    CONVOY_PORT=8000 \
    CONVOY_MODELS=/models
COPY models /models
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 CMD ["convoy", "health"]
ENTRYPOINT ["convoy"]
CMD ["serve"]
ARG VERSION=0.0.0
ARG REVISION=unknown
ARG PYTHON_IMAGE
LABEL org.opencontainers.image.title="Convoy" \
      org.opencontainers.image.description="Serves image classifiers: images in, labels and probabilities out." \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="${PYTHON_IMAGE}"


# CUDA 13 and cuDNN come as wheels, so the base image is the same slim one; the driver (R580 or newer) is the host's.
FROM runtime AS gpu
# Without NVIDIA_VISIBLE_DEVICES the container runtime mounts no driver, and ONNX Runtime falls back to the CPU without
# an error: CONVOY_DEVICE=cuda makes that a failure.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    NVIDIA_REQUIRE_CUDA="cuda>=13.0" \
    CONVOY_DEVICE=cuda
COPY --from=dependencies-gpu /opt/convoy /opt/convoy
COPY --from=code /staged/opt/convoy /opt/convoy


# torchrun is beside convoy-train; the base's models are there to be fine-tuned from.
FROM runtime AS train
HEALTHCHECK NONE
ENTRYPOINT ["convoy-train"]
CMD ["--help"]
COPY --from=dependencies-train /opt/convoy /opt/convoy
COPY --from=code-train /staged-train/opt/convoy /opt/convoy


FROM runtime AS cpu
COPY --from=dependencies-cpu /opt/convoy /opt/convoy
COPY --from=code /staged/opt/convoy /opt/convoy
