-- From the tables of version 1 to those of version 2: whose a task is, and whose a record.

ALTER TABLE afterward.tasks ADD COLUMN client text NOT NULL DEFAULT '';
CREATE INDEX tasks_by_client ON afterward.tasks (client, seq) WHERE client <> '';

ALTER TABLE afterward.records ADD COLUMN client text NOT NULL DEFAULT '';
ALTER TABLE afterward.records ALTER COLUMN client DROP DEFAULT;
ALTER TABLE afterward.records DROP CONSTRAINT records_pkey, ADD PRIMARY KEY (collection, client, id);

UPDATE afterward.schema_version SET version = 2;
