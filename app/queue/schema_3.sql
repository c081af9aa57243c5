-- From the tables of version 2 to those of version 3: which tasks were accepted together.

ALTER TABLE tasks ADD COLUMN batch_id TEXT;
CREATE INDEX tasks_by_batch ON tasks (batch_id) WHERE batch_id IS NOT NULL;

CREATE TABLE removed (
    batch_id TEXT    NOT NULL,
    client   TEXT    NOT NULL,
    status   TEXT    NOT NULL,
    tasks    INTEGER NOT NULL,
    PRIMARY KEY (batch_id, client, status)
) STRICT, WITHOUT ROWID;

CREATE TRIGGER remember_removed AFTER DELETE ON tasks WHEN old.batch_id IS NOT NULL BEGIN
    INSERT INTO removed VALUES (old.batch_id, old.client, old.status, 1)
    ON CONFLICT DO UPDATE SET tasks = tasks + 1;
END;
