# torch with native code for one AMD card, from AMD's package index, and rocm-patch around every Python program.
#
#   docker build --build-arg GFX=gfx1010 -t rocm-patched .
#   docker run --rm -it --device=/dev/kfd --device=/dev/dri --group-add video --ipc=host \
#       -v "$PWD:/work" rocm-patched train.py
#
# GFX is the card's target: `rocm-patch doctor` names it, docs/CATALOG.md lists them. Linted, not yet built, and not
# yet run on AMD hardware.
FROM python:3.12-slim-bookworm

ARG GFX=gfx1010
ARG TORCH_INDEX=https://repo.amd.com/rocm/whl-multi-arch/

# Triton, with which rocm-patch's own kernels are made, compiles a small launcher with the system's compiler.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

# The newest that the index has for this card: it holds one ROCm release, whose versions belong together.
# hadolint ignore=DL3013
RUN python -m pip install --no-cache-dir --index-url "${TORCH_INDEX}" "torch[device-${GFX}]" "torchvision[device-${GFX}]"

COPY . /opt/rocm-patch
RUN python -m pip install --no-cache-dir /opt/rocm-patch

# What is learned about the card outlives the container if this folder is mounted: -v rocm-patch:/var/cache/rocm-patch
ENV ROCM_PATCH_CACHE_DIR=/var/cache/rocm-patch
WORKDIR /work
ENTRYPOINT ["rocm-patch", "run"]
