"""All that speaks HTTP.

The routes are in `routes`, one module for each group of them. They share:

    route               ServiceRoute, the route class: strict JSON, turns with the tasks
    dependencies        the parameters that routes ask for, as Annotated aliases
    schemas             the JSON of requests and responses
    json_body           reads strict JSON, and checks the headers that describe it
    errors              every error as problem+json (RFC 9457)
    middleware          around every request: its id, the prefix of a proxy, HEAD, a last resort
    paths               prefixes of proxies
    downloads           the bytes of an upload, or a range of them
    event_stream        gives each change of a task to the clients that follow it
    server_sent_events  the response that such a client reads
    health_checks       the checks of /readyz, made once a second at most
    turns               limits how many requests are answered while the worker is busy
    pages               HTML
"""
