"""All that speaks HTTP.

The routes, thin, by what they are about:

    notifications, batches, uploads, tasks, patterns, operations, inbox, documentation

What they stand on:

    routes          what every route does around its function
    promises        durable_tasks of a request: committed before its answer, once for each key
    dependencies    the names that routes ask for, as Annotated aliases
    schemas, body   what goes in and out; strict JSON
    downloads       the bytes of an upload, or a range of them
    problems        every error as problem+json
    openapi         what the document says of API keys
    paths           prefixes of proxies
    pages           HTML
    feed            the changes of tasks, for those who follow them
    event_stream    server-sent events
    health          the checks of /readyz, made once a second at most
    turns           requests and tasks take turns
    gate, keys      who may come in, and how often
    origins         which web pages of elsewhere may use the API
    access_log      one log line for each request
    middleware      request ids and the last resort, and which heads are refused
"""
