-- The tables of the SQLite engine. Times are seconds since the epoch.

-- One row for each accepted task, until retention removes it.
CREATE TABLE tasks (
    seq              INTEGER PRIMARY KEY,       -- the order of acceptance
    id               TEXT    NOT NULL UNIQUE,
    kind             TEXT    NOT NULL,
    arguments        TEXT    NOT NULL,
    request_id       TEXT,
    trace_context    TEXT,                      -- a W3C traceparent; NULL without tracing
    about            TEXT,                      -- people search for it: a mail's recipient
    client           TEXT    NOT NULL DEFAULT '',
    batch_id         TEXT,                      -- the same for all tasks of a batch
    status           TEXT    NOT NULL,
    attempts         INTEGER NOT NULL DEFAULT 0,
    max_attempts     INTEGER,                   -- NULL if retries are bounded by time
    gives_up_at      REAL,                      -- NULL if retries are bounded by max_attempts
    errors           INTEGER NOT NULL DEFAULT 0,  -- attempts that ended in an unexpected error
    crashes          INTEGER NOT NULL DEFAULT 0,  -- crashed attempts in a row
    claims           INTEGER NOT NULL DEFAULT 0,  -- the fencing token: grows with each claim
    owner            TEXT,                      -- the worker of the latest attempt
    lease_expires_at REAL,                      -- the owner extends its lease before this time
    created_at       REAL    NOT NULL,
    updated_at       REAL    NOT NULL,
    due_at           REAL    NOT NULL,
    started_at       REAL,                      -- of the latest attempt
    finished_at      REAL,
    progress         REAL,
    result           TEXT,
    error            TEXT,
    history          TEXT,                      -- JSON: the failed attempts; NULL if none failed
    error_group      TEXT,                      -- of a failed task: `PermanentError 550`
    -- 1 if the due time was in the future when the row was written. Such a waiting task is due from
    -- due_at on. Any other waiting task is due at once, even after the clock has been set back.
    timed            INTEGER GENERATED ALWAYS AS (due_at > updated_at) VIRTUAL
) STRICT;

-- The waiting tasks of each kind, in the order of their due times, for claims.
CREATE INDEX tasks_due ON tasks (kind, timed, due_at, seq)
    WHERE status IN ('queued', 'retrying') AND crashes = 0;
-- Suspects: waiting tasks that have crashed. They are few, and a worker runs one at a time.
CREATE INDEX tasks_suspect ON tasks (due_at, seq)
    WHERE status IN ('queued', 'retrying') AND crashes > 0;
-- Running tasks by the end of their lease, to find crashed ones.
CREATE INDEX tasks_held ON tasks (lease_expires_at) WHERE status = 'running';
-- Finished tasks by age, for retention, which keeps failed ones longer. With the client, they are
-- also the changes and the latest failures of a client.
CREATE INDEX tasks_finished ON tasks (finished_at, client)
    WHERE finished_at IS NOT NULL AND status <> 'failed';
CREATE INDEX tasks_failed ON tasks (finished_at, client) WHERE status = 'failed';
-- Retrying tasks by their last change. After an outage there may be very many.
CREATE INDEX tasks_retrying ON tasks (client, updated_at) WHERE status = 'retrying';

-- For the filters of list_tasks. In each index, the tasks with equal values are sorted by id, which
-- is the order of a page. Running tasks are few, and have the index tasks_held.
CREATE INDEX tasks_by_state ON tasks (client, kind, status, id) WHERE status <> 'running';
CREATE INDEX tasks_by_error ON tasks (client, kind, error_group, id) WHERE status = 'failed';
-- The client is '' if the app does not tell its clients apart.
CREATE INDEX tasks_by_client ON tasks (client, id) WHERE client <> '';
CREATE INDEX tasks_about ON tasks (client, about, id) WHERE about IS NOT NULL;
CREATE INDEX tasks_by_request ON tasks (client, request_id, id) WHERE request_id IS NOT NULL;
-- Also for count_batch and list_batches. The status is not in the index: a look-up of each task
-- costs less than an update of the index at each change of a status.
CREATE INDEX tasks_by_batch ON tasks (client, batch_id, id) WHERE batch_id IS NOT NULL;

-- The number of tasks in each status. Triggers keep it, because counting a million rows would take
-- too long.
CREATE TABLE counts (status TEXT PRIMARY KEY, tasks INTEGER NOT NULL) STRICT, WITHOUT ROWID;
INSERT INTO counts VALUES
    ('queued', 0), ('running', 0), ('retrying', 0),
    ('succeeded', 0), ('failed', 0), ('cancelled', 0);

CREATE TRIGGER count_insert AFTER INSERT ON tasks BEGIN
    UPDATE counts SET tasks = tasks + 1 WHERE status = new.status;
END;
CREATE TRIGGER count_delete AFTER DELETE ON tasks BEGIN
    UPDATE counts SET tasks = tasks - 1 WHERE status = old.status;
END;
CREATE TRIGGER count_update AFTER UPDATE OF status ON tasks WHEN old.status <> new.status BEGIN
    UPDATE counts SET tasks = tasks + (status = new.status) - (status = old.status)
    WHERE status IN (new.status, old.status);
END;

-- The number of tasks in each status that retention has removed from a batch. The rows are kept
-- until retention removes the last task of the batch, so count_batch still counts the removed
-- tasks.
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

-- JSON documents that requests and tasks store beside the tasks, such as uploads and saved data.
CREATE TABLE records (
    collection TEXT NOT NULL,
    client     TEXT NOT NULL,
    id         TEXT NOT NULL,
    body       TEXT NOT NULL,
    created_at REAL NOT NULL,
    PRIMARY KEY (collection, client, id)
) STRICT, WITHOUT ROWID;

-- The answers to requests with an Idempotency-Key, to be repeated if such a request is repeated.
CREATE TABLE answers (
    key         TEXT PRIMARY KEY,
    fingerprint TEXT NOT NULL,
    body        TEXT NOT NULL,
    location    TEXT NOT NULL,
    created_at  REAL NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX answers_by_age ON answers (created_at);
