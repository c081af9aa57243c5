"""Everything about mail; imports nothing else from the app.

recipients  whom mail may be sent to
message     what may stand in a mail, and how one is built: the same inputs, the same bytes
templates   a mail's text and HTML, from `templates/mail`
smtp        hands a mail to the SMTP server over a few warm connections
connection  one of those: what is said in which turn, and what is answered
replies     what a failure means: later, or never
catcher     a small SMTP server that keeps what it is sent, for development
caught      the file of a caught mail: written, and read as far as it can be read
"""
