-- From the tables of version 3 to those of version 4: which tasks were running when a worker died.

CREATE INDEX tasks_suspect ON tasks (due_at, seq)
    WHERE status IN ('queued', 'retrying') AND crashes > 0;
