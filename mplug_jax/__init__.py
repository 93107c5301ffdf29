"""mPLUG (vision-language learning by cross-modal skip-connections, EMNLP 2022) in JAX."""

__version__ = "0.1.0"
