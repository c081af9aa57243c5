"""The dashboard: pages for people who look after the tasks. Every page works without its script.

overview  /              counts, charts, health, the latest failures
sign_in   /board/sign-in the key of a browser, in a cookie
static    /board/static  the style sheet, the script and the icon

The pages are templates in app/templates/pages. `app.api` has what they share with the inbox and the
documentation: `pages`, `page_texts`, `forms`, `error_pages` and `static_files`.
"""

from app.board import overview, sign_in, static

ROUTERS = [module.router for module in (overview, sign_in, static)]
