"""From records to tables, statistics, figures and pages. Imports nothing but `harness.record`."""
