"""What several tests share.

mails           a mail to send
smtp_server     an SMTP server that can be told to misbehave
"""
