"""`python -m app tasks`: the tasks of a running service in a terminal, over its HTTP API.

Only this command imports the package, so that `python -m app serve` starts no slower. The modules
of one line import only from the lines below it:

    commands        the options of the command, and its exit codes
    demo            `make demo`: 200 mails, some of them refused at first, and a file
    many            retry or cancel all the tasks of a filter
    one             show, retry, cancel or watch one task; list and watch several
    views           a task as lines of text
    following       the event stream, with reconnects
    client          requests to the service, and their errors
    output          standard output and standard error; escapes for texts from the service
"""
