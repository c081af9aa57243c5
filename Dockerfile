# The service in one small image: `docker compose up --wait`, or `docker build -t afterward .`
FROM python:3.13.16-slim-trixie AS builder

WORKDIR /srv
COPY requirements.txt .
# The venv has no pip of its own, and nothing is compiled: the image carries only what runs.
RUN python -m venv --without-pip /opt/venv \
    && pip --python /opt/venv install --no-cache-dir --only-binary :all: --no-deps \
        --require-hashes -r requirements.txt


FROM python:3.13.16-slim-trixie

# The user's number is fixed, so that a volume keeps its owner from one image to the next: a new
# volume takes its owner from the directory that it covers.
RUN useradd --uid 10001 --no-log-init --no-create-home --home-dir /srv afterward \
    && install --directory --owner afterward --group afterward /srv/var

WORKDIR /srv
COPY --from=builder /opt/venv /opt/venv
COPY afterward afterward
COPY app app

# The root may be read-only: nothing is written but /srv/var, and /tmp. Logs leave line by line.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOST=0.0.0.0 \
    PORT=8000

USER 10001:10001
VOLUME /srv/var
EXPOSE 8000

# Not urllib, which would ask the proxy where containers are given an http_proxy.
HEALTHCHECK --interval=10s --timeout=5s --start-period=15s CMD ["python", "-c", \
    "import os; from http.client import HTTPConnection; \
    api = HTTPConnection('127.0.0.1', os.environ['PORT'], timeout=4); \
    api.request('GET', '/livez'); exit(api.getresponse().status != 200)"]

# In this form Python is process 1 and gets SIGTERM itself: no shell stands in between.
CMD ["python", "-m", "app"]
