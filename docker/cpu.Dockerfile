# Octofold for machines without an accelerator. Build from the repository root:
#
#   docker build -f docker/cpu.Dockerfile -t octofold:cpu .
#   docker run --rm octofold:cpu doctor
#   docker run --rm -v octofold-runs:/work/runs octofold:cpu train experiment=quickstart
#
# The install steps are those of the Makefile, with the same pins. PIP_OPTIONS goes to pip as it is; name there an index
# that serves torch's CPU build, which is much smaller:  --build-arg PIP_OPTIONS="--index-url ..."
# Pin the base by digest where builds must repeat:  --build-arg PYTHON_IMAGE=python@sha256:...

ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ARG PIP_OPTIONS=""
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/octofold
WORKDIR /src
# The dependencies are a layer of their own, rebuilt only when a requirement or a pin changes.
COPY pyproject.toml ./
COPY constraints/base.txt constraints/
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
        > requirements.txt \
    && /opt/octofold/bin/pip install $PIP_OPTIONS -c constraints/base.txt -r requirements.txt
COPY . .
RUN /opt/octofold/bin/pip install $PIP_OPTIONS -c constraints/base.txt .

FROM ${PYTHON_IMAGE}
RUN useradd --create-home --uid 1000 octofold && mkdir -p /work/runs && chown -R octofold:octofold /work
COPY --from=build /opt/octofold /opt/octofold
ENV PATH=/opt/octofold/bin:$PATH
# A number: Kubernetes cannot tell that a name is not root's.
USER 1000:1000
# Runs are written below the working directory; tokenised data to the home folder's cache.
WORKDIR /work
# What was built:  --build-arg VERSION=$(git describe --always) --build-arg REVISION=$(git rev-parse HEAD)
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Octofold" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.description="Pretrains DeepSeek-class mixture-of-experts models; CPU image" \
      org.opencontainers.image.licenses="Apache-2.0"
HEALTHCHECK --interval=1m --timeout=10s CMD ["octofold", "--version"]
ENTRYPOINT ["octofold"]
CMD ["--help"]
