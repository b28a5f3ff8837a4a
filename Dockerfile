# Two images: `gpu`, for training on NVIDIA GPUs, and `cpu`, for trying out and CI.
#
#     docker build --target gpu --tag trb_megatron:gpu .
#     docker build --target cpu --tag trb_megatron:cpu .
#
# Options (--build-arg NAME=value):
#     GPU_IMAGE, CPU_IMAGE    the same base images from a mirror
#     PIP_INDEX_URL, PIP_EXTRA_INDEX_URL
#                             where packages come from; PyTorch's index of CPU builds spares the
#                             cpu image several GB of CUDA libraries
#     EXTRAS="dev"            optional dependencies of pyproject.toml
#     REVISION                the commit, for the image's labels and the run folders
#
# NVIDIA's PyTorch 26.06 has Python 3.12, CUDA 13.3 and PyTorch 2.13.0a0, with Transformer Engine,
# Apex and flash-attention built for it (docs.nvidia.com/deeplearning/frameworks/
# pytorch-release-notes/rel-26-06.html). Megatron-LM's own CI is based on it, too
# (docker/Dockerfile.ci.dev of that repository). On CPUs, torch is the same minor version.
ARG GPU_IMAGE=nvcr.io/nvidia/pytorch:26.06-py3
ARG CPU_IMAGE=python:3.12-slim-bookworm

# The last target is what a build without --target makes. There is no HEALTHCHECK: a job is not a
# service, and ends with a status when something is wrong.

FROM ${CPU_IMAGE} AS cpu
# Any user (docker run --user) may write to the home folder and to runs/, and nowhere else.
ENV HOME=/home/trb USER=trb HF_HOME=/home/trb/.cache/huggingface
WORKDIR /workspace/trb_megatron
RUN useradd --uid 10001 --home-dir "$HOME" --create-home trb \
    && mkdir runs \
    && chmod 1777 "$HOME" runs

ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG EXTRAS=""
COPY pyproject.toml ./
COPY launch/docker launch/docker
# hadolint ignore=SC2086
RUN python launch/docker/plan_install.py /tmp/plan $EXTRAS \
    && PIP_CONSTRAINT=/tmp/plan/constraints.txt python -m pip install --no-cache-dir \
        --requirement /tmp/plan/requirements.txt \
    && python -m pip check

COPY . .
RUN PIP_CONSTRAINT=/tmp/plan/constraints.txt python -m pip install --no-cache-dir \
        --no-deps --editable . \
    && python -m compileall -q trb_megatron checkpoints_tools

ARG REVISION=""
ENV TRB_COMMIT=${REVISION}
LABEL org.opencontainers.image.title="trb_megatron, CPU" \
      org.opencontainers.image.description="On-policy distillation with Trust-Region behavior Blending on Megatron-Core" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="${REVISION}"
USER 10001
CMD ["python", "-m", "trb_megatron.train", "--help"]


FROM ${GPU_IMAGE} AS gpu
ENV HOME=/home/trb USER=trb HF_HOME=/home/trb/.cache/huggingface
WORKDIR /workspace/trb_megatron
RUN useradd --uid 10001 --home-dir "$HOME" --create-home trb \
    && mkdir runs \
    && chmod 1777 "$HOME" runs

ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG EXTRAS=""
COPY pyproject.toml ./
COPY launch/docker launch/docker
# The plan takes the place of the image's own PIP_CONSTRAINT. It holds torch and all that was built
# for it where they are, but lets a pure Python package be renewed that transformers needs newer.
# hadolint ignore=SC2086
RUN python launch/docker/plan_install.py /tmp/plan $EXTRAS \
    && PIP_CONSTRAINT=/tmp/plan/constraints.txt python -m pip install --no-cache-dir \
        --requirement /tmp/plan/requirements.txt \
    && python -c "from importlib.metadata import version as v; \
        print({name: v(name) for name in ('torch', 'transformer-engine', 'megatron-core')})"

COPY . .
RUN PIP_CONSTRAINT=/tmp/plan/constraints.txt python -m pip install --no-cache-dir \
        --no-deps --editable . \
    && python -m compileall -q trb_megatron checkpoints_tools

ARG REVISION=""
ENV TRB_COMMIT=${REVISION}
LABEL org.opencontainers.image.title="trb_megatron, GPU" \
      org.opencontainers.image.description="On-policy distillation with Trust-Region behavior Blending on Megatron-Core" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="${REVISION}"
USER 10001
CMD ["python", "-m", "trb_megatron.train", "--help"]
