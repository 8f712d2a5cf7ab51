-- Where the money of a run went: the ledger summed up by model and by what was asked.

CREATE VIEW spent AS
SELECT
    run_id,
    provider,
    model,
    purpose,
    count(*) AS calls,
    coalesce(sum(input_tokens), 0)::BIGINT AS input_tokens,      -- the cached ones are among them
    coalesce(sum(cached_tokens), 0)::BIGINT AS cached_tokens,    -- read from the provider's cache, at a lower price
    coalesce(sum(output_tokens), 0)::BIGINT AS output_tokens,
    sum(usd) AS usd,                                             -- NULL where the model has no listed price
    coalesce(sum(usd_estimated) FILTER (usd IS NULL), 0) AS usd_in_doubt  -- answers that were lost or came without usage
FROM calls
GROUP BY run_id, provider, model, purpose;
