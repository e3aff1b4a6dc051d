# Octofold for NVIDIA GPUs. Build from the repository root:
#
#   docker build -f docker/cuda.Dockerfile -t octofold:cuda .
#   docker run --rm --gpus all octofold:cuda doctor
#
# torch's wheel brings CUDA and NCCL, so the base needs only Python. PIP_OPTIONS and PYTHON_IMAGE: see cpu.Dockerfile.

ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ARG PIP_OPTIONS=""
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/octofold
WORKDIR /src
# The dependencies are a layer of their own, rebuilt only when a requirement or a pin changes.
COPY pyproject.toml ./
COPY constraints/base.txt constraints/cuda.txt constraints/
RUN python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
print(*p['dependencies'], *p['optional-dependencies']['cuda'], *p['optional-dependencies']['track'], sep='\n')" \
        > requirements.txt \
    && /opt/octofold/bin/pip install $PIP_OPTIONS -c constraints/base.txt -c constraints/cuda.txt -r requirements.txt
COPY . .
RUN /opt/octofold/bin/pip install $PIP_OPTIONS -c constraints/base.txt -c constraints/cuda.txt '.[cuda,track]'

FROM ${PYTHON_IMAGE}
# Triton compiles a launcher with a C compiler at run time; NCCL finds InfiniBand and RoCE through libibverbs.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc ibverbs-providers libc6-dev libibverbs1 \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid 1000 octofold && mkdir -p /work/runs && chown -R octofold:octofold /work
COPY --from=build /opt/octofold /opt/octofold
ENV PATH=/opt/octofold/bin:$PATH \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
# A number: Kubernetes cannot tell that a name is not root's.
USER 1000:1000
# Runs are written below the working directory; tokenised data and compiled kernels to the home folder's cache.
WORKDIR /work
# What was built:  --build-arg VERSION=$(git describe --always) --build-arg REVISION=$(git rev-parse HEAD)
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Octofold" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.description="Pretrains DeepSeek-class mixture-of-experts models; NVIDIA image" \
      org.opencontainers.image.licenses="Apache-2.0"
HEALTHCHECK --interval=1m --timeout=10s CMD ["octofold", "--version"]
ENTRYPOINT ["octofold"]
CMD ["--help"]
