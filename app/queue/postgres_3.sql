-- From the tables of version 2 to those of version 3: which tasks were accepted together.

ALTER TABLE afterward.tasks ADD COLUMN batch_id text;
CREATE INDEX tasks_by_batch ON afterward.tasks (batch_id) WHERE batch_id IS NOT NULL;

CREATE TABLE afterward.removed (
    batch_id text   NOT NULL,
    client   text   NOT NULL,
    status   text   NOT NULL,
    tasks    bigint NOT NULL
);
CREATE INDEX removed_by_batch ON afterward.removed (batch_id);

CREATE FUNCTION afterward.remember_removed() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO afterward.removed
    SELECT batch_id, client, status, count(*) FROM before WHERE batch_id IS NOT NULL
    GROUP BY batch_id, client, status;
    RETURN NULL;
END
$$;

CREATE TRIGGER remember_removed AFTER DELETE ON afterward.tasks REFERENCING OLD TABLE AS before
    FOR EACH STATEMENT EXECUTE FUNCTION afterward.remember_removed();

UPDATE afterward.schema_version SET version = 3;
