"""What the plugin is measured with; see ``docs/benchmarks.md``. Run from the root of the repository, as modules."""
