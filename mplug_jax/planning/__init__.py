"""What a run will need, computed before it has hardware or data; see ``docs/plan.md``."""
