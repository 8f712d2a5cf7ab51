"""The demo's own organism: a tiny language model, its SAE and an adapter, and the script that trains them."""
