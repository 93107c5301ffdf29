"""Input pipelines. Nothing in this package imports jax: it runs in worker processes."""
