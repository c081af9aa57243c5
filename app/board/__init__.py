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
timeline      the events of a task's life, in words
parsed_task   what has happened to a task, from its row
json_values   the arguments and the result of a task as texts
error_line    the error of a task as one line
shown_task    a task as a page may show it, without its arguments if HIDE_ARGUMENTS is set
form_keys     lets a form act once, also if it is sent twice
counts        the counts on the pages of tasks, shared by all viewers

numbers       reads the numbers of the overview, once for all viewers
activity      counts the tasks of the last hour, minute by minute
charts        draws the counts as SVG
ticks         tells open pages, at most once a second, to update
dependencies  the objects behind the pages, for the routes

The pages are templates in app/templates/pages. `app.api` has what they share with the inbox and the
documentation: `pages`, `page_texts`, `forms`, `error_pages` and `static_files`.

To add a page:

1. Write a module with a `router` (`include_in_schema=False, route_class=ServiceRoute`), and add it
   to ROUTERS. The first route that matches a path answers it, so a module with a fixed path, such
   as /board/tasks/retry, comes before one with /board/tasks/{task_id}.
2. Keep its path below /board/. There, app.api.error_pages turns errors into pages, and
   app.hardening refuses forms that a page of another site sends. The routes do not check that
   themselves: without app.hardening, nothing stops such a form.
3. Render a template with `page`. It extends base.html, which has the links to the pages. It writes
   `{{ prefix }}` before each path of the service.
4. To follow the changes of tasks, the template fills the block `live` like tasks.html: see ticks.
   board.js then loads the page again, and changes what differs. It finds an element by its id, or
   else by its position, so give an id to each part that may come or go.
5. Read a task with `ShownTask`, not from the queue, so that HIDE_ARGUMENTS is obeyed.
6. A form is read by `read_form`, and answered by `see_other`. If it adds tasks, commit them by
   `commit_once`, because a double click sends a form twice.
7. If many viewers read the same, or if it takes long to read, share it: `board.reads.of(…).get()`.
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
