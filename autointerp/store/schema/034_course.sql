-- The selected latents over the checkpoints of one training, each on the same sample of the corpus.

CREATE TABLE checkpoints (
    run_id VARCHAR,
    checkpoint VARCHAR,          -- name of its folder; base: before the training; final: the adapter beside the others
    step BIGINT,                 -- NULL for a final adapter of which no file says when it was saved
    n_tokens BIGINT,             -- of the sample
    change DOUBLE,               -- root mean square ‖Δx‖ against the base
    static_share DOUBLE,         -- share of E‖Δx‖² that is the same on every token
    coverage DOUBLE,             -- held-out share of this Δx that the rows of the selected latents explain
    error VARCHAR,               -- why it could not be read
    PRIMARY KEY (run_id, checkpoint)
);

CREATE TABLE course (
    run_id VARCHAR,
    latent INTEGER,
    checkpoint VARCHAR,
    step BIGINT,
    gain DOUBLE,                 -- signed change along the latent's own direction
    size DOUBLE,                 -- ‖c_j‖ · √E[z_j²], in residual-norm units
    cosine DOUBLE,               -- of the row c_j with that of the adapter that was selected on
    mean DOUBLE,                 -- activation in the checkpoint's model
    freq DOUBLE,                 -- share of tokens on which it fires there
    PRIMARY KEY (run_id, latent, checkpoint)
);
