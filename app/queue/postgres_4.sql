-- From the tables of version 3 to those of version 4: the entries of tasks that were running when a
-- worker died are claimed by themselves.

UPDATE afterward.pgqueuer SET entrypoint = 'suspect'
FROM afterward.tasks
WHERE pgqueuer.id = tasks.entry AND tasks.crashes > 0;

UPDATE afterward.schema_version SET version = 4;
