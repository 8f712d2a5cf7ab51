-- Rows of the change map itself, of the selected latents and the largest others: what a comparison of two runs needs.

CREATE TABLE map_rows (
    run_id VARCHAR,
    latent INTEGER,
    size DOUBLE,                 -- ‖c_j‖ · √E[z_j²], in residual-norm units, whichever selector ranks
    gain DOUBLE,                 -- ⟨c_j, d_j⟩ / ‖d_j‖²
    row FLOAT[],                 -- c_j [d_model], all rows fitted jointly
    PRIMARY KEY (run_id, latent)
);
