-- The tables of the contract. Timestamps are UTC without a zone, so that any client reads them without a time-zone
-- library. Only keys are NOT NULL: rows are upserted column by column as the work goes on.

CREATE TABLE runs (
    run_id VARCHAR PRIMARY KEY,
    path VARCHAR,
    status VARCHAR,
    stage VARCHAR,               -- the evidence that stands: select | collect | label
    base VARCHAR,
    adapter VARCHAR,
    adapter_format VARCHAR,
    adapter_sha256 VARCHAR,
    sae VARCHAR,
    sae_format VARCHAR,
    hook VARCHAR,
    d_model INTEGER,
    d_sae INTEGER,
    corpus VARCHAR,
    n_docs BIGINT,
    n_tokens BIGINT,
    selector VARCHAR,
    seed BIGINT,
    fvu_base DOUBLE,
    fvu_adapted DOUBLE,
    delta_fvu DOUBLE,
    l0_base DOUBLE,
    l0_adapted DOUBLE,
    static_share DOUBLE,
    change_r2 DOUBLE,            -- held-out R² of the change map
    coverage DOUBLE,             -- held-out share of Δx explained by the selected latents
    random_coverage DOUBLE,      -- the same for as many random latents
    n_pass INTEGER,              -- latents that passed the tests
    left_out DOUBLE,             -- share of the change that screening leaves outside the map
    settings JSON,
    versions JSON,
    created_at TIMESTAMP,
    finished_at TIMESTAMP
);

CREATE TABLE latents (
    run_id VARCHAR,
    latent INTEGER,
    state VARCHAR,               -- live | dead | revived | silenced
    mean_base DOUBLE,
    mean_adapted DOUBLE,
    freq_base DOUBLE,
    freq_adapted DOUBLE,
    max_base DOUBLE,
    max_adapted DOUBLE,
    delta DOUBLE,                -- mean_adapted − mean_base
    static_share DOUBLE,
    gain DOUBLE,                 -- signed change along the latent's own direction
    statistic DOUBLE,
    q_value DOUBLE,
    write_size DOUBLE,
    write_weight DOUBLE,
    attribution DOUBLE,
    change DOUBLE,               -- what the selector ranks by, ≥ 0, in residual-norm units
    selected BOOLEAN,
    role VARCHAR,                -- read | written | static
    rank INTEGER,
    coverage DOUBLE,             -- cumulative, at this rank
    PRIMARY KEY (run_id, latent)
);

CREATE TABLE writes (
    run_id VARCHAR,
    latent INTEGER,
    kind VARCHAR,                -- raises | lowers (a latent) | promotes | suppresses (a token)
    target_latent INTEGER,
    target_token VARCHAR,
    target_hint VARCHAR,         -- tokens that the target latent's decoder row promotes
    weight DOUBLE,
    rank INTEGER,
    PRIMARY KEY (run_id, latent, kind, rank)
);

CREATE TABLE contexts (
    run_id VARCHAR,
    latent INTEGER,
    context_id INTEGER,
    kind VARCHAR,                -- top | top_base | gain | loss | quantile | silent
    rank INTEGER,
    split VARCHAR,               -- explain | score; they share no document
    doc BIGINT,
    position BIGINT,             -- of the peak among the document's tokens
    tokens VARCHAR[],
    act_base FLOAT[],
    act_adapted FLOAT[],
    peak INTEGER,                -- of the peak within tokens
    PRIMARY KEY (run_id, latent, context_id)
);

CREATE TABLE predictions (
    run_id VARCHAR,
    latent INTEGER,
    context_id INTEGER,
    side VARCHAR,                -- base | adapted
    rank INTEGER,
    token VARCHAR,
    probability DOUBLE,
    PRIMARY KEY (run_id, latent, context_id, side, rank)
);

CREATE TABLE labels (
    run_id VARCHAR,
    latent INTEGER,
    labeler VARCHAR,
    label VARCHAR,
    explanation VARCHAR,
    effect VARCHAR,
    status VARCHAR,              -- ok | known | refused | failed
    error VARCHAR,
    prompt_sha256 VARCHAR,
    rule JSON,                   -- the executable rule behind a lexical label
    created_at TIMESTAMP,
    PRIMARY KEY (run_id, latent, labeler)
);

CREATE TABLE scores (
    run_id VARCHAR,
    latent INTEGER,
    labeler VARCHAR,
    scorer VARCHAR,
    value DOUBLE,
    ci_low DOUBLE,
    ci_high DOUBLE,
    null_value DOUBLE,           -- the same scorer with another latent's label
    n_examples INTEGER,
    n_missing INTEGER,
    created_at TIMESTAMP,
    PRIMARY KEY (run_id, latent, labeler, scorer)
);

CREATE TABLE units (
    run_id VARCHAR,
    unit INTEGER,
    side VARCHAR,                -- reads | writes
    latent INTEGER,
    weight DOUBLE,
    rank INTEGER,
    PRIMARY KEY (run_id, unit, side, rank)
);

CREATE TABLE calls (
    call_id VARCHAR PRIMARY KEY,
    run_id VARCHAR,
    latent INTEGER,
    purpose VARCHAR,
    provider VARCHAR,
    model VARCHAR,
    status VARCHAR,              -- sent | ok | error | refused | in_doubt
    http_status INTEGER,
    request_sha256 VARCHAR,
    input_tokens BIGINT,
    cached_tokens BIGINT,
    output_tokens BIGINT,
    usd DOUBLE,
    usd_estimated DOUBLE,
    attempt INTEGER,
    started_at TIMESTAMP,
    seconds DOUBLE
);

CREATE TABLE answers (
    request_sha256 VARCHAR PRIMARY KEY,
    provider VARCHAR,
    model VARCHAR,
    answer JSON,
    created_at TIMESTAMP
);
