-- What the scorers need beyond the first tables.

ALTER TABLE contexts ADD COLUMN foil VARCHAR;  -- why a silent context is a near miss: token | cofiring | neighbour

CREATE TABLE decoder_tokens (                 -- what a selected latent's own decoder row pushes towards in the base model
    run_id VARCHAR,
    latent INTEGER,
    kind VARCHAR,                              -- promotes | suppresses
    token VARCHAR,
    weight DOUBLE,                             -- logit through the final norm and the unembedding
    rank INTEGER,
    PRIMARY KEY (run_id, latent, kind, rank)
);

CREATE TABLE summaries (                       -- what the training changed, over all labelled changes
    run_id VARCHAR,
    labeler VARCHAR,
    summary VARCHAR,                           -- sentences, each with the latents it rests on: … [12, 345]
    sentences JSON,                            -- [{"text": …, "latents": [12, 345]}, …]
    status VARCHAR,                            -- ok | refused | failed
    error VARCHAR,
    labels_sha256 VARCHAR,                     -- of the labels that it was made from
    prompt_sha256 VARCHAR,
    created_at TIMESTAMP,
    PRIMARY KEY (run_id, labeler)
);
