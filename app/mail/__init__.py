"""Everything about mail; imports nothing else from the app.

recipients  the addresses that mail may be sent to
message     checks what may stand in a mail, and builds one: the same inputs, the same bytes
templates   a mail's text and HTML, from `templates/mail`
smtp        hands a mail to the SMTP server over a few warm connections
connection  one of those: the commands said in each round trip, and their replies
dial        connects to the first of a host's addresses that answers
replies     the meaning of a failure: later, or never
catcher     a small SMTP server that keeps what it is sent, for development
caught      the file of a caught mail: written, and read as far as it can be read
"""
