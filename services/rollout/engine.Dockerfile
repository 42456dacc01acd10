# The CPU engine. Build at the root of the repository:
#     docker build -f services/rollout/engine.Dockerfile -t milepost/engine .
# It stops on SIGTERM within 35 s; settings come by MILEPOST_ENGINE__<KEY>, flags or `--config FILE`.

FROM python:3.11-slim-bookworm AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore PATH=/opt/venv/bin:$PATH
RUN python -m venv /opt/venv
WORKDIR /src
COPY constraints.txt ./

# torch alone and first: the largest layer changes least. PyPI's build brings CUDA along, this index does not.
# An empty index takes what pip finds by itself.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --constraint constraints.txt ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} torch

# What it needs, from the metadata alone, so that a change of code installs nothing again.
COPY pyproject.toml README.md LICENSE ./
COPY clients/milepost/_version.py clients/milepost/
RUN pip install --constraint constraints.txt ".[engine]"
COPY clients clients
COPY services services
RUN pip install --no-deps --force-reinstall .

FROM python:3.11-slim-bookworm
RUN useradd --uid 1000 --create-home --shell /usr/sbin/nologin milepost \
    && install -d -o milepost -g milepost /runs /weights
COPY --from=build /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 \
    MILEPOST_ENGINE__HOST=0.0.0.0 \
    OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
USER milepost
WORKDIR /runs
EXPOSE 30000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 CMD ["milepost", "health", "http://127.0.0.1:30000/health"]
ENTRYPOINT ["milepost"]
CMD ["engine", "serve"]
