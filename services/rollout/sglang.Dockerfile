# An engine on GPUs: SGLang's image, and the launcher that keeps SGLang alive in it. Build at the root of the
# repository:
#     docker build -f services/rollout/sglang.Dockerfile -t milepost/engine-sglang .
# It stops on SIGTERM within 30 s; settings come by MILEPOST_ENGINE__<KEY>, flags or `--config FILE`.
# Down to the last FROM this file is the same for the images on GPUs; the wheel is that of all images.

ARG SGLANG_IMAGE=lmsysorg/sglang:v0.5.21

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

FROM ${SGLANG_IMAGE}
ENV PYTHONUNBUFFERED=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PIP_BREAK_SYSTEM_PACKAGES=1
# The user is a number, since the image has a name for 1000 already, and the same one for trainer and engine: what torch
# puts into /dev/shm for CUDA IPC is for one user alone.
RUN install -d -o 1000 -g 1000 /home/milepost /runs /weights
# The launcher needs what every server needs. Fails where pip would change what SGLang stands on.
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=bind,from=requirements,source=/requirements,target=/need \
    kept() { python3 -m pip list --format=freeze | grep -E '^(sgl.*|torch.*|triton|transformers|flashinfer.*|nvidia-.*)=='; } \
    && had="$(kept)" \
    && { grep -vE '^(torch|transformers)==' /need/constraints.txt; echo "$had"; } > /tmp/constraints.txt \
    && python3 -m pip install --constraint /tmp/constraints.txt --requirement /need/common.txt \
    && test "$had" = "$(kept)"
RUN --mount=type=bind,from=wheel,source=/wheel,target=/wheel python3 -m pip install --no-deps /wheel/*.whl
ENV MILEPOST_ENGINE__BACKEND=sglang MILEPOST_ENGINE__HOST=0.0.0.0 HOME=/home/milepost
USER 1000:1000
WORKDIR /runs
EXPOSE 30000
STOPSIGNAL SIGTERM
# Not /health, which generates a token and fails while weights are updated; /server_info is answered by the scheduler.
HEALTHCHECK --interval=30s --timeout=15s --start-period=900s --retries=3 \
    CMD ["milepost", "health", "http://127.0.0.1:30000/server_info", "--timeout-s", "10"]
ENTRYPOINT ["milepost"]
CMD ["engine", "serve"]
