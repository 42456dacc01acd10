# The CPU engine. Build at the root of the repository:
#     docker build -f services/rollout/engine.Dockerfile -t milepost/engine .
# It stops on SIGTERM within 35 s; settings come by MILEPOST_ENGINE__<KEY>, flags or `--config FILE`.
# Down to the last FROM this file is the same for engine and trainer, so that they share these layers.

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

# torch first and alone: the largest layer changes least. PyPI's build brings CUDA along, this index does not; an
# empty index takes what pip finds by itself.
FROM base AS common
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=bind,from=requirements,source=/requirements,target=/need \
    pip install --no-deps --constraint /need/constraints.txt ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} torch
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=bind,from=requirements,source=/requirements,target=/need \
    pip install --constraint /need/constraints.txt --requirement /need/common.txt torch transformers safetensors

FROM common
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=bind,from=requirements,source=/requirements,target=/need \
    pip install --constraint /need/constraints.txt --requirement /need/engine.txt
RUN --mount=type=bind,from=wheel,source=/wheel,target=/wheel pip install --no-deps /wheel/*.whl
ENV MILEPOST_ENGINE__HOST=0.0.0.0 MILEPOST_ENGINE__METRICS_LISTEN=0.0.0.0:9105 \
    OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
USER milepost
WORKDIR /runs
EXPOSE 30000 9105
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s --retries=3 CMD ["milepost", "health", "http://127.0.0.1:30000/health"]
ENTRYPOINT ["milepost"]
CMD ["engine", "serve"]
