-- Several selectors on one reading of the corpus: what each says, and how far each agrees with the first, which ranks.

CREATE TABLE selectors (
    run_id VARCHAR,
    selector VARCHAR,
    position INTEGER,            -- 1 ranks: its choice is what `latents` holds
    n_selected INTEGER,
    n_pass INTEGER,              -- latents that passed its own test; NULL where it has none
    coverage DOUBLE,             -- held-out share of Δx that the change map restricted to its latents explains
    spearman DOUBLE,             -- of its sizes with the first selector's, over latents that both say something of
    overlap DOUBLE,              -- share of the first selector's latents that are among its own
    figures JSON,                -- what else it says of the run
    PRIMARY KEY (run_id, selector)
);

CREATE TABLE selector_ranks (
    run_id VARCHAR,
    selector VARCHAR,
    latent INTEGER,
    change DOUBLE,               -- the size by which this selector ranks
    statistic DOUBLE,            -- the same with its sign, where it has one
    rank INTEGER,                -- NULL for latents that it would not select
    PRIMARY KEY (run_id, selector, latent)
);
