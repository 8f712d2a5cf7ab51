-- What a run takes for granted because the adapter's files do not say it.

ALTER TABLE runs ADD COLUMN assumed VARCHAR;
