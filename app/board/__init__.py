"""The dashboard: pages for people who look after the tasks. Every page works without its script.

overview      /                 counts, charts, health, the latest failures
live          /board/live       tells the open pages that something changed
batches       /board/batches    the batches, with their progress
send          /board/send       a form that sends a notification
uploads       /board/uploads    the uploads, with the forms that add and delete one
workers       /board/workers    the workers, with their heartbeat
inbox         /inbox            the mails that the embedded catcher has received
sign_in       /board/sign-in    the API key of a browser, in a cookie
static        /board/static     the style sheet, the script and the icon

numbers       reads the numbers of the overview, once for all viewers
shared_read   a read that all viewers share
activity      counts the tasks of the last hour, minute by minute
charts        draws the counts as SVG
ticks         makes the ticks, once for all viewers
dependencies  the objects behind the pages, for the routes

The pages are templates in app/templates/pages. `app.api` has what they share with the inbox and the
documentation: `pages`, `page_texts`, `forms`, `error_pages` and `static_files`.
"""

from app.board import batches, inbox, live, overview, send, sign_in, static, uploads, workers

ROUTERS = [
    module.router
    for module in (overview, live, batches, send, uploads, workers, inbox, sign_in, static)
]
