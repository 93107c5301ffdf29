"""``python -m mplug_jax.data.inspect``: what a config's data looks like before it is trained on.

The command builds the task of a config, and with it jax, which this package does without; so it
is the module ``mplug_jax.inspect_data`` that runs. The counting and drawing is
``mplug_jax.data.inspection``.
"""

import runpy

if __name__ == "__main__":
    runpy.run_module("mplug_jax.inspect_data", run_name="__main__")
