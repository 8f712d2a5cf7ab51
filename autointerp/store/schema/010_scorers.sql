-- What the scorers need beyond the first tables.

ALTER TABLE contexts ADD COLUMN foil VARCHAR;  -- why a silent context is a near miss: token | cofiring | neighbour
