"""Helpers that several test folders share.

service         starts the service as a separate process; `until` waits for a condition
mails           builds a mail and sends it
smtp_server     an SMTP server that misbehaves on request; slow_smtp runs it as a process
postgres        a real PostgreSQL that a test may stop, kill or freeze
kills           sends from many clients during a fault, then counts lost and repeated mails
workers         starts several workers whose tasks leave marks (marks); stuck holds its locks
fake_clock      a system clock that a test can set
network         separate machines (network namespaces) whose cable a test can pull
power           a disk whose power a test can cut
tutorial        the service with plain BackgroundTasks, for comparison
torture         short and long forms of a test, and the table that `make torture` prints
tools           skips a test if a program is missing
"""
