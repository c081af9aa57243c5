"""Everything about mail. Imports nothing else from the app but `app.listening`.

recipients       the addresses to which mail may be sent
message          checks addresses, headers and texts; builds a mail, always of the same bytes
templates        renders the text and the HTML of a mail from `templates/mail`
smtp             sends a mail to the SMTP server, over a pool of connections
connection       one connection: its commands, pipelined, and the server's replies
dial             connects to the first address of a host that answers
replies          decides whether a failure is temporary or permanent
catcher          an SMTP server for development that keeps the newest mails and delivers none
fault_addresses  addresses for which the catcher fails on purpose
caught           the file format of caught mails: writes it, and reads it even if the mail is broken
parts            finds the parts of a caught mail, and reads them without their encoding
fields           reads header fields
"""
