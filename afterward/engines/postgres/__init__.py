"""Tasks in one table on PostgreSQL, for any number of processes.

engine       implements Engine
statements   the SQL of claims, of insertions and of outcomes
search       finds tasks by a filter
changes      finds the tasks that have changed since a time
bulk         does a slice of a bulk action
retention    removes old tasks and answers
batcher      lets operations that arrive together share one transaction
callers_transaction
             writes a task through the caller's own connection
connections  opens connections, keeps a pool of them, and translates their errors
outages      measures outages of the database, because they extend all leases
listener     keeps a connection that receives notifications (LISTEN)
event_relay  sends each event to the other processes with NOTIFY, and receives theirs
schema       creates the tables, and checks them at every start
schema.sql   the tables and their indexes
"""
