"""Tasks in one SQLite file, for one process.

engine         implements Engine: one SQL statement for each operation
group_commit   lets operations that arrive together share one transaction, and one fsync
database_file  opens the file, locks it against a second process, checks and upgrades it
schema.sql     the tables and their indexes
"""
