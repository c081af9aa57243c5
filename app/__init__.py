"""Afterward: the feel of `background_tasks.add_task(...)`, with a promise that holds.

Floors; imports only point down:

    __main__    serve | worker | catcher | migrate
    main        create_app(settings) and the lifespan: the one place where objects meet
    server      uvicorn, with deadlines
    api/        all that speaks HTTP
    tasks/      every kind of background work: one short function each; observe/ logs and counts
    queue/  mail/  files/  settings  signals    what they stand on; none knows another
"""
