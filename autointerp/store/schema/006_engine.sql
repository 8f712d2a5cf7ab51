-- Batches that were submitted and not yet fetched outlive the process; each of their calls names its batch.

ALTER TABLE calls ADD COLUMN error VARCHAR;      -- what went wrong with the attempt, or with its usage

ALTER TABLE calls ADD COLUMN batch_key VARCHAR;  -- NULL for a call that was sent by itself

CREATE TABLE batches (
    batch_key VARCHAR PRIMARY KEY,               -- ours: committed before the provider knows of the batch
    run_id VARCHAR,
    provider VARCHAR,
    model VARCHAR,
    endpoint VARCHAR,
    remote_id VARCHAR,                           -- the provider's
    status VARCHAR,                              -- creating | submitted | ended | lost
    n_calls INTEGER,
    created_at TIMESTAMP,
    ended_at TIMESTAMP
);
