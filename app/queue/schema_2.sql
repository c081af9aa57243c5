-- From the tables of version 1 to those of version 2: whose a task is, and whose a record.

ALTER TABLE tasks ADD COLUMN client TEXT NOT NULL DEFAULT '';
CREATE INDEX tasks_by_client ON tasks (client, seq) WHERE client <> '';

ALTER TABLE records RENAME TO records_of_all;
CREATE TABLE records (
    collection TEXT NOT NULL,
    client     TEXT NOT NULL,
    id         TEXT NOT NULL,
    body       TEXT NOT NULL,
    created_at REAL NOT NULL,
    PRIMARY KEY (collection, client, id)
) STRICT, WITHOUT ROWID;
INSERT INTO records SELECT collection, '', id, body, created_at FROM records_of_all;
DROP TABLE records_of_all;
