"""Keeps the promises: what was added is on disk before the answer, and done after it.

    queue       the queue as the rest of the app sees it: collect, commit, cancel, retry
    durable     durable_tasks.add_task(fn, *args, **kwargs), and the registry of such functions
    worker      claims, runs, retries, holds leases, stops gracefully
    attempt     runs one attempt, and describes its error
    pauses      lets tasks wait for a service that is away; breaker decides for one kind of task
    task        the record and its states        retry   when to try again
    events      what happened, for listeners     errors  what can be wrong
    room        how much the backlog may still take
    engine      what is asked of a database
    sqlite      the embedded one; sqlite_file opens it, group_commit shares its transactions
    postgres    the one for many processes; postgres_statements has its SQL, batcher shares its
                transactions, postgres_events tells other processes, postgres_listener hears
                them, postgres_schema makes the tables, outages tracks when the database is away

It imports nothing else from app, and knows neither HTTP nor mail.
"""
