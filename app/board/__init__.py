"""The dashboard: pages for people who look after the tasks. Every page works without its script.

overview  /              counts, charts, health, the latest failures
static    /board/static  the style sheet, the script and the icon

The pages are templates in app/templates/pages. `app.api` has what they share with the inbox and the
documentation: `pages`, `page_texts`, `forms`, `error_pages` and `static_files`.
"""

from app.board import overview, static

ROUTERS = [module.router for module in (overview, static)]
