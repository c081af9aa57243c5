"""Helpers that several test folders share.

service         starts the service as a separate process; `until` waits for a condition
mails           builds a mail and sends it
smtp_server     an SMTP server that misbehaves on request; slow_smtp runs it as a process
postgres        a real PostgreSQL that a test may stop, kill or freeze
kills           sends from many clients during a fault, then counts lost and repeated mails
workers         starts several workers, which leave marks (marks); stuck_worker keeps a row's lock
task_runner     runs tasks of the service on a clock that a test sets, so retries take no time
fake_clock      a system clock that a test can set
pages           a browser without scripts: loads pages, follows links, sends forms
every_page      a service with everything that the pages can show, and the address of each page
axe             checks a page in a real browser for barriers to people with disabilities
network         separate machines (network namespaces) with cables that a test can unplug
power           a disk that loses its power or fails when a test says so

For negative controls:

tutorial                 the service with plain BackgroundTasks, as tutorials write it
weakened_durability      without one of the protections against data loss
early_turns              with turns taken before a request's body has arrived
unbounded_uploads        uploads without a size limit
unbounded_event_streams  event streams that buffer without a limit

For the tests themselves:

torture         short and long forms of a test, and the table that `make torture` prints
tools           skips a test if a program or a script is missing
"""
