-- Of a run on several adapters that are active together: name, path and sha256 of each, in the order in which they act.

ALTER TABLE runs ADD COLUMN adapters JSON;
