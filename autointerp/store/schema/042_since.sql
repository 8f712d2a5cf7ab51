-- The adapter that the base side carries, where a run asks what was trained since it: path or hub id, and its sha256.

ALTER TABLE runs ADD COLUMN since TEXT;
ALTER TABLE runs ADD COLUMN since_sha256 TEXT;
