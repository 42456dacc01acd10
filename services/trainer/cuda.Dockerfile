# The trainer on GPUs, on PyTorch's image: its torch, CUDA and NCCL stay as they are. Build at the root of the
# repository:
#     docker build -f services/trainer/cuda.Dockerfile -t milepost/trainer-cuda .
# It stops on SIGTERM within 65 s; settings come by MILEPOST_TRAINER__<KEY>, flags or `--config FILE`.
# Down to the last FROM this file is the same for the images on GPUs; the wheel is that of all images.

ARG PYTORCH_IMAGE=pytorch/pytorch:2.13.0-cuda13.0-cudnn9-runtime

FROM python:3.11-slim-bookworm AS base
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
RUN useradd --uid 1000 --create-home --shell /usr/sbin/nologin milepost \
    && install -d -o milepost -g milepost /runs /weights \
    && python -m venv /opt/venv

# What each extra needs, as files: a layer made from one is made again when it changes, and not when the code does.
FROM base AS requirements
COPY constraints.txt pyproject.toml scripts/requirements.py /src/
RUN python /src/requirements.py /src/pyproject.toml /requirements && cp /src/constraints.txt /requirements

# The code of all services, as one wheel.
FROM base AS wheel
COPY . /src
RUN --mount=type=cache,target=/root/.cache/pip pip wheel --no-deps --wheel-dir /wheel /src

FROM ${PYTORCH_IMAGE}
ENV PYTHONUNBUFFERED=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PIP_BREAK_SYSTEM_PACKAGES=1
# What Triton compiles kernels with; the image may have it.
RUN apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends gcc libc6-dev python3-dev \
    && rm -rf /var/lib/apt/lists/*
# The user is a number, since the image has a name for 1000 already, and the same one for trainer and engine: what torch
# puts into /dev/shm for CUDA IPC is for one user alone.
RUN install -d -o 1000 -g 1000 /home/milepost /runs /weights
# Fails where pip would put another torch in the place of the image's.
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=bind,from=requirements,source=/requirements,target=/need \
    kept() { python3 -m pip list --format=freeze | grep -E '^(torch|triton|nvidia-.*)=='; } \
    && had="$(kept)" \
    && { grep -vE '^(torch)==' /need/constraints.txt; echo "$had"; } > /tmp/constraints.txt \
    && python3 -m pip install --constraint /tmp/constraints.txt --requirement /need/trainer.txt \
    && test "$had" = "$(kept)"
# SGLang's image has a newer NCCL than torch asks for, and both ends of a group need one release. Empty: torch's own.
ARG NCCL=2.30.7
RUN --mount=type=cache,target=/root/.cache/pip \
    if [ -n "$NCCL" ]; then python3 -m pip install --no-deps "nvidia-nccl-cu13==$NCCL"; fi
RUN --mount=type=bind,from=wheel,source=/wheel,target=/wheel python3 -m pip install --no-deps /wheel/*.whl
ENV MILEPOST_TRAINER__LISTEN=0.0.0.0:7104 MILEPOST_TRAINER__METRICS_LISTEN=0.0.0.0:9104 \
    OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HOME=/home/milepost
USER 1000:1000
WORKDIR /runs
EXPOSE 7104 9104
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=10s --start-period=120s --retries=3 CMD ["milepost", "health", "127.0.0.1:7104"]
ENTRYPOINT ["milepost"]
CMD ["trainer", "serve"]
