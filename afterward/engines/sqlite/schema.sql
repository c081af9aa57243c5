-- The embedded engine's tables. Times are seconds since the epoch.

-- The record: one row for each task that was ever accepted, until retention removes it.
CREATE TABLE tasks (
    seq              INTEGER PRIMARY KEY,       -- the order of acceptance
    id               TEXT    NOT NULL UNIQUE,
    kind             TEXT    NOT NULL,
    arguments        TEXT    NOT NULL,
    request_id       TEXT,
    client           TEXT    NOT NULL DEFAULT '',
    batch_id         TEXT,                      -- shared by those that were accepted together
    status           TEXT    NOT NULL,
    attempts         INTEGER NOT NULL DEFAULT 0,
    max_attempts     INTEGER,                   -- NULL where time is the bound
    gives_up_at      REAL,                      -- NULL where attempts are the bound
    errors           INTEGER NOT NULL DEFAULT 0,  -- attempts that ended unexpectedly
    crashes          INTEGER NOT NULL DEFAULT 0,  -- in a row
    claims           INTEGER NOT NULL DEFAULT 0,
    owner            TEXT,
    lease_expires_at REAL,
    created_at       REAL    NOT NULL,
    updated_at       REAL    NOT NULL,
    due_at           REAL    NOT NULL,
    started_at       REAL,
    finished_at      REAL,
    progress         REAL,
    result           TEXT,
    error            TEXT,
    -- Whether a waiting task was to wait when it was written. Any other one is due at any time, so
    -- that no clock which is set back holds it up.
    timed            INTEGER GENERATED ALWAYS AS (due_at > updated_at) VIRTUAL
) STRICT;

-- What to run next, by kind: a claim names the kinds that it takes.
CREATE INDEX tasks_due ON tasks (kind, timed, due_at, seq)
    WHERE status IN ('queued', 'retrying') AND crashes = 0;
-- Waiting tasks whose worker crashed: few, and run one at a time.
CREATE INDEX tasks_suspect ON tasks (due_at, seq)
    WHERE status IN ('queued', 'retrying') AND crashes > 0;
-- Whose worker may have died.
CREATE INDEX tasks_held ON tasks (lease_expires_at) WHERE status = 'running';
-- What retention may remove.
CREATE INDEX tasks_finished ON tasks (finished_at) WHERE finished_at IS NOT NULL;
-- GET /tasks?status=. Running tasks are few, and found by their leases.
CREATE INDEX tasks_by_status ON tasks (status, id) WHERE status <> 'running';
-- GET /tasks, where there are API keys.
CREATE INDEX tasks_by_client ON tasks (client, id) WHERE client <> '';
-- GET /batches/{id}. Without the status: to look up each task costs less than to move it there.
CREATE INDEX tasks_by_batch ON tasks (batch_id) WHERE batch_id IS NOT NULL;

-- How many tasks stand where, kept by triggers: counting a million rows takes too long.
CREATE TABLE counts (status TEXT PRIMARY KEY, tasks INTEGER NOT NULL) STRICT, WITHOUT ROWID;
INSERT INTO counts VALUES
    ('queued', 0), ('running', 0), ('retrying', 0), ('succeeded', 0), ('failed', 0), ('cancelled', 0);

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

-- How the tasks ended that retention has removed from batches of which others are still there.
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

-- Documents that requests and tasks keep beside the tasks: uploads, saved data.
CREATE TABLE records (
    collection TEXT NOT NULL,
    client     TEXT NOT NULL,
    id         TEXT NOT NULL,
    body       TEXT NOT NULL,
    created_at REAL NOT NULL,
    PRIMARY KEY (collection, client, id)
) STRICT, WITHOUT ROWID;

-- The answers to requests that carried an Idempotency-Key.
CREATE TABLE answers (
    key         TEXT PRIMARY KEY,
    fingerprint TEXT NOT NULL,
    body        TEXT NOT NULL,
    location    TEXT NOT NULL,
    created_at  REAL NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX answers_by_age ON answers (created_at);
