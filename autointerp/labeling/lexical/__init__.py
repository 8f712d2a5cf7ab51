"""Rules over plain text that say what a latent fires on: found by contrast, stated in words, scored by running them."""

from autointerp.labeling.lexical.rule import NO_RULE, Atom, Clause, Rule, parse_rule

__all__ = ["NO_RULE", "Atom", "Clause", "Rule", "parse_rule"]
