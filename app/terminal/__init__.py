"""`python -m app tasks`: the tasks of a running service in a terminal, over its HTTP API.

Only this command imports the package, so that `python -m app serve` starts no slower. The modules
of one line import only from the lines below it:

    demo            `make demo`: 200 mails, some of them refused at first, and a file
    commands        the options of the command, and its exit codes
    tasks, bulk     list, show and watch tasks, retry or cancel one; retry or cancel many
    views           a task as lines of text
    following       the event stream, with reconnects
    client          requests to the service, and their errors
    output          standard output and standard error; escapes for texts from the service
"""
