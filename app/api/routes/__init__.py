"""The routes, one module for each group of them.

notifications  POST /send-notification/{email}
batches        many notifications in one request
uploads        files: upload, list, download, delete
tasks          look at tasks, cancel, retry, and follow them in an event stream
tutorial       the routes of FastAPI's tutorials on background tasks
health         /livez, /readyz and /metrics
inbox          the pages of the embedded mail catcher
documentation  /docs, /redoc and /openapi.json
"""
