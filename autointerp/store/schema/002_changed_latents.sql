-- What a user queries first: one row per selected latent, its newest label, and the best score of that label's labeler.

CREATE VIEW changed_latents AS
WITH newest AS (
    SELECT * FROM labels
    QUALIFY row_number() OVER (PARTITION BY run_id, latent ORDER BY created_at DESC NULLS LAST, labeler) = 1
),
best AS (
    SELECT * FROM scores
    WHERE value IS NOT NULL AND NOT isnan(value)
    QUALIFY row_number() OVER (PARTITION BY run_id, latent, labeler ORDER BY value DESC, scorer) = 1
)
SELECT
    l.run_id,
    l.rank,
    l.latent,
    l.role,
    l.change,
    l.gain,
    l.coverage,
    n.label,
    n.effect,
    n.explanation,
    n.status,
    n.labeler,
    b.scorer,
    b.value AS score,
    b.null_value AS null_score
FROM latents AS l
LEFT JOIN newest AS n ON n.run_id = l.run_id AND n.latent = l.latent
LEFT JOIN best AS b ON b.run_id = n.run_id AND b.latent = n.latent AND b.labeler = n.labeler
WHERE l.selected;
