"""Prepares every process of a server for the V2 model runner on a CPU; this folder is on its PYTHONPATH."""

from aasd_testing import v2_on_cpu

v2_on_cpu.prepare()
