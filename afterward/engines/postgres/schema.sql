-- The tables of the PostgreSQL engine, in a schema of their own.
--
-- Columns of type double precision that end in _at are seconds since the epoch, by the clock of the
-- process that wrote them. People see these times. ready_at and lease_until are by the clock of the
-- database, and they alone decide which task a worker can claim.

CREATE TABLE afterward.schema_version (version integer NOT NULL);
INSERT INTO afterward.schema_version VALUES (1);

-- One row for each accepted task, until retention removes it.
CREATE TABLE afterward.tasks (
    seq          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    id           text COLLATE "C" NOT NULL UNIQUE,
    kind         text             NOT NULL,
    arguments    text             NOT NULL,
    request_id   text,
    trace_context text,                            -- a W3C traceparent; NULL without tracing
    about        text,                             -- people search for it: a mail's recipient
    client       text             NOT NULL DEFAULT '',
    batch_id     text COLLATE "C",                 -- the same for all tasks of a batch
    status       text             NOT NULL,
    attempts     integer          NOT NULL DEFAULT 0,
    max_attempts integer,                          -- NULL if retries are bounded by time
    gives_up_at  double precision,                 -- NULL if retries are bounded by max_attempts
    errors       integer          NOT NULL DEFAULT 0,  -- attempts that ended in an unexpected error
    crashes      integer          NOT NULL DEFAULT 0,  -- crashed attempts in a row
    claims       integer          NOT NULL DEFAULT 0,  -- the fencing token: grows with each claim
    owner        text,                             -- the worker of the latest attempt
    lease_until  timestamptz,                      -- the owner extends its lease before this time
    ready_at     timestamptz      NOT NULL DEFAULT now(),  -- due_at by the clock of the database
    created_at   double precision NOT NULL,
    updated_at   double precision NOT NULL,
    due_at       double precision NOT NULL,
    started_at   double precision,                 -- of the latest attempt
    finished_at  double precision,
    progress     double precision,
    result       text,
    error        text,
    history      text,                             -- JSON: the failed attempts; NULL if none failed
    error_group  text,                             -- of a failed task: `PermanentError 550`
    -- True if the due time was in the future when the row was written. Such a waiting task is due
    -- from ready_at on. Any other waiting task is due at once, even after a clock was set back.
    timed        boolean          GENERATED ALWAYS AS (due_at > updated_at) STORED
)
-- A task is updated twice or more, and each update leaves a dead row. So vacuum when 1,000 rows and
-- 1 per cent of the table are dead. The default is 20 per cent.
WITH (autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_threshold = 1000);

-- The waiting tasks of each kind, in the order in which they are ready, for claims.
CREATE INDEX tasks_ready ON afterward.tasks (kind, timed, ready_at, seq)
    WHERE status IN ('queued', 'retrying') AND crashes = 0;
-- Suspects: waiting tasks that have crashed. They are few, and a worker runs one at a time.
CREATE INDEX tasks_suspect ON afterward.tasks (ready_at, seq)
    WHERE status IN ('queued', 'retrying') AND crashes > 0;
-- Running tasks by the end of their lease, to find crashed ones.
CREATE INDEX tasks_leased ON afterward.tasks (lease_until) WHERE status = 'running';
-- Finished tasks by age, for retention, which keeps failed ones longer. With the client, they are
-- also the changes and the latest failures of a client.
CREATE INDEX tasks_finished ON afterward.tasks (finished_at, client)
    WHERE finished_at IS NOT NULL AND status <> 'failed';
CREATE INDEX tasks_failed ON afterward.tasks (finished_at, client) WHERE status = 'failed';
-- Retrying tasks by their last change. After an outage there may be very many.
CREATE INDEX tasks_retrying ON afterward.tasks (client, updated_at) WHERE status = 'retrying';

-- For the filters of list_tasks. In each index, the tasks with equal values are sorted by id, which
-- is the order of a page.
CREATE INDEX tasks_by_state ON afterward.tasks (client, kind, status, id);
CREATE INDEX tasks_by_error ON afterward.tasks (client, kind, error_group, id)
    WHERE status = 'failed';
-- The client is '' if the app does not tell its clients apart.
CREATE INDEX tasks_by_client ON afterward.tasks (client, id) WHERE client <> '';
CREATE INDEX tasks_about ON afterward.tasks (client, about, id) WHERE about IS NOT NULL;
CREATE INDEX tasks_by_request ON afterward.tasks (client, request_id, id)
    WHERE request_id IS NOT NULL;
-- Also for count_batch and list_batches.
CREATE INDEX tasks_by_batch ON afterward.tasks (client, batch_id, id) WHERE batch_id IS NOT NULL;

-- The number of tasks in a status is the sum of its rows: with ('queued', 3) and ('queued', -1), 2
-- tasks are queued. Each statement that changes tasks adds rows of its own, because transactions
-- would wait for each other to update a common row. Retention replaces the rows by their sums.
CREATE TABLE afterward.counts (status text NOT NULL, tasks bigint NOT NULL)
WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000);

CREATE FUNCTION afterward.count_tasks() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'INSERT' THEN
        INSERT INTO afterward.counts SELECT status, count(*) FROM after GROUP BY status;
    ELSIF TG_OP = 'DELETE' THEN
        INSERT INTO afterward.counts SELECT status, -count(*) FROM before GROUP BY status;
    ELSE
        -- A claim of 3 new tasks adds ('queued', -3) and ('running', 3).
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

-- The number of tasks in each status that retention has removed from a batch, as a sum like counts.
-- The rows are kept until retention removes the last task of the batch, so count_batch still counts
-- the removed tasks.
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

-- JSON documents that requests and tasks store beside the tasks, such as uploads and saved data.
CREATE TABLE afterward.records (
    collection text             NOT NULL,
    client     text             NOT NULL,
    id         text COLLATE "C" NOT NULL,
    body       text             NOT NULL,
    created_at double precision NOT NULL,
    PRIMARY KEY (collection, client, id)
);

-- The answers to requests with an Idempotency-Key, to be repeated if such a request is repeated.
CREATE TABLE afterward.answers (
    key         text COLLATE "C" PRIMARY KEY,
    fingerprint text             NOT NULL,
    body        text             NOT NULL,
    location    text             NOT NULL,
    created_at  double precision NOT NULL
);
CREATE INDEX answers_by_age ON afterward.answers (created_at);
