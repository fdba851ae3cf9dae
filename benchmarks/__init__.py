"""What the plugin is measured with: a demonstration, and one program per figure in the README.

Run them from the root of the repository, as ``python -m benchmarks.demo``; see ``benchmarks/README.md``.
"""
