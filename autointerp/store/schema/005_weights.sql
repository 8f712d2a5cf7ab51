-- Selection by weights alone: how strongly a latent is read behind the hook, beside write_weight (1: as a random
-- direction); what of the adapter was read and what could not be; names of an adapter's units.

ALTER TABLE latents ADD COLUMN read_weight DOUBLE;
ALTER TABLE runs ADD COLUMN notes VARCHAR;
ALTER TABLE units ADD COLUMN name VARCHAR;
