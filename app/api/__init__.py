"""The HTTP API: `routes` has one module for each group of routes. The other modules are shared.

route               ServiceRoute, the route class: strict JSON, and turns with the tasks
dependencies        the parameters of routes, as Annotated aliases
schemas             the JSON of requests and responses
mail_schemas        the JSON of the inbox
task_filters        the filters of tasks, as the list and the bulk actions take them
task_actions        counts the tasks of a bulk action, and queues the action
json_body           reads strict JSON, and checks the headers of a body
errors              answers errors with problem+json (RFC 9457)
middleware          the id of a request, the prefix of a proxy, HEAD, unexpected errors
paths               removes and adds the prefix of a proxy
downloads           sends the bytes of an upload, or a range of them
event_stream        hands each change of a task to the clients that follow it
replay              reads the changes that a returning client has missed
server_sent_events  writes these changes as a streaming response
health_checks       runs the checks behind /readyz
shared_read         a read that all callers share
turns               limits how many requests are answered at once while tasks run
negotiation         chooses between JSON and the page at the same path
pages               renders the HTML pages
page_texts          times, numbers and links as the pages show them
error_pages         makes pages of the problems that browsers get
forms               reads the forms of the pages
key_cookie          the cookie of a browser that has signed in
static_files        the style sheet and the script of the pages
"""
