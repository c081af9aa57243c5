# The service in one small image: `docker compose up --wait`, or `docker build -t afterward .`
FROM python:3.13.16-slim-trixie AS builder

WORKDIR /srv
COPY requirements.txt .
# The virtual environment has no pip, and nothing is compiled, so the image contains no build tools.
RUN python -m venv --without-pip /opt/venv \
    && pip --python /opt/venv install --no-cache-dir --only-binary :all: --no-deps \
        --require-hashes -r requirements.txt


FROM python:3.13.16-slim-trixie

# The user id is fixed, because a volume keeps its owner's id from image to image. A new volume takes
# its owner from the directory at its mount point.
RUN useradd --uid 10001 --no-log-init --no-create-home --home-dir /srv afterward \
    && install --directory --owner afterward --group afterward /srv/var

WORKDIR /srv
COPY --from=builder /opt/venv /opt/venv
COPY afterward afterward
COPY app app

# The root file system may be read-only, because the service writes only to /srv/var and /tmp. Python
# writes each log line at once.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOST=0.0.0.0 \
    PORT=8000

USER 10001:10001
VOLUME /srv/var
EXPOSE 8000

# Not urllib, because it would use a proxy if the container has an http_proxy.
HEALTHCHECK --interval=10s --timeout=5s --start-period=15s CMD ["python", "-c", \
    "import os; from http.client import HTTPConnection; \
    api = HTTPConnection('127.0.0.1', os.environ['PORT'], timeout=4); \
    api.request('GET', '/livez'); exit(api.getresponse().status != 200)"]

# In this form Python is process 1, without a shell in between, so it receives SIGTERM itself.
CMD ["python", "-m", "app"]
