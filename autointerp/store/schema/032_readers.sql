-- What a run takes for granted because the adapter's files do not say it; how the models share a crosscoder's latents.

ALTER TABLE runs ADD COLUMN assumed VARCHAR;
ALTER TABLE latents ADD COLUMN relative_norm DOUBLE;  -- ‖d_adapted‖ / (‖d_base‖ + ‖d_adapted‖): ½ shared, 1 adapted only
