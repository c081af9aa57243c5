"""Keeps the promises: what was added is on disk before the answer, and done after it.

    queue       the queue as the rest of the app sees it: collect, commit, cancel, retry
    durable     durable_tasks.add_task(fn, *args, **kwargs), and the catalogue of such functions
    worker      claims, runs, retries, holds leases, stops gracefully
    task        the record and its states        retry   when to try again
    events      what happened, for listeners     errors  what can be wrong
    engine      what is asked of a database
    sqlite      the embedded one; sqlite_file opens it, group_commit shares its transactions

It imports nothing else from app, and knows neither HTTP nor mail.
"""
