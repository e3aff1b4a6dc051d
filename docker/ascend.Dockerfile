# Octofold for Huawei Ascend. Build from the repository root, on the processor of the nodes (aarch64 or x86_64):
#
#   docker build -f docker/ascend.Dockerfile -t octofold:ascend .
#   docker run --rm -e ASCEND_VISIBLE_DEVICES=0 octofold:ascend doctor      (with Ascend Docker Runtime)
#
# CANN comes from its publisher's image, whose tag names the chip: 910b (Atlas A2), a3 (910C), 950. The versions of CANN
# that torch_npu takes stand in launch/doctor_matrix.py. The driver is the node's and is mounted. PIP_OPTIONS: see
# cpu.Dockerfile. Pin the base by digest where builds must repeat:  --build-arg CANN_IMAGE=quay.io/ascend/cann@sha256:...

ARG CANN_IMAGE=quay.io/ascend/cann:9.0.1-910b-ubuntu22.04-py3.11

FROM ${CANN_IMAGE} AS build
ARG PIP_OPTIONS=""
# torch would load torch_npu, and that the driver, which a build has not.
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 TORCH_DEVICE_BACKEND_AUTOLOAD=0
RUN python3 -m venv /opt/octofold
WORKDIR /src
# The dependencies are a layer of their own, rebuilt only when a requirement or a pin changes.
COPY pyproject.toml ./
COPY constraints/base.txt constraints/ascend.txt constraints/
RUN python3 -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
print(*p['dependencies'], *p['optional-dependencies']['track'], sep='\n')" \
        > requirements.txt \
    && /opt/octofold/bin/pip install $PIP_OPTIONS -c constraints/base.txt -r requirements.txt \
    && /opt/octofold/bin/pip install $PIP_OPTIONS -c constraints/ascend.txt --no-deps torch-npu
COPY . .
RUN /opt/octofold/bin/pip install $PIP_OPTIONS -c constraints/base.txt '.[track]'

FROM ${CANN_IMAGE}
# Devices belong to the group HwHiAiUser of the driver, which is 1000 unless its installer was told otherwise.
RUN useradd --create-home --uid 1000 octofold && mkdir -p /work/runs && chown -R octofold:octofold /work
COPY --from=build /opt/octofold /opt/octofold
ENV PATH=/opt/octofold/bin:$PATH
# A number: Kubernetes cannot tell that a name is not root's.
USER 1000:1000
# Runs are written below the working directory; tokenised data and compiled operators to the home folder.
WORKDIR /work
# What was built:  --build-arg VERSION=$(git describe --always) --build-arg REVISION=$(git rev-parse HEAD)
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Octofold" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.description="Pretrains DeepSeek-class mixture-of-experts models; Ascend image" \
      org.opencontainers.image.licenses="Apache-2.0"
HEALTHCHECK --interval=1m --timeout=10s CMD ["octofold", "--version"]
# The environment of CANN is the base image's.
ENTRYPOINT ["octofold"]
CMD ["--help"]
