"""The losses of mPLUG as pure functions of arrays; each returns a masked (sum, count)."""
