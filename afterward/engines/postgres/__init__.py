"""Tasks in one table on PostgreSQL, for any number of processes.

engine               implements Engine
statements           its SQL
callers_transaction  writes a task through the caller's own connection
batcher              lets operations that arrive together share one transaction
event_relay          sends each event to the other processes with NOTIFY, and receives theirs
listener             keeps a connection that listens, and replaces it when it breaks
outages              tracks when the database could not be reached, because leases grow by that time
schema               creates and upgrades the tables
schema.sql           the tables and their indexes
"""
