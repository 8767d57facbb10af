# syntax=docker/dockerfile:1

# Pinned to Python's minor version and Debian's release: what comes after those are security fixes.
FROM python:3.12-slim-bookworm AS build
WORKDIR /build
# What .dockerignore lets through.
COPY . .
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install -c constraints.txt setuptools \
    && pip wheel --no-deps --no-build-isolation --wheel-dir wheels .
# What serving needs, and downloads of published models. A file of its own, so that the large layer
# below is made anew when this list changes, and not whenever code does.
RUN python -c "import tomllib; \
    project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
    print(*project['dependencies'], *project['optional-dependencies']['convert'], sep='\n')" \
    > requirements.txt

FROM python:3.12-slim-bookworm
LABEL org.opencontainers.image.title="rae-server" \
    org.opencontainers.image.description="Serves class-conditional images from representation-autoencoder diffusion transformers" \
    org.opencontainers.image.version="0.1.0" \
    org.opencontainers.image.licenses="MIT"
# Triton compiles C against Python's headers at its first kernel, which python:slim has, and
# torch.compile compiles C++ where it runs on a CPU. CUDA's libraries come with torch.
# No version: Debian serves only the newest of a release, so that a pin fails after the next fix.
# Any user of group 0 may write into the two folders, as OpenShift and `docker run --user` start one.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --no-install-recommends -y g++ \
    && rm -rf /var/lib/apt/lists/* \
    && install -d -o 10001 -g 0 -m 0775 /cache /work
WORKDIR /opt/rae
COPY --from=build /build/requirements.txt /build/constraints.txt ./
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install -c constraints.txt -r requirements.txt
COPY --from=build /build/wheels wheels
RUN pip install --no-cache-dir --no-deps wheels/*.whl
# Compiled code (rae's, Triton's, CUDA's) and downloads: a home, as such a user has none.
ENV HOME=/cache \
    XDG_CACHE_HOME=/cache \
    PYTHONSAFEPATH=1 \
    PYTHONUNBUFFERED=1 \
    RAE_HOST=0.0.0.0 \
    RAE_PORT=8000
VOLUME /cache
# Where `rae generate` leaves its files.
WORKDIR /work
USER 10001:0
EXPOSE 8000
STOPSIGNAL SIGTERM
# Whoever restarts what is unhealthy must not end a server that warms up, replaces a worker or
# drains: so "live" and not "ready", and three failures take longer than a drain. Before the port
# opens, gigabytes of a published model may be downloaded.
HEALTHCHECK --interval=30s --timeout=10s --start-period=30m --retries=3 \
    CMD ["python", "-c", "import http.client, os, sys; api = http.client.HTTPConnection('localhost', int(os.environ['RAE_PORT']), timeout=8); api.request('GET', '/health/live'); sys.exit(api.getresponse().status != 200)"]
ENTRYPOINT ["rae"]
CMD ["serve"]
