"""All that speaks HTTP.

notifications, uploads, tasks, patterns, operations, inbox    the routes, thin
dependencies    the names that routes ask for, as Annotated aliases
promises        durable_tasks of a request: committed before its answer, once for each key
schemas         what goes in and out         feed        server-sent events
problems        every error as problem+json  body        strict JSON
middleware      request ids, limits on bodies, and the last resort
"""
