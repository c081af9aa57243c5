"""The dashboard: pages for people who look after the tasks. Every page works without its script.

overview      /                 counts, charts, health, the latest failures
tasks         /board/tasks      the search for tasks, and its results
bulk          /board/tasks/…    retries or cancels all tasks that a search has found
task          /board/tasks/{id} one task, with its timeline
failures      /board/failures   the failed tasks in groups
live          /board/live       tells the open pages that something changed
batches       /board/batches    the batches, with their progress
send          /board/send       a form that sends a notification
uploads       /board/uploads    the uploads, with the forms that add and delete one
workers       /board/workers    the workers, with their heartbeat
inbox         /inbox            the mails that the embedded catcher has received
sign_in       /board/sign-in    the API key of a browser, in a cookie
static        /board/static     the style sheet, the script and the icon

task_search   the form of the search, and the filter that it means
timeline      the events of a task's life, from its row
json_values   the arguments and the result of a task as texts
counts        the counts on the pages of tasks, shared by all viewers

numbers       reads the numbers of the overview, once for all viewers
activity      counts the tasks of the last hour, minute by minute
charts        draws the counts as SVG
ticks         tells open pages, at most once a second, to update
dependencies  the objects behind the pages, for the routes

The pages are templates in app/templates/pages. `app.api` has what they share with the inbox and the
documentation: `pages`, `page_texts`, `forms`, `error_pages` and `static_files`.
"""

from app.board import (
    batches,
    bulk,
    failures,
    inbox,
    live,
    overview,
    send,
    sign_in,
    static,
    task,
    tasks,
    uploads,
    workers,
)

# `bulk` comes before `task`, because "retry" in /board/tasks/retry is no id of a task.
ROUTERS = [
    module.router
    for module in (
        overview,
        live,
        tasks,
        bulk,
        task,
        failures,
        batches,
        send,
        uploads,
        workers,
        inbox,
        sign_in,
        static,
    )
]
