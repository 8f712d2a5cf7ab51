-- Whether the change is real: rows added to the base model and taken out of the adapted one.

ALTER TABLE runs ADD COLUMN checks VARCHAR[];  -- those that stand

CREATE TABLE causal (
    run_id VARCHAR,
    edit VARCHAR,                -- added (to the base model) | removed (from the adapted one)
    part VARCHAR,                -- none | whole | static | selected | random | matched | all
    k INTEGER,                   -- rows
    draw INTEGER,                -- of random rows, from 1; 0 for what is not drawn
    loss DOUBLE,                 -- mean next-token loss, nats
    kl DOUBLE,                   -- mean KL(adapted ‖ edited base), or KL(edited adapted ‖ base), nats
    loss_share DOUBLE,           -- of the effect of patching the whole Δx; NULL where that has no clear one
    loss_se DOUBLE,              -- standard error over documents
    kl_share DOUBLE,
    kl_se DOUBLE,
    n_tokens BIGINT,             -- held-out tokens
    n_docs BIGINT,
    PRIMARY KEY (run_id, edit, part, k, draw)
);

CREATE TABLE causal_latents (
    run_id VARCHAR,
    latent INTEGER,
    added_loss DOUBLE,           -- what the latent's row alone carries, as a share of the whole Δx's effect
    added_kl DOUBLE,
    removed_loss DOUBLE,
    removed_kl DOUBLE,
    n_firing INTEGER,            -- held-out sequences in which it fires
    n_sequences INTEGER,         -- those of them that were run
    PRIMARY KEY (run_id, latent)
);

CREATE TABLE transfer (
    run_id VARCHAR,
    latent INTEGER,
    r2 DOUBLE,                   -- of ReLU(x_adapted·w + c) for the base activation, on held-out documents
    auc DOUBLE,                  -- of x_adapted·w + c for whether it fires in the base model
    r2_base DOUBLE,              -- the same probes on x_base
    auc_base DOUBLE,
    r2_shuffled DOUBLE,          -- on x_adapted, with activations of other tokens
    auc_shuffled DOUBLE,
    cosine DOUBLE,               -- of w with the latent's encoder column
    n_tokens BIGINT,
    n_firing BIGINT,
    PRIMARY KEY (run_id, latent)
);

-- How much of a latent the token, bigram or trigram tells alone.
CREATE TABLE ngrams (
    run_id VARCHAR,
    latent INTEGER,
    r2_token DOUBLE,             -- of a table of n-grams, on held-out documents
    r2_bigram DOUBLE,
    r2_trigram DOUBLE,
    length INTEGER,              -- tokens of the n-grams, a few of which explain it; NULL: none do
    grams JSON,                  -- n-grams that make up most of its activation, strongest first
    PRIMARY KEY (run_id, latent)
);
