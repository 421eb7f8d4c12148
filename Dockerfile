# One image for API, worker and courier; the command says which. `docker build .` takes torch's CPU build.
ARG BASE=python:3.12-slim

FROM ${BASE} AS build
ARG TORCH=2.13.0
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PYTHONDONTWRITEBYTECODE=1
RUN python -m venv /opt/headrace
ENV PATH=/opt/headrace/bin:$PATH
# The big one first: it is built again only when its version changes.
RUN pip install "torch>=${TORCH}" --index-url "${TORCH_INDEX}"
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY api api
COPY core core
COPY courier courier
COPY headrace headrace
COPY jobs jobs
COPY worker worker
RUN pip install ".[api,worker]"

FROM ${BASE}
# The attention kernel is compiled where it runs, to fit that processor.
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN groupadd --gid 10001 headrace \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin headrace \
 && install -d -o 10001 -g 10001 -m 0700 /models /keys /hooks
COPY --from=build /opt/headrace /opt/headrace
ENV PATH=/opt/headrace/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp \
    HEADRACE_CACHE=/models
USER 10001:10001
WORKDIR /tmp
EXPOSE 8000
STOPSIGNAL SIGTERM
# Of the API; docker-compose.yml gives the worker its own.
HEALTHCHECK --interval=10s --timeout=5s --start-period=20s \
  CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=3)"]
CMD ["headrace", "api"]
