"""What `python -m mplug_jax.data.pack` consists of; only `pipeline` needs Apache Beam."""
