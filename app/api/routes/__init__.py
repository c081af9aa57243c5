"""The routes, one module for each group.

notifications  POST /send-notification/{email}
batches        POST /send-notifications, the same mail to many recipients
uploads        upload, list, download and delete files
tasks          list, read, cancel and retry tasks, and follow them in an event stream
bulk           POST /tasks/retry and POST /tasks/cancel, for all tasks that match a filter
tutorial       the routes of FastAPI's tutorials on background tasks
health         /livez, /readyz and /metrics
inbox          the mails of the embedded catcher, as JSON
documentation  /docs, /redoc and /openapi.json
"""
