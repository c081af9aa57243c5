-- The queue's tables on PostgreSQL, in a schema of their own.
-- `*_at` columns are seconds since the epoch by the clock of the process that wrote them; they are
-- shown to people. `ready_at` and `lease_until` are by the database's clock; they decide.

CREATE TABLE afterward.schema_version (version integer NOT NULL);
INSERT INTO afterward.schema_version VALUES (1);

-- One row for each task that was accepted, until retention removes it.
CREATE TABLE afterward.tasks (
    seq          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    id           text COLLATE "C" NOT NULL UNIQUE,
    kind         text             NOT NULL,
    arguments    text             NOT NULL,
    request_id   text,
    client       text             NOT NULL DEFAULT '',
    batch_id     text,
    status       text             NOT NULL,
    attempts     integer          NOT NULL DEFAULT 0,
    max_attempts integer,                          -- NULL where time is the bound
    gives_up_at  double precision,                 -- NULL where attempts are the bound
    errors       integer          NOT NULL DEFAULT 0,  -- attempts that ended unexpectedly
    crashes      integer          NOT NULL DEFAULT 0,  -- in a row
    claims       integer          NOT NULL DEFAULT 0,
    owner        text,
    lease_until  timestamptz,
    ready_at     timestamptz      NOT NULL DEFAULT now(),
    created_at   double precision NOT NULL,
    updated_at   double precision NOT NULL,
    due_at       double precision NOT NULL,
    started_at   double precision,
    finished_at  double precision,
    progress     double precision,
    result       text,
    error        text,
    -- Whether a waiting task was to wait when it was written. Any other one is due at any time,
    -- so that no clock which is set back holds it up.
    timed        boolean          GENERATED ALWAYS AS (due_at > updated_at) STORED
)
WITH (autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_threshold = 1000);

-- What to run next, by kind: a claim names the kinds that it takes.
CREATE INDEX tasks_ready ON afterward.tasks (kind, timed, ready_at, seq)
    WHERE status IN ('queued', 'retrying') AND crashes = 0;
-- Waiting tasks whose worker crashed: few, and run one at a time.
CREATE INDEX tasks_suspect ON afterward.tasks (ready_at, seq)
    WHERE status IN ('queued', 'retrying') AND crashes > 0;
-- Whose worker may have died.
CREATE INDEX tasks_leased ON afterward.tasks (lease_until) WHERE status = 'running';
-- What retention may remove.
CREATE INDEX tasks_finished ON afterward.tasks (finished_at) WHERE finished_at IS NOT NULL;
-- GET /tasks?status=
CREATE INDEX tasks_by_status ON afterward.tasks (status, id);
-- GET /tasks, where there are API keys.
CREATE INDEX tasks_by_client ON afterward.tasks (client, id) WHERE client <> '';
-- GET /batches/{id}
CREATE INDEX tasks_by_batch ON afterward.tasks (batch_id) WHERE batch_id IS NOT NULL;

-- How many tasks stand where: the sum of these rows. Each statement adds its own, so that nobody
-- waits for anybody else's; the clean-up adds them up.
CREATE TABLE afterward.counts (status text NOT NULL, tasks bigint NOT NULL)
WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000);

CREATE FUNCTION afterward.count_tasks() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'INSERT' THEN
        INSERT INTO afterward.counts SELECT status, count(*) FROM after GROUP BY status;
    ELSIF TG_OP = 'DELETE' THEN
        INSERT INTO afterward.counts SELECT status, -count(*) FROM before GROUP BY status;
    ELSE
        INSERT INTO afterward.counts
        SELECT status, sum(tasks)
        FROM (SELECT status, 1 FROM after UNION ALL SELECT status, -1 FROM before)
            AS changes (status, tasks)
        GROUP BY status HAVING sum(tasks) <> 0;
    END IF;
    RETURN NULL;
END
$$;

CREATE TRIGGER count_insert AFTER INSERT ON afterward.tasks REFERENCING NEW TABLE AS after
    FOR EACH STATEMENT EXECUTE FUNCTION afterward.count_tasks();
CREATE TRIGGER count_delete AFTER DELETE ON afterward.tasks REFERENCING OLD TABLE AS before
    FOR EACH STATEMENT EXECUTE FUNCTION afterward.count_tasks();
CREATE TRIGGER count_update AFTER UPDATE ON afterward.tasks
    REFERENCING OLD TABLE AS before NEW TABLE AS after
    FOR EACH STATEMENT EXECUTE FUNCTION afterward.count_tasks();

-- How the tasks ended that retention has removed from batches of which others are still there: the
-- sum of these rows.
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

-- Documents that requests and tasks keep beside the tasks: uploads, saved data.
CREATE TABLE afterward.records (
    collection text             NOT NULL,
    client     text             NOT NULL,
    id         text COLLATE "C" NOT NULL,
    body       text             NOT NULL,
    created_at double precision NOT NULL,
    PRIMARY KEY (collection, client, id)
);

-- The answers to requests that carried an Idempotency-Key.
CREATE TABLE afterward.answers (
    key         text COLLATE "C" PRIMARY KEY,
    fingerprint text             NOT NULL,
    body        text             NOT NULL,
    location    text             NOT NULL,
    created_at  double precision NOT NULL
);
CREATE INDEX answers_by_age ON afterward.answers (created_at);
