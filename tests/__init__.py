"""A package, so that no `tests` that another project installed is found in place of this one."""
