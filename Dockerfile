# One image for both roles: `python -m api` (the default) and `python -m worker`.
# Debian-based, since the locked wheels are for glibc. Settings and secrets come from the environment, never from here.

FROM python:3.12-slim AS build
RUN python -m venv /opt/venv
COPY requirements.lock /tmp/requirements.lock
RUN /opt/venv/bin/python -m pip install --no-cache-dir --disable-pip-version-check \
        --no-deps --only-binary=:all: --require-hashes -r /tmp/requirements.lock

FROM python:3.12-slim
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    REJOIN_HOST=0.0.0.0 \
    REJOIN_PORT=8000 \
    REJOIN_LOG_FORMAT=json
RUN useradd --system --uid 10001 --user-group --no-create-home --home-dir /nonexistent rejoin \
    && install -d -o 10001 -g 10001 -m 700 /var/lib/rejoin
WORKDIR /app
COPY --from=build /opt/venv /opt/venv
COPY shared ./shared
COPY api ./api
COPY worker ./worker
COPY cli ./cli
RUN python -m compileall -q shared api worker cli
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
# For the api; a worker replaces it by `python -m worker --health`. Not urllib, which would ask a configured proxy.
HEALTHCHECK --interval=10s --timeout=5s --start-period=20s --retries=3 \
    CMD ["python", "-c", "import http.client, os, sys; c = http.client.HTTPConnection('127.0.0.1', int(os.environ['REJOIN_PORT']), timeout=4); c.request('GET', '/healthz'); sys.exit(c.getresponse().status != 200)"]
CMD ["python", "-m", "api"]
