"""All that speaks HTTP.

The routes, thin, by what they are about:

    notifications, batches, uploads, tasks, patterns, operations, inbox

What they stand on:

    routes          what every route does around its function
    promises        durable_tasks of a request: committed before its answer, once for each key
    dependencies    the names that routes ask for, as Annotated aliases
    schemas, body   what goes in and out; strict JSON
    downloads       the bytes of an upload, or a range of them
    problems        every error as problem+json
    openapi         what the document says of API keys
    pages           HTML
    feed            the changes of tasks, for those who follow them
    event_stream    server-sent events
    turns           requests and tasks take turns
    gate, keys      who may come in, and how often
    middleware      request ids and the last resort, and which heads are refused
"""
