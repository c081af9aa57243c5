"""Tasks in one SQLite file, for one process.

engine         implements Engine
statements     the SQL of claims, of insertions and of outcomes
search         finds tasks by a filter
changes        finds the tasks that have changed since a time
bulk           does a slice of a bulk action
retention      removes old tasks and answers
group_commit   lets operations that arrive together share one transaction, and one fsync
database_file  locks the file against a second process, opens it, and checks it
damage_check   looks for damage, at the start and in the background
schema.sql     the tables and their indexes
"""
