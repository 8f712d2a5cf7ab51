-- Labels whose answer was not what was asked for, and could be read all the same.

ALTER TABLE labels ADD COLUMN salvaged BOOLEAN;  -- found amid prose, or in an answer that was cut off
