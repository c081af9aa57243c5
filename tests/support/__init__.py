"""What several tests share.

service         the service in a process of its own; `until` something is true
mails           a mail to send
smtp_server     an SMTP server that can be told to misbehave; slow_smtp is one in a process
postgres        a real PostgreSQL, to be stopped, killed and frozen
kills           a load of many clients while something bad happens, and what was lost by it
workers         several workers whose tasks leave marks (marks), one that is stuck (stuck)
fake_clock      a clock that jumps
network         machines of their own, to be cut off
tutorial        the service as tutorials write it, to compare with
torture         short and long forms, and the table of what was tried
tools           what a machine may lack
"""
